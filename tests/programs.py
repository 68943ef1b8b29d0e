"""Programs that a test needs and the machine may lack: they are installed from Debian, once, by that test.

As a script it installs what all tests need, in one go; without root or apt it says what is missing.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PACKAGES = {
    "fallocate": "util-linux",
    "mkfs.btrfs": "btrfs-progs",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "nsenter": "util-linux",
    "promtool": "prometheus",
    "scp": "openssh-client",
    "sftp": "openssh-client",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "systemctl": "systemd",
    "/usr/bin/python3": "python3",
}
"""Where a command comes from, if its package is not called like it."""

ALL = (
    "bindfs",
    "curl",
    "faketime",
    "logrotate",
    "nginx",
    "openssl",
    "rsync",
    "sshfs",
    "strace",
    "tar",
    "vim",
    "wget",
    *PACKAGES,
)


def need(*commands: str) -> None:
    """Install what is missing; without root or apt the test is skipped, and says what it lacks."""
    lacking = install(*commands)
    if lacking:
        pytest.skip(f"it needs {', '.join(lacking)}, and can't install that: no root, or no apt-get")


def install(*commands: str) -> list[str]:
    """Install what is missing, where that can be done; return what is missing all the same."""
    if not _missing(commands) or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return _missing(commands)
    with _alone():
        packages = sorted({PACKAGES.get(command, command) for command in _missing(commands)})
        if packages:
            _install(packages)
    assert not _missing(commands)
    return []


def path_of(command: str) -> str:
    """Return where a command lies; those of the administrator are not in everybody's PATH."""
    found = shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert found is not None, command
    return found


def _missing(commands: tuple[str, ...]) -> list[str]:
    return [c for c in commands if shutil.which(c, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]


@contextmanager
def _alone() -> Iterator[None]:
    """Two runs on one machine install one after the other."""
    with (Path(tempfile.gettempdir()) / "sfwatch-tests-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install(packages: list[str]) -> None:
    """Without starting any service: RUNLEVEL=1 is what invoke-rc.d looks at."""
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, capture_output=True, env=quiet)
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    subprocess.run(install, check=True, capture_output=True, env=quiet)


if __name__ == "__main__":
    lacking = install(*ALL)
    if lacking:
        sys.stderr.write(f"Tests that need {', '.join(lacking)} are skipped: no root, or no apt-get.\n")
