"""The kinds of payloads: what each must come to, how it is sent, and what breaks the promise."""

import html
import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.app.payloads import payloads
from benchmarks.app.payloads.asking import Reply, ask, call, call_all, public, raw
from benchmarks.app.payloads.payloads import JOIN, Body, Headers
from benchmarks.app.payloads.target import CANARIES, Target

LONGEST_ERROR = 1000
ENDPOINTS = ("generate", "list_adapters", "blend")
SILENT = 60
DRAWN = "drawn"
# Arguments of `generate` that are drawn, in order.
SOUND: Mapping[str, Any] = {
    "prompt": "a",
    "adapters": None,
    "negative_prompt": "",
    "seed": 0,
    "steps": 1,
    "guidance": 1.0,
    "options": {"width": 64, "height": 64},
}


@dataclass(frozen=True)
class Kind:
    """Payloads that are sent alike and must come to the same.

    Attributes:
        name: what they are.
        must: what they must come to.
        payloads: each counted once, however many endpoints it is sent to.
        send: sends one, with its words filled in; yields what broke the promise, nothing when it was kept.
        may_write: folders of the target's root in which something may appear meanwhile.
    """

    name: str
    must: str
    payloads: tuple[Any, ...]
    send: Callable[[Target, Any], Iterator[str]]
    may_write: tuple[str, ...] = ("out", "runs")


def _path(target: Target, path: str) -> Iterator[str]:
    status, body = raw(target, "GET", path)
    if status < 400 and "<html" not in body.lower():
        yield f"answered {status}"
    yield from leaks(body)


def _fetch(target: Target, path: str) -> Iterator[str]:
    status, _ = raw(target, "GET", path)
    if status not in (400, 403, 404):
        yield f"answered {status}"


def _stranger(target: Target, headers: Headers) -> Iterator[str]:
    for method, path in (("GET", "/config"), ("POST", JOIN), ("GET", "/health")):
        status, body = raw(target, method, path, headers, b"{}" if method == "POST" else b"")
        if status not in (400, 403):
            yield f"{path}: answered {status}"
        if "components" in body or "version" in body:
            yield f"{path}: told {body[:200]}"


def _generate(target: Target, fields: Mapping[str, Any]) -> Iterator[str]:
    reply = call(target, public(target, "generate"), list({**SOUND, **fields}.values()))
    is_gradios = '"meta"' in json.dumps(fields)  # what looks like a file, Gradio refuses before it gets here
    yield from _told(reply, may_be_bare=is_gradios)
    yield from leaks(json.dumps(reply.messages))


def _blend(target: Target, fields: Mapping[str, Any]) -> Iterator[str]:
    defaults = {"adapters": {"ink": 1.0}, "name": "", "mode": "additive", "format": "diffusers", "rank": None}
    reply = call(target, public(target, "blend"), list({**defaults, **fields}.values()))
    yield from _told(reply)
    yield from leaks(json.dumps(reply.messages))


def _told(reply: Reply, *, may_be_bare: bool = False) -> Iterator[str]:
    """What is wrong with how a call was refused: it must be an error of one line."""
    if not reply.messages:
        yield f"answered {reply.status} and nothing more"
        return
    error = reply.error
    if error is None:
        yield "was done"
    elif "\n" in error or len(error) >= LONGEST_ERROR:
        yield f"an error of {error.count(chr(10)) + 1} lines and {len(error)} characters: {error[:200]}"
    elif error in ("", "None") and not may_be_bare:
        yield "an error without a word"


def _shape(target: Target, data: Any) -> Iterator[str]:
    for endpoint in ENDPOINTS:
        reply = call(target, public(target, endpoint), data)
        if reply.status == 200 and not reply.messages:
            yield f"{endpoint}: no answer"


def _junk(target: Target, value: Any) -> Iterator[str]:
    fns = {n: fn for n, fn in target.app.demo.fns.items() if fn.fn is not None and fn.api_visibility != "public"}
    for number, reply in call_all(target, {n: [value] * len(fn.inputs) for n, fn in fns.items()}).items():
        found = [*leaks(json.dumps(reply.messages)), *unescaped(fns[number], reply.messages)]
        yield from (f"{fns[number].api_name}: {fault}" for fault in found)


def _address(target: Target, value: Any) -> Iterator[str]:
    for number, fn in target.app.demo.fns.items():
        if fn.inputs and (status := call(target, number, [value] * len(fn.inputs)).status) != 403:
            yield f"{fn.api_name}: answered {status}"
    for route in ("run/predict", "api/predict", "call/generate", "call/v2/generate", "component_server"):
        answer = ask(target, "POST", f"gradio_api/{route}", json={"data": [value], "fn_index": 0})
        if answer.status_code != 403:
            yield f"{route}: answered {answer.status_code}"


def _number(target: Target, number: Any) -> Iterator[str]:
    body = {"data": [], "fn_index": number, "session_hash": "x"}
    answer = ask(target, "POST", JOIN, json=body)
    if answer.status_code < 400:
        yield f"answered {answer.status_code}"


def _body(target: Target, body: Body) -> Iterator[str]:
    try:
        status, _ = raw(target, "POST", body.path, body.headers, body.content)
    except (BrokenPipeError, ConnectionResetError):
        status = 413  # the server hung up before all of it was sent
    if status != body.status:
        yield f"answered {status}, not {body.status}"


def _upload(target: Target, name: str) -> Iterator[str]:
    page = b"<script>alert(1)</script>"
    answer = ask(target, "POST", "gradio_api/upload", files={"files": (name, page, "text/html")})
    if answer.status_code != 200:
        yield f"answered {answer.status_code}"
        return
    path = Path(answer.json()[0])
    if ".." in path.parts or path.parent.parent != Path(target.app.demo.app.uploaded_file_dir) or not path.is_file():
        yield f"was put at {path}"
    yield from _runs_nowhere(target, path)


def _page(target: Target, name: str) -> Iterator[str]:
    path = target.root / "out" / name
    path.write_text("<script>alert(1)</script>")
    yield from _runs_nowhere(target, path)


def _runs_nowhere(target: Target, path: Path) -> Iterator[str]:
    given = ask(target, "GET", f"gradio_api/file={path}")
    if given.status_code != 200 or "sandbox" not in given.headers["content-security-policy"]:
        yield f"{given.status_code}, policy {given.headers.get('content-security-policy')}"


def _silence(target: Target, connections: int) -> Iterator[str]:
    host, port = target.app.url.split("//")[1].rstrip("/").split(":")
    request = b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    with ExitStack() as silent:
        for number in range(connections):
            line = silent.enter_context(socket.create_connection((host, int(port))))
            line.sendall(request[: 20 + number])
        yield from target.faults()
        if ask(target, "GET", "health").status_code != 200:
            yield "does not answer others"


def _script(target: Target, script: str) -> Iterator[str]:
    """Open the page, and choose the adapter that has the script for its name and in its metadata."""
    name = script.replace("/", "")
    shown = _shown_for(target, name)
    if not any(name in html.unescape(text) for text in shown):
        yield "is shown nowhere"
    for text in shown:
        yield from live(text)
        if re.search('[<>"]', script) and (script in text or name in text):
            yield f"markup as it came: {text[:200]}"


def _shown_for(target: Target, adapter: str) -> list[str]:
    """All HTML of the page, and of what its handlers make of opening it and of an adapter in the first slot."""
    components = {part["id"]: part for part in ask(target, "GET", "config").json()["components"]}
    values = {number: part["props"].get("value") for number, part in components.items()}
    shown = [str(values[number]) for number, part in components.items() if part["type"] == "html"]
    slot = next(number for number, part in components.items() if part["props"].get("elem_id") == "slot-1-file")
    values[slot] = adapter
    fns = {
        number: fn
        for number, fn in target.app.demo.fns.items()
        if fn.fn is not None and any(event == "load" or chosen == slot for chosen, event in fn.targets)
    }
    calls = {number: [values.get(part._id) for part in fn.inputs] for number, fn in fns.items()}
    for number, reply in call_all(target, calls).items():
        shown += markup(fns[number], reply.messages)
    return shown


def health_and_drawing(target: Target) -> dict[str, Any]:
    """What /health answers, and under `sound_call` whether a sound call of `generate` was drawn.

    Where nothing is served, no promise can be broken: DRAWN says that this is not so; else it is the error.
    """
    fields = {**SOUND, "adapters": {"ink": 1.0, "lego": -0.5}}
    reply = call(target, public(target, "generate"), list(fields.values()))
    return target.health() | {"sound_call": reply.error or DRAWN}


def leaks(text: str) -> Iterator[str]:
    """What stands in an answer of files that are not the app's to give."""
    yield from (f"leaked {canary!r}: {text[:200]}" for canary in CANARIES if canary in text)


def live(text: str) -> list[str]:
    """Markup of ours that stands in HTML unescaped."""
    return re.findall(r"<img src=x onerror|<script>alert|<svg onload|\" onmouseover=\"alert", text)


def markup(fn: Any, messages: list[dict[str, Any]]) -> list[str]:
    """What a handler sent to HTML components."""
    found = []
    for message in messages:
        data = (message.get("output") or {}).get("data") or []
        for component, value in zip(fn.outputs, data, strict=False):
            # lists and mappings are for templates, which escape; the browser's test sees what they make
            shown = value.get("value") if isinstance(value, dict) else value
            if component.get_block_name() == "html" and isinstance(shown, str):
                found.append(shown)
    return found


def unescaped(fn: Any, messages: list[dict[str, Any]]) -> list[str]:
    """Markup of ours in what a handler sent to HTML components."""
    return [fault for text in markup(fn, messages) for fault in live(text)]


ONE_LINE = "an error of one line"
KINDS: tuple[Kind, ...] = (
    Kind("paths of files that are not the app's", "400 or above, or the page", payloads.TRAVERSALS, _path),
    Kind("addresses that the server is to fetch", "400, 403 or 404", payloads.FETCHES, _fetch),
    Kind("foreign Host, Origin and Sec-Fetch, to three routes", "400 or 403", payloads.STRANGERS, _stranger),
    Kind("wrong values to generate", ONE_LINE, payloads.CALLS, _generate),
    Kind("wrong values to blend", f"{ONE_LINE}, nothing written", payloads.NAMES, _blend, may_write=()),
    Kind("wrong arguments to each documented endpoint", "an answer or an error", payloads.SHAPES, _shape),
    Kind("junk in every input of every private handler", "an answer or an error", payloads.JUNK, _junk),
    Kind("addresses for files, to every handler and route", "403", payloads.ADDRESSES, _address),
    Kind("handlers that are not there", "400 or above", payloads.NUMBERS, _number),
    Kind("bodies too long or of another kind", "the status due: 400, 404 or 413", payloads.BODIES, _body),
    Kind(
        "pages uploaded under hostile names", "taken into a folder of theirs, served inert", payloads.UPLOADS, _upload
    ),
    Kind("a page in the output folder", "served inert", ("page.html",), _page),
    Kind(f"{SILENT} connections that stop in mid-request", "others are answered", (SILENT,), _silence),
    Kind("scripts in names and metadata of files", "text wherever they are shown", payloads.SCRIPTS, _script),
)
