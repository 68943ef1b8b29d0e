"""A whole session as an operator would see it: TLS by nginx with a CA of its own, three kinds of real work.

    make session            (as root on Debian: installs nginx-light if it is missing)

A batch of 5,000 requests made from real text (the sources of Python's own library), a file of about 1 GB for
another inbox, and a hundred small files for both. Prints the log lines of interest and the measured figures;
fails if a file did not arrive whole.
"""

import argparse
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from servers import Authority

KEY = "sk-session-not-a-real-key"
NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 256; }}
http {{
  access_log off; client_max_body_size 2g;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{
    listen 127.0.0.1:{port} ssl; ssl_certificate {chain}; ssl_certificate_key {key};
    ssl_protocols TLSv1.3; client_body_buffer_size 1m;
    location / {{
      proxy_pass http://127.0.0.1:{upstream}; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_request_buffering off; proxy_buffering off; proxy_read_timeout 600s; keepalive_requests 100000;
    }}
  }}
}}
"""
STAND_IN = f"""
import sys
from sfwatch.standin import StandIn
with StandIn(key={KEY!r}) as it:
    print(it.base_url, flush=True)
    sys.stdin.read()
    for stored in it.stored:
        print(stored.sha256, flush=True)
"""


def passages() -> list[str]:
    """Real text: the paragraphs of Python's own library."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = (path.read_text(errors="ignore") for path in sorted(library.glob("*.py")))
    return [part.strip() for text in texts for part in re.split(r"\n\s*\n", text) if len(part) > 200]


def request(number: int, text: str) -> str:
    """One line of a batch input file."""
    messages = [
        {"role": "system", "content": "Say in one sentence what this does."},
        {"role": "user", "content": text},
    ]
    body = {"model": "deepseek-ai/DeepSeek-V3", "messages": messages, "max_tokens": 200}
    return json.dumps(
        {"custom_id": f"passage-{number:05d}", "method": "POST", "url": "/v1/chat/completions", "body": body},
        ensure_ascii=False,
    )


def long_texts(texts: list[str], size: int) -> Iterator[str]:
    """Join passages to texts of about this many characters each."""
    endless = itertools.cycle(texts)
    while True:
        parts, length = [], 0
        while length < size:
            parts.append(next(endless))
            length += len(parts[-1])
        yield "\n\n".join(parts)[:size]


def write(path: Path, lines: Iterator[str]) -> None:
    """Write a file of these lines."""
    with path.open("w") as file:
        file.writelines(f"{line}\n" for line in lines)


def make_work(folder: Path) -> None:
    """Make the files of the session."""
    texts = passages()
    write(folder / "passages.jsonl", (request(n, texts[n % len(texts)]) for n in range(5000)))
    long = itertools.islice(long_texts(texts, 185_000), 5000)
    write(folder / "library.jsonl", (request(n, text) for n, text in enumerate(long)))
    for number in range(100):
        part = ((n, texts[(number * 10 + n) % len(texts)]) for n in range(10))
        write(folder / f"eval-{number:03d}.jsonl", (request(n, text) for n, text in part))


def configure(folder: Path, port: int, bundle: Path) -> Path:
    """Write the operator's configuration."""
    (folder / "key").write_text(KEY)
    (folder / "key").chmod(0o600)
    for name in ("evals", "nightly"):
        (folder / name).mkdir(exist_ok=True)
    config = folder / "sfwatch.yaml"
    config.write_text(
        f"api:\n  base_url: https://localhost:{port}/v1\n  key_file: key\n  ca_bundle: {bundle}\n"
        "inboxes:\n  - {path: evals/inbox, name: evals}\n  - {path: nightly/inbox, name: nightly}\n"
        "state_dir: state\n"
    )
    return config


def memory_kb(pid: int, field: str) -> int:
    """Return VmRSS or VmHWM of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+)", status)
    return int(found[1]) if found else 0


class Events:
    """The daemon's log, as far as it has come."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> list[dict[str, Any]]:
        """Return every event so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def await_done(self, count: int) -> None:
        """Wait until this many files are done."""
        for _ in range(3000):
            if sum(event["event"] == "file.done" for event in self.all()) >= count:
                return
            time.sleep(0.02)
        raise SystemExit(f"only {self.all()[-1]} after a minute")


def work(folder: Path, pid: int, events: Events) -> dict[str, float]:
    """Drop the files as people would, and measure."""
    figures = {"idle_mb": memory_kb(pid, "VmRSS") / 1000}
    shutil.copy(folder / "work/passages.jsonl", folder / "evals/inbox")
    events.await_done(1)
    (folder / "work/library.jsonl").rename(folder / "nightly/inbox/library.jsonl")
    events.await_done(2)
    figures["peak_mb"] = memory_kb(pid, "VmHWM") / 1000
    small = sorted((folder / "work").glob("eval-*.jsonl"))
    began = time.time()
    for number, path in enumerate(small):
        path.rename(folder / ("evals", "nightly")[number % 2] / "inbox" / path.name)
    events.await_done(102)
    ended = max(_at(event) for event in events.all() if event["event"] == "file.done")
    figures["small_files_per_s"] = 100 / (ended - began)
    return figures


def _at(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["timestamp"]).timestamp()


def main() -> None:
    """Run the session."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None)
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="sfwatch-session-"))
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("nginx") is None:
        subprocess.run(["apt-get", "install", "-y", "-qq", "nginx-light"], check=True, stdout=2)
    (folder / "work").mkdir()
    make_work(folder / "work")
    with tempfile.TemporaryDirectory(prefix="sfwatch-tls-") as tls:
        session(folder, Path(tls))


def session(folder: Path, tls: Path) -> None:
    """Start everything, work, stop everything, and say what came of it."""
    authority = Authority(tls)
    chain, key = authority.issue("DNS:localhost")
    python = sys.executable
    stand_in = subprocess.Popen(
        [python, "-c", STAND_IN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert stand_in.stdout
    upstream = stand_in.stdout.readline().strip().rsplit(":", 1)[1].split("/")[0]
    conf = tls / "nginx.conf"
    conf.write_text(NGINX.format(folder=tls, port=8443, chain=chain, key=key, upstream=upstream))
    nginx = subprocess.Popen(["nginx", "-c", str(conf)])
    log = folder / "log.jsonl"
    with log.open("w") as output:
        config = configure(folder, 8443, authority.certificate)
        command = [str(Path(python).with_name("sfwatch")), "run", "-c", str(config)]
        sfwatch = subprocess.Popen(command, stdout=output)
    time.sleep(2)
    try:
        figures = work(folder, sfwatch.pid, Events(log))
    finally:
        sfwatch.send_signal(signal.SIGTERM)
        sfwatch.wait(60)
        nginx.terminate()
    received, _ = stand_in.communicate()
    events = Events(log).all()
    sent = sorted(event["sha256"] for event in events if event["event"] == "file.done")
    assert sent == sorted(received.split()), "what arrived is not what was done"
    large = [event for event in events if event.get("file") == "library.jsonl"]
    figures["library_size"] = large[-1]["size"]
    figures["library_total_s"] = large[-1]["total_s"]
    figures["library_upload_s"] = next(e["duration_s"] for e in large if e["event"] == "upload.accepted")
    for event in events:
        if event["event"].startswith("daemon") or event.get("file") in ("passages.jsonl", "library.jsonl"):
            print(json.dumps(event))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
