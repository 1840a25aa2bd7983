"""Z-Image: ZImageTransformer2DModel, which takes lists of pictures and captions, and a Qwen 3 for the text.

Its time runs from noise at 0 to the picture at 1 and its answer points that way, against what the scheduler expects.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dora_diffusion.families.codecs import SCALED
from dora_diffusion.families.record import Component, Drawing, Family, ToolNames, plain_arguments
from dora_diffusion.families.signature import (
    ATTENTION_NAMES,
    PartSignature,
    Signature,
    transformer_size,
)
from dora_diffusion.families.text import decoder, decoder_signature

ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
LINEAR = (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

TRANSFORMER = Component(
    name="transformer",
    model_classes=("ZImageTransformer2DModel",),
    presets={
        "attention": ATTENTION,
        "all-linear": LINEAR,
        "all": (
            *LINEAR,
            *("noise_refiner.*.adaLN_modulation.0", "layers.*.adaLN_modulation.0"),
            *("all_final_layer.*.adaLN_modulation.1", "all_final_layer.*.linear"),
            *("all_x_embedder.*", "cap_embedder.1"),
        ),
    },
    outside=("t_embedder.mlp.0", "t_embedder.mlp.2", "siglip_embedder.1"),
)

QWEN = decoder("text_encoder", ("Qwen3ForCausalLM", "Qwen3Model"), outside=("lm_head",))

NATIVE_SIDE = 1024


def encode(pipe: Any, captions: list[str]) -> Mapping[str, Tensor]:
    """Captions -> the language model's last but one layer, as long as the longest, and a mask of what is caption."""
    # encode_prompt writes its chat template into the list that it is given
    ragged, _ = pipe.encode_prompt([*captions], device=pipe.text_encoder.device, do_classifier_free_guidance=False)
    mask = pad_sequence([torch.ones_like(hidden[:, 0]) for hidden in ragged], batch_first=True).bool()
    return {"encoder_hidden_states": pad_sequence(ragged, batch_first=True), "encoder_hidden_states_mask": mask}


def predict(
    denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], frames: Tensor
) -> Tensor:
    """The flow's velocity, each caption at its own length: the transformer pads with a token that it has learnt."""
    answer = denoiser(list(latents[:, :, None].unbind()), (1000 - timesteps) / 1000, _ragged(conditioning)).sample
    return -torch.stack(answer)[:, :, 0]


def _ragged(conditioning: Mapping[str, Tensor]) -> list[Tensor]:
    """Each caption without its padding."""
    hidden, mask = conditioning["encoder_hidden_states"], conditioning.get("encoder_hidden_states_mask")
    if mask is None:
        return list(hidden.unbind())
    return [tokens[:length] for tokens, length in zip(hidden, mask.sum(1).tolist(), strict=True)]


def blank(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """512 tokens of the language model."""
    return {"encoder_hidden_states": torch.empty(1, 512, config["cap_feat_dim"], device="meta")}


def arguments(pipe: Any, drawing: Drawing) -> dict[str, Any]:
    """Prompts, and guidance counted from 0, where there is none, and not from 1 as elsewhere."""
    plain = plain_arguments(pipe, drawing)
    return {**plain, "guidance_scale": max(0.0, drawing.guidance_scale - 1)}


def native_side(pipe: Any) -> int:
    """1024 pixels: the config knows no size, and this is what the pipeline draws by itself."""
    return NATIVE_SIDE


def scheduler_time(timestep: Tensor) -> Tensor:
    """The transformer's 0 (noise) to 1 in the scheduler's 1000 to 0."""
    return 1000 - 1000 * timestep


_BLOCK = "(layers|context_refiner|noise_refiner).#"

SIGNATURE = Signature(
    parts={
        "transformer": PartSignature(
            paths=(
                f"{_BLOCK}.attention.{ATTENTION_NAMES}",
                f"{_BLOCK}.feed_forward.(w1|w2|w3)",
                f"{_BLOCK}.(attention_norm1|attention_norm2|ffn_norm1|ffn_norm2|adaLN_modulation.#)",
                "(t_embedder.mlp.#|cap_embedder.#|all_x_embedder.#-#|rope_embedder)",
                "all_final_layer.#-#.(linear|norm_final|adaLN_modulation.#)",
            ),
            sizes=(transformer_size(3840, {"layers": 30, "context_refiner": 2, "noise_refiner": 2}),),
        ),
        "text_encoder": decoder_signature(36, 2560),
    },
    called="z-?image(-|$)",
)

Z_IMAGE = Family(
    name="z-image",
    names=ToolNames("Z-Image", "z_image"),
    pipeline_classes=("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    denoiser=TRANSFORMER,
    text_encoders=(QWEN,),
    encode=encode,
    predict=predict,
    codec=SCALED,
    blank=blank,
    signature=SIGNATURE,
    arguments=arguments,
    native_side=native_side,
    patch=2,
    scheduler_time=scheduler_time,
)
