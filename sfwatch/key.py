"""Where the API key comes from; it lives in this type and in the `Authorization` header only.

The places, in this order: the file that `key_file` names, the systemd credential `siliconflow-api-key`, the
environment. A `key_file` that is named but can't be used is an error and never falls through: the next place
might hold somebody else's key. The key is read anew whenever it is asked for, so that a changed file counts
at once.

No local variable that is alive when an error is raised here holds the bare key: log formatters that print the
locals of a traceback find a `Key(***)`.
"""

import hmac
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from sfwatch.settings import Api

CREDENTIAL = "siliconflow-api-key"
"""Name of the systemd credential (`LoadCredential=siliconflow-api-key:…`)."""

VARIABLE = "SILICONFLOW_API_KEY"
"""Name of the environment variable."""

LONGEST_BYTES = 4096
"""Far more than any key has; a file that holds more is some other file."""

_SHELL_LINE = re.compile(r"""["'].*|[A-Za-z_]\w*=[^=].*""", re.DOTALL)


class Key:
    """An API key that prints as `Key(***)` wherever it turns up; only `reveal()` gives it away."""

    __slots__ = ("_secret",)

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def reveal(self) -> str:
        """The key itself, for the `Authorization` header and nothing else."""
        return self._secret

    def __repr__(self) -> str:
        return "Key(***)"

    def __format__(self, format_spec: str, /) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        return hmac.compare_digest(self._secret.encode(), other._secret.encode())

    def __hash__(self) -> int:
        return hash((Key, self._secret))

    def __reduce_ex__(self, protocol: object, /) -> NoReturn:
        raise TypeError("a key is not written anywhere: it can be neither pickled nor copied")


class NoKey(Exception):  # noqa: N818 - a state of the world, not a bug
    """There is no usable key. `reason` is a short code, `detail` says what is wrong, `next_step` what to do.

    Reasons: `no_key` (no place has one), `key_missing`, `key_unreadable`, `key_empty`, `key_malformed`.
    """

    def __init__(self, reason: str, detail: str, next_step: str) -> None:
        super().__init__(f"{detail}; {next_step}")
        self.reason = reason
        self.detail = detail
        self.next_step = next_step


def source(api: Api, environ: Mapping[str, str]) -> str:
    """Where the key for `api` comes from, in words that may be printed; never the key."""
    if api.key_file is not None:
        return f"file {api.key_file}"
    if _credential(environ) is not None:
        return f"credential {CREDENTIAL}"
    return f"environment {VARIABLE}" if environ.get(VARIABLE, "").strip() else "none"


def read(api: Api, environ: Mapping[str, str]) -> Key:
    """The key for `api`, read anew. Raises `NoKey`."""
    path = api.key_file or _credential(environ)
    if path is not None:
        return _sound(_from_file(path), f"the key in {path}")
    key = Key(environ.get(VARIABLE, "").strip())
    if not key.reveal():
        raise NoKey(
            "no_key", "there is no API key", f"set api.key_file, the credential {CREDENTIAL} or ${VARIABLE}"
        )
    return _sound(key, f"the key in ${VARIABLE}")


def renewal(api: Api) -> str:
    """How a new key comes to count, which depends on where the key comes from."""
    if api.key_file is not None:
        return f"a new key in {api.key_file} counts at once"
    return "a new key counts once sfwatch is restarted"  # systemd hands a credential over at the start


def warnings(api: Api, environ: Mapping[str, str]) -> list[str]:
    """What is unwise about the place of the key: sentences for people, none if all is well."""
    del environ  # systemd sees to the permissions of credentials: 0440 in a folder of ours alone
    try:
        mode = stat.S_IMODE(api.key_file.stat().st_mode) if api.key_file is not None else 0
    except OSError:
        return []  # `read` says what is wrong with it
    if not mode & 0o007:
        return []
    return [f"{api.key_file} is open to every user of this machine (mode {mode:04o}): chmod o= {api.key_file}"]


def _credential(environ: Mapping[str, str]) -> Path | None:
    folder = environ.get("CREDENTIALS_DIRECTORY")
    path = Path(folder, CREDENTIAL) if folder else None
    return path if path is not None and os.path.lexists(path) else None


def _from_file(path: Path) -> Key:
    try:
        return _read_bounded(path)
    except FileNotFoundError:
        raise NoKey(
            "key_missing", f"the key file {path} does not exist", "make it, or correct api.key_file"
        ) from None
    except OSError as error:
        raise NoKey(
            "key_unreadable",
            f"the key file {path} can't be read by user id {os.geteuid()} ({error.strerror or error})",
            "it must be a regular file that the user sfwatch runs as may read",
        ) from None


def _read_bounded(path: Path) -> Key:
    """The file's text as a key, not yet looked at. Follows symbolic links: admins use them for key files."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)  # a FIFO must not hang us
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError("not a regular file")
        return Key(os.read(fd, LONGEST_BYTES + 1).decode("utf-8", "surrogateescape").strip())
    finally:
        os.close(fd)


def _sound(key: Key, what: str) -> Key:
    """Given a key as it was found, return it if it can stand in a header. Raise `NoKey`, quoting none of it."""
    if not key.reveal():
        raise NoKey("key_empty", f"{what} is empty", "write the key into it, alone on one line")
    fault = _fault(key)
    if fault:
        raise NoKey("key_malformed", f"{what} {fault}", "it must be the key alone, on one line")
    return key


def _fault(key: Key) -> str | None:
    secret = key.reveal()
    if len(secret.encode("utf-8", "surrogatepass")) > LONGEST_BYTES:
        return f"is longer than {LONGEST_BYTES} bytes"
    if not (secret.isascii() and secret.isprintable()) or " " in secret:
        return "has spaces, line breaks, control characters or characters beyond ASCII inside"
    if _SHELL_LINE.fullmatch(secret):
        return "has quotes or NAME= around it"
    return None
