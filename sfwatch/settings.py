"""The settings as frozen values: what a configuration means once it has been found sound.

`config.py` makes them from YAML; nobody changes them. Durations are seconds (`_s`), sizes bytes.
The defaults here are the reference that `config/sfwatch.yaml` is tested against.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

ROOM_BYTES = 16 * 1024 * 1024
"""Bytes that must be free in done, failed, state and inbox before an upload begins."""


class Check(StrEnum):
    """How much of a file is looked into before it is sent."""

    BATCH = "batch"
    JSONL = "jsonl"
    NONE = "none"


class Proof(StrEnum):
    """Whether the kernel's word on writers is trusted in an inbox."""

    AUTO = "auto"
    NEVER = "never"


class OnUnknown(StrEnum):
    """What becomes of a lost answer that no listing can clear up."""

    RESEND = "resend"
    HOLD = "hold"


class RemoteName(StrEnum):
    """The name under which a file is sent."""

    ORIGINAL = "original"
    TAGGED = "tagged"


@dataclass(frozen=True, slots=True)
class Api:
    """Where files go, and where the key for it comes from (never the key itself)."""

    base_url: str = "https://api.siliconflow.cn/v1"
    key_file: Path | None = None
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 300.0
    ca_bundle: Path | None = None
    allow_plain_http: bool = False


@dataclass(frozen=True, slots=True)
class Inbox:
    """One watched folder and what becomes of its files. All paths are absolute."""

    path: Path
    name: str
    done: Path
    failed: Path
    match: tuple[str, ...] = ("*.jsonl",)
    purpose: str = "batch"
    settle_s: float = 2.0
    settle_unproven_s: float = 10.0
    recursive: bool = False
    proof: Proof = Proof.AUTO
    settle_marker: str | None = None
    check: Check = Check.BATCH
    max_bytes: int = 1_000_000_000
    max_lines: int = 5000
    api: Api = field(default_factory=Api)


@dataclass(frozen=True, slots=True)
class Uploads:
    """How hard the service is worked, and for how long a failure is borne."""

    concurrency: int = 4
    first_retry_s: float = 1.0
    longest_retry_s: float = 300.0
    give_up_after_s: float | None = None
    poison_after: int = 10
    max_rate: int | None = None
    on_unknown: OnUnknown = OnUnknown.RESEND
    reconcile_window_s: float = 30.0
    resend_limit: int = 2
    remote_name: RemoteName = RemoteName.TAGGED


@dataclass(frozen=True, slots=True)
class Log:
    """Where events go and how they look."""

    level: str = "info"
    format: str = "auto"
    file: Path | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """All of one configuration file."""

    inboxes: tuple[Inbox, ...]
    uploads: Uploads = field(default_factory=Uploads)
    scan_interval_s: float = 30.0
    poll_interval_s: float = 5.0
    state_dir: Path = Path("/var/lib/sfwatch")
    stop_grace_s: float = 30.0
    status_file: Path | None = None
    history_days: int = 30
    metrics_file: Path | None = None
    log: Log = field(default_factory=Log)
    source: Path | None = None
