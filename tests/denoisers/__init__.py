"""A tiny denoiser of every class that a pipeline of diffusers with a LoRA loader has, and inputs for its forward.

`tiny.json` holds configs and shapes, by diffusers' own tests of its models; `by_hand` those that these have not.
"""

import json
from pathlib import Path
from typing import Any

from tests.denoisers.by_hand import BY_HAND
from tests.denoisers.record import TinyDenoiser, of_json, prediction

__all__ = ["DENOISERS", "TinyDenoiser", "prediction"]

_STORED: dict[str, Any] = json.loads((Path(__file__).parent / "tiny.json").read_text(encoding="utf-8"))
DENOISERS: dict[str, TinyDenoiser] = {name: of_json(name, stored) for name, stored in _STORED.items()} | BY_HAND
"""By the class's name."""
