"""Who a state folder is: the file `instance` names the claims folders, and outlives a lost journal."""

import json
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sfwatch import files

MACHINE_ID = Path("/etc/machine-id")


class Identity(NamedTuple):
    """`machine`: None where the machine has no id. `former`: instances that version 0.1.0 had here before."""

    instance: str
    machine: str | None
    former: tuple[str, ...]


def checked(instance: str, machine: str | None, former: Sequence[str]) -> Identity:
    """Folders are named by these, so that nothing else may stand there. Raises ValueError and TypeError."""
    for name in (instance, *former):
        if not re.fullmatch("[0-9a-f]{16}", name):
            raise ValueError(f"{name!r} is no instance")
    return Identity(instance, machine, tuple(former))


def establish(folder: Path, machine: str | None) -> Identity:
    """Return who this state folder is: somebody else once it lies on another machine, as a copy may."""
    written = read(folder)
    if written is None or (machine and written.machine and machine != written.machine):
        identity = Identity(secrets.token_hex(8), machine, ())
    else:
        identity = written._replace(machine=written.machine or machine)
    if identity != written:
        write(folder, identity)
    return identity


def read(folder: Path) -> Identity | None:
    """Return what is written; None if nothing is, or nothing that makes sense."""
    try:
        text = (folder / "instance").read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    try:
        # Version 0.1.0 wrote the instance alone.
        said = json.loads(text) if "{" in text else {"instance": text, "machine": None, "former": ()}
        return checked(**said)
    except (ValueError, TypeError):
        return None


def write(folder: Path, identity: Identity) -> None:
    fresh = folder / "instance.new"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w") as stream:
        stream.write(json.dumps(identity._asdict()) + "\n")
        stream.flush()
        os.fsync(fd)
    fresh.replace(folder / "instance")
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    files.close(directory)


def machine_id(file: Path = MACHINE_ID) -> str | None:
    """Return this machine's id, which some containers and images do not have."""
    try:
        text = file.read_text().strip()
    except (OSError, ValueError):
        return None
    return text if re.fullmatch("[0-9a-f]{32}", text) else None
