"""Masks of adapters: one painter for all slots, and how a mask looks beside its slot.

What the painter sends is kept on the server, beside its slot. White is where the adapter draws.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from PIL import Image

from ui.backend.request import check_picture
from ui.generate import painter

SIDE = 256
MAX_CHARACTERS = 1 << 20
_THUMBNAIL = 64
_fresh = itertools.count(1)

Mask = Image.Image | Path | str | None


@dataclass(frozen=True)
class Painter:
    """The widgets below the rack that paint the mask of one slot."""

    fold: gr.Accordion
    target: gr.Dropdown
    canvas: gr.HTML


def read_painted(data: object) -> Image.Image | None:
    """A mask out of the painter: L; None when it was cleared.

    Raises:
        ValueError: not a PNG of at most MAX_CHARACTERS as a data URL, or not one of a mask's size.
    """
    if data is None or data == "":
        return None
    mask = painter.read_png(data, most_side=SIDE, most_characters=MAX_CHARACTERS)
    if mask.size != (SIDE, SIDE):
        raise ValueError(f"mask: got {mask.width} x {mask.height} pixels, expected {SIDE} x {SIDE}")
    return mask


def mask_html(mask: Mask) -> str:
    """A small picture of a mask and the share that it covers, or a line that says there is none."""
    picture = check_picture("mask", mask)
    if picture is None:
        return '<span class="chip">no mask: draws everywhere</span>'
    grey = picture.convert("L")
    grey.thumbnail((_THUMBNAIL, _THUMBNAIL))
    covered = sum(level * count for level, count in enumerate(grey.histogram())) / (255 * grey.width * grey.height)
    return (
        f'<img class="mask-thumb" src="{painter.png_url(grey)}" alt="mask: white is where it draws">'
        f'<span class="chip">draws in {covered:.0%} of the picture</span>'
    )


def canvas_value(mask: Mask) -> str:
    """What shows a mask in the painter. Never the same twice, so that the painter always notices."""
    picture = check_picture("mask", mask)
    shown = "" if picture is None else painter.png_url(picture.convert("L").resize((SIDE, SIDE)))
    return f"{next(_fresh)}|{shown}"


def targets(files: Sequence[str | None]) -> list[tuple[str, int]]:
    """What may be painted, by the slots' adapters: what a person reads, and the slot's number."""
    return [(f"slot {number}: {file}" if file else f"slot {number}", number) for number, file in enumerate(files, 1)]


def build_painter(slots: int) -> Painter:
    """Lay out the painter inside the open block, for the masks of so many slots."""
    with gr.Accordion("Mask painter", open=False, elem_id="mask-painter") as fold:
        target = gr.Dropdown(
            targets([None] * slots),
            value=1,
            label="Mask of",
            elem_id="mask-slot",
        )
        canvas = gr.HTML("", html_template=_TEMPLATE, js_on_load=_SCRIPT, elem_id="mask-canvas")
    return Painter(fold, target, canvas)


_FILE = '<label class="file">From a picture <input type="file" accept="image/png,image/jpeg,image/webp"></label>'
_TEMPLATE = painter.template("Mask: paint where the adapter draws", "No mask", tools=_FILE)
_OWN_SCRIPT = """
async function look() {
  const drawn = document.querySelector('#blend img, #pictures img');
  if (!drawn || drawn.src !== below.src) show(await loaded(drawn ? drawn.src : ''));
}
async function restart() {
  const mine = ++turn;
  const held = String(props.value || '').split('|')[1] || '';
  const mask = await loaded(held);
  if (mine === turn) start(side, side, mask, held);
}
tell = (png) => trigger('input', { png });
element.addEventListener('pointerenter', look, true);
element.addEventListener('change', async (event) => {
  if (event.target.type !== 'file' || !event.target.files.length) return;
  const url = URL.createObjectURL(event.target.files[0]);
  const picture = await loaded(url);
  URL.revokeObjectURL(url);
  event.target.value = '';
  if (!picture) return;
  remember();
  lay(picture);
  changed(png());
});
watch('value', () => { look(); restart(); });
restart();
"""
_SCRIPT = f"const side = {SIDE};{painter.SCRIPT}{_OWN_SCRIPT}"

_OWN_CSS = """
.mask-thumb { display: inline-block; width: 3rem; height: 3rem; margin-right: .5rem; vertical-align: middle;
  image-rendering: auto; border: 1px solid var(--border-color-primary); border-radius: .2rem; }
"""
CSS = painter.CSS + _OWN_CSS
