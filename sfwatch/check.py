r"""The service's rules for a batch input, over one reading of the file, with line numbers.

The one reading yields digest, size, number of lines, findings (the file is at fault) and warnings (it may go).
Memory does not grow with the file: blocks are read, handed to a second thread for the digest, cut into lines
and forgotten. A line longer than `LONGEST_LINE` is only skimmed, not parsed.

The levels: `batch` holds the file against every rule. `jsonl` wants one JSON value in UTF-8 on each line that
is not blank, and the limits kept. `none` finds nothing at all but an empty file; digest, size and lines are
taken all the same, since what was sent must be provable.

Lines end at `\n` only (U+2028 and the like are data); `lines` counts those that are not blank.
"""

import codecs
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import BinaryIO

from sfwatch.excerpt import Excerpt, Place
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
    "WARNINGS",
    "Checked",
    "Finding",
    "ShortRead",
    "Stopped",
    "Wanted",
    "check",
    "check_blocks",
    "check_stream",
]

MAX_FINDINGS = 100
"""Findings that are kept if nothing else is wanted; `Checked.more` counts the rest."""
MAX_IDS = 100_000
"""Ids that are remembered; later ones are compared with these, but not with each other."""
MAX_MODELS = 20
"""Different models that are counted."""
LONGEST_LINE = 16 * 1024 * 1024
"""Bytes of the longest line that is parsed."""

_BLOCK = 1024 * 1024
_CACHED = 32 * 1024
_LONGEST_KEPT_ID = 32
_LONGEST_MODEL = 120
_SHOWN_MODELS = 3
_LF = 0x0A
_CR = 0x0D
_CRLF = b"\r\n"


class ShortRead(Exception):  # noqa: N818 - what happened, not whose error it is
    """The file ended before its size was reached: it shrank while it was read."""


class Stopped(Exception):  # noqa: N818
    """`stop` asked for it: nothing is known of the file."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What one reading of a file showed.

    `findings` are the first ones, those on the file as a whole before those on lines, these in order; `more`
    counts the rest, `kinds` all of them by reason, most frequent first. `warnings` hold one entry for each
    reason, with the first line concerned. `models` counts lines by model.
    """

    sha256: str
    size: int
    lines: int
    findings: tuple[Finding, ...] = ()
    more: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[Finding, ...] = ()
    models: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wanted:
    """How much is wanted of the findings: how many at most, and with `show` an excerpt of the line for each."""

    most: int = MAX_FINDINGS
    show: Callable[[bytes, Place], Excerpt] | None = None


_USUAL = Wanted()


def check(
    fd: int,
    size: int,
    *,
    level: Check,
    max_bytes: int,
    max_lines: int,
    wanted: Wanted = _USUAL,
    progress: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Checked:
    """Check the first `size` bytes of an open file; its position is neither used nor moved.

    A limit of 0 is none. `progress` is told the bytes read so far after each block, `stop` is asked before
    each. Raises ShortRead, Stopped, and OSError where the file cannot be read.
    """
    blocks = _watched(_file_blocks(fd, size), progress, stop)
    return check_blocks(blocks, level=level, max_bytes=max_bytes, max_lines=max_lines, wanted=wanted)


def check_stream(
    stream: BinaryIO,
    *,
    level: Check,
    max_bytes: int,
    max_lines: int,
    wanted: Wanted = _USUAL,
    progress: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Checked:
    """Check what a stream holds up to its end, as `check` does with a file."""
    blocks = _watched(iter(lambda: stream.read(_BLOCK), b""), progress, stop)
    return check_blocks(blocks, level=level, max_bytes=max_bytes, max_lines=max_lines, wanted=wanted)


def check_blocks(
    blocks: Iterable[bytes],
    *,
    level: Check,
    max_bytes: int,
    max_lines: int,
    wanted: Wanted = _USUAL,
    longest_line: int = LONGEST_LINE,
) -> Checked:
    """Check a file that comes in blocks, none of them empty.

    A line above `longest_line` bytes is parsed all the same where it lies whole within one block.
    """
    read, audit = _Read(), _Audit(wanted)
    hold = {Check.BATCH: audit.requests, Check.JSONL: audit.values, Check.NONE: audit.count}[level]
    hold(_lines(audit.utf8.passing(_hashed(iter(blocks), read)), longest_line))
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
        for block in blocks:
            read.size += len(block)
            read.ends_line = block.endswith(b"\n")
            if len(block) < _BLOCK:  # the only block or the last one: not worth a thread
                read.digest.update(block)
                yield block
            else:
                begun = Event()
                hashing = second.submit(_hash, read.digest, block, begun)
                begun.wait()  # or the parsing would keep the interpreter to itself until it is done
                yield block
                hashing.result()


def _hash(digest: "hashlib._Hash", block: bytes, begun: Event) -> None:
    begun.set()
    digest.update(block)


class _Utf8:
    """Whether all bytes so far are UTF-8; if not, each line has to be looked at by itself.

    Pieces that stay in the processor's cache are decoded twice as fast as lines of 200 KB, or of 500 bytes.
    """

    def __init__(self) -> None:
        self.sound = True
        self._cut = b""

    def passing(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        """Look at the blocks as they pass; a character that the file's end cuts off is unsound."""
        for block in blocks:
            if self.sound and (self._cut or not block.isascii()):
                self._look(self._cut + block)
            yield block
        self.sound = self.sound and not self._cut

    def _look(self, block: bytes) -> None:
        view, at, taken = memoryview(block), 0, 1
        try:
            while taken:
                _, taken = codecs.utf_8_decode(view[at : at + _CACHED], "strict", False)
                at += taken
        except UnicodeDecodeError:
            self.sound = False
        self._cut = block[at:]


def _lines(blocks: Iterator[bytes], longest: int) -> Iterator[bytes | Skimmed]:
    """Put together again what the blocks cut apart; a line that exceeds `longest` is skimmed instead.

    Lines keep their newline. BytesIO finds it five times as fast as `bytes.split` does in long lines.
    """
    begun = _Begun(longest)
    for block in blocks:
        pieces = io.BytesIO(block)
        if begun.size:
            begun.add(pieces.readline())
            if begun.whole:
                yield begun.take()
        for piece in pieces:
            if piece[-1] == _LF:
                yield piece
            else:
                begun.add(piece)
    if begun.size:
        yield begun.take()


class _Begun:
    """The beginning of a line whose end has not been read yet."""

    def __init__(self, longest: int) -> None:
        self.size = 0
        self.whole = False
        self._longest = longest
        self._pieces: list[bytes] = []
        self._skimmed: Skimmed | None = None

    def add(self, piece: bytes) -> None:
        """Take the next piece; `whole` says whether the line ends with it."""
        self.size += len(piece)
        self.whole = piece[-1] == _LF
        self._pieces.append(piece)
        if self.size > self._longest:
            self._skimmed = self._skimmed or Skimmed()
            for part in self._pieces:
                self._skimmed.add(part)
            self._pieces = []

    def take(self) -> bytes | Skimmed:
        """Return the line as far as it came, and begin the next."""
        line = self._skimmed or b"".join(self._pieces)
        if self._skimmed:
            self._skimmed.add(b"", last=True)
        self.size, self._pieces, self._skimmed = 0, [], None
        return line


# --- judging -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Warned:
    line: int
    times: int = 0


class _Audit:
    """What the lines have shown so far. The way of a good line is kept short: there may be millions."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.number = 0
        self.blank = 0
        self.findings: list[Finding] = []
        self.kinds: Counter[str] = Counter()
        self.models: dict[str, int] = {}
        self.warned: dict[str, _Warned] = {}
        self.utf8 = _Utf8()
        self._ids: dict[str | bytes, int] = {}

    def requests(self, lines: Iterator[bytes | Skimmed]) -> None:
        """Hold each line against the rules for requests. A good one passes through this loop alone."""
        ids, models, utf8 = self._ids, self.models, self.utf8
        for self.number, line in enumerate(lines, 1):
            if isinstance(line, Skimmed) or (request := recognise(line, utf8=utf8.sound)) is None:
                self._explain_request(line)
                continue
            if line[-2] == _CR and line[-1] == _LF:  # half the price of endswith
                self.warn("crlf")
            custom_id, model = request.custom_id, request.body.model
            if (
                len(custom_id) > _LONGEST_KEPT_ID
                or len(ids) >= MAX_IDS
                or ids.setdefault(custom_id, self.number) != self.number
            ):
                self._identify(custom_id, line)
            if model in models:
                models[model] += 1
            else:
                self._count_model(model)

    def values(self, lines: Iterator[bytes | Skimmed]) -> None:
        """Hold each line against the rules for JSON."""
        for self.number, line in enumerate(lines, 1):
            if isinstance(line, Skimmed) or not is_json(line, utf8=self.utf8.sound):
                self._explain(line, explain_json)
            elif line.endswith(_CRLF):
                self.warn("crlf")

    def count(self, lines: Iterator[bytes | Skimmed]) -> None:
        """Count the lines, whatever they hold."""
        for self.number, line in enumerate(lines, 1):
            self.blank += line.blank if isinstance(line, Skimmed) else is_blank(line)

    def warn(self, reason: str) -> None:
        """Note something about the present line that hinders nothing."""
        if reason not in self.warned:
            self.warned[reason] = _Warned(self.number)
        self.warned[reason].times += 1

    def _explain_request(self, line: bytes | Skimmed) -> None:
        explained = self._explain(line, explain)
        if explained is None or isinstance(line, Skimmed):
            return
        if explained.custom_id:
            self._identify(explained.custom_id, line)
        if explained.odd_model:
            self.warn("model_invalid")
        elif not explained.breaches:
            self._count_model(explained.model)

    def _explain(self, line: bytes | Skimmed, explain_line: Callable[[bytes], Explained]) -> Explained | None:
        if line.blank if isinstance(line, Skimmed) else is_blank(line):
            self.blank += 1
            self.warn("blank_lines")
            return None
        if isinstance(line, Skimmed):
            self.warn("line_not_parsed")
            self._found(line.breaches or line.misshapen(only_objects=explain_line is explain), None)
            return None
        if line.endswith(_CRLF):
            self.warn("crlf")
        explained = explain_line(line)
        self._found(explained.breaches, line)
        if explained.parsed:
            return explained
        self.warn("line_not_parsed")
        return None

    def _identify(self, custom_id: str, line: bytes) -> None:
        key = custom_id if len(custom_id) <= _LONGEST_KEPT_ID else _digest(custom_id)
        first = self._ids.get(key)
        if first is not None:
            detail = f"custom_id {quoted(custom_id)} is also used in line {first}"
            self._found((Breach("custom_id_repeated", detail, ("custom_id",)),), line)
        elif len(self._ids) < MAX_IDS:
            self._ids[key] = self.number
        elif "ids_not_compared" not in self.warned:
            self.warn("ids_not_compared")

    def _count_model(self, model: str | None) -> None:
        if not model:
            self.warn("model_missing")
            return
        name = model[:_LONGEST_MODEL]
        if name in self.models or len(self.models) < MAX_MODELS:
            self.models[name] = self.models.get(name, 0) + 1

    def _found(self, breaches: tuple[Breach, ...], line: bytes | None) -> None:
        """Keep what is wanted; `line` is None where it was too long to be kept itself."""
        self.kinds.update(breach.reason for breach in breaches)
        show = self.wanted.show
        for breach in breaches[: self.wanted.most - len(self.findings)]:
            excerpt = show(line, breach.place) if show and line is not None else None
            self.findings.append(Finding(self.number, breach.reason, breach.detail, excerpt))


def _digest(custom_id: str) -> bytes:
    """Stand for a long id in few bytes."""
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


# --- the result --------------------------------------------------------------------------------------------

WARNINGS = {
    "crlf": "ends in CRLF, not in a newline alone",
    "blank_lines": "is blank",
    "model_missing": "names no body.model",
    "model_invalid": "has a body.model that is no string",
    "line_not_parsed": "is too large to be parsed: the service may find what was not looked for here",
    "ids_not_compared": f"and those after it have ids that were not compared: only {MAX_IDS:,} are remembered",
    "no_final_newline": "is the last one and has no newline at its end",
}


def _checked(read: _Read, audit: _Audit, level: Check, *, max_bytes: int, max_lines: int) -> Checked:
    limits = (0, 0) if level is Check.NONE else (max_bytes, max_lines)
    lines = audit.number - audit.blank
    about_all = tuple(_file_findings(read.size, lines, *limits))
    findings = (*about_all, *audit.findings)[: audit.wanted.most]
    kinds = Counter(finding.reason for finding in about_all) + audit.kinds
    return Checked(
        sha256=read.digest.hexdigest(),
        size=read.size,
        lines=lines,
        findings=findings,
        more=kinds.total() - len(findings),
        kinds=dict(kinds.most_common()),
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
        yield Finding(warned.line, reason, f"line {warned.line} {WARNINGS[reason]}{more}")


def _several(models: Mapping[str, int]) -> str:
    shown = ", ".join(f"{quoted(model)} ({lines:,})" for model, lines in list(models.items())[:_SHOWN_MODELS])
    count = f"{len(models)} or more" if len(models) == MAX_MODELS else f"{len(models)}"
    return f"{count} models in one file: {shown}{', …' if len(models) > _SHOWN_MODELS else ''}"
