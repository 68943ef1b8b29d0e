"""`sfwatch retry`: failed files go back where they came from, and lost uploads are sent again when asked."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from loop import Loop, line
from world import fill, needs_root, tmpfs

from sfwatch import files, retry
from sfwatch.settings import Config, Inbox
from sfwatch.standin import Listing, StandIn, answering, storing_then_resetting

BAD = "not json\n"


@pytest.fixture(name="loop")
def _loop(tmp_path: Path) -> Iterator[Loop]:
    with StandIn() as service, closing(Loop(tmp_path, service)) as loop:
        yield loop


@pytest.fixture(name="config")
def _config(tmp_path: Path) -> Config:
    """One inbox whose failed folder holds x.jsonl with its report."""
    for name in ("inbox", "done", "failed"):
        (tmp_path / name).mkdir()
    inbox = Inbox(path=tmp_path / "inbox", name="a", done=tmp_path / "done", failed=tmp_path / "failed")
    fail(inbox.failed, "x.jsonl")
    return Config(inboxes=(inbox,), state_dir=tmp_path / "state")


def fail(folder: Path, name: str, **facts: str | None) -> Path:
    """A failed file as sfwatch leaves it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(BAD)
    report = {"schema": 1, "reason": "not_json", "inbox": "a", "original_name": name, **facts}
    (folder / f"{name}.error.json").write_text(json.dumps(report))
    return path


def again(config: Config, name: str, inbox: str | None = None) -> Path:
    failed = retry.named(config, name)
    assert failed is not None
    return retry.put_back(config, failed, inbox=inbox)


def lies_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_failed_file_goes_back_and_its_report_into_the_history(config: Config) -> None:
    """The file under the name under which it was dropped; nothing is left where it lay."""
    inbox = config.inboxes[0]
    assert again(config, "x.jsonl") == inbox.path / "x.jsonl"
    assert (inbox.path / "x.jsonl").read_text() == BAD
    assert lies_in(inbox.failed) == [".sfwatch-history/x.jsonl.error.json"]


def test_a_file_is_found_by_its_path_and_by_the_name_it_was_dropped_under(config: Config) -> None:
    """In failed it may have another one, since its own was taken."""
    inbox = config.inboxes[0]
    renamed = fail(inbox.failed, "y.20261122T200112Z.jsonl", original_name="y.jsonl")
    assert again(config, "y.jsonl") == inbox.path / "y.jsonl"
    assert not renamed.exists()
    again(config, str(inbox.failed / "x.jsonl"))
    assert lies_in(inbox.path) == ["x.jsonl", "y.jsonl"]


def test_a_name_that_may_be_several_files_is_refused(config: Config) -> None:
    """It says which, so that one can be named by its path."""
    failed = config.inboxes[0].failed
    fail(failed, "y.1.jsonl", original_name="y.jsonl")
    fail(failed, "y.2.jsonl", original_name="y.jsonl")
    with pytest.raises(retry.NotRetriedError, match=r"y\.1\.jsonl, .*y\.2\.jsonl"):
        retry.named(config, "y.jsonl")


def test_all_or_those_of_one_reason(config: Config) -> None:
    """Only files that have a report; those whose report went into the history are no longer failed."""
    failed = config.inboxes[0].failed
    fail(failed, "y.jsonl", reason="gave_up")
    (failed / "stranger.jsonl").write_text(BAD)
    assert [it.name for it in retry.everything(config)] == ["x.jsonl", "y.jsonl"]
    assert [it.name for it in retry.everything(config, "gave_up")] == ["y.jsonl"]
    for it in list(retry.everything(config)):
        retry.put_back(config, it)
    assert list(retry.everything(config)) == []


def test_a_name_that_is_taken_in_the_inbox_is_never_overwritten(config: Config) -> None:
    """The file and its report stay as they are."""
    inbox = config.inboxes[0]
    (inbox.path / "x.jsonl").write_text("somebody's")
    with pytest.raises(retry.NotRetriedError, match="is taken"):
        again(config, "x.jsonl")
    assert (inbox.path / "x.jsonl").read_text() == "somebody's"
    assert lies_in(inbox.failed) == ["x.jsonl", "x.jsonl.error.json"]


def test_without_a_report_the_inbox_must_be_named(config: Config) -> None:
    """And it must be one that there is."""
    inbox = config.inboxes[0]
    (inbox.failed / "x.jsonl.error.json").unlink()
    with pytest.raises(retry.NotRetriedError, match="--inbox"):
        again(config, "x.jsonl")
    with pytest.raises(retry.NotRetriedError, match="no inbox is called b"):
        again(config, "x.jsonl", inbox="b")
    assert again(config, "x.jsonl", inbox="a") == inbox.path / "x.jsonl"


def test_a_retry_that_was_cut_off_is_continued(config: Config) -> None:
    """The report is in the history already, the file still in failed."""
    inbox = config.inboxes[0]
    (inbox.failed / retry.HISTORY).mkdir()
    (inbox.failed / "x.jsonl.error.json").rename(inbox.failed / retry.HISTORY / "x.jsonl.error.json")
    assert again(config, "x.jsonl") == inbox.path / "x.jsonl"


def test_a_retry_that_was_cut_off_goes_by_the_latest_report(config: Config) -> None:
    """An earlier file of that name may have been another inbox's."""
    (inbox,) = config.inboxes
    other = replace(inbox, name="b", path=inbox.path.with_name("other"))
    other.path.mkdir()
    both = replace(config, inboxes=(inbox, other))
    again(both, "x.jsonl").unlink()
    fail(inbox.failed, "x.jsonl", inbox="b")
    with files.folder(inbox.failed) as source:
        retry._into_history(source, "x.jsonl", datetime.now(UTC))
    assert again(both, "x.jsonl") == other.path / "x.jsonl"


@needs_root
def test_a_file_that_could_not_be_moved_is_found_by_the_next_retry(config: Config) -> None:
    """Its report is where it was, so that `--all` names it again once there is room."""
    (inbox,) = config.inboxes
    with tmpfs(inbox.path, "64k"):
        ballast = fill(inbox.path)
        for name in ("x.jsonl", "y.jsonl"):
            fail(inbox.failed, name)
            with pytest.raises(retry.NotRetriedError, match="No space left"):
                again(config, name)
        assert [it.name for it in retry.everything(config)] == ["x.jsonl", "y.jsonl"]
        ballast.unlink()
        for it in list(retry.everything(config)):
            retry.put_back(config, it)
        assert lies_in(inbox.path) == ["x.jsonl", "y.jsonl"]


def test_a_report_that_nobody_can_read_holds_up_no_other(config: Config) -> None:
    """Whoever may write to the failed folder may have put anything there."""
    (inbox,) = config.inboxes
    fail(inbox.failed, "a.jsonl")
    (inbox.failed / "a.jsonl.error.json").write_text("[" * 100_000)
    fail(inbox.failed, "b.jsonl")
    (inbox.failed / "b.jsonl.error.json").unlink()
    os.mkfifo(inbox.failed / "b.jsonl.error.json")
    assert [it.name for it in retry.everything(config)] == ["x.jsonl"]
    with pytest.raises(retry.NotRetriedError, match="--inbox"):
        again(config, "a.jsonl")


def test_a_name_that_is_not_taken_any_more_is_refused(config: Config) -> None:
    """It would lie in its inbox for ever: the patterns have changed, or the report was forged."""
    (inbox,) = config.inboxes
    others = replace(config, inboxes=(replace(inbox, match=("*.ndjson",)),))
    with pytest.raises(retry.NotRetriedError, match="no file of that name is taken"):
        again(others, "x.jsonl")
    fail(inbox.failed, "y.jsonl", original_name=".y.jsonl")
    with pytest.raises(retry.NotRetriedError, match="no file of that name is taken"):
        again(config, "y.jsonl")


def test_a_request_that_is_made_twice_is_one(config: Config) -> None:
    """Whoever is impatient does not pay for a third upload."""
    config.state_dir.mkdir()
    for _ in range(2):
        retry.request(config.state_dir, "a", "x.jsonl")
    assert len(retry.requests(config.state_dir)) == 1


def test_reports_of_the_same_name_are_all_kept(config: Config) -> None:
    """A file may fail as often as it likes."""
    inbox = config.inboxes[0]
    for _ in range(3):
        fail(inbox.failed, "x.jsonl")
        again(config, "x.jsonl").unlink()
    assert len(lies_in(inbox.failed / retry.HISTORY)) == 3


@pytest.mark.parametrize("name", ["../x.jsonl", "/etc/x.jsonl", ".sfwatch/x.jsonl", "sub/x.jsonl", ""])
def test_a_forged_report_leads_nowhere(config: Config, name: str) -> None:
    """Others may write to the failed folder: nothing goes out of the inbox, or where nobody looks."""
    inbox = config.inboxes[0]
    path = fail(inbox.failed, "y.jsonl", original_name=name)
    with pytest.raises(retry.NotRetriedError):
        again(config, "y.jsonl")
    assert path.exists()
    assert lies_in(inbox.path) == []


def test_no_link_is_followed(config: Config, tmp_path: Path) -> None:
    """Neither a file, nor a report, nor the history may be one."""
    inbox = config.inboxes[0]
    secret = tmp_path / "secret.jsonl"
    secret.write_text("secret")
    (inbox.failed / "y.jsonl").symlink_to(secret)
    assert retry.named(config, "y.jsonl") is None
    (inbox.failed / retry.HISTORY).symlink_to(tmp_path)
    with pytest.raises(retry.NotRetriedError):
        again(config, "x.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "failed", "inbox", "secret.jsonl"]


def test_a_file_of_a_tree_goes_back_into_its_sub_folder(tmp_path: Path) -> None:
    """Which is made again if it is gone."""
    for name in ("inbox", "failed"):
        (tmp_path / name).mkdir()
    inbox = Inbox(tmp_path / "inbox", "a", tmp_path / "done", tmp_path / "failed", recursive=True)
    config = Config(inboxes=(inbox,))
    fail(inbox.failed, "deep/er/x.jsonl")
    assert again(config, "deep/er/x.jsonl") == inbox.path / "deep/er/x.jsonl"
    assert [it.name for it in retry.everything(config)] == []


def test_a_marker_comes_back_with_its_file(tmp_path: Path) -> None:
    """Else it would never be taken."""
    for name in ("inbox", "failed"):
        (tmp_path / name).mkdir()
    inbox = Inbox(tmp_path / "inbox", "a", tmp_path / "done", tmp_path / "failed", settle_marker=".ok")
    fail(inbox.failed, "x.jsonl")
    (inbox.failed / "x.jsonl.ok").write_text("")
    again(Config(inboxes=(inbox,)), "x.jsonl")
    assert lies_in(inbox.path) == ["x.jsonl", "x.jsonl.ok"]


def test_an_undecodable_name_comes_back_as_it_was(config: Config) -> None:
    """Its bytes are in the report."""
    inbox = config.inboxes[0]
    name = os.fsdecode(b"na\xefve.jsonl")
    fail(inbox.failed, name, original_name="na?ve.jsonl", original_name_b64="bmHvdmUuanNvbmw=")
    assert again(config, name) == inbox.path / name


def test_a_running_daemon_takes_a_mended_file_and_counts_anew(loop: Loop) -> None:
    """It was at fault, was mended in failed, and is sent from there on like any other."""
    loop.start()
    path = loop.drop("a", "x.jsonl", BAD)
    loop.look().run(40)
    assert loop.failed("a") == ["x.jsonl"]
    config = loop.settings()
    (config.inboxes[0].failed / "x.jsonl").write_text(line(1, text="mended"))
    again(config, "x.jsonl")
    assert path.exists()
    loop.look().run(10)
    assert loop.done("a") == ["x.jsonl"]
    (done,) = loop.said("file.done")
    assert done["attempts"] == 1
    loop.dropped.clear()  # what was dropped is not what is in done
    loop.drops["a", "x.jsonl"] += 1


def test_a_lost_upload_is_sent_again_on_request(loop: Loop) -> None:
    """Nobody can tell what became of it; a person takes the risk of a second one."""
    loop.service.listing = Listing(answer=answering(404, {}).answer)
    loop.uploads = loop.uploads.__class__(resend_limit=0)
    loop.start()
    loop.service.script.append(storing_then_resetting())
    loop.drop("a", "x.jsonl")
    loop.look().run(600)
    assert loop.claims("a") == ["x.jsonl"]
    config = loop.settings()
    assert retry.claimed(config, "x.jsonl") == [("a", "x.jsonl")]
    assert retry.claimed(config, str(config.inboxes[0].path / "x.jsonl")) == [("a", "x.jsonl")]
    retry.request(config.state_dir, "a", "x.jsonl")
    loop.run(60)
    assert loop.done("a") == ["x.jsonl"]
    assert retry.requests(config.state_dir) == []
    loop.twice = 1


def test_a_request_waits_until_it_is_certain_that_the_listing_does_not_tell(loop: Loop) -> None:
    """As long as the listing may show it, it is not sent a second time; found, the request is void."""
    loop.start()
    loop.service.script.append(storing_then_resetting())
    loop.service.listing = Listing(lag_s=20.0)
    loop.drop("a", "x.jsonl")
    loop.look().run(3)
    assert loop.said("upload.unknown")
    retry.request(loop.settings().state_dir, "a", "x.jsonl")
    loop.look().run(120)
    assert loop.said("upload.recovered")
    assert retry.requests(loop.settings().state_dir) == []


def test_a_request_outlasts_a_restart(loop: Loop) -> None:
    """It is taken up by the daemon that comes next."""
    loop.service.listing = Listing(answer=answering(404, {}).answer)
    loop.uploads = loop.uploads.__class__(resend_limit=0)
    loop.start()
    loop.service.script.append(storing_then_resetting())
    loop.drop("a", "x.jsonl")
    loop.look().run(600)
    retry.request(loop.settings().state_dir, "a", "x.jsonl")
    loop.restart().run(600)
    assert loop.done("a") == ["x.jsonl"]
    loop.twice = 1


def test_one_request_sends_a_lost_upload_once_again(loop: Loop) -> None:
    """Is that answer lost as well, it takes another request: the service may have stored each of them."""
    loop.service.listing = Listing(answer=answering(404, {}).answer)
    loop.uploads = loop.uploads.__class__(resend_limit=0)
    loop.start()
    loop.service.always = storing_then_resetting()
    loop.drop("a", "x.jsonl")
    loop.look().run(600)
    retry.request(loop.settings().state_dir, "a", "x.jsonl")
    loop.run(30)
    assert loop.posts() == 2
    retry.request(loop.settings().state_dir, "a", "x.jsonl")
    loop.look()
    assert loop.posts() == 2  # it is looked for first
    for request in retry.requests(loop.settings().state_dir):
        request.file.unlink()
    loop.run(3600)
    assert loop.posts() == 2
    assert len(loop.said("upload.undecided")) == 2
    assert loop.claims("a") == ["x.jsonl"]
    loop.twice = 1


# The command.


def sfwatch(config: Config, *words: str) -> subprocess.CompletedProcess[str]:
    inbox = config.inboxes[0]
    settings = {
        "inboxes": [
            {"path": str(inbox.path), "name": "a", "done": str(inbox.done), "failed": str(inbox.failed)}
        ],
        "state_dir": str(config.state_dir),
    }
    (config.state_dir.parent / "sfwatch.yaml").write_text(yaml.safe_dump(settings))
    program = [
        str(Path(sys.executable).with_name("sfwatch")),
        "retry",
        "-c",
        str(config.state_dir.parent / "sfwatch.yaml"),
    ]
    return subprocess.run([*program, *words], capture_output=True, text=True, check=False)


def test_the_command_says_where_each_file_is_now(config: Config) -> None:
    """One line a file; 0."""
    ended = sfwatch(config, "x.jsonl")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{config.inboxes[0].path}/x.jsonl  is back in its inbox\n"


def test_the_command_goes_on_after_a_file_that_it_cannot_move(config: Config) -> None:
    """And ends with 1."""
    ended = sfwatch(config, "missing.jsonl", "x.jsonl")
    assert ended.returncode == 1
    assert "missing.jsonl is in no failed folder" in ended.stderr
    assert (config.inboxes[0].path / "x.jsonl").exists()


@pytest.mark.parametrize("words", [(), ("x.jsonl", "--all"), ("x.jsonl", "--reason", "gave_up")])
def test_what_is_to_be_retried_must_be_plain(config: Config, words: tuple[str, ...]) -> None:
    """Names, or a choice; not both, not neither."""
    ended = sfwatch(config, *words)
    assert ended.returncode == 64
    assert (config.inboxes[0].failed / "x.jsonl").exists()


def test_by_reason(config: Config) -> None:
    """The others stay."""
    fail(config.inboxes[0].failed, "y.jsonl", reason="gave_up")
    assert sfwatch(config, "--reason", "gave_up").returncode == 0
    assert lies_in(config.inboxes[0].path) == ["y.jsonl"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_is_told_how_to_run_it(config: Config) -> None:
    """What he moved might be closed to the daemon."""
    config.state_dir.mkdir()
    os.chown(config.state_dir, 65534, 65534)
    ended = sfwatch(config, "--all")
    assert ended.returncode == 77
    assert "runuser -u nobody -- " in ended.stderr


def test_that_there_is_nothing_to_retry_is_said(config: Config) -> None:
    """With the folders that were looked into: one may not be mounted."""
    ended = sfwatch(config, "--reason", "gave_up")
    assert ended.returncode == 0
    assert ended.stdout == f"nothing to retry: no such file lies in {config.inboxes[0].failed} with a report\n"
