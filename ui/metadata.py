"""What a saved picture says about itself."""

import json
from pathlib import Path

from PIL import Image


def metadata_text(path: Path) -> str:
    """The PNG's own text chunks, read back from the file: the `parameters` line, then the JSON in full."""
    with Image.open(path) as picture:
        texts = {name: value for name, value in picture.info.items() if isinstance(value, str)}
    parts = [texts.get("parameters", "")]
    if "dora_diffusion" in texts:
        parts.append(json.dumps(json.loads(texts["dora_diffusion"]), indent=2, ensure_ascii=False))
    return "\n\n".join(part for part in parts if part)
