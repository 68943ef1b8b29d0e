"""Fixtures of the tests that upload: clients, files, certificates, and an environment that is nobody's.

In CI a skipped test is a failure, since nobody reads why it was skipped.
"""

import gc
import os
import ssl
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from servers import Authority
from uploads import LARGE, Clients, Files, pattern

from sfwatch.settings import Api
from sfwatch.upload import Client

# CI tries the same histories each time, so that a change is judged by what it changes; elsewhere, new ones.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
IN_CI = bool(os.environ.get("CI"))
if IN_CI:
    hypothesis.settings.load_profile("ci")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report)
    return report


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI; a test that is expected to fail, and does, was not skipped."""
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        where = report.longrepr if isinstance(report.longrepr, tuple) else (report.nodeid, 0, report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{where[0]}:{where[1]}: in CI nothing may be skipped: {where[2]}"


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy, netrc or CA bundle of whoever runs the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """Every thread ends with its test, and every socket is closed."""
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert set(threading.enumerate()) - before == set()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def loopback_tls(authority: Authority) -> ssl.SSLContext:
    return authority.server_context("IP:127.0.0.1", "DNS:localhost")


@pytest.fixture
def clients() -> Iterator[Clients]:
    made = []

    def make(base_url: str, **options: Any) -> Client:
        made.append(Client(Api(base_url=base_url, **options), connections=4, user_agent="sfwatch/test"))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def file_of(tmp_path: Path) -> Iterator[Files]:
    """Descriptors of files with these bytes, or with this many."""
    opened: list[int] = []

    def make(content: bytes | int) -> int:
        path = tmp_path / f"file-{len(opened)}.jsonl"
        path.write_bytes(
            b"" if content == LARGE else content if isinstance(content, bytes) else pattern(content)
        )
        if content == LARGE:
            os.truncate(path, LARGE)  # sparse: nobody looks at what is in it
        opened.append(os.open(path, os.O_RDONLY))
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)
