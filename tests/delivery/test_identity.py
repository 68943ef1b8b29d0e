"""Who a state folder is."""

import json
from pathlib import Path

import pytest

from sfwatch.delivery import identity

HERE, THERE = "a" * 32, "b" * 32
OLD = "0123456789abcdef"


def test_it_is_made_once(tmp_path: Path) -> None:
    """The same folder on the same machine is the same instance, and the file is ours alone."""
    first = identity.establish(tmp_path, HERE)
    assert identity.establish(tmp_path, HERE) == first
    assert (first.machine, first.former) == (HERE, ())
    assert [path.name for path in tmp_path.iterdir()] == ["instance"]
    assert (tmp_path / "instance").stat().st_mode & 0o777 == 0o600


def test_on_another_machine_it_is_somebody_else(tmp_path: Path) -> None:
    """A copy of the folder may run beside the original: the two share no claims."""
    first = identity.establish(tmp_path, HERE)
    second = identity.establish(tmp_path, THERE)
    assert second.instance != first.instance
    assert second.machine == THERE
    assert identity.establish(tmp_path, THERE) == second


@pytest.mark.parametrize("told", [None, HERE])
def test_a_machine_without_an_id_is_no_other_machine(tmp_path: Path, told: str | None) -> None:
    """What is known is kept; an id that is told later is noted."""
    first = identity.establish(tmp_path, told)
    assert identity.establish(tmp_path, None) == first
    assert identity.establish(tmp_path, HERE) == first._replace(machine=HERE)


def test_the_one_line_of_version_0_1_0_is_understood(tmp_path: Path) -> None:
    """The instance stays, since its claims are named by it; the machine is added."""
    (tmp_path / "instance").write_text(f"{OLD}\n")
    assert identity.establish(tmp_path, HERE) == (OLD, HERE, ())
    assert json.loads((tmp_path / "instance").read_text())["machine"] == HERE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "../../etc",
        "{}",
        "{",
        '{"instance": "../x", "machine": null, "former": []}',
        f'{{"instance": "{OLD}", "machine": null, "former": ["/"]}}',
    ],
)
def test_what_makes_no_sense_is_replaced(tmp_path: Path, text: str) -> None:
    """No folder is ever named by what somebody else has written there."""
    (tmp_path / "instance").write_text(text)
    assert identity.read(tmp_path) is None
    made = identity.establish(tmp_path, HERE)
    assert len(made.instance) == 16
    assert identity.read(tmp_path) == made


@pytest.mark.parametrize(("text", "told"), [(f"{HERE}\n", HERE), ("uninitialized\n", None), (None, None)])
def test_the_id_of_the_machine(tmp_path: Path, text: str | None, told: str | None) -> None:
    """Some containers and images have none."""
    if text is not None:
        (tmp_path / "machine-id").write_text(text)
    assert identity.machine_id(tmp_path / "machine-id") == told
