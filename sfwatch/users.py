"""Users as people and commands name them, and whose a folder is."""

import os
import pwd
import shlex
from collections.abc import Iterable
from pathlib import Path


def user(uid: int) -> str:
    """The name of a user, or its number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def login(uid: int) -> str:
    """How commands take a user."""
    try:
        return shlex.quote(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return str(uid)


def foreign_owner(folder: Path) -> int | None:
    """The user id that a folder belongs to, if it is there and that is not ours."""
    try:
        owner = folder.stat().st_uid
    except OSError:
        return None
    return None if owner == os.geteuid() else owner


def as_user(uid: int, command: Iterable[str]) -> str:
    """The command line that does the same as that user."""
    if login(uid) == str(uid):  # runuser takes names only
        return f"setpriv --reuid {uid} --clear-groups -- {shlex.join(command)}"
    return f"runuser -u {login(uid)} -- {shlex.join(command)}"
