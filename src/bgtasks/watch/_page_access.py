"""Who may see the page: the names of its host, the origin of requests, and a token or a function of the user.

A browser runs pages of strangers beside ours. They may reach the server by a name of theirs that leads to its address
(DNS rebinding): the header ``Host`` says that name. They may send requests from their pages: ``Sec-Fetch-Site``,
or ``Origin`` in older browsers, says so. The session cookie is ``SameSite=Strict``, and scripts cannot read it.
"""

from __future__ import annotations

import hashlib
import hmac
import inspect
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Final, TypeAlias

from bgtasks._checks import check_callable
from bgtasks.errors import InvalidOptionError, describe

__all__ = ["Access", "Auth", "Headers", "RefusedError", "Scope"]

Scope: TypeAlias = MutableMapping[str, Any]
Auth: TypeAlias = Callable[[Scope], bool | Awaitable[bool]]
Headers: TypeAlias = dict[str, str]

SHORTEST_TOKEN: Final = 16
# Seconds until a viewer has to log in again.
SESSION: Final = 12 * 3600


class RefusedError(Exception):
    """A request is refused, with a status of HTTP and a text that says why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Access:
    """Decides about requests.

    Args:
        auth: a function that takes the ASGI scope and returns, or whose coroutine returns, True for those who may
            see the page.
        token: the secret that viewers log in with.
        hosts: the names and addresses under which the server may be reached.

    Raises:
        InvalidOptionError: there is neither ``auth`` nor ``token``, or one of them has an invalid value.

    """

    def __init__(self, auth: Auth | None, token: str | None, hosts: Sequence[str]) -> None:
        check_callable("auth", auth)
        if auth is None and token is None:
            raise InvalidOptionError(
                "the page shows the inside of the program, and needs auth or token: pass token=..., a secret of at "
                f"least {SHORTEST_TOKEN} characters that viewers log in with, or auth=..., a function that takes the "
                "ASGI scope and returns whether it may be seen"
            )
        if token is not None and (not isinstance(token, str) or len(token) < SHORTEST_TOKEN):
            raise InvalidOptionError(
                f"token must be a text of at least {SHORTEST_TOKEN} characters, such as secrets.token_urlsafe() makes; "
                f"got {'one of ' + str(len(token)) if isinstance(token, str) else describe(type(token))}"
            )
        if isinstance(hosts, str) or not all(isinstance(host, str) and _is_host(host) for host in hosts):
            raise InvalidOptionError(
                f"hosts must be a list of names and addresses without ports, such as ['app.example']; "
                f"got {describe(hosts)}"
            )
        self.has_token = token is not None
        self._auth = auth
        self._token = None if token is None else token.encode("utf-8", "surrogatepass")
        self._key = hashlib.sha256(b"bgtasks page\0" + (self._token or b"")).digest()
        self._cookie = f"bgtasks-{hmac.digest(self._key, b'cookie', 'sha256').hex()[:8]}"
        self._hosts = frozenset(host.lower() for host in hosts)

    def check_host(self, headers: Headers) -> None:
        """Check under which name the server was reached.

        Raises:
            RefusedError: under one that is not in ``hosts``.

        """
        host = headers.get("host", "")
        if _name_of(host) not in self._hosts:
            raise RefusedError(
                403, f"this page is not for requests to the host {host[:100]!r}: name its hosts with hosts=[...]"
            )

    def check_origin(self, headers: Headers, changes: bool) -> None:
        """Check that a request comes from the page itself, for data and for changes.

        Args:
            headers: the headers of the request.
            changes: whether the request changes something; then it must say where it comes from.

        Raises:
            RefusedError: it comes from elsewhere.

        """
        site = headers.get("sec-fetch-site")
        if site is not None:
            if site != "same-origin" and (changes or site != "none"):
                raise RefusedError(403, f"requests of other sites are refused: Sec-Fetch-Site is {site[:20]!r}")
            return
        origin = headers.get("origin")
        if origin is not None:
            host = headers.get("host", "").lower()
            if origin.lower() not in (f"http://{host}", f"https://{host}"):
                raise RefusedError(403, f"requests of other sites are refused: Origin is {origin[:100]!r}")
        elif changes and not self._has_bearer(headers):
            raise RefusedError(
                403, "a change needs the header Sec-Fetch-Site or Origin of a browser, or Authorization: Bearer TOKEN"
            )

    async def check_auth(self, scope: Scope) -> None:
        """Ask the function of the user.

        Raises:
            RefusedError: it did not return True.

        """
        if self._auth is None:
            return
        allowed = self._auth(scope)
        if inspect.isawaitable(allowed):
            allowed = await allowed
        if allowed is not True:
            raise RefusedError(403, "auth refuses this request")

    def check_session(self, headers: Headers) -> None:
        """Check the token of a request, or the cookie that was given for it.

        Raises:
            RefusedError: it has neither.

        """
        if self._token is not None and not self._has_bearer(headers) and not self._has_cookie(headers):
            raise RefusedError(401, "log in with the token of this page")

    def _has_bearer(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        return self._token is not None and kind.lower() == "bearer" and self._is_token(given.strip(), "latin-1")

    def _has_cookie(self, headers: Headers) -> bool:
        # Not by http.cookies, which finds none beside a cookie of the application that it does not understand.
        pairs = (each.strip().partition("=") for each in headers.get("cookie", "").split(";"))
        return any(self._is_session(value) for name, _, value in pairs if name == self._cookie)

    def _is_session(self, value: str) -> bool:
        expires, _, proof = value.partition(".")
        if not hmac.compare_digest(self._proof(expires), proof.encode("utf-8", "replace")):
            return False
        return int(expires) > time.time()

    def _proof(self, expires: str) -> bytes:
        return hmac.digest(self._key, expires.encode("utf-8", "replace"), "sha256").hex().encode()

    def _is_token(self, given: str, encoding: str = "utf-8") -> bool:
        expected = self._token or b""
        return hmac.compare_digest(expected, given.encode(encoding, "surrogatepass"))

    def log_in(self, given: object, is_secure: bool) -> str:
        """Return the cookie of a session, for the header ``Set-Cookie``.

        Raises:
            RefusedError: the token is not right.

        """
        if self._token is None or not isinstance(given, str) or not self._is_token(given):
            raise RefusedError(401, "this is not the token of this page")
        expires = str(int(time.time()) + SESSION)
        return self._set_cookie(f"{expires}.{self._proof(expires).decode()}", SESSION, is_secure)

    def log_out(self, is_secure: bool) -> str:
        """Return the header ``Set-Cookie`` that ends a session."""
        return self._set_cookie("", 0, is_secure)

    def _set_cookie(self, value: str, seconds: int, is_secure: bool) -> str:
        # Without Path: it holds for the folder of the request, wherever the page is mounted.
        secure = "; Secure" if is_secure else ""
        return f"{self._cookie}={value}; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}"


def _name_of(host: str) -> str:
    """Return the name or the address in a header ``Host``."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")


def _is_host(host: str) -> bool:
    is_address = host.count(":") > 1 and "[" not in host
    return bool(host) and not set(host) & set("/*@ ") and (":" not in host or is_address)
