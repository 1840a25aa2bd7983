"""Options of what is trained."""

from typing import Any

from dora_diffusion.training.import_config.ai_toolkit.data import only
from dora_diffusion.training.import_config.records import (
    Answer,
    Row,
    Source,
    copied,
    lost,
    needless,
    several,
    to,
    unneeded,
    without,
)
from dora_diffusion.training.import_config.values import number, real, text, whole


def _type(value: Any, source: Source) -> Answer:
    kind = text(value).lower()
    layers = {} if _says_layers(source) else {"adapter.target_modules": "all-linear"}
    if kind == "dora":
        return several({"adapter.use_dora": True, **layers})
    if kind in {"lora", "lierla", "c3lier", "locon"}:
        says = "a plain LoRA, as there; use_dora true trains magnitudes too"
        return several({"adapter.use_dora": False, **layers}, says)
    return lost("no counterpart: a DoRA or LoRA is trained here, other kinds are only read")


def _says_layers(source: Source) -> bool:
    names = ("network.network_kwargs.only_if_contains", "model.only_if_contains")
    return bool(number(source.get("network.conv", 0))) or any(source.has(name) for name in names)


def _rank(value: Any, source: Source) -> Answer:
    return needless("rank decides") if source.has("network.rank") else to("adapter.rank", whole(value))


def _alpha(value: Any, source: Source) -> Answer:
    """Where linear_alpha is not given, alpha stands for it."""
    found = value if source.has("network.linear_alpha") else source.get("network.alpha", value)
    return to("adapter.alpha", real(found))


def _layers(value: Any, source: Source) -> Answer:
    """Rows of what decides which layers: `conv` takes convolutions too."""
    if not number(value):
        return needless("off there too")
    return to("adapter.target_modules", "all", "and its rank in `adapter.rank_pattern`, where it is another")


NETWORK: list[Row] = [
    Row(
        "network.type",
        ("adapter.use_dora", "adapter.target_modules"),
        "dora true, lora false, both `all-linear`; lokr and others are only read",
        _type,
        "dora",
        unset="lora",
    ),
    Row("network.linear", ("adapter.rank",), "", _rank, 16, unset=4),
    copied("network.rank", "adapter.rank", 16, read=whole),
    Row("network.linear_alpha", ("adapter.alpha",), "", _alpha, 16.0, unset=1.0),
    *unneeded("linear_alpha, or this where it is not given, is `adapter.alpha`", "network.alpha", example=16.0),
    copied("network.dropout", "adapter.dropout", 0.1, read=real),
    Row(
        "network.conv", ("adapter.target_modules",), "`all`, with `adapter.rank_pattern` for another rank", _layers, 16
    ),
    *unneeded("with conv", "network.conv_alpha", example=16),
    copied("network.pretrained_lora_path", "adapter.start", "old.safetensors", read=text),
    Row(
        "network.network_kwargs.only_if_contains",
        ("adapter.target_modules",),
        "a regular expression",
        only,
        ["transformer_blocks.20"],
    ),
    *without(
        "name the layers in `adapter.target_modules`",
        "network.network_kwargs.* network.all_layers model.ignore_if_contains",
        example=["x"],
    ),
    Row("model.only_if_contains", ("adapter.target_modules",), "a regular expression", only, ["transformer_blocks.20"]),
    *unneeded("of LoKr", "network.lokr_full_rank network.lokr_factor network.old_lokr_format", example=8),
    *unneeded(
        "text encoders have a switch of their own here",
        "network.transformer_only network.split_multistage_loras",
        example=True,
    ),
    *without("no counterpart yet for blocks on the CPU", "network.layer_offloading", example=True),
    *without("no counterpart", "network.lorm.*", example="ratio"),
]
