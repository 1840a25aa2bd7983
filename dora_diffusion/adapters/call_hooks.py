"""What a call of the pipeline asks of its adapters, and what would make them act no more.

`cross_attention_kwargs={"scale": 0.5}` (`attention_kwargs`, `joint_attention_kwargs`) multiplies every adapter's
strength for that call, in the denoiser and, as diffusers hands it on to `encode_prompt(lora_scale=)`, in the text
encoders. Where it does not come through, the drawing is refused. `fuse_qkv_projections()` lets attention read a weight
made of three layers' instead of the layers: such a drawing is refused, too, for it would be the base's.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dora_diffusion.layers.blended import BlendedLayer
from dora_diffusion.pipelines.components import adaptable_models, denoisers_of
from dora_diffusion.utils.locks import Lock

KEYWORDS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
SetScale = Callable[[str, float], None]
LayerPlace = tuple[nn.Module, str]
"""The module that has a layer, and what it calls it."""


class CallHooks:
    """Hooks on the models that adapters change and on the denoisers, from the first adapter that is loaded to `remove`.

    Inside a compiled model nothing is done: a scale is refused there, and everything else is for hooks outside it.
    """

    def __init__(self, pipe: Any, lock: Lock, set_scale: SetScale) -> None:
        """`set_scale` multiplies the strengths of everything in a component."""
        self._pipe = pipe
        self._lock = lock
        self._set_scale = set_scale
        self._handles: dict[str, tuple[nn.Module, list[RemovableHandle]]] = {}
        self._layers: tuple[LayerPlace, ...] = ()
        self._scale = 1.0  # of the encoding that goes on
        self._heard: dict[str, float] = {}  # component -> the scale it was last asked at, since a denoiser's last step

    def install(self, layers: Iterable[LayerPlace], components: Iterable[str]) -> None:
        """Let hooks stand on the denoisers, and on the components that adapters change.

        Args:
            layers: where adapted layers stand.
            components: names of those that hold any.
        """
        layers = tuple(place for place in layers if hasattr(place[0], "fused_projections"))
        if layers != self._layers:
            self._layers = layers
        denoisers, wanted = denoisers_of(self._pipe), set(components)
        for name, model in adaptable_models(self._pipe).items():
            if self._handles.get(name, (None,))[0] is model:
                continue
            self._remove(name)
            if name in denoisers:
                before = model.register_forward_pre_hook(self._before_step, with_kwargs=True)
                after = model.register_forward_hook(self._after_step, always_call=True)
                self._handles[name] = model, [before, after]
            elif name in wanted:
                self._handles[name] = model, [model.register_forward_pre_hook(self._before_other)]
        if wanted - set(denoisers):
            ScaledEncoding.stand_in(self._pipe, self)

    def remove(self) -> None:
        """Take every hook away."""
        for name in list(self._handles):
            self._remove(name)
        ScaledEncoding.stand_aside(self._pipe)
        self._layers = ()
        self._heard.clear()

    def refuse_fused_projections(self) -> None:
        """A ValueError when attention no longer reads layers that adapters change; nothing while they are fused."""
        standing = (place for place in self._layers if isinstance(getattr(*place), BlendedLayer))
        refuse_fused_projections(standing)

    @contextmanager
    def encoding(self, scale: float) -> Iterator[None]:
        """Let text encoders have a scale for a while."""
        encoders = [name for name in self._handles if name.startswith("text_encoder")]
        try:
            with self._lock:
                for name in encoders:
                    self._set_scale(name, scale)
                self._scale = scale
            yield
        finally:
            with self._lock:
                self._scale = 1.0
                for name in encoders:
                    self._set_scale(name, 1.0)

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
        with self._lock:
            self.refuse_fused_projections()
            other = {name: heard for name, heard in self._heard.items() if heard != scale}
            self._heard.clear()  # further steps, and calls with embeds made before, encode nothing
            if other:
                name, heard = next(iter(other.items()))
                raise ValueError(
                    f"the scale {scale:g} of this call did not reach {name}, which has adapters, too, and was asked at "
                    f"{heard:g}: use set_adapters instead"
                )
            self._set_scale(self._name_of(model), scale)

    def _after_step(self, model: nn.Module, arguments: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            with self._lock:
                self._set_scale(self._name_of(model), 1.0)

    def _before_other(self, model: nn.Module, arguments: Any) -> None:
        """A text encoder, or a ControlNet: remember at which scale it was asked; to a ControlNet none comes through."""
        if not torch.compiler.is_compiling():
            name = self._name_of(model)
            self._heard[name] = self._scale


class ScaledEncoding:
    """A pipeline's `encode_prompt`, whose `lora_scale` acts on our adapters; it stands on the one object alone."""

    def __init__(self, pipe: Any, hooks: CallHooks) -> None:
        self._pipe = pipe
        self._hooks = hooks

    @classmethod
    def stand_in(cls, pipe: Any, hooks: CallHooks) -> None:
        """Let one stand on a pipeline that has such a method, and none of its own."""
        method = getattr(type(pipe), "encode_prompt", None)
        if method is not None and "lora_scale" in inspect.signature(method).parameters:
            vars(pipe).setdefault("encode_prompt", cls(pipe, hooks))

    @classmethod
    def stand_aside(cls, pipe: Any) -> None:
        """Let the class's method answer again."""
        if isinstance(vars(pipe).get("encode_prompt"), cls):
            del vars(pipe)["encode_prompt"]

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        method = type(self._pipe).encode_prompt
        given = inspect.signature(method).bind_partial(self._pipe, *arguments, **keywords).arguments
        with self._hooks.encoding(_checked(given.get("lora_scale"))):
            return method(self._pipe, *arguments, **keywords)


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
            return _checked(asked["scale"])
    return 1.0


def _checked(scale: Any) -> float:
    if scale is None:
        return 1.0
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"the scale of a call must be a finite number, got {scale!r}")
    return float(scale)
