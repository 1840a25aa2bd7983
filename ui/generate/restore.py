"""A picture dropped on the page brings back what it was made of: settings, adapters by hash, the mode.

Adapters are found by the hash of their files alone. What is missing is listed, never put in another's place.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr

from dora_diffusion.functional.blend_modes import ADDITIVE, MODES
from dora_diffusion.generation.generate import GenerationSettings
from dora_diffusion.generation.img2img import Canvas
from dora_diffusion.generation.infotext import Parameters, settings_of
from dora_diffusion.generation.inputs import find_input
from dora_diffusion.generation.png_metadata import AdapterUse, PictureRecord
from dora_diffusion.generation.prompts import LoraTag
from dora_diffusion.generation.recipes import told_by
from ui.backend.checks import LIMITS
from ui.backend.request import BaseParts, DetailValues, SlotValues, check_settings
from ui.backend.session import Session
from ui.backend.tags import weight_of_tags
from ui.errors import WITH_PROGRESS, wire
from ui.generate.canvas import canvas_value
from ui.generate.controls import Controls
from ui.generate.recipes import DrawRecipe, cut_to_rack, placed
from ui.generate.values import Updates
from ui.library.hashes import Missing, Wanted, by_name, find_all
from ui.library.library import AdapterLibrary
from ui.markup import bullets, escaped, paragraph

CSS = """
.kept { font-size: .9rem; overflow-wrap: anywhere; }
.kept p { margin: .2rem 0; }
.kept ul { margin: .2rem 0; padding-left: 1.2rem; }
.kept .lost { border-left: 3px solid #dc2626; padding-left: .6rem; }
.kept code { font-size: .8rem; }
"""
_HINT = paragraph("Drop a PNG of this app, or one with the parameters text of A1111 and its kin.", "kept")


@dataclass(frozen=True)
class Restored:
    """What a picture brings back.

    Attributes:
        settings: of its drawing, its prompt without tags.
        slots: one for each adapter that was found, in the picture's order.
        blend: how they were mixed.
        missing: adapters that were not found.
        model: the base's name; empty when the picture does not say.
        notes: what is other than it was, one line each.
        canvas: what it was drawn on; None without one, or when it is gone (a note says so).
        tells_canvas: whether None means that it was drawn from noise; a preset says nothing of it.
    """

    settings: GenerationSettings
    slots: tuple[SlotValues, ...]
    blend: str
    missing: tuple[Missing, ...]
    model: str
    notes: tuple[str, ...]
    canvas: Canvas | None = None
    tells_canvas: bool = True

    @property
    def recipe(self) -> DrawRecipe:
        """What goes into the form and the rack."""
        return DrawRecipe(self.settings, self.slots, self.blend)


def restore_from(path: Path, library: AdapterLibrary, parts: BaseParts, *, output: Path) -> Restored:
    """Read what a picture was made of, and find its adapters.

    Args:
        path: PNG of this app's, or a picture with a `parameters` text.
        library: where its adapters are looked for.
        parts: of the base that will draw.
        output: where canvases and masks of earlier pictures are kept.

    Raises:
        ValueError: one line: no picture, or one that does not tell what it was made of.
    """
    told = told_by(path)
    if isinstance(told, PictureRecord):
        return _of_record(told, library, parts, output)
    return _of_parameters(told, library, parts)


def _of_record(record: PictureRecord, library: AdapterLibrary, parts: BaseParts, output: Path) -> Restored:
    found = find_all([Wanted(use.name, use.sha256) for use in record.adapters], library)
    slots, missing, notes = [], [], list[str]()
    for use, answer in zip(record.adapters, found, strict=True):
        if isinstance(answer, Missing):
            missing.append(answer)
            continue
        place = placed(answer.name, use.weight, parts, curve=use.schedule)
        slots.append(_masked(place.slot, use, output, notes))
        notes += [*place.notes, *_renamed(use.name, answer.name)]
    blend = record.blend if record.blend in MODES else ADDITIVE
    if blend != record.blend:
        notes.append(f"The mode {record.blend[:40]!r} is not known here; {ADDITIVE} is taken instead")
    canvas = _canvas(record, output, notes)
    notes += _beyond(record.settings)
    return Restored(record.settings, tuple(slots), blend, tuple(missing), record.model, tuple(notes), canvas)


def _of_parameters(parameters: Parameters, library: AdapterLibrary, parts: BaseParts) -> Restored:
    settings, notes = settings_of(parameters, LIMITS)
    tags: dict[str, list[LoraTag]] = {}
    for tag in parameters.tags:
        tags.setdefault(tag.name, []).append(tag)
    wanted = [Wanted(name, by_name(parameters.hashes, name)) for name in tags]
    slots, missing, told_ones = [], [], [*notes]
    for (name, same), answer in zip(tags.items(), find_all(wanted, library), strict=True):
        if isinstance(answer, Missing):
            missing.append(answer)
            continue
        place = placed(answer.name, weight_of_tags(same, parts), parts)
        slots.append(place.slot)
        told_ones += [*place.notes, *_renamed(name, answer.name)]
    if "Denoising strength" in parameters.facts:
        told_ones.append("It was drawn from another picture, or enlarged; that picture is not part of the file")
    model = parameters.facts.get("Model", "")
    return Restored(settings, tuple(slots), ADDITIVE, tuple(missing), model, tuple(told_ones))


def _beyond(settings: GenerationSettings) -> tuple[str, ...]:
    """A line when the form cannot draw what a picture tells, as one of the command line may."""
    details = DetailValues(
        sampler=settings.sampler, width=settings.width, height=settings.height, strength=settings.strength
    )
    try:
        check_settings(
            settings.prompt, settings.negative_prompt, settings.seed, settings.steps, settings.guidance_scale, details
        )
    except ValueError as error:
        return (f"Beyond what is drawn here: {error}",)
    return ()


def _masked(slot: SlotValues, use: AdapterUse, output: Path, notes: list[str]) -> SlotValues:
    if use.mask is None:
        return slot
    mask = find_input(output, use.mask)
    if mask is None:
        notes.append(f"{slot.file}: its mask is not in {output} any more; without it, it draws everywhere")
    return replace(slot, mask=mask)


def _renamed(before: str, now: str) -> tuple[str, ...]:
    same = before.rpartition("/")[2].lower() == now.rpartition("/")[2].lower()
    return () if same else (f"{before} is called {now} here: the same file by its hash",)


def _canvas(record: PictureRecord, output: Path, notes: list[str]) -> Canvas | None:
    origin = record.origin
    if origin.canvas is None:
        return None
    image = find_input(output, origin.canvas)
    mask = None if origin.canvas_mask is None else find_input(output, origin.canvas_mask)
    if image is None or (mask is None and origin.canvas_mask is not None):
        notes.append(f"The picture that it was drawn on is not in {output} any more; put it in again")
        return None
    return Canvas(image, mask)


def report_html(restored: Restored, *, model: str) -> str:
    """What came back, what is missing and what is other than it was."""
    count = len(restored.slots)
    lines = [f"<p>Restored the settings and {count} adapter{'' if count == 1 else 's'}.</p>"]
    if restored.model and restored.model != model:
        lines.append(f"<p>It was drawn with <b>{escaped(restored.model)}</b>; the base here is {escaped(model)}.</p>")
    if restored.missing:
        items = bullets(_missing_html(one) for one in restored.missing)
        lines.append(f'<div class="lost" role="alert">Missing, and left out:{items}</div>')
    if restored.notes:
        lines.append(bullets(map(escaped, restored.notes)))
    return f'<div class="kept" role="status">{"".join(lines)}</div>'


def _missing_html(one: Missing) -> str:
    hash = f" <code>{escaped(one.hash)}</code>" if one.hash else ""
    return f"<b>{escaped(one.name)}</b>{hash}: {escaped(one.reason)}"


def restored_updates(restored: Restored, controls: Controls, session: Session, report: gr.HTML) -> Updates:
    """What shows a restored picture: form, rack and the report below."""
    recipe, left_out = cut_to_rack(restored.recipe, len(controls.rack.slots))
    shown = replace(restored, slots=recipe.slots, notes=(*restored.notes, *left_out))
    changes = {**controls.updates(recipe), report: report_html(shown, model=session.model)}
    if restored.tells_canvas:
        changes[controls.form.canvas] = canvas_value(restored.canvas)
    if restored.canvas is not None:
        changes[controls.form.fold] = gr.Accordion(open=True)
    if restored.settings.strength is not None:
        changes[controls.form.strength] = restored.settings.strength
    return changes


@dataclass(frozen=True)
class Restore:
    """The widgets of the drop."""

    picture: gr.File
    report: gr.HTML


def build_restore(session: Session, controls: Controls) -> Restore:
    """Lay out the drop inside the open block and wire it: a picture dropped fills the form and the rack."""
    with gr.Row():
        # not gr.Image: that one encodes what is dropped anew, or leaves its file open
        picture = gr.File(
            file_types=[".png", ".jpg", ".jpeg", ".webp"], type="filepath", height=120,
            label="Restore from a picture", elem_id="restore-drop", min_width=200,
        )  # fmt: skip
        report = gr.HTML(_HINT, elem_id="restore-report", min_width=260)

    def restore(path: str | None) -> Updates:
        if not path:
            raise ValueError("no picture came; drop one")
        session.library.refresh()
        restored = restore_from(Path(path), session.library, session.parts, output=session.output)
        return restored_updates(restored, controls, session, report)

    wire(picture.upload, restore, picture, [*controls.outputs, report], options=WITH_PROGRESS)
    return Restore(picture, report)
