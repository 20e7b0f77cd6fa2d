"""Who may talk to the server: host, origin and token of every connection, and the headers that protect the page."""

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asr.errors import ConfigError
from pipelines.serve.limits import Refused, unauthorized
from pipelines.serve.replies import refusal

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_PROTECTED = ("/v1/", "/metrics")  # the page, its files and /health hold nothing to protect

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@dataclass(frozen=True, kw_only=True)
class Access:
    """Whom the server lets in.

    Attributes:
        token: that clients must know; None: everyone on this machine may.
        origins: of other web pages that may use the server, as browsers send them ("https://example.org").
        host: on which the server listens.
    """

    token: str | None = None
    origins: tuple[str, ...] = ()
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        if self.token is not None and len(self.token) < 8:
            raise ConfigError("token: must have at least 8 characters")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ConfigError("token: must be of printable ASCII characters, as it comes in an HTTP header")
        if self.token is None and not is_loopback(self.host):
            raise ConfigError(f"host = {self.host!r}: others can reach it; give a token (--token, or ASR_TOKEN)")
        for origin in self.origins:
            if not _is_origin(origin):
                raise ConfigError(f"origin {origin!r}: give scheme and host, as in https://example.org")

    def knows(self, token: str | None) -> bool:
        """Whether this is the token, in a time that does not tell how much of it is right."""
        if self.token is None:
            return True
        given, known = (hashlib.sha256(t.encode("utf-8", "surrogatepass")).digest() for t in (token or "", self.token))
        return hmac.compare_digest(given, known)

    def allows_host(self, host: str) -> bool:
        """Whether the Host header names this server: with a name of its own, a page elsewhere could reach it."""
        if self.token is not None:
            return True
        name = urlsplit(f"//{host}").hostname if _is_origin(f"http://{host}") else None
        return name in _LOOPBACK_NAMES or name == self.host

    def allows_origin(self, origin: str | None, host: str) -> bool:
        """Whether a page of `origin` may use the server; programs that are no browser send none."""
        if origin is None or origin in self.origins:
            return True
        return _is_origin(origin) and origin.partition("://")[2].lower() == host.lower()


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach `host`.

    Raises:
        ConfigError: no such host.
    """
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        raise ConfigError(f"host = {host!r}: no such address of this machine") from None
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and f"{parts.scheme}://{parts.netloc}" == text
    except ValueError:
        return False


class Guard:
    """Lets in whom `access` allows, 403 for the wrong host or origin; and protects the page by headers.

    `scope["state"]["known"]` tells whether the token was right, for Lock and for websockets: some send it later.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_protected(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = self._check(scope)
        if refused is None:
            await self._app(scope, receive, send_protected)
        else:
            await refusal(refused)(scope, receive, send_protected)

    def _check(self, scope: Scope) -> Refused | None:
        headers = _headers(scope)
        host = headers.get("host", "")
        if not self._access.allows_host(host):
            return Refused("this server is not known by that name", code="wrong_host", status=403)
        if not self._access.allows_origin(headers.get("origin"), host):
            return Refused("pages of this origin may not use the server", code="wrong_origin", status=403)
        known = any(self._access.knows(token) for token in _tokens(scope, headers))
        scope.setdefault("state", {})["known"] = known or self._access.token is None
        return None


class Lock:
    """401 for what is protected, without the token. It belongs inside Guard, which looks at the token.

    And inside CORSMiddleware: it lets pages read the refusal, and answers what browsers ask before they send a token.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        shut = scope["type"] == "http" and scope["path"].startswith(_PROTECTED) and not scope["state"]["known"]
        await (refusal(unauthorized()) if shut else self._app)(scope, receive, send)


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _tokens(scope: Scope, headers: dict[str, str]) -> Iterable[str]:
    kind, _, token = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        yield token.strip()
    if scope["type"] == "websocket":  # browsers cannot give a websocket headers
        yield from parse_qs(scope["query_string"].decode("latin-1")).get("token", ())
