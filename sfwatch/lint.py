"""Batch files that are only looked at: each is held against the rules, or it is said why it can't be."""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from sfwatch import files
from sfwatch.check import Checked, Finding, ShortRead, Wanted, check, check_stream
from sfwatch.settings import Check, Config, Inbox
from sfwatch.users import user

STDIN = "-"
"""The name that stands for standard input."""

MOST_FINDINGS = 10_000
"""Findings that are told of one file."""

_NEARLY = 0.9
"""The part of a limit from which on it is near."""


@dataclass(frozen=True, slots=True)
class FileReport:
    """What is to be said about one batch file: what its lines show, or why it could not be read."""

    name: str
    checked: Checked | None = None
    problem: str | None = None

    @property
    def is_sound(self) -> bool:
        """Whether the service would take it, as far as can be seen from here."""
        return self.checked is not None and not self.checked.findings


def limits(config: Config | None) -> Inbox:
    """The inbox whose limits count for files that are only named: the first one, else the defaults."""
    first = config.inboxes[0] if config else Inbox(Path("/"), "", Path("/"), Path("/"))
    return replace(first, check=Check.BATCH) if first.check is Check.NONE else first


def batch_file(name: str, bounds: Inbox, stdin: BinaryIO | None, wanted: Wanted) -> FileReport:
    """Hold one batch file against the service's rules; `-` is standard input."""
    try:
        checked = _checked_stdin(bounds, stdin, wanted) if name == STDIN else _checked(name, bounds, wanted)
    except FileNotFoundError:
        return FileReport(name, problem="is not there: correct the name")
    except files.NotRegular as found:
        return FileReport(name, problem=_no_file(found.kind))
    except PermissionError:
        return FileReport(name, problem=f"may not be read by {user(os.geteuid())}: chmod or chown it")
    except ShortRead:
        return FileReport(name, problem="became shorter while it was read: check it when it is finished")
    except OSError as error:
        return FileReport(name, problem=f"can't be read: {error.strerror or error}")
    return FileReport(name, replace(checked, warnings=(*_nearing(checked, bounds), *checked.warnings)))


def _checked(name: str, bounds: Inbox, wanted: Wanted) -> Checked:
    with files.regular(os.path.realpath(name)) as fd:  # a link is followed: the name is the caller's own
        return check(
            fd,
            os.fstat(fd).st_size,
            level=bounds.check,
            max_bytes=bounds.max_bytes,
            max_lines=bounds.max_lines,
            wanted=wanted,
        )


def _checked_stdin(bounds: Inbox, stdin: BinaryIO | None, wanted: Wanted) -> Checked:
    if stdin is None:
        raise OSError(errno.EBADF, "standard input is closed")
    return check_stream(
        stdin, level=bounds.check, max_bytes=bounds.max_bytes, max_lines=bounds.max_lines, wanted=wanted
    )


def _no_file(kind: str) -> str:
    if kind == "folder":
        return "is a folder: name the files in it"
    return f"is a {kind}, not a file: to check what comes out of it, give it as standard input and name -"


def _nearing(checked: Checked, bounds: Inbox) -> Iterator[Finding]:
    """What is no fault yet, but will be one if the file grows a little."""
    if 0 < bounds.max_bytes * _NEARLY <= checked.size <= bounds.max_bytes:
        detail = f"{checked.size:,} bytes of at most {bounds.max_bytes:,}: near the limit"
        yield Finding(None, "nearly_too_big", detail)
    if 0 < bounds.max_lines * _NEARLY <= checked.lines <= bounds.max_lines:
        detail = f"{checked.lines:,} lines of at most {bounds.max_lines:,}: near the limit"
        yield Finding(None, "nearly_too_many_lines", detail)
