"""Presets: named states of the form and the rack, as JSON in the output folder; adapters by the hash of their files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from dora_diffusion.functional.blend_modes import ADDITIVE, MODES
from dora_diffusion.generation.generate import GenerationSettings
from dora_diffusion.generation.inputs import find_input, keep_input
from dora_diffusion.utils.atomic import write_atomically
from ui.backend.checks import check_name
from ui.backend.picture_checks import check_picture
from ui.backend.request import BaseParts, DetailValues, SlotValues, check_adapters, check_settings
from ui.backend.session import Session
from ui.errors import QUICK, WITH_PROGRESS, wire
from ui.generate.controls import Controls
from ui.generate.recipes import DrawRecipe
from ui.generate.restore import Restored, restored_updates
from ui.generate.values import Updates, Values
from ui.library.hashes import Missing, Wanted, find_all, hash_of
from ui.library.library import AdapterLibrary
from ui.markup import paragraph

FOLDER = "presets"
MAX_BYTES = 1 << 20
_VERSION = 1


def list_presets(output: Path) -> tuple[str, ...]:
    """The names of presets, in their order."""
    return tuple(sorted((path.stem for path in (output / FOLDER).glob("*.json")), key=str.lower))


def save_preset(name: object, recipe: DrawRecipe, library: AdapterLibrary, *, model: str, output: Path) -> Path:
    """Write a preset, over one of the same name.

    Args:
        name: letters, digits, dots, - and _.
        recipe: what is kept; masks are stored beside the pictures, by hash.
        library: the slots' files are hashed.
        model: what the base is called.
        output: the folder of pictures.

    Raises:
        ValueError: the name cannot be a file's, or an adapter cannot be read.
    """
    checked = check_name("preset", name)
    slots = [_slot_record(slot, library, output) for slot in recipe.slots]
    record = {
        "version": _VERSION,
        "model": model,
        "settings": asdict(recipe.settings),
        "blend": recipe.blend,
        "slots": slots,
    }
    path = output / FOLDER / f"{checked}.json"
    try:
        write_atomically(path, json.dumps(record, ensure_ascii=False, indent=1).encode())
    except OSError as error:
        raise ValueError(f"preset {checked}: cannot be written ({error.strerror or type(error).__name__})") from None
    return path


def load_preset(name: object, library: AdapterLibrary, parts: BaseParts, *, output: Path) -> Restored:
    """Read a preset, and find its adapters by their hashes.

    Raises:
        ValueError: no such preset, or its file is broken.
    """
    path = _find(name, output)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
        record = json.loads(path.read_text(encoding="utf-8"))
        settings = _settings_of(record["settings"])
        blend = record["blend"] if record["blend"] in MODES else ADDITIVE
        kept = [_kept_of(entry) for entry in record["slots"][:64]]
        slots, missing, notes = _found(kept, library, parts, output)
        return Restored(settings, slots, blend, missing, str(record["model"]), notes, tells_canvas=False)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        line = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"preset {path.stem}: its file is not as this app writes it ({line})") from None


def delete_preset(name: object, output: Path) -> None:
    """Delete a preset's file; a ValueError when there is none of the name."""
    _find(name, output).unlink(missing_ok=True)


def _find(name: object, output: Path) -> Path:
    if not isinstance(name, str) or name not in list_presets(output):
        raise ValueError(f"preset: got {str(name)[:60]!r}, expected one of the list")
    return output / FOLDER / f"{name}.json"


def _slot_record(slot: SlotValues, library: AdapterLibrary, output: Path) -> dict[str, Any]:
    file = library.find(str(slot.file))
    mask = check_picture("mask", slot.mask)
    kept = None if mask is None else keep_input(output, mask.convert("L"))
    return {**asdict(replace(slot, mask=None)), "sha256": hash_of(file), "mask": kept}


def _kept_of(entry: Mapping[str, Any]) -> tuple[SlotValues, str, str | None]:
    """A slot, its file's hash, and its mask's."""
    values = {name: value for name, value in entry.items() if name in SlotValues.__dataclass_fields__}
    blocks = values.pop("blocks", None)
    mask = values.pop("mask", None)
    slot = SlotValues(**values, blocks=None if blocks is None else tuple(float(factor) for factor in blocks))
    if not all(isinstance(flag, bool) for flag in (slot.enabled, slot.apart, slot.solo)):
        raise ValueError("a switch is neither on nor off")
    return slot, str(entry["sha256"]), mask


def _settings_of(record: Mapping[str, Any]) -> GenerationSettings:
    details = DetailValues(
        sampler=record["sampler"], width=record["width"], height=record["height"], strength=record["strength"]
    )
    return check_settings(
        record["prompt"],
        record["negative_prompt"],
        seed=record["seed"],
        steps=record["steps"],
        guidance=record["guidance_scale"],
        details=details,
    )


def _found(
    kept: Sequence[tuple[SlotValues, str, str | None]], library: AdapterLibrary, parts: BaseParts, output: Path
) -> tuple[tuple[SlotValues, ...], tuple[Missing, ...], tuple[str, ...]]:
    """Slots whose files are there, those that are missing, and what is other than it was."""
    found = find_all([Wanted(str(slot.file), sha256) for slot, sha256, _ in kept], library)
    slots, notes = [], []
    for (slot, _, mask), answer in zip(kept, found, strict=True):
        if isinstance(answer, Missing):
            continue
        picture: Image.Image | None = None if mask is None else find_input(output, mask)
        if mask is not None and picture is None:
            notes.append(f"{slot.file}: its mask is not in {output} any more; without it, it draws everywhere")
        blocks = slot.blocks
        if blocks is not None and len(blocks) != len(parts.blocks):
            notes.append(f"{slot.file}: its {len(blocks)} blocks are those of another base; they are left at 1")
            blocks = None
        slots.append(replace(slot, file=answer.name, mask=picture, blocks=blocks))
    check_adapters(slots, parts)
    missing = tuple(answer for answer in found if isinstance(answer, Missing))
    return tuple(slots), missing, tuple(notes)


@dataclass(frozen=True)
class PresetWidgets:
    """The widgets of the presets."""

    name: gr.Dropdown
    save: gr.Button
    load: gr.Button
    delete: gr.Button
    report: gr.HTML


def build_presets(session: Session, controls: Controls) -> PresetWidgets:
    """Lay out the presets inside the open block and wire them to the form and the rack."""
    with gr.Row(elem_id="presets"):
        name = gr.Dropdown(
            list(list_presets(session.output)), value=None, label="Preset", allow_custom_value=True,
            info="Pick one, or type a new name to save under.", elem_id="preset-name", min_width=200, scale=3,
        )  # fmt: skip
        load = gr.Button("Load", size="sm", elem_id="preset-load", min_width=70)
        save = gr.Button("Save", size="sm", elem_id="preset-save", min_width=70)
        delete = gr.Button("Delete", size="sm", variant="stop", elem_id="preset-delete", min_width=70)
    presets = PresetWidgets(name, save, load, delete, gr.HTML(elem_id="preset-report"))
    _wire(presets, session, controls)
    return presets


def _wire(presets: PresetWidgets, session: Session, controls: Controls) -> None:
    def choices(value: str | None) -> gr.Dropdown:
        return gr.Dropdown(list(list_presets(session.output)), value=value)

    def save(values: Values) -> tuple[gr.Dropdown, str]:
        recipe = controls.recipe(values)
        path = save_preset(values[presets.name], recipe, session.library, model=session.model, output=session.output)
        return choices(path.stem), paragraph("Saved.", "kept", is_status=True)

    def load(name: object) -> Updates:
        session.library.refresh()
        restored = load_preset(name, session.library, session.parts, output=session.output)
        return restored_updates(restored, controls, session, presets.report)

    def delete(name: object) -> tuple[gr.Dropdown, str]:
        delete_preset(name, session.output)
        return choices(None), paragraph("Deleted.", "kept", is_status=True)

    told_in = [presets.name, presets.report]
    wire(presets.save.click, save, {presets.name, *controls.inputs}, told_in, options=WITH_PROGRESS)
    wire(presets.load.click, load, presets.name, [*controls.outputs, presets.report], options=WITH_PROGRESS)
    wire(presets.delete.click, delete, presets.name, told_in, options=WITH_PROGRESS)
    wire(
        presets.name.focus, lambda: gr.Dropdown(list(list_presets(session.output))), outputs=presets.name, options=QUICK
    )
