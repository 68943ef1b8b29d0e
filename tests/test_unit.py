"""The systemd units: systemd finds nothing wrong with them, they are well confined, and both say the same."""

import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).parent.parent / "systemd"
BOTH = pytest.mark.parametrize("unit", ["sfwatch.service", "sfwatch@.service"])


def installed(unit: str, folder: Path) -> str:
    """Return the path of a unit as it would be installed, with the program of this environment."""
    path = folder / unit
    path.write_text((UNITS / unit).read_text().replace("/opt/sfwatch/bin/", f"{Path(sys.executable).parent}/"))
    return str(path)


def directives(unit: str) -> list[str]:
    lines = (UNITS / unit).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@BOTH
def test_a_unit_is_sound(unit: str, tmp_path: Path) -> None:
    """`systemd-analyze verify` has no complaint."""
    command = ["systemd-analyze", "verify", "--man=no", installed(unit, tmp_path)]
    verified = subprocess.run(command, capture_output=True, text=True, check=False)
    complaints = [line for line in verified.stderr.splitlines() if "sfwatch" in line]
    assert verified.returncode == 0, verified.stderr
    assert complaints == []


@BOTH
def test_a_unit_is_confined(unit: str, tmp_path: Path) -> None:
    """`systemd-analyze security` rates its exposure at 1.3 or less."""
    threshold = ["--offline=true", "--threshold=13"]
    command = ["systemd-analyze", "security", *threshold, installed(unit, tmp_path)]
    rated = subprocess.run(command, capture_output=True, text=True, check=False)
    assert rated.returncode == 0, rated.stdout[-400:]


def test_an_instance_differs_in_its_name_only() -> None:
    """Whoever changes one unit changes the other: but for the instance's name they say the same."""
    named = {
        "Description=Upload dropped batch files to SiliconFlow": " (%i)",
        "StateDirectory=sfwatch": "-%i",
        "RuntimeDirectory=sfwatch": "-%i",
    }
    expected = [line + named.get(line, "") for line in directives("sfwatch.service")]
    expected = [line.replace("/etc/sfwatch/sfwatch.yaml", "/etc/sfwatch/%i.yaml") for line in expected]
    expected = [line.replace("/etc/sfwatch/api-key", "/etc/sfwatch/%i.api-key") for line in expected]
    assert directives("sfwatch@.service") == expected


def test_every_line_of_the_unit_has_its_reason() -> None:
    """A comment stands above each group of lines of the sandbox, limits and restarts."""
    _, _, service = (UNITS / "sfwatch.service").read_text().partition("[Service]\n")
    groups = [group for group in service.partition("[Install]")[0].split("\n\n") if group.strip()]
    assert [group.split("\n")[0] for group in groups if not group.lstrip().startswith("#")] == []
