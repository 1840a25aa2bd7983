"""Hostile payloads through every endpoint: none reads, writes, fetches or runs what it should not."""

import http.client
import json
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from safetensors.numpy import load, save

pytest.importorskip("gradio", reason="gradio is not installed: pip install dora-diffusion[ui]")

from playwright.sync_api import sync_playwright  # noqa: E402  (after the skip above)

from tests.ui import payloads  # noqa: E402
from tests.ui.payloads import filled  # noqa: E402
from tests.ui.served import Served, served  # noqa: E402
from tests.ui.tab import CHROMIUM, SWITCHES, Tab  # noqa: E402
from ui.session import Session  # noqa: E402

pytestmark = [
    # what gradio 6.31's queue asks of pandas, pandas 3 calls deprecated
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]

SECRET = "canary-7c41f9"
CANARIES = (SECRET, "root:x:0:0", "[project]", "def build_app")


@dataclass
class Trap:
    """What was asked of a server that nothing should ask, and every address that this process tried to reach."""

    port: int
    called: list[str] = field(default_factory=list)
    reached: list[str] = field(default_factory=list)
    is_set: bool = True

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: notes where sockets go; hooks cannot be taken off, so `is_set` ends it."""
        if self.is_set and event in ("socket.connect", "socket.getaddrinfo"):
            where = arguments[1] if event == "socket.connect" else arguments[0]
            host = where[0] if isinstance(where, tuple) else where
            name = host.decode() if isinstance(host, bytes) else str(host)
            if name not in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "None") and not name.startswith("/"):
                self.reached.append(name)


@dataclass(frozen=True)
class Target:
    """A served app, the trap, and the words that payloads need."""

    app: Served
    trap: Trap
    words: dict[str, str]

    def is_sound(self) -> bool:
        """Whether it still answers, and nothing was fetched for anyone."""
        assert self.trap.called == [] and self.trap.reached == []
        return self.app.alive()


@pytest.fixture(scope="module")
def trap() -> Iterator[Trap]:
    """A server on loopback that notes who calls."""

    class Noting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            trap.called.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Noting)
    trap = Trap(server.server_port)
    sys.addaudithook(trap.hook)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield trap
    trap.is_set = False
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def root(adapter_bytes: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters sound, broken and hostile; an output folder; secrets beside both."""
    root = tmp_path_factory.mktemp("hostile")
    folder = root / "adapters"
    folder.mkdir()
    (root / "out").mkdir()
    for name, content in adapter_bytes.items():
        (folder / name).write_bytes(content)
    (folder / "broken.safetensors").write_bytes(b"not an adapter")
    for place in (root, folder):
        (place / "secret.txt").write_text(SECRET)
    tensors = load(adapter_bytes["lego.safetensors"])
    for number, script in enumerate(payloads.SCRIPTS):
        told = {"modelspec.title": script, "modelspec.author": script, "modelspec.trigger_phrase": script}
        tags = {"ss_tag_frequency": json.dumps({script: {script: 3}}), "ss_base_model_version": script}
        name = re.sub("/", "", script)
        (folder / f"{name}.safetensors").write_bytes(save(tensors, metadata=told | tags))
        (folder / f"{number}{name}-broken.safetensors").write_bytes(script.encode())
    return root


@pytest.fixture(scope="module")
def target(pipe: StableDiffusionPipeline, root: Path, trap: Trap) -> Iterator[Target]:
    """The app over that folder."""
    session = Session(pipe, model=payloads.SCRIPT, folder=root / "adapters", output=root / "out")
    words = {
        "secret": str(root / "secret.txt"),
        "output": str(root / "out"),
        "adapters": str(root / "adapters"),
        "trap": f"127.0.0.1:{trap.port}",
        "port": str(trap.port),
    }
    with served(session, root) as app:
        yield Target(app, trap, words)


def _raw(target: Target, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> tuple:
    """Status and body of a request whose path and headers go out as written."""
    host = target.app.url.split("//")[1].rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=20)
    try:
        sent = {"Host": host} | (headers or {})
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            connection.putheader(name, value)
        if body:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body or None)
        answer = connection.getresponse()
        return answer.status, answer.read(1 << 20).decode("latin-1")
    finally:
        connection.close()


def _call_all(target: Target, calls: dict[int, list[Any]], *, patience: float = 25) -> dict[int, list[dict[str, Any]]]:
    """Put calls into the queue as the page does; handler -> all messages up to the end, or its refusal."""
    session = uuid.uuid4().hex
    numbers, messages = {}, {}
    for number, data in calls.items():
        body = {"data": data, "fn_index": number, "session_hash": session}
        joined = target.app.ask("POST", "gradio_api/queue/join", json=body)
        messages[number] = [] if joined.status_code == 200 else [{"status": joined.status_code}]
        if joined.status_code == 200:
            numbers[joined.json()["event_id"]] = number
    end, left = time.monotonic() + patience, len(numbers)
    if not numbers:
        return messages
    path = f"gradio_api/queue/data?session_hash={session}"
    with target.app.http.stream("GET", path, timeout=patience) as told:
        for line in told.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if (number := numbers.get(message.get("event_id"))) is not None:
                messages[number].append(message)
            left -= message.get("msg") == "process_completed"
            if left == 0 or message.get("msg") in ("close_stream", "unexpected_error"):
                return messages
            assert time.monotonic() < end, f"no answer of {[n for n in numbers.values() if not _is_over(messages[n])]}"
    return messages


def _is_over(messages: list[dict[str, Any]]) -> bool:
    return bool(messages) and messages[-1]["msg"] == "process_completed"


def _call(target: Target, number: int, data: Any) -> tuple[int, list[dict[str, Any]]]:
    """One call: the status, and all messages up to the end of it."""
    messages = _call_all(target, {number: data})[number]
    refused = messages and "status" in messages[0]
    return (messages[0]["status"], []) if refused else (200, messages)


def _error(messages: list[dict[str, Any]]) -> str | None:
    """What the last message calls wrong; None when it is well."""
    last = messages[-1]
    return None if last.get("success") else str((last.get("output") or {}).get("error") or last.get("message"))


def _public(target: Target, name: str) -> int:
    return next(number for number, fn in target.app.demo.fns.items() if fn.api_name == name)


def test_there_are_more_than_a_hundred() -> None:
    assert payloads.count() >= 200


@pytest.mark.parametrize("path", payloads.TRAVERSALS)
def test_no_file_is_given_but_the_apps_own(target: Target, path: str) -> None:
    status, body = _raw(target, "GET", filled(path, target.words))
    assert status >= 400 or "<html" in body.lower()
    assert not any(canary in body for canary in CANARIES)
    assert target.is_sound()


@pytest.mark.parametrize("path", payloads.FETCHES)
def test_nothing_is_fetched_for_anyone(target: Target, path: str) -> None:
    status, _ = _raw(target, "GET", filled(path, target.words))
    assert status in (400, 403, 404)
    assert target.is_sound()


@pytest.mark.parametrize("headers", payloads.STRANGERS, ids=lambda headers: " ".join(headers.values()) or "empty")
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/config"), ("POST", "/gradio_api/queue/join"), ("GET", "/health")]
)
def test_strangers_are_refused(target: Target, headers: dict[str, str], method: str, path: str) -> None:
    status, body = _raw(target, method, path, headers, b"{}" if method == "POST" else b"")
    assert status in (400, 403)
    assert "components" not in body and "version" not in body


@pytest.mark.parametrize("call", payloads.CALLS, ids=lambda call: json.dumps(call)[:60])
def test_a_wrong_call_of_generate_is_told_in_one_line(target: Target, call: dict[str, Any]) -> None:
    defaults = {"prompt": "a", "adapters": None, "negative_prompt": "", "seed": 0, "steps": 1, "guidance": 1.0}
    data = defaults | {"options": {"width": 64, "height": 64}} | filled(call, target.words)
    _, messages = _call(target, _public(target, "generate"), list(data.values()))
    error = _error(messages)
    # a prompt alone may be odd and still be drawn: brackets, and a name that is only text
    assert error is not None or set(call) <= {"prompt"}
    is_gradios = '"meta"' in json.dumps(call)  # what looks like a file, Gradio refuses before it gets here
    assert error is None or "\n" not in error and len(error) < 1000
    assert error != "None" or is_gradios
    assert not any(canary in json.dumps(messages) for canary in CANARIES)
    assert target.is_sound()


@pytest.mark.parametrize("call", payloads.NAMES, ids=lambda call: json.dumps(call)[:60])
def test_a_wrong_call_of_blend_writes_nothing(target: Target, root: Path, call: dict[str, Any]) -> None:
    before = _listing(root)
    data = {"adapters": {"ink": 1.0}, "name": "", "mode": "additive", "format": "diffusers", "rank": None} | call
    _, messages = _call(target, _public(target, "blend"), list(data.values()))
    error = _error(messages)
    assert error and error != "None" and "\n" not in error
    assert _listing(root) == before
    assert target.is_sound()


@pytest.mark.parametrize("endpoint", ["generate", "list_adapters", "blend"])
@pytest.mark.parametrize("data", [[], [1], [None] * 50, "abc", {"a": 1}, None])
def test_a_call_with_the_wrong_number_of_values_fails_alone(target: Target, endpoint: str, data: Any) -> None:
    status, messages = _call(target, _public(target, endpoint), data)
    assert status != 200 or messages
    assert target.is_sound()


@pytest.mark.parametrize("junk", payloads.JUNK, ids=lambda junk: json.dumps(junk)[:50])
def test_junk_in_every_handler_harms_nothing(target: Target, root: Path, junk: Any) -> None:
    before = _listing(root)
    value = filled(junk, target.words)
    fns = {n: fn for n, fn in target.app.demo.fns.items() if fn.fn is not None and fn.api_visibility != "public"}
    for number, messages in _call_all(target, {n: [value] * len(fn.inputs) for n, fn in fns.items()}).items():
        told = json.dumps(messages)
        assert not any(canary in told for canary in CANARIES), f"{fns[number].api_name}: {told[:400]}"
        assert _unescaped(fns[number], messages) == [], fns[number].api_name
    assert {path for path in _listing(root) - before if not path.startswith(("out", "runs"))} == set()
    assert target.is_sound()


@pytest.mark.parametrize("junk", payloads.ADDRESSES, ids=lambda junk: json.dumps(junk)[:50])
def test_an_address_in_place_of_a_file_is_refused_everywhere(target: Target, junk: Any) -> None:
    value = filled(junk, target.words)
    for number, fn in target.app.demo.fns.items():
        if fn.inputs:
            status, _ = _call(target, number, [value] * len(fn.inputs))
            assert status == 403, fn.api_name
    for route in ("run/predict", "api/predict", "call/generate", "call/v2/generate", "component_server"):
        answer = target.app.ask("POST", f"gradio_api/{route}", json={"data": [value], "fn_index": 0})
        assert answer.status_code == 403, route
    assert target.is_sound()


@pytest.mark.parametrize("number", [-1, 10**9, "x", None, 1.5, [0]])
def test_a_handler_that_is_not_there_fails_alone(target: Target, number: Any) -> None:
    body = {"data": [], "fn_index": number, "session_hash": "x"}
    assert target.app.ask("POST", "gradio_api/queue/join", json=body).status_code >= 400
    assert target.is_sound()


@pytest.mark.parametrize(
    ("path", "headers", "body", "status"),
    [
        ("/gradio_api/queue/join", {}, b'"' + b"a" * (5 << 20) + b'"', 413),
        ("/gradio_api/run/generate", {"Content-Type": "text/plain"}, b"a" * (5 << 20), 413),
        ("/gradio_api/queue/join", {}, b"[" * 1_000_000, 400),
        ("/gradio_api/queue/join", {}, b'{"data": [NaN' + b",Infinity" * 1000, 400),
        ("/gradio_api/queue/join", {"Content-Type": "application/x-pickle"}, b"\x80\x04cos\nsystem\n.", 400),
        ("/gradio_api/queue/join", {"Content-Encoding": "gzip"}, b"\x1f\x8b\x08" + b"\0" * 100, 400),
        (
            "/gradio_api/upload",
            {"Content-Type": "multipart/form-data; boundary=x"},
            b"--x\r\n" + b"a" * (16 << 20),
            413,
        ),
        ("/gradio_api/process_recording", {"Content-Type": "multipart/form-data; boundary=x"}, b"--x--", 404),
        ("/login", {"Content-Type": "application/x-www-form-urlencoded"}, b"username=a&password=b", 404),
    ],
    ids=["long", "long text", "deep", "nan", "pickle", "gzip", "upload", "recording", "login"],
)
def test_bodies_too_long_or_of_another_kind_are_refused(
    target: Target, path: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    try:
        answered, _ = _raw(target, "POST", path, headers, body)
    except (BrokenPipeError, ConnectionResetError):
        answered = 413  # the server hung up before all of it was sent
    assert answered == status
    assert target.is_sound()


@pytest.mark.parametrize("name", ["../../escaped.png", "/tmp/escaped.png", "a\\..\\b.png", "<script>.html", "x.svg"])
def test_uploads_stay_in_their_folder_and_run_nowhere(target: Target, root: Path, name: str) -> None:
    page = b"<script>alert(1)</script>"
    answer = target.app.ask("POST", "gradio_api/upload", files={"files": (name, page, "text/html")})
    assert answer.status_code == 200
    path = Path(answer.json()[0])
    assert path.is_file() and not (root / "escaped.png").exists()
    assert ".." not in path.parts and path.parent.parent == Path(target.app.demo.app.uploaded_file_dir)
    given = target.app.ask("GET", f"gradio_api/file={path}")
    assert "sandbox" in given.headers["content-security-policy"]
    assert target.is_sound()


def test_a_page_in_the_output_folder_runs_nothing(target: Target, root: Path) -> None:
    (root / "out" / "page.html").write_text("<script>alert(1)</script>")
    given = target.app.ask("GET", f"gradio_api/file={root / 'out' / 'page.html'}")
    assert given.status_code == 200 and "sandbox" in given.headers["content-security-policy"]


def test_many_who_say_nothing_more_leave_it_answering(target: Target) -> None:
    host, port = target.app.url.split("//")[1].rstrip("/").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(60)]
    for number, line in enumerate(silent):
        line.sendall(
            b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"[: 20 + number]
        )
    assert target.is_sound()
    for line in silent:
        line.close()


def test_names_and_metadata_of_files_are_text_in_every_answer(target: Target) -> None:
    config = target.app.ask("GET", "config").json()
    for component in config["components"]:
        if component["type"] == "html":
            assert _live(str(component["props"].get("value"))) == [], component["props"].get("elem_id")
    for number, fn in target.app.demo.fns.items():
        if fn.fn is not None and any(event == "load" for _, event in fn.targets):
            _, messages = _call(target, number, [None] * len(fn.inputs))
            assert _unescaped(fn, messages) == [], fn.api_name


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")
def test_a_browser_runs_nothing_of_what_files_say(target: Target) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        tab = Tab(browser.new_page())
        said: list[str] = []
        tab.page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        tab.watch()
        tab.page.goto(target.app.url)
        tab.page.locator("#prompt textarea").wait_for(timeout=30_000)
        tab.page.wait_for_timeout(3000)
        assert tab.page.locator("[onerror], [onmouseover], [onload]").count() == 0
        browser.close()
    assert said == [] and tab.errors == [] and tab.hosts == {"127.0.0.1"}


def _listing(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")} | {
        str(path) for path in root.parent.glob("escaped*")
    }


def _live(text: str) -> list[str]:
    """Markup of ours that stands in HTML unescaped."""
    return re.findall(r"<img src=x onerror|<script>alert|<svg onload|\" onmouseover=\"alert", text)


def _unescaped(fn: Any, messages: list[dict[str, Any]]) -> list[str]:
    """The same in what a handler sent to HTML components."""
    found: list[str] = []
    for message in messages:
        data = (message.get("output") or {}).get("data") or []
        for component, value in zip(fn.outputs, data, strict=False):
            if component.get_block_name() == "html":
                # lists and mappings are for templates, which escape; the browser's test sees what they make
                shown = value.get("value") if isinstance(value, dict) else value
                found += _live(shown) if isinstance(shown, str) else []
    return found
