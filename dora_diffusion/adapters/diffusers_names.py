"""Names of layers that only diffusers knows: its own converter is asked where each lies.

Every pipeline that loads LoRAs has a converter from its makers' and other tools' names (`lora_state_dict`). It takes
plain LoRAs alone, and drops magnitudes. So it is not given the adapter but a stand-in under the adapter's names: rank
1, A full of the layer's number, B the numbers of its rows. What comes back says which rows of which layer went where,
and the adapter itself, of whatever kind, is taken apart by that.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.formats.layer_lookup import Locate, Place
from dora_diffusion.formats.layouts.record import Fusion
from dora_diffusion.formats.weight_shapes import Shape
from dora_diffusion.pipelines.components import denoisers_of, model_of

_LOADER = "LoraLoaderMixin"
_ENDINGS = (".lora_A.weight", ".lora_B.weight")


def locate_with(pipe: Any) -> Locate | None:
    """Where the converter of a pipeline puts the layers of a file, by their names there; None where it has none."""
    convert = getattr(type(pipe), "lora_state_dict", None) or _converter_of_model(pipe)
    return None if convert is None else lambda names: _located(names, convert)


def _converter_of_model(pipe: Any) -> Any:
    """The loader whose name the denoiser's class begins with, for a model by itself: Krea2LoraLoaderMixin."""
    from diffusers.loaders import lora_pipeline

    loaders = {name.removesuffix(_LOADER): kind for name, kind in vars(lora_pipeline).items() if name.endswith(_LOADER)}
    for name in denoisers_of(pipe):
        called = type(model_of(pipe, name)).__name__
        if fitting := [stem for stem in loaders if stem and called.startswith(stem)]:
            return loaders[max(fitting, key=len)].lora_state_dict
    return None


def _located(names: Mapping[str, Shape | None], convert: Any) -> dict[str, Place]:
    """Name -> place, of the layers that the converter knows."""
    known = [(name, shape) for name, shape in names.items() if shape is not None]
    stand_ins: dict[str, Tensor] = {}
    for number, (name, (rows, _)) in enumerate(known, start=1):
        down, up = (".lora_down.weight", ".lora_up.weight") if _is_flat(name) else _ENDINGS
        stand_ins[name + down] = torch.full((1, 1), float(number), dtype=torch.float64)
        stand_ins[name + up] = torch.arange(1, rows + 1, dtype=torch.float64)[:, None]
        if _is_flat(name):
            stand_ins[name + ".alpha"] = torch.tensor(1.0)
    with _quietly():
        converted = convert(stand_ins)
    return _places([name for name, _ in known], converted[0] if isinstance(converted, tuple) else converted)


def _is_flat(name: str) -> bool:
    return name.startswith("lora_")


def _places(names: list[str], converted: Mapping[str, Tensor]) -> dict[str, Place]:
    found: dict[str, list[tuple[int, str, Tensor]]] = {}
    for key, down in converted.items():
        path = key.removesuffix(_ENDINGS[0])
        up = converted.get(path + _ENDINGS[1])
        if path == key or up is None:
            continue
        if down.shape[0] != 1:
            raise ValueError(f"{path}: diffusers makes one layer of several of this file's, which is not read here")
        number, rows = round(float(down[0, 0])), up[:, 0].round().long() - 1
        found.setdefault(names[number - 1], []).append((int(rows.min()), path, rows))
    return {name: _place(name, sorted(parts, key=lambda part: part[0])) for name, parts in found.items()}


def _place(name: str, parts: list[tuple[int, str, Tensor]]) -> Place:
    """A layer's place, its parts in the order of its rows."""
    components = {path.partition(".")[0] for _, path, _ in parts}
    rows = torch.cat([part for _, _, part in parts])
    if len(components) > 1 or not torch.equal(rows, torch.arange(len(rows))):
        raise ValueError(f"{name}: diffusers orders its rows in a way that is not read here")
    paths = tuple(path.partition(".")[2] for _, path, _ in parts)
    fusion = Fusion(name, paths, tuple(len(part) for _, _, part in parts))
    return Place(components.pop(), fusion, prefix="", is_flat=_is_flat(name), is_original=True)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without diffusers' words on what it converts; whatever it raises says that it cannot."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as error:  # converters are written for whole files of their own tools
        raise ValueError(f"diffusers' converter cannot read these names: {type(error).__name__}: {error}") from None
    finally:
        logger.setLevel(before)
