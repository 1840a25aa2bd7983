"""Emoji drawings from npm's @iconify-json packages, rendered once and kept as PNG sheets.

Read at pretraining time only; users of the shipped base never need them.
"""

import io
import json
import subprocess
import tarfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from dora_diffusion.utils.atomic import atomic_file, write_atomically

RENDER_SIZE = 200


def download_icon_set(name: str, folder: Path) -> Path:
    """Fetch `@iconify-json/NAME` with npm into `folder`, once; return the path of its `icons.json`."""
    target = folder / f"{name}.json"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        ["npm", "pack", "--silent", f"@iconify-json/{name}"], cwd=folder, capture_output=True, text=True, check=False
    )
    if packed.returncode:
        raise ValueError(f"npm could not fetch @iconify-json/{name}: {packed.stderr.strip()[-200:]}")
    archive = folder / packed.stdout.split()[-1]
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        assert member is not None
        write_atomically(target, member.read())
    archive.unlink()
    return target


def render(svg_body: str, width: int, height: int, pixels: int = RENDER_SIZE) -> Image.Image:
    """An SVG body -> RGBA picture, `pixels` square."""
    import resvg_py

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{svg_body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def load_icons(set_name: str, names: list[str], folder: Path) -> dict[str, Image.Image]:
    """Icons by name (with spaces, as captions spell them), rendered now or read from the cache in `folder`."""
    data = json.loads(download_icon_set(set_name, folder).read_text())
    cache = folder / "rendered" / set_name
    cache.mkdir(parents=True, exist_ok=True)
    icons = {}
    for name in tqdm(names, desc=f"icons of {set_name}", leave=False):
        file = cache / f"{name.replace(' ', '-')}.png"
        if not file.exists():
            icon = data["icons"].get(name.replace(" ", "-"))
            if icon is None:
                raise ValueError(f"icon set {set_name} has no {name!r}")
            width = icon.get("width", data.get("width", 16))
            height = icon.get("height", data.get("height", 16))
            with atomic_file(file) as picture:
                render(icon["body"], width, height).save(picture, format="PNG")
        icons[name] = Image.open(file).convert("RGBA")
    return icons


def icon_names(set_name: str, folder: Path) -> list[str]:
    """Every icon's name in a set, with spaces for dashes."""
    data = json.loads(download_icon_set(set_name, folder).read_text())
    return sorted(name.replace("-", " ") for name in data["icons"])
