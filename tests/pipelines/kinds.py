"""Pipelines that engineers keep adapters in, around one small UNet: each with a call that draws latents."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxKontextPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
)
from PIL import Image
from torch import Tensor

from tests.families.pipelines import PIPELINES
from tests.families.pipelines.stable_diffusion import unet

SIDE = 32  # pixels; latents are of half the side
PROMPT = "a cat"
_ONLY_PLAIN = ("image_encoder", "feature_extractor", "safety_checker")
Draw = Callable[[], Tensor]


@dataclass(frozen=True)
class Drawn:
    """A pipeline and its drawing of latents, the same at every call."""

    pipe: Any
    draw: Draw


def _photo() -> Image.Image:
    return Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")


def draws(pipe: Any, **keywords: Any) -> Draw:
    """Two steps of a pipeline's own call."""

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        asked = {"num_inference_steps": 2, "generator": generator, "output_type": "latent", **keywords}
        with torch.no_grad():
            drawn = pipe(**asked)
        return (drawn.frames if hasattr(drawn, "frames") else drawn.images).clone()

    pipe.set_progress_bar_config(disable=True)
    return draw


def _parts(family: str = "sd1") -> dict[str, Any]:
    """A tiny pipeline's models, without the safety checker and what only some pipelines take."""
    components = PIPELINES[family].build().components
    return {name: part for name, part in components.items() if name not in _ONLY_PLAIN}


def _built(kind: type, **parts: Any) -> Any:
    """A pipeline of parts; those that its own kind must be told to go without are told."""
    optional = {name: None for name in _ONLY_PLAIN if name in inspect.signature(kind).parameters}
    if "safety_checker" in optional:
        optional["requires_safety_checker"] = False
    return kind(**{**optional, **parts})


def _seeded(make: Callable[[], Any]) -> Any:
    """A model with random weights, its zeros too: what a new ControlNet adds would be nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = make().eval().requires_grad_(False)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def plain() -> Drawn:
    pipe = PIPELINES["sd1"].build()
    return Drawn(pipe, draws(pipe, prompt=PROMPT, height=SIDE, width=SIDE))


def controlnet() -> Drawn:
    parts = _parts()
    net = _seeded(lambda: ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16)))
    pipe = _built(StableDiffusionControlNetPipeline, **parts, controlnet=net)
    return Drawn(pipe, draws(pipe, prompt=PROMPT, image=_photo(), height=SIDE, width=SIDE))


def controlnet_xl() -> Drawn:
    parts = _parts("sdxl")
    net = _seeded(lambda: ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16)))
    pipe = _built(StableDiffusionXLControlNetPipeline, **parts, controlnet=net, add_watermarker=False)
    return Drawn(pipe, draws(pipe, prompt=PROMPT, image=_photo(), height=SIDE, width=SIDE))


def controlnet_flux() -> Drawn:
    parts = _parts("flux-dev")
    config = {**parts["transformer"].config, "num_layers": 1, "num_single_layers": 1}
    net = _seeded(lambda: FluxControlNetModel.from_config(config))
    pipe = _built(FluxControlNetPipeline, **parts, controlnet=net)
    return Drawn(pipe, draws(pipe, prompt=PROMPT, control_image=_photo(), height=SIDE, width=SIDE))


def kontext() -> Drawn:
    pipe = _built(FluxKontextPipeline, **_parts("flux-dev"))
    asked = {"image": _photo(), "height": SIDE, "width": SIDE, "max_area": SIDE * SIDE, "_auto_resize": False}
    return Drawn(pipe, draws(pipe, prompt=PROMPT, **asked))


def controlnet_qwen() -> Drawn:
    parts = _parts("qwen-image")
    config = {**parts["transformer"].config, "num_layers": 1}
    net = _seeded(lambda: QwenImageControlNetModel.from_config(config))
    pipe = _built(QwenImageControlNetPipeline, **parts, controlnet=net)
    return Drawn(pipe, draws(pipe, prompt=PROMPT, control_image=_photo(), height=SIDE, width=SIDE))


def image_to_image() -> Drawn:
    pipe = _built(StableDiffusionImg2ImgPipeline, **_parts())
    return Drawn(pipe, draws(pipe, prompt=PROMPT, image=_photo(), strength=1.0))


def inpainting() -> Drawn:
    pipe = _built(StableDiffusionInpaintPipeline, **_parts())
    mask = Image.linear_gradient("L").resize((SIDE, SIDE))
    return Drawn(pipe, draws(pipe, prompt=PROMPT, image=_photo(), mask_image=mask, height=SIDE, width=SIDE))


def pix2pix() -> Drawn:
    pipe = _built(StableDiffusionInstructPix2PixPipeline, **{**_parts(), "unet": _seeded(partial(unet, in_channels=8))})
    return Drawn(pipe, draws(pipe, prompt=PROMPT, image=_photo()))


def perturbed_attention() -> Drawn:
    pipe = _built(StableDiffusionPAGPipeline, **_parts(), pag_applied_layers="mid")
    return Drawn(pipe, draws(pipe, prompt=PROMPT, height=SIDE, width=SIDE, pag_scale=2.0))


def consistency() -> Drawn:
    denoiser = _seeded(partial(unet, time_cond_proj_dim=32))
    pipe = _built(LatentConsistencyModelPipeline, **{**_parts(), "unet": denoiser, "scheduler": LCMScheduler()})
    return Drawn(pipe, draws(pipe, prompt=PROMPT, height=SIDE, width=SIDE))


def t2i_adapter() -> Drawn:
    helper = _seeded(lambda: T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2))
    pipe = _built(StableDiffusionAdapterPipeline, **_parts(), adapter=helper)
    return Drawn(pipe, draws(pipe, prompt=PROMPT, image=_photo(), height=SIDE, width=SIDE))


def animation() -> Drawn:
    shape = {"block_out_channels": (8, 16), "motion_norm_num_groups": 4, "motion_layers_per_block": 1}
    motion = _seeded(lambda: MotionAdapter(**shape, motion_num_attention_heads=2, motion_max_seq_length=4))
    pipe = _built(AnimateDiffPipeline, **_parts(), motion_adapter=motion)
    return Drawn(pipe, draws(pipe, prompt=PROMPT, height=SIDE, width=SIDE, num_frames=2))


def ip_adapter() -> Drawn:
    parts = _parts()
    _load_ip_adapter(parts["unet"])
    pipe = _built(StableDiffusionPipeline, **parts)
    embeds = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(6))
    asked = {"prompt": PROMPT, "ip_adapter_image_embeds": [embeds], "height": SIDE, "width": SIDE}
    return Drawn(pipe, draws(pipe, **asked))


def _load_ip_adapter(model: Any) -> None:
    """Random weights of an IP-Adapter as its files hold them: four tokens of a picture's 12 numbers."""
    width, generator = model.config.cross_attention_dim, torch.Generator().manual_seed(5)
    normal = partial(torch.randn, generator=generator)
    processors: dict[str, Tensor] = {}
    number = 1
    for name in model.attn_processors:
        if name.endswith("attn2.processor"):
            out = model.get_submodule(name.removesuffix(".processor")).to_k.out_features
            processors |= {f"{number}.to_{part}_ip.weight": normal(out, width) for part in "kv"}
            number += 2
    projection = {
        **{"proj.weight": normal(4 * width, 12) / 4, "proj.bias": torch.zeros(4 * width)},
        **{"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)},
    }
    model._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": processors}])


class OwnPipeline(StableDiffusionPipeline):
    """As people subclass: a call of their own."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return super().__call__(*arguments, guidance_scale=2.0, **keywords)


def subclass() -> Drawn:
    pipe = _built(OwnPipeline, **_parts())
    return Drawn(pipe, draws(pipe, prompt=PROMPT, height=SIDE, width=SIDE))


def without_encoders() -> Drawn:
    pipe = _built(StableDiffusionPipeline, **{**_parts(), "text_encoder": None, "tokenizer": None})
    embeds = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(2))
    asked = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds, "height": SIDE, "width": SIDE}
    return Drawn(pipe, draws(pipe, **asked))


def own_object() -> Drawn:
    parts = _parts()
    pipe = SimpleNamespace(unet=parts["unet"], text_encoder=parts["text_encoder"], scheduler=parts["scheduler"])
    return Drawn(pipe, lambda: _predicted(pipe.unet, pipe.text_encoder(torch.arange(16)[None])[0]))


def bare_model() -> Drawn:
    model = _parts()["unet"]
    return Drawn(model, lambda: _predicted(model, torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(4))))


def _predicted(model: Any, text: Tensor) -> Tensor:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(noise, torch.tensor(500), text).sample


KINDS: dict[str, Callable[[], Drawn]] = {
    "plain": plain,
    "ControlNet": controlnet,
    "ControlNet, SDXL": controlnet_xl,
    "ControlNet, FLUX": controlnet_flux,
    "ControlNet, Qwen-Image": controlnet_qwen,
    "FLUX Kontext": kontext,
    "IP-Adapter": ip_adapter,
    "img2img": image_to_image,
    "inpaint": inpainting,
    "InstructPix2Pix": pix2pix,
    "PAG": perturbed_attention,
    "LCM": consistency,
    "T2I-Adapter": t2i_adapter,
    "AnimateDiff": animation,
    "a subclass of one's own": subclass,
    "no text encoders, embeds given": without_encoders,
    "an object of one's own": own_object,
    "a model by itself": bare_model,
}
