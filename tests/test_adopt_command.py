"""`sfwatch adopt`: a person's word that the daemon which claimed files is dead."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from world import needs_root

from sfwatch import claim

MAIN = (sys.executable, "-c", "from sfwatch.cli import main; main()")
OURS = "0123456789abcdef"
THEIRS = "fedcba9876543210-0a1b2c"
DEAD = claim.Owner(machine="elsewhere", state_dir="/var/lib/sfwatch", journal="one")


@dataclass(frozen=True)
class Place:
    """A configuration with one inbox, in which a dead daemon has claimed two files."""

    root: Path

    @property
    def inbox(self) -> Path:
        return self.root / "inbox"

    @property
    def theirs(self) -> Path:
        return claim.claims_folder(self.inbox, THEIRS)

    def adopt(self, folder: Path | str) -> subprocess.CompletedProcess[str]:
        command = [*MAIN, "adopt", "-c", str(self.root / "sfwatch.yaml"), str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    def refused(self, folder: Path | str) -> str:
        """What is said when nothing is adopted."""
        ended = self.adopt(folder)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert claim.owner_of(self.inbox, THEIRS) == DEAD
        return ended.stderr


@pytest.fixture(name="place")
def _place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state/instance").write_text(json.dumps({"instance": OURS, "machine": "here", "former": []}))
    settings = {"inboxes": [{"path": str(place.inbox), "name": "a"}], "state_dir": str(tmp_path / "state")}
    (tmp_path / "sfwatch.yaml").write_text(yaml.safe_dump(settings))
    for folder in (place.inbox, place.theirs.parent, place.theirs, place.theirs / "sub"):
        folder.mkdir(mode=0o700)
    for name in ("x.jsonl", "sub/y.jsonl"):
        (place.theirs / name).write_text("{}\n")
    claim.write_owner(place.inbox, THEIRS, DEAD)
    return place


def test_from_then_on_the_claims_are_this_daemons(place: Place) -> None:
    """Where they are: nothing is renamed. What its journal knows of them is nothing."""
    ended = place.adopt(place.theirs)
    assert (ended.returncode, ended.stderr) == (0, "")
    takes_over = "the daemon takes over at its next scan of inbox a, or at its start"
    assert ended.stdout == f"{place.theirs}  has 2 files; {takes_over}\n"
    assert claim.owner_of(place.inbox, THEIRS) == replace(DEAD, journal=None, adopted_by=OURS)
    assert claim.folders(place.inbox) == {THEIRS: ["sub/y.jsonl", "x.jsonl"]}
    os.close(claim.lock(place.inbox, THEIRS))


def test_again_is_fine(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any path that leads there, of a folder without an owner as well."""
    (place.inbox / ".sfwatch" / f"{THEIRS}.owner").unlink()
    (place.theirs / "x.jsonl").unlink()
    (place.root / "link").symlink_to(place.inbox)
    monkeypatch.chdir(place.theirs)
    for path in (f"{place.theirs}/", ".", place.root / "link/.sfwatch" / THEIRS):
        ended = place.adopt(path)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "has 1 file;" in ended.stdout


def test_what_is_no_claims_folder(place: Place) -> None:
    """Refused with the places where there are some; a link to one is none."""
    other = place.root / "other/.sfwatch" / THEIRS
    other.mkdir(parents=True)
    (place.inbox / ".sfwatch/link").symlink_to(place.theirs)
    inside = [place.inbox / ".sfwatch" / name for name in ("link", "gone", f"{THEIRS}.owner")]
    outside = [place.inbox, place.inbox / ".sfwatch", place.theirs / "sub", other, Path("/"), Path()]
    for path in (*inside, *outside):
        assert f"a configured inbox: name one of {place.inbox}/.sfwatch/*" in place.refused(path)


@pytest.mark.parametrize("name", [OURS, f"{OURS}-0a1b2c"])
def test_its_own(place: Place, name: str) -> None:
    """The daemon goes on with it without being told."""
    own = claim.claims_folder(place.inbox, name)
    own.mkdir(mode=0o700)
    assert f"{own} is this daemon's own" in place.refused(own)


def test_one_that_lives(place: Place) -> None:
    """A process holds its lock, whatever a person says."""
    held = claim.lock(place.inbox, THEIRS)
    assert "a running process works on" in place.refused(place.theirs)
    os.close(held)


@pytest.mark.parametrize("text", [OURS, f'{{"instance": "{OURS}", "machine": null, "former": []}}'])
def test_a_machine_without_an_id(place: Place, text: str) -> None:
    """As in many containers: the instance alone says whose the claims are from then on."""
    (place.root / "state/instance").write_text(text + "\n")
    assert place.adopt(place.theirs).returncode == 0
    assert claim.owner_of(place.inbox, THEIRS) == replace(DEAD, journal=None, adopted_by=OURS)


@pytest.mark.parametrize("text", [None, "{}", "../../etc"])
def test_a_state_folder_without_an_instance(place: Place, text: str | None) -> None:
    """No daemon ran yet: nobody is there to take over."""
    (place.root / "state/instance").unlink()
    if text is not None:
        (place.root / "state/instance").write_text(text + "\n")
    assert "no daemon has run with" in place.refused(place.theirs)


def test_folders_that_are_not_safe(place: Place) -> None:
    """What is wrong and what to do; nothing is written."""
    place.theirs.chmod(0o755)
    assert "chmod 0700" in place.refused(place.theirs)


@needs_root
def test_another_user_is_told_how_to_run_it(place: Place) -> None:
    """77; what he wrote would be closed to the daemon."""
    os.chown(place.root / "state", 65534, 65534)
    ended = place.adopt(place.theirs)
    assert (ended.returncode, ended.stdout) == (77, "")
    assert "run: runuser -u nobody -- " in ended.stderr
    assert claim.owner_of(place.inbox, THEIRS) == DEAD


def test_a_state_folder_that_can_not_be_read(place: Place) -> None:
    """73, and what has its place."""
    (place.root / "state/instance").unlink()
    (place.root / "state/instance").mkdir()
    ended = place.adopt(place.theirs)
    assert ended.returncode == 73
    assert f"the state folder {place.root}/state can't be used" in ended.stderr


HELP = """\
Usage: sfwatch adopt [OPTIONS] FOLDER

  Take over the files that another daemon claimed, now that it is gone for
  good.

  FOLDER is the path of a claims folder, as the event claim.foreign names it.
  Only you can know that its daemon is dead: on a network filesystem it may
  run on another machine, and both would upload the same files.

  Nothing is moved. The daemon takes over at its next scan, or at its start;
  it looks for each file in the service's listing before it sends it.

  Example:
      sfwatch adopt /srv/sfwatch/inbox/.sfwatch/0123456789abcdef-0a1b2c

Options:
  -c, --config PATH  The configuration. Default: $SFWATCH_CONFIG,
                     ./sfwatch.yaml, /etc/sfwatch/sfwatch.yaml.
  -h, --help         Show this message and exit.
"""


def test_its_help(place: Place) -> None:
    """All that a person has to know before giving that word."""
    assert place.adopt("--help").stdout == HELP
