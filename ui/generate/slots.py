"""One slot of the rack: its widgets, what they hold, and what is told of the adapter in it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from dora_diffusion.adapters.matching import LoadReport
from ui.backend.checks import MAX_STRENGTH
from ui.backend.request import BaseParts, SlotValues
from ui.backend.session import Session
from ui.generate.curves import CONSTANT, CURVE_NAMES, curve_html, name_of_text
from ui.generate.masks import Mask, mask_html
from ui.generate.values import Updates, Values
from ui.library.library import AdapterFile, AdapterLibrary, Stamp, stamp_of
from ui.markup import alert, chip, escaped

MAX_BLOCKS = 3
LONGEST_LIST = 300
NO_ADAPTER = ("none", "")
EMPTY_SLOT = SlotValues.of(None, 1.0)
LOADING = chip("loading …")


@dataclass(frozen=True)
class RackSlot:
    """The widgets of one slot. `mask` is kept on the server: the browser only sees how it looks."""

    number: int
    root: gr.Column
    file: gr.Dropdown
    enabled: gr.Checkbox
    solo: gr.Checkbox
    body: gr.Column
    strength: gr.Slider
    badge: gr.HTML
    apart: gr.Checkbox
    denoiser: gr.Slider
    text_encoders: gr.Slider
    blocks: tuple[gr.Slider, ...]
    curve_name: gr.Dropdown
    curve: gr.Textbox
    curve_plot: gr.HTML
    mask: gr.State
    mask_view: gr.HTML
    paint: gr.Button
    unmask: gr.Button
    up: gr.Button
    down: gr.Button
    remove: gr.Button

    @property
    def inputs(self) -> set[Component]:
        """The widgets that decide the picture."""
        plain = {self.file, self.enabled, self.solo, self.strength, self.apart, self.denoiser, self.text_encoders}
        return plain | {*self.blocks, self.curve, self.mask}

    @property
    def outputs(self) -> set[Any]:
        """The widgets that `updates` changes."""
        return self.inputs | {self.root, self.body, self.badge, self.curve_name, self.curve_plot, self.mask_view}

    def read(self, values: Values, parts: BaseParts) -> SlotValues:
        """This slot's part of what the browser sent, unchecked."""
        return SlotValues(
            file=values[self.file],
            enabled=values[self.enabled],
            strength=values[self.strength],
            apart=values[self.apart],
            denoiser=values[self.denoiser],
            text_encoders=values[self.text_encoders],
            blocks=tuple(values[block] for block in self.blocks[: len(parts.blocks)]) or None,
            curve=values[self.curve],
            mask=values[self.mask],
            solo=values[self.solo],
        )

    def updates(self, slot: SlotValues, *, library: AdapterLibrary, badge: str) -> Updates:
        """What puts these values into the widgets; whether the slot is shown at all is the rack's to say."""
        blocks = (*(slot.blocks or ()), *[1.0] * MAX_BLOCKS)[:MAX_BLOCKS]
        return {
            self.file: gr.Dropdown(slot_choices(library, slot.file), value=slot.file or ""),
            self.enabled: slot.enabled,
            self.solo: slot.solo,
            self.body: gr.Column(visible=bool(slot.file)),
            self.badge: badge,
            self.strength: gr.Slider(value=slot.strength, interactive=not slot.apart),
            self.apart: slot.apart,
            self.denoiser: gr.Slider(value=slot.denoiser, interactive=slot.apart),
            self.text_encoders: gr.Slider(value=slot.text_encoders, interactive=slot.apart),
            **dict(zip(self.blocks, blocks, strict=True)),
            self.curve_name: name_of_text(slot.curve),
            self.curve: slot.curve,
            self.curve_plot: curve_html(slot.curve),
            self.mask: slot.mask,
            self.mask_view: mask_html(slot.mask),
        }


class Badges:
    """What is told of adapters that were loaded, so that a slot that moves need not wait for a drawing under way."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: dict[tuple[str, str, Stamp], str] = {}  # by base, name, and state of the file

    def known(self, file: str | None) -> str:
        """The badge of a file that was loaded into this base, a line that says "loading", or nothing for no file."""
        if not file:
            return ""
        try:
            stamp = stamp_of(self._session.library.find(file).path)
        except (OSError, ValueError):  # `load` says why
            return LOADING
        return self._known.get((self._session.model, file, stamp), LOADING)

    def load(self, file: str) -> str:
        """Load the adapter unless it is loaded already; its badge, or why it cannot be used."""
        try:
            loaded, header = self._session.load(file), self._session.library.find(file)
        except ValueError as error:
            return alert(str(error))
        key = loaded.model, file, loaded.stamp  # of what was read: while this waited, the file may have been replaced
        if loaded.seconds is not None or key not in self._known:
            self._known[key] = badge(loaded.report, header, seconds=loaded.seconds)
        return self._known[key]


def badge(report: LoadReport, file: AdapterFile | None = None, *, seconds: float | None = None) -> str:
    """Type, rank, axis, format and matched keys of a loaded adapter, and how long it took, as HTML."""
    ranks = ", ".join(str(rank) for rank in report.ranks)
    chips = [(report.kind, ""), (f"rank {ranks}", "")]
    if file is not None and file.seen is not None:
        structure = file.seen.structure
        if structure.axis:
            chips.append((f"{structure.axis} axis", "warn" if structure.axis == "unclear" else ""))
        chips.append((structure.format, ""))
    chips.append((f"{report.matched}/{report.total} keys matched", "" if report.matched == report.total else "warn"))
    chips += [(f"new word {word}", "") for word in report.words] + [(note, "warn") for note in report.notes]
    if seconds is not None:
        chips.append((f"loaded in {seconds:.2f} s", ""))
    return "".join(chip(text, kind) for text, kind in chips)


def slot_choices(library: AdapterLibrary, file: str | None = None) -> list[Any]:
    """What a slot's list offers: the first names of the library, and the one that is chosen."""
    names = library.usable[:LONGEST_LIST]
    own = [file] if file and file not in names else []
    return [NO_ADAPTER, *own, *names]


def shown_slots(files: Sequence[object]) -> tuple[bool, ...]:
    """Which slots are shown: those with a file, and the first without."""
    free = next((index for index, file in enumerate(files) if not file), None)
    return tuple(bool(file) or index == free for index, file in enumerate(files))


def denoiser_label(parts: BaseParts) -> str:
    """What the denoiser is called on a slider."""
    return "UNet" if parts.denoiser == "unet" else parts.denoiser.capitalize()


def block_updates(slot: RackSlot, parts: BaseParts) -> Updates:
    """What makes a slot's sliders those of a base."""
    labels = [block.label.capitalize() for block in parts.blocks[:MAX_BLOCKS]]
    found = {slider: gr.Slider(label=label, visible=True) for slider, label in zip(slot.blocks, labels, strict=False)}
    hidden = {slider: gr.Slider(visible=False) for slider in slot.blocks[len(labels) :]}
    return {**found, **hidden, slot.denoiser: gr.Slider(label=denoiser_label(parts))}


def build_slot(number: int, library: AdapterLibrary, parts: BaseParts, *, shown: bool) -> RackSlot:
    """Lay out one empty slot inside the open block."""
    name = f"slot-{number}"
    widgets: dict[str, Any] = {"number": number, "mask": gr.State(None)}
    with gr.Column(elem_id=name, elem_classes="slot", visible=shown) as widgets["root"]:
        with gr.Row(elem_classes="slot-head"):
            widgets["file"] = gr.Dropdown(
                slot_choices(library),
                value="",
                label=f"Adapter {number}",
                show_label=False,
                container=False,
                elem_id=f"{name}-file",
                min_width=140,
            )
            widgets["enabled"] = _tick("On", f"{name}-enabled", value=True)
            widgets["solo"] = _tick("Solo", f"{name}-solo", value=False)
        with gr.Column(visible=False) as widgets["body"]:
            widgets["strength"] = _strength("Strength", f"{name}-strength")
            widgets["badge"] = gr.HTML(elem_id=f"{name}-badge", elem_classes="badge")
            with gr.Row(elem_classes="folds"):
                widgets |= _components(name, parts) | _blocks(name, parts) | _curve(name) | _mask(name)
            widgets |= _moves(name, number)
    return RackSlot(**widgets)


def _components(name: str, parts: BaseParts) -> dict[str, Any]:
    with gr.Accordion("Components", open=False, elem_id=f"{name}-components"):
        return {
            "apart": _tick("Set components apart", f"{name}-apart", value=False),
            "denoiser": _strength(denoiser_label(parts), f"{name}-denoiser", interactive=False),
            "text_encoders": _strength("Text encoders", f"{name}-text", interactive=False),
        }


def _blocks(name: str, parts: BaseParts) -> dict[str, Any]:
    labels = [block.label.capitalize() for block in parts.blocks] + [""] * MAX_BLOCKS
    with gr.Accordion("Blocks", open=False, elem_id=f"{name}-blocks"):
        gr.HTML(f"Times the strength of the {escaped(denoiser_label(parts))}: 1 leaves it.", elem_classes="hint")
        sliders = [
            _strength(labels[index], f"{name}-block-{index + 1}", visible=index < len(parts.blocks))
            for index in range(MAX_BLOCKS)
        ]
    return {"blocks": tuple(sliders)}


def _curve(name: str) -> dict[str, Any]:
    with gr.Accordion("Curve", open=False, elem_id=f"{name}-curve-fold"):
        with gr.Row():
            chosen = gr.Dropdown(
                list(CURVE_NAMES), value=CONSTANT, label="Over the steps", elem_id=f"{name}-curve-name", min_width=120
            )
            text = gr.Textbox(
                label="Progress : factor",
                placeholder="0:0, 0.3:1",
                max_lines=1,
                elem_id=f"{name}-curve",
                min_width=140,
            )
        plot = gr.HTML(curve_html(""), elem_id=f"{name}-curve-plot")
    return {"curve_name": chosen, "curve": text, "curve_plot": plot}


def _mask(name: str) -> dict[str, Any]:
    with gr.Accordion("Mask", open=False, elem_id=f"{name}-mask-fold"):
        view = gr.HTML(mask_html(None), elem_id=f"{name}-mask")
        with gr.Row():
            paint = _small("Paint below", f"{name}-paint")
            unmask = _small("No mask", f"{name}-unmask")
    return {"mask_view": view, "paint": paint, "unmask": unmask}


def _moves(name: str, number: int) -> dict[str, Any]:
    with gr.Row(elem_classes="moves"):
        return {
            "up": _small("↑ Up", f"{name}-up"),
            "down": _small("↓ Down", f"{name}-down"),
            "remove": _small("✕ Remove", f"{name}-remove"),
        }


def _small(label: str, elem_id: str) -> gr.Button:
    return gr.Button(label, size="sm", scale=0, min_width=70, elem_id=elem_id)


def _tick(label: str, elem_id: str, *, value: bool) -> gr.Checkbox:
    return gr.Checkbox(value, label=label, elem_id=elem_id, elem_classes="tick", container=False)


def _strength(label: str, elem_id: str, *, interactive: bool = True, visible: bool = True) -> gr.Slider:
    return gr.Slider(
        -MAX_STRENGTH,
        MAX_STRENGTH,
        value=1.0,
        step=0.05,
        label=label,
        elem_id=elem_id,
        interactive=interactive,
        visible=visible,
        elem_classes="strength",
    )


def loads(files: Sequence[str], badges: Badges) -> Iterator[tuple[int, str]]:
    """Load the adapters of slots, one after another: index of the slot -> its badge."""
    for index, file in enumerate(files):
        if file:
            yield index, badges.load(file)


def with_mask(slot: RackSlot, mask: Mask) -> Updates:
    """What gives a slot a mask."""
    return {slot.mask: mask, slot.mask_view: mask_html(mask)}


CSS = """
.slot:not(:has(.strength))::before { content: "Add an adapter"; font-size: .85rem;
  color: var(--body-text-color-subdued); }
.slot:not(:has(.strength)) .tick { display: none; }
.slot:has([id$="-enabled"] input:not(:checked)) > * { opacity: .6; }
:has(> .slot [id$="-solo"] input:checked) > .slot:has(.strength):not(:has([id$="-solo"] input:checked)) > *
  { opacity: .6; }
#broken:not(:has(.broken)) { display: none; }
.slot .folds { gap: .3rem; flex-wrap: wrap; }
.slot .folds > * { flex: 1 1 7rem !important; width: auto !important; min-width: 0 !important; }
.slot .folds > *:has(> button.open) { flex: 1 1 100% !important; order: 1; }
.slot .moves { gap: .3rem; justify-content: flex-end; }
.slot .moves button { flex: 0 1 auto; width: auto; }
.slot .hint, .rack-note { color: var(--body-text-color-subdued); font-size: .85rem; }
"""
