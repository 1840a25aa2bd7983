"""One painter for whatever is painted on the page: masks of adapters, and the part of a picture to draw anew.

It is a canvas of the page's own. Paint is its alpha, so that a mask of grey levels goes in and comes out bit for bit;
what it sends is a PNG, white where there is paint, that is read and checked here.
"""

import base64
import io

from PIL import Image

_START = "data:image/png;base64,"
_DEEDS = (
    ("undo", "Undo"),
    ("left", "Left half"),
    ("right", "Right half"),
    ("top", "Top half"),
    ("bottom", "Bottom half"),
    ("invert", "Invert"),
)


def png_url(picture: Image.Image) -> str:
    """A picture as a data URL; of a mask, only its levels and nothing that a browser might correct them by."""
    buffer = io.BytesIO()
    Image.frombytes(picture.mode, picture.size, picture.tobytes()).save(buffer, format="PNG")
    return _START + base64.b64encode(buffer.getvalue()).decode()


def read_png(data: object, *, most_side: int, most_characters: int) -> Image.Image:
    """A mask as the painter sends it: L.

    Args:
        data: what came.
        most_side: pixels of its longer side at most.
        most_characters: of the data URL.

    Raises:
        ValueError: not a PNG as a data URL, or too large a one.
    """
    if not isinstance(data, str) or not data.startswith(_START) or len(data) > most_characters:
        raise ValueError(f"mask: expected a PNG of at most {most_characters // 1024} KiB as the painter sends it")
    try:
        content = base64.b64decode(data.removeprefix(_START), validate=True)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as opened:
            size = opened.size
            mask = opened.convert("L") if max(size) <= most_side else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # binascii's is a ValueError
        raise ValueError(f"mask: not a PNG that can be read ({type(error).__name__})") from None
    if mask is None:
        raise ValueError(f"mask: got {size[0]} x {size[1]} pixels, expected at most {most_side}")
    return mask


def template(label: str, clear: str, *, above: str = "", tools: str = "") -> str:
    """The painter's markup.

    Args:
        label: what a screen reader says of the canvas.
        clear: what the button is called that takes all paint off.
        above, tools: further markup over it, and beside its tools.
    """
    deeds = "".join(
        f'<button type="button" data-deed="{deed}">{name}</button>' for deed, name in (*_DEEDS, ("clear", clear))
    )
    return f"""
<div class="painter">
  {above}
  <div class="under"><img alt="" hidden><canvas width="256" height="256" role="img" aria-label="{label}"></canvas></div>
  <div class="tools">
    <label><input type="checkbox" class="erase"> Erase</label>
    <label>Brush <input type="range" class="brush" min="2" max="96" value="36"></label>
    {deeds}
    {tools}
  </div>
</div>
"""


# What follows it sets `tell`, which is called with every change, and calls `start` with what is there at first.
SCRIPT = """
const colour = [255, 51, 85];
const most = 12;  // steps back: each keeps the canvas's levels
const canvas = element.querySelector('canvas');
const pen = canvas.getContext('2d', { willReadFrequently: true });
const below = element.querySelector('.under img');
const before = [];
let tell = () => {};
let sent = '';
let finger = null;
let last = null;
let turn = 0;

async function loaded(url) {
  if (!url) return null;
  const picture = new Image();
  picture.src = url;
  return picture.decode().then(() => picture, () => null);
}
function levels() {
  const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
  const found = new Uint8ClampedArray(data.length / 4);
  for (let i = 0; i < found.length; i++) found[i] = data[4 * i + 3];
  return found;
}
function put(found) {
  const { width, height } = canvas;
  const image = new ImageData(width, height);
  for (let i = 0; i < found.length; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = colour[c];
    image.data[4 * i + 3] = found[i];
  }
  pen.putImageData(image, 0, 0);
}
function sheet() {
  const { width, height } = canvas;
  return Object.assign(document.createElement('canvas'), { width, height }).getContext('2d');
}
function png() {
  const found = levels();
  const image = new ImageData(canvas.width, canvas.height);
  for (let i = 0; i < found.length; i++) {
    image.data[4 * i] = image.data[4 * i + 1] = image.data[4 * i + 2] = found[i];
    image.data[4 * i + 3] = 255;
  }
  const white = sheet();
  white.putImageData(image, 0, 0);
  return white.canvas.toDataURL('image/png');
}
function lay(picture) {
  const grey = sheet();
  grey.fillRect(0, 0, canvas.width, canvas.height);
  grey.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const { data } = grey.getImageData(0, 0, canvas.width, canvas.height);
  const found = new Uint8ClampedArray(data.length / 4);
  for (let i = 0; i < found.length; i++)
    found[i] = Math.round(0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2]);
  put(found);
}
function start(width, height, mask, name) {
  Object.assign(canvas, { width, height });  // which wipes it
  before.length = 0;
  sent = name;
  if (mask) lay(mask);
}
function show(picture) {
  below.hidden = !picture;
  if (picture) below.src = picture.src;
  const ratio = picture ? picture.naturalWidth / picture.naturalHeight : 1;
  element.querySelector('.under').style.setProperty('--ratio', ratio);
}
function remember() {
  before.push([levels(), sent]);
  if (before.length > most) before.shift();
}
function changed(now) {
  sent = now;
  tell(sent);
}
function place(event) {
  const box = canvas.getBoundingClientRect();
  return [
    (event.clientX - box.left) * canvas.width / box.width,
    (event.clientY - box.top) * canvas.height / box.height,
  ];
}
function stroke(to) {
  pen.globalCompositeOperation = element.querySelector('.erase').checked ? 'destination-out' : 'source-over';
  pen.strokeStyle = `rgb(${colour})`;
  pen.lineWidth = element.querySelector('.brush').value * Math.max(canvas.width, canvas.height) / 256;
  pen.lineCap = 'round';
  pen.beginPath();
  pen.moveTo(...last);
  pen.lineTo(to[0] + 0.01, to[1]);
  pen.stroke();
  pen.globalCompositeOperation = 'source-over';
  last = to;
}
function fill(x, y, width, height) {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = `rgb(${colour})`;
  pen.fillRect(x * canvas.width, y * canvas.height, width * canvas.width, height * canvas.height);
}
const deeds = {
  left: () => fill(0, 0, 0.5, 1),
  right: () => fill(0.5, 0, 0.5, 1),
  top: () => fill(0, 0, 1, 0.5),
  bottom: () => fill(0, 0.5, 1, 0.5),
  invert: () => put(levels().map((level) => 255 - level)),
  clear: () => fill(0, 0, 0, 0),
};
function undo() {
  if (!before.length) return;
  const [found, name] = before.pop();
  put(found);
  changed(name);
}
element.addEventListener('pointerdown', (event) => {
  if (event.target !== canvas || finger !== null || event.button !== 0) return;
  event.preventDefault();
  remember();
  canvas.setPointerCapture(event.pointerId);
  finger = event.pointerId;
  last = place(event);
  stroke(last);
});
element.addEventListener('pointermove', (event) => { if (event.pointerId === finger) stroke(place(event)); });
for (const end of ['pointerup', 'pointercancel'])
  element.addEventListener(end, (event) => {
    if (event.pointerId !== finger) return;
    finger = null;
    changed(png());
  });
element.addEventListener('click', (event) => {
  const deed = event.target.dataset ? event.target.dataset.deed : undefined;
  if (deed === 'undo') return undo();
  if (!deeds[deed]) return;
  remember();
  deeds[deed]();
  changed(deed === 'clear' ? '' : png());
});
"""

CSS = """
.painter { display: flex; flex-wrap: wrap; gap: .6rem; --tall: 16rem; }
.painter .under { position: relative; width: min(100%, calc(var(--tall) * var(--ratio, 1)));
  aspect-ratio: var(--ratio, 1); border-radius: .3rem; overflow: hidden; background: var(--background-fill-secondary);
  outline: 1px solid var(--border-color-primary); }
.painter .under > * { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0 !important; }
.painter canvas { opacity: .6; touch-action: none; cursor: crosshair; }
.painter .tools { flex: 1 1 9rem; min-width: 0; display: flex; flex-wrap: wrap; gap: .35rem;
  align-content: flex-start; }
.painter label { flex: 1 1 100%; display: flex; gap: .4rem; align-items: center; font-size: .85rem; }
.painter .file { flex-wrap: wrap; }
.painter input:is([type=range], [type=checkbox]) { accent-color: var(--color-accent); }
.painter input[type=file] { max-width: 100%; font-size: .8rem; }
.painter :is(button, .choose) { flex: 0 0 auto; margin: 0; padding: .15rem .6rem; border-radius: .4rem;
  font-weight: 600; border: 1px solid var(--border-color-primary); background: var(--button-secondary-background-fill);
  color: var(--button-secondary-text-color); font-size: .85rem; }
"""
