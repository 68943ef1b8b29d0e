"""The first minute: the daemon itself, in a throw-away folder, against a stand-in for the service on loopback.

Nothing is played but the service: `app.run` is what `sfwatch run` and `sfwatch once` run. The demo follows the
log as any other program could, line by line in JSON, and tells what it means. All that is written goes through
one lock, since workers say events too: an event and what is told about it stay together.
"""

import io
import json
import os
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.highlighter import JSONHighlighter
from rich.text import Text

from sfwatch import __version__, app, config, console, exits, logs
from sfwatch.settings import Config, Log
from sfwatch.standin import StandIn

SAMPLE, BROKEN = "sample.jsonl", "broken.jsonl"

_KEY = "sk-demo-this-is-no-real-key"
_SAMPLE_WITHIN_S = 20.0

_CONFIGURATION = """\
api:
  base_url: {base_url}
  key_file: key
  connect_timeout: 5s
  read_timeout: 10s
inboxes:
  - path: inbox
state_dir: state
stop_grace: 5s
"""

_QUESTIONS = (
    "Why is the sky blue?",
    "Translate into French: The early bird catches the worm.",
    "Summarise in one sentence: Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "Is this review kind or unkind? “The soup was cold, but the waiter made us laugh.”",
    "Name three uses for an old newspaper.",
    "What is 17 times 24?",
    "把这句话翻译成英文：千里之行，始于足下。",
    "Give the past tense of: to swim, to bring, to read.",
    "Which planet has the most moons?",
    "Write a haiku about a drop folder.",
    "Extract the date: The meeting was moved from Monday to 14 May 2026.",
    "Explain to a child what a server is.",
)


def run(*, once: bool) -> int:
    """Show a file on its way, then watch on until Ctrl-C; with *once* end after it. Return the exit status.

    The folder is removed at the end, except when a second Ctrl-C ends the process with an upload under way.
    """
    # The stand-in is on this machine: a proxy that the environment names could not reach it, and is not to
    # see it. Proxies are read from the environment of the process when the client is made.
    os.environ["no_proxy"] = "127.0.0.1"
    try:
        throw_away = tempfile.TemporaryDirectory(prefix="sfwatch-demo-", ignore_cleanup_errors=True)
    except OSError as error:
        sys.stderr.write(
            f"sfwatch: no throw-away folder can be made: {error}. Set TMPDIR to a folder of yours\n"
        )
        return exits.CANNOT_CREATE
    with throw_away as name:
        show = _Show(Path(name).resolve(), once, logs.Output(Log()))
        with StandIn(key=_KEY) as service, _hangup_ends():
            settings = _furnish(show.folder, service.base_url)
            show.begin()
            log = logs.event_log(show.write)
            drain_s = _SAMPLE_WITHIN_S if once else None
            status = app.run(settings, log=log, environ=os.environ, drain_s=drain_s)
    show.end()
    return status


@contextmanager
def _hangup_ends() -> Iterator[None]:
    """A closed terminal ends the demo as Ctrl-C does: its folder would stay behind otherwise."""
    before = signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _furnish(folder: Path, base_url: str) -> Config:
    """Make the folders, the key, the sample and a configuration, which other commands can be asked with."""
    for name in ("inbox", "done", "failed", "state"):
        (folder / name).mkdir()
    key = folder / "key"
    key.touch(0o600)
    key.write_text(_KEY)
    _drop(folder, SAMPLE, sample())
    (folder / "sfwatch.yaml").write_text(_CONFIGURATION.format(base_url=base_url))
    return config.read(folder / "sfwatch.yaml", environ={})


def _drop(folder: Path, name: str, data: bytes) -> None:
    """Write beside the inbox, then rename into it: what is renamed in is whole, and is taken at once."""
    (folder / name).write_bytes(data)
    (folder / name).rename(folder / "inbox" / name)


def sample() -> bytes:
    """Return a batch of twelve requests as the service wants it."""
    return b"".join(_request(f"question-{n:02}", _asked(text)) for n, text in enumerate(_QUESTIONS, 1))


def broken() -> bytes:
    """Return a batch with two mistakes that people make: an answer at the end, and an id used twice."""
    answered = [*_asked(_QUESTIONS[5]), {"role": "assistant", "content": "408"}]
    return b"".join(
        (
            _request("a", _asked(_QUESTIONS[0])),
            _request("b", answered),
            _request("a", _asked(_QUESTIONS[8])),
        )
    )


def _asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _request(custom_id: str, messages: list[dict[str, str]]) -> bytes:
    body = {"model": "deepseek-ai/DeepSeek-V3", "messages": messages, "max_tokens": 200}
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(request, ensure_ascii=False).encode() + b"\n"


# What is told.

_INTRODUCTION = """\
Drop JSONL batch files into a folder, and get their file ids back.
This is a folder to play with, and a stand-in for the service on this machine: no key, no network.

  {folder}/
    inbox/     drop files here; a sample of {requests} requests lies in it, and is taken after 2 s of rest
    done/      what was uploaded, each file with its id beside it
    failed/    what has mistakes, each file with a report beside it
"""

_SIDECAR = """\
The sample is uploaded and lies in done/, and beside it what the service said, in
done/{sidecar} (`jq -r .id` prints the id):
"""

_MISTAKES = """\
Nothing of it was sent. It lies in failed/ as it was, and beside it a report,
failed/{report}, which says:
"""

_YOUR_TURN = """\
In another terminal, drop a batch file of your own, or one that is no batch file at all:

  cp yours.jsonl {inbox}

Ask why a file is not taken or has failed, and put it back when it is mended
(after `make run`, sfwatch is .venv/bin/sfwatch):

  sfwatch status -c {config} broken.jsonl
  sfwatch retry -c {config} broken.jsonl

Copy, do not move: the folder is removed at the end. Ctrl-C ends the demo.
"""

_LATE = "The sample could not be delivered within {wait}: the log above says why."

_FOR_REAL = """\
{counts}. The folder is removed.
For real: name your folder and a file with your key in sfwatch.yaml, as config/sfwatch.yaml shows, then

  sfwatch check -c sfwatch.yaml
  sfwatch run -c sfwatch.yaml
"""


@dataclass(slots=True)
class _Show:
    """Renders the daemon's log for a person, and says what it means. `write` is called from any thread."""

    folder: Path
    once: bool
    output: logs.Output
    lock: threading.RLock = field(default_factory=threading.RLock)
    done: int = 0
    failed: int = 0

    @property
    def colour(self) -> bool:
        return console.wants_colour(os.environ, terminal=self.output.is_terminal())

    def begin(self) -> None:
        """Say what this is, before anything happens."""
        self._head(f"sfwatch {__version__}")
        self._say(_INTRODUCTION.format(folder=self.folder, requests=len(_QUESTIONS)))
        self._head("What sfwatch logs")

    def write(self, line: str) -> None:
        """Take one line of the daemon's log, and say what follows from it."""
        event = json.loads(line)
        with self.lock:
            self.output.write(console.line(event, colour=self.colour))
            match event["event"]:
                case "file.done":
                    self._on_done(event)
                case "file.failed":
                    self._on_failed(event)

    def end(self) -> None:
        """Say what has become of the files, and what to do next."""
        self._head("\nGoodbye")
        if self.once and not self.done:
            self._say(_LATE.format(wait=console.span(_SAMPLE_WITHIN_S)))
            return
        refused = f", {self.failed} refused" if self.failed else ""
        self._say(_FOR_REAL.format(counts=f"{console.count(self.done, 'file')} uploaded{refused}"))

    def _on_done(self, event: Mapping[str, Any]) -> None:
        self.done += 1
        if event["file"] != SAMPLE or self.done > 1:
            return
        sidecar = Path(event["sidecar"])
        self._head("\nWhat came back")
        self._say(_SIDECAR.format(sidecar=sidecar.name))
        self._print(JSONHighlighter()(sidecar.read_text("utf-8")))
        if not self.once:
            self._head("A file with mistakes")
            _drop(self.folder, BROKEN, broken())

    def _on_failed(self, event: Mapping[str, Any]) -> None:
        self.failed += 1
        if event["file"] != BROKEN or self.failed > 1:
            return
        report = Path(event["report"])
        self._say("\n" + _MISTAKES.format(report=report.name))
        self._say(_mistakes(report))
        self._head("Your turn")
        inbox, settings = (shlex.quote(f"{self.folder}/{name}") for name in ("inbox/", "sfwatch.yaml"))
        self._say(_YOUR_TURN.format(inbox=inbox, config=settings))

    def _head(self, text: str) -> None:
        self._print(Text(text, "bold"))

    def _say(self, text: str) -> None:
        self._print(Text(text))

    def _print(self, text: Text) -> None:
        # Rendered into memory and written as the events are: a closed pipe costs lines here, too, not the demo.
        paper = io.StringIO()
        terminal = Console(
            file=paper, force_terminal=self.colour, color_system="standard" if self.colour else None
        )
        terminal.print(text, soft_wrap=True)
        with self.lock:
            self.output.write(paper.getvalue().removesuffix("\n"))


def _mistakes(report: Path) -> str:
    facts = json.loads(report.read_bytes())
    found = [f"  line {finding['line']}: {finding['detail']}\n" for finding in facts["findings"]]
    return "".join(found)
