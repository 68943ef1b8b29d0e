"""The systemd unit: systemd itself finds nothing wrong with it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def installed(folder: Path) -> Path:
    """Return the unit as it would be installed, with the program of this environment."""
    unit = folder / "sfwatch.service"
    text = (ROOT / "systemd/sfwatch.service").read_text()
    unit.write_text(text.replace("/opt/sfwatch/bin/", f"{Path(sys.executable).parent}/"))
    return unit


def test_the_unit_is_sound(tmp_path: Path) -> None:
    """`systemd-analyze verify` has no complaint."""
    command = ["systemd-analyze", "verify", "--man=no", str(installed(tmp_path))]
    verified = subprocess.run(command, capture_output=True, text=True, check=False)
    complaints = [line for line in verified.stderr.splitlines() if "sfwatch" in line]
    assert verified.returncode == 0, verified.stderr
    assert complaints == []


def test_the_unit_is_confined(tmp_path: Path) -> None:
    """`systemd-analyze security` rates its exposure at 1.5 or less."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=15", str(installed(tmp_path))]
    rated = subprocess.run(command, capture_output=True, text=True, check=False)
    assert rated.returncode == 0, rated.stdout[-400:]
