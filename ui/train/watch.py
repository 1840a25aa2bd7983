"""A run in the page while it goes on: progress, losses, samples, checkpoints. Read from its folder, once a second."""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.utils.images import read_image
from ui.errors import EventOptions, wire
from ui.markup import picture_url, region, status_html
from ui.options import UiOptions
from ui.train.plot import loss_plot
from ui.train.process import Trainer, TrainState
from ui.train.runs import (
    Losses,
    LossReader,
    changed_at,
    ended_early,
    is_through,
    list_checkpoints,
    list_runs,
    list_samples,
    run_config,
)

SECONDS = 1.0
MOST_SAMPLES, SAMPLE_WIDTH = 24, 1024
_MOST_READERS = 16


@dataclass(frozen=True)
class RunWatch:
    """The widgets of a run; `seen` is hidden and tells a tick what the page shows."""

    run: gr.Dropdown
    start: gr.Button
    resume: gr.Button
    stop: gr.Button
    status: gr.HTML
    plot: gr.HTML
    samples: gr.HTML
    timer: gr.Timer
    seen: gr.Textbox


class Readers:
    """The losses of the runs that are looked at; shared by all tabs, so that each file is read once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers: dict[Path, LossReader] = {}

    def losses(self, run: Path) -> Losses:
        """Those of one run, so far."""
        with self._lock:
            reader = self._readers.pop(run, None) or LossReader(run)
            self._readers[run] = reader
            while len(self._readers) > _MOST_READERS:
                self._readers.pop(next(iter(self._readers)))
            return reader.losses()


def build_watch(options: UiOptions) -> RunWatch:
    """Lay out the run inside the open block."""
    with gr.Row():
        start = gr.Button("Start training", variant="primary", elem_id="train-start", min_width=130)
        stop = gr.Button("Stop training", variant="stop", elem_id="train-stop", interactive=False, min_width=130)
    with gr.Row(elem_classes="rack-head"):
        run = gr.Dropdown(list_runs(options.runs), value=None, label="Run on show", elem_id="train-run", min_width=180)
        resume = gr.Button("Resume", size="sm", scale=0, min_width=90, elem_id="train-resume")
    status = gr.HTML(status_html("No run on show."), elem_id="train-status")
    plot = gr.HTML(elem_id="train-loss")
    samples = gr.HTML(elem_id="train-strip")
    seen = gr.Textbox(visible="hidden", elem_id="train-seen")
    return RunWatch(run, start, resume, stop, status, plot, samples, gr.Timer(SECONDS), seen)


def wire_watch(board: RunWatch, checkpoint: gr.Dropdown, trainer: Trainer, options: UiOptions) -> None:
    """Show the chosen run at every tick, sending what has changed.

    What the page shows is remembered by the page itself: an answer that gets lost is sent again, and whatever another
    handler has put there meanwhile is replaced, since a start counts as a change even when it has ended already.
    """
    readers = Readers()

    def tick(chosen: object, seen: object) -> list[Any]:
        state, names = trainer.state(), list_runs(options.runs)
        run = options.runs / chosen if isinstance(chosen, str) and chosen in names else None
        parts = _parts(run, state, names, readers.losses(run) if run else Losses())
        shown, now = _read(seen), {name: part.mark for name, part in parts.items()}
        changed = [gr.skip() if shown.get(name) == part.mark else part.make() for name, part in parts.items()]
        return [*changed, gr.skip() if shown == now else json.dumps(now)]

    wire(
        board.timer.tick,
        tick,
        [board.run, board.seen],
        [board.run, board.status, board.plot, board.samples, checkpoint, board.start, board.stop, board.seen],
        # no preprocess: gradio would refuse a run that is listed no more, at every tick of a page that shows it
        options=EventOptions(trigger_mode="once", queue=False, preprocess=False),
    )


@dataclass(frozen=True)
class WatchedPart:
    """A widget of a run: a short text that changes when what it shows does, and what it shows."""

    mark: str
    make: Callable[[], Any]


def _parts(run: Path | None, state: TrainState, names: list[str], losses: Losses) -> dict[str, WatchedPart]:
    """The outputs of a tick, in their order; they depend on nothing but what is so now."""
    name = run.name if run else None
    under_way = state.run if state.under_way and state.run in names else None
    choice = gr.Dropdown(names) if run else gr.Dropdown(names, value=under_way)  # a new page shows what goes on
    status = _status(run, state, losses) if run else _status_of_none(state, names)
    total = _plan(run)[0] if run else 0
    counts = len(losses.train), len(losses.validation), list(losses.train.items())[-1:]
    samples = [(step, changed_at(path)) for step, path in list_samples(run)] if run else []
    steps = list(list_checkpoints(run)) if run else []
    busy = state.under_way
    return {
        "run": WatchedPart(_mark(names, None if run else (under_way, state.number)), lambda: choice),
        "status": WatchedPart(_mark(status, state.number), lambda: status),
        "plot": WatchedPart(_mark(name, total, counts), lambda: loss_plot(losses, total=total) if run else ""),
        "samples": WatchedPart(_mark(name, samples), lambda: _strip(run) if run else ""),
        "checkpoint": WatchedPart(_mark(name, steps), lambda: _checkpoints(steps)),
        "start": WatchedPart(_mark(busy, state.number), lambda: gr.Button(interactive=not busy)),
        "stop": WatchedPart(_mark(state.phase, state.number), lambda: gr.Button(interactive=state.phase == "running")),
    }


def _mark(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _read(seen: object) -> dict[str, Any]:
    """What the page says it shows; nothing when it says no such thing."""
    try:
        sent = json.loads(seen) if isinstance(seen, str) else None
    except (ValueError, RecursionError):
        return {}
    return sent if isinstance(sent, dict) else {}


def _plan(run: Path) -> tuple[int, str]:
    """How many steps a run shall have, and ""; or 0, and why its configuration cannot be used any more."""
    try:
        return run_config(run).optim.steps, ""
    except ValueError as error:
        return 0, str(error)


def _status_of_none(state: TrainState, names: list[str]) -> str:
    if state.under_way and state.run not in names:
        line = f"{state.run}: its folder was removed while it trains; stop it, what it learns is not listed"
        return status_html(line, kind="bad")
    return status_html("No run on show.")


def _status(run: Path, state: TrainState, losses: Losses) -> str:
    """A line that says where the run is, with a bar."""
    step, steps, total = max(losses.train, default=0), list(list_checkpoints(run)), _plan(run)[0]
    newest = steps[-1] if steps else 0
    if state.run != run.name:
        return _status_at_rest(run, state, step)
    begun = losses.written >= state.since and step > 0
    if not begun:  # what is written is of an earlier start
        step = newest
    at, share = _at(step, total), step / max(total, 1)
    if state.phase == "running" and not begun:
        return status_html(f"{run.name}: {at}: getting ready … {state.message}", share=share)
    if state.phase == "running":
        return status_html(f"{run.name}: {at}, loss {losses.train[step]:.4f}", share=share)
    if state.phase == "stopping":
        return status_html(f"{run.name}: {at}: stopping …", share=share, kind="warn")
    if state.phase == "failed":
        return status_html(f"{run.name} failed at {at}: {state.message}", kind="bad")
    if state.phase == "stopped":
        return status_html(f"{run.name}: stopped at {at}; Resume goes on from step {newest}")
    return status_html(f"{run.name}: done, {at}", share=1.0, kind="good")


def _status_at_rest(run: Path, state: TrainState, step: int) -> str:
    """Of a run that this app has not started last."""
    (total, problem), steps = _plan(run), list(list_checkpoints(run))
    at, other = _at(step, total), f" ({state.run} is under way)" if state.under_way else ""
    if is_through(run) and (step >= total or ended_early(run)):
        return status_html(f"{run.name}: done, {at}{other}", share=1.0, kind="good")
    rest = f"it can be resumed from step {steps[-1]}" if steps else "no checkpoint; Resume begins anew"
    return status_html(f"{run.name}: {at}; {problem or rest}{other}", share=step / max(total, step, 1))


def _at(step: int, total: int) -> str:
    return f"step {step} of {total}" if total else f"step {step}"


def _strip(run: Path) -> str:
    """The sample rows, the newest first: the same prompts and noise after more and more steps."""
    rows = []
    for step, path in reversed(list_samples(run)[-MOST_SAMPLES:]):
        try:
            picture = read_image(path)
        except ValueError:  # being written
            continue
        picture.thumbnail((SAMPLE_WIDTH, SAMPLE_WIDTH))
        source = picture_url(picture, format="JPEG")
        rows.append(f'<figure><img src="{source}" alt="samples"><figcaption>step {step}</figcaption></figure>')
    return region("".join(rows), "train-strip", "samples") if rows else ""


def _checkpoints(steps: list[int]) -> Any:
    """The dropdown of checkpoints, the newest chosen."""
    return gr.Dropdown([(f"step {step}", step) for step in steps], value=steps[-1] if steps else None)
