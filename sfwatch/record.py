"""The sidecar or report is there whole and durable before its file is, and its name reserves the file's.

Names are never taken from anybody: a file NAME goes into done or failed only where neither NAME nor its
sidecar lies, and publishing the sidecar without replacing decides between two who choose alike. Both documents
are valid JSON whatever the service sent, and harmless on a terminal whatever a name or an answer holds.
"""

import base64
import binascii
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Protocol

import msgspec

from sfwatch import files
from sfwatch.logs import is_utf8, printable

SIDECAR = ".fileid.json"
REPORT = ".error.json"

_SCHEMA = 1
_LONGEST_SUFFIX = max(len(SIDECAR), len(REPORT))
_LONGEST_NAME = 255  # bytes, NAME_MAX of Linux
_SHORT_NAME = 100  # bytes: eCryptfs takes 143, and no filesystem that files are kept on takes fewer
_LONGEST_EXTENSION = 32
_LONGEST_TEXT = 2000  # characters of one string in a report
_LARGEST_DOCUMENT = 4 * 1024 * 1024
_DEEPEST = 50
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_CONTROL_IN_JSON = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")

_MEND = "Correct the file at the lines named, then drop it again, or put it back with `sfwatch retry NAME`."

NEXT_STEPS: Mapping[str, str] = MappingProxyType(
    {
        "not_utf8": "Save the file as UTF-8, then drop it again.",
        "bom": "Save the file as UTF-8 without a byte order mark, then drop it again.",
        "not_json": "Make each line one JSON object, without line breaks inside, then drop the file again.",
        "not_object": "Make each line a JSON object, `{…}`, then drop the file again.",
        "custom_id_missing": "Give each line a `custom_id`, then drop the file again.",
        "custom_id_invalid": "Make each `custom_id` a string that is not empty, then drop the file again.",
        "custom_id_repeated": "Give each line a `custom_id` of its own, then drop the file again.",
        "messages_missing": "Give each line its `body.messages`, then drop the file again.",
        "messages_invalid": "Make each `body.messages` a list as the batch guide shows, then drop it again.",
        "role_invalid": "Use the roles system, user and assistant only, then drop the file again.",
        "last_role_not_user": "Let the last message of each line be the user's, then drop the file again.",
        "empty": "Write at least one request into the file, then drop it again.",
        "too_many_lines": "Split the file, `split -l 5000 NAME part-`, and drop the parts.",
        "too_big": "Split the file into parts below the limit, `split -C 900M NAME part-`, and drop the parts.",
        "nul_bytes": "The file was not written to its end (it holds NUL bytes): make it again and drop that.",
        "refused": "Read what the service said in `message`, correct the file, then drop it again.",
        "keeps_failing": "The service takes other files: see `detail`, then `sfwatch retry NAME`.",
        "gave_up": "Once the service takes files again, put it back: `sfwatch retry --reason gave_up`.",
    }
)
"""What to do about each reason that a report can give."""


class FindingLike(Protocol):
    """One finding of a check."""

    @property
    def line(self) -> int | None: ...
    @property
    def reason(self) -> str: ...
    @property
    def detail(self) -> str: ...


def rfc3339(at: datetime) -> str:
    """A time as documents give it: UTC, milliseconds."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def sidecar(*, data: Mapping[str, Any], facts: Mapping[str, Any]) -> bytes:
    """The service's own object with our facts under "sfwatch".

    What the service sent is kept as it is. Only what is no JSON for everybody (lone surrogates, NaN, numbers
    and depths beyond what can be written) becomes a text that shows it.
    """
    ours = {"schema": _SCHEMA, **_with_name_bytes(facts)}
    return _document({**{key: value for key, value in data.items() if key != "sfwatch"}, "sfwatch": ours})


def report(
    *,
    reason: str,
    detail: str,
    next_step: str | None = None,
    line: int | None = None,
    findings: Sequence[FindingLike | Mapping[str, Any]] = (),
    more_findings: int = 0,
    http_status: int | None = None,
    code: int | str | None = None,
    message: str | None = None,
    trace_id: str | None = None,
    attempts: int = 0,
    sha256: str | None = None,
    size: int | None = None,
    inbox: str,
    original_name: str,
    failed_at: datetime | str,
    version: str,
) -> bytes:
    """Why a file failed. What is not known is null; strings are bounded, control characters escaped."""
    facts = {
        "reason": reason,
        "detail": _text(detail),
        "next_step": _text(NEXT_STEPS.get(reason, _MEND) if next_step is None else next_step),
        "line": line,
        "findings": [_finding(found) for found in findings],
        **({"more_findings": more_findings} if more_findings else {}),
        "http_status": http_status,
        "code": _text(code),
        "message": _text(message),
        "trace_id": _text(trace_id),
        "attempts": attempts,
        "sha256": sha256,
        "size": size,
        "inbox": inbox,
        "original_name": original_name,
        "failed_at": rfc3339(failed_at) if isinstance(failed_at, datetime) else failed_at,
        "version": version,
    }
    return _document({"schema": _SCHEMA, **_with_name_bytes(facts)})


def _finding(found: FindingLike | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(found, Mapping):
        return {"line": found.get("line"), "reason": found["reason"], "detail": _text(found["detail"])}
    return {"line": found.line, "reason": found.reason, "detail": _text(found.detail)}


def _text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return printable(value if len(value) <= _LONGEST_TEXT else value[: _LONGEST_TEXT - 1] + "…")


def original_name(facts: Mapping[str, Any]) -> str:
    """The name under which a file was dropped, from a report or from "sfwatch" of a sidecar.

    Whoever may write to the folder may have written the document: a name that could lead out of an inbox, or
    none, is a ValueError.
    """
    encoded, plain = facts.get("original_name_b64"), facts.get("original_name")
    try:
        name = os.fsdecode(base64.b64decode(encoded, validate=True)) if encoded is not None else plain
    except (binascii.Error, TypeError, ValueError):
        raise ValueError("original_name_b64 is not base64") from None
    if not isinstance(name, str) or not _is_name(name):
        raise ValueError(f"{name!r} is no name of a file in an inbox")
    return name


def believed_name(facts: object) -> str | None:
    """The same, or None where nothing like it is said, or nothing that can be believed."""
    try:
        return original_name(facts) if isinstance(facts, Mapping) else None
    except ValueError:
        return None


def _is_name(name: str) -> bool:
    try:
        os.fsencode(name)
        files.parts(name)
    except ValueError:
        return False
    return True


def _with_name_bytes(facts: Mapping[str, Any]) -> dict[str, Any]:
    """An undecodable name made printable, with its bytes beside it."""
    name = facts.get("original_name")
    if not isinstance(name, str) or is_utf8(name):
        return dict(facts)
    encoded = base64.b64encode(name.encode("utf-8", "surrogateescape")).decode()
    return {**facts, "original_name": printable(name), "original_name_b64": encoded}


def _document(content: Mapping[str, Any]) -> bytes:
    """Faithful if it can be, else with a printable form of each value that can't be written."""
    try:
        return _dumped(content)
    except (ValueError, TypeError, RecursionError):
        return _dumped(_printable_form(content, _DEEPEST))


def _dumped(content: Any) -> bytes:
    """JSON in which no character can steer a terminal: those that JSON itself lets stand are escaped too.

    Its lines are broken by msgspec, in C: `indent` of json is slow.
    """
    text = _JSON.encode(content)
    if not text.isprintable():
        text = _CONTROL_IN_JSON.sub(lambda found: f"\\u{ord(found.group()):04x}", text)
    return msgspec.json.format(text.encode(), indent=2) + b"\n"


def _printable_form(value: Any, depth: int) -> Any:
    if not isinstance(value, Mapping | list | tuple):
        return _printable_scalar(value)
    if depth == 0:
        return "(nested too deeply to be written)"
    if isinstance(value, Mapping):
        return {_printable_scalar(str(key)): _printable_form(item, depth - 1) for key, item in value.items()}
    return [_printable_form(item, depth - 1) for item in value]


def _printable_scalar(value: Any) -> Any:
    if isinstance(value, str):
        return value if is_utf8(value) else printable(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return _printable_int(value)
    if value is None or isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return printable(str(value))


def _printable_int(value: int) -> int | str:
    """Python refuses to write out integers of more than 4300 digits, but not in hexadecimal."""
    try:
        str(value)
    except ValueError:
        return f"{value:#x}"
    return value


def fits_anywhere(name: str) -> bool:
    """Whether a name need not be shortened for its sidecar, whatever filesystem it goes to."""
    return len(os.fsencode(name)) <= _SHORT_NAME


def choose_name(folder_fd: int, name: str, suffix: str, *, at: datetime) -> str:
    """A free name for a file: its own, else with the time in it, else with a counter as well.

    Free is a name where neither the file nor NAME + `suffix` lies. Only `reserve` makes it ours.
    """
    return next(
        candidate
        for candidate in _candidates(name, at, _longest_name(folder_fd))
        if not files.exists(candidate, dir_fd=folder_fd)
        and not files.exists(candidate + suffix, dir_fd=folder_fd)
    )


def _longest_name(folder_fd: int) -> int:
    """Bytes, so that either suffix fits; some filesystems (ecryptfs) take less than the usual."""
    limit = os.fpathconf(folder_fd, "PC_NAME_MAX")
    return (limit if 0 < limit < _LONGEST_NAME else _LONGEST_NAME) - _LONGEST_SUFFIX


def _candidates(name: str, at: datetime, longest: int) -> Iterator[str]:
    stem, extension = _split(name)
    stamp = f".{at.astimezone(UTC):%Y%m%dT%H%M%SZ}"
    for inserted in itertools.chain(["", stamp], (f"{stamp}.{count}" for count in itertools.count(1))):
        yield _fitted(name, stem, inserted + extension, longest)


def _split(name: str) -> tuple[str, str]:
    """At the last dot; what is too long to be an extension is part of the name."""
    stem, extension = os.path.splitext(name)  # noqa: PTH122 (a name, and a hidden one has no extension)
    return (name, "") if len(os.fsencode(extension)) > _LONGEST_EXTENSION else (stem, extension)


def _fitted(name: str, stem: str, ending: str, longest: int) -> str:
    """`stem` + `ending`; what is too long is cut between characters and told apart by the name's digest."""
    if len(os.fsencode(stem + ending)) <= longest:
        return stem + ending
    ending = f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}{ending}"
    room = longest - len(os.fsencode(ending))
    sizes = itertools.accumulate(len(os.fsencode(character)) for character in stem)
    return stem[: sum(1 for size in sizes if size <= room)] + ending


def reserve(folder_fd: int, name: str, suffix: str, document: bytes, *, sha256: str) -> None:
    """Publish the document as NAME + `suffix`, and with it take NAME for the file that is to come.

    One that an earlier try of ours published is taken for it. FileExistsError: the name is somebody else's.
    """
    if files.exists(name, dir_fd=folder_fd):
        raise FileExistsError(f"{name!r} is taken")
    try:
        files.publish(folder_fd, name + suffix, document)
    except FileExistsError:
        if not is_our_own(folder_fd, name + suffix, sha256, document):
            raise
        files.sync_folder(folder_fd)  # the earlier try may have ended just before


def unreserve(folder_fd: int, name: str, suffix: str, document: bytes, *, sha256: str) -> None:
    """Take a reservation of ours back; anybody else's document, or none, is left as it is."""
    if is_our_own(folder_fd, name + suffix, sha256, document):
        with suppress(FileNotFoundError):
            os.unlink(name + suffix, dir_fd=folder_fd)
        files.sync_folder(folder_fd)


def is_our_own(folder_fd: int, name: str, sha256: str, document: bytes) -> bool:
    """Whether a document is the very one given, or else of our user, for these bytes and for this delivery.

    The first half is for filesystems that show one owner for all files. The same bytes may be dropped into two
    inboxes that share this folder: then only the id, or inbox, name and time tell whose document it is.
    """
    try:
        with files.regular(name, dir_fd=folder_fd) as fd:
            ours = os.fstat(fd).st_uid == os.geteuid()
            found = os.pread(fd, _LARGEST_DOCUMENT, 0)
    except (OSError, files.NotRegular):
        return False
    return found == document or (ours and _delivery(found) == _delivery(document) and sha256 == _sha256(found))


def _delivery(document: bytes) -> tuple[object, ...]:
    """What tells one delivery's document from any other's."""
    content = _parsed(document)
    facts = content.get("sfwatch", content)
    if not isinstance(facts, Mapping):
        return ()
    whose = tuple(facts.get(key) for key in ("inbox", "original_name", "original_name_b64"))
    if "id" in content:  # which two targets that name uploads after their bytes may both have given
        return *whose, content["id"], facts.get("uploaded_at")
    return *whose, facts.get("failed_at")


def _sha256(document: bytes) -> object:
    content = _parsed(document)
    facts = content.get("sfwatch", content)
    return facts.get("sha256") if isinstance(facts, Mapping) else None


def read(name: str, *, dir_fd: int | None = None) -> dict[str, Any] | None:
    """A sidecar or report as it lies there; None if there is none that can be read. Never raises OSError."""
    try:
        with files.regular(name, dir_fd=dir_fd) as fd:
            return _object(os.pread(fd, _LARGEST_DOCUMENT, 0))
    except (OSError, files.NotRegular):
        return None


def _parsed(document: bytes) -> Mapping[str, Any]:
    return _object(document) or {}


def _object(document: bytes) -> dict[str, Any] | None:
    """An object, None if it is none: whoever may write to the folder may have put anything there."""
    try:
        content = json.loads(document)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
