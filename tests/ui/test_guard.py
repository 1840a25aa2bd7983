"""Which requests are served: those that name this machine."""

import asyncio

import pytest
from starlette.responses import PlainTextResponse

from ui.guard import HostGuard


def _status(headers: list[tuple[bytes, bytes]], host: str = "127.0.0.1") -> int:
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request"}

    async def send(message: dict) -> None:
        sent.append(message)

    guard = HostGuard(PlainTextResponse("served"), host=host)
    asyncio.run(guard({"type": "http", "headers": headers}, receive, send))  # type: ignore[arg-type]
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
    ],
)
def test_foreign_names_are_refused(headers: list[tuple[bytes, bytes]]) -> None:
    assert _status(headers) == 403
