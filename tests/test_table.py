"""The table of files: nothing is lost in it, nothing comes too early, and left-over places do no harm."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from sfwatch.table import Entry, Stage, Table

NAMES = st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["x", "y", "z"]))
TIMES = st.integers(0, 20).map(float)


class Files(RuleBasedStateMachine):
    """Any sequence of what the main thread does, beside a plain list of what must come of it."""

    taken = Bundle("taken")

    @initialize()
    def begin(self) -> None:
        self.table = Table()
        self.now = 0.0
        self.model: dict[tuple[str, str], Entry] = {}

    @rule(key=NAMES)
    def add(self, key: tuple[str, str]) -> None:
        """A name that is seen again is another file; the places of the earlier one are stale."""
        self.model[key] = self.table.add(key, self.now)

    @rule(key=NAMES)
    def remove(self, key: tuple[str, str]) -> None:
        entry = self.model.pop(key, None)
        if entry is not None:
            self.table.remove(entry)

    @rule(key=NAMES, after=TIMES, waits=st.booleans())
    def later(self, key: tuple[str, str], after: float, waits: bool) -> None:  # noqa: FBT001
        entry = self.model.get(key)
        if entry is not None:
            (self.table.wait if waits else self.table.settle)(entry, self.now + after)

    @rule(key=NAMES)
    def ready(self, key: tuple[str, str]) -> None:
        entry = self.model.get(key)
        if entry is not None:
            self.table.ready(entry)

    @rule(key=NAMES)
    def park(self, key: tuple[str, str]) -> None:
        entry = self.model.get(key)
        if entry is not None:
            entry.stage = Stage.PARKED

    @rule(by=TIMES)
    def time_goes_by(self, by: float) -> None:
        self.now += by

    @rule(target=taken)
    def pop_due(self) -> Entry | None:
        due = [e for e in self.model.values() if e.stage in (Stage.SETTLING, Stage.WAITING)]
        due = [e for e in due if e.due_at <= self.now]
        entry = self.table.pop_due(self.now)
        if entry is None:
            assert due == []
            return None
        assert entry in due
        assert entry.due_at == min(e.due_at for e in due if e.inbox == entry.inbox)
        entry.stage = Stage.UNDER_WAY
        return entry

    @rule(target=taken, inbox=st.sampled_from(["a", "b"]))
    def pop_ready(self, inbox: str) -> Entry | None:
        ready = [e for e in self.model.values() if e.stage is Stage.READY and e.inbox == inbox]
        entry = self.table.pop_ready(inbox)
        if entry is None:
            assert ready == []
            return None
        assert entry is min(ready, key=lambda e: (e.seen_at, e.name))
        entry.stage = Stage.UNDER_WAY
        return entry

    @rule(entry=consumes(taken), after=TIMES)
    def try_again(self, entry: Entry | None, after: float) -> None:
        if entry is not None and self.model.get(entry.key) is entry:
            self.table.wait(entry, self.now + after)

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        assert {id(e) for e in self.table.entries()} == {id(e) for e in self.model.values()}
        assert len(self.table) == len(self.model)

    @invariant()
    def the_next_waking_is_never_too_late(self) -> None:
        times = [e.due_at for e in self.model.values() if e.stage in (Stage.SETTLING, Stage.WAITING)]
        next_due = self.table.next_due()
        assert not times or (next_due is not None and next_due <= min(times))


Files.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFiles = Files.TestCase


def test_an_entry_that_was_replaced_cannot_remove_its_successor() -> None:
    """A worker that comes back late speaks of the file that it had, not of the one that has its name now."""
    table = Table()
    old = table.add(("a", "x"), 0.0)
    new = table.add(("a", "x"), 1.0)
    table.remove(old)
    assert table.get(("a", "x")) is new


def test_inboxes_take_turns_in_what_is_due() -> None:
    """One file that comes into an inbox is not behind the thousands that came into another."""
    table = Table()
    for number in range(1000):
        table.add(("a", f"{number:04d}"), 0.0)
    table.add(("b", "x"), 1.0)
    first = [table.pop_due(2.0) for _ in range(3)]
    assert [entry.key for entry in first if entry is not None] == [("a", "0000"), ("b", "x"), ("a", "0001")]
