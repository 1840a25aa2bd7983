"""The recipe in the page: its fields, and the plan of the run that they describe."""

from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from dora_diffusion.training.config import TrainConfig
from ui.backend.checks import MAX_SEED
from ui.backend.session import Session
from ui.errors import EventOptions, wire
from ui.generate.values import Values
from ui.options import UiOptions
from ui.train.plan import Planner
from ui.train.recipes import (
    MAX_RANK,
    MAX_RESOLUTION,
    MAX_RUN_STEPS,
    PLAIN,
    Fields,
    build_config,
    list_recipes,
    prompt_of,
    recipe_settings,
)
from ui.train.widgets import report_html


@dataclass(frozen=True)
class TrainForm:
    """The widgets that decide a run; `dataset` stands beside the pictures."""

    dataset: gr.Dropdown
    recipe: gr.Dropdown
    name: gr.Textbox
    instance_prompt: gr.Textbox
    rank: gr.Number
    steps: gr.Number
    learning_rate: gr.Number
    resolution: gr.Number
    batch_size: gr.Number
    seed: gr.Number
    text_encoder: gr.Checkbox
    dora: gr.Checkbox
    samples: gr.Textbox
    every: gr.Number
    estimate: gr.Button
    plan: gr.HTML

    @property
    def inputs(self) -> set[Component]:
        """What the run is made from."""
        return {getattr(self, name) for name in Fields.__dataclass_fields__}

    def read(self, values: Values) -> Fields:
        """What the browser sent, unchecked."""
        return Fields(**{name: values[getattr(self, name)] for name in Fields.__dataclass_fields__})


def build_form(dataset: gr.Dropdown, options: UiOptions) -> TrainForm:
    """Lay out the fields inside the open block; they start as the plain recipe's."""
    start = _form_values(PLAIN, options)
    recipe = gr.Dropdown([PLAIN, *list_recipes(options.datasets)], value=PLAIN, label="Recipe", elem_id="train-recipe")
    name = gr.Textbox(label="Name of the run", elem_id="train-name", max_lines=1)
    prompt = gr.Textbox(
        label="Instance prompt (caption of pictures without one)", elem_id="train-instance-prompt", max_lines=1
    )
    with gr.Row():
        steps = _number(start["steps"], "Steps", "train-steps", 1, MAX_RUN_STEPS)
        rank = _number(start["rank"], "Rank", "train-rank", 1, MAX_RANK)
        batch_size = _number(start["batch_size"], "Batch size", "train-batch", 1, 256)
    with gr.Row():
        rate = gr.Number(
            start["learning_rate"], label="Learning rate", minimum=1e-8, maximum=1, elem_id="train-rate", min_width=110
        )
        resolution = _number(start["resolution"], "Resolution (0: the base's)", "train-resolution", 0, MAX_RESOLUTION)
        seed = _number(0, "Training seed", "train-seed", 0, MAX_SEED)
    with gr.Row():
        dora = gr.Checkbox(start["dora"], label="DoRA (off: plain LoRA)", elem_id="train-dora", min_width=140)
        text_encoder = gr.Checkbox(
            start["text_encoder"], label="Text encoder too", elem_id="train-text-encoder", min_width=140
        )
    samples = gr.Textbox(
        start["samples"], label="Sample prompts, one a line", lines=3, max_lines=8, elem_id="train-samples"
    )
    every = _number(
        start["every"], "Samples and checkpoints every so many steps (0: at the end)", "train-every", 0, MAX_RUN_STEPS
    )
    estimate = gr.Button("Plan and memory", size="sm", elem_id="train-plan")
    shown = gr.HTML(elem_id="train-plan-text")
    return TrainForm(
        dataset, recipe, name, prompt, rank, steps, rate, resolution, batch_size, seed, text_encoder, dora, samples,
        every, estimate, shown,
    )  # fmt: skip


def _number(value: int, label: str, elem_id: str, low: int, high: int) -> gr.Number:
    return gr.Number(value, label=label, precision=0, minimum=low, maximum=high, elem_id=elem_id, min_width=110)


def _form_values(recipe: object, options: UiOptions) -> dict[str, Any]:
    """Field -> what a recipe says."""
    settings = recipe_settings(recipe, options.datasets)
    adapter, optim = settings["adapter"], settings["optim"]
    preview = settings.get("preview", {})
    return {
        "rank": adapter["rank"],
        "steps": optim["steps"],
        "learning_rate": optim["learning_rate"],
        "batch_size": optim["batch_size"],
        "resolution": settings["data"].get("resolution") or 0,
        "text_encoder": bool(adapter["train_text_encoder"]),
        "dora": adapter.get("use_dora", True),
        "samples": "\n".join(prompt_of(one) for one in preview.get("prompts", ())),
        "every": preview.get("every", 100),
    }


def wire_form(form: TrainForm, planner: Planner, session: Session, options: UiOptions) -> None:
    """A recipe fills the fields; a button tells the plan."""
    filled = tuple(_form_values(PLAIN, options))

    def fill(recipe: object) -> list[Any]:
        values = _form_values(recipe, options)
        return [values[name] for name in filled]

    def estimate(values: Values) -> str:
        return report_html(planner.plan(config_of(form, values, session, options)))

    wire(form.recipe.input, fill, form.recipe, [getattr(form, name) for name in filled])
    wire(
        form.estimate.click,
        estimate,
        {*form.inputs},
        form.plan,
        options=EventOptions(show_progress="full", concurrency_limit=1),
    )


def config_of(form: TrainForm, values: Values, session: Session, options: UiOptions) -> TrainConfig:
    """The run that the fields describe, on the base that the app has; `ValueError` names the field that is wrong."""
    return build_config(
        form.read(values),
        model=str(session.source),
        files=session.files,
        roots=options.datasets,
        runs=options.runs,
    )
