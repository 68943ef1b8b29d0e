"""One file of 1 GB over TLS: the upload alone and the whole way, against `curl -F` and the vendor's example.

*Alone* is `Client.send` with its digest, as the daemon calls it. *Drop to done* is the running daemon: settled,
checked, hashed, sent, recorded, moved. Its peak memory is counted over what the daemon had before the file.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import lab

from sfwatch.settings import Api
from sfwatch.upload import Client

VENDOR = """
import sys, requests
url, bundle, key, path = sys.argv[1:]
answer = requests.post(f"{url}/files", headers={"Authorization": f"Bearer {key}"}, verify=bundle,
                       files={"file": open(path, "rb")}, data={"purpose": "batch"})
answer.raise_for_status()
"""
"""The example of the service's guide, with an address and a certificate."""


def alone(to: lab.Receiver, path: Path) -> float:
    """Send the file with the daemon's own client."""
    client = Client(Api(base_url=to.url, ca_bundle=to.bundle), connections=1, user_agent="benchmark")
    fd = os.open(path, os.O_RDONLY)

    def send() -> None:
        attempt = client.send(fd, path.stat().st_size, remote_name="big.jsonl", purpose="batch", key=lab.KEY)
        assert attempt.answer, attempt
        assert attempt.sha256

    took = lab.seconds(send)
    client.close()
    os.close(fd)
    return took


def dropped(it: lab.Daemon, path: Path) -> float:
    """Move the file into the inbox, wait until it is done, and bring it back."""
    before = it.counts.get("file.done", 0)
    took = lab.seconds(lambda: (path.rename(it.inbox / path.name), it.await_event("file.done", before + 1)))
    (it.done / path.name).rename(path)
    it.empty_done()
    return took


def peak_mb(command: list[str]) -> float:
    """Peak memory of a command."""
    script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2); "
    script += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    said = subprocess.run(
        [sys.executable, "-c", script, *command], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return int(said.stdout) * 1024 / 1e6


def main() -> None:
    """Measure."""
    options = lab.arguments(__doc__, lines=5000, size=200_000, rounds=3, text="english")
    with lab.scratch(options.folder) as folder, lab.receiver(folder) as to:
        text = {"english": lab.ENGLISH, "chinese": lab.CHINESE}[options.text]
        big = lab.write_requests(folder / "big.jsonl", lines=options.lines, line_size=options.size, text=text)
        size_mb = big.stat().st_size / 1e6
        curl = lab.run(to.curl_form(big))
        what = f"{options.lines} lines of {options.size} bytes ({options.text}), {size_mb:.0f} MB, TLS 1.3"
        lab.title(f"upload alone: {what}")
        contenders = {"sfwatch's client": lambda: alone(to, big), "curl -F": lambda: lab.seconds(curl)}
        lab.tell_ratios("from the call to the answer, digest included", lab.rounds(options.rounds, contenders))
        vendor = [sys.executable, "-c", VENDOR, to.url, str(to.bundle), lab.KEY, str(big)]
        limits = {"max_bytes": "2GB", "max_lines": 1_000_000}
        with lab.daemon(folder / "daemon", to, inbox=limits) as it:
            idle_mb = it.memory_mb()
            lab.title(f"drop to done: {what}")
            found = lab.rounds(
                options.rounds,
                {
                    "sfwatch run": lambda: dropped(it, big),
                    "curl -F": lambda: lab.seconds(curl),
                    "requests, files=": lambda: lab.seconds(lab.run(vendor)),
                },
                it,
            )
            lab.tell_ratios("from the rename into the inbox to file.done", found)
            lab.title(f"peak memory: {what}")
            peak = it.memory_mb("VmHWM")
            print(f"  sfwatch run: {idle_mb:.1f} MB idle, {peak:.1f} at the peak: +{peak - idle_mb:.1f} MB")
        print(f"  curl -F: {peak_mb(to.curl_form(big)):.1f} MB; requests, files=: {peak_mb(vendor):.0f} MB")
        shutil.rmtree(folder / "daemon")


if __name__ == "__main__":
    main()
