"""The form above the rack: prompt, seeds, steps, guidance, sampler, size, a picture to start from; and the base."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from dora_diffusion.generation.generate import GenerationSettings
from dora_diffusion.generation.img2img import Canvas
from ui.backend.request import (
    MAX_COUNT,
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    DetailValues,
    check_settings,
    check_whole,
)
from ui.backend.session import Session
from ui.generate import canvas as canvases
from ui.generate.canvas import CanvasReader, build_canvas, has_picture

_CSS = """
#seed-row { align-items: center; }
#canvas-fold .hint { color: var(--body-text-color-subdued); font-size: .85rem; }
"""
CSS = canvases.CSS + _CSS
_HINT = "Without paint the whole picture is drawn anew, from as much noise as the strength says; with paint only there."


@dataclass(frozen=True)
class Form:
    """The widgets above the rack.

    Attributes:
        canvas: holds the names that `canvas` reads.
        fold: around canvas and strength.
    """

    prompt: gr.Textbox
    negative: gr.Textbox
    generate: gr.Button
    stop: gr.Button
    seed: gr.Number
    new_seed: gr.Button
    count: gr.Slider
    steps: gr.Slider
    guidance: gr.Slider
    sampler: gr.Dropdown
    width: gr.Number
    height: gr.Number
    canvas: gr.HTML
    strength: gr.Slider
    fold: gr.Accordion
    canvases: CanvasReader

    @property
    def inputs(self) -> set[Component]:
        """The widgets that decide the picture."""
        return {
            *(self.prompt, self.negative, self.seed, self.count, self.steps, self.guidance),
            *(self.sampler, self.width, self.height, self.canvas, self.strength),
        }

    def read(self, values: Mapping[Component, Any]) -> GenerationSettings:
        """What the browser sent, checked; `ValueError` names the field that is wrong."""
        details = DetailValues(
            sampler=values[self.sampler],
            width=values[self.width],
            height=values[self.height],
            strength=values[self.strength] if has_picture(values[self.canvas]) else None,
        )
        return check_settings(
            values[self.prompt],
            values[self.negative],
            seed=values[self.seed],
            steps=values[self.steps],
            guidance=values[self.guidance],
            details=details,
        )

    def count_of(self, values: Mapping[Component, Any]) -> int:
        """How many pictures."""
        return check_whole("pictures", values[self.count], low=1, high=MAX_COUNT)

    def canvas_of(self, values: Mapping[Component, Any]) -> Canvas | None:
        """The picture to start from, and where it was painted on."""
        return self.canvases.read(values[self.canvas])

    def updates(self, settings: GenerationSettings, *, count: int = 1) -> dict[Component, Any]:
        """What shows these settings."""
        return {
            self.prompt: settings.prompt,
            self.negative: settings.negative_prompt,
            self.seed: settings.seed,
            self.count: count,
            self.steps: settings.steps,
            self.guidance: settings.guidance_scale,
            self.sampler: settings.sampler,
            self.width: settings.width or 0,
            self.height: settings.height or 0,
        }

    @property
    def shown(self) -> list[Component]:
        """What `updates` changes."""
        return [
            *(self.prompt, self.negative, self.seed, self.count, self.steps, self.guidance),
            *(self.sampler, self.width, self.height),
        ]


def build_prompt() -> tuple[gr.Textbox, gr.Textbox, gr.Button, gr.Button]:
    """Prompt, negative prompt, Generate and Stop."""
    with gr.Row(equal_height=True):
        with gr.Column(scale=5, min_width=260):
            prompt = gr.Textbox(
                label="Prompt", lines=2, elem_id="prompt", autofocus=True,
                placeholder="a (small:1.2) robot on the beach <lora:ink:0.8>",
            )  # fmt: skip
            negative = gr.Textbox(label="Negative prompt", lines=1, elem_id="negative")
        with gr.Column(scale=1, min_width=160, elem_id="actions"):
            generate = gr.Button("Generate", variant="primary", elem_id="generate")
            stop = gr.Button("Stop", variant="stop", elem_id="stop")
    return prompt, negative, generate, stop


def build_form(session: Session, above: tuple[gr.Textbox, gr.Textbox, gr.Button, gr.Button], demo: gr.Blocks) -> Form:
    """Lay out seeds, steps, size and canvas inside the open block, under what `build_prompt` made."""
    with gr.Row(elem_id="seed-row"):
        seed = gr.Number(
            value=0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed", min_width=110, scale=2
        )
        new_seed = gr.Button("New seed", size="sm", elem_id="new-seed", min_width=90, scale=1)
        count = gr.Slider(1, MAX_COUNT, value=1, step=1, label="Pictures", elem_id="count", min_width=140, scale=3)
    with gr.Row():
        steps = gr.Slider(1, MAX_STEPS, value=20, step=1, label="Steps", elem_id="steps", min_width=190)
        guidance = gr.Slider(0, MAX_GUIDANCE, value=4.0, step=0.1, label="Guidance", elem_id="guidance", min_width=190)
    with gr.Row():
        sampler = gr.Dropdown(
            list(session.samplers), value=session.samplers[0], label="Sampler", elem_id="sampler", min_width=150
        )
        width = gr.Number(
            value=0, label="Width (0: the model's own)", precision=0, minimum=0, maximum=MAX_SIDE, step=8,
            elem_id="width", min_width=100,
        )  # fmt: skip
        height = gr.Number(
            value=0, label="Height", precision=0, minimum=0, maximum=MAX_SIDE, step=8, elem_id="height", min_width=100
        )
    with gr.Accordion("Start from a picture (img2img, inpaint)", open=False, elem_id="canvas-fold") as fold:
        canvas = build_canvas(session.output)
        strength = gr.Slider(0.01, 1.0, value=0.6, step=0.01, label="Denoising strength", elem_id="denoise")
        gr.HTML(f'<p class="hint">{_HINT}</p>')

    reader = CanvasReader(session.output, lambda: demo.upload_file_set)
    form = Form(*above, seed, new_seed, count, steps, guidance, sampler, width, height, canvas, strength, fold, reader)
    new_seed.click(lambda: random.randint(0, MAX_SEED), outputs=seed, queue=False, api_visibility="private")
    return form
