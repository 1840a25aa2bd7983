"""The rack: fixed slots of adapters. Slots are always there; a slot without a file takes no part.

Fixed, because sliders rendered anew by `gr.render` lose what the user set (gradio #12788). Those with a file are shown,
and the first without, where the next adapter goes.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from gradio.components import Component

from dora_diffusion.functional.blend_modes import ADDITIVE, IN_ORDER, MODE_SENTENCES, MODES
from ui.backend import interference
from ui.backend.interference import interference_html, measure
from ui.backend.request import SlotValues, check_whole
from ui.backend.session import Session
from ui.errors import user_errors
from ui.generate import curves, masks, slots
from ui.generate.curves import curve_html, name_of_text, text_of_name
from ui.generate.masks import Painter, build_painter, canvas_value, read_painted, targets
from ui.generate.slots import (
    EMPTY,
    LONGEST_LIST,
    Badges,
    Slot,
    block_updates,
    build_slot,
    choices_of,
    loads,
    problem_badge,
    shown_slots,
    with_mask,
)
from ui.library.library import AdapterLibrary

SLOTS = 8
MOST_BROKEN = 20
_fresh = itertools.count(1)

Values = Mapping[Component, Any]
Updates = dict[Any, Any]


@dataclass(frozen=True)
class Rack:
    """All slots, and what stands around them."""

    session: Session
    slots: tuple[Slot, ...]
    mode: gr.Dropdown
    sentence: gr.HTML
    painter: Painter
    badges: Badges
    asked: gr.State

    @property
    def inputs(self) -> set[Component]:
        """The widgets that decide the picture."""
        return {self.mode}.union(*(slot.inputs for slot in self.slots))

    @property
    def outputs(self) -> set[Any]:
        """The widgets that `updates`, `add` and `switched` change."""
        return {self.mode, self.sentence, self.asked}.union(*(slot.outputs for slot in self.slots))

    def read(self, values: Values) -> tuple[SlotValues, ...]:
        """What the browser sent for each slot, unchecked."""
        parts = self.session.parts
        return tuple(slot.read(values, parts) for slot in self.slots)

    def blend(self, values: Values) -> str:
        """The mode that the browser sent, unchecked: `DrawRequest` refuses what is none."""
        return str(values[self.mode])

    def updates(self, wanted: Sequence[SlotValues], blend: str | None = None) -> Updates:
        """What fills the rack with these slots and empties the rest; adapters are loaded, and told of, afterwards.

        Args:
            wanted: from the first slot on.
            blend: a key of `blend_modes.MODES`; None leaves the mode.

        Raises:
            ValueError: more slots than there are, or no such mode.
        """
        if len(wanted) > SLOTS:
            raise ValueError(f"rack: got {len(wanted)} adapters, expected at most {SLOTS}")
        every = (*wanted, *[EMPTY] * (SLOTS - len(wanted)))
        changes = self._asked([slot.file for slot in every])
        for slot, values in zip(self.slots, every, strict=True):
            changes |= self._filled(slot, values)
        return changes if blend is None else changes | {self.mode: blend, self.sentence: mode_html(blend)}

    def add(self, values: Values, name: str, *, strength: float = 1.0) -> Updates:
        """What puts an adapter of the library into the next free slot.

        Raises:
            ValueError: not in the library, in the rack already, or no slot is free.
        """
        file = self.session.library.find(name).name
        files = self._files(values)
        if file in files:
            raise ValueError(f"{file}: is in slot {files.index(file) + 1} already")
        free = next((index for index, had in enumerate(files) if not had), None)
        if free is None:
            raise ValueError(f"{file}: all {SLOTS} slots are taken; remove an adapter first")
        files[free] = file
        return self._filled(self.slots[free], _new(file, strength)) | self._asked(files)

    def switched(self, values: Values) -> Updates:
        """What makes the rack one of the session's new base; adapters are loaded into it, and told of, afterwards."""
        changes = self._asked(self._files(values))
        for slot in self.slots:
            changes |= block_updates(slot, self.session.parts)
        return changes | {slot.badge: self.badges.known(values[slot.file]) for slot in self.slots}

    def move(self, values: Values, index: int, step: int) -> Updates:
        """What swaps a slot with the next filled one above (-1) or below (1); nothing where there is none."""
        every = list(self.read(values))
        places = range(index + step, -1 if step < 0 else SLOTS, step)
        other = next((place for place in places if every[place].file), None)
        if other is None or not every[index].file:
            return {self.sentence: mode_html(self.blend(values))}
        here, there = self._filled(self.slots[index], every[other]), self._filled(self.slots[other], every[index])
        files = [slot.file for slot in every]
        files[index], files[other] = files[other], files[index]
        return here | there | self._asked(files) | {self.sentence: mode_html(self.blend(values), moved=True)}

    def remove(self, values: Values, index: int) -> Updates:
        """What empties a slot."""
        files = self._files(values)
        files[index] = None
        return self._filled(self.slots[index], EMPTY) | self._asked(files)

    def shown(self, files: Sequence[object]) -> Updates:
        """What shows the slots with a file, and the first without."""
        return {slot.root: gr.Column(visible=shown) for slot, shown in zip(self.slots, shown_slots(files), strict=True)}

    def _files(self, values: Values) -> list[Any]:
        return [values[slot.file] for slot in self.slots]

    def _filled(self, slot: Slot, values: SlotValues) -> Updates:
        return slot.updates(values, library=self.session.library, badge=self.badges.known(values.file))

    def _asked(self, files: Sequence[str | None]) -> Updates:
        """Shows slots, and lets the page ask for what they hold: the state's change does, so it is always another."""
        return self.shown(files) | {self.asked: (next(_fresh), *(file or "" for file in files))}


def _new(file: str, strength: float) -> SlotValues:
    return SlotValues(file, enabled=True, strength=strength, apart=False, denoiser=strength, text_encoders=strength)


def mode_html(mode: object, *, moved: bool = False) -> str:
    """A mode in one sentence, and whether the slots' order counts.

    Raises:
        ValueError: no such mode.
    """
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"blend: got {str(mode)[:40]!r}, expected one of {', '.join(MODES)}")
    if mode in IN_ORDER:
        order = "The order of the slots changes the picture."
    else:
        rounding = "" if mode == ADDITIVE else " but rounding"
        order = (
            f"{'Moved, which' if moved else 'Moving an adapter up or down'} changes nothing in the picture{rounding}."
        )
    further = "" if mode == ADDITIVE else " Curves and masks need the additive mode."
    return f'<p class="rack-note" role="status">{escape(MODE_SENTENCES[mode])} {order}{further}</p>'


def broken_list(library: AdapterLibrary) -> str:
    """The folder's unusable files with their reasons, and what is left out of the slots' lists, as HTML."""
    items = [f"<li><b>{escape(file.path.name)}</b>: {escape(str(file.problem))}</li>" for file in library.broken]
    more = f"<li>and {len(items) - MOST_BROKEN} more</li>" if len(items) > MOST_BROKEN else ""
    broken = f"Cannot be used:<ul>{''.join(items[:MOST_BROKEN])}{more}</ul>" if items else ""
    usable = len(library.usable)
    listed = f"<p>The first {LONGEST_LIST} of {usable} are listed here.</p>" if usable > LONGEST_LIST else ""
    return f'<div class="broken">{listed}{broken}</div>' if listed or broken else ""


def build_rack(session: Session, demo: gr.Blocks) -> Rack:
    """Lay out the rack inside the open block and wire it to the session."""
    library = session.library
    with gr.Row(elem_classes="rack-head"):
        gr.HTML(f"<h2>Adapters</h2><span class='folder'>from {escape(str(library.folder))}</span>")
        refresh = gr.Button("Refresh", size="sm", scale=0, min_width=90, elem_id="refresh")
    broken = gr.HTML(broken_list(library), elem_id="broken")
    every = tuple(build_slot(number, library, session.parts, shown=number == 1) for number in range(1, SLOTS + 1))
    mode = gr.Dropdown(list(MODES), value=ADDITIVE, label="Blend mode", elem_id="blend-mode")
    sentence = gr.HTML(mode_html(ADDITIVE), elem_id="blend-sentence")
    painter = build_painter(SLOTS)
    with gr.Accordion("Interference", open=False, elem_id="interference-fold"):
        ask = gr.Button("Measure the rack's adapters", size="sm", elem_id="measure-interference")
        answer = gr.HTML(elem_id="interference")
    rack = Rack(session, every, mode, sentence, painter, Badges(session), gr.State(()))
    for index in range(SLOTS):
        _wire_file(rack, index)
        _wire_moves(rack, index)
        _wire_fine(rack, index)
    _wire_masks(rack)
    _wire_refresh(rack, (refresh.click, demo.load), broken)
    _wire_rest(rack, ask, answer)
    return rack


def _wire_file(rack: Rack, index: int) -> None:
    slot, files = rack.slots[index], [slot.file for slot in rack.slots]

    def load(*chosen: str) -> Iterator[Updates]:
        file = chosen[index]
        yield rack.shown(chosen) | {slot.body: gr.Column(visible=bool(file)), slot.badge: rack.badges.known(file)}
        if file:
            yield {slot.badge: rack.badges.load(file)}

    slot.file.input(
        load,
        files,
        [*(other.root for other in rack.slots), slot.body, slot.badge],
        show_progress="hidden",
        trigger_mode="always_last",
        concurrency_limit=SLOTS,
        api_visibility="private",
    )


def _wire_moves(rack: Rack, index: int) -> None:
    slot = rack.slots[index]
    deeds: tuple[tuple[gr.Button, Callable[[Values], Updates]], ...] = (
        (slot.up, lambda values: rack.move(values, index, -1)),
        (slot.down, lambda values: rack.move(values, index, 1)),
        (slot.remove, lambda values: rack.remove(values, index)),
    )
    for button, deed in deeds:
        button.click(
            user_errors()(deed),
            {*rack.inputs},
            list(rack.outputs),
            show_progress="hidden",
            queue=False,
            api_visibility="private",
        )


def _wire_fine(rack: Rack, index: int) -> None:
    """Components apart, and the curve: name and text follow each other."""
    slot = rack.slots[index]

    def set_apart(apart: bool, strength: float) -> tuple[gr.Slider, gr.Slider, gr.Slider]:
        part = gr.Slider(interactive=True, value=strength) if apart else gr.Slider(interactive=False)
        return gr.Slider(interactive=not apart), part, part

    def name_curve(name: str, text: str) -> tuple[str, str]:
        chosen = text if name == curves.OWN_POINTS else text_of_name(name)
        return chosen, curve_html(chosen)

    def write_curve(text: str) -> tuple[str, str]:
        return name_of_text(text), curve_html(text)

    plain: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    slot.apart.input(
        set_apart, [slot.apart, slot.strength], [slot.strength, slot.denoiser, slot.text_encoders], **plain
    )
    slot.curve_name.input(
        user_errors()(name_curve), [slot.curve_name, slot.curve], [slot.curve, slot.curve_plot], **plain
    )
    slot.curve.input(write_curve, slot.curve, [slot.curve_name, slot.curve_plot], trigger_mode="always_last", **plain)


def _wire_masks(rack: Rack) -> None:
    painter, states = rack.painter, [slot.mask for slot in rack.slots]
    plain: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}

    def painted(target: int, event: gr.EventData) -> Updates:
        slot = rack.slots[check_whole("mask of", target, low=1, high=SLOTS) - 1]
        return with_mask(slot, read_painted(getattr(event, "png", None)))

    def aim(target: int, *held: masks.Mask) -> str:
        return canvas_value(held[check_whole("mask of", target, low=1, high=SLOTS) - 1])

    # every stroke: by default gradio drops those that come while it still answers the one before
    views = [slot.mask_view for slot in rack.slots]
    painter.canvas.input(user_errors()(painted), painter.target, [*states, *views], trigger_mode="multiple", **plain)
    painter.target.input(user_errors()(aim), [painter.target, *states], painter.canvas, **plain)
    files = [slot.file for slot in rack.slots]

    def moved(target: int, *held: Any) -> Updates:
        named = gr.Dropdown(targets(held[:SLOTS]))
        return {painter.canvas: user_errors()(aim)(target, *held[SLOTS:]), painter.target: named}

    # what moves or empties slots changes `asked`: the painter shows the mask that its slot has now
    rack.asked.change(moved, [painter.target, *files, *states], [painter.canvas, painter.target], **plain)
    for slot in rack.slots:
        _wire_mask(slot, painter, files, plain)


def _wire_mask(slot: Slot, painter: Painter, files: Sequence[gr.Dropdown], plain: Mapping[str, Any]) -> None:
    def paint(mask: masks.Mask, *chosen: str | None) -> Updates:
        return {
            painter.fold: gr.Accordion(open=True),
            painter.target: gr.Dropdown(targets(chosen), value=slot.number),
            painter.canvas: canvas_value(mask),
        }

    def unmask(target: int) -> Updates:
        shown = {painter.canvas: canvas_value(None)} if target == slot.number else {}
        return with_mask(slot, None) | shown

    slot.paint.click(paint, [slot.mask, *files], [painter.fold, painter.target, painter.canvas], **plain)
    slot.unmask.click(unmask, painter.target, [slot.mask, slot.mask_view, painter.canvas], **plain)


def _wire_refresh(rack: Rack, events: Sequence[Any], broken: gr.HTML) -> None:
    library = rack.session.library

    def look_again(*chosen: str) -> Updates:
        library.refresh()
        kept = [name if name in library.usable else "" for name in chosen]
        # what stands is not sent back: by the time this arrives the user may have made another choice
        changes = {
            broken: broken_list(library),
            **({} if kept == [name or "" for name in chosen] else rack.shown(kept)),
        }
        for slot, name, had in zip(rack.slots, kept, chosen, strict=True):
            lost = bool(had) and not name
            choices = choices_of(library, name)
            changes[slot.file] = gr.Dropdown(choices, value="") if lost else gr.Dropdown(choices)
            if lost:
                changes[slot.body] = gr.Column(visible=False)
        return changes

    outputs = [broken, *itertools.chain(*((slot.file, slot.root, slot.body) for slot in rack.slots))]
    for event in events:
        event(
            look_again,
            [slot.file for slot in rack.slots],
            outputs,
            show_progress="hidden",
            queue=False,
            api_visibility="private",
        )


def _wire_rest(rack: Rack, ask: gr.Button, answer: gr.HTML) -> None:
    files = [slot.file for slot in rack.slots]

    def load_asked(asked: tuple[Any, ...]) -> Iterator[Updates]:
        for index, badge in loads(asked[1:], rack.badges):
            yield {rack.slots[index].badge: badge}

    def interfere(*chosen: str) -> Iterator[str]:
        yield '<p class="rack-note">measuring …</p>'
        try:
            yield interference_html(measure(rack.session, [file for file in chosen if file]))
        except ValueError as error:
            yield problem_badge(str(error))

    rack.asked.change(
        load_asked,
        rack.asked,
        [slot.badge for slot in rack.slots],
        show_progress="hidden",
        trigger_mode="always_last",
        concurrency_limit=SLOTS,
        api_visibility="private",
    )
    rack.mode.input(
        user_errors()(mode_html),
        rack.mode,
        rack.sentence,
        show_progress="hidden",
        queue=False,
        api_visibility="private",
    )
    ask.click(interfere, files, answer, show_progress="hidden", api_visibility="private")


CSS = slots.CSS + curves.CSS + masks.CSS + interference.CSS
