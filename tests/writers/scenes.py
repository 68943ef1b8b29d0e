"""The writers of the matrix: each writes lines into an inbox its own way, and mostly stalls in the middle.

A scene is a function of its stage. It returns once the writer is done; what must have become of the lines is
the same for all and is checked elsewhere. `Ends` says what else is expected.
"""

import contextlib
import mmap
import os
import pwd
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from writers.stage import GAP_S, LINE_BYTES, SETTLE_S, STALL_S, Stage

from sfwatch import files


class Ends(StrEnum):
    """What becomes of what a writer wrote, beyond that no line is lost, doubled or cut."""

    AS_ONE = "one upload"
    IN_PARTS = "uploads of whole parts"  # the writer pauses, closed, for longer than any rest
    AS_ONE_IF_QUICK = "one upload"  # unless this machine was too busy to let the pauses be short
    NEWEST = "the newest version"  # older ones, whole, only if this machine was too busy
    FAILED = "failed"


@dataclass(frozen=True)
class Scene:
    """A writer: its row in the table, what it does, and how that ends."""

    title: str
    write: Callable[[Stage], None]
    ends: Ends
    settle_s: float = SETTLE_S
    recursive: bool = False


SCENES: dict[str, Scene] = {}


def scene(
    title: str, *, ends: Ends = Ends.AS_ONE, settle_s: float = SETTLE_S, recursive: bool = False
) -> Callable[[Callable[[Stage], None]], Callable[[Stage], None]]:
    """Enter a writer into the matrix."""

    def enter(write: Callable[[Stage], None]) -> Callable[[Stage], None]:
        SCENES[write.__name__] = Scene(title, write, ends, settle_s, recursive)
        return write

    return enter


# One descriptor, or several.


@scene("one descriptor, whole lines, pauses")
def held(stage: Stage) -> None:
    with stage.x.open("wb", buffering=0) as file:
        for _ in range(3):
            file.write(stage.lines(2))
            time.sleep(STALL_S)


@scene("shell redirection, stalled inside a line")
def redirected(stage: Stage) -> None:
    stage.piped("sh", "-c", f"cat > {stage.x}", data=stage.lines(5))


@scene("append and close, gaps shorter than `settle`", ends=Ends.AS_ONE_IF_QUICK)
def appended_quickly(stage: Stage) -> None:
    for _ in range(12):
        stage.append()
        time.sleep(GAP_S)


@scene("`echo >>` in a shell, gaps shorter than `settle`", ends=Ends.AS_ONE_IF_QUICK)
def echoed(stage: Stage) -> None:
    line = stage.source(0)
    for _ in range(8):
        line.write_bytes(stage.lines(1))
        with stage.changing():
            stage.run("sh", "-c", f"cat {line} >> {stage.x}")
        time.sleep(GAP_S)


@scene("append and close, gaps longer than any rest", ends=Ends.IN_PARTS)
def appended_slowly(stage: Stage) -> None:
    stage.append(2)
    time.sleep(stage.role.rest_s + STALL_S)
    stage.append(2)


@scene("append and close, gaps about as long as `settle`", ends=Ends.IN_PARTS)
def appended_about_as_long(stage: Stage) -> None:
    luck = random.Random(4)
    for _ in range(10):
        stage.append()
        time.sleep(SETTLE_S * luck.uniform(0.7, 1.4))


@scene("append and close, 300 times, `settle` of 50 ms", ends=Ends.IN_PARTS, settle_s=0.05)
def appended_hurriedly(stage: Stage) -> None:
    luck = random.Random(5)
    for _ in range(300):
        stage.append()
        time.sleep(luck.uniform(0, 0.08))


@scene("a second writer opens and closes while the first writes")
def with_a_visitor(stage: Stage) -> None:
    with stage.x.open("wb", buffering=0) as file:
        file.write(stage.lines(2))
        stage.x.open("ab").close()
        time.sleep(STALL_S)
        file.write(stage.lines(2))


@scene("two writers append to one file in turn, both keep it open")
def by_two(stage: Stage) -> None:
    with stage.x.open("ab", buffering=0) as one, stage.x.open("ab", buffering=0) as other:
        one.write(stage.lines(2))
        other.write(stage.lines(2))
        time.sleep(STALL_S)
        one.write(stage.lines(2))
    other_again = stage.x.open("ab", buffering=0)
    time.sleep(STALL_S / 10)
    other_again.write(stage.lines(1))
    other_again.close()


@scene("writer killed inside a line", ends=Ends.FAILED)
def killed(stage: Stage) -> None:
    process = stage.start("sh", "-c", f"cat > {stage.x}", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(stage.lines(3)[:-100])
    process.stdin.flush()
    stage.when_half_there()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    stage.written.clear()


@scene("last line without a newline")
def unended(stage: Stage) -> None:
    stage.x.write_bytes(stage.lines(3)[:-1])
    stage.written[-1] = stage.written[-1][:-1]


@scene("written anew within `settle`", ends=Ends.NEWEST)
def rewritten(stage: Stage) -> None:
    with stage.changing():
        stage.x.write_bytes(stage.lines(5))
    time.sleep(GAP_S)
    with stage.changing():
        stage.x.write_bytes(stage.anew(4))


# Other names of a file, and other ways to its bytes.


@scene("tempfile and rename (Python), mode 0640")
def renamed(stage: Stage) -> None:
    with tempfile.NamedTemporaryFile(dir=stage.inbox, prefix=".", suffix=".tmp", delete=False) as file:
        file.write(stage.lines(5))
        os.fchmod(file.fileno(), 0o640)
    Path(file.name).rename(stage.x)


@scene("tempfile and rename (Python), mode 0600 and `chmod g+r` later")
def renamed_and_private(stage: Stage) -> None:
    with tempfile.NamedTemporaryFile(dir=stage.inbox, prefix=".", suffix=".tmp", delete=False) as file:
        file.write(stage.lines(5))
    Path(file.name).rename(stage.x)
    time.sleep(STALL_S)
    with contextlib.suppress(FileNotFoundError):  # root has taken it long ago
        stage.x.chmod(0o640)


@scene("`mv` within the filesystem")
def moved(stage: Stage) -> None:
    stage.run("mv", stage.source(20), stage.x)


@scene("`ln`: the writer goes on under the other name")
def linked(stage: Stage) -> None:
    with (stage.aside / "y").open("wb", buffering=0) as file:
        file.write(stage.lines(2)[:-10])
        stage.run("ln", stage.aside / "y", stage.x)
        time.sleep(STALL_S)
        file.write(stage.written[-1][-10:] + stage.lines(2))


@scene("O_TMPFILE and linkat")
def unnamed(stage: Stage) -> None:
    fd = os.open(stage.inbox, os.O_TMPFILE | os.O_WRONLY, 0o644)
    os.write(fd, stage.lines(2))
    with files.folder(
        stage.inbox
    ) as inbox:  # Python calls link(2), which can't do it, without a folder's descriptor
        os.link(f"/proc/self/fd/{fd}", stage.x.name, dst_dir_fd=inbox, follow_symlinks=True)
    time.sleep(STALL_S)
    os.write(fd, stage.lines(2))
    os.close(fd)


@scene("log rotation: `logrotate` renames into the inbox, the writer keeps its descriptor")
def rotated(stage: Stage) -> None:
    with (stage.aside / "app.jsonl").open("ab", buffering=0) as log:
        log.write(stage.lines(3))
        _rotate(stage, "")
        time.sleep(STALL_S)
        log.write(stage.lines(3))


@scene("log rotation: `logrotate` with `copytruncate` into the inbox")
def rotated_by_copy(stage: Stage) -> None:
    with (stage.aside / "app.jsonl").open("ab", buffering=0) as log:
        log.write(stage.lines(3))
        _rotate(stage, "copytruncate")


def _rotate(stage: Stage, more: str) -> None:
    settings = stage.aside / "logrotate.conf"
    settings.write_text(
        f"{stage.aside}/app.jsonl {{\n rotate 5\n olddir {stage.inbox}\n dateext\n dateformat -%s\n"
        f" extension .jsonl\n {more}\n}}\n"
    )
    stage.run("logrotate", "--force", "--state", stage.aside / "state", settings)


@scene("memory map of the full size, descriptor closed")
def mapped(stage: Stage) -> None:
    data = stage.lines(40)
    with stage.x.open("w+b") as file:
        file.truncate(len(data))
        view = mmap.mmap(file.fileno(), len(data))
    for start in range(0, len(data), len(data) // 2):
        end = min(start + len(data) // 2, len(data))
        view[start:end] = data[start:end]
        time.sleep(STALL_S)
    view.close()


@scene("memory map: a line is put right after all was there once")
def mapped_later(stage: Stage) -> None:
    data = stage.lines(8)
    with stage.x.open("w+b") as file:
        file.write(data.replace(b"x", b"y", 1))
        file.flush()
        view = mmap.mmap(file.fileno(), len(data))
    time.sleep(STALL_S)
    view[:] = data
    time.sleep(STALL_S)
    view.close()


@scene("posix_fallocate of the full size, then filled")
def allocated(stage: Stage) -> None:
    data = stage.lines(40)
    with stage.x.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, len(data))
        file.write(data[: len(data) // 2])
        time.sleep(STALL_S)
        file.write(data[len(data) // 2 :])


@scene("`fallocate` and close; opened again and filled by `dd`")
def allocated_and_closed(stage: Stage) -> None:
    source = stage.source(40)
    stage.run("fallocate", "--length", str(40 * LINE_BYTES), stage.x)
    time.sleep(STALL_S)
    stage.run("dd", f"if={source}", f"of={stage.x}", "conv=notrunc", "bs=4096", "status=none")


@scene("mtime set back after each write, one descriptor")
def set_back(stage: Stage) -> None:
    with stage.x.open("wb", buffering=0) as file:
        for _ in range(2):
            file.write(stage.lines(2))
            stage.run("touch", "--date", "2001-01-01", stage.x)
            time.sleep(STALL_S)


@scene("mtime set back, append and close, gaps shorter than `settle`", ends=Ends.AS_ONE_IF_QUICK)
def set_back_quickly(stage: Stage) -> None:
    for _ in range(8):
        stage.append()
        os.utime(stage.x, (1_000_000_000, 1_000_000_000))
        time.sleep(GAP_S)


# Transfers.


@scene("`scp`, stopped half-way")
def scp(stage: Stage) -> None:
    options = [*stage.help.ssh, "-P", str(stage.help.ssh_port), "-l", "1600"]
    stage.stalled("scp", *options, stage.source(), f"{_login(stage)}@127.0.0.1:{stage.x}")


@scene("`sftp put`, stopped half-way")
def sftp(stage: Stage) -> None:
    batch = stage.aside / "batch"
    batch.write_text(f"put {stage.source()} {stage.x}\n")
    options = [*stage.help.ssh, "-P", str(stage.help.ssh_port), "-l", "1600", "-b", batch]
    stage.stalled("sftp", *options, f"{_login(stage)}@127.0.0.1")


def _login(stage: Stage) -> str:
    return pwd.getpwuid(os.geteuid() if stage.role.writer is None else stage.role.writer).pw_name


@scene("`rsync`, stopped half-way")
def rsync(stage: Stage) -> None:
    stage.stalled("rsync", "--bwlimit=200", stage.source(), stage.x)


@scene("`rsync --inplace`, stopped half-way")
def rsync_inplace(stage: Stage) -> None:
    stage.stalled("rsync", "--inplace", "--times", "--bwlimit=200", stage.source(), stage.x)


@scene("`rsync --append`, broken off and begun again")
def rsync_append(stage: Stage) -> None:
    # Without --perms the mode 0600 that it begins with would stay, once broken off.
    command = ("rsync", "--append", "--perms", "--times", "--bwlimit=200", stage.source(), stage.x)
    first = stage.start(*command)
    stage.when_half_there()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    time.sleep(STALL_S)
    stage.run(*command)


@scene("`curl -o`, the server stalls")
def curl(stage: Stage) -> None:
    stage.run("curl", "--silent", "--show-error", "-o", stage.x, stage.served())


@scene("`curl -R -o`, the server stalls")
def curl_with_its_time(stage: Stage) -> None:
    stage.run("curl", "--silent", "--show-error", "-R", "-o", stage.x, stage.served())


@scene("`wget`, the server stalls")
def wget(stage: Stage) -> None:
    stage.run("wget", "--quiet", "--directory-prefix", stage.inbox, stage.served())


@scene("`wget -O`, the server stalls")
def wget_to(stage: Stage) -> None:
    stage.run("wget", "--quiet", "-O", stage.x, stage.served())


# Copies.


@scene("`cat` from a slow pipe")
def cat(stage: Stage) -> None:
    stage.piped("sh", "-c", f"exec cat > {stage.x}", data=stage.lines(40))


@scene("`cp` from a slow pipe")
def cp(stage: Stage) -> None:
    # Of a pipe it would take over mode 0600.
    stage.piped("cp", "--no-preserve=mode", "/dev/stdin", stage.x, data=stage.lines(40))


@scene("`cp -p` from another filesystem, its times set late")
def cp_p(stage: Stage) -> None:
    stage.run(*_slowed("utimensat", when=1), "cp", "-p", stage.source(folder=stage.elsewhere), stage.x)


@scene("`mv` across filesystems, stalled half-way")
def mv_across(stage: Stage) -> None:
    source = stage.source(folder=stage.elsewhere)
    stage.run(*_slowed("write", when=2), "mv", source, stage.x)


@scene("`tar x` from a slow pipe")
def tar(stage: Stage) -> None:
    source = stage.source(name="x.jsonl")
    stage.run("tar", "-C", stage.aside, "-cf", stage.aside / "archive.tar", source.name)
    archive = (stage.aside / "archive.tar").read_bytes()
    stage.piped("tar", "-C", stage.inbox, "-x", "--no-same-owner", data=archive)


@scene("`dd` from a slow pipe")
def dd(stage: Stage) -> None:
    stage.piped("dd", f"of={stage.x}", "bs=4096", "status=none", data=stage.lines(40))


@scene("`split` of a slow pipe into several files", ends=Ends.IN_PARTS)
def split(stage: Stage) -> None:
    command = ("split", "--lines=10", "--additional-suffix=.jsonl", "-", stage.inbox / "part-")
    stage.piped(*command, data=stage.lines(35))


# Trees: the folders come a moment before what lies in them.


@scene("`cp -r` of a tree, `recursive: true`", ends=Ends.IN_PARTS, recursive=True)
def cp_tree(stage: Stage) -> None:
    stage.run("cp", "-r", stage.tree(), stage.inbox)


@scene("`rsync -r` of a tree, `recursive: true`", ends=Ends.IN_PARTS, recursive=True)
def rsync_tree(stage: Stage) -> None:
    stage.run("rsync", "-r", "--times", stage.tree(), stage.inbox)


@scene("`tar x` of a tree from a slow pipe, `recursive: true`", ends=Ends.IN_PARTS, recursive=True)
def tar_tree(stage: Stage) -> None:
    tree = stage.tree()
    stage.run("tar", "-C", stage.aside, "-cf", stage.aside / "archive.tar", tree.name)
    archive = (stage.aside / "archive.tar").read_bytes()
    stage.piped("tar", "-C", stage.inbox, "-x", "--no-same-owner", data=archive)


@scene("`mv` of a whole tree within the filesystem, `recursive: true`", ends=Ends.IN_PARTS, recursive=True)
def mv_tree(stage: Stage) -> None:
    stage.run("mv", stage.tree(), stage.inbox)


def _slowed(call: str, *, when: int) -> tuple[str, ...]:
    """Let a program take its time before one of its system calls."""
    delay = f"inject={call}:delay_enter={int(STALL_S * 1e6)}:when={when}"
    return ("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", delay)


# Editors and browsers.


@scene("`vim`, a new file")
def vim(stage: Stage) -> None:
    stage.run(*_VIM, "-c", f"read {stage.source(5)}", "-c", "wq", stage.x)


@scene("`vim`, written again within `settle`", ends=Ends.NEWEST)
def vim_again(stage: Stage) -> None:
    source = stage.source(5)
    more = stage.aside / "more"
    with stage.changing():
        stage.run(*_VIM, "-c", f"read {source}", "-c", "wq", stage.x)
    time.sleep(GAP_S)
    with stage.changing():
        more.write_bytes(stage.anew(7))
        stage.run(*_VIM, "-c", "%delete", "-c", f"read {more}", "-c", "wq", stage.x)


_VIM = ("vim", "-N", "-u", "NONE", "-i", "NONE", "-es")


@scene("`sed -i` within `settle`", ends=Ends.NEWEST)
def sed(stage: Stage) -> None:
    with stage.changing():
        stage.x.write_bytes(stage.lines(3))
    time.sleep(GAP_S)
    with stage.changing():
        stage.anew(0)
        stage.written = [line.replace(b'"x', b'"z') for line in stage.versions[0]]
        stage.run("sed", "-i", 's/"x/"z/', stage.x)


@scene("Firefox: placeholder, `.part`, rename over it (played)")
def firefox(stage: Stage) -> None:
    stage.x.touch()
    part = stage.inbox / "x.jsonl.part"
    with part.open("wb", buffering=0) as file:
        file.write(stage.lines(3))
        time.sleep(STALL_S)
        file.write(stage.lines(3))
    part.rename(stage.x)


@scene("Chrome: `.crdownload`, rename (played)")
def chrome(stage: Stage) -> None:
    part = stage.inbox / "x.jsonl.crdownload"
    with part.open("wb", buffering=0) as file:
        file.write(stage.lines(3))
        time.sleep(STALL_S)
        file.write(stage.lines(3))
    part.rename(stage.x)
