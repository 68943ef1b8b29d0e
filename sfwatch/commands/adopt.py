"""`sfwatch adopt`: a person's word that the daemon which claimed these files is dead.

Nothing is renamed. The owner of the claims folder is replaced, and the daemon of this state folder works on the
claims where they are: they may have been sent already, which is looked up first.
"""

import os
from dataclasses import replace
from pathlib import Path

from sfwatch import claim, files
from sfwatch.delivery import identity
from sfwatch.settings import Config, Inbox


class NotAdoptedError(Exception):
    """Why a claims folder was not taken over, and what to do, as a sentence."""


def adopt(config: Config, path: Path) -> str:
    """Make the daemon of this state folder the owner of a claims folder; return what comes of it.

    Raises NotAdoptedError; OSError if the state folder can't be read.
    """
    known = identity.read(config.state_dir)
    if known is None:
        raise NotAdoptedError(
            f"no daemon has run with {config.state_dir} yet: start it once, then run this again"
        )
    inbox, folder = _found(config, path)
    try:
        if claim.is_ours(folder, known.instance):
            raise NotAdoptedError(f"{path} is this daemon's own: it continues with these files by itself")
        lock = claim.lock(inbox.path, folder)
        try:
            waiting = len(claim.claimed(inbox.path, folder))
            owner = claim.owner_of(inbox.path, folder) or claim.Owner(None, "", None)
            adopted = replace(owner, journal=None, adopted_by=known.instance)
            claim.write_owner(inbox.path, folder, adopted)
        finally:
            files.close(lock)
    except BlockingIOError:
        raise NotAdoptedError(f"a running process works on {path}: stop that daemon first") from None
    except claim.ClaimError as error:
        raise NotAdoptedError(error.detail) from None
    except OSError as error:
        raise NotAdoptedError(f"{path} can't be taken over: {error.strerror}") from error
    count = "1 file" if waiting == 1 else f"{waiting} files"
    return f"{path}  has {count}; the daemon takes over at its next scan of inbox {inbox.name}, or at its start"


def _found(config: Config, path: Path) -> tuple[Inbox, str]:
    """The configured inbox that a claims folder is in, and the folder's name."""
    around, folder = os.path.split(os.path.abspath(path))  # noqa: PTH100 - no link may stand for the folder
    for inbox in config.inboxes:
        if os.path.realpath(around) == os.path.realpath(inbox.path / claim.FOLDER):
            try:
                claimed = claim.folders(inbox.path)
            except claim.ClaimError as error:
                raise NotAdoptedError(error.detail) from None
            except OSError as error:
                raise NotAdoptedError(f"{inbox.path} can't be read: {error.strerror}") from error
            if folder in claimed:
                return inbox, folder
    places = ", ".join(str(claim.claims_folder(inbox.path, "*")) for inbox in config.inboxes)
    raise NotAdoptedError(f"{path} is not the claims folder of a configured inbox: name one of {places}")
