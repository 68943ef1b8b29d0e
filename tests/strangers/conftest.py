"""A service and a site on it for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from strangers.installation import Site, a_site
from strangers.service import Service


@pytest.fixture(name="service")
def _service() -> Iterator[Service]:
    with Service() as service:
        yield service


@pytest.fixture(name="site")
def _site(tmp_path: Path, service: Service) -> Iterator[Site]:
    with a_site(tmp_path / "site", service.port) as site:
        yield site
