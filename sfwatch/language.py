"""All keys that a configuration can have: the form of each, and what it is for.

The tables `API`, `INBOX`, `UPLOADS`, `LOG` and `TOP` are the whole of the language. The defaults stand in
settings.py and nowhere else. The JSON schema for editors and the README's table are made from here.
"""

from dataclasses import dataclass

from sfwatch.settings import Check, OnUnknown, Proof, RemoteName
from sfwatch.values import (
    BOOL,
    MAYBE_LINE,
    MAYBE_PATH,
    PATH,
    RATE,
    SIZE,
    URL,
    Kind,
    choice,
    duration,
    enum,
    or_word,
    read_key_file,
    read_marker,
    read_pattern,
    read_purpose,
    whole,
)


@dataclass(frozen=True, slots=True)
class Listed:
    """A list of values of one kind."""

    kind: Kind
    example: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """Keys below a key, with an example of one; `many` for a list of such."""

    keys: tuple["Entry", ...]
    example: str
    many: bool = False
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key: its name in the YAML, its kind, and what it is for."""

    name: str
    kind: Kind | Listed | Section
    about: str

    @property
    def field(self) -> str:
        """The name of its field in settings.py."""
        return self.name + self.kind.unit


_BASE_URL = "base_url: https://api.siliconflow.cn/v1"
API = (
    Entry("base_url", URL, "where the service is"),
    Entry("key_file", Kind("a path", read_key_file, empty=True), "a file that holds the key and nothing else"),
    Entry("connect_timeout", duration("100ms", "1h"), "longest wait for a connection"),
    Entry(
        "read_timeout", duration("100ms", "1d"), "longest wait for the answer, or for more bytes to be taken"
    ),
    Entry("ca_bundle", MAYBE_PATH, "PEM file with the authorities to trust"),
    Entry("allow_plain_http", BOOL, "whether http:// may be spoken beyond this machine"),
)
INBOX = (
    Entry("path", PATH, "the folder that files are dropped into"),
    Entry("name", MAYBE_LINE, "what logs and commands call it; default: the folder's own name"),
    Entry("done", MAYBE_PATH, 'where accepted files go; default: "done" beside the inbox'),
    Entry("failed", MAYBE_PATH, 'where refused files go; default: "failed" beside the inbox'),
    Entry(
        "match",
        Listed(Kind("a pattern", read_pattern), '["*.jsonl"]'),
        "the names that are taken, letter case ignored",
    ),
    Entry("purpose", Kind("a word", read_purpose), "sent along with each file"),
    Entry("settle", duration("1ms", "1d"), "how long a file must rest where the kernel vouches for it"),
    Entry("settle_unproven", duration("1ms", "1d"), "how long a file must rest where nothing vouches for it"),
    Entry("recursive", BOOL, "take the whole subtree"),
    Entry("proof", enum(Proof), "whether the kernel's word on writers is trusted"),
    Entry("settle_marker", Kind("an ending", read_marker, empty=True), "ending of the marker that says: whole"),
    Entry("check", enum(Check), "what is looked into before sending"),
    Entry("max_bytes", or_word("0", 0, SIZE), "the largest file that is sent; 0 = no limit"),
    Entry("max_lines", whole(0, 999_999_999), "the most lines that are sent; 0 = no limit"),
    Entry("api", Section(API, _BASE_URL), "keys of api that differ for this inbox"),
)
UPLOADS = (
    Entry("concurrency", whole(1, 64), "uploads at the same time, for each host and key"),
    Entry("first_retry", duration("10ms", "1d"), "the first pause after a failure"),
    Entry("longest_retry", duration("10ms", "1d"), "the longest pause after failures"),
    Entry(
        "give_up_after",
        or_word("never", None, duration("1ms", "3650d")),
        "how long a file may wait for retries, in all, before it is failed",
    ),
    Entry(
        "poison_after",
        whole(0, 1_000_000),
        "failures that can be the file's own after which it is failed; 0 = never",
    ),
    Entry("max_rate", or_word("unlimited", None, RATE), "bytes per second over all uploads"),
    Entry("on_unknown", enum(OnUnknown), "what becomes of a lost answer that can't be cleared up"),
    Entry("reconcile_window", duration("0s", "1d"), "how long a lost upload may take to appear in the listing"),
    Entry("resend_limit", whole(0, 1000), "how often a lost upload is sent again without a listing"),
    Entry("remote_name", enum(RemoteName), "the name under which a file is sent"),
)
LOG = (
    Entry("level", choice(("debug", "info", "warning", "error")), "the least important level that is logged"),
    Entry("format", choice(("json", "console", "auto")), "how events look"),
    Entry("file", MAYBE_PATH, "where events go; default: standard output"),
)
TOP = (
    Entry("api", Section(API, _BASE_URL), "the service"),
    Entry("inboxes", Section(INBOX, "path: /srv/sfwatch/inbox", many=True), "the folders"),
    Entry("uploads", Section(UPLOADS, "concurrency: 4"), "how hard the service is worked"),
    Entry("scan_interval", duration("1s", "1d"), "time between full looks at every inbox"),
    Entry("poll_interval", duration("100ms", "1d"), "the same where events can't be trusted"),
    Entry(
        "state_dir",
        MAYBE_PATH,
        "where the journal lies; default: $STATE_DIRECTORY, else /var/lib/sfwatch, else the user's own",
    ),
    Entry("stop_grace", duration("0s", "1d"), "how long uploads may go on after SIGTERM"),
    Entry(
        "status_file",
        MAYBE_PATH,
        "the state in short; default: status.json in $RUNTIME_DIRECTORY, else in state_dir",
    ),
    Entry("history_days", whole(1, 36500), "days for which finished files are remembered"),
    Entry("metrics_file", MAYBE_PATH, "Prometheus text file for node_exporter"),
    Entry("log", Section(LOG, "level: info"), "the log"),
)
