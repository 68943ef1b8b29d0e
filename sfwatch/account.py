"""Whether there is a key for each service, and whether the service takes it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from urllib.parse import urlsplit

from sfwatch import __version__, key, verdict
from sfwatch.notes import Level, Note
from sfwatch.settings import Api, Config
from sfwatch.upload import Client
from sfwatch.verdict import FILE_STATUSES, Blame, Reason

PATIENCE_S = 30.0
"""The longest wait for the service's answer: somebody sits there and waits as well."""


def targets(config: Config) -> list[tuple[Api, str]]:
    """Each way to a service once, with the purpose that its first inbox sends."""
    purposes: dict[Api, str] = {}
    for inbox in config.inboxes:
        purposes.setdefault(inbox.api, inbox.purpose)
    return list(purposes.items())


def look(
    api: Api, purpose: str, environ: Mapping[str, str], *, online: bool, wall: Callable[[], float]
) -> list[Note]:
    """Whether there is a key, and with `online` whether the service takes it. `wall` gives seconds."""
    about = f"key of {_host(api)}"
    try:
        secret = key.read(api, environ)
    except key.NoKey as missing:
        return [Note(Level.FINDING, about, f"{missing}{_credential_hint(missing)}")]
    notes = [Note(Level.OK, about, f"comes from {key.source(api, environ)}")]
    notes += [Note(Level.WARNING, about, text) for text in key.warnings(api, environ)]
    return notes + (listing(api, purpose, secret, wall=wall) if online else [])


def _credential_hint(missing: key.NoKey) -> str:
    return "; a systemd credential is seen by the service alone" if missing.reason == "no_key" else ""


def _host(api: Api) -> str:
    return urlsplit(api.base_url).netloc


def listing(api: Api, purpose: str, secret: key.Key, *, wall: Callable[[], float]) -> list[Note]:
    """Ask for one listing, and judge it as the daemon would."""
    patient = replace(api, read_timeout_s=min(api.read_timeout_s, PATIENCE_S))
    client = Client(patient, connections=1, user_agent=f"sfwatch/{__version__}")
    try:
        attempt = client.list_files(purpose=purpose, limit=1, key=secret.reveal())
    finally:
        client.close()
    now, about = wall(), f"service {client.host}"
    judged = verdict.judge_listing(attempt, host=client.host, reached_before=False, wall=now)
    return [Note(_level(judged), about, judged.detail)]


def _level(judged: verdict.Verdict) -> Level:
    if judged.unreachable:
        return Level.UNAVAILABLE
    match judged.blame:
        case Blame.ACCEPTED if judged.reason == Reason.NO_LISTING and judged.http_status in FILE_STATUSES:
            return Level.FINDING  # it is refused: the daemon goes on and looks at the answer to an upload
        case Blame.ACCEPTED:
            return Level.OK
        case Blame.NOT_NOW:
            return Level.UNAVAILABLE
        case _:
            return Level.FINDING
