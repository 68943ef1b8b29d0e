"""The matrix at work: all writers beside each other, each with an inbox of its own, and a daemon for each role.

The daemons are processes, of root and of a user who has CAP_LEASE, as systemd grants it, or no right at all.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from loop import KEY
from program import Program, started
from sshd import ssh_server
from writers.scenes import SCENES, Scene
from writers.stage import STALL_S, Help, Role, Stage

from sfwatch import files
from sfwatch.standin import StandIn

DAEMON, NOBODY = 1, 65534
"""Users that every Debian has."""

ROLES = (
    (
        Role("root"),
        Role("CAP_LEASE", daemon=DAEMON, writer=NOBODY),
        Role("no right", daemon=DAEMON, writer=NOBODY, may_ask=False),
    )
    if os.geteuid() == 0
    else (Role("self"),)
)

PATIENCE_S = 60.0


def as_user(role: Role, layers: Path) -> list[str]:
    """What goes before a command that another user is to run, with CAP_LEASE or without any right.

    Where that user may not enter the folders of Python or of the tests, he sees them through an overlay, in a
    mount namespace of his own, in which he may.
    """
    if role.daemon is None:
        return []
    script = "".join(
        f"mkdir -p {layers}/{n}/upper {layers}/{n}/work && mount -t overlay -o"
        f" lowerdir={top},upperdir={layers}/{n}/upper,workdir={layers}/{n}/work overlay {top} && chmod o+x"
        f" {' '.join(map(str, below))} && "
        for n, (top, below) in enumerate(_closed_folders().items())
    )
    rights = "-all,+lease" if role.may_ask else "-all"
    become = f"setpriv --reuid={role.daemon} --regid={role.writer} --clear-groups"
    script += f'exec {become} --inh-caps={rights} --ambient-caps={rights} "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


def _closed_folders() -> dict[Path, list[Path]]:
    """The folders on the way to what is run that not everybody may enter, by the topmost of them."""
    closed: dict[Path, list[Path]] = {}
    for place in (Path(sys.prefix), Path(sys.base_prefix), Path(__file__)):
        way = [folder for folder in reversed(place.parents) if not folder.stat().st_mode & 0o001]
        if way:
            closed[way[0]] = sorted({*closed.get(way[0], []), *way})
    return closed


@dataclass
class Result:
    """What became of one writer's lines."""

    scene: Scene
    role: Role
    stage: Stage
    uploads: list[bytes] = field(default_factory=list)
    done: list[bytes] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    error: BaseException | None = None

    def said(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]


@contextlib.contextmanager
def two_filesystems() -> Iterator[tuple[Path, Path]]:
    """A folder that everybody may enter on a filesystem that the kernel's word reaches, and one on another."""
    places = [Path("/var/tmp"), Path("/dev/shm")]
    if files.mount_of(places[0]).fs_type not in files.LOCAL_FILESYSTEMS:
        places.reverse()
    with contextlib.ExitStack() as stack:
        made = [Path(tempfile.mkdtemp(prefix="sfwatch-writers-", dir=place)) for place in places]
        for folder in made:
            stack.callback(shutil.rmtree, folder)
            folder.chmod(0o755)
        yield made[0], made[1]


@contextlib.contextmanager
def stalling_web_server() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A server that stops in the middle of each file for a while."""
    pages: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = pages[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Last-Modified", "Mon, 01 Jan 2001 00:00:00 GMT")
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            time.sleep(STALL_S)
            self.wfile.write(data[len(data) // 2 :])

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", pages
        finally:
            server.shutdown()
            thread.join()


def _key_of(help_: Path, stage: Path, writer: int | None) -> Path:
    """A copy of the user's key that belongs to the writer: ssh takes no other."""
    key = stage / "key"
    shutil.copy(help_ / "user", key)
    key.chmod(0o600)
    if writer is not None:
        os.chown(key, writer, writer)
    return key


class Matrix:
    """All writers and their daemons, below two folders on two filesystems."""

    def __init__(self, home: Path, elsewhere: Path, service: StandIn) -> None:
        self.home = home
        self.elsewhere = elsewhere
        self.service = service
        self.programs: dict[str, Program] = {}

    def run(self) -> dict[tuple[str, str], Result]:
        """Let all write, wait until nothing is left to be taken, and collect what became of it."""
        with contextlib.ExitStack() as stack:
            url, pages = stack.enter_context(stalling_web_server())
            port, options = stack.enter_context(ssh_server(self.home / "ssh"))
            results = [
                self._prepare(role, name, Help(url, pages, options, port)) for role in ROLES for name in SCENES
            ]
            for role in ROLES:
                self.programs[role.name] = stack.enter_context(self._daemon(role))
            with ThreadPoolExecutor(len(results)) as pool:
                list(pool.map(self._perform, results))
            for program in self.programs.values():
                assert program.end() == 0
                assert program.stderr.read_text() == ""
        self._collect(results)
        return {(result.role.name, result.scene.write.__name__): result for result in results}

    def _prepare(self, role: Role, name: str, help_: Help) -> Result:
        root, elsewhere = (base / role.name.replace(" ", "_") / name for base in (self.home, self.elsewhere))
        stage = Stage(f"{role.name.replace(' ', '_')}/{name}", role, root, elsewhere, help_)
        for folder in (stage.inbox, stage.aside, root / "done", root / "failed", elsewhere):
            folder.mkdir(parents=True)
            folder.chmod(0o755)
        if role.writer is not None and role.daemon is not None:
            for folder in (stage.aside, elsewhere):
                os.chown(folder, role.writer, role.writer)
            for folder in (stage.inbox, root / "done", root / "failed"):
                os.chown(folder, role.daemon, role.writer)
            stage.inbox.chmod(0o3770)  # as the README has it
        key = _key_of(self.home / "ssh", stage.aside, role.writer)
        stage.help = Help(help_.url, help_.pages, [*help_.ssh, "-i", key], help_.ssh_port)
        return Result(SCENES[name], role, stage)

    @contextlib.contextmanager
    def _daemon(self, role: Role) -> Iterator[Program]:
        top = self.home / role.name.replace(" ", "_")
        inboxes = [
            {"path": str(top / name / "inbox"), "name": name, "settle": f"{scene.settle_s}s"}
            | {"recursive": scene.recursive}
            for name, scene in SCENES.items()
        ]
        (top / "state").mkdir()
        (top / "key").write_text(KEY)
        (top / "key").chmod(0o600)
        if role.daemon is not None:
            os.chown(top / "state", role.daemon, -1)
            os.chown(top / "key", role.daemon, -1)
        api = {"base_url": self.service.base_url, "key_file": str(top / "key")}
        settings = {"api": api, "inboxes": inboxes, "state_dir": str(top / "state"), "log": {"level": "debug"}}
        (top / "sfwatch.yaml").write_text(json.dumps(settings))
        command = [str(Path(sys.executable).with_name("sfwatch")), "run", "-c", str(top / "sfwatch.yaml")]
        with started([*as_user(role, top / "layers"), *command], top) as program:
            yield program

    def _perform(self, result: Result) -> None:
        stage = result.stage
        try:
            with stage.acting():
                result.scene.write(stage)
            stage.ended_at = time.time()
            self._until_taken(stage)
        except BaseException as error:  # noqa: BLE001 (it is raised again by the test of this writer)
            result.error = error
        result.left = _lying_in(stage.inbox)

    def _until_taken(self, stage: Stage) -> None:
        """Wait until nothing is left in the inbox, or for so long that it never will be."""
        end = time.monotonic() + PATIENCE_S
        process = self.programs[stage.role.name].process
        while _lying_in(stage.inbox) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.1)

    def _collect(self, results: list[Result]) -> None:
        uploads: dict[str, list[bytes]] = defaultdict(list)
        assert self.service.keep is not None
        for stored in self.service.stored:
            data = (self.service.keep / stored.sha256).read_bytes()
            uploads[json.loads(data.partition(b"\n")[0])["custom_id"].rpartition("/")[0]].append(data)
        events = {name: program.said() for name, program in self.programs.items()}
        for result in results:
            root = result.stage.root
            result.uploads = uploads.pop(result.stage.tag, [])
            result.done = [path.read_bytes() for path in sorted(root.glob("done/**/*.jsonl"))]
            result.failed = sorted(path.name for path in root.glob("failed/**/*.jsonl"))
            result.events = [e for e in events[result.role.name] if e.get("inbox") == root.name]
        assert not uploads, "something was uploaded that nobody wrote"


def _lying_in(inbox: Path) -> list[str]:
    """All that lies in an inbox, what is claimed included; folders may vanish meanwhile.

    Whose a claims folder is stays beside it.
    """
    there = (Path(folder, name) for folder, _, names in os.walk(inbox) for name in names)
    return sorted(str(path) for path in there if path.parent.name != ".sfwatch" or path.suffix != ".owner")
