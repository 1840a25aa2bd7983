"""Who may talk to the app, and what may be asked of it.

A foreign site can point its own name at 127.0.0.1 (DNS rebinding), post to it across origins, or have its pages load
pictures from it. The first carries a name in `Host` that is not ours; the others an `Origin` that is not the `Host`, or
the browser's own word in `Sec-Fetch-Site`. An IP address cannot be rebound, so addresses pass as `Host`.

Gradio serves more than this app needs: it fetches addresses for whoever asks, runs ffmpeg over uploads, reads bodies
of any length. What nothing here uses is refused before Gradio sees it.
"""

import ipaddress
import json
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_JSON_BYTES = 4 << 20
MULTIPART_BYTES = 1 << 16  # of headers and boundaries around an upload
MAX_DEPTH = 64
FILES = "/gradio_api/file"

# Routes of Gradio that fetch, convert, store or log in; the page and `gradio_client` work without them.
_UNUSED = re.compile(
    r"/gradio_api/(proxy=|process_recording|deep_link|stream/|vibe-|undo-vibe|run-history|runs|profiling|dev/)"
    r"|/(login|logout|monitoring)(/|$)"
)
_FOREIGN_FILE = re.compile(rf"{FILES}[=/]+\s*([a-z][a-z0-9+.-]*:/|//|\\)", re.IGNORECASE)
# The page is Gradio's: its scripts are inline and some are made by eval. None may fetch from, or send to, elsewhere.
_PAGE_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
_FILE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; sandbox"


def security_middleware(host: str, *, most_upload_bytes: int) -> list[Middleware]:
    """What stands between the network and Gradio.

    Args:
        host: the name or address that the app listens on.
        most_upload_bytes: of one upload, as `launch(max_file_size=)` has it.
    """
    return [
        Middleware(HeaderGuard),
        Middleware(HostGuard, host=host),
        Middleware(BodyGuard, most_upload_bytes=most_upload_bytes),
    ]


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


def _values(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == wanted]


class HostGuard:
    """ASGI middleware: 403 unless `Host` is an address or a name of this machine, and the page that asks is ours."""

    def __init__(self, app: ASGIApp, *, host: str) -> None:
        self._app = app
        self._names = {"localhost", host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] in ("http", "websocket") and not self._allows(scope):
            await PlainTextResponse("This host name is not served here.", status_code=403)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        hosts = _values(scope, b"host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return False
        is_same_origin = all(_netloc_of(origin) == hosts[0].lower() for origin in _values(scope, b"origin"))
        return is_same_origin and _is_from_here(scope)

    def _is_ours(self, header: str) -> bool:
        host = _host_of(header)
        return host is not None and (host in self._names or _is_address(host))


def _netloc_of(origin: str) -> str | None:
    """`host:port` of an `Origin`, lower case; None for "null" and other things that name no host."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _is_from_here(scope: Scope) -> bool:
    """Whether a browser says that no other site's page asks. A link from there may open the page, not a frame of it."""
    if not set(_values(scope, b"sec-fetch-site")) & {"cross-site", "same-site"}:
        return True
    is_opened = _values(scope, b"sec-fetch-mode") == ["navigate"] and _values(scope, b"sec-fetch-dest") == ["document"]
    return is_opened and scope.get("method") == "GET"


class HeaderGuard:
    """ASGI middleware: tells browsers to fetch from nowhere else, to guess no types, and to run no file as a page."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the headers added."""
        policy = _FILE_POLICY if str(scope.get("path", "")).startswith(FILES) else _PAGE_POLICY
        added = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }

        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in added.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        await self._app(scope, receive, send_with)


class BodyGuard:
    """ASGI middleware: refuses unused routes (404), addresses in place of files (403), bodies too long (413)."""

    def __init__(self, app: ASGIApp, *, most_upload_bytes: int) -> None:
        self._app = app
        self._most_upload = most_upload_bytes + MULTIPART_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal, messages = await self._judged(scope, receive)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        waiting = iter(messages)

        async def replay() -> Message:
            return next(waiting, None) or await receive()

        await self._app(scope, replay, send)

    async def _judged(self, scope: Scope, receive: Receive) -> tuple[PlainTextResponse | None, list[Message]]:
        """Why the request is refused, or None; and what was read of it."""
        path = unquote(scope["path"])
        if _UNUSED.match(path):
            return PlainTextResponse("Not served here.", status_code=404), []
        if _FOREIGN_FILE.match(path):
            return PlainTextResponse("Only files of this app are served.", status_code=403), []
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None, []
        is_form = any(kind.startswith("multipart/") for kind in _values(scope, b"content-type"))
        most = self._most_upload if is_form else MAX_JSON_BYTES
        if any(not length.isdigit() or int(length) > most for length in _values(scope, b"content-length")):
            return PlainTextResponse(f"At most {most} bytes are taken.", status_code=413), []
        messages = [message async for message in _read(receive, most)]
        body = b"".join(message.get("body", b"") for message in messages)
        if len(body) > most:
            return PlainTextResponse(f"At most {most} bytes are taken.", status_code=413), messages
        return (None if is_form else _json_refusal(body)), messages


async def _read(receive: Receive, most: int) -> Any:
    """The messages of a body, no further than a message beyond `most` bytes."""
    read = 0
    while True:
        message = await receive()
        yield message
        read += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False) or read > most:
            return


def _json_refusal(body: bytes) -> PlainTextResponse | None:
    """What is wrong with a body that is JSON, or would pass for it with Gradio; None when nothing is."""
    if not body.strip():
        return None
    try:
        paths = list(_paths(json.loads(body)))
    except (ValueError, RecursionError):
        return PlainTextResponse("The body is not JSON that can be read.", status_code=400)
    # Gradio downloads a file whose `path` is an address; our pages only ever send back what was uploaded.
    if any("://" in path or "\0" in path for path in paths):
        return PlainTextResponse("A file is named by an address; upload it instead.", status_code=403)
    return None


def _paths(value: Any) -> Iterator[str]:
    """Every text under a key `path`, at any depth.

    Raises:
        ValueError: deeper than MAX_DEPTH.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                if isinstance(item.get("path"), str):
                    yield item["path"]
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return
        level = below
    raise ValueError(f"deeper than {MAX_DEPTH}")
