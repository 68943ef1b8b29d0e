"""The README says what the code does: its tables are held against the lists in the code, both ways."""

import ast
import dataclasses
import itertools
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from test_metrics import busy

from sfwatch import check, cli, exits, logs, metrics, record, status
from sfwatch.check_page import JsonPage
from sfwatch.delivery.recovery import WHY_UNDECIDED
from sfwatch.lint import FileReport
from sfwatch.verdict import Reason

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def table(header: str) -> list[list[str]]:
    """Return the rows of all tables with this header line, each a list of its cells."""
    rows = []
    for rest in README.split(f"\n{header}\n")[1:]:
        lines = itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines()[1:])
        rows += [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows, header
    return rows


def code(cell: str) -> str:
    """Return what stands between backticks."""
    return str(re.findall("`([^`]+)`", cell)[0])


def test_events_are_those_of_the_log() -> None:
    """The README's table of events has every event, its level and its keys, and no other."""
    told = {
        code(name): (level, re.findall("`([^`]+)`", keys))
        for name, level, _, keys in table("| event | level | when | keys |")
    }
    assert told == {name: (event.level, list(event.keys)) for name, event in logs.EVENTS.items()}


def test_keys_are_those_of_the_log() -> None:
    """The README's table of keys has every key with the meaning that the code gives it."""
    rows = README.partition("| event | level")[2].partition("| key | meaning |\n|---|---|\n")[2]
    told = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", rows.partition("\n\n")[0], flags=re.MULTILINE))
    assert told == dict(logs.KEYS)


def test_terminal_events_are_marked() -> None:
    """What the README calls terminal is what the code calls terminal."""
    rows = table("| event | level | when | keys |")
    assert {code(row[0]) for row in rows if "**terminal**" in row[2]} == logs.TERMINAL


def test_reasons_of_reports() -> None:
    """The README explains each reason that a report can give, and no other."""
    assert [code(row[0]) for row in table("| `reason` | meaning |")] == list(record.NEXT_STEPS)


def test_exit_statuses() -> None:
    """The README's exit statuses are the code's."""
    statuses = {status for name, status in vars(exits).items() if name.isupper()}
    assert {int(row[0]) for row in table("| exit status | meaning |")} == statuses


def test_commands() -> None:
    """Every command is in the README's table, and nothing that is no command."""
    told = {code(row[0]).split()[1] for row in table("| command | what it does |")}
    assert told - {"--version"} == set(cli.commands.commands)


@pytest.mark.parametrize("section", ["`NAME.fileid.json`", "`NAME.error.json`"])
def test_fields_of_documents(section: str) -> None:
    """The README names every field of a sidecar and of a report, in their order."""
    told = table_after(section)
    facts = {"sha256": "0" * 64, "size": 1, "inbox": "i", "original_name": "n", "version": "v"}
    if "error" in section:
        document = record.report(reason="empty", detail="d", attempts=0, failed_at="t", **facts)  # type: ignore[arg-type]
        assert told == list(json.loads(document))
    else:
        shown = README.partition('```json\n{\n  "id"')[2].partition("```")[0]
        assert told == list(json.loads('{"id"' + shown)["sfwatch"])


def test_warnings() -> None:
    """The README explains each warning that a check can give, and no other."""
    source = (ROOT / "sfwatch" / "lint.py").read_text() + (ROOT / "sfwatch" / "check.py").read_text()
    about_all = set(re.findall(r'Finding\(\s*None, "([a-z_]+)"', source)) - record.NEXT_STEPS.keys()
    assert {code(row[0]) for row in table("| warning | meaning |")} == about_all | check.WARNINGS.keys()


def test_fields_of_a_check() -> None:
    """The README names every field of `check --json`, in their order."""
    printed: list[str] = []
    page = JsonPage(printed.append)
    page.file(FileReport("x", check.Checked("0", 0, 0)))
    page.end()
    said = json.loads("".join(printed))
    assert table_after("One object, whatever was asked for:") == list(said)
    assert table_after("and for each batch file") == list(said["files"][0])


def table_after(text: str) -> list[str]:
    """Return the first cells of the first table after this text."""
    rest = README.partition(f"\n{text}")[2]
    return re.findall(r"^\| `([^`]+)` \|", rest.partition("|---|---|\n")[2].partition("\n\n")[0], re.MULTILINE)


def test_modules() -> None:
    """The map names every module, and gives the first sentence of its docstring."""
    told = {row[0].partition("](")[2].rstrip(")"): row for row in table("| module | its rule |")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sfwatch").rglob("*.py")}
    assert told.keys() == {path for path in modules if not path.endswith("/__init__.py")}
    for path, (name, rule) in told.items():
        assert code(name) == Path(path).stem
        docstring = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
        assert " ".join(docstring.split()).startswith(rule), path


def test_log_lines_are_real() -> None:
    """The log lines shown have listed events and keys, in the order of the lists."""
    shown = README.partition('```json\n{"timestamp"')[2].partition("```")[0]
    for line in ('{"timestamp"' + shown).strip().splitlines():
        event = json.loads(line)
        listed = [*logs.ALWAYS, *logs.EVENTS[event["event"]].keys]
        assert list(event) == [key for key in listed if key in event]


def test_links_lead_somewhere() -> None:
    """To a file that is there, or to a heading of this page."""
    headings = [line.lstrip("# ") for line in README.splitlines() if re.match("##+ ", line)]
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", README)
    broken = [link for link in links if link.startswith("#") and link[1:] not in anchors]
    broken += [link for link in links if not re.match("#|https?:", link) and not (ROOT / link).exists()]
    assert links
    assert broken == []


def test_targets() -> None:
    """`make help` lists every target of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    told = re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
    assert targets == told


def test_every_module_has_tests() -> None:
    """Each module has a test file of its own name, or is tested with the loop, the delivery or the commands."""
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    modules = {path.stem for path in (ROOT / "sfwatch").rglob("*.py")}
    assert modules - tested == {
        "__init__",
        "__main__",
        "job",
        "settings",
        "core",
        "handout",
        "outcomes",
        "work",
        "exits",
        "launch",
        "terminal",
        "notes",
        "obstacles",
        "trial",
        "users",
        "language",
        "problems",
        "adopt",
        "inboxes",
        "taken",
        "send",
    }


def test_reasons_of_verdicts_are_codes() -> None:
    """Reasons in events are short codes, never sentences."""
    assert all(re.fullmatch("[a-z_]+", reason) for reason in Reason)


def test_fields_of_the_status() -> None:
    """The README names every field of the status document, in their order."""
    assert [code(row[0]) for row in table("| field of the status | meaning |")] == list(fields(status.Status))


def fields(kind: Any, prefix: str = "") -> Iterator[str]:
    """The paths of all that a document of this kind holds."""
    if isinstance(kind, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not types.NoneType)
    if get_origin(kind) is tuple:
        yield from fields(get_args(kind)[0], f"{prefix}[]")
    elif dataclasses.is_dataclass(kind):
        for name, inner in get_type_hints(kind).items():
            yield from fields(inner, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix


def test_reasons_of_the_status() -> None:
    """The README explains each reason for which a file waits."""
    section = README.partition("## When my file is not taken")[2].partition("\n## ")[0]
    told = re.findall("`([a-z_]+)`", " ".join(re.findall(r"^- ((?:`[a-z_]+`(?:, )?)+)", section, re.MULTILINE)))
    assert set(told) == set(status.REASONS)


def test_reasons_of_undecided_uploads() -> None:
    """The README explains each reason of `upload.undecided`, and no other."""
    rows = README.partition("- `unknown_outcome`")[2].partition("\n- ")[0]
    assert re.findall(r"^  \| `([a-z_]+)` \| .+ \|$", rows, re.MULTILINE) == ["reason", *WHY_UNDECIDED]


def test_metrics() -> None:
    """The README's table of metrics has each with its type and labels, and no other."""
    told = {
        code(name): (kind, re.findall("`([^`]+)`", labels))
        for name, kind, labels, _ in table("| metric | type | labels | meaning |")
    }
    assert told == {
        f"{family.name}_total" if family.type == "counter" else family.name: (
            family.type,
            [label for label in family.samples[0].labels if label != "le"],
        )
        for family in [*metrics._counted(*busy()), *metrics._gauged(busy()[0])]
    }
