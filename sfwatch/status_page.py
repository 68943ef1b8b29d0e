"""The status for a person at a terminal: what is wrong first, ages as people say them, within 80 columns.

Shown once or kept up to date (`--watch`); also the answer about one file, and both as JSON.
"""

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sfwatch import console, exits, journal, status, stock, whereabouts
from sfwatch.settings import Config
from sfwatch.status import Status

SHOWN = 12
"""Rows of a table on the page; the document has more."""

_REFRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What could be found out. `running`: a daemon is at work; `status` is then its own word."""

    running: bool
    status: Status | None
    note: str | None = None

    @property
    def exit_status(self) -> int:
        """What the command ends with."""
        if not self.running:
            return exits.NOT_RUNNING
        return exits.OK if self.status is not None and status.healthy(self.status) else exits.FINDINGS


def look(config: Config, environ: Mapping[str, str], *, now: datetime) -> Seen:
    """Find out what a daemon with these settings is doing, or what lies there while none runs.

    Raises PermissionError for a user who may see neither: a daemon may well run.
    """
    problem = None
    try:
        published = status.find(config, environ)
    except status.UnusableError as error:
        published, problem = None, str(error)
    if published is not None and status.is_running(published):
        return Seen(running=True, status=published)
    holder = status.holder(config.state_dir)
    if holder is not None:
        why = problem or "it has published nothing yet that this user may read"
        return Seen(running=True, status=None, note=f"process {holder} works with {config.state_dir}; {why}")
    try:
        return Seen(running=False, status=stock.take(config, now=now), note=_end_of(published, now) or problem)
    except (OSError, journal.JournalError) as error:
        if published is None and isinstance(error, PermissionError):
            raise
        why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        note = f"{_end_of(published, now) or problem or 'nothing was published'}; the journal: {why}"
        return Seen(running=False, status=published, note=note)


def _end_of(published: Status | None, now: datetime) -> str | None:
    if published is None:
        return None
    ago = _age(published.published_at, now)
    if published.state == "stopped":
        return f"it ended {ago} ago"
    return f"it was killed, or the machine was; its last word is {ago} old"


# ---- the commands ----


def show(config: Config, environ: Mapping[str, str], *, as_json: bool, out: Callable[[str], None]) -> int:
    """Print what is going on; return the exit status."""
    now = _now()
    seen = look(config, environ, now=now)
    if as_json:
        document = None if seen.status is None else msgspec.to_builtins(seen.status)
        found = {
            "running": seen.running,
            "exit_status": seen.exit_status,
            "note": seen.note,
            "status": document,
        }
        out(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        out(_rendered(page(seen, now)))
    return seen.exit_status


def watch(config: Config, environ: Mapping[str, str]) -> int:
    """Show what is going on until Ctrl-C, and leave the last page there."""
    pause = threading.Event()
    seen = look(config, environ, now=_now())
    with Live(page(seen, _now()), console=Console(highlight=False), auto_refresh=False) as live:
        try:
            while not pause.wait(_REFRESH_S):
                seen = look(config, environ, now=_now())
                live.update(page(seen, _now()), refresh=True)
        except KeyboardInterrupt:
            pass
    return seen.exit_status


def answer(
    names: Sequence[str],
    config: Config,
    environ: Mapping[str, str],
    *,
    as_json: bool,
    out: Callable[[str], None],
) -> int:
    """Say of each file why it is not taken, or what became of it; return the worst exit status.

    What became of a file, also a user can be told who may not see whether a daemon runs.
    """
    now = _now()
    running = forbidden = None
    try:
        seen = look(config, environ, now=now)
        running = seen.status if seen.running else None
    except PermissionError as error:
        forbidden = error
    answers = [whereabouts.find(name, config, running, now=now) for name in names]
    if forbidden is not None and any(found.exit_status == exits.NOT_RUNNING for found in answers):
        raise forbidden
    if as_json:
        out(json.dumps([asdict(found) for found in answers], ensure_ascii=False, indent=2))
    else:
        for found in answers:
            out(found.sentence)
    return max(found.exit_status for found in answers)


def _now() -> datetime:
    return datetime.now(UTC)


def _rendered(what: RenderableType) -> str:
    target = Console(highlight=False)
    with target.capture() as captured:
        target.print(what)
    return captured.get().rstrip("\n")


# ---- the page ----


def page(seen: Seen, now: datetime) -> RenderableType:
    """Return the whole page."""
    parts: list[RenderableType] = [_headline(seen, now)]
    if seen.status is not None:
        tables = (_inboxes(seen.status), _under_way(seen.status, now), _waiting(seen.status, now))
        troubles = list(_troubles(seen.status, now)) if seen.running else []
        for part in (*troubles, *tables, _totals(seen, now)):
            if part is not None:
                parts += [Text(), part]
    return Group(*parts)


def _headline(seen: Seen, now: datetime) -> Text:
    line = Text()
    if not seen.running:
        line.append("sfwatch is not running", style="bold red")
    elif seen.status is None:
        line.append("sfwatch is running", style="bold yellow")
    else:
        style = "bold green" if seen.exit_status == exits.OK else "bold yellow"
        line.append(f"sfwatch {seen.status.version} is {seen.status.state}", style=style)
        line.append(f" (process {seen.status.pid}, started {_age(seen.status.started_at, now)} ago)")
        line.append(f"\n{seen.status.config or seen.status.state_dir}", style="dim")
    if seen.note:
        line.append(f": {seen.note}")
    return line


def _troubles(told: Status, now: datetime) -> Iterator[Text]:
    """What somebody should look at, each with its sentence."""
    for inbox in told.inboxes:
        if inbox.lost is not None:
            yield _trouble(f"{inbox.name} is lost", inbox.lost.detail)
        elif inbox.refused is not None:
            yield _trouble(f"{inbox.name} takes no files", inbox.refused)
    for target in told.targets:
        if target.reason is not None and target.since is not None and target.next_probe_at is not None:
            when = f"for {_age(target.since, now)}, {_next('asked', target.next_probe_at, now)}"
            yield _trouble(f"{target.name} is held ({target.reason})", f"{target.detail}; {when}")
    for folder in told.folders:
        when = f"for {_age(folder.since, now)}, {_next('tried', folder.next_try_at, now)}"
        yield _trouble(f"{folder.path} is held ({folder.reason})", f"{folder.detail}; {when}")


def _trouble(what: str, why: str) -> Text:
    return Text.assemble((what, "bold red"), f": {why}")


def _next(verb: str, at: datetime, now: datetime) -> str:
    return f"{verb} again in {_age(now, at)}" if at > now else f"being {verb}"


_LONG = ("file", "folder", "oldest")
"""Columns that may be cut; all others have the room that they need."""


def _table(columns: Sequence[str], rows: Iterable[Sequence[Text]]) -> Table:
    """A table whose names stand at the left and whose numbers (`>`) stand at the right."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        name = column.removeprefix(">")
        # What may be wrapped is made narrower first; that the text itself may not be then cuts it.
        table.add_column(name, justify="right" if column != name else "left", no_wrap=name not in _LONG)
    for row in rows:
        table.add_row(*row)
    return table


def _cut(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _inboxes(told: Status) -> Table:
    return _table(
        ("inbox", ">waiting", ">under way", "watched", "folder"),
        [
            (
                Text(inbox.name, style="bold"),
                _count(inbox.waiting),
                _count(inbox.under_way),
                Text("lost", style="red")
                if inbox.lost
                else Text(f"{inbox.mode}, {inbox.fs_type}" * bool(inbox.mode)),
                _cut(inbox.path, style="dim"),
            )
            for inbox in told.inboxes
        ],
    )


def _under_way(told: Status, now: datetime) -> RenderableType | None:
    if not told.under_way:
        return None
    rows = [_upload(file, now) for file in told.under_way[:SHOWN]]
    table = _table(("file", ">sent", ">of", ">%", ">speed", ">left", "step"), rows)
    more = len(told.under_way) - SHOWN
    return Group(table, Text(f"… and {more:,} more", style="dim")) if more > 0 else table


def _upload(file: status.UnderWay, now: datetime) -> Sequence[Text]:
    sends = file.step == "uploading"
    speed = file.bytes_per_s or 0
    left = console.span((file.size - file.sent) / speed) if sends and speed and file.sent < file.size else ""
    step = file.step if sends else f"{file.step.replace('_', ' ')}, {_age(file.since, now)}"
    return (
        _cut(f"{file.inbox}/{file.file}"),
        Text(console.size(file.sent) if file.sent else ""),
        Text(console.size(file.size)),
        Text(f"{file.sent * 100 // max(file.size, 1)}" if sends else ""),
        Text(console.rate(speed) if sends and speed else ""),
        Text(left),
        Text(step, style="dim"),
    )


def _waiting(told: Status, now: datetime) -> RenderableType | None:
    if not told.waiting:
        return None
    by_reason: dict[str, list[status.Waiting]] = {}
    for group in told.waiting:
        by_reason.setdefault(group.reason, []).append(group)
    rows = [_reason(reason, groups, now) for reason, groups in by_reason.items()]
    table = _table(("waiting", ">files", ">for", "oldest"), rows)
    return Group(table, Text("`sfwatch status FILE` says why a file waits", style="dim"))


def _reason(reason: str, groups: Sequence[status.Waiting], now: datetime) -> Sequence[Text]:
    named = [(file.since, group.inbox, file.file) for group in groups for file in group.oldest]
    since, inbox, name = min(named, default=(now, groups[0].inbox, "?"))  # who wrote it is not known
    return (
        Text(reason.replace("_", " "), style="red" if reason in status.TROUBLE else ""),
        _count(sum(group.files for group in groups)),
        Text(_age(since, now)),
        _cut(f"{inbox}/{name}", style="dim"),
    )


def _count(number: int) -> Text:
    return Text(f"{number:,}", style="" if number else "dim")


def _totals(seen: Seen, now: datetime) -> Text | None:
    told = seen.status
    if told is None:
        return None
    line = Text(no_wrap=True, overflow="ellipsis")
    if told.pid:
        totals = told.totals
        line.append(f"{totals.done:,} done", style="bold")
        line.append(f" ({console.size(totals.bytes)})")
        line.append(f", {totals.failed:,} failed", style="bold" if totals.failed else "")
        if totals.reasons:
            reasons = sorted(totals.reasons.items(), key=lambda found: -found[1])
            line.append(f" ({', '.join(f'{count:,} {reason}' for reason, count in reasons[:4])})")
        line.append(" since the start")
    for what, ended in (("done", told.last_done), ("failed", told.last_failed)):
        if ended is not None:
            start = "\n" if line.plain else ""
            line.append(
                f"{start}last {what} {_age(ended.at, now)} ago: {ended.inbox}/{ended.file}", style="dim"
            )
    return line if line.plain else None


def _age(at: datetime, now: datetime) -> str:
    """The time between, to the second at best: less would only flicker."""
    return console.span(max(1, round((now - at).total_seconds())))
