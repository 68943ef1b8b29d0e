"""SIGHUP: other settings are taken up between two turns of the loop; what is under way is not disturbed."""

import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from loop import Loop, line
from world import fill, needs_root, tmpfs

from sfwatch.core import Signalled
from sfwatch.settings import Api, Config, Uploads
from sfwatch.standin import Listing, StandIn, answering, storing_then_resetting

REFUSED = answering(401, {"code": 20001, "message": "no"})
DOUBTFUL = answering(400, {"code": 29999, "message": "no such purpose"})


@pytest.fixture(name="loop")
def _loop(tmp_path: Path) -> Iterator[Loop]:
    with StandIn() as service, closing(Loop(tmp_path, service)) as loop:
        yield loop


def reload(loop: Loop, *names: str) -> Loop:
    """Send SIGHUP after the configuration has come to name these inboxes."""
    loop.names = names or loop.names
    for name in loop.names:
        (loop.root / name).mkdir(exist_ok=True)
    return loop.signal(signal.SIGHUP)


def test_a_new_inbox_is_taken_up(loop: Loop) -> None:
    """With all that lies in it; the others go on as they were."""
    loop.start()
    reload(loop, "a", "b")
    loop.drop("b", "x.jsonl")
    loop.drop("a", "y.jsonl")
    loop.look().run(10)
    assert loop.done("b") == ["x.jsonl"]
    assert loop.done("a") == ["y.jsonl"]
    assert [e["inboxes"] for e in loop.said("config.loaded")] == [["a"], ["a", "b"]]


def test_an_inbox_that_is_gone_is_let_go_of(loop: Loop) -> None:
    """What lies in it is left alone from then on; what comes is not seen."""
    loop.names = ("a", "b")
    (loop.root / "b").mkdir()
    loop.start()
    waiting = loop.drop("b", "x.jsonl")
    loop.look()
    reload(loop, "a").run(100)
    loop.ring("b", "x.jsonl").run(100)
    assert waiting.exists()
    assert loop.posts() == 0
    assert [e["inbox"] for e in loop.said("inbox.released")] == ["b"]
    loop.names = ("a", "b")  # for the check of all places


def test_an_upload_under_way_is_not_interrupted(loop: Loop) -> None:
    """Its inbox is gone from the settings: it is finished first, recorded and moved."""
    loop.names = ("a", "b")
    (loop.root / "b").mkdir()
    loop.start()
    loop.pool.holds = True
    loop.drop("b", "x.jsonl")
    loop.look().run(10)
    assert len(loop.pool.held) == 1
    reload(loop, "a").run(10)
    assert not loop.said("inbox.released")
    loop.pool.release()
    loop.pool.holds = False
    loop.run(10)
    loop.names = ("a", "b")
    assert loop.done("b") == ["x.jsonl"]
    assert loop.said("inbox.released")
    assert loop.daemon.services.keys() == {loop.daemon.service_of["a"].name}


def test_a_file_that_goes_back_into_a_released_inbox_stays_there(loop: Loop) -> None:
    """Its upload failed meanwhile: it is nobody's to try again."""
    loop.names = ("a", "b")
    (loop.root / "b").mkdir()
    loop.start()
    loop.pool.holds = True
    path = loop.drop("b", "x.jsonl")
    loop.look().run(10)
    reload(loop, "a")
    loop.service.always = answering(503, {"code": 50505, "message": "busy"})
    loop.pool.release()
    loop.run(1000)
    assert path.exists()
    assert loop.posts() == 1
    assert loop.said("inbox.released")
    loop.names = ("a", "b")


def test_many_signals_at_once_are_one(loop: Loop) -> None:
    """Whoever sends thousands keeps neither the files nor the next SIGTERM waiting."""
    loop.start()
    for _ in range(400):
        loop.daemon.mailbox.put(Signalled(signal.SIGHUP))
    loop.signal(signal.SIGTERM)
    assert loop.daemon.over()
    assert len(loop.said("config.loaded")) == 1
    loop.restart()
    for _ in range(400):
        loop.daemon.mailbox.put(Signalled(signal.SIGHUP))
    loop.settle_down()
    assert len(loop.said("config.loaded")) == 3


def test_a_bad_configuration_changes_nothing(loop: Loop) -> None:
    """It is said what is wrong with it, and the old one counts."""
    loop.start()
    loop.problems = ("inboxes[0].settle (line 3): 2x is no duration",)
    reload(loop, "b")
    assert [e["problems"] for e in loop.said("config.rejected")] == [list(loop.problems)]
    loop.names = ("a",)
    loop.drop("a", "x.jsonl")
    loop.look().run(10)
    assert loop.done("a") == ["x.jsonl"]


def test_another_folder_under_the_same_name(loop: Loop) -> None:
    """The old one is let go of after its work, and only then the new one is taken up."""
    loop.start()
    loop.pool.holds = True
    loop.drop("a", "x.jsonl")
    loop.look().run(10)
    before = loop.settings()
    elsewhere = loop.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "y.jsonl").write_text(line(1, text="elsewhere"))
    moved = replace(before, inboxes=(replace(before.inboxes[0], path=elsewhere),))
    _use(loop, moved)
    reload(loop).run(100)
    assert loop.daemon.inboxes.watched["a"].inbox.path == before.inboxes[0].path
    loop.pool.release()
    loop.pool.holds = False
    loop.run(10)
    assert loop.daemon.inboxes.watched["a"].inbox.path == elsewhere
    assert loop.done("a") == ["x.jsonl", "y.jsonl"]
    assert len(loop.service.stored) == 2
    loop.lines[:] = []  # y.jsonl came otherwise than by a drop
    loop.drops.clear()


@pytest.mark.parametrize("new", [{"name": "z"}, {"path": "elsewhere"}])
def test_another_name_or_folder_that_goes_to_another_target(loop: Loop, new: dict[str, str]) -> None:
    """Its target is kept for it while an upload to the former one keeps it waiting."""
    loop.start()
    loop.pool.holds = True
    loop.drop("a", "x.jsonl")
    loop.look().run(10)
    before = loop.settings().inboxes[0]
    (loop.root / "elsewhere").mkdir()
    with StandIn() as other:
        after = replace(
            before,
            name=new.get("name", "a"),
            path=loop.root / new["path"] if "path" in new else before.path,
            api=Api(base_url=other.base_url),
        )
        _use(loop, replace(loop.settings(), inboxes=(after,)))
        reload(loop).run(100)
        loop.pool.holds = False
        loop.pool.release()
        loop.run(10)
        assert [w.inbox for w in loop.daemon.inboxes.watched.values()] == [after]
        (after.path / "y.jsonl").write_text(line(1, text="elsewhere"))
        loop.look().run(60)
        assert loop.done("a") == ["x.jsonl", "y.jsonl"]
        assert len(other.stored) == 1
        loop.service.stored.extend(other.stored)
    loop.lines[:] = []  # y.jsonl came otherwise than by a drop
    loop.drops.clear()


def _use(loop: Loop, config: Config) -> None:
    loop.settings = lambda: config  # type: ignore[method-assign]


def test_a_held_target_is_asked_at_once(loop: Loop) -> None:
    """Whoever reloads may have mended the key: its file is read at once, and the files go."""
    loop.environ.clear()
    key = loop.root / "key"
    loop.api = Api(base_url=loop.service.base_url, key_file=key)
    loop.start()
    loop.drop("a", "x.jsonl")
    loop.look().run(1000)
    assert len(loop.said("target.held", reason="no_key")) == 1
    key.write_text("sk-very-secret-0123456789")
    key.chmod(0o600)
    reload(loop).run(5)
    assert loop.done("a") == ["x.jsonl"]
    assert len(loop.said("target.resumed")) == 1


def test_an_inbox_goes_to_another_target(loop: Loop) -> None:
    """The old target's faults are no longer its own; a target without inboxes is forgotten, which is said."""
    good = loop.service.base_url
    loop.service.always = REFUSED
    loop.start()
    loop.drop("a", "x.jsonl")
    loop.look().run(60)
    assert loop.said("target.held", reason="unauthorized")
    with StandIn() as other:
        loop.api = Api(base_url=other.base_url)
        reload(loop).run(10)
        assert loop.done("a") == ["x.jsonl"]
        assert len(other.stored) == 1
        loop.service.stored.extend(other.stored)
    assert len(loop.said("target.resumed")) == 1
    assert good not in str(loop.daemon.services.keys())
    assert len(loop.daemon.services) == 1


def test_other_patterns_and_settle_times_count_at_once(loop: Loop) -> None:
    """What lies there is seen by the new settings' light; what is not matched any more has not vanished."""
    loop.start()
    loop.drop("a", "x.jsonl")
    loop.drop("a", "y.ndjson")
    loop.look()
    loop.inbox = {"match": ("*.ndjson",), "settle_s": 0.5}
    reload(loop).run(1)
    assert loop.waiting_in("a") == ["x.jsonl"]
    assert not loop.said("file.vanished")


def test_other_upload_settings_count_at_once(loop: Loop) -> None:
    """The number of uploads at once, here."""
    loop.uploads = Uploads(concurrency=1)
    loop.start()
    loop.pool.holds = True
    for number in range(6):
        loop.drop("a", f"{number}.jsonl")
    loop.look().run(10)
    assert len(loop.pool.held) == 1
    loop.uploads = Uploads(concurrency=3)
    reload(loop).run(10)
    assert len(loop.pool.held) == 3
    loop.pool.holds = False
    loop.pool.release(3)
    loop.run(10)


def test_a_lost_upload_is_still_looked_for_after_its_inbox_is_gone(loop: Loop) -> None:
    """It is claimed: the inbox is let go of only when it is known what became of it."""
    loop.names = ("a", "b")
    (loop.root / "b").mkdir()
    loop.start()
    loop.service.script.append(storing_then_resetting())
    loop.drop("b", "x.jsonl")
    loop.look().run(2.5)
    assert loop.said("upload.unknown")
    reload(loop, "a")
    assert not loop.said("inbox.released")
    loop.run(100)
    loop.names = ("a", "b")
    assert loop.said("upload.recovered")
    assert loop.done("b") == ["x.jsonl"]
    assert loop.said("inbox.released")


def test_a_held_target_that_has_lost_its_inboxes_is_not_asked_any_more(loop: Loop) -> None:
    """Its last upload is still under way; there is nobody left for whom it should be probed."""
    loop.uploads = Uploads(concurrency=3)
    loop.start()
    loop.pool.holds = True
    loop.drop("a", "x.jsonl")
    loop.drop("a", "y.jsonl")
    loop.look().run(10)
    assert len(loop.pool.held) == 2
    loop.service.script.append(REFUSED)
    with StandIn() as other:
        loop.api = Api(base_url=other.base_url)
        reload(loop)
        loop.pool.release()
        loop.run(600)
        assert loop.said("target.held", reason="unauthorized")
        loop.pool.holds = False
        loop.pool.release(len(loop.pool.held))
        loop.run(600)
        assert loop.done("a") == ["x.jsonl", "y.jsonl"]
        assert len(loop.daemon.services) == 1
        loop.service.stored.extend(other.stored)


def _renamed(loop: Loop, **names: str) -> Config:
    """The settings with other names for the same folders."""
    settings = loop.settings()
    inboxes = [replace(inbox, name=names.get(inbox.name, inbox.name)) for inbox in settings.inboxes]
    return replace(settings, inboxes=tuple(inboxes))


def _lose(loop: Loop, name: str) -> None:
    """Let an upload's answer be lost, of which nobody can tell afterwards."""
    loop.service.listing = Listing(answer=answering(404, {}).answer)
    loop.uploads = replace(loop.uploads, resend_limit=0)
    loop.start()
    loop.service.script.append(storing_then_resetting())
    loop.drop(name, "x.jsonl")
    loop.look().run(600)
    assert loop.said("upload.undecided")


def test_an_inbox_that_gets_another_name_goes_on_with_its_lost_uploads(loop: Loop) -> None:
    """Under the new name, at once: of the old one nothing is left but what lies claimed there."""
    _lose(loop, "a")
    _use(loop, _renamed(loop, a="z"))
    reload(loop).run(60)
    assert not loop.said("inbox.lost")
    assert loop.daemon.inboxes.watched.keys() == {"z"}
    loop.drop("a", "y.jsonl")
    loop.look().run(60)
    assert loop.done("a") == ["y.jsonl"]
    assert loop.claims("a") == ["x.jsonl"]
    assert loop.entry("z", "x.jsonl").claimed
    assert loop.posts() == 2
    loop.lines[:] = []  # its events are those of another inbox
    loop.drops.clear()


def test_an_inbox_that_gets_another_name_is_not_lost_meanwhile(loop: Loop) -> None:
    """An upload of the old name is under way: the new one begins once that is done."""
    loop.start()
    loop.pool.holds = True
    loop.drop("a", "x.jsonl")
    loop.drop("a", "y.jsonl")
    loop.look().run(10)
    _use(loop, _renamed(loop, a="z"))
    reload(loop).run(60)
    loop.pool.holds = False
    loop.pool.release(2)
    loop.run(60)
    assert not loop.said("inbox.lost")
    assert not loop.said("file.waiting")
    assert loop.daemon.inboxes.watched.keys() == {"z"}
    assert loop.done("a") == ["x.jsonl", "y.jsonl"]


def test_two_inboxes_that_change_their_names(loop: Loop) -> None:
    """Also if each has an upload of which nobody can tell."""
    loop.names = ("a", "b")
    (loop.root / "b").mkdir()
    _lose(loop, "a")
    _use(loop, _renamed(loop, a="b", b="a"))
    reload(loop).run(60)
    assert not loop.said("inbox.lost")
    assert loop.daemon.inboxes.watched["b"].inbox.path == loop.inbox_of("a")
    loop.drop("a", "y.jsonl")
    loop.drop("b", "z.jsonl")
    loop.look().run(60)
    assert loop.done("a") == ["y.jsonl"]
    assert loop.done("b") == ["z.jsonl"]
    assert loop.claims("a") == ["x.jsonl"]
    loop.lines[:] = []
    loop.drops.clear()


def test_a_folder_that_is_lost_does_not_keep_its_name(loop: Loop) -> None:
    """Its disk is gone with a lost upload on it; another folder takes its place in the settings."""
    _lose(loop, "a")
    gone = loop.inbox_of("a").rename(loop.root / "gone")
    loop.look().run(60)
    assert loop.said("inbox.lost")
    elsewhere = loop.root / "a" / "elsewhere"
    elsewhere.mkdir()
    settings = loop.settings()
    _use(loop, replace(settings, inboxes=(replace(settings.inboxes[0], path=elsewhere),)))
    reload(loop).run(60)
    assert loop.daemon.inboxes.watched["a"].inbox.path == elsewhere
    assert loop.daemon.inboxes.watched["a"].lost is None
    loop.run(600)
    gone.rename(loop.inbox_of("a"))
    loop.lines[:] = []
    loop.drops.clear()


def test_a_lost_inbox_that_is_gone_from_the_settings_is_let_go_of(loop: Loop) -> None:
    """What is claimed in it waits until the settings name it again."""
    loop.names = ("b", "a")
    (loop.root / "b").mkdir()
    _lose(loop, "a")
    gone = loop.inbox_of("a").rename(loop.root / "gone")
    loop.look().run(60)
    reload(loop, "b").run(60)
    assert loop.said("inbox.released")
    gone.rename(loop.inbox_of("a"))
    reload(loop, "b", "a").run(600)
    assert loop.claims("a") == ["x.jsonl"]
    assert len(loop.said("upload.undecided")) == 2
    assert loop.posts() == 1


@pytest.mark.parametrize("during", ["a reload", "a restart"])
def test_a_folder_that_was_moved_with_its_claims_is_known_again(loop: Loop, during: str) -> None:
    """Its settings name another path now, but its uploads are the same: none is sent a second time."""
    loop.names = ("a", "b")
    (loop.root / "b").mkdir()
    _lose(loop, "a")
    loop.drop("a", "accepted.jsonl")
    loop.on_say("upload.accepted", (loop.root / "a" / "done").rmdir)
    loop.look().run(60)
    assert sorted(loop.claims("a")) == ["accepted.jsonl", "x.jsonl"]
    settings = loop.settings()
    elsewhere = loop.inbox_of("a").rename(loop.root / "a" / "elsewhere")
    moved = replace(settings.inboxes[0], path=elsewhere)
    _use(loop, replace(settings, inboxes=(moved, settings.inboxes[1])))
    loop.on_say("upload.accepted", lambda: None)
    (loop.root / "a" / "done").mkdir()
    if during == "a restart":
        loop.restart().run(600)
    else:
        reload(loop).run(600)
    assert loop.done("a") == ["accepted.jsonl"]
    assert loop.posts() == 2
    assert loop.said("upload.undecided")[1:]
    elsewhere.rename(loop.inbox_of("a"))


def test_a_folder_that_nothing_needs_any_more_is_not_held(loop: Loop) -> None:
    """Done was moved to another disk: the end of the old one's hold is said."""
    loop.start()
    (loop.root / "a" / "done").rmdir()
    loop.drop("a", "x.jsonl")
    loop.look().run(60)
    assert loop.said("storage.held")
    elsewhere = loop.root / "a" / "elsewhere"
    loop.inbox = {"done": elsewhere}
    loop.done_elsewhere["a"] = elsewhere
    reload(loop).run(60)
    assert [path.name for path in elsewhere.glob("*.jsonl")] == ["x.jsonl"]
    assert not loop.daemon.storage.holds
    assert len(loop.said("storage.resumed")) == 1


def test_a_refusal_that_is_still_doubted_is_tried_under_the_new_settings(loop: Loop) -> None:
    """They may be what was at fault: nothing was accepted under the old ones."""
    loop.start()
    loop.service.script.append(DOUBTFUL)
    loop.drop("a", "x.jsonl")
    loop.look().run(5)
    assert loop.posts() == 1
    reload(loop).run(60)
    assert loop.done("a") == ["x.jsonl"]


def test_a_refusal_that_is_still_doubted_goes_back_into_a_folder_that_is_let_go_of(loop: Loop) -> None:
    """Whoever dropped it finds it there, and nothing of it is left among the claims."""
    loop.start()
    loop.service.script.append(DOUBTFUL)
    path = loop.drop("a", "x.jsonl")
    loop.look().run(5)
    settings = loop.settings()
    (loop.root / "elsewhere").mkdir()
    _use(loop, replace(settings, inboxes=(replace(settings.inboxes[0], path=loop.root / "elsewhere"),)))
    reload(loop).run(10)
    assert path.exists()
    assert loop.daemon.inboxes.watched["a"].inbox.path == loop.root / "elsewhere"


@needs_root
def test_a_state_folder_that_is_full_does_not_end_a_daemon_that_reloads(loop: Loop) -> None:
    """What can't be written down then is said where a file needs it."""
    (loop.root / "b" / "inbox").mkdir(parents=True)
    with tmpfs(loop.root / "disk", "20m") as disk:
        loop.config = {"state_dir": disk / "state"}
        loop.start()
        ballast = fill(disk)
        reload(loop, "a", "b").run(60)
        assert len(loop.said("config.loaded")) == 2
        ballast.unlink()
        loop.drop("b", "x.jsonl")
        loop.look().run(60)
        assert loop.done("b") == ["x.jsonl"]
        loop.close()
        loop._daemon = None


def nobody_can_tell_of_a_marked_file(loop: Loop) -> None:
    """It and its marker are claimed, its answer is lost, and there is no listing."""
    loop.inbox = {"settle_marker": ".ok"}
    loop.service.listing = Listing(answer=answering(404, {}).answer)
    loop.uploads = replace(loop.uploads, resend_limit=0)
    loop.start()
    loop.service.script.append(storing_then_resetting())
    path = loop.drop("a", "x.jsonl")
    path.with_name("x.jsonl.ok").touch()
    loop.look().run(600)


def test_a_claimed_marker_is_no_file_when_the_settings_know_no_markers_any_more(loop: Loop) -> None:
    """It stays with its file, of which nobody can tell what became of it."""
    nobody_can_tell_of_a_marked_file(loop)
    assert sorted(loop.claims("a")) == ["x.jsonl", "x.jsonl.ok"]
    loop.inbox = {}
    loop.restart().run(600)
    assert sorted(loop.claims("a")) == ["x.jsonl", "x.jsonl.ok"]
    assert not loop.said("file.failed")
    assert loop.posts() == 1
    (loop.inbox_of("a") / ".sfwatch" / loop.claims_folder("a") / "x.jsonl.ok").unlink()


def test_a_claim_that_was_never_sent_goes_back_when_its_name_is_not_taken_any_more(loop: Loop) -> None:
    """The daemon was killed just after it had claimed the file, and the patterns were changed."""
    loop.start()
    path = loop.drop("a", "x.jsonl")
    loop.claim("a", "x.jsonl")
    loop.inbox = {"match": ("*.ndjson",)}
    loop.restart().run(60)
    assert path.exists()
    assert loop.posts() == 0


def test_a_claimed_marker_is_no_lost_upload_after_the_journal_was_lost(loop: Loop) -> None:
    """Of all that was claimed nothing is known then; a marker is never sent all the same."""
    nobody_can_tell_of_a_marked_file(loop)
    loop.die()
    for file in (loop.root / "state").glob("journal*"):
        file.unlink()
    loop.start().run(600)
    assert [known.name for known in loop.daemon.journal.under_way()] == ["x.jsonl"]
    assert sorted(loop.claims("a")) == ["x.jsonl", "x.jsonl.ok"]
    assert loop.posts() == 1
    (loop.inbox_of("a") / ".sfwatch" / loop.claims_folder("a") / "x.jsonl.ok").unlink()
