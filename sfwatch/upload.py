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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3.exceptions
from requests.utils import DEFAULT_CA_BUNDLE_PATH, get_environ_proxies

from sfwatch.form import BrokenOff, Form, Pace, Reins
from sfwatch.settings import Api
from sfwatch.verdict import Answer, Attempt, Trouble, printable
from sfwatch.wire import Adapter, Failure, Terms, plain, read_answer

__all__ = ["ANSWER_LIMIT", "LISTING_LIMIT", "Client", "Pace"]

ANSWER_LIMIT = 64 * 1024
"""Bytes of an upload's answer that are read."""

LISTING_LIMIT = 8 * 1024 * 1024
"""Bytes of a listing that are read."""

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
        self._user_agent = user_agent
        self._proxies = get_environ_proxies(self._url)
        self._bundle = api.ca_bundle or _bundle_of_the_environment()
        self._adapter: Adapter | None = None
        self.host = urlsplit(self._url).netloc.rpartition("@")[2]
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
            request = self._request("POST", key, headers={"Content-Type": form.content_type}, data=form)
            attempt = self._exchange(request, key, ANSWER_LIMIT)
        return replace(attempt, sent_all=form.sent_all, sent=form.sent, sha256=form.sha256)

    def list_files(self, *, purpose: str, limit: int, key: str) -> Attempt:
        """Ask what the service has: `limit` entries at most."""
        request = self._request("GET", key, params={"purpose": purpose, "limit": str(limit)})
        return self._exchange(request, key, LISTING_LIMIT)

    def close(self) -> None:
        """Close the connections at rest; those at work close when they are done."""
        adapter, self._adapter = self._adapter, None
        if adapter:
            adapter.close()

    def _request(self, method: str, key: str, **parts: Any) -> requests.PreparedRequest:
        if not (key.isascii() and key.isprintable() and key == key.strip() != ""):
            raise ValueError("the key has characters that cannot stand in a header")  # never quote it
        request = requests.Request(method, self._url, **parts).prepare()
        request.headers["User-Agent"] = self._user_agent
        request.headers["Authorization"] = f"Bearer {key}"
        return request

    def _exchange(self, request: requests.PreparedRequest, key: str, limit: int) -> Attempt:
        began = time.monotonic()
        answer, trouble, detail = self._outcome(request, limit)
        attempt = Attempt(
            sent_all=True,
            sent=0,
            sha256=None,
            answer=answer,
            trouble=trouble,
            detail=detail,
            duration_s=time.monotonic() - began,
        )
        return _without(key, attempt)

    def _outcome(
        self, request: requests.PreparedRequest, limit: int
    ) -> tuple[Answer | None, Trouble | None, str]:
        try:
            with contextlib.closing(self._send(request)) as response:
                answer = read_answer(response, limit, self.host)
        except Failure as failure:
            self._learn(failure.trouble)
            return failure.answer, failure.trouble, str(failure)
        self.resolved = True
        return answer, None, ""

    def _send(self, request: requests.PreparedRequest) -> requests.Response:
        timeouts = (self._api.connect_timeout_s, self._api.read_timeout_s)
        try:
            return self._connected().send(request, stream=True, timeout=timeouts, proxies=self._proxies)
        except BrokenOff as why:
            raise Failure(Trouble.ABORTED, str(why)) from why
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise Failure(Trouble.CUT, f"the answer of {self.host} is no HTTP: {plain(error)}") from error

    def _connected(self) -> Adapter:
        # Two threads may both make one: the one that is forgotten closes with its last connection.
        if self._adapter is None:
            terms = Terms(self.host, self._api.read_timeout_s)
            self._adapter = Adapter(self._connections, terms, self._tls_context())
        return self._adapter

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


def _without(key: str, attempt: Attempt) -> Attempt:
    """The attempt as it may be told: some services and gateways repeat the key that they were given."""
    if len(key) < _TELLING:
        return attempt
    hide = partial(_writings_of(key).sub, "***")
    answer = attempt.answer and _rewritten(attempt.answer, hide)
    return replace(attempt, answer=answer, detail=hide(attempt.detail))


def _rewritten(answer: Answer, hide: Callable[[str], str]) -> Answer:
    return replace(
        answer,
        body=hide(answer.body.decode("latin-1")).encode("latin-1"),
        trace_id=answer.trace_id and hide(answer.trace_id),
        location=answer.location and hide(answer.location),
        retry_after=answer.retry_after and hide(answer.retry_after),
        content_type=answer.content_type and hide(answer.content_type),
    )


def _writings_of(key: str) -> re.Pattern[str]:
    """The key as it is, and as encoders of JSON and of addresses may write any of its characters."""
    return re.compile("".join(rf"(?:\\?{re.escape(c)}|(?:\\u00|%)(?i:{ord(c):02x}))" for c in key))
