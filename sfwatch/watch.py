"""One inbox as it is watched: whether it is there, is still the same folder, and rings.

The identity of the folder is compared at every look: a folder that was replaced, unmounted or mounted over
looks like an idle one to the doorbell. An inbox that is lost is looked for as often as it would be looked at.
"""

import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from sfwatch import arrive, files
from sfwatch.journal import Delivery
from sfwatch.settings import Config, Inbox, Proof
from sfwatch.settle import Rules

RINGS_PAUSE_S = 1.0
"""Least time between looks that rings ask for: thousands of folders may come one by one."""

SHARE = 50
RINGS_SHARE = 10
"""Looks at a very full inbox take no larger part of the time: regular ones, and those that rings ask for."""


@dataclass(slots=True)
class Watched:
    """What the main thread knows of one inbox. `lost` says why it is not there, as a code and a sentence."""

    inbox: Inbox
    rules: Rules
    next_look: float = 0.0
    looked_at: float = -math.inf
    look_s: float = 0.0  # how long the last look took
    mode: arrive.WatchMode | None = None
    identity: files.Identity | None = None
    former: files.Identity | None = None  # the folder before that one
    lost: tuple[str, str] | None = None
    unmade: str | None = None  # why it could not be made at the start
    told: str | None = None  # how it is watched, as it was said last
    others: int = 0
    looked: bool = False
    bare: tuple[str, str] | None = (
        None  # like `lost`: its filesystem is not mounted; the folder below is watched
    )
    overflowed: bool = False  # events were lost since the last look
    leaving: bool = False  # not in the settings any more: let go once nothing of it is under way
    locks: dict[str, int] = field(default_factory=dict)  # of the claims folders that have claims
    claims_folder: str | None = None  # our own one; None: not made yet
    missing_claims: set[str] = field(default_factory=set)  # claims folders of files in progress that are gone
    waiting_rows: list[Delivery] = field(default_factory=list)  # to be compared with the first scan
    relist: bool = False  # the claims are to be listed again
    refused: str | None = None  # why nothing can be claimed in it
    refused_until: float = 0.0
    claims: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)  # claims folders that others work on, or may work on
    foreign_told: set[str] = field(default_factory=set)
    skipped: set[tuple[str, str]] = field(default_factory=set)
    newly_closed: set[tuple[str, str]] = field(default_factory=set)  # sub-folders that may open in a moment


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look found. `changed`: the inbox is another folder than at the last look, or is back.

    `bare`: it is the folder that was below the inbox's filesystem, which is not mounted any more.
    """

    look: arrive.Look
    changed: bool
    bare: bool
    refusal: str | None  # why the doorbell cannot be armed


def rules_of(inbox: Inbox, *, trusted: bool) -> Rules:
    """Return what this inbox asks of its files where the kernel's word is worth this much."""
    return Rules(
        settle_s=inbox.settle_s,
        settle_unproven_s=inbox.settle_unproven_s,
        trusted=trusted,
        needs_marker=inbox.settle_marker is not None,
    )


def watched(inbox: Inbox) -> Watched:
    """Begin with an inbox, before anything is known of it."""
    return Watched(inbox, rules_of(inbox, trusted=inbox.proof is Proof.AUTO))


def change(watched: Watched, inbox: Inbox, doorbell: arrive.Doorbell) -> None:
    """Go on with other settings for the same folder; the doorbell is armed anew at the next look."""
    doorbell.unwatch(inbox.name)
    watched.inbox = inbox
    watched.mode = None


def look(watched: Watched, doorbell: arrive.Doorbell, known: Collection[str] | None = None) -> Seen:
    """Arm the doorbell if need be, then look. Raises OSError if the inbox is not there or cannot be read.

    What is `known` of another folder than this one is not compared with it.
    """
    inbox = watched.inbox
    identity = files.identity(inbox.path)
    changed = identity != watched.identity
    if changed or watched.mode is None:
        doorbell.unwatch(inbox.name)
        watched.mode = arrive.watch_mode(inbox.path, proof=inbox.proof)
        watched.rules = rules_of(inbox, trusted=watched.mode.trusted)
    refusal = doorbell.watch(inbox.name, inbox.path, recursive=inbox.recursive)
    seen = arrive.look(inbox, None if changed else known)
    bare = changed and _is_bare(watched, identity)
    if changed:
        watched.former, watched.identity = watched.identity, identity
    return Seen(seen, changed=changed, bare=bare, refusal=refusal)


def _is_bare(watched: Watched, now: files.Identity) -> bool:
    before = watched.identity
    if before is None or now == watched.former or (now.dev, now.ino) == (before.dev, before.ino):
        return False
    if files.is_mounted(before.mount):
        return False
    around = Path(os.path.realpath(watched.inbox.path)).parent
    return files.identity(around).mount == now.mount


def is_still_there(watched: Watched) -> bool:
    """Return whether the folder that was looked at last is still in its place."""
    try:
        return files.identity(watched.inbox.path) == watched.identity
    except OSError:
        return False


def lose(watched: Watched, doorbell: arrive.Doorbell) -> None:
    """Let go of an inbox that is not there any more; a descriptor on it would make an unmount fail as busy."""
    doorbell.unwatch(watched.inbox.name)
    watched.identity = None


def why_lost(w: Watched, error: OSError) -> tuple[str, str]:
    """Return a code and a sentence for an inbox that cannot be looked at."""
    path = w.inbox.path
    match error:
        case FileNotFoundError():
            unmade = f" (it could not be made: {w.unmade})" if w.unmade else ""
            detail = f"{path} is not there{unmade}: mount it, or make it again; it is looked for all the time"
            return "missing", detail
        case PermissionError():
            return "unreadable", f"{path} may not be read by this user: give it r, w and x there"
        case NotADirectoryError():
            return "no_folder", f"{path} is no folder"
        case _:
            return "io_error", f"{path} cannot be read: {error.strerror}"


def interval_s(watched: Watched, config: Config, *, rings: bool) -> float:
    """Return the seconds between two looks: few where nothing rings, or not for everything."""
    reliable = rings and watched.mode is not None and watched.mode.mode == "inotify"
    wanted = config.scan_interval_s if reliable else config.poll_interval_s
    return max(wanted, SHARE * watched.look_s)


def soon(watched: Watched, now: float) -> float:
    """Return when to look because something rang: at once, unless it was looked at just now."""
    return max(now, watched.looked_at + max(RINGS_PAUSE_S, RINGS_SHARE * watched.look_s))
