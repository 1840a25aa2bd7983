"""The file formats that are one safetensors file, as values: whose names, which prefixes, which endings.

All are read by one reader; a dialect says how one is recognised and how it is written. Sources: diffusers'
`loaders/lora_conversion_utils.py`, kohya-ss/sd-scripts `networks/`, LyCORIS `wrapper.py` and `kohya.py`, OneTrainer
`modules/util/convert_lora_util.py`, ComfyUI `comfy/lora.py`, ai-toolkit `toolkit/network_mixins.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dora_diffusion.families import family_named
from dora_diffusion.families.record import OTHER_COMPONENTS
from dora_diffusion.formats.keys import AI_TOOLKIT, KOHYA, MIXED, OLD_DIFFUSERS, PEFT, Suffixes

Prefixes = Mapping[str, str]


@dataclass(frozen=True)
class Signs:
    """What is seen in a file's keys.

    Attributes:
        prefixes: of its layers, as `layer_lookup` has them.
        styles: spellings of the parts, as `keys` has them.
        has_original_names: some layer is called as its makers call it.
        has_pieces: some layer is a numbered piece of a fused one.
        has_debris: PEFT's own prefix stands before layers.
    """

    prefixes: frozenset[str]
    styles: frozenset[str]
    has_original_names: bool
    has_pieces: bool
    has_debris: bool

    def starts(self, *prefixes: str) -> bool:
        """Whether some layer has one of these prefixes."""
        return bool(self.prefixes & set(prefixes))


@dataclass(frozen=True)
class Dialect:
    """One format.

    Attributes:
        name: what users call it.
        about: who writes it, for people.
        recognises: signs of a file -> whether it is this format, given that none before it was.
        suffixes: how parts are spelt.
        prefixes: component, or what tools call a text encoder (`Signature.encoders`) -> prefix. A family's own word
            goes before the component; a component with neither cannot be written.
        reads: further prefixes that stand in its files -> what lies behind them, as `layer_lookup` has it.
        is_flat: layers are flattened with underscores.
        has_original_names: denoisers bear their makers' names.
        diffusers_for: families whose denoiser bears diffusers' names in the tool's own files all the same.
        takes_any_model: layers of models that are not known here can be written: its readers ask the model itself.
        has_pieces: original fused layers are written piece by piece, numbered.
        keeps_text_model: CLIP's layers carry `text_model.`.
        is_written: whether files are written so, too; the tools of the others read diffusers' format as well.
    """

    name: str
    about: str
    recognises: Callable[[Signs], bool]
    suffixes: Suffixes
    prefixes: Prefixes
    reads: Mapping[str, str] = field(default_factory=dict)
    is_flat: bool = False
    has_original_names: bool = False
    diffusers_for: frozenset[str] = frozenset()
    takes_any_model: bool = False
    has_pieces: bool = False
    keeps_text_model: bool = True
    is_written: bool = True

    def prefix(self, component: str, family: str | None) -> str | None:
        """What stands before a component's layers; None where it cannot be written."""
        known = family_named(family)
        words = {} if known is None else known.signature.encoders
        names = [word for word, part in words.items() if part == component and word in self.prefixes]
        return self.prefixes.get((names or [component])[0])

    def uses_original_names(self, family: str | None) -> bool:
        """Whether the denoiser of a family is called as its makers call it."""
        return self.has_original_names and family not in self.diffusers_for


COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", *OTHER_COMPONENTS)
_DIFFUSERS = {name: f"{name}." for name in COMPONENTS}
_NUMBERED = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
_FLAT_ENCODERS = {**_NUMBERED, "te": "lora_te_", "te3": "lora_te3_"}
DIFFUSERS = Dialect(
    name="diffusers",
    about="diffusers' save_lora_weights, PEFT's names in one file",
    recognises=lambda signs: not signs.has_original_names and signs.starts(*_DIFFUSERS.values()),
    suffixes=PEFT,
    prefixes=_DIFFUSERS,
    takes_any_model=True,
)
KOHYA_SS = Dialect(
    name="kohya",
    about="kohya-ss/sd-scripts, and LyCORIS inside it; read by A1111, Forge, ComfyUI",
    recognises=lambda signs: signs.starts("lora_unet_", *_FLAT_ENCODERS.values()),
    suffixes=KOHYA,
    prefixes={"unet": "lora_unet_", "transformer": "lora_unet_", **_FLAT_ENCODERS},
    is_flat=True,
    has_original_names=True,
    # whose own trainers, musubi-tuner and OneTrainer, write Z-Image and Sana so; ComfyUI wants `comfyui` of Z-Image
    diffusers_for=frozenset({"sd1", "sd2", "sana", "z-image"}),
)
COMFYUI = Dialect(
    name="comfyui",
    about="ComfyUI's own names, OneTrainer's for ComfyUI",
    recognises=lambda signs: any(p.startswith(("diffusion_model.", "text_encoders.")) for p in signs.prefixes),
    suffixes=MIXED,
    prefixes={
        **{"unet": "diffusion_model.", "transformer": "diffusion_model."},
        **{name: f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_h", "clip_g", "t5xxl")},
    },
    reads={"model.diffusion_model.": "denoiser"},
    has_original_names=True,
)
LYCORIS = Dialect(
    name="lycoris",
    about="LyCORIS' wrapper (SimpleTuner): the denoiser in diffusers' names",
    recognises=lambda signs: signs.starts("lycoris_"),
    suffixes=KOHYA,
    prefixes={"unet": "lycoris_", "transformer": "lycoris_", **_FLAT_ENCODERS},
    reads={"lycoris_": "any"},  # a wrapper around a text encoder writes the same
    is_flat=True,
    takes_any_model=True,
)
OLD = Dialect(
    name="old-diffusers",
    about="diffusers before 0.20: attention processors",
    recognises=lambda signs: "old" in signs.styles,
    suffixes=OLD_DIFFUSERS,
    # of the models that there were then; nobody reads a transformer's so
    prefixes={name: _DIFFUSERS[name] for name in ("unet", "text_encoder", "text_encoder_2")},
)
OSTRIS = Dialect(
    name="ai-toolkit",
    about="ostris/ai-toolkit's DoRA of transformers",
    recognises=lambda signs: "ai-toolkit" in signs.styles and not signs.has_original_names,
    suffixes=AI_TOOLKIT,
    prefixes=_DIFFUSERS,
)
ONETRAINER_LEGACY = Dialect(
    name="onetrainer-legacy",
    about="OneTrainer's older files: kohya's prefixes, diffusers' names",
    recognises=lambda signs: signs.starts("lora_transformer_"),
    suffixes=KOHYA,
    prefixes={"unet": "lora_unet_", "transformer": "lora_transformer_", **_NUMBERED},
    is_flat=True,
)
ORIGINAL = Dialect(
    name="original",
    about="OneTrainer's `original`: the denoiser alone, in its original names, without a prefix",
    recognises=lambda signs: signs.prefixes == {""} and signs.has_original_names,
    suffixes=MIXED,
    prefixes={"unet": "", "transformer": ""},
    has_original_names=True,
)
OMI = Dialect(
    name="omi",
    about="Open Model Initiative, OneTrainer's format until 2026: original names, fused layers in numbered pieces",
    recognises=lambda signs: (
        signs.has_pieces
        or signs.starts("clip_l.", "clip_g.", "t5.")
        or (signs.has_original_names and signs.starts("unet.", "transformer."))
    ),
    suffixes=KOHYA,
    prefixes={
        **{"unet": "unet.", "transformer": "transformer."},
        **{"text_encoder": "clip_l.", "text_encoder_2": "clip_g.", "text_encoder_3": "t5.", "t5": "t5."},
    },
    has_original_names=True,
    has_pieces=True,
)
BARE = Dialect(
    name="bare",
    about="diffusers' names without a prefix: Qwen-Image-Lightning, DiffSynth, state dicts of scripts",
    recognises=lambda signs: signs.prefixes == {""},
    suffixes=KOHYA,
    prefixes={},
    is_written=False,
)
XLABS = Dialect(
    name="xlabs",
    about="XLabs' FLUX.1: processors of attention",
    recognises=lambda signs: "xlabs" in signs.styles,
    suffixes=KOHYA,
    prefixes={},
    is_written=False,
)
PEFT_FILE = Dialect(
    name="peft",
    about="PEFT's save_pretrained, a folder for each component",
    recognises=lambda signs: signs.has_debris,
    suffixes=PEFT,
    prefixes={},  # `peft` writes the folders
    takes_any_model=True,
)

# In the order in which they are tried; the last three fit what the others left.
DIALECTS: tuple[Dialect, ...] = (
    XLABS,
    OLD,
    OSTRIS,
    PEFT_FILE,
    OMI,
    LYCORIS,
    ONETRAINER_LEGACY,
    KOHYA_SS,
    COMFYUI,
    ORIGINAL,
    DIFFUSERS,
    BARE,
)
