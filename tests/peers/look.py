"""What the official openai client sees at the peer `look.py URL`, as JSON; its environment's Python runs it."""

import hashlib
import json
import sys
from typing import Any

from openai import APIStatusError, OpenAI  # type: ignore[import-not-found]


def main() -> None:
    client = OpenAI(base_url=sys.argv[1], api_key="none")
    listed = list(client.files.list(limit=100))
    files = [(f.id, hashlib.sha256(client.files.content(f.id).read()).hexdigest()) for f in listed]
    if [f.id for f in client.files.list()] != [f.id for f in listed] or len(dict(files)) != len(files):
        raise SystemExit("a file is listed twice, or not with each limit")
    json.dump({"files": files, "paging": "; ".join(paging(client, listed))}, sys.stdout)


def paging(client: Any, listed: list[Any]) -> list[str]:
    """How the peer pages, in a few words each."""

    def told(**params: Any) -> str:
        try:
            page = client.files.list(**params)
        except APIStatusError as refused:
            return f"status {refused.status_code}"
        return f"{len(page.data)} and {'more' if page.has_more else 'no more'}"

    times = [f.created_at for f in listed]
    falling, unit = times == sorted(times, reverse=True), "s" if max(times) < 1e11 else "ms"
    following = client.files.list(limit=10, after=listed[4].id).data
    return [
        f"times in {unit} that {'never increase' if falling else 'are not in falling order'}",
        f"of {len(listed)}: no limit {told()}",
        *(f"limit {limit}: {told(limit=limit)}" for limit in (100, 101, 10_000, 100_000)),
        "`after` "
        + ("works" if [f.id for f in following] == [f.id for f in listed[5:15]] else "does not work"),
        f"after the last but ten, limit 10: {told(limit=10, after=listed[-11].id)}",
        f"after the last: {told(limit=10, after=listed[-1].id)}",
        f"after an unknown id: {told(limit=10, after='file-' + '0' * 32)}",
    ]


if __name__ == "__main__":
    main()
