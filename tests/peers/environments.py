"""Environments of their own for programs from PyPI: which Python starts, what is installed, what runs."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".peers"
HERE = Path("/")


def python_for(lowest: tuple[int, int], highest: tuple[int, int], suite: str) -> tuple[Path, str]:
    """PEERS_PYTHON; else this one; else a python3.X that starts, pyenv's too; else that of a Debian tree."""
    names = [os.environ.get("PEERS_PYTHON", ""), sys.executable]
    names += [f"python3.{minor}" for minor in range(highest[1], lowest[1] - 1, -1)]
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    names += sorted((str(path) for path in pyenv.glob("versions/3.*/bin/python3")), reverse=True)
    for path in filter(None, map(shutil.which, names)):
        probe = [path, "-c", "import ensurepip, sys; print(*sys.version_info[:2])"]
        said = subprocess.run(probe, check=False, capture_output=True, text=True).stdout
        if lowest <= tuple(map(int, said.split())) <= highest:  # a pyenv shim may be there and not start
            return HERE, path
    tree = CACHE / suite
    if not (tree / "usr/bin/python3").exists():
        make = ["mmdebstrap", "--variant=apt", "--include=python3,python3-venv,ca-certificates"]
        subprocess.run([*make, suite, str(tree)], check=True)
    authorities = "etc/ssl/certs/ca-certificates.crt"  # this machine may trust more of them
    shutil.copyfile(HERE / authorities, tree / authorities)
    return tree, "/usr/bin/python3"


@dataclass(frozen=True)
class Environment:
    """A virtual environment in the tree of a system, whose programs see it at `folder`."""

    tree: Path
    folder: str

    @property
    def outside(self) -> Path:
        """The same place as this script sees it."""
        return self.tree / self.folder.lstrip("/")

    def command(self, program: str, *words: str) -> list[str]:
        """The command that runs a program of it, or one that lies elsewhere in the tree."""
        inside = [program if program.startswith("/") else f"{self.folder}/bin/{program}", *words]
        return inside if self.tree == HERE else ["chroot", str(self.tree), *inside]

    def run(self, program: str, *words: str) -> str:
        """What it prints."""
        return subprocess.run(self.command(program, *words), check=True, stdout=-1, text=True).stdout


def install(package: str, tree: Path, python: str) -> Environment:
    """An environment with this package, made at the first call and kept until `make clean`."""
    environment = Environment(tree, str(CACHE / package) if tree == HERE else f"/opt/{package}")
    if not (environment.outside / "installed").exists():
        print(f"installing {package} …", file=sys.stderr, flush=True)
        environment.run(python, "-m", "venv", "--clear", environment.folder)
        environment.run("python", "-m", "pip", "install", "-qq", package)
        (environment.outside / "installed").touch()
    return environment


@contextlib.contextmanager
def serving(environment: Environment, command: list[str], port: int) -> Iterator[None]:
    """A server, until the end of the block; its log lies in the environment's folder."""
    log = environment.outside / "server.log"
    end = time.monotonic() + 120
    with log.open("wb") as into, subprocess.Popen(command, stdout=into, stderr=into) as process:
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{command} does not start: see {log}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
