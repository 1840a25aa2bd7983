"""Pictures beside adapters as small JPEGs inside the page, so that no file of the folder is served.

A picture is a stranger's: its size is looked at before it is decoded, and anything that fails is no picture.
"""

import base64
import io
import threading
import time
import warnings
from collections import OrderedDict
from pathlib import Path

from PIL import Image

SIDE = 160
MOST_BYTES, MOST_PIXELS = 32 << 20, 40_000_000
MOST_KEPT = 2_000
_FORMATS = ("PNG", "JPEG", "WEBP")


class Thumbnails:
    """Made once for each state of a file, the longest unused make room. Any thread may ask."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, int], str] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, path: str, end: float) -> str | None:
        """A picture as a `data:` address; empty when it is none; None when `time.perf_counter()` is past `end`.

        Those that are ready are given at any time.
        """
        try:
            status = Path(path).stat()
        except OSError:
            return ""
        key = (path, status.st_mtime_ns, status.st_size)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        if time.perf_counter() > end:
            return None
        made = _thumbnail(Path(path)) if status.st_size <= MOST_BYTES else ""
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return made


def _thumbnail(path: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, many pixels: what is shown is small
            with Image.open(path, formats=_FORMATS) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    return ""
                picture.draft("RGB", (SIDE, SIDE))
                small = picture.convert("RGB")
                small.thumbnail((2 * SIDE, SIDE))
                buffer = io.BytesIO()
                small.save(buffer, "JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, MemoryError, EOFError, Image.DecompressionBombError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
