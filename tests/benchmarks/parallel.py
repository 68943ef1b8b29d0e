"""Eight files of 100 MB at once, four connections, against `curl --parallel --parallel-max 4`."""

from pathlib import Path

from benchmarks import lab


def dropped(it: lab.Daemon, paths: list[Path]) -> float:
    """Move all into the inbox, wait until all are done, and bring them back."""
    wanted = it.counts.get("file.done", 0) + len(paths)

    def work() -> None:
        for path in paths:
            path.rename(it.inbox / path.name)
        it.await_event("file.done", wanted)

    took = lab.seconds(work)
    for path in paths:
        (it.done / path.name).rename(path)
    it.empty_done()
    return took


def main() -> None:
    """Measure."""
    options = lab.arguments(__doc__, files=8, lines=500, size=200_000, concurrency=4, rounds=3)
    with lab.scratch(options.folder) as folder, lab.receiver(folder) as to:
        work = folder / "work"
        work.mkdir()
        paths = [
            lab.write_requests(work / f"part-{number}.jsonl", lines=options.lines, line_size=options.size)
            for number in range(options.files)
        ]
        size_mb = paths[0].stat().st_size / 1e6
        lab.title(f"{options.files} files of {size_mb:.0f} MB, concurrency {options.concurrency}, TLS 1.3")
        curl = lab.run(to.curl_parallel(paths, options.concurrency, folder / "curl.conf"))
        with lab.daemon(folder / "daemon", to, uploads={"concurrency": options.concurrency}) as it:
            found = lab.rounds(
                options.rounds,
                {
                    "sfwatch run": lambda: dropped(it, paths),
                    f"curl --parallel-max {options.concurrency}": lambda: lab.seconds(curl),
                },
                it,
            )
        lab.tell_ratios("from the first rename into the inbox to the last file.done", found)


if __name__ == "__main__":
    main()
