"""What the toolkit needs to know of a model family: which layers to adapt and how its base is asked to predict."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

Presets = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Component:
    """A part of a pipeline that can be adapted.

    Attributes:
        name: the pipeline's attribute, `unet`, `text_encoder`; also the prefix of its layers in adapter files.
        model_classes: class names of the model, by which a bare module is recognised.
        presets: preset name -> endings of layer paths; every family has `attention`, `all-linear` and `all`.
    """

    name: str
    model_classes: tuple[str, ...]
    presets: Presets


class Encode(Protocol):
    """Captions -> conditioning tensors, differentiable through the text encoder."""

    def __call__(self, pipe: Any, captions: list[str]) -> Mapping[str, Tensor]: ...


class Predict(Protocol):
    """One call of the denoiser: noisy latents (N, C, h, w), timesteps (N,) -> prediction (N, C, h, w)."""

    def __call__(
        self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor: ...


@dataclass(frozen=True)
class Family:
    """One model family. A new one is a file with such a record and an entry in the registry.

    Attributes:
        name: short name, written into adapter metadata.
        pipeline_classes: class names of its diffusers pipelines.
        denoiser: the component that predicts noise.
        text_encoders: its text encoders, in order.
        encode: captions to conditioning.
        predict: the denoiser's call.
        encode_pictures: pixels (N, 3, H, W) in [-1, 1] -> scaled latents, the mode of the VAE's posterior.
    """

    name: str
    pipeline_classes: tuple[str, ...]
    denoiser: Component
    text_encoders: tuple[Component, ...]
    encode: Encode
    predict: Predict
    encode_pictures: Callable[[Any, Tensor], Tensor]

    @property
    def components(self) -> tuple[Component, ...]:
        """Denoiser first."""
        return (self.denoiser, *self.text_encoders)
