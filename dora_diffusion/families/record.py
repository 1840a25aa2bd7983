"""What the toolkit needs to know of a model family: which layers to adapt and how its base is asked to predict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from dora_diffusion.families.shifts import scheduler_shift
from dora_diffusion.families.signature import Signature

Presets = Mapping[str, tuple[str, ...]]

OTHER_COMPONENTS = (
    *("transformer_2", "transformer_ref", "unet_2", "prior", "controlnet", "text_encoder_4"),
    *("text_conditioner", "connectors"),
)
"""Models of pipelines that adapters change, beside a denoiser and three text encoders."""


@dataclass(frozen=True)
class Component:
    """A part of a pipeline that can be adapted.

    Together, the preset `all` and `outside` name every linear, convolution and embedding layer of the part: what a
    preset leaves alone is left on purpose (`coverage` counts it).

    Attributes:
        name: the pipeline's attribute, `unet`, `text_encoder`; also the prefix of its layers in adapter files.
        model_classes: class names of the model, by which a bare module is recognised.
        presets: preset name -> ends of layer paths, `*` fits anything; every part has `attention`, `all-linear`, `all`.
        outside: ends of the paths of layers that no preset adapts: embedders, time, the last projection.
    """

    name: str
    model_classes: tuple[str, ...]
    presets: Presets
    outside: tuple[str, ...] = ()


class Encode(Protocol):
    """Captions -> conditioning tensors (N, ...), differentiable through the text encoders.

    Tensors of several captions may be of different length in their dimension 1; they are padded with zeros when
    captions meet in a batch, so a family with such tensors has a mask among them.
    """

    def __call__(self, pipe: Any, captions: list[str]) -> Mapping[str, Tensor]: ...


class Predict(Protocol):
    """One call of the denoiser on noisy latents.

    Args:
        denoiser: the UNet or transformer.
        latents: (N, C, h, w), as the codec encodes pictures.
        timesteps: (N,), in the scheduler's unit, 0 to 1000, more is noisier.
        conditioning: from `Encode`.
        frames: (N, 6), where each picture comes from, in pixels: original height and width, top and left of the crop,
            target height and width.

    Returns:
        (N, C, h, w): epsilon or v as the scheduler says, or a flow's velocity noise - clean.
    """

    def __call__(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        frames: Tensor,
    ) -> Tensor: ...


class Drawing(Protocol):
    """What to draw, as `generation.GenerationSettings` has it."""

    @property
    def prompt(self) -> str: ...
    @property
    def negative_prompt(self) -> str: ...
    @property
    def guidance_scale(self) -> float: ...


@dataclass(frozen=True)
class ToolNames:
    """What other tools call a base in the metadata of its adapters; empty where none of them has a name for it.

    Attributes:
        architecture: of Stability's ModelSpec, without `/lora`; empty = the family's own name.
        version: kohya's `ss_base_model_version`.
        architecture_v: the architecture where the base predicts v; empty = the same.
        version_v: the version, likewise.
    """

    architecture: str = ""
    version: str = ""
    architecture_v: str = ""
    version_v: str = ""

    def of(self, *, predicts_v: bool) -> tuple[str, str]:
        """Architecture and version."""
        found = (self.architecture, self.version)
        return (self.architecture_v or found[0], self.version_v or found[1]) if predicts_v else found


@dataclass(frozen=True)
class Codec:
    """How pictures become the latents that a denoiser sees, and back.

    Attributes:
        encode: (pipe, pixels (N, 3, H, W) in [-1, 1]) -> latents (N, C, h, w), the mode of the VAE's posterior, scaled.
        decode: (pipe, latents (N, C, h, w)) -> pixels (N, 3, H, W).
    """

    encode: Callable[[Any, Tensor], Tensor]
    decode: Callable[[Any, Tensor], Tensor]


def plain_arguments(pipe: Any, drawing: Drawing) -> dict[str, Any]:
    """Prompt, negative prompt and guidance by the names that most pipelines give them."""
    return {
        "prompt": drawing.prompt,
        "negative_prompt": drawing.negative_prompt or None,
        "guidance_scale": drawing.guidance_scale,
    }


def native_side(pipe: Any) -> int:
    """The side in pixels of the pictures that the model was trained on."""
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    return int(denoiser.config.sample_size * pipe.vae_scale_factor)


def maps(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    """The denoiser predicts (N, C, h, w), so that places in the picture need no looking up."""


def unpacked(latents: Tensor, height: int, width: int) -> Tensor:
    """Latents of a running pipeline that are (N, C, h, w) already."""
    return latents


def always(denoiser_config: Mapping[str, Any]) -> bool:
    """The family has no other with the same pipeline class."""
    return True


def same_time(timestep: Tensor) -> Tensor:
    """The denoiser is given the scheduler's own timestep."""
    return timestep


@dataclass(frozen=True)
class Family:
    """One model family. A new one is a file with such a record and an entry in the registry.

    Attributes:
        name: short name, written into adapter metadata.
        pipeline_classes: class names of its diffusers pipelines.
        denoiser: the component that predicts noise.
        text_encoders: its text encoders, in order; a pipeline may lack some.
        encode: captions to conditioning.
        predict: the denoiser's call.
        codec: pictures to latents and back.
        signature: by what its adapters are recognised in files.
        blank: the denoiser's config -> conditioning of one caption as `encode` gives it at full length: tensors
            (1, ...) on the meta device, for estimates of memory. A mask may be left out.
        is_mine: tells families apart that share a pipeline class, by the denoiser's config.
        arguments: a drawing as the pipeline's arguments; a ValueError for what the model does not have.
        native_side: pixels of a picture as the model knows it.
        patch: latents' side of one token of the denoiser; pictures are multiples of it.
        unpack: latents of the pipeline's own loop, and the latents' height and width -> (N, C, h, w).
        grid: arguments and keywords of a call of the denoiser -> rows and columns of the picture's tokens, when it
            predicts tokens (N, rows * columns, C), row by row; None when it predicts (N, C, h, w).
        scheduler_time: the timestep given to the denoiser -> the scheduler's.
        shift: a flow's scheduler, and a picture's tokens -> the shift of timesteps towards noise that it draws with.
        embeds: names of `encode` -> the pipeline's arguments for them, where single words of a prompt can be weighed:
            the first are the tokens' (N, tokens, width), text encoders side by side. Empty where they cannot.
        names: what other tools call its base.
    """

    name: str
    pipeline_classes: tuple[str, ...]
    denoiser: Component
    text_encoders: tuple[Component, ...]
    encode: Encode
    predict: Predict
    codec: Codec
    blank: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
    signature: Signature
    is_mine: Callable[[Mapping[str, Any]], bool] = always
    arguments: Callable[[Any, Drawing], dict[str, Any]] = plain_arguments
    native_side: Callable[[Any], int] = native_side
    patch: int = 1
    unpack: Callable[[Tensor, int, int], Tensor] = unpacked
    grid: Callable[[Sequence[Any], Mapping[str, Any]], tuple[int, int] | None] = maps
    scheduler_time: Callable[[Tensor], Tensor] = same_time
    shift: Callable[[Any, int], float] = scheduler_shift
    embeds: Mapping[str, str] = field(default_factory=dict)
    names: ToolNames = ToolNames()

    @property
    def components(self) -> tuple[Component, ...]:
        """Denoiser first."""
        return (self.denoiser, *self.text_encoders)


def no_negative_prompt(family: str, drawing: Drawing) -> None:
    """A ValueError when a drawing has a negative prompt and the model knows none."""
    if drawing.negative_prompt:
        raise ValueError(f"{family} has no negative prompt: got {drawing.negative_prompt!r}, expected none")
