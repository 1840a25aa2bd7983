"""Masks of adapters: one painter for all slots, and how a mask looks beside its slot.

The painter is a canvas of the page's own; what it sends is a PNG that is read and checked here, and kept on the
server. White is where the adapter draws.
"""

import base64
import binascii
import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from PIL import Image

from ui.request import check_picture

SIDE = 256
MAX_CHARACTERS = 1 << 20
_START = "data:image/png;base64,"
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
    if not isinstance(data, str) or not data.startswith(_START) or len(data) > MAX_CHARACTERS:
        raise ValueError(f"mask: expected a PNG of at most {MAX_CHARACTERS // 1024} KiB as the painter sends it")
    try:
        content = base64.b64decode(data.removeprefix(_START), validate=True)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as opened:
            if opened.size != (SIDE, SIDE):
                raise ValueError(f"mask: got {opened.width} x {opened.height} pixels, expected {SIDE} x {SIDE}")
            return opened.convert("L")
    except (OSError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        raise ValueError(f"mask: not a PNG that can be read ({type(error).__name__})") from None


def mask_html(mask: Mask) -> str:
    """A small picture of a mask and the share that it covers, or a line that says there is none."""
    picture = check_picture("mask", mask)
    if picture is None:
        return '<span class="chip">no mask: draws everywhere</span>'
    grey = picture.convert("L")
    grey.thumbnail((_THUMBNAIL, _THUMBNAIL))
    covered = sum(level * count for level, count in enumerate(grey.histogram())) / (255 * grey.width * grey.height)
    return (
        f'<img class="mask-thumb" src="{_data_url(grey)}" alt="mask: white is where it draws">'
        f'<span class="chip">draws in {covered:.0%} of the picture</span>'
    )


def canvas_value(mask: Mask) -> str:
    """What shows a mask in the painter. Never the same twice, so that the painter always notices."""
    picture = check_picture("mask", mask)
    shown = "" if picture is None else _data_url(picture.convert("L").resize((SIDE, SIDE)))
    return f"{next(_fresh)}|{shown}"


def build_painter(slots: int) -> Painter:
    """Lay out the painter inside the open block, for the masks of so many slots."""
    with gr.Accordion("Mask painter", open=False, elem_id="mask-painter") as fold:
        target = gr.Dropdown(
            [(f"slot {number}", number) for number in range(1, slots + 1)],
            value=1,
            label="Mask of",
            elem_id="mask-slot",
        )
        canvas = gr.HTML("", html_template=_TEMPLATE, js_on_load=_SCRIPT, elem_id="mask-canvas")
    return Painter(fold, target, canvas)


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return _START + base64.b64encode(buffer.getvalue()).decode()


_DEEDS = (
    ("left", "Left half"),
    ("right", "Right half"),
    ("top", "Top half"),
    ("bottom", "Bottom half"),
    ("invert", "Invert"),
    ("clear", "No mask"),
)
_TEMPLATE = f"""
<div class="painter">
  <div class="under"><canvas width="{SIDE}" height="{SIDE}" role="img"
    aria-label="Mask: paint white where the adapter draws"></canvas></div>
  <div class="tools">
    <label><input type="checkbox" class="erase"> Erase</label>
    <label>Brush <input type="range" class="brush" min="4" max="96" value="36"></label>
    {"".join(f'<button type="button" data-deed="{deed}">{label}</button>' for deed, label in _DEEDS)}
    <label class="file">From a picture <input type="file" accept="image/png,image/jpeg,image/webp"></label>
  </div>
</div>
"""
# The canvas is looked up at every event: the template may be rendered anew when the value changes.
_SCRIPT = """
const side = element.querySelector('canvas').width;
const canvas = () => element.querySelector('canvas');
const pen = () => canvas().getContext('2d', { willReadFrequently: true });
let last = null;
function fill(colour, x, y, width, height) {
  pen().fillStyle = colour;
  pen().fillRect(x, y, width, height);
}
function black() { fill('#000', 0, 0, side, side); }
function send(empty) { trigger('input', { png: empty ? '' : canvas().toDataURL('image/png') }); }
function place(event) {
  const box = canvas().getBoundingClientRect();
  return [(event.clientX - box.left) * side / box.width, (event.clientY - box.top) * side / box.height];
}
function stroke(to) {
  const p = pen();
  p.strokeStyle = element.querySelector('.erase').checked ? '#000' : '#fff';
  p.lineWidth = Number(element.querySelector('.brush').value);
  p.lineCap = 'round';
  p.beginPath();
  p.moveTo(...last);
  p.lineTo(to[0] + 0.01, to[1]);
  p.stroke();
  last = to;
}
function look() {
  const picture = document.querySelector('#blend img, #pictures img');
  const under = element.querySelector('.under');
  under.style.backgroundImage = picture ? `url("${picture.src}")` : '';
  under.style.aspectRatio = picture && picture.naturalWidth ? picture.naturalWidth / picture.naturalHeight : 1;
}
function show(value) {
  const uri = String(value || '').split('|')[1];
  black();
  if (!uri) return;
  const picture = new Image();
  picture.onload = () => pen().drawImage(picture, 0, 0, side, side);
  picture.src = uri;
}
const deeds = {
  left: () => { black(); fill('#fff', 0, 0, side / 2, side); },
  right: () => { black(); fill('#fff', side / 2, 0, side / 2, side); },
  top: () => { black(); fill('#fff', 0, 0, side, side / 2); },
  bottom: () => { black(); fill('#fff', 0, side / 2, side, side / 2); },
  invert: () => {
    pen().globalCompositeOperation = 'difference';
    fill('#fff', 0, 0, side, side);
    pen().globalCompositeOperation = 'source-over';
  },
  clear: black,
};
element.addEventListener('pointerdown', (event) => {
  if (event.target !== canvas()) return;
  event.preventDefault();
  canvas().setPointerCapture(event.pointerId);
  last = place(event);
  stroke(last);
});
element.addEventListener('pointermove', (event) => { if (last) stroke(place(event)); });
for (const end of ['pointerup', 'pointercancel'])
  element.addEventListener(end, () => { if (last) { last = null; send(false); } });
element.addEventListener('pointerenter', look, true);
element.addEventListener('click', (event) => {
  const deed = event.target.dataset ? event.target.dataset.deed : undefined;
  if (!deed) return;
  deeds[deed]();
  send(deed === 'clear');
});
element.addEventListener('change', async (event) => {
  if (event.target.type !== 'file' || !event.target.files.length) return;
  const picture = await createImageBitmap(event.target.files[0]).catch(() => null);
  event.target.value = '';
  if (!picture) return;
  black();
  pen().drawImage(picture, 0, 0, side, side);
  send(false);
});
watch('value', () => { look(); show(props.value); });
black();
"""

CSS = """
.painter { display: flex; flex-wrap: wrap; gap: .6rem; }
.painter .under { flex: 0 1 16rem; aspect-ratio: 1; background-size: 100% 100%; border-radius: .3rem; overflow: hidden;
  border: 1px solid var(--border-color-primary); }
.painter canvas { display: block; width: 100%; height: 100%; opacity: .6; touch-action: none; cursor: crosshair; }
.painter .tools { flex: 1 1 9rem; min-width: 0; display: flex; flex-wrap: wrap; gap: .35rem;
  align-content: flex-start; }
.painter label { flex: 1 1 100%; display: flex; gap: .4rem; align-items: center; font-size: .85rem; }
.painter .file { flex-wrap: wrap; }
.painter input[type=file] { max-width: 100%; font-size: .8rem; }
.painter button { padding: .15rem .6rem; border: 1px solid var(--border-color-primary); border-radius: .4rem;
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color); font-size: .85rem; }
.mask-thumb { display: inline-block; width: 3rem; height: 3rem; margin-right: .5rem; vertical-align: middle;
  image-rendering: auto; border: 1px solid var(--border-color-primary); border-radius: .2rem; }
"""
