"""50,000 files through one process: memory, descriptors and threads stay flat.

The files are small and come in waves, as through a day; some are refused for faults of their own. Answers take
a moment, so that all connections are opened at the start, one for each upload at once. What counts is each
later measure against the one after the files that warm up. Threads may still be missing there, since the two
workers to spare begin when nobody else is free, which may be late; so their bound is printed as well.
"""

import sys
from pathlib import Path

from benchmarks import lab

from sfwatch.app import SPARE_WORKERS
from sfwatch.upstream import FILING

FIXED_THREADS = 3
"""The loop, the signals, the events of the folders."""


def wave(it: lab.Daemon, folder: Path, begun: int, count: int) -> None:
    """Drop some files, every fiftieth of them faulty, and wait until all are done."""
    done, failed = it.counts.get("file.done", 0), it.counts.get("file.failed", 0)
    faulty = 0
    for number in range(begun, begun + count):
        path = folder / f"soak-{number:06d}.jsonl"
        bad = number % 50 == 0
        faulty += bad
        path.write_bytes(lab.line(number, 700).replace(b'"user"', b'"nobody"' if bad else b'"user"'))
        path.rename(it.inbox / path.name)
    it.await_event("file.done", done + count - faulty)
    it.await_event("file.failed", failed + faulty)
    for outcome in (it.done, it.done.with_name("failed")):
        for path in outcome.iterdir():
            path.unlink()


def main() -> None:
    """Measure."""
    options = lab.arguments(__doc__, count=50_000, warm=2_000, wave=500, concurrency=16)
    with lab.scratch(options.folder) as folder, lab.receiver(folder, delay_ms=20) as to:
        work = folder / "work"
        work.mkdir()
        lab.title(f"soak: {options.count} files in waves of {options.wave}, after {options.warm} to warm up")
        measured: list[tuple[float, int, int]] = []
        end, step = options.warm + options.count, max(options.wave, options.count // 10)
        with lab.daemon(folder / "daemon", to, uploads={"concurrency": options.concurrency}) as it:
            for begun in range(0, end, options.wave):
                wave(it, work, begun, min(options.wave, end - begun))
                files = min(begun + options.wave, end)
                if files < options.warm:
                    continue
                measured.append((it.memory_mb(), it.descriptors(), it.threads()))
                if (files - options.warm) % step < options.wave:
                    memory, descriptors, threads = measured[-1]
                    print(f"  {files:>6} files: {memory:.1f} MB, {descriptors} descriptors, {threads} threads")
                    sys.stdout.flush()
        for name, first, *later in zip(("memory", "descriptors", "threads"), *measured, strict=True):
            print(f"  {name}: {first:g} when warm, later at most {max(later):g} ({max(later) / first:.3f})")
        most = FIXED_THREADS + FILING * options.concurrency + SPARE_WORKERS
        print(f"  threads, if all workers have begun: {most}")


if __name__ == "__main__":
    main()
