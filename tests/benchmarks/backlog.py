"""Many files waiting: memory, processor time, how soon another's file is noticed, and what the others cost.

They wait in an inbox of their own, behind a target that is held for want of a key; then again in the very inbox
that others are delivered from, for markers that never come (fewer: each of these is looked at again and again).
One daemon each sees its backlog grow tenfold at a time, and delivers some files at each step.
"""

import random
import time
from pathlib import Path

from benchmarks import lab

MARKER = ".ok"
STEPS = (100, 1_000, 10_000, 100_000)
AT_ONCE = 25


def fill(folder: Path, count: int) -> None:
    """Let small good files wait in a folder, so many in all, under names as people give them."""
    content = lab.line(0, 300)
    for number in range(sum(1 for _ in folder.iterdir()), count):
        (folder / f"evaluation-run-{number:06d}.jsonl").write_bytes(content)


def await_quiet(it: lab.Daemon, within_s: float = 300.0) -> None:
    """Wait until the daemon has looked at all there is and does next to nothing, for two seconds on end."""
    until, quiet = time.monotonic() + within_s, 0
    while quiet < 2:
        used_s = it.cpu_s()
        time.sleep(1)
        quiet = quiet + 1 if it.cpu_s() - used_s < 0.05 else 0
        if time.monotonic() > until:
            raise SystemExit(f"the daemon is still busy after {within_s:g} s")


def cost(it: lab.Daemon, work: Path, count: int, marker: str | None) -> tuple[float, float]:
    """Deliver so many, some at once; return the processor time and the time on the wall of each, in ms."""
    used_s, took_s = it.cpu_s(), 0.0
    for _ in range(0, count, AT_ONCE):
        done = it.counts.get("file.done", 0)
        paths = [work / f"delivered-{done + number:06d}.jsonl" for number in range(AT_ONCE)]
        for path in paths:
            path.write_bytes(lab.line(0, 300))
        began = time.monotonic()
        for path in paths:
            path.rename(it.inbox / path.name)
            if marker:
                (it.inbox / (path.name + marker)).touch()
        took_s += it.await_event("file.done", done + AT_ONCE) - began
    delivered = -(-count // AT_ONCE) * AT_ONCE
    return (it.cpu_s() - used_s) * 1000 / delivered, took_s * 1000 / delivered


def growing(it: lab.Daemon, backlog: Path, work: Path, most: int, files: int, marker: str | None) -> None:
    """Let the backlog grow, and see what others cost meanwhile."""
    costs = []
    for count in (step for step in STEPS if step <= most):
        fill(backlog, count)
        await_quiet(it)
        cpu_ms, wall_ms = cost(it, work, files, marker)
        costs.append((cpu_ms, wall_ms))
        print(f"  {count:>7} wait: {cpu_ms:.2f} ms of processor time, {wall_ms:.2f} ms", flush=True)
    for name, values in zip(("processor time", "time"), zip(*costs, strict=True), strict=True):
        print(f"  {name}, from least to most: {max(values) / min(values):.2f}")


def waiting(it: lab.Daemon, before_mb: float, count: int, watched_s: float) -> None:
    """Measure what so many cost that do nothing but wait, and how soon a file elsewhere is noticed."""
    print(f"  memory a file: {(it.memory_mb() - before_mb) * 1e6 / count:.0f} bytes now", end="")
    print(f", {(it.memory_mb('VmHWM') - before_mb) * 1e6 / count:.0f} at the peak", flush=True)
    began, used_s = time.monotonic(), it.cpu_s()
    time.sleep(watched_s)
    share = (it.cpu_s() - used_s) / (time.monotonic() - began)
    print(f"  processor time over {watched_s:.0f} s of waiting: {share:.2%} of a core", flush=True)
    it.await_event("file.settled", 0)
    settled = it.counts["file.settled"]
    took = [noticed_s(it, settled + number) for number in range(1, 41)]
    print(f"  a whole file renamed into the other inbox is noticed after {lab.middle(took, 3)} s, 40 times")


def noticed_s(it: lab.Daemon, nth: int) -> float:
    """How long it takes until a file is seen and known to be whole, at no particular moment."""
    time.sleep(random.uniform(0.2, 0.7))
    path = it.inbox / f"noticed-{nth}.jsonl.part"
    path.write_bytes(lab.line(0, 300))
    began = time.monotonic()
    path.rename(path.with_suffix(""))
    return it.await_event("file.settled", nth) - began


def main() -> None:
    """Measure."""
    options = lab.arguments(__doc__, count=100_000, marked=10_000, files=300, watched=20.0)
    with lab.scratch(options.folder) as folder, lab.receiver(folder) as to:
        lab.title(
            f"what a file costs while others wait in another inbox, behind a held target ({options.files})"
        )
        held = {"api": {"key_file": str(folder / "no-such-key")}}
        (work := folder / "work").mkdir()
        with lab.daemon(folder / "held", to, inboxes=2, others=held, log={"level": "debug"}) as it:
            cost(it, work, options.files, None)  # warms up
            before_mb = it.memory_mb()
            growing(it, it.folder / "in1" / "inbox", work, options.count, options.files, None)
            lab.title(f"{options.count} files wait behind a held target")
            waiting(it, before_mb, options.count, options.watched)
        lab.title(f"what a file costs while others wait in the same inbox, for markers ({options.files})")
        with lab.daemon(folder / "marked", to, inbox={"settle_marker": MARKER}) as it:
            cost(it, work, options.files, MARKER)
            growing(it, it.inbox, work, options.marked, options.files, MARKER)


if __name__ == "__main__":
    main()
