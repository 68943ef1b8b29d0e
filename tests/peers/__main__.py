"""`make peers`: drives sfwatch against other people's Files servers, and writes the table of docs/peers.md.

SFWATCH=PATH tries another installation than the one beside this Python.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

from peers.environments import HERE, Environment, install, python_for, serving
from peers.lossy import Fate, Lossy

SFWATCH = os.environ.get("SFWATCH") or str(Path(sys.executable).with_name("sfwatch"))
PAGE = Path(__file__).parents[2] / "docs/peers.md"
BEGIN, END = "<!-- written by make peers -->\n", "<!-- end of what make peers writes -->\n"
PYTHONS = {"aibrix": ((3, 10), (3, 12), "bookworm"), "ogx": ((3, 12), (3, 13), "trixie")}
ODD = [
    *("two words.jsonl", "two_words.jsonl", "批量 请求.jsonl", "批量_请求.jsonl", "'one' \"two\".jsonl"),
    *("UPPER.JSONL", "upper.jsonl", "é.jsonl", "e\u0301.jsonl", "长" * 83 + ".jsonl", "x" * 249 + ".jsonl"),
    *("a..b.jsonl", "semi;colon=%41.jsonl", "back\\slash.jsonl", "tab\t.jsonl", "batch-0123456789ab.jsonl"),
]
NAMES = ODD + [f"requests-{number:03}.jsonl" for number in range(120)]
PLANS = {
    0: [Fate.ANSWER_LOST],
    3: [Fate.NOT_SENT, Fate.ANSWER_LOST],
    6: [Fate.ANSWER_LOST],
    9: [Fate.HALF_SENT],
}


def server(package: str, home: Environment, port: int) -> list[str]:
    """The command that serves files on loopback, beginning with none."""
    into = home.command("/usr/bin/env", "-C", f"{home.folder}/data", f"HOME={home.folder}/data")
    if package == "aibrix":
        words = ["aibrix_metadata", "--dry-run", "--host", "127.0.0.1"]
    else:  # it binds to all interfaces unless its configuration says otherwise
        make = [*into, f"{home.folder}/bin/ogx", "run", "--providers", "files=inline::localfs", "--dry-run"]
        subprocess.run([*make, "--insecure"], check=True, capture_output=True)
        config = "data/.ogx/distributions/providers-run/config.yaml"
        text = (home.outside / config).read_text().replace("  host: null\n", "  host: 127.0.0.1\n")
        (home.outside / config).write_text(text)
        words = ["ogx", "run", f"{home.folder}/{config}", "--insecure"]
    return [*into, f"{home.folder}/bin/{words[0]}", *words[1:], "--port", str(port)]


def fate(number: int, attempt: int) -> Fate:
    """Odd names and every sixth other file lose their answer; every sixth is cut, and some lose it then."""
    plan = PLANS.get(0 if number < len(ODD) else number % 12, [])
    return plan[attempt - 1] if attempt <= len(plan) else Fate.PASSES


def content(number: int) -> bytes:
    """A batch file; all have the same size and number of lines."""
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
    line = {"custom_id": f"peer-{number:04}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line).encode() + b"\n"


def post(url: str, name: str, number: int) -> str:
    """Upload a file as somebody else: the name that the peer answers."""
    head = '--xx\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--xx\r\n'
    head += f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    form = {"Content-Type": "multipart/form-data; boundary=xx"}
    asked = urllib.request.Request(url, head.encode() + content(number) + b"\r\n--xx--\r\n", form)
    with urllib.request.urlopen(asked) as answer:
        return str(json.load(answer)["filename"])


def others(url: str) -> str:
    """Upload files with our names and sizes, and odd names as they are: what the peer makes of those."""
    for number in range(110):
        post(url, NAMES[-1 - number], 9000 + number)
    kept = {name: post(url, name, 9500) for name in ODD if '"' not in name and name.isprintable()}
    gone = {repr(c) if c.isascii() else "non-ASCII" for old, new in kept.items() for c in old if c not in new}
    come = {c for old, new in kept.items() for c in new if c not in old}
    told = f"; {' '.join(sorted(gone))} become {' '.join(sorted(come))}" if gone else ""
    return f"keeps {sum(old == new for old, new in kept.items())} of {len(kept)}" + told


def upload(lossy: Lossy, folder: Path, url: str) -> str:
    """Drop all files; kill sfwatch when many answers are lost, let others upload, let it run to the end."""
    config, inbox = folder / "sfwatch.yaml", folder / "inbox"
    inbox.mkdir()
    for number, name in enumerate(NAMES):
        (inbox / name).write_bytes(content(number))
    config.write_text(
        f"api: {{base_url: 'http://127.0.0.1:{lossy.server_port}/v1'}}\n"
        f"inboxes: [{{path: '{inbox}', settle: 100ms}}]\n"
        "uploads: {first_retry: 200ms, longest_retry: 2s, reconcile_window: 2s}\n"
        f"state_dir: '{folder}/state'\nlog: {{format: json, level: debug, file: '{folder}/log'}}\n"
    )
    run = [SFWATCH, "run", "-c", str(config)]
    environ = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "SILICONFLOW_API_KEY": "sk-peers"}
    with subprocess.Popen(run, env=environ) as first:
        while lossy.fates[Fate.ANSWER_LOST] < 30 and first.poll() is None:
            time.sleep(0.01)
        first.kill()
    names = others(url)
    filed = quiet_s = 0
    with subprocess.Popen(run, env=environ) as second:
        while filed < len(NAMES) and quiet_s < 45:
            time.sleep(1)
            before, filed = filed, len([*folder.glob("done/*.json"), *folder.glob("failed/*.json")])
            quiet_s = quiet_s + 1 if filed == before else 0
        second.terminate()
    if second.returncode:
        raise SystemExit(f"sfwatch ended with {second.returncode}: see {folder}/log")
    return names


def judge(folder: Path, files: list[tuple[str, str]], lossy: Lossy) -> dict[str, Any]:
    """What became of the files; `files`: ids and digests of all that the peer has."""
    sidecars = [json.loads(path.read_bytes()) for path in folder.glob("done/*.fileid.json")]
    failed = len(list(folder.glob("failed/*.error.json")))
    copies = Counter(digest for _, digest in files)
    right = {s["id"] for s in sidecars if dict(files).get(s["id"]) == s["sfwatch"]["sha256"]}
    ours = [copies[sha256(content(number)).hexdigest()] for number in range(len(NAMES))]
    return {
        "files": len(NAMES),
        "answers lost": lossy.fates[Fate.ANSWER_LOST],
        "uploads cut": lossy.fates[Fate.NOT_SENT] + lossy.fates[Fate.HALF_SENT],
        "found by listing": sum(s["sfwatch"]["recovered"] for s in sidecars),
        "sent again": sum(lossy.attempts.values()) - len(lossy.attempts),
        "doubles": sum(count - 1 for count in ours if count),
        "wrong id": len(sidecars) - len(right),
        "failed": failed,
        "undecided": len(NAMES) - len(sidecars) - failed,
    }


def try_out(package: str, client: Environment) -> dict[str, Any]:
    """One peer's row of the table."""
    home = install(package, *python_for(*PYTHONS[package]))
    for name in ("data", "run"):
        shutil.rmtree(home.outside / name, ignore_errors=True)
        (home.outside / name).mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    with serving(home, server(package, home, port), port):
        with Lossy(port, fate) as lossy:
            names = upload(lossy, home.outside / "run", f"{url}/files")
            lossy.shutdown()
        seen = json.loads(client.run("python", str(Path(__file__).with_name("look.py")), url))
    version = home.run("python", "-c", f"import importlib.metadata as m; print(m.version('{package}'))").strip()
    figures = judge(home.outside / "run", seen["files"], lossy)
    return {"peer": f"{package} {version}"} | figures | {"names": names, "paging": seen["paging"]}


def main() -> None:
    client = install("openai", HERE, sys.executable)
    rows = [try_out(package, client) for package in PYTHONS]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    table = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    print(table)
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")
    sys.exit(any(row[bad] for row in rows for bad in ("doubles", "wrong id", "failed")))


if __name__ == "__main__":
    main()
