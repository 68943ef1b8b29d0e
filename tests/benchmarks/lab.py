"""What the benchmarks share: a receiver that costs next to nothing, a real daemon, `curl`, and ratios.

Single seconds mean nothing on a machine that others use as well. So each benchmark runs ours and its peers in
turn, several rounds in one go, and prints the ratios of each round's pair: their median, least and greatest.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servers import Authority

KEY = "sk-benchmark-not-a-real-key"
HERE = Path(__file__).parent
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    """The command line of a benchmark: an option for each default, and the folder to work in."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to work; its disk is measured too")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default: {value}")
    return parser.parse_args()


@contextlib.contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """A new folder for all that a benchmark makes, removed at the end."""
    made = Path(tempfile.mkdtemp(prefix="sfwatch-benchmark-", dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def need(command: str, package: str) -> None:
    """Install what a benchmark needs from Debian, if it is missing."""
    if shutil.which(command) is None:
        subprocess.run(["apt-get", "install", "-y", "-qq", package], check=True, stdout=subprocess.DEVNULL)


# --- the other side ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Receiver:
    """A running receiver, and the certificate that it is known by."""

    url: str
    bundle: Path

    def curl(self, *more: str) -> list[str]:
        """Begin a `curl` command line for it."""
        known_by = ["--cacert", str(self.bundle), "-H", f"Authorization: Bearer {KEY}"]
        return ["curl", "-sS", "--fail", *known_by, *more]

    def curl_form(self, path: Path) -> list[str]:
        """Upload one file with `curl -F`."""
        form = ["-o", os.devnull, "-F", "purpose=batch", "-F", f"file=@{path}"]
        return self.curl(*form, f"{self.url}/files")

    def curl_parallel(self, paths: Sequence[Path], most: int, script: Path) -> list[str]:
        """Upload many files with one `curl --parallel` process, with connections kept alive."""
        transfer = 'url="{}/files"\nform="purpose=batch"\nform="file=@{}"\noutput="{}"\n'
        one = [transfer.format(self.url, path, os.devnull) for path in paths]
        each = [f'cacert="{self.bundle}"\nheader="Authorization: Bearer {KEY}"\n{it}' for it in one]
        script.write_text("next\n".join(each))
        return [
            "curl",
            "-sS",
            "--no-progress-meter",
            "--parallel",
            "--parallel-max",
            str(most),
            "-K",
            str(script),
        ]


@contextlib.contextmanager
def receiver(folder: Path, *, delay_ms: int = 0) -> Iterator[Receiver]:
    """Compile and start `receiver.c`."""
    program = folder / "receiver"
    authority = Authority(folder)
    chain, key = authority.issue("IP:127.0.0.1")
    if not program.exists():
        need("gcc", "gcc")
        if not Path("/usr/include/openssl/ssl.h").exists():
            need("no-such-command", "libssl-dev")
        options = ["-O2", "-Wall", "-Werror", "-o", str(program), "-lssl", "-lcrypto", "-lpthread"]
        subprocess.run(["gcc", str(HERE / "receiver.c"), *options], check=True)
    command = [str(program), "0", str(chain), str(key), str(delay_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdin
        yield Receiver(f"https://127.0.0.1:{int(process.stdout.readline())}/v1", authority.certificate)
        process.stdin.close()


# --- our side ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Daemon:
    """A running `sfwatch run`, seen from outside."""

    folder: Path
    process: "subprocess.Popen[bytes]"
    log: Path
    started_s: float
    _read: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def inbox(self) -> Path:
        """The first inbox."""
        return self.folder / "in0" / "inbox"

    @property
    def done(self) -> Path:
        """What was done of the first inbox."""
        return self.folder / "in0" / "done"

    def await_event(self, event: str, count: int, *, within_s: float = 600.0) -> float:
        """Wait until the log has said this so often; return when that was noticed (monotonic)."""
        until = time.monotonic() + within_s
        while self._counted(event) < count:
            if time.monotonic() > until or self.process.poll() is not None:
                raise SystemExit(f"{self._counted(event)} of {count} times {event} after {within_s:g} s")
            time.sleep(0.005)
        return time.monotonic()

    def _counted(self, event: str) -> int:
        with self.log.open("rb") as log:
            log.seek(self._read)
            new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for said in re.findall(rb'"event": "([a-z.]+)"', whole):
            self.counts[said.decode()] = self.counts.get(said.decode(), 0) + 1
        return self.counts.get(event, 0)

    def memory_mb(self, which: str = "VmRSS") -> float:
        """Memory now (VmRSS) or at its peak (VmHWM), in MB of 10^6 bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"{which}:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024 / 1e6

    def cpu_s(self) -> float:
        """Processor time used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * TICK_S

    def descriptors(self) -> int:
        """How many are open."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def threads(self) -> int:
        """How many there are."""
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    def empty_done(self) -> None:
        """Make room for the same names again.

        Nothing is deleted: ext4 makes no new file of what was deleted in the last seconds, and the search for
        another inode would be a sixth of the processor time measured.
        """
        aside = self.folder / f"done-{time.monotonic_ns()}"
        aside.mkdir()
        for path in self.done.iterdir():
            path.rename(aside / path.name)


def configuration(folder: Path, url: str, bundle: Path, *, inboxes: int, **settings: Any) -> Path:
    """Write a configuration for a daemon that works below this folder.

    `inbox` holds settings of each inbox, `others` those of all but the first.
    """
    for number in range(inboxes):
        (folder / f"in{number}" / "inbox").mkdir(parents=True, exist_ok=True)
    inbox, others = settings.pop("inbox", {}), settings.pop("others", {})
    content = {
        "api": {"base_url": url, "ca_bundle": str(bundle)},
        "inboxes": [
            {"path": f"in{number}/inbox", "name": f"in{number}", **inbox, **(others if number else {})}
            for number in range(inboxes)
        ],
        "state_dir": "state",
        **settings,
    }
    path = folder / "sfwatch.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML, too
    return path


@contextlib.contextmanager
def daemon(folder: Path, to: Receiver, *, inboxes: int = 1, **settings: Any) -> Iterator[Daemon]:
    """Run sfwatch against a receiver, from its start to its end."""
    config = configuration(folder, to.url, to.bundle, inboxes=inboxes, **settings)
    log = folder / "log.jsonl"
    command = [str(Path(sys.executable).with_name("sfwatch")), "run", "-c", str(config)]
    environ = {**os.environ, "SILICONFLOW_API_KEY": KEY}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # without compiled modules a start takes far longer
    with log.open("wb") as output:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=output, env=environ)
    it = Daemon(folder, process, log, 0.0)
    try:
        it.started_s = it.await_event("daemon.ready", 1) - began
        yield it
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


# --- files ---------------------------------------------------------------------------------------------------


ENGLISH = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "
CHINESE = "敏捷的棕色狐狸跳过了那只懒狗，而狗一点也不在意。今天天气很好，我们去公园散步吧。"


def line(number: int, size: int, text: str = ENGLISH) -> bytes:
    """One request of so many bytes, as far as there is room for more than what every request has."""
    body = {"model": "deepseek-ai/DeepSeek-V3", "messages": [{"role": "user", "content": ""}], "max_tokens": 99}
    request = {"custom_id": f"request-{number:06d}", "method": "POST", "url": "/v1/chat", "body": body}
    room = max(1, size - len(json.dumps(request)) - 1)
    unit = text.encode()
    content = (unit * (room // len(unit) + 1))[:room].decode(errors="ignore")
    body["messages"] = [{"role": "user", "content": content + "." * (room - len(content.encode()))}]
    return json.dumps(request, ensure_ascii=False).encode() + b"\n"


def write_requests(path: Path, *, lines: int, line_size: int, text: str = ENGLISH) -> Path:
    """Write a batch file, and let the disk have it: nobody's run is to pay for that."""
    with path.open("wb") as file:
        for number in range(lines):
            file.write(line(number, line_size, text))
        file.flush()
        os.fsync(file.fileno())
    return path


# --- measuring and telling -----------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def run(command: Sequence[str]) -> Callable[[], object]:
    """A command to be timed."""
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@dataclass(frozen=True, slots=True)
class Runs:
    """What each contender took in each round: on the wall (or in the unit of its own), and of processors."""

    took: dict[str, list[float]]
    cpu_s: dict[str, list[float]]


def rounds(times: int, contenders: Mapping[str, Callable[[], float]], it: Daemon | None = None) -> Runs:
    """Let each have its turn, round after round, after one round that does not count."""
    for contend in contenders.values():
        contend()
    found = Runs({name: [] for name in contenders}, {name: [] for name in contenders})
    for _ in range(times):
        for name, contend in contenders.items():
            before_s = _cpu_s(it)
            found.took[name].append(contend())
            found.cpu_s[name].append(_cpu_s(it) - before_s)
    return found


def _cpu_s(it: Daemon | None) -> float:
    """Processor time of this process, of the commands that have ended, and of the daemon."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime + (it.cpu_s() if it else 0.0)


def middle(values: Sequence[float], digits: int = 2) -> str:
    """The median, with the least and the greatest."""
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def tell_ratios(what: str, found: Runs, unit: str = "s") -> None:
    """Print the figures, and the first one's ratio to each of the others, round by round.

    Ratios of processor time stand beside those of seconds: who else is on the machine has little part in them.
    """
    kinds = {unit: found.took, **({"s of processors": found.cpu_s} if unit == "s" else {})}
    for name in found.took:
        said = ", ".join(f"{middle(values[name])} {kind}" for kind, values in kinds.items())
        print(f"  {name:<28} {said}")
    for kind, values in kinds.items():
        (ours, our_values), *peers = values.items()
        for name, theirs in peers:
            ratios = [mine / other for mine, other in zip(our_values, theirs, strict=True)]
            print(f"  {ours} / {name} ({kind}): {middle(ratios)}")
    times = len(next(iter(found.took.values())))
    print(f"  measured: {what}; {times} rounds in turn", flush=True)


def title(text: str) -> None:
    """Say what comes, and on what machine."""
    print(f"\n{text}")
    load = os.getloadavg()[0]
    print(f"  {os.cpu_count()} cores, Python {platform.python_version()}, load before {load:.1f}", flush=True)
