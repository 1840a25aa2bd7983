"""How payloads are sent: as written, by a client, or through the queue as the page does."""

import http.client
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.app.payloads.target import Target

PATIENCE_SECONDS = 60.0
MOST_READ = 1 << 20


@dataclass
class Reply:
    """What a call through the queue came to.

    Attributes:
        status: of putting it into the queue.
        start: when that was, by `time.perf_counter()`.
        messages: all that were sent of it, up to the last.
    """

    status: int
    start: float
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def error(self) -> str | None:
        """What the last message calls wrong; None when it is well."""
        last = self.messages[-1]
        return None if last.get("success") else str((last.get("output") or {}).get("error") or last.get("message"))


def raw(
    target: Target, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
) -> tuple[int, str]:
    """Status and text of a request whose path and headers go out as written.

    Raises:
        BrokenPipeError, ConnectionResetError: the server hung up before all of it was sent.
    """
    host = target.app.url.split("//")[1].rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=PATIENCE_SECONDS)
    start = time.perf_counter()
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in ({"Host": host} | dict(headers or {})).items():
            connection.putheader(name, value)
        if body:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body or None)
        answer = connection.getresponse()
        text = answer.read(MOST_READ).decode("latin-1")
        target.note(str(answer.status), start)
        return answer.status, text
    except (BrokenPipeError, ConnectionResetError):
        target.note("hung up", start)
        raise
    finally:
        connection.close()


def ask(target: Target, method: str, path: str, **content: Any) -> httpx.Response:
    """The same by a client that mends what it sends; `content` is httpx's `json` or `files`."""
    start = time.perf_counter()
    answer = target.http.request(method, path, **content)
    target.note(str(answer.status_code), start)
    return answer


def call_all(target: Target, calls: Mapping[int, Any]) -> dict[int, Reply]:
    """Put calls (number of the handler -> data) into the queue all at once, and wait for all their ends.

    Raises:
        TimeoutError: one of them does not end.
    """
    session = uuid.uuid4().hex
    replies, waiting = {}, {}
    for number, data in calls.items():
        body = {"data": data, "fn_index": number, "session_hash": session}
        start = time.perf_counter()
        joined = target.http.post("gradio_api/queue/join", json=body)
        replies[number] = Reply(joined.status_code, start)
        if joined.status_code == 200:
            waiting[joined.json()["event_id"]] = replies[number]
        else:
            target.note(str(joined.status_code), start)
    if waiting:
        _listen(target, session, waiting)
    return replies


def _listen(target: Target, session: str, waiting: dict[str, Reply]) -> None:
    """Read what the queue says until every call (event -> its reply) has ended."""
    end = time.perf_counter() + PATIENCE_SECONDS
    path = f"gradio_api/queue/data?session_hash={session}"
    with target.http.stream("GET", path, timeout=PATIENCE_SECONDS) as events:
        for line in events.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            event = str(message.get("event_id"))
            if event in waiting:
                waiting[event].messages.append(message)
                if message["msg"] == "process_completed":
                    what = "answer" if message.get("success") else "error"
                    target.note(what, waiting.pop(event).start)
            if not waiting or message.get("msg") in ("close_stream", "unexpected_error"):
                return
            if time.perf_counter() > end:
                raise TimeoutError(f"{len(waiting)} calls did not end")


def call(target: Target, number: int, data: Any) -> Reply:
    """One call."""
    return call_all(target, {number: data})[number]


def public(target: Target, name: str) -> int:
    """The number of a documented endpoint."""
    return next(number for number, fn in target.app.demo.fns.items() if fn.api_name == name)
