"""What an idle daemon costs, with one inbox and with a hundred; and how fast commands start."""

import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import lab

SFWATCH = str(Path(sys.executable).with_name("sfwatch"))


def idle(folder: Path, to: lab.Receiver, *, inboxes: int, watched_s: float) -> float:
    """Memory and processor time of an idle daemon; return how long it took to be ready."""
    with lab.daemon(folder, to, inboxes=inboxes) as it:
        time.sleep(2)
        before, began = it.cpu_s(), time.monotonic()
        time.sleep(watched_s)
        share = (it.cpu_s() - before) / (time.monotonic() - began)
        print(
            f"  {inboxes:>3} inboxes: {it.memory_mb():.1f} MB, {share:.3%} of a core over {watched_s:.0f} s,"
            f" {it.threads()} threads, ready after {it.started_s * 1000:.0f} ms",
            flush=True,
        )
        return it.started_s


def ready_ms(folder: Path, to: lab.Receiver, used: list[float]) -> float:
    """From the start of the process to `daemon.ready`; its processor time is noted."""
    with lab.daemon(folder, to) as it:
        used.append(it.cpu_s() * 1000)
        return it.started_s * 1000


def command_ms(*command: str, used: list[float] | None = None) -> float:
    """How long a command takes that does next to nothing; its processor time is noted."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = lab.seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if used is not None:
        used.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000)
    return took * 1000


def main() -> None:
    """Measure."""
    options = lab.arguments(__doc__, watched=60.0, rounds=10)
    with lab.scratch(options.folder) as folder, lab.receiver(folder) as to:
        lab.title("start-up")
        bare = lambda: command_ms(sys.executable, "-c", "pass")  # noqa: E731
        used: list[float] = []
        helping = {"sfwatch --help": lambda: command_ms(SFWATCH, "--help", used=used), "python -c pass": bare}
        lab.tell_ratios("from its start to its end", lab.rounds(options.rounds, helping), "ms")
        print(f"  processor time of sfwatch --help: {lab.middle(used, 0)} ms")
        used.clear()
        running = {
            "sfwatch run to daemon.ready": lambda: ready_ms(folder / "ready", to, used),
            "python -c pass": bare,
        }
        lab.tell_ratios(
            "one inbox; from its start to the line in the log", lab.rounds(options.rounds, running), "ms"
        )
        print(f"  processor time of sfwatch run until then: {lab.middle(used, 0)} ms")
        lab.title("an idle daemon")
        for inboxes in (1, 100):
            idle(folder / f"idle-{inboxes}", to, inboxes=inboxes, watched_s=options.watched)


if __name__ == "__main__":
    main()
