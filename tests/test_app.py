"""Parts made and joined: targets by host and key, signals as mail, and how `once` ends."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loop import KEY, line

from sfwatch import app
from sfwatch.core import Signalled
from sfwatch.job import Tools
from sfwatch.journal import StateInUseError
from sfwatch.logs import event_log
from sfwatch.settings import Api, Config, Inbox, Uploads
from sfwatch.standin import StandIn, answering

ENVIRON = {"SILICONFLOW_API_KEY": KEY}


@pytest.fixture(name="service")
def _service() -> Iterator[StandIn]:
    with StandIn() as service:
        yield service


@pytest.fixture(name="config")
def _config(tmp_path: Path, service: StandIn) -> Config:
    inbox = Inbox(
        path=tmp_path / "inbox",
        name="a",
        done=tmp_path / "done",
        failed=tmp_path / "failed",
        settle_s=0.05,
        settle_unproven_s=0.1,
        api=Api(base_url=service.base_url),
    )
    return Config(inboxes=(inbox,), uploads=Uploads(), state_dir=tmp_path / "state", stop_grace_s=1.0)


def once(config: Config, drain_s: float = 20.0) -> tuple[int, list[dict[str, Any]]]:
    """Run until nothing is left to do: the exit status, and what was said."""
    lines: list[str] = []
    status = app.run(
        config, log=event_log(lines.append), environ=ENVIRON, drain_s=drain_s, leave=lambda _: None
    )
    return status, [json.loads(text) for text in lines]


def drop(config: Config, name: str, text: str | None = None) -> None:
    inbox = config.inboxes[0].path
    inbox.mkdir(exist_ok=True)
    (inbox / name).write_text(line(1, text=name) if text is None else text)


def test_once_ends_with_0_when_all_are_done(config: Config, service: StandIn) -> None:
    """Real threads, a real clock, a real doorbell."""
    for name in ("x.jsonl", "y.jsonl", "z.jsonl"):
        drop(config, name)
    status, said = once(config)
    assert status == 0
    assert len(service.stored) == 3
    assert said[-1]["event"] == "daemon.stopped"


def test_no_more_go_out_at_once_than_concurrency_says(config: Config) -> None:
    """However many are made ready: the gate of each target lets that many through."""
    config = replace(config, uploads=Uploads(concurrency=2))
    with app.daemon(config, log=event_log(lambda _: None), environ=ENVIRON) as it, ExitStack() as through:
        [service] = it.services.values()
        gone: list[bool] = []
        others = [threading.Thread(target=_go_through, args=(service.tools, gone)) for _ in range(3)]
        for _ in range(2):
            through.enter_context(service.tools.gate)
        for other in others:
            other.start()
        assert gone == []
        through.close()
        for other in others:
            other.join()
        assert len(gone) == 3


def _go_through(tools: Tools, gone: list[bool]) -> None:
    with tools.gate:
        gone.append(True)


def test_once_ends_with_1_when_one_failed_whatever_else_had_to_wait(config: Config) -> None:
    """A failure wants a person, waiting does not."""
    drop(config, "bad.jsonl", "{}\n")
    drop(config, "empty.jsonl", "")
    assert once(config, drain_s=1.0)[0] == 1


def test_once_ends_with_75_when_a_file_had_to_wait(config: Config, service: StandIn) -> None:
    """Empty files count, and those that the service does not take now."""
    drop(config, "empty.jsonl", "")
    assert once(config, drain_s=0.5)[0] == 75
    (config.inboxes[0].path / "empty.jsonl").unlink()
    service.always = answering(403, {"code": 30001, "message": "balance"})
    drop(config, "x.jsonl")
    assert once(config, drain_s=0.5)[0] == 75


def test_once_ends_with_0_at_once_when_there_is_nothing(config: Config) -> None:
    """No file, no request, no wait."""
    assert once(config)[0] == 0


def test_a_target_is_a_host_with_the_source_of_its_key_never_the_key(tmp_path: Path) -> None:
    """What events name can be shown to anybody."""
    by_variable = app.target_name(Api(), ENVIRON)
    by_file = app.target_name(Api(key_file=tmp_path / "key"), ENVIRON)
    for name, source in (
        (by_variable, "environment SILICONFLOW_API_KEY"),
        (by_file, f"file {tmp_path / 'key'}"),
    ):
        assert name.startswith("api.siliconflow.cn")
        assert source in name
        assert KEY not in name


def test_inboxes_share_a_target_only_if_host_and_key_are_the_same(config: Config, tmp_path: Path) -> None:
    """An inbox with a key of its own is not held when the other's key expires."""
    first = config.inboxes[0]
    second = replace(first, name="b", path=tmp_path / "b")
    third = replace(first, name="c", path=tmp_path / "c", api=replace(first.api, key_file=tmp_path / "key"))
    settings = replace(config, inboxes=(first, second, third))
    with app.daemon(settings, log=event_log(lambda _: None), environ=ENVIRON) as it:
        assert sorted(list(s.inboxes) for s in it.services.values()) == [["a", "b"], ["c"]]
        assert it.service_of["a"] is it.service_of["b"]


def test_a_second_daemon_on_the_same_state_folder_is_refused(config: Config) -> None:
    """And leaves nothing open behind."""
    log = event_log(lambda _: None)
    with app.daemon(config, log=log, environ=ENVIRON):
        with pytest.raises(StateInUseError), app.daemon(config, log=log, environ=ENVIRON):
            raise AssertionError("two at once")
    with app.daemon(config, log=log, environ=ENVIRON):
        pass


def test_signals_become_mail_and_their_handlers_are_put_back(config: Config) -> None:
    """Nothing else is done in a handler."""
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with app.daemon(config, log=event_log(lambda _: None), environ=ENVIRON) as it:
        with app.signals(it.mailbox):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(os.getpid(), number)
        assert [it.mailbox.get(timeout=5) for _ in range(3)] == [
            Signalled(signal.SIGTERM),
            Signalled(signal.SIGINT),
            Signalled(signal.SIGUSR1),
        ]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_key_that_everybody_may_read_is_warned_of(config: Config, tmp_path: Path) -> None:
    """At the start, once, with what to do."""
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o644)
    inbox = config.inboxes[0]
    open_key = replace(inbox, api=replace(inbox.api, key_file=tmp_path / "key"))
    _, said = once(replace(config, inboxes=(open_key,)))
    assert ["chmod o=" in e["detail"] for e in said if e["event"] == "config.warning"] == [True]


def test_a_signal_wakes_a_main_thread_that_sleeps_on(config: Config) -> None:
    """It does not wait there until something else happens.

    The kernel may hand a signal to any thread, and one that comes just before the sleep interrupts nothing.
    """
    with app.daemon(config, log=event_log(lambda _: None), environ=ENVIRON) as it, app.signals(it.mailbox):

        def send() -> None:
            time.sleep(0.2)  # until then the main thread sleeps
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

        elsewhere = threading.Thread(target=send)
        elsewhere.start()
        assert it.mailbox.get(timeout=20) == Signalled(signal.SIGUSR1)
        elsewhere.join()
