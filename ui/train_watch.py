"""A run in the page while it goes on: progress, losses, samples, checkpoints. Read from its folder, once a second."""

import base64
import io
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.training.images import read_image
from ui.options import UiOptions
from ui.stage import status_html
from ui.train_plot import loss_plot
from ui.train_process import Trainer, TrainState, last_line
from ui.train_runs import (
    LOG,
    Losses,
    LossReader,
    list_checkpoints,
    list_runs,
    list_samples,
    run_config,
)

SECONDS = 1.0
MOST_SAMPLES, SAMPLE_WIDTH = 24, 1024
_MOST_READERS = 16


@dataclass(frozen=True)
class Watch:
    """The widgets of a run."""

    run: gr.Dropdown
    start: gr.Button
    resume: gr.Button
    stop: gr.Button
    status: gr.HTML
    plot: gr.HTML
    samples: gr.HTML
    timer: gr.Timer
    seen: gr.State


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


def build_watch(options: UiOptions) -> Watch:
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
    return Watch(run, start, resume, stop, status, plot, samples, gr.Timer(SECONDS), gr.State(None))


def wire_watch(board: Watch, checkpoint: gr.Dropdown, trainer: Trainer, options: UiOptions) -> None:
    """Show the chosen run at every tick, sending what has changed."""
    readers = Readers()

    def tick(run: object, seen: object) -> list[Any]:
        state, names = trainer.state(), list_runs(options.runs)
        before = seen if isinstance(seen, Moment) else Moment()
        buttons = _buttons(state) if state.phase != before.phase else [gr.skip(), gr.skip()]
        if not isinstance(run, str) or run not in names:  # a new page, or the folder is gone: show what goes on
            under_way = state.run if state.phase == "running" else None
            now = replace(Moment(), phase=state.phase, names=tuple(names))
            choice = gr.skip() if now == before else gr.Dropdown(names, value=under_way)
            return [choice, *[gr.skip()] * 4, *buttons, now]
        folder = options.runs / run
        losses = readers.losses(folder)
        now = _moment(folder, state, losses, names)
        makers: dict[str, Callable[[], Any]] = {
            "names": lambda: gr.Dropdown(names),
            "status": lambda: _status(folder, state, losses),
            "counts": lambda: loss_plot(losses, total=_total(folder)),
            "samples": lambda: _strip(folder),
            "checkpoints": lambda: _checkpoints(folder),
        }
        old = before if before.run == run else replace(Moment(), names=before.names)
        changed = [gr.skip() if getattr(old, part) == getattr(now, part) else make() for part, make in makers.items()]
        return [*changed, *buttons, now if now != before else gr.skip()]

    board.timer.tick(
        tick, [board.run, board.seen],
        [board.run, board.status, board.plot, board.samples, checkpoint, board.start, board.stop, board.seen],
        show_progress="hidden", trigger_mode="once", queue=False, api_visibility="private",
    )  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """What a tab was shown last: one part for each widget, None before the first time."""

    run: str | None = None
    phase: str | None = None
    names: tuple[str, ...] | None = None
    status: tuple[Any, ...] | None = None
    counts: tuple[Any, ...] | None = None
    samples: tuple[Any, ...] | None = None
    checkpoints: tuple[int, ...] | None = None


def _buttons(state: TrainState) -> list[Any]:
    running = state.phase == "running"
    return [gr.Button(interactive=not running), gr.Button(interactive=running)]


def _moment(run: Path, state: TrainState, losses: Losses, names: list[str]) -> Moment:
    mine = (state.phase, state.message) if state.run == run.name else ("idle", "")
    counts = (len(losses.train), len(losses.validation), *list(losses.train.items())[-1:])
    samples = tuple((step, path.stat().st_mtime_ns) for step, path in list_samples(run))
    checkpoints = tuple(list_checkpoints(run))
    return Moment(run.name, state.phase, tuple(names), (*mine, counts, checkpoints), counts, samples, checkpoints)


def _total(run: Path) -> int:
    try:
        return run_config(run).optim.steps
    except ValueError:
        return 0


def _status(run: Path, state: TrainState, losses: Losses) -> str:
    """A line that says where the run is, with a bar."""
    step, total = max(losses.train, default=0), _total(run)
    at = f"step {step} of {total}"
    if state.run != run.name or state.phase == "idle":
        steps = list(list_checkpoints(run))
        rest = f"it can be resumed from step {steps[-1]}" if steps else "no checkpoint; Resume begins anew"
        done = step >= total > 0
        text = f"{run.name}: {'done, ' if done else ''}{at}{'' if done else f'; {rest}'}"
        return status_html(text, share=step / max(total, 1), kind="good" if done else "")
    if state.phase == "running":
        loss = f", loss {losses.train[step]:.4f}" if step else f": getting ready … {state.message}"
        return status_html(f"{run.name}: {at}{loss}", share=step / max(total, 1))
    if state.phase == "failed":
        return status_html(f"{run.name} failed at {at}: {state.message or last_line(run / LOG)}", kind="bad")
    if state.phase == "stopped":
        steps = list(list_checkpoints(run))
        return status_html(f"{run.name}: stopped at {at}; Resume goes on from step {steps[-1] if steps else 0}")
    return status_html(f"{run.name}: done, {at}", share=1.0, kind="good")


def _strip(run: Path) -> str:
    """The sample rows, the newest first: the same prompts and noise after more and more steps."""
    rows = []
    for step, path in reversed(list_samples(run)[-MOST_SAMPLES:]):
        try:
            picture = read_image(path)
        except ValueError:  # being written
            continue
        picture.thumbnail((SAMPLE_WIDTH, SAMPLE_WIDTH))
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=88)
        source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        rows.append(f'<figure><img src="{source}" alt="samples"><figcaption>step {step}</figcaption></figure>')
    return f'<div class="train-strip" tabindex="0" aria-label="samples">{"".join(rows)}</div>' if rows else ""


def _checkpoints(run: Path) -> Any:
    """The dropdown of checkpoints, the newest chosen."""
    steps = list(list_checkpoints(run))
    return gr.Dropdown([(f"step {step}", step) for step in steps], value=steps[-1] if steps else None)
