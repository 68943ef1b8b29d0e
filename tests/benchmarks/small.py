"""Small files: 2,000 of 10 KB with slow and with quick answers, against `curl --parallel` and a shell loop.

All promises are kept for each: journal, claim, check, digest, sidecar, move, each durable before the next.
"""

import os
import subprocess
import time
from pathlib import Path

from benchmarks import lab


def make(folder: Path, count: int, size: int) -> list[Path]:
    """Make the files, each with three lines."""
    folder.mkdir()
    paths = []
    for number in range(count):
        path = folder / f"small-{number:05d}.jsonl"
        path.write_bytes(b"".join(lab.line(number * 3 + n, size // 3) for n in range(3)))
        paths.append(path)
    os.sync()
    return paths


CPU_MS: list[float] = []


def drop(it: lab.Daemon, paths: list[Path]) -> float:
    """Move all into the inbox, and wait until all are done; then bring them back."""
    before = it.counts.get("file.done", 0)
    began, used_s = time.monotonic(), it.cpu_s()
    for path in paths:
        path.rename(it.inbox / path.name)
    ended = it.await_event("file.done", before + len(paths))
    CPU_MS.append((it.cpu_s() - used_s) * 1000 / len(paths))
    for path in paths:
        (it.done / path.name).rename(path)
    it.empty_done()
    os.sync()
    return ended - began


LOOP = """
inotifywait -q -m -e close_write,moved_to --format %f "$1" | while read -r name; do
  curl -sS --fail --cacert "$3" -H "Authorization: Bearer $4" -o /dev/null -F purpose=batch \
    -F "file=@$1/$name" "$2/files" && mv "$1/$name" "$5/" && echo "$name"
done
"""


def loop(folder: Path, to: lab.Receiver, paths: list[Path]) -> float:
    """Let `inotifywait` and `curl` do it, one process a file; it keeps no promise."""
    inbox, done = folder / "loop-inbox", folder / "loop-done"
    inbox.mkdir(exist_ok=True)
    done.mkdir(exist_ok=True)
    command = ["setsid", "sh", "-c", LOOP, "loop", str(inbox), to.url, str(to.bundle), lab.KEY, str(done)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        time.sleep(0.5)  # nothing tells when inotifywait watches
        began = time.monotonic()
        for path in paths:
            path.rename(inbox / path.name)
        assert process.stdout
        for _ in paths:
            process.stdout.readline()
        ended = time.monotonic()
        os.killpg(process.pid, 15)
    for path in paths:
        (done / path.name).rename(path)
    return ended - began


def main() -> None:
    """Measure."""
    options = lab.arguments(__doc__, count=2000, size=10_000, concurrency=16, rounds=3, loop=200)
    lab.need("inotifywait", "inotify-tools")
    with lab.scratch(options.folder) as folder:
        paths = make(folder / "work", options.count, options.size)
        uploads = {"concurrency": options.concurrency}
        what = f"{options.count} files of {options.size} bytes, concurrency {options.concurrency}"
        lab.title(f"{what}, answers after 50 ms")
        with lab.receiver(folder, delay_ms=50) as to, lab.daemon(folder / "slow", to, uploads=uploads) as it:
            drop(it, paths)
            rates = [options.count / drop(it, paths) for _ in range(options.rounds)]
        best = options.concurrency / 0.05
        print(f"  {lab.middle(rates, 0)} files/s, the most being {best:.0f}")
        print(f"  share: {lab.middle([rate / best for rate in rates])}")
        lab.title(f"{what}, answers at once")
        with lab.receiver(folder) as to, lab.daemon(folder / "quick", to, uploads=uploads) as it:
            parallel = lab.run(to.curl_parallel(paths, 8, folder / "curl.conf"))
            many = {"sfwatch": lambda: drop(it, paths), "curl --parallel-max 8": lambda: lab.seconds(parallel)}
            how = "TLS; from the first rename into the inbox to the last file.done"
            lab.tell_ratios(how, lab.rounds(options.rounds, many, it))
            some = paths[: options.loop]
            lab.title(f"{options.loop} of them, against a shell loop")
            few = {"sfwatch": lambda: drop(it, some), "inotifywait + curl": lambda: loop(folder, to, some)}
            lab.tell_ratios(how, lab.rounds(options.rounds, few, it))
        print(f"  processor time of sfwatch: {lab.middle(CPU_MS)} ms a file", flush=True)


if __name__ == "__main__":
    main()
