"""The picture to start from: put in by hand or restored, painted on, and read back exactly as it was sent.

The widget holds names only: of an upload, or of a picture that the app has kept by its hash. Paint is a PNG of the
painter's, but a restored mask stays a name until it is painted on: so it comes back bit for bit, whatever its size.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import gradio as gr
from PIL import Image

from dora_diffusion.generation.img2img import Canvas
from dora_diffusion.generation.inputs import INPUTS, find_input
from dora_diffusion.generation.png_metadata import picture_sha256
from dora_diffusion.utils.images import read_image
from dora_diffusion.utils.text import shown_value
from ui.backend.checks import MAX_SIDE
from ui.backend.picture_checks import check_canvas, check_picture
from ui.generate import painter

MAX_CHARACTERS = 2 << 20
_KEPT = "kept:"
_NAMES = ("picture", "mask")


@dataclass(frozen=True)
class CanvasReader:
    """Where the pictures lie that the widget may name.

    Attributes:
        output: the folder whose `inputs` hold what was drawn on before.
        uploads: gives the paths of what was uploaded to this run of the app.
    """

    output: Path
    uploads: Callable[[], Collection[str]]

    def read(self, sent: object) -> Canvas | None:
        """The picture to start from, and where it was painted on; None without a picture.

        Raises:
            ValueError: not what the widget sends, or a picture that is not there: one line.
        """
        names = _names_of(sent)
        return check_canvas(self._picture(names["picture"]), self._mask(names["mask"]))

    def _picture(self, name: str) -> Image.Image | None:
        if name == "":
            return None
        if name.startswith(_KEPT):
            return self._kept("picture", name)
        if name not in self.uploads():
            raise ValueError(
                f"picture: got {shown_value(name)}, expected one that was uploaded to this app; put it in again"
            )
        check_picture("picture", name)
        return read_image(name)

    def _mask(self, name: str) -> Image.Image | None:
        if name == "":
            return None
        if name.startswith(_KEPT):
            return self._kept("mask", name)
        mask = painter.read_png(name, most_side=MAX_SIDE, most_characters=MAX_CHARACTERS)
        return mask if mask.getbbox() is not None else None

    def _kept(self, what: str, name: str) -> Image.Image:
        try:
            found = find_input(self.output, name.removeprefix(_KEPT))
        except ValueError as error:
            raise ValueError(f"{what}: got {shown_value(name)} ({error})") from None
        if found is None:
            raise ValueError(f"{what}: the one that was drawn on is not in {self.output} any more; put it in again")
        return found


def has_picture(sent: object) -> bool:
    """Whether the widget holds a picture; `ValueError` where it holds what it never sends."""
    return bool(_names_of(sent)["picture"])


def _names_of(sent: object) -> dict[str, str]:
    if sent is None or sent == "":
        return dict.fromkeys(_NAMES, "")
    if not isinstance(sent, str) or len(sent) > MAX_CHARACTERS:
        size = f"{len(sent)} characters" if isinstance(sent, str) else shown_value(sent)
        raise ValueError(f"picture: got {size}, expected at most {MAX_CHARACTERS} characters; paint less finely")
    try:
        names = json.loads(sent)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, dict) or names.keys() != {*_NAMES} or {*map(type, names.values())} != {str}:
        raise ValueError(f"picture: got {shown_value(sent)}, expected the names of a picture and a mask")
    return names


def canvas_value(canvas: Canvas | None) -> str:
    """What shows a picture to start from that the app has kept (`metadata.keep_input`), and its mask."""
    if canvas is None:
        return ""
    pictures = dict(zip(_NAMES, (canvas.image, canvas.mask), strict=True))
    return json.dumps({name: "" if one is None else f"{_KEPT}{picture_sha256(one)}" for name, one in pictures.items()})


def build_canvas(output: Path) -> gr.HTML:
    """Lay out the widget inside the open block."""
    kept = f"gradio_api/file={quote(str((output / INPUTS).resolve()))}/"
    return gr.HTML("", html_template=_TEMPLATE, js_on_load=_SCRIPT, elem_id="canvas", kept=kept)


_ABOVE = """
<div class="drop">
  <label class="choose">Choose a picture <input type="file" accept="image/png,image/jpeg,image/webp"></label>
  <button type="button" class="paste">Paste</button>
  <button type="button" class="remove">Remove</button>
  <span class="hint">or drop one here</span>
  <span class="said" role="status"></span>
</div>
"""
_TEMPLATE = painter.template("Paint where the picture should change", "No paint", above=_ABOVE).replace(
    'class="painter"', 'class="painter bare"'
)
_OWN_SCRIPT = """
const root = element.querySelector('.painter');
const nothing = { picture: '', mask: '' };
let held = nothing;
function say(text) { element.querySelector('.said').textContent = text; }
function hold(names) {
  held = names;
  props.value = names.picture ? JSON.stringify(names) : '';
}
function address(name) {
  if (name.startsWith('kept:')) return `${props.kept}${name.slice(5)}.png`;
  if (!name || name.startsWith('data:')) return name;
  return `gradio_api/file=${name.split('/').map(encodeURIComponent).join('/')}`;
}
async function restart() {
  const mine = ++turn;
  held = props.value ? JSON.parse(props.value) : nothing;
  const [picture, mask] = await Promise.all([loaded(address(held.picture)), loaded(address(held.mask))]);
  if (mine !== turn) return;
  say(held.picture && !picture ? 'This picture cannot be shown; put in a PNG, JPEG or WEBP.' : '');
  if (!picture) hold(nothing);
  root.classList.toggle('bare', !picture);
  show(picture);
  if (!picture) return;
  const { naturalWidth: width, naturalHeight: height } = mask || picture;
  const scale = Math.min(1, mostSide / Math.max(width, height));
  start(Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale)), mask, held.mask);
}
async function take(file) {
  if (!file) return;
  say('Uploading …');
  const sent = await upload(file).catch(() => null);
  if (!sent || !sent.path) return say('It could not be uploaded; a picture may have 24 MB.');
  hold({ picture: sent.path, mask: '' });
  await restart();
}
async function pasted() {
  for (const item of await navigator.clipboard.read()) {
    const type = item.types.find((one) => one.startsWith('image/'));
    if (type) return new File([await item.getType(type)], 'pasted.png', { type });
  }
  return null;
}
tell = (mask) => hold({ ...held, mask });
element.addEventListener('change', (event) => {
  if (event.target.type !== 'file') return;
  take(event.target.files[0]);
  event.target.value = '';
});
element.addEventListener('dragover', (event) => event.preventDefault());
element.addEventListener('drop', (event) => {
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});
element.querySelector('.remove').addEventListener('click', () => { hold(nothing); restart(); });
element.querySelector('.paste').addEventListener('click', async () => {
  const file = await pasted().catch(() => null);
  if (file) take(file);
  else say('There is no picture to paste, or the browser does not hand it over.');
});
document.addEventListener('paste', function paste(event) {
  if (!element.isConnected) return document.removeEventListener('paste', paste);
  if (!element.matches(':hover') && !element.contains(document.activeElement)) return;
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith('image/'));
  if (file) take(file);
});
watch('value', restart);
restart();
"""
_SCRIPT = f"const mostSide = {MAX_SIDE};{painter.SCRIPT}{_OWN_SCRIPT}"

CSS = """
#canvas .painter { --tall: 26rem; }
#canvas .drop { flex: 1 1 100%; display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; padding: .4rem;
  border: 1px dashed var(--border-color-primary); border-radius: .4rem; }
#canvas .choose { position: relative; }
#canvas .choose input { position: absolute; inset: 0; width: 100%; opacity: 0; }
#canvas .choose:focus-within { outline: 2px solid var(--color-accent); }
#canvas .said { font-size: .85rem; }
#canvas .bare :is(.under, .tools, .remove) { display: none; }
"""
