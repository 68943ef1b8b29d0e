"""What no key of a configuration shows alone: the key in the clear, folders in each other's way."""

import ipaddress
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sfwatch.problems import Notes
from sfwatch.settings import Api, Config, Inbox

_OUR_FOLDER = ".sfwatch"


def look_at_address(api: Api, own: Mapping[str, Any], where: str, notes: Notes) -> None:
    if not own.keys() & {"base_url", "allow_plain_http"} or api.allow_plain_http:
        return
    url = urlsplit(api.base_url)
    if url.scheme == "http" and not _is_loopback(url.hostname or ""):
        text = (
            "http:// would show the key to everybody on the way: write https://, or set allow_plain_http: true"
        )
        notes.add(f"{where}.base_url", text)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def look_at_retries(config: Config, notes: Notes) -> None:
    if "uploads.first_retry" in notes.lines and config.uploads.first_retry_s > config.uploads.longest_retry_s:
        notes.add("uploads.first_retry", "is longer than longest_retry: shorten it, or lengthen the other")


def look_at_folders(
    config: Config, inboxes: Mapping[str, Inbox], realpath: Callable[[Path], Path], notes: Notes
) -> None:
    homes: dict[Path, str] = {}
    for where, inbox in inboxes.items():
        homes.setdefault(realpath(inbox.path), where)
    _look_at_names(inboxes, notes)
    _look_at_overlaps(inboxes, homes, realpath, notes)
    for path, folder in _written_to(config, inboxes):
        home = _would_look(realpath(folder), homes, inboxes)
        if home:
            notes.add(path, f"lies where {notes.place(f'{home}.path')} looks for files: choose another folder")
    for where, inbox in inboxes.items():
        if realpath(inbox.done) == realpath(inbox.failed):
            notes.add(f"{where}.failed", "is the same folder as done: choose another one")


def _look_at_names(inboxes: Mapping[str, Inbox], notes: Notes) -> None:
    first: dict[str, str] = {}
    for where, inbox in inboxes.items():
        if not inbox.path.name:
            notes.add(f"{where}.path", "/ can't be an inbox: name a folder in it")
        other = first.setdefault(inbox.name, where)
        if other != where:
            text = f"has the same name as {notes.place(other)}: give one of them another `name`"
            notes.add(f"{where}.name", text)


def _look_at_overlaps(
    inboxes: Mapping[str, Inbox], homes: Mapping[Path, str], realpath: Callable[[Path], Path], notes: Notes
) -> None:
    for where, inbox in inboxes.items():
        real = realpath(inbox.path)
        if homes[real] != where:
            notes.add(f"{where}.path", f"is the same folder as {notes.place(f'{homes[real]}.path')}")
        for parent in real.parents:
            if parent in homes:
                text = f"lies inside {notes.place(f'{homes[parent]}.path')}: no inbox may lie inside another"
                notes.add(f"{where}.path", text)
        for key, folder in (("path", inbox.path), ("done", inbox.done), ("failed", inbox.failed)):
            if _OUR_FOLDER in realpath(folder).parts:
                notes.add(f"{where}.{key}", f"lies in a {_OUR_FOLDER} folder, where files under way are kept")


def _written_to(config: Config, inboxes: Mapping[str, Inbox]) -> Iterator[tuple[str, Path]]:
    """The folders that files are put into, with the keys that say so."""
    for where, inbox in inboxes.items():
        yield f"{where}.done", inbox.done
        yield f"{where}.failed", inbox.failed
    yield "state_dir", config.state_dir
    files = {
        "status_file": config.status_file,
        "metrics_file": config.metrics_file,
        "log.file": config.log.file,
    }
    for key, file in files.items():
        if file is not None:
            yield key, file.parent


def _would_look(folder: Path, homes: Mapping[Path, str], inboxes: Mapping[str, Inbox]) -> str | None:
    """The inbox that would find what is put into `folder`."""
    if folder in homes:
        return homes[folder]
    above = (homes[parent] for parent in folder.parents if parent in homes)
    return next((home for home in above if inboxes[home].recursive), None)
