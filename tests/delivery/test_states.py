"""The table of states: complete, and strict."""

import pytest

from sfwatch.delivery.states import TABLE, FileState, ImpossibleError, advance, may_follow
from sfwatch.journal import State

FINAL = {FileState.DONE, FileState.FAILED, FileState.GONE}


def test_every_state_is_in_the_table_and_can_be_reached() -> None:
    """From the first sight of a file there is a way to each."""
    assert set(TABLE) == set(FileState)
    reached, new = set[FileState](), {FileState.SETTLING}
    while new:
        reached |= new
        new = {each for state in new for ends in TABLE[state].next.values() for each in ends} - reached
    assert reached == set(FileState)


def test_every_state_has_a_way_to_an_end() -> None:
    """Nothing is stuck by the table."""
    for state in FileState:
        reached, new = set[FileState](), {state}
        while new:
            reached |= new
            new = {each for one in new for ends in TABLE[one].next.values() for each in ends} - reached
        assert reached & FINAL, state


def test_what_the_service_may_have_is_durable_and_claimed() -> None:
    """So it is found again after a crash, and nobody else can take it."""
    for state in (FileState.SENDING, FileState.UNKNOWN, FileState.ACCEPTED):
        assert (TABLE[state].durable, TABLE[state].claimed) == (True, True)


def test_an_event_that_a_state_does_not_list_is_a_bug() -> None:
    """It raises; a listed one tells what may follow."""
    assert advance(FileState.SENDING, "accepted") == {FileState.ACCEPTED}
    with pytest.raises(ImpossibleError, match="accepted in waiting"):
        advance(FileState.WAITING, "accepted")
    for state in FINAL - {FileState.DONE, FileState.FAILED}:
        assert TABLE[state].next == {}


@pytest.mark.parametrize(
    ("before", "after", "may"),
    [
        (FileState.SENDING, FileState.ACCEPTED, True),
        (FileState.UNKNOWN, FileState.SENDING, True),  # over PROVED, which is in no row
        (FileState.WAITING, FileState.SENDING, True),  # over QUEUED and CLAIMED
        (FileState.DOUBTED, FileState.REJECTED, True),
        (FileState.SENDING, FileState.DONE, False),
        (FileState.ORPHAN, FileState.SENDING, False),  # the file itself gets another row
        (FileState.ACCEPTED, FileState.SENDING, False),
        (FileState.ACCEPTED, FileState.REJECTED, False),
    ],
)
def test_which_rows_may_follow(before: FileState, after: FileState, may: bool) -> None:  # noqa: FBT001
    """Only what stands in rows is compared; what lies between may be passed over."""
    assert may_follow(before, after) is may


def test_the_journals_open_states_are_in_the_table() -> None:
    """By their names; what the journal calls refused is rejected here."""
    named = {state.value for state in FileState if TABLE[state].durable}
    journal = {state.value for state in State} - {"refused", "done", "failed"}
    assert named == journal | {"rejected"}
