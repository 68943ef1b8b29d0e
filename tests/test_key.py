"""Where the key comes from, and that it shows up nowhere."""

import copy
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfwatch import key
from sfwatch.key import Key, NoKey
from sfwatch.settings import Api

SECRET = "sk-abcdefghijklmnopqrstuvwxyz"
ENVIRON = {"SILICONFLOW_API_KEY": "sk-of-the-environment"}


def key_file(folder: Path, content: bytes, *, mode: int = 0o600) -> Api:
    path = folder / "key"
    path.write_bytes(content)
    path.chmod(mode)
    return Api(key_file=path)


def attempt(environ: dict[str, str]) -> Key | NoKey:
    try:
        return key.read(Api(), environ)
    except NoKey as error:
        return error


def credentials(folder: Path, content: bytes | None) -> dict[str, str]:
    if content is not None:
        (folder / "siliconflow-api-key").write_bytes(content)
    return {"CREDENTIALS_DIRECTORY": str(folder)}


@pytest.mark.parametrize("form", [repr, str, "{}".format, "{:>20}".format, "{!r}".format, lambda k: f"{[k]}"])
def test_a_key_prints_as_stars(form: Callable[[Key], str]) -> None:
    """However a key is turned into text, alone or inside something, the secret is not in it."""
    assert SECRET not in form(Key(SECRET))
    assert "***" in form(Key(SECRET))


def test_a_key_is_compared_and_revealed() -> None:
    """Two keys are equal when their secrets are, and `reveal` is what gives one away."""
    assert Key(SECRET).reveal() == SECRET
    assert Key(SECRET) == Key(SECRET)
    assert Key(SECRET) != Key("sk-other")
    assert Key(SECRET) != SECRET
    assert len({Key(SECRET), Key(SECRET), Key("sk-other")}) == 2


@pytest.mark.parametrize("spread", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_key_is_not_written_anywhere(spread: Callable[[Key], object]) -> None:
    """Pickling and copying are refused, without the secret in the error."""
    with pytest.raises(TypeError) as caught:
        spread(Key(SECRET))
    assert SECRET not in str(caught.value)


def test_the_key_file_comes_first(tmp_path: Path) -> None:
    """A key file wins over the credential, and whitespace around the key is dropped."""
    api = key_file(tmp_path, b" \t" + SECRET.encode() + b" \r\n\n")
    environ = ENVIRON | credentials(tmp_path, b"sk-of-the-credential")
    assert key.read(api, environ) == Key(SECRET)
    assert key.source(api, environ) == f"file {tmp_path}/key"


def test_the_credential_comes_before_the_environment(tmp_path: Path) -> None:
    """Without a key file the systemd credential is used though the variable is set."""
    environ = ENVIRON | credentials(tmp_path, b"sk-of-the-credential\n")
    assert key.read(Api(), environ) == Key("sk-of-the-credential")
    assert key.source(Api(), environ) == "credential siliconflow-api-key"


def test_the_environment_comes_last(tmp_path: Path) -> None:
    """A folder of credentials without ours falls through to the variable."""
    environ = ENVIRON | credentials(tmp_path, None)
    assert key.read(Api(), environ) == Key("sk-of-the-environment")
    assert key.source(Api(), environ) == "environment SILICONFLOW_API_KEY"


@pytest.mark.parametrize("environ", [{}, {"SILICONFLOW_API_KEY": " \n"}, {"CREDENTIALS_DIRECTORY": ""}])
def test_no_key_at_all(environ: dict[str, str]) -> None:
    """Where nothing names a key, the error names the three places."""
    assert key.source(Api(), environ) == "none"
    with pytest.raises(NoKey, match=r"key_file.*siliconflow-api-key.*SILICONFLOW_API_KEY") as caught:
        key.read(Api(), environ)
    assert caught.value.reason == "no_key"


def test_a_key_file_is_read_anew(tmp_path: Path) -> None:
    """A key that was exchanged in its file is used by the next call."""
    api = key_file(tmp_path, b"sk-old")
    assert key.read(api, {}) == Key("sk-old")
    key_file(tmp_path, b"sk-new")
    assert key.read(api, {}) == Key("sk-new")


def test_a_linked_key_file_is_followed(tmp_path: Path) -> None:
    """Admins link key files: the link is followed."""
    api = key_file(tmp_path, SECRET.encode())
    link = tmp_path / "link"
    link.symlink_to("key")
    assert api.key_file is not None
    assert key.read(Api(key_file=link), {}) == Key(SECRET)


def make_nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_nothing, "key_missing"),
        (Path.mkdir, "key_unreadable"),
        (os.mkfifo, "key_unreadable"),
        (Path.touch, "key_empty"),
        (lambda path: path.write_bytes(b" \n\t"), "key_empty"),
        (lambda path: path.symlink_to(path), "key_unreadable"),
    ],
)
def test_a_key_file_that_is_no_use_does_not_fall_through(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    """A key file that is named but missing, unreadable or empty is an error, though the variable is set."""
    make(tmp_path / "key")
    with pytest.raises(NoKey) as caught:
        key.read(Api(key_file=tmp_path / "key"), ENVIRON)
    assert caught.value.reason == reason
    assert str(tmp_path / "key") in caught.value.detail
    assert caught.value.next_step


def test_an_empty_credential_does_not_fall_through(tmp_path: Path) -> None:
    """A credential that is there and empty is an error of its own."""
    with pytest.raises(NoKey) as caught:
        key.read(Api(), ENVIRON | credentials(tmp_path, b""))
    assert caught.value.reason == "key_empty"


MALFORMED = [
    b"sk-two words",
    b"sk-line\nsk-other",
    b"sk-nul\0nul",
    b"sk-escape\x1b[31m",
    b"sk-del\x7f",
    "sk-ünïcode".encode(),
    b"sk-latin\xe9",
    b"\xef\xbb\xbfsk-bom",
    b"sk-" + b"a" * 4096,
    b"sk-" + b"a" * 1_000_000,
    b'"sk-quoted"',
    b"SILICONFLOW_API_KEY=sk-shell",
    b"Bearer sk-header",
]


@pytest.mark.parametrize("content", MALFORMED, ids=range(len(MALFORMED)))
def test_what_can_not_be_a_key_is_refused_unquoted(tmp_path: Path, content: bytes) -> None:
    """A key that can't stand in a header is refused; neither the error nor its traceback quotes any of it."""
    with pytest.raises(NoKey) as caught:
        key.read(key_file(tmp_path, content), {})
    assert caught.value.reason == "key_malformed"
    told = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    frames = told[told.index("sfwatch/key.py") :]  # this test's own locals hold the content
    assert "sk-" not in str(caught.value)
    assert "sk-" not in frames


def test_a_key_of_the_greatest_length_is_taken(tmp_path: Path) -> None:
    """4 KiB are a key still, and base64 padding is no NAME=."""
    longest = "a" * 4094 + "=="
    assert key.read(key_file(tmp_path, longest.encode()), {}).reveal() == longest


def test_a_malformed_variable_is_refused() -> None:
    """The variable goes through the same inspection, surrogates of undecodable bytes included."""
    for value in ("sk-two words", "sk-\udce9", "sk-\ud800"):
        with pytest.raises(NoKey) as caught:
            key.read(Api(), {"SILICONFLOW_API_KEY": value})
        assert caught.value.reason == "key_malformed"
        assert "sk-" not in str(caught.value)


@given(st.text(max_size=60))
def test_any_variable_is_a_key_or_an_error(value: str) -> None:
    """Whatever the variable holds, the outcome is a header-safe key or `NoKey`, and neither prints it."""
    found = attempt({"SILICONFLOW_API_KEY": value})
    if isinstance(found, NoKey):
        assert found.reason in {"no_key", "key_malformed"}
        assert len(value) < 6 or value not in str(found)  # shorter ones occur in any sentence
    else:
        assert found.reveal() == value.strip()
        assert found.reveal().isascii()
        assert found.reveal().isprintable()
        assert repr(found) == "Key(***)"


@pytest.mark.parametrize(("mode", "warned"), [(0o600, 0), (0o640, 0), (0o644, 1), (0o602, 1), (0o601, 1)])
def test_a_key_file_that_everybody_can_reach_is_warned_of(tmp_path: Path, mode: int, warned: int) -> None:
    """Permissions for others on a key file give one sentence with what to do; those of the group give none."""
    told = key.warnings(key_file(tmp_path, SECRET.encode(), mode=mode), {})
    assert len(told) == warned
    assert all("chmod o= " in sentence and SECRET not in sentence for sentence in told)


def test_other_places_are_not_warned_of(tmp_path: Path) -> None:
    """Credentials and missing files give no warning about permissions."""
    environ = credentials(tmp_path, SECRET.encode())
    (tmp_path / "siliconflow-api-key").chmod(0o444)
    assert key.warnings(Api(), environ) == []
    assert key.warnings(Api(key_file=tmp_path / "missing"), environ) == []


def test_how_a_new_key_comes_to_count(tmp_path: Path) -> None:
    """A key file is read anew for each request; what systemd or a shell hands over is that of the start."""
    assert key.renewal(Api(key_file=tmp_path / "key")) == f"a new key in {tmp_path / 'key'} counts at once"
    assert key.renewal(Api()) == "a new key counts once sfwatch is restarted"
