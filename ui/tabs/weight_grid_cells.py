"""The cells of a weight map: which mix each is, and the sheet of them all."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from dora_diffusion.generation.png_metadata import picture_metadata
from dora_diffusion.utils.atomic import write_atomically
from dora_diffusion.utils.image_grid import grid
from ui.backend.request import DrawRequest, Parts, SlotValues, check_adapters, taking_part
from ui.backend.session import Session
from ui.backend.tags import Resolved, with_tagged
from ui.tabs.axes import MAX_CELLS

ADAPTER_WEIGHT, A_B = "Adapter × weight", "A × B"
KINDS = (ADAPTER_WEIGHT, A_B)
MAPS = "maps"  # their folder in the output folder
MIN_CELL, MAX_CELL = 160, 512  # sides on the sheet, in pixels


@dataclass(frozen=True)
class Cell:
    """One mix.

    Attributes:
        row, column: what stands at the head of its row and column.
        slots: of the rack that draws it.
        is_baseline: whether the column's adapter is left out.
    """

    row: str
    column: str
    slots: tuple[SlotValues, ...]
    is_baseline: bool = False

    @property
    def label(self) -> str:
        """Both heads."""
        return f"{self.row}: {self.column}"


@dataclass(frozen=True)
class Axes:
    """What a map varies.

    Attributes:
        kind: one of KINDS.
        files: library names; of A × B the first two.
        across: strengths, left to right.
        down: strengths of A, top to bottom; not used by the other kind.
        alone: whether the others are off: the rack's, and those of the prompt's tags.
    """

    kind: str
    files: tuple[str, ...]
    across: tuple[float, ...]
    down: tuple[float, ...] = ()
    alone: bool = False


def plan(axes: Axes, slots: Sequence[SlotValues]) -> list[list[Cell]]:
    """The rows of a map, each with the column's adapter left out first.

    Args:
        axes: what to vary.
        slots: of the rack; files that are not in it take its free slots.

    Raises:
        ValueError: no kind of map, too few adapters or free slots, or more than MAX_CELLS cells.
    """
    if axes.kind not in KINDS:
        raise ValueError(f"weight map: got {axes.kind!r:.40}, expected one of {', '.join(KINDS)}")
    files = _files_of(axes, slots)
    heads = len(axes.down) if axes.kind == A_B else len(files)
    if heads * (len(axes.across) + 1) > MAX_CELLS:
        raise ValueError(
            f"weight map: {heads} x {len(axes.across) + 1} cells with the column of the baseline, expected at most "
            f"{MAX_CELLS}; take larger steps or fewer adapters"
        )
    ground = _seated(_settled(slots, alone=axes.alone), files)
    if axes.kind == A_B:
        first, second = files
        rows = [(f"{first} {value:g}", second, _with(ground, first, value)) for value in axes.down]
    else:
        rows = [(file, file, tuple(ground)) for file in files]
    return [_row(head, file, axes.across, values) for head, file, values in rows]


def _files_of(axes: Axes, slots: Sequence[SlotValues]) -> tuple[str, ...]:
    """Those asked for, or else the rack's; of A × B two."""
    files = tuple(dict.fromkeys(axes.files or (str(slot.file) for slot in taking_part(slots))))
    needed = 2 if axes.kind == A_B else 1
    if len(files) < needed:
        raise ValueError(f"weight map: got {len(files)} adapters, expected {needed}; pick them here or in the rack")
    if axes.kind == A_B and len(axes.files) > needed:
        raise ValueError(f"weight map: got {len(files)} adapters, expected two for {A_B}")
    return files[:needed] if axes.kind == A_B else files


def _row(head: str, file: str, across: Sequence[float], slots: Sequence[SlotValues]) -> list[Cell]:
    named = "" if file == head else f"{file} "
    # at strength 0, not switched off: the prompt's tag would bring back what no slot holds
    cells = [Cell(head, f"{named}off", _with(slots, file, 0.0), is_baseline=True)]
    return cells + [Cell(head, f"{named}{value:g}", _with(slots, file, value)) for value in across]


def _settled(slots: Sequence[SlotValues], *, alone: bool) -> list[SlotValues]:
    """The same mix without solo, or with every slot off when the map's adapters are alone."""
    parts = set() if alone else {id(slot) for slot in taking_part(slots)}
    return [replace(slot, solo=False, enabled=id(slot) in parts) if slot.file else slot for slot in slots]


def _seated(slots: list[SlotValues], files: Sequence[str]) -> list[SlotValues]:
    """With every file in some slot; those that were not there are off."""
    for file in files:
        if _place(slots, file) is not None:
            continue
        free = next((index for index, slot in enumerate(slots) if not slot.file), None)
        if free is None:
            raise ValueError(f"{file}: the rack has no free slot for it; empty one, or take an adapter of the rack")
        slots[free] = SlotValues(file, False, 1.0, False, 1.0, 1.0)
    return slots


def _with(slots: Sequence[SlotValues], file: str, strength: float) -> tuple[SlotValues, ...]:
    """With one strength for all components of a file; its blocks, curve and mask stay."""
    changed = list(slots)
    if (place := _place(slots, file)) is not None:
        changed[place] = replace(slots[place], enabled=True, strength=strength, apart=False)
    return tuple(changed)


def _place(slots: Sequence[SlotValues], file: str) -> int | None:
    """Which slot has a file: the one that takes part, or else the first."""
    having = [index for index, slot in enumerate(slots) if slot.file == file]
    return next((index for index in having if slots[index].enabled), having[0] if having else None)


def request_of(cell: Cell, resolved: Resolved, parts: Parts, *, alone: bool) -> DrawRequest:
    """What draws a cell: one picture, as the page would draw it with the cell's slots; alone, without the tags."""
    adapters = with_tagged(check_adapters(cell.slots, parts), () if alone else resolved.tagged)
    return replace(resolved.request, adapters=adapters, count=1)


def save_sheet(
    rows: Sequence[Sequence[Cell]], pictures: Sequence[Path], resolved: Resolved, axes: Axes, session: Session
) -> Path:
    """All cells as one PNG, each under its label; its text says what every cell was made of.

    Args:
        rows: of the map.
        pictures: of its cells, row by row.
        resolved: what they are variations of.
        axes: what was varied.
        session: whose base drew them.
    """
    width = len(rows[0])
    strips = []
    for number, row in enumerate(rows):
        images = [_small(path) for path in pictures[number * width : (number + 1) * width]]
        strips.append(grid([images], [cell.label for cell in row]))
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    for number, strip in enumerate(strips):
        sheet.paste(strip, (0, number * strips[0].height))
    info = picture_metadata(resolved.request.settings, model=session.model, adapters=())
    info.add_itxt("weight_map", json.dumps(_record(rows, pictures, axes), ensure_ascii=False))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", pnginfo=info)
    path = pictures[0].parent / f"{datetime.now():%Y%m%d-%H%M%S-%f}-map.png"
    write_atomically(path, buffer.getvalue())
    return path


def _record(rows: Sequence[Sequence[Cell]], pictures: Sequence[Path], axes: Axes) -> dict[str, Any]:
    cells = [cell for row in rows for cell in row]
    named = [
        {"row": cell.row, "column": cell.column, "picture": picture.name, "adapters": _strengths(picture)}
        for cell, picture in zip(cells, pictures, strict=True)
    ]
    return {"axes": asdict(axes), "cells": named}


def _strengths(picture: Path) -> Any:
    """What a cell's own file says of its adapters: names, hashes, strengths."""
    with Image.open(picture) as opened:
        return json.loads(opened.info["dora_diffusion"])["adapters"]


def _small(path: Path) -> Image.Image:
    """A cell's picture for the sheet: large enough for its label, small enough for 64 of them."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    if picture.width < MIN_CELL:
        factor = -(-MIN_CELL // picture.width)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((MAX_CELL, MAX_CELL), Image.Resampling.LANCZOS)
    return picture
