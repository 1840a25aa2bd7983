"""The documented endpoints through gradio_client, /health, and ending the app."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install dora-diffusion[ui]")

from gradio_client import Client, handle_file  # noqa: E402  (after the skip above)
from gradio_client.exceptions import AppError  # noqa: E402

from dora_diffusion.formats import save_adapter  # noqa: E402
from dora_diffusion.generation.png_metadata import (
    METADATA_CHUNK,  # noqa: E402
    picture_texts,  # noqa: E402
)
from dora_diffusion.state import AdapterState  # noqa: E402
from tests.failing_disk import contents  # noqa: E402
from tests.pocket_random import random_adapter  # noqa: E402
from tests.ui.scripted import PATIENCE, until  # noqa: E402
from tests.ui.served import Served, free_port, served  # noqa: E402
from ui.backend.picture_difference import largest_difference  # noqa: E402
from ui.backend.request import DetailValues, DrawRequest, SlotValues, check_adapters, check_settings  # noqa: E402
from ui.backend.session import Session  # noqa: E402
from ui.server.health import close_all  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("plain_signals"),
    # what gradio 6.31's queue asks of pandas, pandas 3 calls deprecated
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]


@pytest.fixture
def app(session: Session, tmp_path: Path) -> Iterator[Served]:
    """The app, served."""
    with served(session, tmp_path) as app:
        yield app


@pytest.fixture
def client(app: Served, tmp_path: Path) -> Iterator[Client]:
    """A client of it that downloads into a folder of its own."""
    client = Client(app.url, verbose=False, download_files=str(tmp_path / "downloads"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def refusing(
    pipe: StableDiffusionPipeline, make_adapters: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """A client of one app for all calls that are refused: none of them may change anything, and that is looked at."""
    folder = tmp_path_factory.mktemp("refusing")
    session = Session(pipe, model="random", folder=make_adapters(folder), output=folder / "out")
    with served(session, folder) as app:
        client = Client(app.url, verbose=False, download_files=False)
        before = contents(folder), session.loaded
        yield client
        client.close()
        assert (contents(folder), session.loaded) == before
    session.close()


def test_the_endpoints_are_documented_and_no_other_is(client: Client) -> None:
    answer = client.view_api(return_format="dict")
    assert set(answer["named_endpoints"]) == {"/generate", "/list_adapters", "/blend"}
    assert answer["unnamed_endpoints"] == {}
    names = [parameter["parameter_name"] for parameter in answer["named_endpoints"]["/generate"]["parameters"]]
    assert names == ["prompt", "adapters", "negative_prompt", "seed", "steps", "guidance", "options"]
    assert all(endpoint["description"] for endpoint in answer["named_endpoints"].values())


def test_generate_draws_what_a_session_draws(client: Client, app: Served) -> None:
    answer = client.predict(
        "a fox",
        {"ink": 0.7, "lego": {"denoiser": -0.5, "text_encoders": 0.25}},
        "",
        3,
        2,
        3.0,
        {"count": 2, "width": 64, "height": 64},
        api_name="/generate",
    )
    slots = [
        SlotValues.of("ink", 0.7),
        replace(SlotValues.of("lego", 1), apart=True, denoiser=-0.5, text_encoders=0.25),
    ]
    parts = app.session.parts
    settings = check_settings("a fox", "", 3, 2, 3.0, DetailValues(width=64, height=64))
    request = DrawRequest(settings, check_adapters(slots, parts), count=2)
    assert answer["phase"] == "done" and len(answer["pictures"]) == 2
    for path, drawn in zip(answer["pictures"], app.session.draw(request), strict=True):
        with Image.open(path) as picture:
            assert picture.tobytes() == drawn.image.tobytes()
    record = json.loads(picture_texts(Path(answer["pictures"][1]))[METADATA_CHUNK])
    assert record["settings"]["seed"] == 4 and [use["name"] for use in record["adapters"]] == ["ink", "lego"]


def test_progress_comes_while_it_draws(client: Client) -> None:
    job = client.submit("a fox", {"ink": 1}, steps=3, api_name="/generate")
    job.result(timeout=PATIENCE)
    assert [outcome["phase"] for outcome in job.outputs()][-1] == "done"
    assert all(outcome["pictures"] == [] for outcome in job.outputs()[:-1])


def test_pictures_to_start_from_are_uploaded(client: Client, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    options = {"picture": handle_file(str(tmp_path / "red.png")), "strength": 0.5}
    answer = client.predict("a fox", options=options, steps=4, api_name="/generate")
    record = json.loads(picture_texts(Path(answer["pictures"][0]))[METADATA_CHUNK])
    assert record["canvas"]["picture"] is not None


def test_a_cancelled_job_stops_the_drawing(client: Client, app: Served) -> None:
    job = client.submit("a fox", steps=100, options={"count": 16}, api_name="/generate")
    until(job.outputs)
    job.cancel()
    until(lambda: not app.session.busy)


def test_adapters_are_listed_with_what_is_wrong(client: Client) -> None:
    listed = {file["name"]: file for file in client.predict(api_name="/list_adapters")}
    assert set(listed) == {"ink", "lego", "broken"}
    assert listed["ink"]["kind"] == "DoRA" and listed["ink"]["problem"] is None
    assert listed["broken"]["problem"]


def test_a_blend_is_a_new_adapter_that_draws(client: Client, app: Served) -> None:
    answer = client.predict({"ink": 0.6, "lego": -0.4}, "both", api_name="/blend")
    assert answer["name"] == "both" and answer["layers"] > 0
    assert "both" in app.session.library.usable
    alone = client.predict("a fox", {"both": 1}, steps=2, api_name="/generate")
    assert alone["phase"] == "done"
    with pytest.raises(AppError, match="already"):
        client.predict({"ink": 0.6}, "both", api_name="/blend")


MIXES: list[dict[str, Any]] = [
    {"words": {"strength": 0.8, "blocks": [0.5, 0, 2]}},
    {"shapes": {"denoiser": 0.7, "text_encoders": -0.5, "blocks": [1, 0.25, 1]}},
    {"words": {"blocks": [1, 2, 1]}, "shapes": {"denoiser": -0.5, "blocks": [0, 1, 1]}, "ink": 0},
]


@pytest.mark.parametrize("mix", MIXES, ids=["text encoder only", "denoiser only", "both"])
def test_a_mix_is_drawn_and_blended_alike(
    client: Client, app: Served, pipe: StableDiffusionPipeline, mix: dict[str, Any]
) -> None:
    modules = random_adapter(pipe, 3).modules
    for name, component in (("words", "text_encoder."), ("shapes", "unet.")):
        own = {path: module for path, module in modules.items() if path.startswith(component)}
        save_adapter(AdapterState(own), app.session.library.folder / f"{name}.safetensors")
    app.session.library.refresh()
    answer = client.predict(mix, "blended", api_name="/blend")
    assert answer["layers"] > 0
    pictures = []
    for adapters in (mix, {"blended": 1}):
        (path,) = client.predict("a fox", adapters, seed=3, steps=2, api_name="/generate")["pictures"]
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    assert largest_difference(*pictures) <= 1


@pytest.mark.parametrize(
    "mix",
    [{"ink": 3}, {"ink": {"blocks": [1, 1]}}, {"ink": {"blocks": [1, 1, "x"]}}, {"nobody": 1}, {"broken": 1}, ["ink"]],
    ids=str,
)
def test_a_wrong_mix_is_refused_alike(refusing: Client, mix: Any) -> None:
    answers = []
    for api_name, values in (("/generate", ("a", mix)), ("/blend", (mix, "x"))):
        with pytest.raises(AppError) as raised:
            refusing.predict(*values, api_name=api_name)
        answers.append(str(raised.value))
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": 7}, "prompt: got 7, expected text"),
        ({"prompt": "a", "seed": -1}, "seed: got -1"),
        ({"prompt": "a", "steps": 10**9}, "steps: got 1000000000"),
        ({"prompt": "a", "adapters": {"nobody": 1}}, "nobody: no such adapter"),
        ({"prompt": "a", "adapters": {"ink": 3}}, "slot 1, strength: got 3"),
        ({"prompt": "a", "adapters": ["ink"]}, "adapters: got list"),
        ({"prompt": "a", "adapters": {"broken": 1}}, "broken: "),
        ({"prompt": "a", "options": {"device": "cpu"}}, "options: got 'device'"),
        ({"prompt": "a", "options": {"blend": "no"}}, "blend: got 'no'"),
        ({"prompt": "a", "options": {"picture": {"path": "/etc/hostname"}}}, "picture: not an upload"),
    ],
)
def test_mistakes_are_told_in_one_line(refusing: Client, call: dict, message: str) -> None:
    with pytest.raises(AppError) as raised:
        refusing.predict(**call, api_name="/generate")
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_health_tells_model_queue_memory_and_version(app: Served) -> None:
    answer = app.ask("GET", "health").json()
    assert answer["status"] == "ok" and answer["model"] == "random" and answer["version"]
    assert answer["queue"] == 0 and answer["busy"] is False
    assert answer["adapters"] == {"usable": 2, "broken": 1, "loaded": 0}
    assert answer["memory"]["process_bytes"] > 1 << 20


def test_closers_are_all_called_and_waited_for_no_longer_than_told(capsys: pytest.CaptureFixture[str]) -> None:
    called: list[str] = []

    def fail() -> None:
        raise OSError("no")

    assert close_all([fail, lambda: called.append("next")], seconds=PATIENCE)
    assert called == ["next"] and "OSError: no" in capsys.readouterr().err
    ended = threading.Event()
    assert not close_all([ended.wait], seconds=0.05)
    ended.set()


SCRIPT = """
import sys
from pathlib import Path
from tests.pocket_random import random_pocket_pipeline
from tests.ui.served import served
from ui.server.health import on_shutdown
from ui.backend.session import Session
folder = Path(sys.argv[1])
session = Session(random_pocket_pipeline(), model="random", folder=folder / "adapters", output=folder / "out")
with served(session, folder) as app:
    print(app.url, flush=True)
    on_shutdown(app.demo, session)
"""


HANGUP = getattr(signal, "SIGHUP", None)
needs_terminals = pytest.mark.skipif(HANGUP is None, reason="this system has no terminals that hang up")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, pytest.param(HANGUP, marks=needs_terminals)])
def test_a_signal_ends_the_app_in_the_middle_of_a_drawing(adapters: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(adapters.parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        client = Client(url, verbose=False, download_files=False)
        job = client.submit("a fox", steps=100, options={"count": 16}, api_name="/generate")
        until(job.outputs)
        process.send_signal(number)
        process.wait(timeout=PATIENCE)
        assert process.returncode == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
        _, errors = process.communicate(timeout=PATIENCE)
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()
    assert not list((adapters.parent / "out").glob("*.tmp*"))
    assert free_port()


IN_TERMINAL = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.{handler})
import time
from pathlib import Path
from types import SimpleNamespace
from ui.server.health import on_shutdown
class Demo:
    server = SimpleNamespace(force_exit=False)
    @property
    def is_running(self):  # asked first when the signals have their handlers
        Path({folder!r}, "up").touch()
        return True
    def close(self, verbose):
        Path({folder!r}, "demo" if self.server.force_exit else "waits for open pages").touch()
twice = Path({folder!r}, "twice")
session = SimpleNamespace(stop_all=lambda: None, close=lambda: Path({folder!r}, "session").touch())
def fail():
    Path({folder!r}, "closing").touch()
    while not twice.exists():  # a shell hands the signal on: it comes again while it closes
        time.sleep(0.02)
    raise OSError("no")
on_shutdown(Demo(), session, [fail])
Path({folder!r}, "through").touch()
"""


@needs_terminals
@pytest.mark.parametrize(("handler", "ends"), [("SIG_DFL", True), ("SIG_IGN", False)], ids=["plain", "nohup"])
def test_a_closed_terminal_ends_the_app_unless_it_shall_stay(tmp_path: Path, handler: str, ends: bool) -> None:
    ours, theirs = os.openpty()
    script = IN_TERMINAL.format(handler=handler, folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    try:
        os.close(theirs)
        until((tmp_path / "up").exists)
        os.close(ours)
        if ends:
            until((tmp_path / "closing").exists)
        process.send_signal(signal.SIGHUP)
        (tmp_path / "twice").touch()
        if ends:
            process.wait(PATIENCE)
            found = {path.name for path in tmp_path.iterdir()}
            assert found == {"up", "closing", "twice", "session", "demo", "through"}
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.terminate()
            process.wait(PATIENCE)
            assert (tmp_path / "through").exists()
    finally:
        process.kill()
        process.wait()
