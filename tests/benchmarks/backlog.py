"""Many files waiting behind a held target: memory, processor time, how soon another inbox's file is noticed.

And what a file costs from its first sight to done, as the backlog that it stands in grows.
"""

import os
import random
import signal
import statistics
import time
from pathlib import Path

from benchmarks import lab


def fill(folder: Path, count: int) -> None:
    """Put many small good files into a folder, under names as people give them."""
    content = lab.line(0, 300)
    for number in range(count):
        (folder / f"evaluation-run-{number:06d}.jsonl").write_bytes(content)


def wait_until_settled(it: lab.Daemon, count: int) -> None:
    """Wait until every file has been looked at and found whole."""
    it.await_event("file.settled", count, within_s=60 + count / 200)
    time.sleep(2)


def waiting(folder: Path, to: lab.Receiver, *, count: int, watched_s: float) -> None:
    """Let many wait, and measure."""
    held = {"base_url": to.url, "ca_bundle": str(to.bundle), "key_file": str(folder / "key")}
    with lab.daemon(folder, to, inboxes=2, api=held, log={"level": "debug"}) as it:
        other = folder / "in1" / "inbox"
        before_mb = it.memory_mb()
        fill(it.inbox, count)
        wait_until_settled(it, count)
        print(f"  memory a file: {(it.memory_mb() - before_mb) * 1e6 / count:.0f} bytes now", end="")
        print(f", {(it.memory_mb('VmHWM') - before_mb) * 1e6 / count:.0f} at the peak", flush=True)
        began, used_s = time.monotonic(), it.cpu_s()
        time.sleep(watched_s)
        share = (it.cpu_s() - used_s) / (time.monotonic() - began)
        print(f"  processor time over {watched_s:.0f} s of waiting: {share:.2%} of a core", flush=True)
        took = [noticed_s(it, other, count + number) for number in range(1, 41)]
    print(
        f"  a whole file renamed into another inbox is noticed after {lab.middle(took, 3)} s, {len(took)} times"
    )


def noticed_s(it: lab.Daemon, inbox: Path, nth: int) -> float:
    """How long it takes until a file is seen and known to be whole, at no particular moment."""
    time.sleep(random.uniform(0.2, 1.5))
    path = inbox / f"{nth}.jsonl.part"
    path.write_bytes(lab.line(0, 300))
    began = time.monotonic()
    path.rename(path.with_suffix(""))
    return it.await_event("file.settled", nth) - began


def cost_ms(folder: Path, to: lab.Receiver, count: int) -> float:
    """What each of so many costs from first sight to done, in milliseconds of processor time."""
    with lab.daemon(folder, to, uploads={"concurrency": 8}) as it:
        before_s = it.cpu_s()
        os.kill(it.pid, signal.SIGSTOP)  # all of them wait when the first is taken
        fill(it.inbox, count)
        os.kill(it.pid, signal.SIGCONT)
        it.await_event("file.done", count, within_s=60 + count / 10)
        return (it.cpu_s() - before_s) * 1000 / count


def main() -> None:
    """Measure."""
    options = lab.arguments(__doc__, count=100_000, watched=120.0)
    with lab.scratch(options.folder) as folder, lab.receiver(folder) as to:
        lab.title(f"{options.count} files wait behind a held target")
        (folder / "waiting").mkdir()
        waiting(folder / "waiting", to, count=options.count, watched_s=options.watched)
        lab.title("what a file costs as the backlog grows, from its first sight to done")
        costs = {}
        count = 100
        while count <= options.count:
            runs = []
            for number in range(3 if count <= 1000 else 1):
                (made := folder / f"cost-{count}-{number}").mkdir()
                runs.append(cost_ms(made, to, count))
            costs[count] = statistics.median(runs)
            print(f"  {count:>7} files: {costs[count]:.2f} ms of processor time each", flush=True)
            count *= 10
        print(f"  from least to greatest: {max(costs.values()) / min(costs.values()):.2f}")


if __name__ == "__main__":
    main()
