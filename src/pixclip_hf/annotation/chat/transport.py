"""One POST to a server that may be slow, endless or gone: bounded in time and bytes, and never redirected."""

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import ChunkedEncodingError, ContentDecodingError
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, ProxyManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ReadTimeoutError

MOST_BYTES = 2**20
"""Limit of a response, about 250,000 tokens of English."""
_CONNECT_SECONDS = 10
_CHUNK = 2**16


@dataclass(frozen=True)
class Response:
    """What a server answered.

    Attributes:
        status: HTTP status code.
        text: the body, with a mark for bytes that are not UTF-8.
        retry_after: header of that name.
        location: header of that name.
        problem: why the body is not whole, or None.
    """

    status: int
    text: str
    retry_after: str | None = None
    location: str | None = None
    problem: str | None = None


class _Cutoff:
    """Ends the request of this thread when its time is up: the time limit of a socket begins again with every byte."""

    _of_thread = threading.local()

    def __init__(self, seconds: float):
        self.passed = False
        self._socket: Any = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> "_Cutoff":
        self._of_thread.current = self
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._socket = None  # by now another request may use it
        self._of_thread.current = None

    @classmethod
    def watch(cls, connected: Any) -> None:
        """Puts a socket under the time limit of the thread that uses it."""
        if (cutoff := getattr(cls._of_thread, "current", None)) is not None:
            with cutoff._lock:
                cutoff._socket = connected
                if cutoff.passed:
                    cutoff._shut()

    def _end(self) -> None:
        with self._lock:
            self.passed = True
            self._shut()

    def _shut(self) -> None:
        connected = getattr(self._socket, "socket", self._socket)  # TLS through a TLS proxy wraps its socket
        if isinstance(connected, socket.socket):
            try:
                # Not the method of `SSLSocket`, which would take TLS away under the thread that is reading.
                socket.socket.shutdown(connected, socket.SHUT_RDWR)
            except OSError:
                pass  # closed already


class _HTTPConnection(HTTPConnection):
    def getresponse(self) -> Any:
        _Cutoff.watch(self.sock)
        return super().getresponse()


class _HTTPSConnection(HTTPSConnection):
    def getresponse(self) -> Any:
        _Cutoff.watch(self.sock)
        return super().getresponse()


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **options)
        if isinstance(manager, ProxyManager):  # one for SOCKS has pools of its own
            manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        return manager


def open_session(authorization: str | None, connections: int) -> requests.Session:
    """Connections that are kept open between requests.

    Args:
        authorization: value of that header.
        connections: most of them.
    """
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"  # a compressed answer may be a thousand times its size

    def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if authorization is not None:
            request.headers["Authorization"] = authorization
        return request

    session.auth = authorize  # and not a header: an entry in .netrc would take its place
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter(pool_maxsize=connections))
    return session


def post(session: requests.Session, url: str, content: dict[str, Any], timeout: float) -> Response:
    """Sends JSON and reads the answer, up to [`MOST_BYTES`].

    Args:
        session: from [`open_session`].
        url: where to. Redirects are not followed.
        content: what is sent.
        timeout: seconds from the first byte sent to the last one read.

    Raises:
        TimeoutError: the answer took longer.
        requests.ConnectionError: the server can't be reached, or hangs up before it answers.
    """
    limits = (min(_CONNECT_SECONDS, timeout), timeout)
    with _Cutoff(timeout) as cutoff:
        try:
            with session.post(url, json=content, timeout=limits, allow_redirects=False, stream=True) as response:
                body, problem = _read(response, lambda: cutoff.passed)
        except Exception as error:
            if cutoff.passed or _is_timeout(error):
                raise TimeoutError(f"no answer in {timeout:g} s") from error
            raise
        if cutoff.passed:  # a body without a length just ends
            raise TimeoutError(f"no answer in {timeout:g} s")
    headers = response.headers
    text = body.decode("utf-8", "replace")
    return Response(response.status_code, text, headers.get("Retry-After"), headers.get("Location"), problem)


def _read(response: requests.Response, ended: Callable[[], bool]) -> tuple[bytes, str | None]:
    body = bytearray()
    try:
        for chunk in response.iter_content(_CHUNK):
            body += chunk
            if len(body) > MOST_BYTES:
                return bytes(body[:MOST_BYTES]), f"response of more than {MOST_BYTES} bytes"
    except (ChunkedEncodingError, ContentDecodingError) as error:
        if ended():
            raise
        return str(error).encode(), "response cut off"
    return bytes(body), None


def _is_timeout(error: Exception) -> bool:
    if isinstance(error, requests.ReadTimeout):
        return True
    cause = error.args[0] if isinstance(error, requests.ConnectionError) and error.args else None
    return isinstance(cause, ReadTimeoutError)
