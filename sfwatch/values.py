"""What is written behind a key: each kind of value is read from its text, or it is said what to write instead.

Values are taken from the text as it was written, never as YAML 1.1 would read it: `name: on` is the name "on",
`name: 010` is "010", and `1:30` is no duration (YAML makes it 90).

What is refused is quoted only if it is short, and none of an address or path is: it could be the API key.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

ELSEWHERE = (
    "the API key does not belong in this file: put it, alone, into a file of its own and name that as "
    "api.key_file, or hand it over as the systemd credential siliconflow-api-key or in $SILICONFLOW_API_KEY"
)
"""What to say to whoever has written down the key."""
_OUR_SUFFIXES = (".fileid.json", ".error.json")


class Wrong(ValueError):  # noqa: N818 - of the value, not of the program
    """A value that is not what its key takes; the text says what would be."""


_SECONDS = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600), "d": Decimal(86400)}
_BYTES = {"B": 1} | {
    prefix + unit: base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,9})?)"
_DURATION = re.compile(_NUMBER + f"({'|'.join(_SECONDS)})")
_SIZE = re.compile(_NUMBER + f"({'|'.join(_BYTES)})")
_WHOLE = re.compile("0|[1-9][0-9]{0,8}")
_PURPOSE = re.compile("[A-Za-z0-9_.-]{1,64}")
_TOKEN = re.compile("[A-Za-z0-9_-]{32,}")
FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def seconds(text: str) -> float:
    """Seconds of a duration such as `500ms`, `1.5s`, `2m`, `24h`, `7d`. Raises `Wrong`."""
    found = _DURATION.fullmatch(text)
    if found is None:
        bare = re.fullmatch(_NUMBER, text)
        hint = (
            f"{text}s, {text}m or {text}h" if bare else "a number and ms, s, m, h or d, such as 500ms, 5s, 2m"
        )
        raise Wrong(f"{shown(text)} is no duration: write {hint}")
    return float(Decimal(found[1]) * _SECONDS[found[2]])


def size(text: str) -> int:
    """Bytes of a size such as `64KB` (powers of ten) or `64KiB` (powers of two). Raises `Wrong`."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise Wrong(f"{shown(text)} is no size: write {_size_meant(text)}")
    return int(Decimal(found[1]) * _BYTES[found[2]])


def _size_meant(text: str) -> str:
    if not re.fullmatch(_NUMBER, text):
        return "a number and B, KB, MB, GB (or KiB, MiB, GiB)"
    if "." in text:
        return f"{text}KB, {text}MB or {text}GB"
    return _written_size(int(text))


def _written_size(size: int) -> str:
    """A number of bytes as it is written here: the same value in the largest unit that it is a multiple of."""
    unit = max((unit for unit in _BYTES if size % _BYTES[unit] == 0), key=_BYTES.__getitem__)
    return f"{size // _BYTES[unit]}{unit}" if size else "0B"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value looks like: `form` in words, and `read` from its text, which raises `Wrong`.

    `unit` ends the name of its field in settings.py. `empty`: null is a value (none, or the computed default).
    `schema` is the same for editors, in JSON schema: what can be said there is said, `read` has the last word.
    """

    form: str
    read: Callable[[str], Any]
    unit: str = ""
    empty: bool = False
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string", "minLength": 1})


def duration(least: str, most: str) -> Kind:
    def fits(text: str) -> bool:
        return seconds(least) <= seconds(text) <= seconds(most)

    def read(text: str) -> float:
        if re.fullmatch(_NUMBER, text):
            meant = [f"{text}{unit}" for unit in "smh" if fits(f"{text}{unit}")]
            raise Wrong(f"{shown(text)} is no duration: write {_any_of(meant) or f'{least} to {most}'}")
        if not fits(text):
            raise Wrong(f"{shown(text)} is out of bounds: write {least} to {most}")
        return seconds(text)

    return Kind(f"a duration, {least} to {most}", read, unit="_s", schema=_like(_DURATION))


def _like(pattern: re.Pattern[str]) -> Mapping[str, Any]:
    return {"type": "string", "pattern": f"^{pattern.pattern}$"}


def _any_of(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def whole(least: int, most: int) -> Kind:
    form = f"a whole number, {least} to {most}"

    def read(text: str) -> int:
        if not _WHOLE.fullmatch(text) or not least <= int(text) <= most:
            raise Wrong(f"{shown(text)} is not {form}")
        return int(text)

    return Kind(form, read, schema={"type": "integer", "minimum": least, "maximum": most})


def or_word(word: str, value: Any, kind: Kind) -> Kind:
    def read(text: str) -> Any:
        try:
            return value if text == word else kind.read(text)
        except Wrong as wrong:
            if re.fullmatch(r"0+[a-zA-Z]*", text):  # what others write for none
                raise Wrong(f"{str(wrong).partition(':')[0]}: write {word}") from None
            raise

    either = [{"enum": [0, word] if word == "0" else [word]}, kind.schema]
    return replace(kind, form=f"{word}, or {kind.form}", read=read, schema={"anyOf": either})


def choice(words: Iterable[str], make: Callable[[str], Any] = str) -> Kind:
    known = list(words)

    def read(text: str) -> Any:
        if text not in known:
            raise Wrong(f"{shown(text)} is none of {', '.join(known)}")
        return make(text)

    return Kind(f"one of {', '.join(known)}", read, schema={"enum": known})


def enum(kind: type[StrEnum]) -> Kind:
    return choice((member.value for member in kind), kind)


def _read_rate(text: str) -> int:
    rate = size(text)
    if rate < size("1KB"):
        raise Wrong(f"{shown(text)} a second is too slow for any file: write 1KB or more, or unlimited")
    return rate


def _read_line(text: str) -> str:
    if not text.strip() or any(unicodedata.category(char) in {"Cc", "Cs", "Zl", "Zp"} for char in text):
        raise Wrong("is empty, or has control characters in it")
    return text


def _read_path(text: str) -> Path:
    _read_line(text)
    if text[0] in "~$":
        raise Wrong(f"`{text[0]}` is not expanded: write the path out, or relative to this file's folder")
    return Path(text)


def read_key_file(text: str) -> Path:
    if _TOKEN.fullmatch(text):
        raise Wrong(f"looks like the key itself (for a file of that name write ./ before it): {ELSEWHERE}")
    return _read_path(text)


def read_pattern(text: str) -> str:
    if not text or "/" in _read_line(text):
        raise Wrong('must be a pattern for names, such as "*.jsonl", without /')
    return text


def read_purpose(text: str) -> str:
    if not _PURPOSE.fullmatch(text):
        raise Wrong("must be letters, digits, and _ . - (at most 64), such as batch")
    return text


def read_marker(text: str) -> str:
    if "/" in _read_line(text) or text.lower().endswith((".jsonl", *_OUR_SUFFIXES)):
        raise Wrong(
            f'must be an ending such as ".ok", without /, and none of .jsonl, {", ".join(_OUR_SUFFIXES)}'
        )
    return text


def _read_url(text: str) -> str:
    """An address without its final slash, host in lower case. Never quoted: it may hold a password."""
    if not re.fullmatch(r"[!-~]+", text) or set(text) & set('\\"<>^`{|}'):
        raise Wrong("has characters that no address has: write it like https://api.siliconflow.cn/v1")
    url = _split(text)
    if url.scheme not in {"http", "https"} or not url.hostname:
        raise Wrong("must begin with https:// and a host: write it like https://api.siliconflow.cn/v1")
    if "@" in url.netloc:
        raise Wrong(f"must not hold a user or password; {ELSEWHERE}")
    if "?" in text or "#" in text:
        raise Wrong("must end with the path: no ? and no #")
    return f"{url.scheme}://{url.netloc.lower()}{url.path.rstrip('/')}"


def _split(text: str) -> SplitResult:
    try:
        url = urlsplit(text)
        _ = url.port  # checked only when asked for
    except ValueError:  # its text may quote the address
        raise Wrong("has a host or port that can't be: write it like https://api.siliconflow.cn/v1") from None
    return url


PATH = Kind("a path", _read_path)
MAYBE_PATH = replace(PATH, empty=True)
MAYBE_LINE = Kind("text", _read_line, empty=True)
BOOL = Kind("true or false", lambda text: FLAGS[text.lower()], schema={"type": "boolean"})
SIZE = Kind("a size", size, schema=_like(_SIZE))
RATE = Kind("a size a second, from 1KB", _read_rate, schema=_like(_SIZE))
URL = Kind("an address", _read_url, schema={"type": "string", "pattern": "^https?://[^@?#]+$"})


def looks_secret(text: str) -> bool:
    return bool(re.match(r"\s*(bearer\s|sk-[^*?\[]*$)", text, re.IGNORECASE))


def shown(text: str) -> str:
    """A value in quotes if it is so short and plain that it can't be a key."""
    return repr(text) if len(text) <= 20 and "sk-" not in text.lower() else "this"
