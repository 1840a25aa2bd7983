"""The app under load: many tabs at once, drawings cancelled, and adapters that change under its hands.

    python -m benchmarks.app.load            # docs/results/app.md and app.json

Three trials over a random pocket base. Every picture drawn among others must be, bit for bit, the one drawn alone;
after a cancel the next picture is that of a fresh app; a file that is cut short, replaced or deleted meanwhile gives
the picture of the very bytes that the metadata names, or an error of one line.
"""

import argparse
import json
import platform
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from dora_diffusion.formats import save_adapter
from dora_diffusion.generation.curves import NAMED_CURVES
from dora_diffusion.generation.generate import Canvas, GenerationSettings
from dora_diffusion.generation.png_metadata import read_metadata
from dora_diffusion.utils.atomic import sha256_of, write_atomically
from tests.pocket_random import random_adapter, random_pocket_pipeline
from ui.backend.request import AdapterChoice, DrawRequest
from ui.backend.run import Update
from ui.backend.session import Session

NAMES = ("ink", "lego", "clay", "wool")
MODES = ("additive", "compose", "direction-magnitude", "peft", "comfyui")
SAMPLERS = ("default", "euler", "euler a", "dpm++ 2m", "unipc")
SMALL = GenerationSettings("a cat", steps=2, guidance_scale=2.0, width=64, height=64)
LONG = replace(SMALL, steps=100)
_WHAT = """A random pocket base, 64 x 64 pixels, on a processor. Concurrent: random mixes, modes, curves, masks,
canvases, weights and samplers; each picture is, bit for bit, the one drawn alone. Cancels: at random moments; how long
until the drawing has ended, how many steps it still took, and the next picture is a fresh app's. Faults: an adapter cut
short, replaced or deleted at a random moment; the picture is that of the file whose hash its metadata names, or the
error has one line."""


@dataclass(frozen=True)
class Outcome:
    """What a trial came to; `problems` is empty when all went well."""

    name: str
    trials: int
    figures: dict[str, float]
    problems: tuple[str, ...]


def controls(folder: Path) -> Path:
    """A folder of four adapters for the random pocket, half of them DoRAs."""
    pipe = random_pocket_pipeline()
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES, start=1):
        save_adapter(random_adapter(pipe, number, use_dora=number % 2 == 1), folder / f"{name}.safetensors")
    return folder


def session_over(folder: Path, output: Path) -> Session:
    """A fresh app over a fresh base."""
    return Session(random_pocket_pipeline(), model="random", folder=folder, output=output)


def random_request(source: random.Random) -> DrawRequest:
    """A mix of up to three adapters, with whatever else a tab may ask for."""
    blend = source.choice(MODES) if source.random() < 0.4 else "additive"
    names = source.sample(NAMES, source.randint(0, 3))
    adapters = tuple(_choice(name, source, moves=blend == "additive") for name in names)
    has_canvas = source.random() < 0.2
    canvas = Canvas(_squares(source, "RGB"), _squares(source, "L") if source.random() < 0.5 else None)
    prompt = source.choice(("a cat", "a (cat:1.3) on [red]", "a castle", "a castle <lora:wool:0.4>"))
    settings = replace(SMALL, prompt=prompt, seed=source.randint(0, 5), sampler=source.choice(SAMPLERS))
    return DrawRequest(settings, adapters, blend, canvas=canvas if has_canvas else None)


def _choice(name: str, source: random.Random, *, moves: bool) -> AdapterChoice:
    strength = round(source.uniform(-1.5, 1.5), 2) or 1.0
    weight = strength if source.random() < 0.7 else {"unet": strength, "unet.mid_block": 0.5, "text_encoder": 0.3}
    curve = NAMED_CURVES[source.choice(tuple(NAMED_CURVES))] if moves and source.random() < 0.4 else None
    mask = _squares(source, "L") if moves and source.random() < 0.2 else None
    return AdapterChoice(name, weight, curve, mask)


def _squares(source: random.Random, mode: str) -> Image.Image:
    bands = [source.randbytes(16) for _ in range(3 if mode == "RGB" else 1)]
    small = Image.merge(mode, [Image.frombytes("L", (4, 4), band) for band in bands])
    return small.resize((64, 64), Image.Resampling.NEAREST)


def _pixels(path: Path | None) -> bytes:
    if path is None:
        return b""
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


def _last(session: Session, request: DrawRequest, owner: str) -> Update:
    return list(session.start(request, owner=owner).updates())[-1]


def concurrent(folder: Path, output: Path, *, count: int, clients: int, seed: int = 0) -> Outcome:
    """`count` random requests from `clients` tabs at once, each picture against the same request drawn alone."""
    source = random.Random(seed)
    requests = [random_request(source) for _ in range(count)]
    busy = session_over(folder, output)
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        # one owner for each request: an owner's new run would stop its earlier one
        drawn = list(pool.map(lambda pair: _last(busy, pair[1], str(pair[0])), enumerate(requests)))
    seconds = time.perf_counter() - started
    busy.close()
    quiet = session_over(folder, output / "serial")
    problems = []
    for number, (request, update) in enumerate(zip(requests, drawn, strict=True)):
        [alone] = quiet.draw(request)
        if _pixels(update.picture) != alone.image.tobytes():
            problems.append(f"request {number} differs: {request}")
    quiet.close()
    return Outcome("concurrent", count, {"clients": clients, "seconds": round(seconds, 1)}, tuple(problems))


def cancels(folder: Path, output: Path, *, count: int, seed: int = 0) -> Outcome:
    """Long drawings stopped at random moments; the app must stop within a step and then draw as a fresh one does."""
    source = random.Random(seed)
    session = session_over(folder, output)
    fresh = session_over(folder, output / "fresh")
    probe = DrawRequest(SMALL, (AdapterChoice("ink", 0.8), AdapterChoice("lego", -0.5)))
    expected = fresh.draw(probe)[0].image.tobytes()
    fresh.close()
    problems, waits, late = [], [], []
    for number in range(count):
        request = replace(random_request(source), settings=LONG)
        run = session.start(request, owner="tab")
        time.sleep(source.uniform(0, 0.6))
        asked = time.perf_counter()
        run.stop()
        before = run.latest.step
        last = list(run.updates())[-1]
        waits.append(time.perf_counter() - asked)
        late.append(last.step - before if last.phase == "stopped" else 0)
        if last.phase != "stopped":
            problems.append(f"cancel {number} ended as {last.phase}")
        if session.draw(probe)[0].image.tobytes() != expected:
            problems.append(f"the picture after cancel {number} differs")
    session.close()
    figures = {"worst_seconds": round(max(waits), 2), "worst_steps_after": max(late)}
    if max(late) > 1:
        problems.append(f"a cancel took {max(late)} steps")
    return Outcome("cancels", count, figures, tuple(problems))


def faults(folder: Path, output: Path, *, count: int, seed: int = 0) -> Outcome:
    """An adapter cut short, replaced or deleted at a random moment of a drawing with it."""
    source = random.Random(seed)
    session = session_over(folder, output)
    victim = folder / "ink.safetensors"
    contents = {sha256_of(folder / f"{name}.safetensors"): _bytes(folder, name) for name in ("ink", "clay")}
    request = DrawRequest(SMALL, (AdapterChoice("ink", 1.0), AdapterChoice("lego", 0.5)))
    good = _bytes(folder, "ink")
    expected = {}
    for sha256, content in contents.items():
        write_atomically(victim, content)
        expected[sha256] = session.draw(request)[0].image.tobytes()
    problems, errors = [], 0
    for number in range(count):
        write_atomically(victim, good)
        fault = _fault(victim, contents, source)
        timer = threading.Timer(source.uniform(0, 0.4), fault)
        timer.start()
        try:
            last = _last(session, request, "tab")
            record = read_metadata(last.picture) if last.picture else None
            if record is None or expected.get(str(record.adapters[0].sha256)) != _pixels(last.picture):
                problems.append(f"trial {number}: the picture is not that of the file that it names")
        except ValueError as error:
            errors += 1
            if "\n" in str(error):
                problems.append(f"trial {number}: an error of several lines: {error}")
        timer.join()
    write_atomically(victim, good)
    session.library.refresh()
    if session.draw(request)[0].image.tobytes() != expected[sha256_of(victim)]:
        problems.append("the last picture differs")
    session.close()
    return Outcome("faults", count, {"clear_errors": errors, "pictures": count - errors}, tuple(problems))


def _bytes(folder: Path, name: str) -> bytes:
    return (folder / f"{name}.safetensors").read_bytes()


def _fault(victim: Path, contents: dict[str, bytes], source: random.Random) -> Callable[[], None]:
    whole = source.choice(list(contents.values()))
    cut = source.randrange(len(whole))
    return source.choice(
        (
            lambda: victim.write_bytes(whole[:cut]),
            lambda: victim.write_bytes(whole),  # not atomically: a reader may see half of it
            lambda: write_atomically(victim, whole),
            lambda: victim.unlink(missing_ok=True),
        )
    )


def report(outcomes: Sequence[Outcome], command: str) -> str:
    """A table for people."""
    lines = ["# The app under load", "", f"`{command}`", "", _WHAT, ""]
    lines += ["| trial | number | figures | problems |", "| --- | --- | --- | --- |"]
    for outcome in outcomes:
        figures = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in outcome.figures.items())
        lines.append(f"| {outcome.name} | {outcome.trials} | {figures} | {len(outcome.problems)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all three and write what they came to; 1 when anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--cancels", type=int, default=100)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder, output = controls(Path(name) / "adapters"), Path(name) / "out"
        outcomes = [
            concurrent(folder, output, count=options.requests, clients=options.clients),
            cancels(folder, output, count=options.cancels),
            faults(folder, output, count=options.faults),
        ]
    command = (
        f"python -m benchmarks.app.load --requests {options.requests} --clients {options.clients} "
        f"--cancels {options.cancels} --faults {options.faults}"
    )
    text, record = report(outcomes, command), _record(outcomes, command)
    write_atomically(options.output / "app.md", text.encode())
    write_atomically(options.output / "app.json", json.dumps(record, indent=2).encode())
    print(text, *(problem for outcome in outcomes for problem in outcome.problems), sep="\n")
    return int(any(outcome.problems for outcome in outcomes))


def _record(outcomes: Sequence[Outcome], command: str) -> dict[str, Any]:
    versions = {name: version(name) for name in ("torch", "diffusers")}
    machine = {"system": platform.system(), "python": platform.python_version(), **versions}
    return {"command": command, "machine": machine, "trials": [asdict(outcome) for outcome in outcomes]}


if __name__ == "__main__":
    raise SystemExit(main())
