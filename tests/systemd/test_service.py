"""sfwatch in a real systemd, installed line by line as the README's operator page says."""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from systemd.box import Box, box, page
from world import batch

from sfwatch.standin import StandIn, storing_then_stalling, taking_its_time, untagged

pytestmark = pytest.mark.timeout(300)

KEY = "sk-systemdsystemdsystemdsystemdsystemd"
INBOX = "/srv/sfwatch/inbox"
BURST = 100_000
QUICK = "[Service]\nWatchdogSec=15s\nRestartSec=1s\nTimeoutStopSec=1s\n"


@dataclass
class Service(Box):
    """The box with sfwatch installed and running in it, and the service that it uploads to."""

    target: StandIn

    def drop(self, name: str, content: bytes = b"", *, into: str = INBOX) -> None:
        """Write a file in place, as another user of the group."""
        text = (content or batch(word=name)).decode()
        self.run(f"runuser -u alice -- sh -c 'umask 027; cat > {into}/{name}'", input=text)

    def done(self, name: str) -> dict[str, Any]:
        """Wait for a file to be done; return its sidecar, as the one who dropped it reads it."""
        path = f"/srv/sfwatch/done/{name}"
        self.until(lambda: self.run(f"ls {path} 2>/dev/null", check=False))
        sidecar: dict[str, Any] = json.loads(self.run(f"runuser -u alice -- cat {path}.fileid.json"))
        return sidecar

    def started(self, name: str) -> None:
        """Wait until the upload of a file is under way."""
        self.until(lambda: self.log("upload.started", file=name))

    def took(self, name: str) -> int:
        """Return how many files of this name the service has taken."""
        return [untagged(stored.filename) for stored in self.target.stored].count(name)

    def edit(self, script: str) -> None:
        """Change the configuration by a line of sed."""
        self.run(f"sed -i '{script}' /etc/sfwatch/sfwatch.yaml")

    @contextmanager
    def a_mistake(self) -> Iterator[None]:
        """For the block, the configuration has a line that is wrong."""
        self.run("cp -p /etc/sfwatch/sfwatch.yaml /etc/sfwatch/good")
        self.edit("$a scan_intervall: 3s")
        yield
        self.run("mv /etc/sfwatch/good /etc/sfwatch/sfwatch.yaml")

    def ready(self, unit: str = "sfwatch") -> None:
        self.until(lambda: self.show(unit, "ActiveState") == "active")


def install(it: Service) -> None:
    """Do what the operator page says; the address is the stand-in's, and waits are short."""
    # overlayfs, which the box has, lets nobody know who writes to a file
    it.run("mkdir -p /srv/sfwatch && mount -t tmpfs -o mode=755 srv /srv/sfwatch; useradd -m alice")
    for unit in ("sfwatch", "sfwatch@"):
        it.write(f"/etc/systemd/system/{unit}.service.d/quick.conf", QUICK)
    pip = {name: value for name, value in os.environ.items() if re.match("PIP_|SSL_CERT|https?_proxy", name)}
    exports = "".join(f"export {name}='{value}'; " for name, value in pip.items())
    venv = f"{exports}apt-get update && apt-get install -y python3-venv"
    it.run(f"/usr/bin/python3 -c 'import ensurepip' 2>/dev/null || ({venv})")
    for command in page("Run it as a service")[0]:
        if "enable" in command:
            it.edit(f"s#base_url: https://.*#base_url: {it.target.base_url}#")
            it.edit("s/longest_retry: 5m/longest_retry: 1s/")
            it.edit("s/settle: 2s/settle: 200ms/; s/settle_unproven: 10s/settle_unproven: 400ms/")
        it.run(f"cd /source; {exports}{command}", input=KEY + "\n")


@pytest.fixture(scope="module", name="it")
def _it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with box(tmp_path_factory.mktemp("box")) as inside, StandIn(key=KEY) as target:
        it = Service(inside.folder, target)
        install(it)
        yield it


@pytest.fixture(scope="module", autouse=True, name="hung")
def _hung(it: Service) -> Iterator[float]:
    """An instance with an upload that hangs: begun first, since it takes half a minute to be sure of that."""
    it.target.script.append(replace(storing_then_stalling(), filename="hung.jsonl"))
    api = f"api: {{base_url: {it.target.base_url}, read_timeout: 5s}}\\nstate_dir:"
    for command in page("Run it as a service")[2]:
        it.run(command.replace("state_dir:", api).replace("evals", "hung"), input=KEY + "\n")
    it.drop("hung.jsonl", into="/srv/sfwatch/hung/inbox")
    it.until(lambda: it.took("hung.jsonl"))
    time.sleep(1)  # until each thread sleeps: none may be stopped while it holds the interpreter
    freeze = f"exec /usr/bin/python3 /source/tests/systemd/freeze.py {it.show('sfwatch@hung', 'MainPID')}"
    with it.start(freeze) as debugger:
        yield time.monotonic()
        debugger.kill()


# --- at work ---------------------------------------------------------------------------------------------


def test_a_file_of_another_user_of_the_group(it: Service) -> None:
    """The kernel's word counts for it, its sender may read what came of it, and nobody else may."""
    it.drop("first.jsonl")
    sidecar = it.done("first.jsonl")
    assert sidecar["id"] == next(
        stored.id for stored in it.target.stored if untagged(stored.filename) == "first.jsonl"
    )
    assert sidecar["sfwatch"]["settled_by"] == "lease"
    modes = it.run("stat -c '%a %U %G' /srv/sfwatch/done/first.jsonl.fileid.json")
    assert modes == "640 sfwatch sfwatch\n"


def test_one_line_says_how_it_is(it: Service) -> None:
    """`systemctl status` shows it."""
    it.drop("line.jsonl")
    it.done("line.jsonl")
    line = r'Status: "Watching 1 inbox; 0 under way, 0 waiting, \d+ done, 0 failed"'
    it.until(lambda: re.search(line, it.run("systemctl status sfwatch")))


def test_who_drops_files_may_ask_for_them(it: Service) -> None:
    """`sfwatch status` as a user of the group, who may not read the journal and knows no unit's folders."""
    it.drop("asked.jsonl")
    it.done("asked.jsonl")
    ask = "runuser -u alice -- /opt/sfwatch/bin/sfwatch status"
    it.until(lambda: "is running (process " in it.run(f"{ask} || true"))
    it.run(ask)
    assert "inbox/asked.jsonl was uploaded " in it.run(f"{ask} asked.jsonl")


def test_the_installation_can_be_proved(it: Service) -> None:
    """The operator page's `check --online` finds nothing wrong, with the service's own rights and key."""
    [command] = page("Run it as a service")[1]
    it.run(command)


def test_it_is_confined(it: Service) -> None:
    """Installed, its exposure is what the README says."""
    said = it.run("systemd-analyze security sfwatch --no-pager")
    assert re.search(r"exposure level for sfwatch.service: 1\.[0-3] ", said)


def test_a_big_file_needs_little_memory(it: Service) -> None:
    """200 MB go out while the process stays far below its limit."""
    lines = b"".join(batch(1, word="x" * 400_000).replace(b"request-0", b"request-%d" % n) for n in range(500))
    it.drop("big.jsonl", lines)
    assert it.done("big.jsonl")["sfwatch"]["size"] == len(lines) > 200 * 10**6
    peak = re.search(r"VmHWM:\s+(\d+) kB", it.run(f"cat /proc/{it.show('sfwatch', 'MainPID')}/status"))
    assert peak is not None
    assert int(peak[1]) < 150_000
    it.run("rm /srv/sfwatch/done/big.jsonl*")


# --- another configuration -------------------------------------------------------------------------------


def test_a_bad_configuration_is_not_loaded(it: Service) -> None:
    """The reload fails and says why; the daemon goes on with what it has."""
    with it.a_mistake():
        assert "refused" in it.run("systemctl reload sfwatch || echo refused")
    assert "scan_intervall" in it.run("journalctl -u sfwatch --no-pager -n 30")
    it.drop("meanwhile.jsonl")
    it.done("meanwhile.jsonl")
    assert it.show("sfwatch", "NRestarts") == "0"


def test_a_good_configuration_is_loaded(it: Service) -> None:
    """A new inbox is taken up while an upload is under way, which goes on."""
    it.target.script.append(taking_its_time(3))
    it.drop("under-way.jsonl")
    it.started("under-way.jsonl")
    it.run("install -d -o sfwatch -g sfwatch /srv/sfwatch/more")
    it.run("install -d -o sfwatch -g sfwatch -m 3770 /srv/sfwatch/more/inbox")
    it.edit(r"s#^inboxes:#&\n  - {path: /srv/sfwatch/more/inbox, name: more}#")
    it.run("systemctl reload sfwatch")
    it.until(lambda: len(it.log("config.loaded")) == 2)
    it.drop("x.jsonl", into="/srv/sfwatch/more/inbox")
    it.until(lambda: it.log("file.done", file="x.jsonl"))
    it.done("under-way.jsonl")
    assert it.log("upload.started", file="under-way.jsonl", attempt=2) == []
    it.until(lambda: "Watching 2 inboxes" in it.show("sfwatch", "StatusText"))


# --- trouble ---------------------------------------------------------------------------------------------


def test_stopped_in_mid_upload_it_lets_it_end(it: Service) -> None:
    """`systemctl stop` waits for what is under way, beyond its own timeout; it ends well."""
    it.target.script.append(taking_its_time(3))
    it.drop("last.jsonl")
    it.started("last.jsonl")
    it.run("systemctl stop sfwatch")
    it.done("last.jsonl")
    assert it.show("sfwatch", "Result") == "success"
    assert it.log()[-1]["event"] == "daemon.stopped"
    it.run("systemctl start sfwatch")


def test_killed_in_mid_upload_it_resumes(it: Service) -> None:
    """The service had it, and nobody was told: it is found again, and not sent twice."""
    it.target.script.append(storing_then_stalling())
    it.drop("lost.jsonl")
    it.until(lambda: it.took("lost.jsonl"))
    it.run("systemctl kill -s KILL sfwatch")
    assert it.done("lost.jsonl")["sfwatch"]["recovered"] is True
    assert it.took("lost.jsonl") == 1
    assert it.show("sfwatch", "NRestarts") == "1"


def test_a_process_that_hangs_is_started_anew(it: Service) -> None:
    """The loop does not turn: the watchdog ends it, and no core is left."""
    it.ready()
    it.run("systemctl kill -s STOP sfwatch")
    it.until(lambda: it.show("sfwatch", "NRestarts") == "2")
    it.ready()
    assert "Watchdog timeout" in it.run("journalctl -u sfwatch --no-pager")
    limits = it.run(f"cat /proc/{it.show('sfwatch', 'MainPID')}/limits")
    assert re.search(r"Max core file size +0 +0", limits)
    it.drop("after.jsonl")
    it.done("after.jsonl")


def test_an_upload_that_hangs_is_freed(it: Service, hung: float) -> None:
    """Its worker is held by something that no timeout ends, while the loop turns: said, and started anew."""
    unit = "sfwatch@hung"
    it.until(lambda: it.show(unit, "NRestarts") == "1", within_s=hung + 120 - time.monotonic())
    assert [event["file"] for event in it.log("upload.stuck", unit=unit)] == ["hung.jsonl"]
    it.until(lambda: it.log("file.done", unit=unit, file="hung.jsonl", recovered=True))


def test_a_wrong_configuration_is_not_tried_again(it: Service) -> None:
    """Exit status 78, said with what is wrong, and the unit stays down."""
    with it.a_mistake():
        it.run("systemctl restart sfwatch", check=False)
        it.until(lambda: it.show("sfwatch", "ActiveState") == "failed")
        assert it.show("sfwatch", "ExecMainStatus") == "78"
        assert "scan_intervall" in it.run("journalctl -t sfwatch -u sfwatch -o cat | tail -5")
    it.run("systemctl start sfwatch")


@pytest.mark.parametrize(("missing", "status"), [("/etc/sfwatch/api-key", "243"), ("/srv/away", "226")])
def test_what_a_missing_path_looks_like(it: Service, missing: str, status: str) -> None:
    """The statuses that the operator page names; once the path is there, it starts by itself."""
    drop_ins = "/run/systemd/system/sfwatch.service.d"
    it.write(f"{drop_ins}/away.conf", "[Service]\nReadWritePaths=/srv/away\n")
    it.run(f"mkdir -p /srv/away; systemctl daemon-reload; mv {missing} /var/away")
    it.run("systemctl restart sfwatch", check=False)
    it.until(lambda: it.show("sfwatch", "ExecMainStatus") == status)
    it.run(f"mv /var/away {missing}")
    it.ready()
    it.run(f"rm -r {drop_ins}; systemctl daemon-reload; systemctl restart sfwatch; rmdir /srv/away")


# --- afterwards ------------------------------------------------------------------------------------------


def test_the_journal_is_the_log(it: Service) -> None:
    """`journalctl -t sfwatch -o cat` is the JSON lines and nothing else, whatever has happened so far."""
    said = it.run("journalctl -t sfwatch -u sfwatch -o cat").splitlines()
    events = [json.loads(line)["event"] for line in said]
    assert events[:2] == ["daemon.started", "config.loaded"]
    assert "daemon.ready" in events


def test_the_key_is_nowhere(it: Service) -> None:
    """Not in what systemd, /proc and the journal show, nor in any file but those that the operator wrote."""
    pid = it.show("sfwatch", "MainPID")
    for command in (
        "systemctl show '*'",
        "systemctl status --full --no-pager --lines=1000 'sfwatch*'",
        "journalctl --all --no-pager -o export",
        f"cat /proc/{pid}/environ /proc/{pid}/cmdline",
    ):
        assert it.run(f"{command} | grep -a -c {KEY}", check=False) == "0\n"
    places = "/etc /run /srv/sfwatch /tmp /opt/sfwatch /var/lib/sfwatch* /var/log /var/tmp"
    found = it.run(f"grep -rlF --devices=skip {KEY} {places}", check=False)
    ours = {path for path in found.splitlines() if not path.startswith("/run/credentials/sfwatch")}
    assert ours == {"/etc/sfwatch/api-key", "/etc/sfwatch/hung.api-key"}
    credential = "/run/credentials/sfwatch.service/siliconflow-api-key"
    assert "denied" in it.run(f"runuser -u alice -- cat {credential}", check=False)
    assert all(seen.authorization == f"Bearer {KEY}" for seen in it.target.requests)


def test_a_hundred_thousand_lines_without_one_lost(it: Service) -> None:
    """By default journald drops lines of such a burst."""
    make = f"import os; os.chdir('{INBOX}'); [os.symlink('/dev/null', f'{{i}}.jsonl') for i in range({BURST})]"
    it.run(f'runuser -u alice -- /usr/bin/python3 -c "{make}"')
    it.run("systemctl kill -s USR1 sfwatch")
    count = "journalctl -t sfwatch -u sfwatch -o cat | grep -c file.ignored"
    it.until(lambda: int(it.run(count, check=False)) >= BURST, within_s=120, every_s=3)
    assert len({event["file"] for event in it.log("file.ignored")}) == BURST
    it.run(f"find {INBOX} -type l -delete")
    assert it.show("sfwatch", "NRestarts") == "0"


def test_old_files_are_removed_where_that_is_wanted(it: Service) -> None:
    """The line for done in tmpfiles.d does what it says, once its # is taken away."""
    it.run("systemd-tmpfiles --clean sfwatch.conf")
    assert "first.jsonl" in it.run("ls /srv/sfwatch/done")
    it.run("sed -i -e 's/^#e/e/' -e 's/90d/1s/' /etc/tmpfiles.d/sfwatch.conf")
    it.run("sleep 1.1; systemd-tmpfiles --clean sfwatch.conf")
    assert it.run("ls /srv/sfwatch/done") == ""


def test_it_goes_without_a_trace(it: Service) -> None:
    """The operator page's way to remove it leaves the folders of files, and nothing else."""
    for command in page("Run it as a service")[3]:
        it.run(command.replace("evals", "hung"))
    assert it.run("find /etc /opt /var /run -xdev -name '*sfwatch*' -not -path '/var/tmp/*'") == ""
    assert it.run("grep sfwatch /etc/passwd", check=False) == ""
