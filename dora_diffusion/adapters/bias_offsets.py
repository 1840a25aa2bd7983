"""Offsets: vectors that adapters add to biases and to the weights of normalisations.

    parameter = its own value + sum_i strength_i vector_i

computed in fp32 and rounded once. The parameter's own tensor is kept, and stands again, bit for bit, when no adapter is
left that adds to it; until then the sum is written in place, so that a compiled model meets the same memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dora_diffusion.functional.dora import master_dtype
from dora_diffusion.functional.strengths import Weight, strength_at
from dora_diffusion.layers.fuse import on_saving, refuse_loading, save_kept
from dora_diffusion.pipelines.modules import PipelineModules

Values = tuple[tuple[str, float], ...]


@dataclass
class _Offset:
    """A parameter of the pipeline that adapters may add to.

    Attributes:
        component: the pipeline's component that it is in.
        owner: the module that has it; never a BlendedLayer, but the base inside it.
        name: what it is called there.
        kept: the very tensor that it was.
        vectors: adapter -> what that adds at strength 1, fp32, in the parameter's shape.
        values: (adapter, strength) of what it holds now, by name; only strengths that are not 0.
    """

    component: nn.Module
    owner: Any
    name: str
    kept: Tensor
    vectors: dict[str, Tensor] = field(default_factory=dict)
    values: Values = ()

    @property
    def parameter(self) -> nn.Parameter:
        """Looked up every time: some ways to move a model replace it."""
        live: nn.Parameter = self.owner.get_parameter(self.name)
        return live

    def write(self, values: Values) -> None:
        """Let the parameter hold this sum; nothing happens when it does already."""
        if values == self.values:
            return
        live = self.parameter.data
        if values:
            total = self.kept.to(live.device, master_dtype(self.kept.dtype), copy=True)
            for adapter, strength in values:
                total.add_(self.vectors[adapter].to(total.device), alpha=strength)
            live.copy_(total)
        else:
            live.copy_(self.kept)
        self.values = values

    def restore(self) -> None:
        """Put the kept tensor back: no copy, but for a model that has since moved or been cast."""
        self.parameter.data = self.kept.to(self.parameter.device, self.parameter.dtype)
        self.owner.holds_offset = False


class Offsets:
    """The parameters of a pipeline that loaded adapters add to."""

    def __init__(self, pipe_modules: PipelineModules) -> None:
        self._pipe_modules = pipe_modules
        self._offsets: dict[str, _Offset] = {}
        self._hooks: dict[str, list[RemovableHandle]] = {}
        self.are_saved = False
        """Whether a state dict holds the sums; else it holds what the parameters were."""

    @property
    def components(self) -> dict[str, nn.Module]:
        """The components that hold any, by name."""
        return {path.split(".", 1)[0]: offset.component for path, offset in self._offsets.items()}

    @torch.no_grad()
    def install(self, adapters: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keep exactly the parameters that these adapters have vectors for; `set_strengths` must follow.

        Args:
            adapters: name -> parameter path, as the pipeline spells it -> vector.
        """
        wanted = dict.fromkeys(path for vectors in adapters.values() for path in vectors)
        for path in [path for path in self._offsets if path not in wanted]:
            for hook in self._hooks.pop(path):
                hook.remove()
            self._offsets.pop(path).restore()
        for path in wanted:
            if path not in self._offsets:
                _, owner, name = self._pipe_modules.parameter(path)
                model = self._pipe_modules.model(path.split(".", 1)[0])
                assert model is not None  # the parameter was found in it
                offset = self._offsets[path] = _Offset(model, owner, name, owner.get_parameter(name).data)
                offset.parameter.data = offset.kept.clone()
                offset.owner.holds_offset = True  # a copy of it knows that its parameter is a sum
                saving = on_saving(owner, partial(self._save, offset))
                self._hooks[path] = [saving, refuse_loading(owner, f"one adds to its {name}: unload() first")]
            offset = self._offsets[path]
            offset.vectors = {name: vectors[path] for name, vectors in adapters.items() if path in vectors}
            if any(name not in offset.vectors for name, _ in offset.values):
                offset.write(())

    def _save(self, offset: _Offset, owner: Any, state: Any, prefix: str, metadata: Any) -> None:
        if not self.are_saved:
            save_kept(owner, state, prefix, metadata, name=offset.name, kept=offset.kept)

    @torch.no_grad()
    def set_strengths(self, weights: Mapping[str, Weight], factors: Mapping[str, float], *, prefix: str = "") -> None:
        """Write the sums of the parameters under a prefix, each adapter's strength there times its factor."""
        for path, offset in self._offsets.items():
            if not path.startswith(prefix):
                continue
            here = [(name, weights[name]) for name in sorted(weights) if name in offset.vectors]
            values = [(name, strength_at(path, weight) * factors.get(name, 1.0)) for name, weight in here]
            offset.write(tuple((name, strength) for name, strength in values if strength != 0))
