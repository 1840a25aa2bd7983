"""Which requests are served: those that name this machine."""

import asyncio
import json

import pytest
from starlette.responses import PlainTextResponse

from ui.server.security import BodyGuard, HeaderGuard, HostGuard


def _status(headers: list[tuple[bytes, bytes]], host: str = "127.0.0.1") -> int:
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request"}

    async def send(message: dict) -> None:
        sent.append(message)

    middleware = HostGuard(PlainTextResponse("served"), host=host)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    asyncio.run(middleware(scope, receive, send))  # type: ignore[arg-type]
    return sent[0]["status"]


@pytest.mark.parametrize("host", [b"127.0.0.1:7860", b"localhost", b"LOCALHOST:1", b"[::1]:7860", b"192.168.0.7"])
def test_own_names_and_addresses_are_served(host: bytes) -> None:
    assert _status([(b"host", host)]) == 200
    assert _status([(b"host", host), (b"origin", b"http://" + host)]) == 200


def test_the_name_the_app_listens_on_is_served() -> None:
    assert _status([(b"host", b"box.lan:7860")], host="box.lan") == 200
    assert _status([(b"host", b"box.lan:7860")]) == 403


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"host", b"")],
        [(b"host", b"[::")],
        [(b"host", b"evil.example")],
        [(b"host", b"127.0.0.1.evil.example:7860")],
        [(b"host", b"localhost"), (b"host", b"evil.example")],
        [(b"host", b"localhost"), (b"origin", b"https://evil.example")],
        [(b"host", b"localhost"), (b"origin", b"null")],
        # an address cannot be rebound, but a page can be served from one
        [(b"host", b"127.0.0.1:7860"), (b"origin", b"http://203.0.113.5")],
        [(b"host", b"127.0.0.1:7860"), (b"origin", b"http://127.0.0.1:3000")],
        [(b"host", b"127.0.0.1:7860"), (b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"no-cors")],
        [(b"host", b"127.0.0.1:7860"), (b"sec-fetch-site", b"same-site"), (b"sec-fetch-mode", b"cors")],
        [
            (b"host", b"127.0.0.1:7860"),
            (b"sec-fetch-site", b"cross-site"),
            (b"sec-fetch-mode", b"navigate"),
            (b"sec-fetch-dest", b"iframe"),
        ],
    ],
)
def test_foreign_names_are_refused(headers: list[tuple[bytes, bytes]]) -> None:
    assert _status(headers) == 403


def test_a_link_from_elsewhere_opens_the_page() -> None:
    opened = [(b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"navigate"), (b"sec-fetch-dest", b"document")]
    assert _status([(b"host", b"localhost:7860"), *opened]) == 200


def _judged(path: str, chunks: list[bytes], headers: list[tuple[bytes, bytes]] | None = None) -> tuple[int, bytes]:
    """The status of a POST, and the body that reached the app behind the middleware."""
    sent: list[dict] = []
    arrived: list[bytes] = []
    messages = [
        {"type": "http.request", "body": chunk, "more_body": number + 1 < len(chunks)}
        for number, chunk in enumerate(chunks)
    ]

    async def receive() -> dict:
        return messages.pop(0)

    async def send(message: dict) -> None:
        sent.append(message)

    async def behind(scope: dict, receive, send) -> None:  # type: ignore[no-untyped-def]
        more = True
        while more:
            message = await receive()
            arrived.append(message["body"])
            more = message["more_body"]
        await PlainTextResponse("served")(scope, receive, send)

    middleware = BodyGuard(behind, most_upload_bytes=1000)  # type: ignore[arg-type]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers or []}
    asyncio.run(middleware(scope, receive, send))  # type: ignore[arg-type]
    return sent[0]["status"], b"".join(arrived)


def test_a_body_arrives_as_it_was_sent() -> None:
    body = json.dumps({"data": [{"path": "/tmp/gradio/a.png", "url": "http://127.0.0.1:1/a.png"}]}).encode()
    assert _judged("/gradio_api/queue/join", [body[:7], body[7:]]) == (200, body)
    assert _judged("/gradio_api/cancel", [b""]) == (200, b"")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"data": [{"path": "http://evil.example/a.png"}]}', 403),
        (b'{"data": [[{"image": {"path": "FILE:///etc/passwd"}}]]}', 403),
        (b'{"data": [{"path": "a\\u0000.png"}]}', 403),
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 200 + b"1" + b"}" * 200, 400),
        (b'"' + b"a" * (4 << 20) + b'"', 413),
    ],
)
def test_bodies_that_no_page_of_ours_sends_are_refused(body: bytes, status: int) -> None:
    assert _judged("/gradio_api/queue/join", [body[:4], body[4:]]) == (status, b"")


@pytest.mark.parametrize("length", [b"99999999999", b"-1", b"many"])
def test_a_length_that_is_too_much_is_refused_unread(length: bytes) -> None:
    assert _judged("/gradio_api/queue/join", [], [(b"content-length", length)]) == (413, b"")


def test_uploads_have_a_bound_of_their_own() -> None:
    form = [(b"content-type", b"multipart/form-data; boundary=x")]
    assert _judged("/gradio_api/upload", [b"x" * 1000], form)[0] == 200
    assert _judged("/gradio_api/upload", [b"x" * 40_000] * 3, form) == (413, b"")


@pytest.mark.parametrize(("path", "policy"), [("/", "default-src 'self'"), ("/gradio_api/file=/a.html", "sandbox")])
def test_answers_tell_the_browser_to_stay_here(path: str, policy: str) -> None:
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    async def receive() -> dict:
        return {"type": "http.request"}

    middleware = HeaderGuard(PlainTextResponse("served"))
    asyncio.run(middleware({"type": "http", "method": "GET", "path": path, "headers": []}, receive, send))  # type: ignore[arg-type]
    headers = dict(sent[0]["headers"])
    assert policy in headers[b"content-security-policy"].decode()
    assert headers[b"x-content-type-options"] == b"nosniff"
