"""The key and the service (on loopback) as a check looks at them: it uploads nothing, and tells no key."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sfwatch import account
from sfwatch.notes import Level, Note
from sfwatch.settings import Api, Config, Inbox
from sfwatch.standin import Listing, StandIn, reply

KEY = "sk-very-secret-0123456789"
DEFAULT = Api()


def an_inbox(path: Path, purpose: str = "batch", api: Api = DEFAULT) -> Inbox:
    return Inbox(path, path.name, path.parent / "done", path.parent / "failed", purpose=purpose, api=api)


@pytest.fixture
def service() -> Iterator[StandIn]:
    with StandIn(key=KEY) as stand_in:
        yield stand_in


Ask = Callable[..., list[Note]]


@pytest.fixture
def ask(service: StandIn) -> Ask:
    """Ask the stand-in for a listing; `wall` defaults to its own clock."""

    def asking(key: str = KEY, wall: float | None = None, api: Api | None = None) -> list[Note]:
        api = api or Api(base_url=service.base_url)
        clock = service.clock if wall is None else lambda: wall
        return account.look(api, "batch", {"SILICONFLOW_API_KEY": key}, online=True, wall=clock)

    return asking


class TestOnline:
    def test_the_key_is_taken(self, ask: Ask, service: StandIn) -> None:
        """One GET for one entry, and not the key in any word of the answer."""
        notes = ask()
        assert [note.level for note in notes] == [Level.OK, Level.OK]
        assert [(seen.method, seen.path) for seen in service.requests] == [
            ("GET", "/v1/files?purpose=batch&limit=1")
        ]
        assert KEY not in repr(notes)

    def test_the_key_is_refused(self, ask: Ask) -> None:
        """A finding that names the host."""
        note = ask("sk-another-key-0123456789")[-1]
        assert note.level is Level.FINDING
        assert "127.0.0.1" in note.text

    def test_there_is_no_listing(self, ask: Ask, service: StandIn) -> None:
        """The service answers: an upload may do all the same."""
        service.listing = Listing(answer=reply(404, "404 page not found"))
        assert ask()[-1].level is Level.OK

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_not_now(self, ask: Ask, service: StandIn, status: int) -> None:
        """Nothing here is to be mended."""
        service.listing = Listing(answer=reply(status, "busy"))
        assert ask()[-1].level is Level.UNAVAILABLE

    def test_nobody_listens(self, ask: Ask, tmp_path: Path) -> None:
        """Not now either."""
        (_, note) = ask(api=Api(base_url="http://127.0.0.1:1/v1", connect_timeout_s=5))
        assert note.level is Level.UNAVAILABLE

    def test_its_name_does_not_resolve(self, ask: Ask) -> None:
        """Not now: as if nobody listened."""
        (_, note) = ask(api=Api(base_url="http://sfwatch.invalid/v1", connect_timeout_s=5))
        assert note.level is Level.UNAVAILABLE
        assert note.text.count("does not resolve") == 1

    def test_tls_where_http_is_spoken(self, ask: Ask, service: StandIn) -> None:
        """The sentence speaks of the address."""
        (_, note) = ask(api=Api(base_url=service.base_url.replace("http:", "https:"), connect_timeout_s=5))
        assert note.level is Level.UNAVAILABLE
        assert "does not speak TLS there: check base_url" in note.text

    @pytest.mark.parametrize("off_s", [-86400, 3600])
    def test_no_clock_is_compared(self, ask: Ask, service: StandIn, off_s: float) -> None:
        """Nothing is decided by a clock: that the two differ is nobody's trouble."""
        assert [note.level for note in ask(wall=service.clock() + off_s)] == [Level.OK, Level.OK]

    def test_without_a_key_nobody_is_asked(self, ask: Ask, service: StandIn) -> None:
        """That it is missing is the finding."""
        (note,) = ask(key="")
        assert (note.level, service.requests) == (Level.FINDING, [])
        assert "systemd credential" in note.text

    def test_each_target_once(self, tmp_path: Path) -> None:
        """Two inboxes that share host and key make one request."""
        other = Api(key_file=tmp_path / "key")
        inboxes = (
            an_inbox(tmp_path / "a"),
            an_inbox(tmp_path / "b", purpose="x"),
            an_inbox(tmp_path / "c", api=other),
        )
        assert account.targets(Config(inboxes)) == [(Api(), "batch"), (other, "batch")]


def test_an_open_key_file(tmp_path: Path) -> None:
    """Where the key comes from is said, and that others can read it; the key itself is not."""
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o644)
    notes = account.look(Api(key_file=file), "batch", {}, online=False, wall=float)
    assert [note.level for note in notes] == [Level.OK, Level.WARNING]
    assert str(file) in notes[0].text
    assert KEY not in repr(notes)
