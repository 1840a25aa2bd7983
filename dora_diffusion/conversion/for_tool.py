"""An adapter as the file from which another tool draws what we draw.

Tools compute some layers otherwise than they were trained, or not at all. Layer by layer the first of these is taken
that the tool, by its own formula, draws as we do:

    as it is
    magnitudes of the out axis turned into those that the tool divides by N(W)    (`over_base_norms`)
    the whole difference W' - W; at a rank, where one is named; the nearest DoRA, for a tool that reads no more

The second costs nothing and is exact; the file is then for that tool alone, and says so in its metadata: we read it
back as what it was, beside its base.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.conversion.modules import change_of, dtype_of, module_of, weight_for
from dora_diffusion.conversion.tools import Tool, tool_named
from dora_diffusion.formats import FORMATS
from dora_diffusion.formats.assembly import replace_magnitude
from dora_diffusion.formats.family_detection import family_of
from dora_diffusion.formats.reading import OVER_BASE_KEY
from dora_diffusion.formats.writing import FileLayer, file_layers
from dora_diffusion.functional.blend_modes import axis_norms, over_base_norms
from dora_diffusion.functional.low_rank import extract_dora, low_rank, relative_error
from dora_diffusion.pipelines.base_weights import weights_of
from dora_diffusion.state import AdapterState, FactoredState, Module, ModuleState, WeightOf, rank_in_words
from dora_diffusion.utils.progress import LayerProgress

# A layer is drawn as ours where it misses at most this share of its change, beside what rounding moves W by.
SAME = 1e-3
ROUNDINGS = 8

AS_IT_IS, ITS_MAGNITUDES = "as they were", "with magnitudes for its norms"
WHOLE, AT_A_RANK, NEAREST_DORA = "as whole differences", "as LoRA", "as the nearest DoRA"
_CUT = (AT_A_RANK, NEAREST_DORA)


@dataclass(frozen=True)
class ForTool:
    """An adapter made for a tool, to be saved in the format that the tool reads.

    Attributes:
        adapter: its magnitudes may be the tool's and not ours: write it, and do not draw with it.
        format: a key of `FORMATS`.
        tool: whose.
        made: how layers are written -> how many.
        ranks: of those that were cut, the distinct ones.
        unconverted: the largest error of a layer that the tool would draw from the adapter as it was; infinite where it
            reads a layer not at all.
        left_out: layers that the tool does not read.

    Examples:
        ```python
        import dora_diffusion as dd

        made: dd.ForTool = dd.for_tool(dd.load_adapter("ink.safetensors"), "comfyui", base="pocket")
        print(made.format, dict(made.made), made.unconverted)
        dd.save_adapter(made.adapter, "ink-comfyui.safetensors", format=made.format)
        ```
    """

    adapter: AdapterState
    format: str
    tool: Tool
    made: Mapping[str, int]
    ranks: tuple[int, ...]
    unconverted: float
    left_out: tuple[str, ...] = ()

    def sentence(self) -> str:
        """What was made of the layers, on one line."""
        ranks = f" of {rank_in_words(self.ranks)}" if self.ranks else ""
        parts = [f"{count} layers {how}{ranks if how in _CUT else ''}" for how, count in self.made.items()]
        parts += [f"{len(self.left_out)} left out, which it does not read"] if self.left_out else []
        told = f"would draw up to {self.unconverted:.2g} of a layer's change away from ours"
        if not math.isfinite(self.unconverted):
            told = "holds layers that it does not compute"
        before = f"; the adapter as it was {told}" if self.made.keys() - {AS_IT_IS} else ""
        return f"for {self.tool.title}: {', '.join(parts)}{before}"


def for_tool(
    adapter: AdapterState,
    tool: str,
    *,
    base: Any,
    rank: int | None = None,
    strict: bool = True,
    progress: LayerProgress | None = None,
) -> ForTool:
    """The adapter as the file from which a tool draws what we draw.

    Args:
        adapter: any kind, any mix.
        tool: a key of `TOOLS`.
        base: a pipeline, an embedded base's name, a diffusers folder or a single .safetensors file.
        rank: of layers that the tool computes otherwise; None keeps their whole differences, which are as large as the
            base's own layers, or, for a tool that reads none, their ranks.
        strict: False leaves out the layers and vectors that the tool does not read.
        progress: called after every layer.

    Raises:
        ValueError: one line: the tool, or a model or layers that it does not read; the base does not fit.

    Examples:
        ```python
        import dora_diffusion as dd

        ink = dd.load_adapter("ink.safetensors")
        made = dd.for_tool(ink, "diffusers", base="pocket")
        dd.save_adapter(made.adapter, "ink-diffusers.safetensors", format=made.format)
        print(made.sentence())
        ```
    """
    known = tool_named(tool)
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    family = family_of(adapter)
    if family is None:
        raise ValueError(f"nothing tells which model the adapter is for, and {known.title} must know: name its family")
    if family not in known.formats:
        raise ValueError(f"{known.title} reads no adapters of {family}; it does of {', '.join(known.formats)}")
    adapter, left_out = _readable(adapter, known, family, strict=strict)
    format, weights = known.formats[family], weights_of(base)
    maker = _Maker(known, format, weights, rank)
    layers = file_layers(adapter, FORMATS[format], family)
    modules: dict[str, Module] = {}
    made: Counter[str] = Counter()
    cut: set[int] = set()
    errors = []
    for done, layer in enumerate(layers, start=1):
        found = {path: adapter.modules[path] for path in layer.paths if path in adapter.modules}
        if found:
            how, new, unconverted = maker.make(layer, found)
            modules.update(new)
            made[how] += len(found)
            cut.update(module.rank for module in new.values() if how in _CUT)
            errors.append(unconverted)
        if progress is not None:
            progress(done, len(layers), layer.key)
    modules = _without_mixing(modules, weights) if known.mode == "peft" else modules
    metadata = {**adapter.metadata, "dora_diffusion.made_for": known.title}
    metadata |= {OVER_BASE_KEY: known.title} if made[ITS_MAGNITUDES] else {}
    written = replace(adapter, modules=modules, metadata=metadata)
    return ForTool(written, format, known, dict(made), tuple(sorted(cut)), max(errors, default=0.0), left_out)


def _readable(adapter: AdapterState, tool: Tool, family: str, *, strict: bool) -> tuple[AdapterState, tuple[str, ...]]:
    """The adapter without what the tool does not read, and that."""
    unread = [path for path in adapter.modules if tool.is_unread(family, path)]
    unread += [path for path in adapter.vectors if not tool.is_vector_read]
    if not unread:
        return adapter, ()
    if strict:
        raise ValueError(
            f"{tool.title} does not read {len(unread)} of the adapter's {len(adapter.modules) + len(adapter.vectors)} "
            f"layers and vectors, such as {unread[0]}; leave them out with --partial (strict=False)"
        )
    kept = {path: module for path, module in adapter.modules.items() if path not in unread}
    vectors = {path: vector for path, vector in adapter.vectors.items() if path not in unread}
    if not kept and not vectors:
        raise ValueError(f"{tool.title} reads none of the adapter's layers, such as {unread[0]}")
    return replace(adapter, modules=kept, vectors=vectors), tuple(unread)


@dataclass(frozen=True)
class _Maker:
    tool: Tool
    format: str
    weights: WeightOf
    rank: int | None

    def make(self, layer: FileLayer, found: Mapping[str, Module]) -> tuple[str, dict[str, Module], float]:
        """How the layers that are one in the file are written, their modules, and how far they were from ours."""
        weights = {path: weight_for(module, self.weights, path) for path, module in found.items()}
        found = {path: self._shaped(module, weights[path]) for path, module in found.items()}
        changes = {path: change_of(module, weights[path]) for path, module in found.items()}
        unconverted = max(self._error(module, weights[path], changes[path]) for path, module in found.items())
        for how, candidate in self._candidates(layer, found, weights, changes):
            is_near = how in (*_CUT, WHOLE) or self._is_same(candidate, weights, changes)
            if is_near and layer.is_held(candidate, FORMATS[self.format]):
                return how, candidate, unconverted
        raise ValueError(f"{layer.key}: {self.tool.title} has no way to hold this layer; name a --rank")

    def _shaped(self, module: Module, weight: Tensor) -> Module:
        """The module with all dimensions of its weight: few tools read a convolution's pair that lies flat."""
        if isinstance(module, FactoredState):
            held = all(FORMATS[self.format].suffixes.holds(name) for name in module.factors)
            if held or module.rank >= min(module.shape):
                return replace(module, dimensions=weight.dim())
            module = module.as_pair()
        if module.mid is not None or module.down.dim() == weight.dim():
            return module
        down = module.down.reshape(module.rank, *weight.shape[1:])
        return replace(module, down=down, up=module.up.reshape(-1, module.rank, *[1] * (weight.dim() - 2)))

    def _candidates(
        self,
        layer: FileLayer,
        found: Mapping[str, Module],
        weights: Mapping[str, Tensor],
        changes: Mapping[str, Tensor],
    ) -> Iterator[tuple[str, dict[str, Module]]]:
        has_magnitudes = [module.magnitude is not None and module.axis == "out" for module in found.values()]
        if self.tool.is_over_base_norms and any(has_magnitudes):
            if not any(module.axis == "in" for module in found.values()):
                yield ITS_MAGNITUDES, self._over_base_norms(layer, found, weights)
        else:
            folded = self.tool.is_scale_outside
            yield AS_IT_IS, {path: _at_scale_one(module) if folded else module for path, module in found.items()}
        anew = {path: self._anew(module, weights[path], changes[path]) for path, module in found.items()}
        yield self._how_else(), anew

    def _over_base_norms(
        self, layer: FileLayer, found: Mapping[str, Module], weights: Mapping[str, Tensor]
    ) -> dict[str, Module]:
        """All layers that are one in the file as DoRAs of the tool's: an untouched one with a D of 0."""
        some = next(iter(found.values()))
        modules = {}
        for path in layer.paths:
            weight = weights[path] if path in weights else self.weights(path).float()
            module = found[path] if path in found else _blank(some, weight)
            direction = weight + module.to(dtype=weight.dtype).delta().reshape(weight.shape)
            own = axis_norms(direction, "out") if module.magnitude is None else module.magnitude.to(weight)
            modules[path] = replace_magnitude(module, over_base_norms(own, weight, direction), "out")
        return modules

    def _how_else(self) -> str:
        if not self.tool.is_whole_read:
            return NEAREST_DORA
        return WHOLE if self.rank is None else AT_A_RANK

    def _anew(self, module: Module, weight: Tensor, change: Tensor) -> Module:
        """W' - W in the form that every tool adds: see `_how_else`."""
        dtype = dtype_of(module)
        if self._how_else() == WHOLE:
            return FactoredState("full", {"diff": change.to(dtype)})
        rank = min(self.rank or module.rank, *module.shape)
        if self._how_else() == AT_A_RANK:
            return module_of(low_rank(change, rank), weight.shape, dtype)
        parts = extract_dora(weight + change, weight, rank)
        return module_of(parts.pair, weight.shape, dtype, parts.magnitude)

    def _is_same(
        self, candidate: Mapping[str, Module], weights: Mapping[str, Tensor], changes: Mapping[str, Tensor]
    ) -> bool:
        return all(self._is_drawn(candidate[path], weights[path], change) for path, change in changes.items())

    def _is_drawn(self, module: Module, weight: Tensor, change: Tensor) -> bool:
        drawn = self.tool.drawn(module, weight)
        if drawn is None:
            return False
        missed = torch.linalg.vector_norm(drawn - weight - change)
        rounding = ROUNDINGS * torch.finfo(weight.dtype).eps * torch.linalg.vector_norm(weight)
        return bool(missed <= SAME * torch.linalg.vector_norm(change) + rounding)

    def _error(self, module: Module, weight: Tensor, change: Tensor) -> float:
        drawn = self.tool.drawn(module, weight)
        return float("inf") if drawn is None else relative_error(drawn, weight + change, weight)


def _blank(like: Module, weight: Tensor) -> Module:
    """A pair that changes nothing of a weight, and shares A with another layer's where that is one."""
    pair = like.as_pair()
    up = pair.up.new_zeros((weight.shape[0], *pair.up.shape[1:]))
    return ModuleState(pair.down, up, pair.alpha, rank_stabilised=pair.rank_stabilised)


def _at_scale_one(module: Module) -> Module:
    """The same D with alpha = r, for a tool that scales by it in the wrong place."""
    if isinstance(module, FactoredState) or module.scale == 1:
        return module
    up = (module.scale * module.up.float()).to(torch.promote_types(module.up.dtype, torch.float32))
    return replace(module, up=up, alpha=float(module.rank), rank_stabilised=False)


def _without_mixing(modules: Mapping[str, Module], weights: WeightOf) -> dict[str, Module]:
    """Plain layers of a component that holds a DoRA, given magnitudes that change nothing: PEFT has one switch."""
    mixed = {path.partition(".")[0] for path, module in modules.items() if module.magnitude is not None}
    return {
        path: module
        if module.magnitude is not None or path.partition(".")[0] not in mixed
        else _with_own_magnitude(module, weight_for(module, weights, path))
        for path, module in modules.items()
    }


def _with_own_magnitude(module: Module, weight: Tensor) -> Module:
    direction = weight + module.to(dtype=weight.dtype).delta().reshape(weight.shape)
    return replace_magnitude(module, axis_norms(direction, "out"), "out")
