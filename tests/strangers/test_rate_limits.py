"""A8: behind a real limiter all files are done, one after another, and none twice."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import need, path_of
from strangers.installation import Site, a_site, batch
from strangers.service import Service

FILES = 12
WITHIN_S = 60.0

Limiter = Callable[[str], Site]


@contextlib.contextmanager
def nginx(folder: Path, upstream: int, limits: str) -> Iterator[int]:
    """A proxy that lets two requests a second through to the service; its port."""
    need("nginx")
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi"))
    places += "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"""
        daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
        events {{}}
        http {{
            access_log off; {places}
            limit_req_zone $binary_remote_addr zone=each:1m rate=2r/s;
            server {{
                listen 127.0.0.1:{port};
                {limits}
                location / {{ proxy_pass http://127.0.0.1:{upstream}; }}
            }}
        }}
        """
    )
    command = [path_of("nginx"), "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail((folder / "error.log").read_text())
            time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@pytest.fixture(name="behind")
def _behind(tmp_path: Path, service: Service) -> Iterator[Limiter]:
    """A site whose service is behind a limiter."""
    with contextlib.ExitStack() as closing:

        def behind(limits: str) -> Site:
            port = closing.enter_context(nginx(tmp_path / "nginx", service.port, limits))
            return closing.enter_context(a_site(tmp_path / "behind", port))

        yield behind


def all_are_done(service: Service, site: Site) -> None:
    daemon = site.start()
    digests = [site.drop(f"{n:02}.jsonl", batch(f"file {n:02}")) for n in range(FILES)]
    daemon.until(lambda: len(site.done()) == FILES, within_s=WITHIN_S)
    assert site.failed() == []
    assert daemon.said("file.failed") == []
    assert [service.copies(digest) for digest in digests] == [1] * FILES


def test_behind_a_limiter_that_says_429_all_files_are_done(service: Service, behind: Limiter) -> None:
    """Two requests a second are let through: twelve files take a tenth of the time given."""
    site = behind("limit_req zone=each; limit_req_status 429;")
    site.configure("a", first_retry="1s", longest_retry="5m", reconcile_window="1s")
    all_are_done(service, site)


def test_behind_a_limiter_that_says_429_no_file_is_given_up(service: Service, behind: Limiter) -> None:
    """A 429 is no failure of a file: not even where two failures are enough."""
    site = behind("limit_req zone=each; limit_req_status 429;")
    site.configure("a", poison_after=2)
    all_are_done(service, site)


def test_behind_a_limiter_that_says_503_all_files_are_done_and_none_twice(
    service: Service, behind: Limiter
) -> None:
    """Nginx's default: a page of HTML that comes after the whole body, as if the service had the file."""
    site = behind("limit_req zone=each burst=5 nodelay;")
    site.configure("a", first_retry="1s", longest_retry="4s")
    all_are_done(service, site)
