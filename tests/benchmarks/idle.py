"""What an idle daemon costs, with one inbox and with a hundred; and how fast commands start."""

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


def ready_ms(folder: Path, to: lab.Receiver) -> float:
    """From the start of the process to `daemon.ready`."""
    with lab.daemon(folder, to) as it:
        return it.started_s * 1000


def help_ms(*command: str) -> float:
    """How long a command takes that says only what it can do."""
    return lab.seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)) * 1000


def main() -> None:
    """Measure."""
    options = lab.arguments(__doc__, watched=60.0, rounds=10)
    with lab.scratch(options.folder) as folder, lab.receiver(folder) as to:
        lab.title("start-up")
        found = lab.rounds(
            options.rounds,
            {
                "sfwatch --help": lambda: help_ms(SFWATCH, "--help"),
                "python -c pass": lambda: help_ms(sys.executable, "-c", "pass"),
            },
        )
        lab.tell_ratios("from the start of the process to its end", found, "ms")
        found = lab.rounds(
            options.rounds,
            {
                "sfwatch run to daemon.ready": lambda: ready_ms(folder / "ready", to),
                "python -c pass": lambda: help_ms(sys.executable, "-c", "pass"),
            },
        )
        lab.tell_ratios("one inbox; from the start of the process to the line in the log", found, "ms")
        lab.title("an idle daemon")
        for inboxes in (1, 100):
            idle(folder / f"idle-{inboxes}", to, inboxes=inboxes, watched_s=options.watched)


if __name__ == "__main__":
    main()
