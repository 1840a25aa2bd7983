"""The Train tab: pictures and captions, a recipe, the run as it goes on, and its checkpoints in the rack.

`build_train` lays the tab out inside the open block. Training itself is a process of its own (`ui.train.process`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from ui.backend.session import Session
from ui.errors import user_errors
from ui.generate.stage import status_html
from ui.options import UiOptions
from ui.train.compare import build_compare, wire_compare
from ui.train.form import Form, build_form, config_of, wire_form
from ui.train.pictures import build_pictures, wire_pictures
from ui.train.plan import Planner
from ui.train.process import Trainer
from ui.train.runs import find_run, list_runs
from ui.train.watch import Watch, build_watch, wire_watch
from ui.train.widgets import CSS

__all__ = ["CSS", "Train", "build_train"]


@dataclass(frozen=True)
class Train:
    """The tab.

    Attributes:
        sent: a hidden widget that holds the library name of a checkpoint sent to the rack. Its `change` comes twice at
            each press: first with "" (to be left alone), then with the name.
        trainer: the process that trains.
        planner: the process that tells what a run would need.
    """

    sent: gr.Textbox
    trainer: Trainer
    planner: Planner

    def close(self) -> None:
        """End what is under way with the app: planning at once, training with a checkpoint."""
        self.planner.close()
        self.trainer.close()


def build_train(session: Session, options: UiOptions) -> Train:
    """Lay out the tab inside the open block and wire it.

    Args:
        session: whose base is trained on, whose library gets checkpoints, and who draws the grid.
        options: where pictures, recipes and runs lie.
    """
    trainer, planner = Trainer(), Planner()
    with gr.Row():
        with gr.Column(scale=6, min_width=300):
            pictures = build_pictures(options)
        with gr.Column(scale=5, min_width=300):
            form = build_form(pictures.dataset, options)
    with gr.Row():
        with gr.Column(scale=6, min_width=300):
            watch = build_watch(options)
        with gr.Column(scale=5, min_width=300):
            compare = build_compare()
    wire_pictures(pictures, form.instance_prompt, options)
    wire_form(form, planner, session, options)
    wire_watch(watch, compare.checkpoint, trainer, options)
    wire_compare(compare, watch.run, session, options)
    _wire_trainer(form, watch, trainer, session, options)
    return Train(compare.sent, trainer, planner)


def _wire_trainer(form: Form, watch: Watch, trainer: Trainer, session: Session, options: UiOptions) -> None:
    def on_show(run: Path, line: str) -> tuple[Any, ...]:
        names = [run.name, *(name for name in list_runs(options.runs) if name != run.name)]
        buttons = gr.Button(interactive=False), gr.Button(interactive=True)
        return gr.Dropdown(names, value=run.name), status_html(line), *buttons

    def start(values: dict[Component, Any]) -> tuple[Any, ...]:
        with user_errors():
            run = trainer.start(config_of(form, values, session, options))
            return on_show(run, f"{run.name}: starting …")

    def resume(chosen: object) -> tuple[Any, ...]:
        with user_errors():
            run = find_run(options.runs, chosen)
            trainer.resume(run)
            return on_show(run, f"{run.name}: going on …")

    outputs = [watch.run, watch.status, watch.start, watch.stop]
    watch.start.click(start, {*form.inputs}, outputs, show_progress="hidden", api_visibility="private")
    watch.resume.click(resume, watch.run, outputs, show_progress="hidden", api_visibility="private")
    watch.stop.click(trainer.stop, queue=False, api_visibility="private")
