"""Who may talk to the app: requests that name this machine, not a web page elsewhere that reaches it.

A foreign site can point its own name at 127.0.0.1 (DNS rebinding) or post to it across origins. Both carry a name
that is not ours, in `Host` or in `Origin`; an IP address cannot be rebound, so addresses pass.
"""

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


def _host_of(header: str) -> str | None:
    """The host part of `host:port` or of `scheme://host:port`, lower case; None when there is none."""
    try:
        return urlsplit(header if "://" in header else f"//{header}").hostname
    except ValueError:
        return None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class HostGuard:
    """ASGI middleware: 403 unless `Host`, and `Origin` where given, is an address or a name of this machine."""

    def __init__(self, app: ASGIApp, *, host: str) -> None:
        self._app = app
        self._names = {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] in ("http", "websocket") and not self._allows(scope["headers"]):
            await PlainTextResponse("This host name is not served here.", status_code=403)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allows(self, headers: list[tuple[bytes, bytes]]) -> bool:
        hosts = [value for name, value in headers if name == b"host"]
        named = hosts + [value for name, value in headers if name == b"origin"]
        return len(hosts) == 1 and all(self._is_ours(value.decode("latin-1")) for value in named)

    def _is_ours(self, header: str) -> bool:
        host = _host_of(header)
        return host is not None and (host in self._names or _is_address(host))
