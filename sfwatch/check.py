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
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import itemgetter
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
    is_utf8,
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
_BATCH = 64 * 1024
_PIECE = 32 * 1024
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
    stop: Callable[[], bool] | None = None,
) -> Checked:
    """Check the first `size` bytes of an open file; its position is neither used nor moved.

    A limit of 0 is none. `stop` is asked before each block. Raises ShortRead, Stopped, and OSError where the
    file cannot be read.
    """
    blocks = _file_blocks(fd, size, stop)
    return check_blocks(blocks, level=level, max_bytes=max_bytes, max_lines=max_lines, wanted=wanted)


def check_stream(
    stream: BinaryIO, *, level: Check, max_bytes: int, max_lines: int, wanted: Wanted = _USUAL
) -> Checked:
    """Check what a stream holds up to its end, as `check` does with a file."""
    blocks = map(io.BytesIO, iter(lambda: stream.read(_BLOCK), b""))
    return check_blocks(blocks, level=level, max_bytes=max_bytes, max_lines=max_lines, wanted=wanted)


def check_blocks(
    blocks: Iterator[io.BytesIO],
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
    audit = _Audit(level, wanted)
    read = audit.read(blocks, longest_line)
    return _checked(read, audit, max_bytes=max_bytes, max_lines=max_lines)


# --- reading -----------------------------------------------------------------------------------------------

_SECOND = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="digest")
"""Takes blocks into digests while their lines are looked at; has no thread before a file of several blocks."""


@dataclass(slots=True)
class _Read:
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    size: int = 0
    ends_line: bool = True


def _file_blocks(fd: int, size: int, stop: Callable[[], bool] | None) -> Iterator[io.BytesIO]:
    at, buffers = 0, _buffers(min(size, _BLOCK))
    while at < size:
        if stop is not None and stop():
            raise Stopped(f"the check was stopped after {at} bytes")
        block = next(buffers)
        with block.getbuffer() as room:
            got = os.preadv(fd, [room[: size - at]], at)
            if not got:
                raise ShortRead(f"the file ended after {at} of {size} bytes: it was cut while it was read")
            at += got
            if got < len(room):
                block = io.BytesIO(room[:got])
        block.seek(0)
        yield block


def _buffers(size: int) -> Iterator[io.BytesIO]:
    """Return two in turn: a new one for each block costs the kernel more time than reading into it."""
    first = io.BytesIO(bytes(size))
    yield first
    yield from itertools.cycle([io.BytesIO(bytes(size)), first])


def _hashed(blocks: Iterator[io.BytesIO], read: _Read) -> Iterator[io.BytesIO]:
    """Pass the blocks on, while a second thread takes the full ones into the digest."""
    block = next(blocks, None)
    while block is not None:
        view = block.getbuffer()
        read.size += len(view)
        read.ends_line = view[-1] == _LF
        hashing = None
        if len(view) < _BLOCK:  # the only block or the last one: not worth a thread
            read.digest.update(view)
        else:
            hashing = _SECOND.submit(read.digest.update, view)
        ahead = next(blocks, None)  # lets the second thread begin, or the parsing would keep it waiting
        yield block
        if hashing is not None:
            hashing.result()
        block = ahead


class _Utf8:
    """Whether all bytes so far are UTF-8; if not, each line has to be looked at by itself.

    Pieces that stay in the processor's cache are decoded twice as fast as lines of 200 KB, or of 500 bytes.
    """

    def __init__(self) -> None:
        self.sound = True
        self._cut = b""

    def passing(self, blocks: Iterator[io.BytesIO]) -> Iterator[io.BytesIO]:
        """Look at the blocks as they pass; a character that the file's end cuts off is unsound."""
        for block in blocks:
            if self.sound:
                self._look(block.getbuffer())
            yield block
        self.sound = self.sound and not self._cut

    def _look(self, block: memoryview) -> None:
        for at in range(0, len(block), _PIECE):
            piece = block[at : at + _PIECE]
            if self._cut:
                piece = memoryview(self._cut + piece)
            try:
                _, taken = codecs.utf_8_decode(piece, "strict", False)
            except UnicodeDecodeError:
                self.sound = False
                return
            self._cut = bytes(piece[taken:])


def _lines(blocks: Iterator[io.BytesIO], longest: int) -> Iterator[list[bytes] | Skimmed]:
    """Put together again what the blocks cut apart, few lines at a time; one above `longest` is skimmed.

    Lines keep their newline. BytesIO finds it five times as fast as `bytes.split` does in long lines.
    """
    begun = _Begun(longest)
    for block in blocks:
        if begun.size:
            begun.add(block.readline())
            if begun.whole:
                yield begun.take()
        while lines := block.readlines(_BATCH):
            if lines[-1][-1] != _LF:
                begun.add(lines.pop())
            yield lines
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

    def take(self) -> list[bytes] | Skimmed:
        """Return the line as far as it came, and begin the next."""
        line = self._skimmed or [b"".join(self._pieces)]
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

    def __init__(self, level: Check, wanted: Wanted) -> None:
        self.level = level
        self.wanted = wanted
        self.number = 0
        self.blank = 0
        self.findings: list[Finding] = []
        self.kinds: dict[str, int] = {}
        self.models: dict[str, int] = {}
        self.warned: dict[str, _Warned] = {}
        self._utf8 = _Utf8()
        self._ids: dict[str | bytes, int] = {}

    def read(self, blocks: Iterator[io.BytesIO], longest_line: int) -> _Read:
        """Lead the blocks past all that look at them."""
        read = _Read()
        passing = _hashed(blocks, read)
        if self.level is not Check.NONE:
            passing = self._utf8.passing(passing)
        hold = {Check.BATCH: self._requests, Check.JSONL: self._values, Check.NONE: self._count}[self.level]
        for lines in _lines(passing, longest_line):
            if isinstance(lines, Skimmed):
                self._skim(lines)
            else:
                hold(lines)
        if not read.ends_line:
            self.warn("no_final_newline")
        return read

    def warn(self, reason: str) -> None:
        """Note something about the present line that hinders nothing."""
        if reason not in self.warned:
            self.warned[reason] = _Warned(self.number)
        self.warned[reason].times += 1

    def _requests(self, lines: list[bytes]) -> None:
        """Hold each line against the rules for requests. A good one passes through this loop alone."""
        models, sound = self.models, self._utf8.sound
        first_line: Callable[[str, int], int] = self._first_line
        if len(self._ids) + len(lines) <= MAX_IDS:
            first_line = self._ids.setdefault  # the same, and quicker
        for number, line in enumerate(lines, self.number + 1):
            self.number = number
            request = recognise(line) if sound or is_utf8(line) else None
            if request is None:
                self._explain_request(line)
                continue
            if line[-2] == _CR and line[-1] == _LF:  # half the price of endswith
                self.warn("crlf")
            custom_id = request.custom_id
            if len(custom_id) > _LONGEST_KEPT_ID or first_line(custom_id, number) != number:
                self._compare(custom_id, line)
            model = request.body.model
            if model in models:
                models[model] += 1
            else:
                self._count_model(model)

    def _values(self, lines: list[bytes]) -> None:
        """Hold each line against the rules for JSON."""
        sound = self._utf8.sound
        for number, line in enumerate(lines, self.number + 1):
            self.number = number
            if not ((sound or is_utf8(line)) and is_json(line)):
                self._explain(line, explain_json)
            elif line.endswith(_CRLF):
                self.warn("crlf")

    def _count(self, lines: list[bytes]) -> None:
        """Count the lines, whatever they hold."""
        self.number += len(lines)
        self.blank += sum(map(is_blank, lines))

    def _skim(self, line: Skimmed) -> None:
        self.number += 1
        if line.blank:
            self._pass_blank()
        elif self.level is not Check.NONE:
            self.warn("line_not_parsed")
            self._found(line.breaches or line.misshapen(only_objects=self.level is Check.BATCH), None)

    def _explain_request(self, line: bytes) -> None:
        explained = self._explain(line, explain)
        if explained is None:
            return
        if explained.custom_id:
            self._compare(explained.custom_id, line)
        if explained.odd_model:
            self.warn("model_invalid")
        elif not explained.breaches:
            self._count_model(explained.model)

    def _explain(self, line: bytes, explain_line: Callable[[bytes], Explained]) -> Explained | None:
        if is_blank(line):
            self._pass_blank()
            return None
        if line.endswith(_CRLF):
            self.warn("crlf")
        explained = explain_line(line)
        self._found(explained.breaches, line)
        if explained.parsed:
            return explained
        self.warn("line_not_parsed")
        return None

    def _pass_blank(self) -> None:
        self.blank += 1
        self.warn("blank_lines")

    def _compare(self, custom_id: str, line: bytes) -> None:
        """Find an id that an earlier line has used, too."""
        key = custom_id if len(custom_id) <= _LONGEST_KEPT_ID else _digest(custom_id)
        first = self._first_line(key, self.number)
        if first != self.number:
            detail = f"custom_id {quoted(custom_id)} is also used in line {first}"
            self._found((Breach("custom_id_repeated", detail, ("custom_id",)),), line)

    def _first_line(self, key: str | bytes, number: int) -> int:
        """Return the line that has used this id first; the present one is remembered if it is the first."""
        if len(self._ids) < MAX_IDS:
            return self._ids.setdefault(key, number)
        first = self._ids.get(key, number)
        if first == number and "ids_not_compared" not in self.warned:
            self.warn("ids_not_compared")
        return first

    def _count_model(self, model: str | None) -> None:
        if not model:
            self.warn("model_missing")
            return
        name = model[:_LONGEST_MODEL]
        if name in self.models or len(self.models) < MAX_MODELS:
            self.models[name] = self.models.get(name, 0) + 1

    def _found(self, breaches: tuple[Breach, ...], line: bytes | None) -> None:
        """Keep what is wanted; `line` is None where it was too long to be kept itself."""
        for breach in breaches:
            self.kinds[breach.reason] = self.kinds.get(breach.reason, 0) + 1
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


def _checked(read: _Read, audit: _Audit, *, max_bytes: int, max_lines: int) -> Checked:
    limits = (0, 0) if audit.level is Check.NONE else (max_bytes, max_lines)
    lines = audit.number - audit.blank
    about_all = tuple(_file_findings(read.size, lines, *limits))
    findings = (*about_all, *audit.findings)[: audit.wanted.most]
    kinds = {finding.reason: 1 for finding in about_all} | audit.kinds  # no line breaks a rule for files
    return Checked(
        sha256=read.digest.hexdigest(),
        size=read.size,
        lines=lines,
        findings=findings,
        more=sum(kinds.values()) - len(findings),
        kinds=dict(sorted(kinds.items(), key=itemgetter(1), reverse=True)),
        warnings=() if audit.level is Check.NONE else tuple(_warnings(audit)),
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
