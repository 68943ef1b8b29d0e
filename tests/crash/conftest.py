"""What the crash tests share: one fork server for all of them, and a line for the counts of a sweep."""

from collections.abc import Callable, Iterator

import pytest
from crash.sweep import Forks, library


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """The fork server."""
    server = Forks(library(tmp_path_factory.mktemp("faults")))
    yield server
    server.close()


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a line whatever pytest captures: these numbers are wanted in every log."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}", flush=True)  # noqa: T201

    return line
