"""Reads what an address of the web holds: bounded in time and bytes, and never from a private network unasked."""

import http.client
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from huggingface_hub import constants

SCHEMES = ("http://", "https://", "file:")
MOST_SECONDS = 30
"""From the first question to a name server to the last byte."""
MOST_BYTES = 100 * 2**20
ALLOW_LOCAL = "PIXCLIP_HF_LOCAL_ADDRESSES"
"""The environment variable that asks for `file:` addresses and for those of private networks: 1 allows them."""
USER_AGENT = "pixclip-hf (a Python package that reads images; the request is its user's)"
_SOCKET_SECONDS = 10
_SHOWN = 200  # characters
_TRANSLATED, _COMPATIBLE = IPv6Network("64:ff9b::/96"), IPv6Network("::/96")
_CHUNK = 2**16


def is_address(value: Any) -> bool:
    """Whether a value is the address of a file rather than its path."""
    return isinstance(value, str) and value[:8].lower().startswith(SCHEMES)


def read_address(address: str, name: str) -> bytes:
    """
    The content of an http(s) address; with `PIXCLIP_HF_LOCAL_ADDRESSES=1` also of `file:` addresses and of hosts in
    private networks, which an address from foreign data could otherwise read for its author. Redirects are followed
    under the same rules.

    Args:
        address: the address.
        name: what it is the address of, for messages.

    Raises:
        ValueError: a local address that nobody asked for, a refusal of the server, or more than 100 MiB.
        TimeoutError: the content took more than 30 seconds.
        ConnectionError: the server can't be reached, or breaks off.
    """
    local = os.environ.get(ALLOW_LOCAL) == "1"
    where = f"{name}: {shown_address(address)[:_SHOWN]!r}"
    if address[:5].lower() == "file:":
        if not local:
            raise ValueError(f"{where} is read only where {ALLOW_LOCAL}=1 asks for it; pass the path instead.")
        return _read_file(address, where)
    _check_host(address, where)
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"{where} can't be read: HF_HUB_OFFLINE is set.")
    request = _Request(address, where, local)
    thread = threading.Thread(target=request.run, daemon=True)
    thread.start()
    # A thread, because no time limit of a socket bounds name servers, or headers that come byte by byte.
    if not request.done.wait(MOST_SECONDS):
        request.cancel()
        raise TimeoutError(f"{where} was not read within {MOST_SECONDS} seconds.")
    if request.error is not None:
        raise request.error
    return request.content


def _check_host(address: str, where: str) -> None:
    """
    Raises:
        ValueError: an address that names no host, or a user: what reads it would repeat the password in its messages.
    """
    try:
        parts = urlsplit(address)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        named = False
    if not named:
        raise ValueError(f"{where} names no host and port.")
    if "@" in parts.netloc:
        raise ValueError(f"{where} is not read: it holds a user name, which addresses of images must not.")


class _Request:
    def __init__(self, address: str, where: str, local: bool):
        self.address, self.where, self.local = address, where, local
        self.done = threading.Event()
        self.content = b""
        self.error: Exception | None = None
        self._connections: list[http.client.HTTPConnection] = []
        self._cancelled = False

    def run(self) -> None:
        try:
            self.content = self._read()
        except _LocalAddress as error:
            self.error = ValueError(f"{self.where} {error}")
        except urllib.error.HTTPError as error:
            self.error = ValueError(f"{self.where} can't be read: the server answers {error.code} {error.reason}.")
        except urllib.error.URLError as error:
            if isinstance(error.reason, _LocalAddress):
                self.error = ValueError(f"{self.where} {error.reason}")
            elif isinstance(error.reason, TimeoutError):
                self.error = TimeoutError(
                    f"{self.where}: the server does not answer within {_SOCKET_SECONDS} seconds."
                )
            else:
                self.error = ConnectionError(f"{self.where} can't be read: {error.reason}")
        except TimeoutError:
            self.error = TimeoutError(f"{self.where}: the server is silent for {_SOCKET_SECONDS} seconds.")
        except (OSError, http.client.HTTPException) as error:
            self.error = ConnectionError(f"{self.where} can't be read: {type(error).__name__}: {error}")
        except Exception as error:
            self.error = ValueError(f"{self.where} can't be read: {error}")
        finally:
            self.done.set()

    def _read(self) -> bytes:
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            _Handler(self),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ):
            opener.add_handler(handler)
        opener.addheaders = [("User-Agent", USER_AGENT), ("Accept", "image/*,*/*;q=0.5")]
        parts = []
        with opener.open(self.address, timeout=_SOCKET_SECONDS) as response:
            left = MOST_BYTES
            while not self._cancelled and (chunk := response.read1(min(_CHUNK, left + 1))):
                left -= len(chunk)
                if left < 0:
                    raise ValueError(f"it has more than {MOST_BYTES} bytes.")
                parts.append(chunk)
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
        return b"".join(parts)

    def connect(self, target: tuple[str, int], timeout: float, source: Any = None) -> socket.socket:
        """A connection to the very address that was looked at, so that a name can't stand for another one then."""
        host, port = target
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not self.local:
            for *_, place in found:
                _refuse_private(str(place[0]), host)
        error: OSError | None = None
        for *_, place in found:
            try:
                return socket.create_connection((str(place[0]), int(place[1])), timeout, source)
            except OSError as failed:
                error = failed
        raise error or OSError(f"no address of {host!r} is known")

    def watch(self, connection: http.client.HTTPConnection) -> None:
        self._connections.append(connection)

    def cancel(self) -> None:
        """Ends what the thread waits for, so that it does not outlive the answer."""
        self._cancelled = True
        for connection in self._connections:
            if (connected := connection.sock) is not None:
                try:
                    # Not the method of `SSLSocket`, which would take TLS away under the thread that is reading.
                    socket.socket.shutdown(connected, socket.SHUT_RDWR)
                except OSError:
                    pass  # closed already


class _LocalAddress(Exception):
    """An address of a private network."""


def _refuse_private(ip: str, host: str) -> None:
    place: Any = ip_address(ip.partition("%")[0])
    if place.version == 6:
        place = _within(place) or place
    if not place.is_global or place.is_multicast:
        raise _LocalAddress(
            f"is not read: {host!r} is {ip}, an address of a private network. {ALLOW_LOCAL}=1 allows those."
        )


def _within(place: IPv6Address) -> IPv4Address | None:
    """The address of the older kind that one of the newer leads to: mapped, compatible, by 6to4, Teredo or NAT64."""
    low = int(place) & 0xFFFFFFFF
    if place in _TRANSLATED or (place in _COMPATIBLE and low > 1):
        return IPv4Address(low)
    return place.ipv4_mapped or place.sixtofour or (place.teredo[1] if place.teredo else None)


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, owner: _Request):
        urllib.request.HTTPSHandler.__init__(self)
        self._owner = owner

    def _connection(self, kind: Any, request: urllib.request.Request) -> Callable[..., http.client.HTTPConnection]:
        proxied = bool(request.has_proxy() or getattr(request, "_tunnel_host", None))
        if proxied and not self._owner.local:
            # The proxy is the user's own and looks names up itself: only what the address says can be looked at.
            host = (urlsplit(request.full_url).hostname or "").rstrip(".")
            ip: str | None
            try:
                # Also as one number, or with parts left out.
                ip = host if ":" in host else socket.inet_ntoa(socket.inet_aton(host))
            except OSError:
                ip = "127.0.0.1" if host == "localhost" or host.endswith(".localhost") else None  # a name
            if ip is not None:
                _refuse_private(ip, host)

        def make(*arguments: Any, **options: Any) -> http.client.HTTPConnection:
            connection = kind(*arguments, **options)
            if not proxied:
                connection._create_connection = self._owner.connect
            self._owner.watch(connection)
            return connection

        return make

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._connection(http.client.HTTPConnection, request), request)

    def https_open(self, request: urllib.request.Request) -> Any:
        connection = self._connection(http.client.HTTPSConnection, request)
        return self.do_open(connection, request, context=self._context)  # type: ignore[attr-defined]


def _read_file(address: str, where: str) -> bytes:
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{where} names the host {parts.netloc!r}; a `file:` address has none.")
    try:
        with open(url2pathname(parts.path), "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise FileNotFoundError(f"{where} can't be read: {error}") from error
    if len(content) > MOST_BYTES:
        raise ValueError(f"{where} can't be read: it has more than {MOST_BYTES} bytes.")
    return content


def shown_address(address: str) -> str:
    """An address as a message or a file may hold it: without user names, passwords and queries, which may be keys."""
    try:
        parts = urlsplit(address)
        parts.port  # noqa: B018 (raises for one that is no number, but a part of a password)
    except ValueError:
        return "an address that can't be read"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme + ':' if parts.scheme else ''}{'//' + host if host else ''}{parts.path}"
