"""AdapterManager: several adapters on one diffusers pipeline, blended additively.

    W' = W + sum_i strength_i (W'_i - W)

Strength 0 is the base bit for bit, strength 1 what was trained; the order of adapters is nothing. Every layer's mix is
one gain form (see `functional`), so drawing costs one base product and one low-rank pair however many adapters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.formats import load_adapter
from dora_diffusion.functional import GainForm, gain_form, sum_gain_forms
from dora_diffusion.layers import BlendedLayer, check_adaptable, check_shapes
from dora_diffusion.merge import Fold, fold
from dora_diffusion.state import AdapterState, ModuleState
from dora_diffusion.storage import sha256_of

Weight = float | Mapping[str, float]


@dataclass(frozen=True)
class LoadReport:
    """What was loaded.

    Attributes:
        name: the adapter's name in the manager.
        kind: "DoRA" or "LoRA".
        ranks: its distinct ranks.
        matched: layers of the pipeline that it adapts.
        total: layers in the file; always equal to `matched`, since a file that does not fit is refused.
        sha256: of the file, or None for an adapter that came from memory.
        metadata: the file's own.
    """

    name: str
    kind: str
    ranks: tuple[int, ...]
    matched: int
    total: int
    sha256: str | None
    metadata: Mapping[str, str]


class AdapterManager:
    """Adapters of one pipeline. The pipeline stays an ordinary diffusers pipeline throughout."""

    def __init__(self, pipe: Any) -> None:
        """A ValueError when the pipeline is of no family known here."""
        self._family = family_of_pipeline(pipe)
        self._pipe = pipe
        self._adapters: dict[str, dict[str, ModuleState]] = {}
        self._reports: dict[str, LoadReport] = {}
        self._weights: dict[str, Weight] = {}
        self._layers: dict[str, BlendedLayer] = {}
        self._fold: Fold | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Loaded adapters, in the order of loading."""
        return tuple(self._adapters)

    @property
    def weights(self) -> dict[str, Weight]:
        """Strengths as last set; an adapter not named has 0."""
        return dict(self._weights)

    @property
    def reports(self) -> dict[str, LoadReport]:
        """Name -> what was loaded."""
        return dict(self._reports)

    def load_adapter(self, source: str | Path | AdapterState, *, name: str) -> LoadReport:
        """Load an adapter under a name, at strength 0 (call `set_adapters` next).

        Raises:
            ValueError: the name is taken, or the file is broken or of another base: one line, with a count.
        """
        if name in self._adapters:
            raise ValueError(f"an adapter named {name!r} is loaded already; delete it first or choose another name")
        self._refuse_while_fused("load an adapter")
        adapter = source if isinstance(source, AdapterState) else load_adapter(source)
        label = name if isinstance(source, AdapterState) else str(source)
        modules = {self._live_path(path, label): module for path, module in adapter.modules.items()}
        bases = {path: self._base(path) for path in modules}
        for path, base in bases.items():
            check_shapes(f"{label}: {path}", modules[path], base)
        report = LoadReport(
            name=name,
            kind="DoRA" if adapter.is_dora else "LoRA",
            ranks=adapter.ranks,
            matched=len(modules),
            total=len(adapter.modules),
            sha256=None if isinstance(source, AdapterState) else sha256_of(Path(source)),
            metadata=adapter.metadata,
        )
        device = next(iter(bases.values())).weight.device
        self._adapters[name] = {p: m.to(dtype=torch.float32, device=device) for p, m in modules.items()}
        self._reports[name] = report
        self._install()
        return report

    def set_adapters(self, weights: Mapping[str, Weight]) -> None:
        """Set the strengths: `{"ink": 0.8}` or by part, `{"ink": {"unet": 0.8, "unet.up_blocks": 1.2}}`.

        The longest prefix that fits a layer decides; a layer no prefix fits gets 0. Adapters not named get 0.

        Raises:
            ValueError: an unknown adapter, a part that fits none of its layers, or a strength that is no finite number.
        """
        self._refuse_while_fused("change strengths")
        for name, weight in weights.items():
            if name not in self._adapters:
                raise ValueError(f"no adapter named {name!r} is loaded; loaded: {', '.join(self.names) or 'none'}")
            _check_weight(name, weight, self._adapters[name])
        self._weights = {name: dict(w) if isinstance(w, Mapping) else float(w) for name, w in weights.items()}
        for path, layer in self._layers.items():
            layer.form = self._form(path)

    def fuse(self) -> None:
        """Fold the current mix into the base's weights: drawing then costs exactly what the base costs."""
        self._refuse_while_fused("fuse")
        forms = {path: layer.form for path, layer in self._layers.items()}
        self._fold = fold({path: (self._layers[path].base, form) for path, form in forms.items() if form is not None})
        for path, layer in self._layers.items():
            self._put(path, layer.base)

    def unfuse(self) -> None:
        """Undo `fuse`: the base's weights are again what they were, bit for bit, and the mix runs beside them."""
        if self._fold is None:
            raise ValueError("nothing is fused")
        self._fold.undo()
        self._fold = None
        for path, layer in self._layers.items():
            self._put(path, layer)

    def delete_adapter(self, name: str) -> None:
        """Forget one adapter; the others keep their strengths."""
        if name not in self._adapters:
            raise ValueError(f"no adapter named {name!r} is loaded; loaded: {', '.join(self.names) or 'none'}")
        self._refuse_while_fused("delete an adapter")
        del self._adapters[name], self._reports[name]
        self._weights.pop(name, None)
        self._install()
        self.set_adapters(self._weights)

    def unload(self) -> None:
        """Forget all adapters; every module of the pipeline is the very one that was there before."""
        if self._fold is not None:
            self.unfuse()
        self._adapters, self._reports, self._weights = {}, {}, {}
        self._install()

    def _refuse_while_fused(self, action: str) -> None:
        if self._fold is not None:
            raise ValueError(f"cannot {action} while fused: call unfuse() first")

    def _live_path(self, path: str, label: str) -> str:
        """The path as this pipeline spells it: CLIP encoders have or lack `text_model.`, by transformers' version."""
        component, _, inner = path.partition(".")
        known = [part.name for part in self._family.components]
        model = getattr(self._pipe, component, None) if component in known else None
        for candidate in (inner, f"text_model.{inner}", inner.removeprefix("text_model.")):
            if isinstance(model, nn.Module) and (found := _submodule(model, candidate)) is not None:
                check_adaptable(path, found.base if isinstance(found, BlendedLayer) else found)
                return f"{component}.{candidate}"
        raise ValueError(f"{label}: layer {path} is not in this pipeline; is the adapter for another base model?")

    def _base(self, path: str) -> nn.Linear | nn.Conv2d:
        if path in self._layers:
            return self._layers[path].base
        component, inner = path.split(".", 1)
        return check_adaptable(path, getattr(self._pipe, component).get_submodule(inner))

    def _put(self, path: str, module: nn.Module) -> None:
        component, inner = path.split(".", 1)
        getattr(self._pipe, component).set_submodule(inner, module)

    def _install(self) -> None:
        """Blended layers stand exactly where some loaded adapter has a layer."""
        wanted = dict.fromkeys(path for modules in self._adapters.values() for path in modules)
        for path in [path for path in self._layers if path not in wanted]:
            self._put(path, self._layers.pop(path).base)
        for path in wanted:
            if path not in self._layers:
                self._layers[path] = BlendedLayer(self._base(path))
                self._put(path, self._layers[path])

    @torch.no_grad()
    def _form(self, path: str) -> GainForm | None:
        weight = self._layers[path].base.weight
        forms = []
        # sorted by name: floating-point sums then do not depend on the order of loading or naming
        for name in sorted(self._weights):
            module = self._adapters[name].get(path)
            strength = strength_at(path, self._weights[name])
            if module is not None and strength != 0:
                here = module.to(device=weight.device)
                parts = (here.down, here.up, here.scale, here.magnitude)
                forms.append(gain_form(weight, *parts, strength=strength))
        return sum_gain_forms(forms) if forms else None


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _under(path: str, part: str) -> bool:
    return path == part or path.startswith(part + ".")


def strength_at(path: str, weight: Weight) -> float:
    """The strength of a layer: the number, or that of the longest part that its path lies under, or 0."""
    if not isinstance(weight, Mapping):
        return float(weight)
    parts = [part for part in weight if _under(path, part)]
    return float(weight[max(parts, key=len)]) if parts else 0.0


def _check_weight(name: str, weight: Weight, modules: Mapping[str, ModuleState]) -> None:
    values = weight.values() if isinstance(weight, Mapping) else [weight]
    for value in values:
        if not isinstance(value, int | float) or not torch.isfinite(torch.tensor(float(value))):
            raise ValueError(f"strength of {name!r} must be a finite number, got {value!r}")
    for part in weight if isinstance(weight, Mapping) else ():
        component = part.split(".")[0]
        elsewhere = part == component and component.startswith(("unet", "transformer", "text_encoder"))
        if not elsewhere and not any(_under(path, part) for path in modules):
            raise ValueError(f"strength of {name!r}: {part!r} holds none of its layers")
