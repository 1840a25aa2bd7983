"""Slots: which layers of a pipeline are blended, what each holds, and how strongly."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.matching import Loaded
from dora_diffusion.functional.dora import GainForm, gain_form, scale_gain_form, sum_gain_forms
from dora_diffusion.functional.strengths import Weight, strength_at
from dora_diffusion.layers.base_layers import Base, dense_weight
from dora_diffusion.layers.blended import BlendedLayer
from dora_diffusion.layers.offloaded import device_of, move_hook, value_of
from dora_diffusion.layers.step_counter import stamp
from dora_diffusion.pipelines.modules import PipelineModules, at_hand, parent_of, put
from dora_diffusion.state import ModuleState

Adapters = Mapping[str, Loaded]
Weights = Mapping[str, Weight]


@dataclass
class _Slot:
    """A layer of the pipeline that adapters may change.

    Attributes:
        model: the pipeline's component that has it.
        path: where, without the component.
        layer: stands in the model for its base.
        names: the adapters that it holds, sorted, so that sums do not depend on the order of loading or naming.
        strengths: theirs, in the same order.
        stamp: of the base's weight when the gain forms were computed.
    """

    model: nn.Module
    path: str
    layer: BlendedLayer
    names: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()
    stamp: tuple[int, int, int] = (0, 0, 0)

    def stand_in(self) -> None:
        """Let the layer stand in the model."""
        put(self.model, self.path, self.layer)

    def stand_aside(self) -> None:
        """Let the base stand there."""
        move_hook(self.layer, self.layer.base)
        put(self.model, self.path, self.layer.base)


class Slots:
    """The blended layers of a pipeline: they stand where some loaded adapter has a layer, or where room is set aside.

    An adapter's own gain form on a layer is computed once, when it is loaded; new strengths touch gains alone.
    """

    def __init__(self, pipe_modules: PipelineModules) -> None:
        self._pipe_modules = pipe_modules
        self._slots: dict[str, _Slot] = {}
        self._room: int | None = None

    @property
    def bases(self) -> dict[str, Base]:
        """Path -> the layer that adapters change there."""
        return {path: self._base(path) for path in self._slots}

    @property
    def components(self) -> dict[str, nn.Module]:
        """The components that hold any, by name."""
        return {path.split(".", 1)[0]: slot.model for path, slot in self._slots.items()}

    @property
    def places(self) -> list[tuple[nn.Module, str]]:
        """The modules that have blended layers, and what they call them."""
        return [parent_of(slot.model, slot.path) for slot in self._slots.values()]

    @property
    def has_room(self) -> bool:
        """Whether room is set aside, for hot swap."""
        return self._room is not None

    def reserve(self, paths: Iterable[str], room: int) -> None:
        """Let blended layers with room for a rank stand at these paths, whatever is loaded."""
        slots = {path: self._new(path) for path in paths}  # all can carry one, or nothing has changed
        self._room = room
        for path, slot in slots.items():
            self._slots[path] = slot
            slot.layer.set_terms([], room)
            slot.stand_in()

    def check_reserved(self, label: str, modules: Mapping[str, ModuleState]) -> None:
        """A ValueError of one line when room is set aside, and some module does not fit in."""
        if self._room is None:
            return
        for path, module in modules.items():
            place = f"{label}: {path}"
            if path not in self._slots:
                raise ValueError(
                    f"{place}: enable_hotswap set no room aside here; name the layer in its target_modules"
                )
            if module.rank > self._room:
                raise ValueError(f"{place}: rank {module.rank} does not fit enable_hotswap's max_rank of {self._room}")
            if module.magnitude is not None and module.axis == "in":
                raise ValueError(
                    f"{place}: magnitudes of the in axis cannot be hot-swapped; load it without enable_hotswap"
                )

    def check_room(self, adapters: Adapters, weights: Weights) -> None:
        """Refuse a mix that no longer fits the room set aside, before anything changes."""
        if self._room is None:
            return
        for path in self._slots:
            needed = sum(adapters[name].modules[path].rank for name, _ in _active(path, adapters, weights))
            if needed > self._room:
                raise ValueError(f"{path}: ranks sum to {needed}, enable_hotswap's max_rank is {self._room}")

    def terms(self, modules: Mapping[str, ModuleState]) -> dict[str, GainForm]:
        """An adapter's gain forms at strength 1, on the base's present weights."""
        return {path: _term(module, self._base(path)) for path, module in modules.items()}

    def install(self, adapters: Adapters) -> None:
        """Let blended layers stand exactly where these adapters need them; where room is set aside nothing moves."""
        if self._room is not None:
            return
        wanted = dict.fromkeys(path for loaded in adapters.values() for path in loaded.modules)
        for path in [path for path in self._slots if path not in wanted]:
            self._slots.pop(path).stand_aside()
        for path in wanted:
            if path not in self._slots:
                slot = self._slots[path] = self._new(path)
                slot.stamp = _stamp(slot.layer.base)
                slot.stand_in()

    def take_hooks(self) -> None:
        """Give the bases the hooks that accelerate has put on blended layers since: it offloads what it finds."""
        for slot in self._slots.values():
            move_hook(slot.layer, slot.layer.base)

    def clear(self) -> None:
        """Take every blended layer out, and forget the room."""
        self._room = None
        self.install({})

    def stand_in(self) -> None:
        """Let the blended layers stand in the pipeline."""
        for slot in self._slots.values():
            slot.stand_in()

    def stand_aside(self) -> None:
        """Let the bases stand in the pipeline, while a mix is folded into them."""
        for slot in self._slots.values():
            slot.stand_aside()

    @torch.no_grad()
    def fill(self, adapters: Adapters, weights: Weights) -> None:
        """Let every slot hold the adapters that now have a strength on it; `set_strengths` must follow."""
        for path, slot in self._slots.items():
            base, active = self._base(path), _active(path, adapters, weights)
            names, now = tuple(name for name, _ in active), _stamp(base)
            if now != slot.stamp:
                for loaded in adapters.values():
                    if path in loaded.modules:
                        loaded.terms[path] = _term(loaded.modules[path].to(device=device_of(base)), base)
            if names != slot.names or now != slot.stamp:
                slot.layer.set_terms([adapters[name].terms[path] for name in names], self._room)
            slot.names, slot.strengths, slot.stamp = names, tuple(strength for _, strength in active), now

    def set_strengths(self, factors: Mapping[str, float], *, prefix: str = "") -> None:
        """Give layers under a prefix their strengths, times each adapter's factor; equal mixes share one tensor."""
        made: dict[tuple[object, ...], Tensor] = {}
        for path, slot in self._slots.items():
            if not path.startswith(prefix):
                continue
            factored = zip(slot.names, slot.strengths, strict=True)
            values = tuple(strength * factors.get(name, 1.0) for name, strength in factored)
            device = device_of(slot.layer.base)
            key = (device, *values)
            if key not in made:
                made[key] = torch.tensor(values, dtype=torch.float32, device=device)
            slot.layer.set_strengths(made[key])

    def forms(self, adapters: Adapters) -> dict[str, tuple[Base, GainForm]]:
        """Each filled layer's base and the whole mix on it."""
        held = {path: slot for path, slot in self._slots.items() if slot.names}
        return {path: (self._base(path), _sum(path, slot, adapters)) for path, slot in held.items()}

    def _new(self, path: str) -> _Slot:
        component, inner = path.split(".", 1)
        model = self._pipe_modules.model(component)
        assert model is not None  # the path was found in it
        return _Slot(model, inner, BlendedLayer(self._base(path)))

    def _base(self, path: str) -> Base:
        base = self._slots[path].layer.base if path in self._slots else self._pipe_modules.layer(path)[1]
        at_hand(path, value_of(base, "weight"))
        return base


def _stamp(base: Base) -> tuple[int, int, int]:
    return stamp(value_of(base, "weight"))


def _active(path: str, adapters: Adapters, weights: Weights) -> list[tuple[str, float]]:
    """(name, strength) of the adapters that change a layer, by name."""
    here = [(name, strength_at(path, weights[name])) for name in sorted(weights) if path in adapters[name].modules]
    return [(name, strength) for name, strength in here if strength != 0]


def _term(module: ModuleState, base: Base) -> GainForm:
    """An adapter's gain form at strength 1 on a layer."""
    weight = dense_weight(base)
    down = module.down.reshape(-1, *weight.shape[1:])
    return gain_form(weight, down, module.up, module.scale, module.magnitude, axis=module.axis)


def _sum(path: str, slot: _Slot, adapters: Adapters) -> GainForm:
    terms = [adapters[name].terms[path] for name in slot.names]
    return sum_gain_forms([scale_gain_form(t, s) for t, s in zip(terms, slot.strengths, strict=True)])
