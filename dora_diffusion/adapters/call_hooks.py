"""What a call of the pipeline asks of its adapters, and what would make them act no more.

`cross_attention_kwargs={"scale": 0.5}` (`attention_kwargs`, `joint_attention_kwargs`) multiplies every adapter's
strength for that call, in the denoiser and in the text encoders, as in diffusers. `fuse_qkv_projections()` lets
attention read a weight made of three layers' instead of the layers: such a drawing is refused, for it would be the
base's.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dora_diffusion.layers.blended import BlendedLayer
from dora_diffusion.pipelines.components import adaptable_models, timed_of
from dora_diffusion.utils.locks import Lock

KEYWORDS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
SetScale = Callable[[str, float], None]
LayerPlace = tuple[nn.Module, str]
"""The module that has a layer, and what it calls it."""


class CallHooks:
    """Hooks on the models of a pipeline, from the first adapter that is loaded to `remove`.

    A change of strengths in another thread waits for the step that is being drawn. Inside a compiled model nothing is
    done: a scale is refused there, and everything else is for hooks outside it.
    """

    def __init__(self, pipe: Any, lock: Lock, set_scale: SetScale) -> None:
        """`set_scale` multiplies the strengths of everything in a component."""
        self._pipe = pipe
        self._lock = lock
        self._set_scale = set_scale
        self._handles: dict[str, tuple[nn.Module, list[RemovableHandle]]] = {}
        self._layers: tuple[LayerPlace, ...] = ()
        self._encoded: dict[str, float] = {}

    def install(self, layers: Iterable[LayerPlace], components: Iterable[str]) -> None:
        """Let hooks stand on the denoisers, and on the components that adapters change.

        Args:
            layers: where adapted layers stand.
            components: names of those that hold any.
        """
        layers = tuple(place for place in layers if hasattr(place[0], "fused_projections"))
        if layers != self._layers:
            self._layers = layers
        timed, wanted = timed_of(self._pipe), set(components)
        for name, model in adaptable_models(self._pipe).items():
            if self._handles.get(name, (None,))[0] is model:
                continue
            self._remove(name)
            if name in timed:
                before = model.register_forward_pre_hook(self._before_step, with_kwargs=True)
                after = model.register_forward_hook(self._after_step, with_kwargs=True, always_call=True)
                self._handles[name] = model, [before, after]
            elif name in wanted:
                self._handles[name] = model, [model.register_forward_pre_hook(self._before_text)]

    def remove(self) -> None:
        """Take every hook away."""
        for name in list(self._handles):
            self._remove(name)
        self._layers, self._encoded = (), {}

    def refuse_fused_projections(self) -> None:
        """A ValueError when attention no longer reads layers that adapters change; nothing while they are fused."""
        standing = (place for place in self._layers if isinstance(getattr(*place), BlendedLayer))
        refuse_fused_projections(standing)

    def _remove(self, name: str) -> None:
        for handle in self._handles.pop(name, (None, []))[1]:
            handle.remove()

    def _name_of(self, model: nn.Module) -> str:
        return next(name for name, (known, _) in self._handles.items() if known is model)

    def _before_step(self, model: nn.Module, arguments: Any, keywords: Mapping[str, Any]) -> None:
        scale = _scale_in(keywords)
        if torch.compiler.is_compiling():
            if scale != 1:
                raise ValueError("a compiled model takes no scale of a call here: use set_adapters")
            return
        self._lock.acquire()
        self.refuse_fused_projections()
        told = [encoded for encoded in self._encoded.values() if encoded != scale]
        self._encoded.clear()  # further steps, and calls with embeds made before, encode nothing
        if told:
            raise ValueError(
                f"the scale {scale:g} of this call did not reach the text encoder, which has adapters, too, and was "
                f"asked at {told[0]:g}: use set_adapters instead"
            )
        self._set_scale(self._name_of(model), scale)

    def _after_step(self, model: nn.Module, arguments: Any, keywords: Mapping[str, Any], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._set_scale(self._name_of(model), 1.0)
            self._lock.release()

    def _before_text(self, model: nn.Module, arguments: Any) -> None:
        if torch.compiler.is_compiling():
            return
        scale = _scale_in({name: getattr(self._pipe, f"_{name}", None) for name in KEYWORDS})
        with self._lock:
            name = self._name_of(model)
            self._encoded[name] = scale
            self._set_scale(name, scale)


def refuse_fused_projections(layers: Iterable[LayerPlace]) -> None:
    """A ValueError when `fuse_qkv_projections()` lets attention read something else than one of these layers."""
    if any(_is_bypassed(owner, name) for owner, name in layers):
        raise ValueError(
            "fuse_qkv_projections() is on, so that attention does not read the layers that adapters change: call "
            "unfuse_qkv_projections() first, or fuse the adapters before the projections"
        )


def _is_bypassed(owner: nn.Module, name: str) -> bool:
    if not getattr(owner, "fused_projections", False) or name not in _PROJECTIONS:
        return False
    if name == "to_q" and not hasattr(owner, "to_qkv"):  # cross attention fuses what it reads of the text alone
        return False
    # attention of the first kind is only fused while its processor is, whatever the flag says
    is_old = type(owner).__module__ == "diffusers.models.attention_processor"
    return not is_old or "Fused" in type(getattr(owner, "processor", None)).__name__


def _scale_in(keywords: Mapping[str, Any]) -> float:
    """The scale that a call asks for; 1 where it asks for none."""
    for name in KEYWORDS:
        asked = keywords.get(name)
        if asked is not None and "scale" in asked:
            return float(asked["scale"])
    return 1.0
