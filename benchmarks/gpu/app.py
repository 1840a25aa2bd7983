"""Section 5: the app draws for several tabs at once on the device."""

import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.app.load import controls, random_request
from benchmarks.gpu.setting import Row, Rows, Setting, row_of
from dora_diffusion.generation.png_metadata import read_metadata
from tests.pocket_random import random_pocket_pipeline
from ui.backend.session import Session

CLIENTS = 4


def rows(setting: Setting) -> Rows:
    """Random requests as `benchmarks.app.load` makes them, 64 x 64 pixels in two steps."""
    yield row_of({"name": f"{CLIENTS} tabs"}, lambda: _drawn(setting, 4 if setting.is_tiny else 100))


def _drawn(setting: Setting, count: int) -> Row:
    source = random.Random(0)
    requests = [random_request(source) for _ in range(count)]
    with tempfile.TemporaryDirectory() as name:
        folder = controls(Path(name) / "adapters")
        session = Session(
            random_pocket_pipeline().to(setting.device), model="random", folder=folder, output=Path(name) / "out"
        )

        def draw(number: int) -> tuple[float, str, str]:
            began = time.perf_counter()
            # one owner for each request: an owner's new run would stop its earlier one
            last = list(session.start(requests[number], owner=str(number)).updates())[-1]
            seconds = time.perf_counter() - began
            return seconds, last.phase, _device_of(last.picture)

        began = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            done = list(pool.map(draw, range(count)))
        whole = time.perf_counter() - began
        session.close()
    waits, phases, devices = zip(*done, strict=True)
    found = {
        "device": ", ".join(sorted(set(devices))),
        "requests": count,
        "done": phases.count("done"),
        "median": statistics.median(waits),
        "worst": max(waits),
        "a_second": count / whole,
    }
    if found["done"] != count:
        return {**found, "error": f"{count - phases.count('done')} did not end as done"}
    if set(devices) != {setting.device}:
        return {**found, "error": f"drawn on {found['device']}, expected {setting.device}"}
    return found


def _device_of(picture: Path | None) -> str:
    """Where a picture says that it was drawn."""
    record = None if picture is None else read_metadata(picture)
    base = None if record is None or record.origin is None else record.origin.base
    return "nowhere" if base is None else str(base.device).split(":")[0]
