"""Options of what is trained: sd-scripts' networks and LyCORIS."""

import re
from typing import Any

from dora_diffusion.training.import_config.kohya.steps import network, trains_text
from dora_diffusion.training.import_config.records import (
    Answer,
    Row,
    Source,
    copied,
    lost,
    needless,
    to,
    unneeded,
    without,
)
from dora_diffusion.training.import_config.values import flag, number, real, text, whole

_CONVOLUTIONS = r"conv1|conv2|(?:down|up)samplers\.\d+\.conv"


def _network_module(value: Any, source: Source) -> Answer:
    module = text(value).lower()
    if "lycoris" in module:
        return _lycoris_layers(source)
    if re.search(r"oft|dylora|lora_fa|lllite", module):
        return lost("no counterpart: a DoRA or LoRA is trained here")
    if _has_convolutions(source):
        return to("adapter.target_modules", "all")
    says = "modulation layers are left alone: `all` takes them" if network(source) in {"flux", "sd3"} else ""
    return to("adapter.target_modules", "all-linear", says)


def _lycoris_layers(source: Source) -> Answer:
    preset = str(source.get("network_args.preset", "full")).lower()
    known = {"full": "all", "full-lin": "all-linear", "attn-mlp": "all-linear", "attn-only": "attention"}
    known |= {"unet-transformer-only": "all-linear", "unet-convblock-only": "all"}
    if preset not in known:
        raise ValueError(f"LyCORIS's preset {preset} is not known here; name the layers in adapter.target_modules")
    return to("adapter.target_modules", known[preset], f"LyCORIS's preset {preset}")


def _lora_type(value: Any, source: Source) -> Answer:
    kind = text(value).lower()
    if re.search(r"loha|lokr|ia3|dylora|oft|glora|diag|boft|bdlora|vblora", kind):
        return lost("no counterpart: a DoRA or LoRA is trained here")
    if "locon" in kind:
        return _lycoris_layers(source) if "lycoris" in kind else to("adapter.target_modules", "all")
    return to("adapter.target_modules", "all-linear")


def _algo(value: Any, source: Source) -> Answer:
    if str(value).lower() in {"lora", "locon"}:
        return needless("as here")
    return lost("no counterpart: a DoRA or LoRA is trained here")


def _dora(value: Any, source: Source) -> Answer:
    on = flag(value)
    return to("adapter.use_dora", on, "" if on else "a plain LoRA, as there; true trains magnitudes too")


def _has_convolutions(source: Source) -> bool:
    """Whether 3x3 convolutions are trained: then those of the UNet are among the layers here."""
    if network(source) in {"flux", "sd3", "lumina"} or source.get("LoRA_type") == "Standard":
        return False
    if network(source) == "lycoris":
        return str(source.get("network_args.preset", "full")).lower() in {"full", "unet-convblock-only"}
    return bool(number(source.get("network_args.conv_dim", 0)))


def _of_convolutions(key: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        read = whole if key == "rank" else real
        if not number(value):
            return needless("off there too")
        if not _has_convolutions(source):
            return needless("convolutions are not trained")
        if number(value) == number(source.get("network_dim" if key == "rank" else "network_alpha", 0)):
            return needless(f"as everywhere else: adapter.{key}")
        return to(f"adapter.{key}_pattern", {_CONVOLUTIONS: read(value)})

    return convert


def _weight_norm(value: Any, source: Source) -> Answer:
    limit = real(value)
    return to("optim.max_weight_norm", limit) if limit else needless("off there too")


def _unet_only(value: Any, source: Source) -> Answer:
    if not trains_text(source):
        return to("adapter.train_text_encoder", False)
    if source.has("text_encoder_lr"):
        return needless("text_encoder_lr decides")
    last = {"flux": ["text_encoder"], "sd3": ["text_encoder", "text_encoder_2"]}.get(network(source), True)
    return to("adapter.train_text_encoder", last, "sd-scripts trains text encoders too unless it is told not to")


NETWORK: list[Row] = [
    Row(
        "network_module",
        ("adapter.target_modules",),
        "networks.lora: `all-linear`, with conv_dim `all`; LyCORIS: by its preset",
        _network_module,
        "networks.lora",
    ),
    Row("LoRA_type", ("adapter.target_modules",), "of the GUI, likewise", _lora_type, "Standard"),
    copied("network_dim", "adapter.rank", 16, read=whole, unset=4),
    copied("network_alpha", "adapter.alpha", 8.0, read=real, unset=1.0),
    copied("network_dropout", "adapter.dropout", 0.1, read=real),
    Row(
        "network_train_unet_only",
        ("adapter.train_text_encoder",),
        "false; sd-scripts trains text encoders unless told not to",
        _unet_only,
        True,
        unset=False,
    ),
    Row(
        "network_train_text_encoder_only",
        ("adapter.train_unet",),
        "false",
        lambda value, source: to("adapter.train_unet", not flag(value)),
        True,
        beside={"text_encoder_lr": 1e-5},
    ),
    Row(
        "network_args.algo",
        (),
        "lora and locon are trained here, as DoRA with dora_wd; other kinds are only read",
        _algo,
        "loha",
    ),
    Row("network_args.dora_wd", ("adapter.use_dora",), "", _dora, "True", unset=False),
    Row(
        "network_args.conv_dim",
        ("adapter.rank_pattern",),
        "of the UNet's 3x3 convolutions",
        _of_convolutions("rank"),
        4,
        beside={"network_dim": 16, "network_module": "networks.lora"},
    ),
    Row(
        "network_args.conv_alpha",
        ("adapter.alpha_pattern",),
        "likewise",
        _of_convolutions("alpha"),
        2,
        beside={"network_alpha": 16, "network_module": "networks.lora", "network_args.conv_dim": 4},
    ),
    *unneeded("with network_module", "network_args.preset", example="full"),
    copied("network_args.rs_lora", "adapter.use_rslora", "True", read=flag),
    copied("network_args.loraplus_lr_ratio", "optim.loraplus_lr_ratio", 16.0, read=real),
    copied("network_args.loraplus_unet_lr_ratio", "optim.loraplus_lr_ratio", 16.0, read=real),
    *without("one ratio for all: `optim.loraplus_lr_ratio`", "network_args.loraplus_text_encoder_lr_ratio", example=4),
    *without("magnitudes are per output here", "network_args.wd_on_output", off=("true", True), example="False"),
    *without(
        "dropout is on single numbers of the low-rank branch: `adapter.dropout`",
        "network_args.rank_dropout network_args.module_dropout network_args.rank_dropout_scale",
        example=0.1,
    ),
    *without(
        "name layers in `adapter.target_modules`, ranks in `adapter.rank_pattern`",
        (
            "network_args.train_blocks network_args.train_double_block_indices "
            "network_args.train_single_block_indices network_args.network_reg_dims network_args.block_dims "
            "network_args.block_alphas network_args.conv_block_dims network_args.conv_block_alphas "
            "network_args.img_attn_dim network_args.txt_attn_dim network_args.img_mlp_dim "
            "network_args.txt_mlp_dim network_args.img_mod_dim network_args.txt_mod_dim "
            "network_args.single_dim network_args.single_mod_dim network_args.in_dims"
        ),
        off=("all",),
        example="single",
    ),
    *without(
        "set `optim.lr_pattern`, by the layers' names: `{unet.down_blocks.*: 0.5}`",
        (
            "network_args.down_lr_weight network_args.mid_lr_weight network_args.up_lr_weight "
            "network_args.block_lr_zero_threshold network_args.network_reg_lrs block_lr"
        ),
        example="0.5",
    ),
    *without(
        "no counterpart",
        (
            "network_args.use_tucker network_args.use_scalar network_args.train_norm "
            "network_args.bypass_mode network_args.ggpo_beta network_args.ggpo_sigma network_args.split_qkv "
            "network_args.decompose_both network_args.constraint"
        ),
        example="True",
    ),
    *without("no counterpart: it is of LoKr", "network_args.factor", off=(-1, "-1"), example=8),
    Row("scale_weight_norms", ("optim.max_weight_norm",), "magnitudes stay", _weight_norm, 1.0),
    *unneeded("with text_encoder_lr", "network_args.train_t5xxl", example="False"),
    *without("set `adapter.rank` to that file's", "dim_from_weights", example=True),
]
