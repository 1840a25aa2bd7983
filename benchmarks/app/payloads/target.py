"""The app that payloads are sent to: what lies beside it that it may not give, and a trap for what it may not fetch."""

import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from diffusers import StableDiffusionPipeline
from safetensors.numpy import load, save

from benchmarks.app.payloads.payloads import SCRIPT, SCRIPTS
from ui.app import RunningApp, serve
from ui.backend.session import Session
from ui.options import UiOptions

SECRET = "canary-7c41f9"
CANARIES = (SECRET, "root:x:0:0", "[project]", "def build_app")
LOOPBACK = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "None")


@dataclass(frozen=True)
class Answer:
    """What one request came to: a status, or how a call through the queue ended; and after how long."""

    what: str
    seconds: float


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
            if name not in LOOPBACK and not name.startswith("/"):
                self.reached.append(name)


@dataclass(frozen=True)
class Target:
    """A served app, how to ask it, and the words that payloads need.

    Attributes:
        app: the app, in this process.
        http: a client of it.
        trap: who was asked in its name.
        root: the folder with its adapters, outputs, runs and the secrets beside them.
        words: what stands for `{secret}` and the like.
        answers: of every request since it was last emptied.
    """

    app: RunningApp
    http: httpx.Client
    trap: Trap
    root: Path
    words: Mapping[str, str]
    answers: list[Answer] = field(default_factory=list)

    def note(self, what: str, start: float) -> None:
        """Add to `answers` what a request came to that was begun at `start`, by `time.perf_counter()`."""
        self.answers.append(Answer(what, time.perf_counter() - start))

    def health(self) -> dict[str, Any]:
        """What the app says of itself; not among `answers`."""
        record: dict[str, Any] = self.http.get("health").json()
        return record

    def faults(self) -> Iterator[str]:
        """What was fetched for someone since this was last asked, and what ails the app."""
        for what in ("called", "reached"):
            noted = getattr(self.trap, what)
            while noted:
                yield f"{what} {noted.pop()}"
        if (status := self.health()["status"]) != "ok":
            yield f"health: {status}"

    def listing(self) -> set[str]:
        """Every file and folder in `root`, and what got out of it by the names that payloads give."""
        outside = [place for folder in {self.root.parent, Path("/tmp")} for place in folder.glob("escaped*")]
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*")} | set(map(str, outside))


@contextmanager
def trap_set() -> Iterator[Trap]:
    """A server on loopback that notes who calls, and a hook that notes where this process goes."""

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
    try:
        yield trap
    finally:
        trap.is_set = False
        server.shutdown()
        server.server_close()
        thread.join()


def lay_out(root: Path, adapters: Mapping[str, bytes]) -> None:
    """Write adapters sound, broken and hostile, an output folder, and secrets beside both.

    Args:
        root: an empty folder.
        adapters: file name -> content of sound ones, `lego.safetensors` among them.
    """
    folder = root / "adapters"
    folder.mkdir()
    (root / "out").mkdir()
    for name, content in adapters.items():
        (folder / name).write_bytes(content)
    (folder / "broken.safetensors").write_bytes(b"not an adapter")
    for place in (root, folder):
        (place / "secret.txt").write_text(SECRET)
    tensors = load(adapters["lego.safetensors"])
    for number, script in enumerate(SCRIPTS):
        metadata = {"modelspec.title": script, "modelspec.author": script, "modelspec.trigger_phrase": script}
        tags = {"ss_tag_frequency": json.dumps({script: {script: 3}}), "ss_base_model_version": script}
        name = script.replace("/", "")
        (folder / f"{name}.safetensors").write_bytes(save(tensors, metadata=metadata | tags))
        (folder / f"{number}{name}-broken.safetensors").write_bytes(script.encode())


@contextmanager
def target_over(pipe: StableDiffusionPipeline, adapters: Mapping[str, bytes]) -> Iterator[Target]:
    """Serve the app over a folder of its own until the end of the block; even its base has a hostile name."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name, trap_set() as trap:
        root = Path(name).resolve() / "desk"
        root.mkdir()
        lay_out(root, adapters)
        session = Session(pipe, model=SCRIPT, folder=root / "adapters", output=root / "out")
        app = serve(session, _options(root))
        try:
            # no connection is kept: the server hangs up on idle ones while another answer is waited for
            limits = httpx.Limits(max_keepalive_connections=0)
            with httpx.Client(base_url=app.url, timeout=30, limits=limits) as http:
                yield Target(app, http, trap, root, _words(root, trap))
        finally:
            app.close()


def _words(root: Path, trap: Trap) -> dict[str, str]:
    return {
        "secret": str(root / "secret.txt"),
        "output": str(root / "out"),
        "adapters": str(root / "adapters"),
        "trap": f"127.0.0.1:{trap.port}",
        "port": str(trap.port),
    }


def _options(root: Path) -> UiOptions:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return UiOptions(
        model="random",
        adapters=root / "adapters",
        output=root / "out",
        port=port,
        datasets=(root / "datasets",),
        runs=root / "runs",
    )
