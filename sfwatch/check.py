r"""The service's rules for a batch input, over one reading of the file, with line numbers.

The one reading yields digest, size, number of lines, findings (the file is at fault) and warnings (it may go).
Memory does not grow with the file: blocks are read, handed to a second thread for the digest, cut into lines
and forgotten. A line longer than `LONGEST_LINE` is only skimmed, not parsed.

The levels: `batch` holds the file against every rule. `jsonl` wants one JSON value in UTF-8 on each line that
is not blank, and the limits kept. `none` finds nothing at all but an empty file; digest, size and lines are
taken all the same, since what was sent must be provable.

Lines end at `\n` only (U+2028 and the like are data); `lines` counts those that are not blank.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

from sfwatch.findings import (
    Breach,
    Explained,
    Finding,
    Skimmed,
    explain,
    explain_json,
    is_blank,
    is_json,
    quoted,
    recognise,
)
from sfwatch.settings import Check

__all__ = [
    "LONGEST_LINE",
    "MAX_FINDINGS",
    "MAX_IDS",
    "MAX_MODELS",
    "Checked",
    "Finding",
    "ShortRead",
    "Stopped",
    "check",
    "check_blocks",
    "check_stream",
]

MAX_FINDINGS = 100
"""Findings that are kept; `Checked.more` counts the rest."""
MAX_IDS = 100_000
"""Ids that are remembered; later ones are compared with these, but not with each other."""
MAX_MODELS = 20
"""Different models that are counted."""
LONGEST_LINE = 16 * 1024 * 1024
"""Bytes of the longest line that is parsed."""

_BLOCK = 1024 * 1024
_LONGEST_KEPT_ID = 32
_LONGEST_MODEL = 120
_SHOWN_MODELS = 3
_CR = 0x0D


class ShortRead(Exception):  # noqa: N818 - what happened, not whose error it is
    """The file ended before its size was reached: it shrank while it was read."""


class Stopped(Exception):  # noqa: N818
    """`stop` asked for it: nothing is known of the file."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What one reading of a file showed.

    `findings` are the first MAX_FINDINGS, those on the file as a whole before those on lines, these in order;
    `warnings` hold one entry for each reason, with the first line concerned. `models` counts lines by model.
    """

    sha256: str
    size: int
    lines: int
    findings: tuple[Finding, ...] = ()
    more: int = 0
    warnings: tuple[Finding, ...] = ()
    models: Mapping[str, int] = field(default_factory=dict)


def check(
    fd: int,
    size: int,
    *,
    level: Check,
    max_bytes: int,
    max_lines: int,
    progress: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Checked:
    """Check the first `size` bytes of an open file; its position is neither used nor moved.

    A limit of 0 is none. `progress` is told the bytes read so far after each block, `stop` is asked before
    each. Raises ShortRead, Stopped, and OSError where the file cannot be read.
    """
    blocks = _watched(_file_blocks(fd, size), progress, stop)
    return check_blocks(blocks, level=level, max_bytes=max_bytes, max_lines=max_lines)


def check_stream(
    stream: BinaryIO,
    *,
    level: Check,
    max_bytes: int,
    max_lines: int,
    progress: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Checked:
    """Check what a stream holds up to its end, as `check` does with a file."""
    blocks = _watched(iter(lambda: stream.read(_BLOCK), b""), progress, stop)
    return check_blocks(blocks, level=level, max_bytes=max_bytes, max_lines=max_lines)


def check_blocks(
    blocks: Iterable[bytes], *, level: Check, max_bytes: int, max_lines: int, longest_line: int = LONGEST_LINE
) -> Checked:
    """Check a file that comes in blocks, none of them empty.

    A line above `longest_line` bytes is parsed all the same where it lies whole within one block.
    """
    read, audit = _Read(), _Audit()
    whole, long = {
        Check.BATCH: (audit.request, audit.skimmed),
        Check.JSONL: (audit.value, audit.skimmed),
        Check.NONE: (audit.count, audit.count),
    }[level]
    for line in _lines(_hashed(iter(blocks), read), longest_line):
        if isinstance(line, bytes):
            whole(line)
        else:
            long(line)
    if not read.ends_line:
        audit.warn("no_final_newline")
    return _checked(read, audit, level, max_bytes=max_bytes, max_lines=max_lines)


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Read:
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    size: int = 0
    ends_line: bool = True


def _file_blocks(fd: int, size: int) -> Iterator[bytes]:
    at = 0
    while at < size:
        block = os.pread(fd, min(_BLOCK, size - at), at)
        if not block:
            raise ShortRead(f"the file ended after {at} of {size} bytes: it was cut while it was read")
        at += len(block)
        yield block


def _watched(
    blocks: Iterator[bytes], progress: Callable[[int], None] | None, stop: Callable[[], bool] | None
) -> Iterator[bytes]:
    done = 0
    while True:
        if stop is not None and stop():
            raise Stopped(f"the check was stopped after {done} bytes")
        block = next(blocks, b"")
        if not block:
            return
        done += len(block)
        if progress is not None:
            progress(done)
        yield block


def _hashed(blocks: Iterator[bytes], read: _Read) -> Iterator[bytes]:
    """Pass the blocks on, while a second thread takes the full ones into the digest."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="digest") as second:
        block = next(blocks, b"")
        while block:
            read.size += len(block)
            read.ends_line = block.endswith(b"\n")
            if len(block) < _BLOCK:  # the only block or the last one: not worth a thread
                read.digest.update(block)
                yield block
                block = next(blocks, b"")
                continue
            hashing = second.submit(read.digest.update, block)
            ahead = next(blocks, b"")  # reading lets go of the interpreter: that is when the hashing begins
            yield block
            hashing.result()
            block = ahead


def _lines(blocks: Iterator[bytes], longest: int) -> Iterator[bytes | Skimmed]:
    """Put together again what the blocks cut apart; a line that exceeds `longest` is skimmed instead."""
    begun = _Begun(longest)
    for block in blocks:
        pieces = block.split(b"\n")
        if len(pieces) > 1:
            yield begun.end(pieces[0])
            yield from pieces[1:-1]
        begun.add(pieces[-1])
    if begun.size:
        yield begun.end(b"")


class _Begun:
    """The beginning of a line whose end has not been read yet."""

    def __init__(self, longest: int) -> None:
        self.size = 0
        self._longest = longest
        self._pieces: list[bytes] = []
        self._skimmed: Skimmed | None = None

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        self._pieces.append(piece)
        if self.size > self._longest:
            self._skimmed = self._skimmed or Skimmed()
            for part in self._pieces:
                self._skimmed.add(part)
            self._pieces = []

    def end(self, piece: bytes) -> bytes | Skimmed:
        """Return the whole line, whose last piece this is, and begin the next."""
        self.add(piece)
        skimmed, pieces = self._skimmed, self._pieces
        self.size, self._pieces, self._skimmed = 0, [], None
        if skimmed is None:
            return b"".join(pieces)
        skimmed.add(b"", last=True)
        return skimmed


# --- judging -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Warned:
    line: int
    times: int = 0


class _Audit:
    """What the lines have shown so far."""

    def __init__(self) -> None:
        self.number = 0
        self.lines = 0
        self.findings: list[Finding] = []
        self.more = 0
        self.models: dict[str, int] = {}
        self.warned: dict[str, _Warned] = {}
        self._ids: dict[str | bytes, int] = {}

    def request(self, line: bytes) -> None:
        """Hold the next line against the rules for requests."""
        self.number += 1
        if request := recognise(line):
            self._counted(line)
            self._identified(request.custom_id)
            self._modelled(request.body.model)
        elif explained := self._unrecognised(line, explain):
            if explained.custom_id:
                self._identified(explained.custom_id)
            if not explained.breaches:
                self._modelled(explained.model)

    def value(self, line: bytes) -> None:
        """Hold the next line against the rules for JSON."""
        self.number += 1
        if is_json(line):
            self._counted(line)
        else:
            self._unrecognised(line, explain_json)

    def skimmed(self, line: Skimmed) -> None:
        """Note a line that was too long to be parsed."""
        self.number += 1
        self.lines += 1
        self.warn("line_not_parsed")
        if line.breach:
            self._found(line.breach)

    def count(self, line: bytes | Skimmed) -> None:
        """Count the next line, whatever it holds."""
        self.number += 1
        self.lines += isinstance(line, Skimmed) or not is_blank(line)

    def warn(self, reason: str) -> None:
        """Note something about the present line that hinders nothing."""
        self.warned.setdefault(reason, _Warned(self.number)).times += 1

    def _counted(self, line: bytes) -> None:
        self.lines += 1
        if line[-1] == _CR:
            self.warn("crlf")

    def _unrecognised(self, line: bytes, explain_line: Callable[[bytes], Explained]) -> Explained | None:
        if is_blank(line):
            self.warn("blank_lines")
            return None
        self._counted(line)
        explained = explain_line(line)
        for breach in explained.breaches:
            self._found(breach)
        return explained

    def _identified(self, custom_id: str) -> None:
        key = _compact(custom_id)
        if len(self._ids) < MAX_IDS:
            first = self._ids.setdefault(key, self.number)
        else:
            first = self._ids.get(key, self.number)
            if first == self.number:
                self.warn("ids_not_compared")
        if first != self.number:
            detail = f"custom_id {quoted(custom_id)} is also used in line {first}"
            self._found(Breach("custom_id_repeated", detail))

    def _modelled(self, model: str | None) -> None:
        if not model:
            self.warn("model_missing")
            return
        name = model[:_LONGEST_MODEL]
        if name in self.models or len(self.models) < MAX_MODELS:
            self.models[name] = self.models.get(name, 0) + 1

    def _found(self, breach: Breach) -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(Finding(self.number, *breach))
        else:
            self.more += 1


def _compact(custom_id: str) -> str | bytes:
    """Stand for an id in few bytes, however long it is."""
    if len(custom_id) <= _LONGEST_KEPT_ID:
        return custom_id
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


# --- the result --------------------------------------------------------------------------------------------

_WARNINGS = {
    "crlf": "ends in CRLF, not in a newline alone",
    "blank_lines": "is blank",
    "model_missing": "names no body.model",
    "line_not_parsed": "is too long to be parsed: the service may find what was not looked for here",
    "ids_not_compared": f"has an id that was not compared: only {MAX_IDS:,} are remembered",
    "no_final_newline": "is the last one and has no newline at its end",
}


def _checked(read: _Read, audit: _Audit, level: Check, *, max_bytes: int, max_lines: int) -> Checked:
    limits = (0, 0) if level is Check.NONE else (max_bytes, max_lines)
    findings = [*_file_findings(read.size, audit.lines, *limits), *audit.findings]
    return Checked(
        sha256=read.digest.hexdigest(),
        size=read.size,
        lines=audit.lines,
        findings=tuple(findings[:MAX_FINDINGS]),
        more=audit.more + len(findings[MAX_FINDINGS:]),
        warnings=() if level is Check.NONE else tuple(_warnings(audit)),
        models=audit.models,
    )


def _file_findings(size: int, lines: int, max_bytes: int, max_lines: int) -> Iterator[Finding]:
    if not lines:
        yield Finding(None, "empty", "the file holds nothing but blank lines" if size else "the file is empty")
    if 0 < max_bytes < size:
        yield Finding(
            None, "too_big", f"the file has {size:,} bytes, at most {max_bytes:,} are allowed: split it"
        )
    if 0 < max_lines < lines:
        detail = f"the file has {lines:,} lines, at most {max_lines:,} are allowed: split it"
        yield Finding(None, "too_many_lines", detail)


def _warnings(audit: _Audit) -> Iterator[Finding]:
    if len(audit.models) > 1:
        yield Finding(None, "several_models", _several(audit.models))
    for reason, warned in sorted(audit.warned.items(), key=lambda item: item[1].line):
        more = f" (and {warned.times - 1:,} more like it)" if warned.times > 1 else ""
        yield Finding(warned.line, reason, f"line {warned.line} {_WARNINGS[reason]}{more}")


def _several(models: Mapping[str, int]) -> str:
    shown = ", ".join(f"{quoted(model)} ({lines:,})" for model, lines in list(models.items())[:_SHOWN_MODELS])
    count = f"{len(models)} or more" if len(models) == MAX_MODELS else f"{len(models)}"
    return f"{count} models in one file: {shown}{', …' if len(models) > _SHOWN_MODELS else ''}"
