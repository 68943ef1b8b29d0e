"""50,000 files through one process: memory, descriptors and threads stay flat.

The files are small and come in waves, as through a day; some are refused for faults of their own. What counts
is the second half of the run against its first measure after a tenth of it.
"""

from pathlib import Path

from benchmarks import lab


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
    options = lab.arguments(__doc__, count=50_000, wave=500, concurrency=16)
    with lab.scratch(options.folder) as folder, lab.receiver(folder) as to:
        work = folder / "work"
        work.mkdir()
        lab.title(f"soak: {options.count} files in waves of {options.wave}")
        measured: list[tuple[float, int, int]] = []
        with lab.daemon(folder / "daemon", to, uploads={"concurrency": options.concurrency}) as it:
            for begun in range(0, options.count, options.wave):
                wave(it, work, begun, min(options.wave, options.count - begun))
                measured.append((it.memory_mb(), it.descriptors(), it.threads()))
                if len(measured) % max(1, options.count // options.wave // 10) == 0:
                    memory, descriptors, threads = measured[-1]
                    files = begun + options.wave
                    print(
                        f"  {files:>6} files: {memory:.1f} MB, {descriptors} descriptors, {threads} threads",
                        flush=True,
                    )
        base = measured[len(measured) // 10]
        later = measured[len(measured) // 2 :]
        for name, first, last in zip(
            ("memory", "descriptors", "threads"), base, map(max, zip(*later, strict=True)), strict=True
        ):
            print(
                f"  {name}: {first:g} after a tenth, at most {last:g} in the second half ({last / first:.3f})"
            )


if __name__ == "__main__":
    main()
