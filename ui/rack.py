"""The rack: fixed slots of adapters. Slots are always there; a slot without a file takes no part.

Fixed, because sliders rendered anew by `gr.render` lose what the user set (gradio #12788).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from gradio.components import Component

from dora_diffusion.adapters import LoadReport
from ui.library import AdapterLibrary
from ui.request import MAX_STRENGTH, SlotValues
from ui.session import Session

SLOTS = 4
NO_ADAPTER = ("none", "")


@dataclass(frozen=True)
class Slot:
    """The widgets of one slot."""

    number: int
    file: gr.Dropdown
    enabled: gr.Checkbox
    body: gr.Column
    strength: gr.Slider
    apart: gr.Checkbox
    denoiser: gr.Slider
    text_encoders: gr.Slider
    badge: gr.HTML

    @property
    def inputs(self) -> set[Component]:
        """The widgets that decide the picture."""
        return {self.file, self.enabled, self.strength, self.apart, self.denoiser, self.text_encoders}

    def read(self, values: Mapping[Component, Any]) -> SlotValues:
        """This slot's part of what the browser sent, unchecked."""
        return SlotValues(
            file=values[self.file],
            enabled=values[self.enabled],
            strength=values[self.strength],
            apart=values[self.apart],
            denoiser=values[self.denoiser],
            text_encoders=values[self.text_encoders],
        )


def badge(report: LoadReport) -> str:
    """Type, rank and matched keys of a loaded adapter, as HTML."""
    ranks = ", ".join(str(rank) for rank in report.ranks)
    whole = "" if report.matched == report.total else " warn"
    return (
        f'<span class="chip">{escape(report.kind)}</span><span class="chip">rank {escape(ranks)}</span>'
        f'<span class="chip{whole}">{report.matched}/{report.total} keys matched</span>'
    )


def problem_badge(message: str) -> str:
    """One line that says why a slot cannot be used, as HTML."""
    return f'<span class="chip bad" role="alert">{escape(message)}</span>'


def _badge_of(file: str, session: Session) -> str:
    try:
        return badge(session.load(file))
    except ValueError as error:
        return problem_badge(str(error))


def broken_list(library: AdapterLibrary) -> str:
    """The folder's unusable files with their reasons, as HTML; empty when there are none."""
    if not library.broken:
        return ""
    items = "".join(
        f"<li><b>{escape(file.name)}.safetensors</b>: {escape(str(file.problem))}</li>" for file in library.broken
    )
    return f'<div class="broken">Cannot be used:<ul>{items}</ul></div>'


def _strength(label: str, elem_id: str, *, interactive: bool = True) -> gr.Slider:
    return gr.Slider(
        -MAX_STRENGTH,
        MAX_STRENGTH,
        value=1.0,
        step=0.05,
        label=label,
        elem_id=elem_id,
        interactive=interactive,
        elem_classes="strength",
    )


def _build_slot(number: int, library: AdapterLibrary, denoiser_label: str) -> Slot:
    name = f"slot-{number}"
    with gr.Column(elem_id=name, elem_classes="slot"):
        with gr.Row(elem_classes="slot-head"):
            file = gr.Dropdown(
                [NO_ADAPTER, *library.usable],
                value="",
                label=f"Adapter {number}",
                show_label=False,
                container=False,
                elem_id=f"{name}-file",
                min_width=140,
            )
            enabled = gr.Checkbox(True, label="On", elem_id=f"{name}-enabled", elem_classes="tick", container=False)
        with gr.Column(visible=False) as body:
            strength = _strength("Strength", f"{name}-strength")
            chips = gr.HTML(elem_id=f"{name}-badge", elem_classes="badge")
            with gr.Accordion("Components", open=False, elem_id=f"{name}-components"):
                apart = gr.Checkbox(
                    False, label="Set components apart", elem_id=f"{name}-apart", elem_classes="tick", container=False
                )
                denoiser = _strength(denoiser_label, f"{name}-denoiser", interactive=False)
                text_encoders = _strength("Text encoders", f"{name}-text", interactive=False)
    return Slot(number, file, enabled, body, strength, apart, denoiser, text_encoders, chips)


def _wire_slot(slot: Slot, session: Session) -> None:
    def load(file: str) -> Iterator[tuple[gr.Column, str]]:
        body = gr.Column(visible=bool(file))
        yield body, '<span class="chip">loading …</span>' if file else ""
        if file:
            yield body, _badge_of(file, session)

    def set_apart(apart: bool, strength: float) -> tuple[gr.Slider, gr.Slider, gr.Slider]:
        part = gr.Slider(interactive=True, value=strength) if apart else gr.Slider(interactive=False)
        return gr.Slider(interactive=not apart), part, part

    slot.file.input(
        load,
        slot.file,
        [slot.body, slot.badge],
        show_progress="hidden",
        trigger_mode="always_last",
        concurrency_limit=SLOTS,
        api_visibility="private",
    )
    slot.apart.input(
        set_apart,
        [slot.apart, slot.strength],
        [slot.strength, slot.denoiser, slot.text_encoders],
        show_progress="hidden",
        queue=False,
        api_visibility="private",
    )


@dataclass(frozen=True)
class Rack:
    """All slots, and what stands above them."""

    slots: tuple[Slot, ...]

    @property
    def inputs(self) -> set[Component]:
        """The widgets that decide the picture."""
        return set().union(*(slot.inputs for slot in self.slots))

    def read(self, values: Mapping[Component, Any]) -> tuple[SlotValues, ...]:
        """What the browser sent for each slot, unchecked."""
        return tuple(slot.read(values) for slot in self.slots)


def build_rack(session: Session, demo: gr.Blocks) -> Rack:
    """Lay out the rack inside the open block and wire it to the session."""
    library = session.library
    with gr.Row(elem_classes="rack-head"):
        gr.HTML(f"<h2>Adapters</h2><span class='folder'>from {escape(str(library.folder))}</span>")
        refresh = gr.Button("Refresh", size="sm", scale=0, min_width=90, elem_id="refresh")
    broken = gr.HTML(broken_list(library), elem_id="broken")
    label = "UNet" if session.parts.denoiser == "unet" else session.parts.denoiser.capitalize()
    slots = tuple(_build_slot(number, library, label) for number in range(1, SLOTS + 1))
    for slot in slots:
        _wire_slot(slot, session)

    def look_again(*chosen: str) -> list[Any]:
        library.refresh()
        choices: list[Any] = [NO_ADAPTER, *library.usable]
        # a choice that stands is not sent back: by the time this arrives the user may have made another
        gone = [bool(name) and name not in library.usable for name in chosen]
        files = [gr.Dropdown(choices, value="") if lost else gr.Dropdown(choices) for lost in gone]
        return [*files, *(gr.Column(visible=False) if lost else gr.Column() for lost in gone), broken_list(library)]

    files, bodies = [slot.file for slot in slots], [slot.body for slot in slots]
    for event in (refresh.click, demo.load):
        event(
            look_again, files, [*files, *bodies, broken], show_progress="hidden", queue=False, api_visibility="private"
        )
    return Rack(slots)
