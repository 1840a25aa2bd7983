"""AdapterManager: several adapters on one diffusers pipeline, blended additively.

    W' = W + sum_i strength_i (W'_i - W)

Strength 0 is the base bit for bit, strength 1 what was trained; the order of adapters is nothing. Every layer's mix is
one gain form (see `functional`), so drawing costs one base product and one low-rank pair however many adapters. An
adapter's own gain form on a layer is computed once, when it is loaded; a change of strengths touches gains alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dora_diffusion.bases import Base, check_adaptable, check_shapes, dense_weight
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.formats import load_adapter
from dora_diffusion.functional import GainForm, gain_form, scale_gain_form, sum_gain_forms
from dora_diffusion.injection import DoRAConfig, target_paths
from dora_diffusion.layers import BlendedLayer
from dora_diffusion.merge import Fold, fold
from dora_diffusion.schedules import mask_of, schedule_of
from dora_diffusion.state import AdapterState, ModuleState
from dora_diffusion.steering import Steering
from dora_diffusion.step_clock import stamp
from dora_diffusion.storage import sha256_of
from dora_diffusion.strengths import Weight, check_strength, strength_at


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


@dataclass(frozen=True)
class _Loaded:
    """An adapter in memory: its layers, fp32 on the base's device, and their gain forms at strength 1."""

    modules: Mapping[str, ModuleState]
    terms: dict[str, GainForm]
    report: LoadReport


@dataclass
class _Slot:
    """A layer of the pipeline that adapters may change.

    Attributes:
        layer: stands in the pipeline for its base.
        names: the adapters that it holds, sorted, so that sums do not depend on the order of loading or naming.
        strengths: theirs, in the same order.
        stamp: of the base's weight when the gain forms were computed.
    """

    layer: BlendedLayer
    names: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()
    stamp: tuple[int, int, int] = (0, 0, 0)


class AdapterManager:
    """Adapters of one pipeline. The pipeline stays an ordinary diffusers pipeline throughout."""

    def __init__(self, pipe: Any) -> None:
        """A ValueError when the pipeline is of no family known here."""
        self._family = family_of_pipeline(pipe)
        self._pipe = pipe
        self._adapters: dict[str, _Loaded] = {}
        self._weights: dict[str, Weight] = {}
        self._slots: dict[str, _Slot] = {}
        self._fold: Fold | None = None
        self._room: int | None = None
        self._steering = Steering(pipe, self._family, self._weigh_denoiser)

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
        return {name: loaded.report for name, loaded in self._adapters.items()}

    @torch.no_grad()
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
        modules = {self._live_path(path, label): module.as_pair() for path, module in adapter.modules.items()}
        for path, module in modules.items():
            check_shapes(f"{label}: {path}", module, self._base(path))
            if self._room is not None:
                self._check_reserved(f"{label}: {path}", path, module)
        report = LoadReport(
            name=name,
            kind="DoRA" if adapter.is_dora else "LoRA",
            ranks=adapter.ranks,
            matched=len(modules),
            total=len(adapter.modules),
            sha256=None if isinstance(source, AdapterState) else sha256_of(Path(source)),
            metadata=adapter.metadata,
        )
        modules = {p: m.to(dtype=torch.float32, device=self._base(p).weight.device) for p, m in modules.items()}
        terms = {path: _term(module, self._base(path)) for path, module in modules.items()}
        self._adapters[name] = _Loaded(modules, terms, report)
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
            check_strength(name, weight, self._loaded(name).modules)
        if self._room is not None:
            self._check_room(weights)
        self._weights = {name: dict(w) if isinstance(w, Mapping) else float(w) for name, w in weights.items()}
        for path, slot in self._slots.items():
            self._fill(path, slot)
        self._weigh(self._slots, {})

    def set_schedule(self, name: str, points: Sequence[Sequence[float]] | None) -> None:
        """Let an adapter's strength change over the run: `[(0.0, 0.0), (0.3, 1.0)]` fades it in; None ends it.

        The factor multiplies the strength and runs straight from point to point; progress goes from 0 at the first of
        the scheduler's timesteps to 1 at the last. Text encoders, which run before, keep the plain strength.

        Raises:
            ValueError: an unknown adapter, or points that are no rising progress in 0..1 with finite factors.
        """
        self._refuse_while_fused("set a schedule")
        self._loaded(name)
        self._steering.set_schedule(name, None if points is None else schedule_of(points))

    def set_mask(self, name: str, mask: Image.Image | Tensor | None) -> None:
        """Let an adapter draw in a part of the picture only: 1 (white) inside, 0 outside; None ends it.

        The denoiser is asked once more for every masked adapter and the predictions are mixed, so outside a mask the
        prediction is that without the adapter. Text encoders know no places: their part acts everywhere.

        Raises:
            ValueError: an unknown adapter, or a mask that is no picture and no (height, width) tensor in 0..1.
        """
        self._refuse_while_fused("set a mask")
        self._loaded(name)
        self._steering.set_mask(name, None if mask is None else mask_of(mask))

    def enable_hotswap(self, *, max_rank: int, target_modules: str | list[str] | None = None) -> None:
        """Set aside room at every target layer, so that adapters come and go without recompiling a compiled model.

        Call it once, before `torch.compile`. From then on each of these layers pays for a rank of `max_rank`, used or
        not; `unload` ends it. Set schedules and masks after compiling `pipe.unet = torch.compile(pipe.unet)`: they act
        from outside the compiled model.

        Args:
            max_rank: the most that the ranks of all adapters with a strength may sum to on a layer.
            target_modules: as DoRAConfig's; names and patterns are the denoiser's, text encoders take presets.

        Raises:
            ValueError: adapters are loaded already, or a target that matches nothing.
        """
        if self._adapters:
            raise ValueError("enable_hotswap must come before the first load_adapter: call unload() first")
        if max_rank < 1:
            raise ValueError(f"max_rank must be at least 1, got {max_rank}")
        for part in self._family.components:
            model = self._model(part.name)
            if model is None:
                continue
            is_preset = not isinstance(target_modules, list) and target_modules in (None, *part.presets)
            if not is_preset and part is not self._family.denoiser:
                continue
            for inner in target_paths(model, DoRAConfig(target_modules=target_modules)):
                path = f"{part.name}.{inner}"
                self._slots[path] = _Slot(BlendedLayer(self._base(path)))
                self._slots[path].layer.hold([], max_rank)
                self._put(path, self._slots[path].layer)
        self._room = max_rank

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the current mix into the base's weights: drawing then costs exactly what the base costs."""
        self._refuse_while_fused("fuse")
        if self._steering.is_needed:
            raise ValueError("cannot fuse while a schedule or mask is set: strengths change as the picture is drawn")
        held = {path: slot for path, slot in self._slots.items() if slot.names}
        self._fold = fold({path: (self._base(path), self._form(path, slot)) for path, slot in held.items()})
        for path, slot in self._slots.items():
            self._put(path, slot.layer.base)

    def unfuse(self) -> None:
        """Undo `fuse`: the base's weights are again what they were, bit for bit, and the mix runs beside them."""
        if self._fold is None:
            raise ValueError("nothing is fused")
        self._fold.undo()
        self._fold = None
        for path, slot in self._slots.items():
            self._put(path, slot.layer)

    def delete_adapter(self, name: str) -> None:
        """Forget one adapter; the others keep their strengths."""
        self._loaded(name)
        self._refuse_while_fused("delete an adapter")
        self._steering.forget(name)
        del self._adapters[name]
        self._weights.pop(name, None)
        self._install()
        self.set_adapters(self._weights)

    def unload(self) -> None:
        """Forget all adapters; every module of the pipeline is the very one that was there before."""
        if self._fold is not None:
            self.unfuse()
        for name in self.names:
            self._steering.forget(name)
        self._adapters, self._weights, self._room = {}, {}, None
        self._install()

    def _loaded(self, name: str) -> _Loaded:
        if name not in self._adapters:
            raise ValueError(f"no adapter named {name!r} is loaded; loaded: {', '.join(self.names) or 'none'}")
        return self._adapters[name]

    def _refuse_while_fused(self, action: str) -> None:
        if self._fold is not None:
            raise ValueError(f"cannot {action} while fused: call unfuse() first")

    def _check_reserved(self, label: str, path: str, module: ModuleState) -> None:
        assert self._room is not None
        if path not in self._slots:
            raise ValueError(f"{label}: enable_hotswap set no room aside here; name the layer in its target_modules")
        if module.rank > self._room:
            raise ValueError(f"{label}: rank {module.rank} does not fit enable_hotswap's max_rank of {self._room}")
        if module.magnitude is not None and module.axis == "in":
            raise ValueError(
                f"{label}: magnitudes of the in axis cannot be hot-swapped; load it without enable_hotswap"
            )

    def _check_room(self, weights: Mapping[str, Weight]) -> None:
        """Refuse a mix that no longer fits, before anything changes."""
        for path in self._slots:
            needed = sum(self._adapters[name].modules[path].rank for name, _ in self._active(path, weights))
            if needed > (self._room or 0):
                raise ValueError(f"{path}: ranks sum to {needed}, enable_hotswap's max_rank is {self._room}")

    def _model(self, component: str) -> nn.Module | None:
        """A component, out of the wrapper that torch.compile puts around it."""
        model = getattr(self._pipe, component, None)
        return getattr(model, "_orig_mod", model)

    def _live_path(self, path: str, label: str) -> str:
        """The path as this pipeline spells it: CLIP encoders have or lack `text_model.`, by transformers' version."""
        component, _, inner = path.partition(".")
        known = [part.name for part in self._family.components]
        model = self._model(component) if component in known else None
        for candidate in (inner, f"text_model.{inner}", inner.removeprefix("text_model.")):
            if isinstance(model, nn.Module) and (found := _submodule(model, candidate)) is not None:
                check_adaptable(path, found.base if isinstance(found, BlendedLayer) else found)
                return f"{component}.{candidate}"
        raise ValueError(f"{label}: layer {path} is not in this pipeline; is the adapter for another base model?")

    def _base(self, path: str) -> Base:
        """The layer that adapters change at a path; a ValueError when its weight cannot be read."""
        if path in self._slots:
            return _at_hand(path, self._slots[path].layer.base)
        component, inner = path.split(".", 1)
        model = self._model(component)
        assert model is not None
        return _at_hand(path, check_adaptable(path, model.get_submodule(inner)))

    def _put(self, path: str, module: nn.Module) -> None:
        component, inner = path.split(".", 1)
        model = self._model(component)
        assert model is not None
        model.set_submodule(inner, module)

    def _install(self) -> None:
        """Blended layers stand exactly where some loaded adapter has a layer, or where room is set aside."""
        if self._room is not None:
            return
        wanted = dict.fromkeys(path for loaded in self._adapters.values() for path in loaded.modules)
        for path in [path for path in self._slots if path not in wanted]:
            self._put(path, self._slots.pop(path).layer.base)
        for path in wanted:
            if path not in self._slots:
                self._slots[path] = _Slot(BlendedLayer(self._base(path)))
                self._slots[path].stamp = stamp(self._slots[path].layer.base.weight)
                self._put(path, self._slots[path].layer)

    def _active(self, path: str, weights: Mapping[str, Weight]) -> list[tuple[str, float]]:
        """(name, strength) of the adapters that change a layer, by name."""
        here = [(name, strength_at(path, weights[name])) for name in sorted(weights) if self._has(name, path)]
        return [(name, strength) for name, strength in here if strength != 0]

    def _has(self, name: str, path: str) -> bool:
        return path in self._adapters[name].modules

    @torch.no_grad()
    def _fill(self, path: str, slot: _Slot) -> None:
        """Let a slot hold the adapters that now have a strength on it, at its base's present weight."""
        base, active = self._base(path), self._active(path, self._weights)
        names, now = tuple(name for name, _ in active), stamp(base.weight)
        if now != slot.stamp:
            for loaded in self._adapters.values():
                if path in loaded.modules:
                    loaded.terms[path] = _term(loaded.modules[path].to(device=base.weight.device), base)
        if names != slot.names or now != slot.stamp:
            slot.layer.hold([self._adapters[name].terms[path] for name in names], self._room)
        slot.names, slot.strengths, slot.stamp = names, tuple(strength for _, strength in active), now

    def _weigh(self, slots: Mapping[str, _Slot], factors: Mapping[str, float]) -> None:
        """Give layers their strengths, times each adapter's factor. Equal mixes share one tensor, and one transfer."""
        made: dict[tuple[object, ...], Tensor] = {}
        for slot in slots.values():
            factored = zip(slot.names, slot.strengths, strict=True)
            values = tuple(strength * factors.get(name, 1.0) for name, strength in factored)
            device = slot.layer.base.weight.device
            key = (device, *values)
            if key not in made:
                made[key] = torch.tensor(values, dtype=torch.float32, device=device)
            slot.layer.weigh(made[key])

    def _form(self, path: str, slot: _Slot) -> GainForm:
        terms = [self._adapters[name].terms[path] for name in slot.names]
        return sum_gain_forms([scale_gain_form(t, s) for t, s in zip(terms, slot.strengths, strict=True)])

    def _weigh_denoiser(self, factors: Mapping[str, float]) -> None:
        prefix = self._family.denoiser.name + "."
        self._weigh({path: slot for path, slot in self._slots.items() if path.startswith(prefix)}, factors)


def _at_hand(path: str, base: Base) -> Base:
    if base.weight.is_meta:
        raise ValueError(f"{path}: its weight is away (sequential CPU offload); adapters need offload='model' or none")
    return base


def _term(module: ModuleState, base: Base) -> GainForm:
    """An adapter's gain form at strength 1 on a layer."""
    weight = dense_weight(base)
    down = module.down.reshape(-1, *weight.shape[1:])
    return gain_form(weight, down, module.up, module.scale, module.magnitude, axis=module.axis)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
