"""All benchmarks one after the other, about twelve minutes, and on what machine they ran."""

import os
import platform
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALL = ("upload", "parallel", "small", "check", "idle", "latency", "backlog", "soak")


def first_words(command: list[str], words: int) -> str:
    """The first words of what a command says of itself."""
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return " ".join(said.split()[:words])


def machine() -> str:
    """The machine in one line: processors, memory, disk, and the programs that took part."""
    said = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    model = next(
        (value.strip() for name, value in said.items() if name.strip() == "model name"), platform.machine()
    )
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    disk = first_words(["findmnt", "-no", "FSTYPE", "-T", tempfile.gettempdir()], 1)
    programs = (
        f"Python {platform.python_version()}, {ssl.OPENSSL_VERSION}, {first_words(['curl', '--version'], 2)}"
    )
    return f"{os.cpu_count()} x {model}, {memory_gb:.0f} GB, {disk}; Linux {platform.release()}; {programs}"


def main() -> None:
    """Run them all; the first that fails ends it."""
    began = time.monotonic()
    for name in ALL:
        print(f"\n=== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"\nmeasured on: {machine()}")
    print(f"in {(time.monotonic() - began) / 60:.0f} minutes; load over the last 1, 5 and 15 minutes: {load}")


if __name__ == "__main__":
    main()
