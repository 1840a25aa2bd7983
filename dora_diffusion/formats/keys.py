"""Keys of adapter files: which layer, and which part of what changes it. `lora_unet_..._to_q.lora_down.weight` -> down.

Every tool's spellings are read, whatever the format; which of them a format writes is a `Suffixes` record.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

# Parts that are kept under LyCORIS' own names.
FACTORS = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_t1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "diff",
)
# Parts of changes that are made of the base's weight: OFT and BOFT, GLoRA, (IA)^3 (whose gains end in `.weight`), and
# what replaces it.
ROTATION = ("oft_blocks", "rescale")
GLORA = ("glora_a1", "glora_a2", "glora_b1", "glora_b2", "glora_bm")
IA3 = ("ia3_weight", "on_input")
REPLACED = ("set_weight",)  # ComfyUI's: what takes the place of the weight
BASE_MADE = (*ROTATION, *GLORA, *IA3, *REPLACED)
WIDENED = "reshape_weight"  # ComfyUI's: the shape that the base's weight is filled up to with zeros
_PARTS = (
    *(*FACTORS, *ROTATION, *REPLACED, WIDENED, "on_input"),
    *("diff_b", "w_norm", "b_norm", "alpha", "dora_scale", "magnitude"),
)
_PAIR = {"A": "down", "B": "up", "down": "down", "up": "up", "mid": "mid"}


@dataclass(frozen=True)
class Key:
    """What a key says.

    Attributes:
        name: the layer, as the file spells it, prefix included.
        part: down, up, mid, alpha, magnitude (PEFT's and ai-toolkit's), dora_scale, up_bias, or a name of LyCORIS'.
        style: whose spelling it is: "peft", "kohya", "old", "xlabs", "ai-toolkit"; "any" for what several write.
    """

    name: str
    part: str
    style: str


# (pattern, style); the groups are the layer, and what follows decides the part. The first that fits counts.
_XLABS = re.compile(r"^(.*\b(?:double|single)_blocks\.\d+\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight$")
_OLD_PROCESSOR = re.compile(r"^(.+)\.processor\.(\w+)_lora\.(down|up)\.weight$")
_OLD_LAYER = re.compile(r"^(.+)\.(?:lora_linear_layer|lora)\.(down|up)\.weight$")
_LOW_RANK = re.compile(r"^(.+)\.lora_(A|B|down|up|mid)(?:\.(?!weight$)\w+)?\.weight$")
_EMBEDDING = re.compile(r"^(.+)\.lora_embedding_(A|B)(?:\.\w+)?$")
_MAGNITUDE = re.compile(r"^(.+)\.lora_magnitude_vector(?:\.(?!weight$)\w+)?(?:\.weight)?$")
_BIAS = re.compile(r"^(.+)\.lora_(?:B|up)(?:\.(?!bias$)\w+)?\.bias$")
_GLORA = re.compile(r"^(.+)\.(a1|a2|b1|b2|bm)\.weight$")
_PART = re.compile(rf"^(.+)\.({'|'.join(_PARTS)})$")


def parse_key(key: str) -> Key | None:
    """The layer and part that a key names; None for a key of no adapter."""
    if found := _PART.match(key):
        style = {"magnitude": "ai-toolkit", "alpha": "alpha"}.get(found[2], "any")
        return Key(found[1], found[2], style)
    if key.endswith(".weight") and (weight := _parse_weight(key)) is not None:
        return weight
    if found := _EMBEDDING.match(key):
        return Key(found[1], _PAIR[found[2]], "peft")
    if found := _MAGNITUDE.match(key):
        return Key(found[1], "magnitude", "peft")
    if found := _BIAS.match(key):
        return Key(found[1], "up_bias", "any")
    return None


def _parse_weight(key: str) -> Key | None:
    """As `parse_key`, of the keys that end as a layer's own weight does."""
    if ".processor." in key and (found := _XLABS.match(key)):
        return Key(found[1], found[2], "xlabs")
    if found := _OLD_PROCESSOR.match(key):
        path, layer, half = found.groups()
        return Key(f"{path}.{'to_out.0' if layer == 'to_out' else layer}", half, "old")
    if found := _OLD_LAYER.match(key):
        return Key(found[1], found[2], "old")
    if found := _LOW_RANK.match(key):
        return Key(found[1], _PAIR[found[2]], "peft" if found[2] in "AB" else "kohya")
    if found := _GLORA.match(key):
        return Key(found[1], f"glora_{found[2]}", "any")
    return None


def parse_keys(keys: Iterable[str]) -> dict[str, Key]:
    """Key -> layer and part, of the keys of one file that are an adapter's."""
    keys = list(keys)
    parsed = {key: found for key in keys if (found := parse_key(key)) is not None}
    gains = {f"{found.name}.weight": found.name for found in parsed.values() if found.part == "on_input"}
    return {**parsed, **{key: Key(gains[key], "ia3_weight", "any") for key in keys if key in gains}}


@dataclass(frozen=True)
class Suffixes:
    """How a format spells the parts that it can hold.

    Attributes:
        spell: (layer as the file spells it, part) -> key; None for a part that the format cannot hold.
        folds_scale: there is no alpha: the scale is multiplied into B.
        flat_magnitude: magnitudes are (out,), or (1, out, 1, 1) for convolutions, and of the out axis only; else
            they are shaped, (out, 1) or (1, in), which tells the axis on square layers too.
    """

    spell: Callable[[str, str], str | None]
    folds_scale: bool
    flat_magnitude: bool

    def holds(self, part: str) -> bool:
        """Whether some layer's part of this name has a spelling."""
        return self.spell("layer", part) is not None


def _after(spelling: Mapping[str, str]) -> Callable[[str, str], str | None]:
    """The part is what follows the layer's name."""

    def spell(layer: str, part: str) -> str | None:
        return f"{layer}{spelling[part]}" if part in spelling else None

    return spell


def _spell_old(layer: str, part: str) -> str | None:
    """Attention of a denoiser was named by its processor, linear layers of text encoders by `lora_linear_layer`."""
    if part not in ("down", "up"):
        return None
    if found := re.match(r"^(.+)\.(to_q|to_k|to_v|to_out(?=\.0)|add_k_proj|add_v_proj)(?:\.0)?$", layer):
        return f"{found[1]}.processor.{found[2]}_lora.{part}.weight"
    kind = "lora_linear_layer" if layer.startswith("text_encoder") else "lora"
    return f"{layer}.{kind}.{part}.weight"


_KEPT = {part: f".{part}" for part in (*FACTORS, "diff_b", "w_norm", "b_norm", "alpha", "dora_scale")}
_AB = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
_PEFT = _after({**_AB, "magnitude": ".lora_magnitude_vector.weight"})
_PEFT_EMBEDDING = {"down": ".lora_embedding_A", "up": ".lora_embedding_B"}
# Tables of transformers' text encoders: what they are is told by their names alone.
_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:(?:token|position|word|token_type)_embeddings?|shared|embed_tokens|relative_attention_bias)$"
)


def _spell_peft(layer: str, part: str) -> str | None:
    """PEFT calls the halves of an embedding's pair otherwise."""
    if part in _PEFT_EMBEDDING and _EMBEDDINGS.search(layer):
        return f"{layer}{_PEFT_EMBEDDING[part]}"
    return _PEFT(layer, part)


PEFT = Suffixes(_spell_peft, folds_scale=True, flat_magnitude=True)
KOHYA = Suffixes(
    _after({"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight", **_KEPT}),
    folds_scale=False,
    flat_magnitude=False,
)
# ComfyUI's and OneTrainer's: PEFT's names for A and B, kohya's for the rest.
MIXED = Suffixes(_after({**_AB, "mid": ".lora_mid.weight", **_KEPT}), folds_scale=False, flat_magnitude=False)
AI_TOOLKIT = Suffixes(_after({**_AB, "magnitude": ".magnitude"}), folds_scale=True, flat_magnitude=True)
OLD_DIFFUSERS = Suffixes(_spell_old, folds_scale=True, flat_magnitude=True)
