"""One file, one request, one outcome; and the listing. HTTP is spoken here and in `wire` only.

Nothing is tried twice here and nothing is judged: a request ends in one `Attempt` that says what went out
and what came back, and no error of the network leaves this module as an exception.

Of `requests` only the adapter is used, no session: there `~/.netrc` overrides Authorization, redirects turn
POST into GET, and cookies stick. Proxies and CA bundles of the environment count all the same. `files=` would
build the body in memory: a `Form` streams it.
"""

import contextlib
import os
import re
import ssl
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import urllib3
import urllib3.exceptions
from requests.utils import DEFAULT_CA_BUNDLE_PATH, get_environ_proxies

from sfwatch.form import BrokenOff, Form, Pace, Reins
from sfwatch.settings import Api
from sfwatch.verdict import Answer, Attempt, Trouble, printable
from sfwatch.wire import Adapter, Failure, plain

__all__ = ["Client", "Pace"]

_ONCE = urllib3.Retry(0, read=False)
_AS_IT_IS: dict[str, Any] = {"retries": _ONCE, "redirect": False, "assert_same_host": False}
_TELLING = 8  # shorter "keys", as tests use them, occur in any text
_FOUND_THE_HOST = (Trouble.CONNECT, Trouble.RESET, Trouble.STALLED, Trouble.CUT)


class Client:
    """The way to one target; its connections are kept alive and shared by all threads that send.

    The key is an argument of each request and stands nowhere but in that request's Authorization header.
    Proxies, and the CA bundle if the settings name none, come from the environment as it is now.
    """

    def __init__(self, api: Api, *, connections: int, user_agent: str) -> None:
        self._api = api
        self._connections = connections
        self._url = api.base_url.rstrip("/") + "/files"
        self._proxies = get_environ_proxies(self._url)
        self._bundle = api.ca_bundle or _bundle_of_the_environment()
        self._timeout = urllib3.Timeout(connect=api.connect_timeout_s, read=api.read_timeout_s)
        self._way: tuple[urllib3.HTTPConnectionPool, str] | None = None
        self.host = urlsplit(self._url).netloc
        host = self.host.removesuffix(":443" if self._url.startswith("https:") else ":80")
        self._fields = {"Host": host, "Accept-Encoding": "identity", "User-Agent": user_agent}
        self.resolved = False

    def send(
        self,
        fd: int,
        size: int,
        *,
        remote_name: str,
        purpose: str,
        key: str,
        progress: Callable[[int], None] | None = None,
        stop: Callable[[], bool] | None = None,
        max_rate: Pace | None = None,
        approve: Callable[[str], bool] | None = None,
        moved: Callable[[], None] | None = None,
    ) -> Attempt:
        """Send the first `size` bytes behind `fd` as one file.

        `progress` gets the file's bytes that are out so far. Once `stop` says so, the request is broken off.
        `approve` gets the digest of the bytes before the body is closed; if it says no, the request is broken
        off too, and the service can't have taken the file. `moved` is called whenever any bytes go out, and
        while they wait for their turn.

        Raises ValueError for a name, purpose or key that does not fit into a header.
        """
        reins = Reins(progress, stop, max_rate, approve, moved)
        form = Form(fd, size, purpose=purpose, remote_name=remote_name, reins=reins)
        with contextlib.closing(form):
            return self._exchange("POST", "", key, form)

    def list_files(self, *, purpose: str, limit: int, key: str, after: str | None = None) -> Attempt:
        """Ask what the service has: `limit` entries at most, of those that follow the id `after`."""
        query: dict[str, str | int] = {"purpose": purpose, "limit": limit}
        if after is not None:
            query["after"] = after
        return self._exchange("GET", "?" + urlencode(query), key, None)

    def close(self) -> None:
        """Close the connections at rest; those at work close when they are done."""
        way, self._way = self._way, None
        if way:
            way[0].close()

    def _exchange(self, method: str, query: str, key: str, form: Form | None) -> Attempt:
        fields = self._fields | {"Authorization": f"Bearer {_fit(key)}"}
        if form is not None:
            fields |= {"Content-Type": form.content_type, "Content-Length": str(len(form))}
        answer, trouble, detail = None, None, ""
        began = time.monotonic()
        try:
            answer = self._answer_to(method, query, fields, form)
            self.resolved = True
        except Failure as failure:
            answer, trouble, detail = failure.answer, failure.trouble, str(failure)
            self._learn(trouble)
        except BrokenOff as why:
            trouble, detail = Trouble.ABORTED, str(why)
        return Attempt(
            sent_all=form is None or form.sent_all,
            sent=0 if form is None else form.sent,
            sha256=None if form is None else form.sha256,
            answer=answer and _rewritten(answer, key),
            trouble=trouble,
            detail=_without(key, detail),
            duration_s=time.monotonic() - began,
        )

    def _answer_to(self, method: str, query: str, fields: dict[str, str], form: Any) -> Answer | None:
        way = self._way
        if way is None:
            # Two threads may both make one: the one that is forgotten closes with its last connection.
            adapter = Adapter(self._connections, self._tls_context())
            terms = {"told_as": self.host, "read_timeout_s": self._api.read_timeout_s}
            way = self._way = adapter.way_to(self._url, self._proxies, **terms)
        try:
            came: Any = way[0].urlopen(method, way[1] + query, form, fields, timeout=self._timeout, **_AS_IT_IS)
        except urllib3.exceptions.ClosedPoolError:  # by another thread, just now: nothing went out
            return self._answer_to(method, query, fields, form)
        return came.answer  # type: ignore[no-any-return]  # it is a `Reply`

    def _tls_context(self) -> ssl.SSLContext | None:
        if not self._url.startswith("https:"):
            return None
        try:
            return _trusting(self._bundle)
        except OSError as error:
            detail = f"the CA bundle {printable(str(self._bundle), 300)} cannot be read: {plain(error)}"
            raise Failure(Trouble.CERTIFICATE, detail) from error

    def _learn(self, trouble: Trouble) -> None:
        if trouble is Trouble.CERTIFICATE:
            self.close()  # the CA bundle is read anew for the next attempt: somebody may have mended it
        if trouble in _FOUND_THE_HOST:
            self.resolved = True


def _fit(key: str) -> str:
    if not (key.isascii() and key.isprintable() and key == key.strip() != ""):
        raise ValueError("the key has characters that cannot stand in a header")  # never quote it
    return key


def _bundle_of_the_environment() -> str | None:
    return os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or None


def _trusting(bundle: os.PathLike[str] | str | None) -> ssl.SSLContext:
    if bundle is None:
        return ssl.create_default_context(cafile=None if _has_system_store() else DEFAULT_CA_BUNDLE_PATH)
    if Path(bundle).is_dir():
        return ssl.create_default_context(capath=bundle)
    return ssl.create_default_context(cafile=bundle)


def _has_system_store() -> bool:
    paths = ssl.get_default_verify_paths()
    return bool(paths.cafile or paths.capath)


def _rewritten(answer: Answer, key: str) -> Answer:
    """The answer as it may be told: some services and gateways repeat the key that they were given."""
    return Answer(
        status=answer.status,
        body=_without(key, answer.body.decode("latin-1")).encode("latin-1"),
        retry_after=answer.retry_after and _without(key, answer.retry_after),
        trace_id=answer.trace_id and _without(key, answer.trace_id),
        date=answer.date,
        location=answer.location and _without(key, answer.location),
        content_type=answer.content_type and _without(key, answer.content_type),
    )


def _without(key: str, text: str) -> str:
    return _writings_of(key).sub("***", text) if len(key) >= _TELLING else text


@lru_cache(maxsize=16)  # made anew it costs as much as a request
def _writings_of(key: str) -> re.Pattern[str]:
    """The key as it is, and as encoders of JSON and of addresses may write any of its characters."""
    return re.compile("".join(map(_writings_of_one, key)))


def _writings_of_one(c: str) -> str:
    # Each way begins with a character of its own: so most of a text is passed over at once.
    plain, code = re.escape(c), f"(?i:{ord(c):02x})"
    return rf"(?:{plain}|\\{plain}|\\u00{code}|%{code})"
