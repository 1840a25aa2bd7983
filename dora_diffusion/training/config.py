"""The configuration of a training run: one typed YAML file, checked once, whole, before anything is loaded.

    config = TrainConfig.from_yaml("subject.yaml", {"optim.steps": "400"})

Every mistake in it is a ValueError of one line that names the file, its line, the key, what was got and what was
expected. (A TrainConfig built in Python raises pydantic's ValidationError, which is a ValueError of several lines.)
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dora_diffusion.training import yaml_config
from dora_diffusion.training.known_optimisers import OPTIMISERS, Optimiser, OptimiserName

_DEVICES = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")

# Paths in the file are relative to the file; `output_dir` is relative to the current directory.
_PATHS_BESIDE_FILE = (
    *("base.transformer", "base.unet", "base.vae", "base.adapters"),
    *("data.instance_dir", "data.cache_dir", "data.validation_dir", "data.concepts[].dir"),
    *("prior.class_dir", "adapter.start", "evaluation.truth_dir"),
)


def _to_path(value: Any) -> Any:
    """Text -> absolute path, so that a saved configuration means the same from any directory."""
    if isinstance(value, (str, Path)) and str(value):
        return Path(os.path.abspath(os.path.expanduser(value)))
    return value


def _to_number(value: Any) -> Any:
    """`1e-4` -> 0.0001: YAML 1.1 takes a number without a dot for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _no_is_a_word(value: Any) -> Any:
    """`no` -> "no": YAML 1.1 takes it for false."""
    return "no" if value is False else value


def _to_device(value: Any) -> Any:
    """A name of a device."""
    if isinstance(value, str) and not _DEVICES.fullmatch(value):
        raise PydanticCustomError("device", "Input should be auto, cpu, cuda, cuda:N, xpu, xpu:N or mps")
    return value


Location = Annotated[Path, BeforeValidator(_to_path)]
Number = Annotated[float, BeforeValidator(_to_number)]
Text = Annotated[str, Field(min_length=1)]
DeviceName = Annotated[str, BeforeValidator(_to_device)]
Rank = Annotated[int, Field(ge=1)]
Rate = Annotated[float, BeforeValidator(_to_number), Field(gt=0)]
Side = Annotated[int, Field(ge=8, multiple_of=8)]
DrawnSide = Annotated[int, Field(ge=64, le=4096, multiple_of=8)]
Strength = Annotated[float, BeforeValidator(_to_number)]
Option = Annotated[bool | int | float | list[Number] | None, BeforeValidator(_to_number)]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]
# Spelt out, for importing the library costs seconds; a test keeps the list true.
Export = Literal[
    "diffusers",
    "peft",
    "kohya",
    "comfyui",
    "lycoris",
    "ai-toolkit",
    "old-diffusers",
    "omi",
    "onetrainer-legacy",
    "original",
    "for-comfyui",
    "for-forge",
    "for-a1111",
    "for-invokeai",
    "for-sdnext",
    "for-diffusers",
]


class _Section(BaseModel):
    # Strict: `steps: true` is a mistake, not 1.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class CaptionsConfig(_Section):
    """How captions become the text of a step: by the seed, the epoch and the picture, and by nothing else."""

    from_file_name: bool = False
    """Pictures without a caption of their own take their file's name, its numbers and underscores left out."""
    shuffle: bool = False
    """Put the tags of a caption into another order each time."""
    keep_tokens: int = Field(default=0, ge=0)
    """How many tags at the start stay where they are, and are never dropped."""
    separator: Text = ","
    """What stands between tags."""
    tag_dropout: Number = Field(default=0.0, ge=0, lt=1)
    """Share of the tags that are left out, each time others."""
    dropout: Number = Field(default=0.0, ge=0, le=1)
    """Share of the samples that are trained with an empty caption."""
    wildcards: bool = False
    """Take one of the words of {red|green|blue} each time."""

    @property
    def are_open(self) -> bool:
        """Whether captions are made up that no picture has as it stands."""
        return self.shuffle or self.wildcards or self.tag_dropout > 0


class ConceptConfig(_Section):
    """One folder of pictures among several."""

    dir: Location
    """The folder, with captions as in data.instance_dir."""
    prompt: Text | None = None
    """Caption of every picture that has none of its own; null = data.instance_prompt."""
    trigger: Text | None = None
    """What stands for {} in its captions."""
    repeats: int = Field(default=1, ge=1, le=10_000)
    """How often an epoch shows each of its pictures."""
    weight: Number = Field(default=1.0, gt=0)
    """Weight of its pictures in the loss."""
    resolution: Side | Annotated[list[Side], Field(min_length=1)] | None = None
    """As data.resolution, of these pictures; null = that of data."""
    caption_dropout: Number | None = Field(default=None, ge=0, le=1)
    """Share of the samples with an empty caption; null = that of data."""
    role: Literal["instance", "class", "validation"] = "instance"
    """What it is for: learnt, kept as it is (prior preservation), or measured only."""

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Its own; empty when they are those of data."""
        return as_resolutions(self.resolution)

    @model_validator(mode="after")
    def _check(self) -> "ConceptConfig":
        if not os.path.isdir(self.dir):
            raise ValueError(f"data.concepts: dir {str(self.dir)!r}, expected an existing folder of pictures")
        return self


class DataConfig(_Section):
    """The pictures that are learnt."""

    instance_dir: Location | None = None
    """Folder of the pictures to learn, with their captions. Subfolders named as kohya names them, `10_zqx robot`, are
    read too, ten times an epoch. Null = concepts alone."""
    instance_prompt: Text | None = None
    """Caption of every picture that has none of its own; {} stands for the trigger."""
    trigger: Text | None = None
    """What stands for {} in captions."""
    concepts: list[ConceptConfig] = []
    """Further folders, each with a prompt, repeats, a weight and a role of its own."""
    captions: CaptionsConfig = CaptionsConfig()
    """How captions become the text of a step."""
    resolution: Side | Annotated[list[Side], Field(min_length=1)] | None = None
    """Side, in pixels, of a square of as many pixels as training pictures have; several = every picture at each; null =
    the model's own."""
    buckets: bool = True
    """Train each picture at the size, of a few, that is nearest to its own shape; false = crop all to squares."""
    upscale: bool = False
    """With buckets, make pictures larger that have fewer pixels; false = train those at a smaller size."""
    flip: bool = False
    """Mirror each picture left to right half of the time."""
    crop: Literal["center", "random"] = "center"
    """Which part of a picture is kept where its shape is not that of its bucket."""
    mask_outside: Number | None = Field(default=None, ge=0, le=1)
    """Weight in the loss of what masks leave out, beside 1 for the rest: 0 = it is not learnt. Masks are files
    (3_mask.png, 3-masklabel.png or masks/3.png for 3.jpg) or alpha channels; null = they are not used."""
    cache_variants: int = Field(default=0, ge=0, le=1000)
    """So many views of each picture (crop, flip) are drawn once, encoded once and kept; 0 = fresh ones each time."""
    cache_dir: Location | None = None
    """Folder that keeps encoded pictures and captions for this and other runs; null = in memory, for this run."""
    cache_memory: Number = Field(default=4.0, ge=0)
    """GiB of main memory for what is kept; what goes beyond is read from cache_dir, or made again."""
    caption_dropout: Number = Field(default=0.0, ge=0, le=1)
    """The same as captions.dropout, by its older name."""
    validation_share: Number = Field(default=0.0, ge=0, lt=1)
    """Share of the pictures that are not trained on but measured; 0 = none."""
    validation_dir: Location | None = None
    """Folder of pictures to measure, instead of a share of instance_dir."""

    @property
    def has_few_views(self) -> bool:
        """Whether pictures have so few views that each is worth keeping."""
        return self.crop == "center" or self.cache_variants > 0

    @property
    def holds_out(self) -> bool:
        """Whether pictures are measured that are not trained on."""
        has_folder = self.validation_dir is not None or any(one.role == "validation" for one in self.concepts)
        return has_folder or self.validation_share > 0

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        for name, folder in (("instance_dir", self.instance_dir), ("validation_dir", self.validation_dir)):
            if folder is not None and not os.path.isdir(folder):
                raise ValueError(f"data.{name}: got {str(folder)!r}, expected an existing folder of pictures")
        if self.instance_dir is None and not any(concept.role == "instance" for concept in self.concepts):
            raise ValueError("data.instance_dir: missing; expected a folder, or one among data.concepts")
        if self.caption_dropout and self.captions.dropout:
            raise ValueError(
                f"data.caption_dropout: got {self.caption_dropout} beside data.captions.dropout, expected one of them"
            )
        if self.validation_dir is not None and self.validation_share:
            raise ValueError(
                f"data.validation_share: got {self.validation_share} beside data.validation_dir, expected one of them"
            )
        return self


class PriorConfig(_Section):
    """Prior preservation: what the base does of the class, trained beside the subject's own pictures."""

    mode: Literal["generated", "folder", "adapter_off"] = "generated"
    """What is kept: pictures that the base draws (with no prompt, none); those of class_dir as they are; or what the
    base itself predicts, the adapter off, of class pictures if there are any, else of the subject's own."""
    caption: Literal["class", "blank", "instance"] | None = None
    """What base and adapter are asked with under adapter_off: class prompts in turn (a class picture's own caption),
    nothing, or the picture's own caption; null = class."""
    class_prompt: Text | None = None
    """Prompt of the class pictures, such as "a photo of a dog"; null, with no class_prompts = no prior preservation."""
    class_prompts: list[Text] = []
    """Several prompts, used in turn, instead of class_prompt."""
    class_dir: Location | None = None
    """Folder of class pictures; null = `class` in the output folder under generated, where the base draws those that
    are missing. Your own pictures there count, and are never touched."""
    class_images: int | None = Field(default=None, ge=1)
    """How many class pictures are trained; null = 40 under generated, else all that there are."""
    guidance_scale: Number | None = Field(default=None, ge=0, le=100)
    """Guidance of the class pictures that the base draws; null = the previews'. Strongly guided ones teach their
    saturation to the adapter, which the next guided drawing then doubles: 1 to 2 keeps what the base is."""
    weight: Number = Field(default=1.0, gt=0)
    """Weight of the class pictures' loss beside that of the subject."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every class prompt; empty when prior preservation is off."""
        return tuple(self.class_prompts) if self.class_prompt is None else (self.class_prompt,)

    @property
    def drawn_images(self) -> int:
        """How many class pictures there shall be under generated."""
        return self.class_images or 40

    @property
    def asked_with(self) -> Literal["class", "blank", "instance"]:
        """The captions of adapter_off."""
        return self.caption or "class"

    @model_validator(mode="after")
    def _check(self) -> "PriorConfig":
        if self.class_prompt is not None and self.class_prompts:
            raise ValueError(
                f"prior.class_prompts: got {self.class_prompts} beside prior.class_prompt, expected one of them"
            )
        if self.mode == "generated" and self.class_dir is not None and not self.prompts:
            raise ValueError(
                f"prior.class_dir: got {str(self.class_dir)!r} without prior.class_prompt, expected both or neither"
            )
        if self.mode == "folder" and self.class_dir is None:
            raise ValueError(
                "prior.mode: got 'folder' without prior.class_dir, expected a folder of class pictures there"
            )
        if self.mode != "adapter_off" and self.caption is not None:
            raise ValueError(
                f"prior.caption: got {self.caption!r} with prior.mode {self.mode!r}, expected null; it is adapter_off's"
            )
        if self.class_dir is not None and os.path.exists(self.class_dir) and not os.path.isdir(self.class_dir):
            raise ValueError(f"prior.class_dir: got the file {str(self.class_dir)!r}, expected a folder")
        if self.mode != "generated" and self.class_dir is not None and not os.path.isdir(self.class_dir):
            raise ValueError(
                f"prior.class_dir: got {str(self.class_dir)!r}, expected an existing folder of pictures, for "
                f"prior.mode {self.mode} draws none"
            )
        return self


class AdapterConfig(_Section):
    """What is trained."""

    rank: int = Field(default=8, ge=1)
    """Rank of each layer's low-rank pair."""
    alpha: Number = Field(default=8.0, gt=0)
    """The update's scale is alpha / rank."""
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    """Dropout probability on the low-rank branch."""
    use_dora: bool = True
    """Train magnitudes too (DoRA); false = a plain LoRA."""
    norm_grad: Literal["detached", "exact"] = "detached"
    """Whether the weight norm is a constant in the backward pass ("detached", as in the paper) or not."""
    target_modules: Text | list[Text] | None = None
    """Layers: a preset (attention, all-linear, all), a list of path endings, or a regex; null = attention."""
    use_rslora: bool = False
    """Rank-stabilised: the update's scale is alpha / sqrt(rank)."""
    rank_pattern: dict[Text, Rank] = {}
    """Ranks of some of the denoiser's layers: a regex for the end of their path -> rank; the first that fits."""
    alpha_pattern: dict[Text, Annotated[Number, Field(gt=0)]] = {}
    """Alphas of some of the denoiser's layers, likewise."""
    init: Literal["default", "gaussian", "orthogonal", "pissa"] = "default"
    """What the low-rank pair starts from; with pissa (the weight's principal part) the file has twice the rank."""
    train_magnitude: bool = True
    """False freezes the magnitudes at the base's, so that only directions are learnt."""
    train_unet: bool = True
    """Adapt the denoiser."""
    train_text_encoder: bool | list[Text] = False
    """Adapt the text encoders: true = every one that the base has, or a list of them (text_encoder, text_encoder_2)."""
    text_encoder_rank: Rank | dict[Text, Rank] | None = None
    """Rank in the text encoders, one for all or by name, {text_encoder_2: 4}; null = rank."""
    start: Location | None = None
    """An adapter to start from, a file of any format or a run's folder; it is the first step's adapter, at the ranks
    given here. Null = from nothing."""

    @model_validator(mode="after")
    def _check(self) -> "AdapterConfig":
        if self.start is not None and self.init == "pissa":  # whether it is there counts only where it is read
            raise ValueError(
                "adapter.start: got a file beside adapter.init 'pissa', which is another start; choose one"
            )
        return self


class WordsConfig(_Section):
    """Textual inversion: new words for the base's CLIP text encoders, learnt alone or together with the adapter."""

    starts: dict[Text, Text] = {}
    """New word -> text that it starts from, {"<zqx>": robot}; captions must hold the word. Empty = none."""
    vectors: int = Field(default=1, ge=1, le=32)
    """Vectors, and so tokens, of each word."""
    share: Number = Field(default=1.0, gt=0, le=1)
    """Share of the steps after which the vectors stay as they are; 0.5 is usual beside an adapter (pivotal tuning)."""


class OptimConfig(_Section):
    """How it is trained."""

    steps: int = Field(default=1000, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=1, ge=1)
    """Pictures in one forward pass, class pictures not counted."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Forward passes for one optimiser step."""
    optimizer: OptimiserName = "adamw"
    """The optimiser, each from its own library: adamw8bit is bitsandbytes', adafactor transformers'; the others are in
    the extra `optimisers`. schedulefree averages what it trains, and the average is drawn, measured and saved."""
    optimizer_options: dict[Text, Option] = {}
    """Further arguments of the optimiser's class, such as {d_coef: 2} or {betas: [0.9, 0.99]}."""
    learning_rate: Number | None = Field(default=None, gt=0)
    """Peak learning rate; null = what the optimiser's library advises: 1e-4 for adamw. For prodigy it is a factor of
    the rate that it finds, 1 by default."""
    text_encoder_learning_rate: Rate | dict[Text, Rate] | None = None
    """Peak learning rate in the text encoders, one for all or by name; null = learning_rate."""
    words_learning_rate: Number | None = Field(default=None, gt=0)
    """Peak learning rate of new words' vectors; null = five times the optimiser's advised one, 5e-4 for adamw."""
    lr_pattern: dict[Text, Annotated[Number, Field(ge=0)]] = {}
    """Learning rates of some layers: a regex for the end of their path, which begins with the component's name -> a
    factor of their component's rate, {unet.down_blocks.*: 0.5}; the first that fits, and 0 = they stand still."""
    loraplus_lr_ratio: Number = Field(default=1.0, gt=0)
    """LoRA+: the learning rate of B over that of A (arXiv 2402.12354 advises about 16, with a lower learning_rate)."""
    magnitude_lr_multiplier: Number = Field(default=1.0, ge=0)
    """The magnitudes' learning rate over learning_rate."""
    weight_decay: Number | None = Field(default=None, ge=0)
    """Weight decay of the low-rank pair; magnitudes never decay. Null = what the optimiser's library advises: 0.01 for
    adamw."""
    lr_scheduler: Schedule | None = None
    """Course of the learning rate, by diffusers' names; null = cosine, and constant for schedulefree."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises from 0 to its peak."""
    ema_decay: Number | None = Field(default=None, gt=0, lt=1)
    """Draw, measure and save an exponential moving average of what is trained, with this decay (0.99 to 0.9999), after
    n steps at most (1 + n) / (10 + n); null = none."""
    max_weight_norm: Number | None = Field(default=None, gt=0)
    """After each step a layer's update alpha / rank B A that is longer than this (Frobenius norm) is cut to it; null =
    never. Magnitudes stay."""
    max_grad_norm: Number = Field(default=1.0, ge=0)
    """Gradients longer than this are cut to it; 0 = never."""
    min_snr_gamma: Number | None = Field(default=5.0, gt=0)
    """Gamma of min-SNR weighting (arXiv 2303.09556), loss.weighting min_snr; null = every timestep weighs the same."""
    mixed_precision: Annotated[Literal["auto", "no", "fp16", "bf16"], BeforeValidator(_no_is_a_word)] = "auto"
    """Precision of the frozen weights and activations; what is trained stays fp32. auto = bf16 on a GPU that has it,
    fp16 on one that has not, no (fp32) on a CPU; a run that goes on keeps what it began with."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations twice."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of everything random in training."""
    preset: Literal["low-memory"] | None = None
    """Sets what is not set otherwise: low-memory = base.quantise nf4, optim.mixed_precision bf16 and
    optim.gradient_checkpointing; `--dry-run` estimates what that takes."""

    @property
    def kind(self) -> Optimiser:
        """The optimiser's record."""
        return OPTIMISERS[self.optimizer]

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the optimiser's class, those that its library advises among them."""
        given = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.optimizer_options.items()
        }
        own = {"warmup_steps": self.warmup_steps} if self.kind.averages else {}
        return {**self.kind.options, **given, **own}

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.kind.rate if self.learning_rate is None else self.learning_rate

    @property
    def words_rate(self) -> float:
        """The peak learning rate of new words."""
        own = self.rate if self.kind.one_rate else 5 * self.kind.rate
        return own if self.words_learning_rate is None else self.words_learning_rate

    @property
    def decay(self) -> float:
        """The weight decay of the low-rank pair."""
        return self.kind.decay if self.weight_decay is None else self.weight_decay

    @property
    def schedule(self) -> Schedule:
        """The course of the learning rate."""
        return self.lr_scheduler or self.kind.schedule

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.warmup_steps and self.schedule == "constant" and not self.kind.averages:
            raise ValueError(
                f"optim.warmup_steps: got {self.warmup_steps} with optim.lr_scheduler 'constant', which has none; "
                "expected 0, or 'constant_with_warmup'"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"optim.warmup_steps: got {self.warmup_steps}, expected at most optim.steps, which is {self.steps}"
            )
        if self.kind.averages:
            _check_averaging(self)
        if self.kind.one_rate:
            _check_one_rate(self)
        return self


def _check_averaging(optim: OptimConfig) -> None:
    """A ValueError for what an optimiser that averages by itself makes no sense of."""
    told = {
        "lr_scheduler": (None if optim.lr_scheduler == "constant" else optim.lr_scheduler, "whose rate stays"),
        "ema_decay": (optim.ema_decay, "which averages by itself"),
        "max_weight_norm": (optim.max_weight_norm, "whose average would not be cut"),
    }
    for key, (value, why) in told.items():
        if value is not None:
            raise ValueError(
                f"optim.{key}: got {value!r} with optim.optimizer {optim.optimizer!r}, {why}; expected null"
            )


def _check_one_rate(optim: OptimConfig) -> None:
    """A ValueError where parts would have rates of their own, which an optimiser that finds one for all cannot give."""
    text_rate = optim.text_encoder_learning_rate
    text_rates = text_rate.values() if isinstance(text_rate, dict) else [text_rate]
    rates = (None, optim.rate)
    told: dict[str, tuple[Any, bool, str]] = {
        "loraplus_lr_ratio": (optim.loraplus_lr_ratio, optim.loraplus_lr_ratio == 1, "1"),
        "magnitude_lr_multiplier": (optim.magnitude_lr_multiplier, optim.magnitude_lr_multiplier in (0, 1), "1 or 0"),
        "text_encoder_learning_rate": (text_rate, all(rate in rates for rate in text_rates), "null"),
        "words_learning_rate": (optim.words_learning_rate, optim.words_learning_rate in rates, "null"),
        "lr_pattern": (optim.lr_pattern, all(factor in (0, 1) for factor in optim.lr_pattern.values()), "0 or 1 each"),
    }
    for key, (value, fits, expected) in told.items():
        if not fits:
            raise ValueError(
                f"optim.{key}: got {value!r} with optim.optimizer {optim.optimizer!r}, which finds one rate for all; "
                f"expected {expected}"
            )


class GuardConfig(_Section):
    """What happens when a step goes wrong: it is skipped, then the last good state comes back, then the run stops."""

    spike: Number | None = Field(default=30.0, gt=1)
    """A step is wrong if its gradient is longer than so many times the median of those before; null = only if it, or
    the loss, is no finite number."""
    window: int = Field(default=64, ge=2, le=10_000)
    """Good steps that the median is taken over; before half as many are done there is none."""
    skips: int = Field(default=3, ge=1)
    """Wrong steps in a row after which the last good state comes back; those before are only skipped."""
    restores: int = Field(default=3, ge=0)
    """How often it may come back in a run before the run stops; 0 = never, and nothing is kept for it."""
    every: int = Field(default=20, ge=1)
    """Steps between copies of the last good state, in main memory: three times the adapter, with AdamW."""
    missing: Number = Field(default=0.1, ge=0, le=1)
    """Share of the pictures that may become unreadable while the run is on: their samples are left out. Beyond it a
    checkpoint is saved and the run stops."""


class TimestepsConfig(_Section):
    """Where in the schedule noise is drawn."""

    min: int = Field(default=0, ge=0, le=999)
    """The least timestep that is trained, of 1000; 0 is next to no noise."""
    max: int = Field(default=1000, ge=1, le=1000)
    """No timestep is above it, and of bases that predict epsilon or v it is itself none. Densities are squeezed in
    between."""
    density: Literal["uniform", "logit_normal", "mode", "beta"] | None = None
    """Density of the timesteps before a flow's shift (arXiv 2403.03206; beta: doi 10.1007/978-3-031-72646-0_7); null =
    uniform, of a flow what section flow says."""
    mean: Number = 0.0
    """Mean of logit_normal; above 0 leans to noise."""
    std: Number = Field(default=1.0, gt=0)
    """Deviation of logit_normal."""
    mode_scale: Number = Field(default=1.29, ge=-1, le=1.75)
    """How far "mode" is from uniform; 0 = not at all."""
    alpha: Number = Field(default=1.0, ge=1e-2, le=100)
    """Of beta, whose mean is alpha / (alpha + beta): the larger, the more noise."""
    beta: Number = Field(default=1.0, ge=1e-2, le=100)
    """Of beta: the larger, the less noise."""
    bias: Number = Field(default=1.0, gt=0, le=100)
    """Leans any density, to noise above 1 and to detail below, as a flow's shift does; it multiplies that."""

    @model_validator(mode="after")
    def _check(self) -> "TimestepsConfig":
        if self.min >= self.max:
            raise ValueError(f"loss.timesteps.min: got {self.min}, expected less than max, which is {self.max}")
        owners = {"mean": "logit_normal", "std": "logit_normal", "mode_scale": "mode", "alpha": "beta", "beta": "beta"}
        for name, density in owners.items():
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and self.density != density:
                raise ValueError(
                    f"loss.timesteps.{name}: got {value} with density {self.density or 'null'}, which has none; "
                    f"expected density {density} beside it"
                )
        return self


class LossConfig(_Section):
    """How wrong a prediction is, and of what noise. The validation loss is measured without any of it."""

    kind: Literal["mse", "huber"] = "mse"
    """mse = the squared error; huber = pseudo-Huber, which forgives what lies far off (arXiv 2403.16728)."""
    huber_c: Number = Field(default=0.1, ge=1e-4, le=100)
    """Where squares begin to turn into distances; under a schedule, at the noisiest timestep."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """Whether that is everywhere so, or falls from 1 at the clean picture to huber_c."""
    weighting: Literal["none", "min_snr", "debiased"] = "min_snr"
    """Weight of each timestep, of bases that predict epsilon or v: min_snr by optim.min_snr_gamma (null there = none);
    debiased estimation (arXiv 2310.08442). A flow is weighed by flow.weighting."""
    noise_offset: Number = Field(default=0.0, ge=0, le=1)
    """Strength of noise that is the same all over a channel, for very dark and bright pictures; 0.05 is usual."""
    noise_offset_random: bool = False
    """Draw that strength for each picture, between 0 and noise_offset."""
    input_perturbation: Number = Field(default=0.0, ge=0, le=1)
    """Strength of noise in the input that the target does not know of (arXiv 2301.11706); 0.1 is usual."""
    zero_terminal_snr: bool = False
    """Let the last timestep be pure noise (arXiv 2305.08891), of bases that predict v; best beside weighting none.
    Previews and class pictures are drawn so; what is drawn later must be, too: rescaled betas, trailing timesteps."""
    timesteps: TimestepsConfig = TimestepsConfig()
    """Where in the schedule noise is drawn."""

    @model_validator(mode="after")
    def _check(self) -> "LossConfig":
        if self.huber_schedule != "constant" and self.huber_c > 1:
            raise ValueError(
                f"loss.huber_c: got {self.huber_c} with loss.huber_schedule {self.huber_schedule!r}, which falls to it "
                "from 1; expected at most 1, or 'constant'"
            )
        if self.noise_offset_random and not self.noise_offset:
            raise ValueError("loss.noise_offset_random: got true without loss.noise_offset, expected both or neither")
        return self


class FlowConfig(_Section):
    """Noise of bases that are trained by flow matching (Stable Diffusion 3, FLUX ...); others leave it unused."""

    shift: Number | None = Field(default=None, gt=0, le=100)
    """Shift of the timesteps towards noise; null = what the base's scheduler draws with."""
    density: Literal["uniform", "logit_normal", "mode"] = "logit_normal"
    """Density of the timesteps before the shift, unless loss.timesteps.density says another."""
    logit_mean: Number = 0.0
    """The same as loss.timesteps.mean, beside the density here."""
    logit_std: Number = Field(default=1.0, gt=0)
    """The same as loss.timesteps.std, beside the density here."""
    mode_scale: Number = Field(default=1.29, ge=-1, le=1.75)
    """The same as loss.timesteps.mode_scale, beside the density here."""
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    """Weight of each timestep's loss."""


class PreviewPrompt(_Section):
    """One picture among the previews; what it leaves out is as for all."""

    prompt: Text
    """What is drawn."""
    negative: str = ""
    """What is not."""
    seed: int | None = Field(default=None, ge=0, le=2**32 - 1)
    """Seed of the noise."""
    size: DrawnSide | Annotated[list[DrawnSide], Field(min_length=2, max_length=2)] | None = None
    """Side of a square, or [width, height], in pixels; null = the model's own."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps."""
    guidance_scale: Number | None = Field(default=None, ge=0, le=100)
    """Classifier-free guidance."""
    strength: Number = Field(default=1.0, ge=-10, le=10)
    """Strength of what is trained; 0 = the base, with its new words."""

    @property
    def sides(self) -> tuple[int, int] | None:
        """(width, height); None for the model's own."""
        sides = [self.size, self.size] if isinstance(self.size, int) else self.size
        return None if sides is None else (sides[0], sides[1])

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"prompt": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _as_given(self, handler: SerializerFunctionWrapHandler) -> Any:
        """Text where nothing else is said."""
        fields = type(self).model_fields
        said = {name: value for name, value in handler(self).items() if value != fields[name].default}
        return said if len(said) > 1 else self.prompt


class PreviewConfig(_Section):
    """Pictures drawn in training, from fixed noise."""

    prompts: list[PreviewPrompt] = []
    """Prompts, each a text or {prompt, negative, seed, size, steps, guidance_scale, strength}; empty = no previews."""
    every: int = Field(default=0, ge=0)
    """Steps between previews; 0 = only at the end."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of the noise."""
    steps: int = Field(default=20, ge=1)
    """Denoising steps."""
    guidance_scale: Number = Field(default=4.0, ge=0)
    """Classifier-free guidance."""


class ValidationConfig(_Section):
    """The loss on fixed noise and timesteps: of held-out pictures; with none, of some that are trained."""

    every: int = Field(default=100, ge=0)
    """Steps between measurements; 0 = only at the end."""
    pictures: int | None = Field(default=None, ge=1)
    """At most so many are measured, from all over the set; null = 6, or all where repeats is given."""
    timesteps: int = Field(default=4, ge=1, le=100)
    """At so many timesteps each, the same at every measurement: they part those that are trained into equal shares."""
    repeats: int | None = Field(default=None, ge=1, le=1000)
    """Instead of timesteps: so many pairs of noise and timestep for each picture, drawn once at random."""
    patience: int | None = Field(default=None, ge=1)
    """End the run once so many measurements in a row were no better than the best before; null = never."""

    @property
    def at_most(self) -> int | None:
        """How many pictures are measured; None for all."""
        return 6 if self.pictures is None and self.repeats is None else self.pictures


class LoggingConfig(_Section):
    """Where numbers of the run go. Nothing leaves the machine unless a tracker is named that sends it."""

    trackers: list[Text] = ["tensorboard"]
    """Trackers by accelerate's names: tensorboard, wandb, mlflow, comet_ml ...; empty = none."""
    project: Text = "run"
    """Name of the project that they put the run into."""
    changes_every: int | None = Field(default=None, ge=0)
    """Steps between measurements of how far each block's weights have turned and stretched; 0 = only at the end; null =
    with the validation loss."""


class CheckpointConfig(_Section):
    """What a killed run goes on from."""

    every: int = Field(default=250, ge=0)
    """Steps between checkpoints; 0 = only at the end."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest stay."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest loss of held-out pictures, too."""
    final: Literal["last", "best"] = "last"
    """Which of them the run's adapter and words are; best needs keep_best."""


class EvaluationConfig(_Section):
    """What `dora-diffusion evaluate` measures after training."""

    truth_dir: Location | None = None
    """Folder of true pictures that were not trained on, with captions; the adapter is asked to draw those captions."""
    seeds: int = Field(default=4, ge=1)
    """How many pictures are drawn for each caption."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluationConfig":
        if self.truth_dir is not None and not os.path.isdir(self.truth_dir):
            raise ValueError(
                f"evaluation.truth_dir: got {str(self.truth_dir)!r}, expected an existing folder of pictures"
            )
        return self


Quantise = Literal["nf4", "int8", "fp8"]


class BaseConfig(_Section):
    """What the base is made of, and how it is held: files of their own for components, `.safetensors` (fp8 with scales
    too) or `.gguf`; quantised layers; adapters below."""

    transformer: Location | None = None
    """Weights of the transformer; null = the base's own."""
    unet: Location | None = None
    """Weights of the UNet; null = the base's own."""
    vae: Location | None = None
    """Weights of the VAE; null = the base's own."""
    quantise: Quantise | dict[Text, Quantise] | None = None
    """The denoiser's linear layers in nf4 (bitsandbytes), int8 or fp8 (torchao), or by component, {transformer: nf4,
    text_encoder_2: int8}. What is trained stays fp32, and is for the quantised base."""
    swap_blocks: int = Field(default=0, ge=0)
    """So many of the denoiser's blocks wait in main memory and are brought for their forward and backward: less memory
    of the device for more time, and the same numbers to the bit; 0 = all stay on the device."""
    compile: bool = False
    """Compile the denoiser's blocks (torch.compile): faster steps after a minute or more at the start, rounded
    otherwise; needs a C++ compiler, and Triton on a GPU."""
    adapters: dict[Location, Strength] = {}
    """Adapters below what is trained, frozen: file -> strength, {undo-turbo.safetensors: 1.0}. They are folded into the
    base, for which the adapter that is trained then is."""

    @model_validator(mode="after")
    def _check(self) -> "BaseConfig":
        for name in ("transformer", "unet", "vae"):
            file = getattr(self, name)
            if file is not None and not os.path.isfile(file):
                raise ValueError(f"base.{name}: got {str(file)!r}, expected an existing .safetensors or .gguf file")
        for file in self.adapters:
            if not os.path.exists(file):
                raise ValueError(f"base.adapters: got {str(file)!r}, expected an existing adapter file")
        return self


def as_resolutions(resolution: int | list[int] | None) -> tuple[int, ...]:
    """One, several or none."""
    return tuple(resolution) if isinstance(resolution, list) else () if resolution is None else (resolution,)


# Preset -> section -> what it sets where nothing else is said.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "low-memory": {
        "base": {"quantise": "nf4"},
        "optim": {"mixed_precision": "bf16", "gradient_checkpointing": True},
    },
}


class TrainConfig(_Section):
    """A whole training run. Paths are absolute once it is built.

    Examples:
        ```python
        import dora_diffusion as dd

        config = dd.TrainConfig.from_yaml("subject.yaml", {"adapter.rank": "4", "optim.learning_rate": "3e-4"})
        print(config.adapter.rank, config.optim.steps, config.data.instance_dir)
        print(config.to_yaml())  # every key
        ```
    """

    model: Text = "pocket"
    """The base: "pocket", "pocket-dit", a diffusers folder, a .safetensors checkpoint or a hub id."""
    base: BaseConfig = BaseConfig()
    """Files in place of the base's own components."""
    device: DeviceName = "auto"
    """What trains: cpu, cuda, cuda:1, xpu or mps; auto = the first of cuda, xpu, mps and cpu that is here."""
    output_dir: Location
    """The run's folder; relative to the current directory."""
    data: DataConfig
    """The pictures that are learnt."""
    prior: PriorConfig = PriorConfig()
    """Prior preservation."""
    adapter: AdapterConfig = AdapterConfig()
    """What is trained."""
    words: WordsConfig = WordsConfig()
    """New words."""
    optim: OptimConfig = OptimConfig()
    """How it is trained."""
    loss: LossConfig = LossConfig()
    """How wrong a prediction is, and of what noise."""
    flow: FlowConfig = FlowConfig()
    """Noise of bases that are trained by flow matching."""
    guard: GuardConfig = GuardConfig()
    """What happens when a step goes wrong."""
    preview: PreviewConfig = PreviewConfig()
    """Pictures drawn in training."""
    validation: ValidationConfig = ValidationConfig()
    """The validation loss."""
    logging: LoggingConfig = LoggingConfig()
    """Where numbers of the run go."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    export: list[Export] = []
    """What the adapter is written as too, at the end, under `exports`: formats by the names that `convert --to` has,
    and `for-TOOL`, made as by `convert --for TOOL`, so that this tool draws what we draw."""
    metadata: Literal["full", "minimal"] = "full"
    """What the adapter's file says of itself: "full" for other tools and pages too (ModelSpec, kohya's ss_*: settings,
    how often each tag of the captions occurs); "minimal" what is needed to load it, base, prompt and steps."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured after training."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        """What a preset says, where nothing else is said."""
        optim = data.get("optim") if isinstance(data, dict) else None
        name = optim.get("preset") if isinstance(optim, dict) else None
        chosen = PRESETS.get(name, {}) if isinstance(name, str) else {}
        return (
            {**data, **{section: {**said, **_given(data.get(section))} for section, said in chosen.items()}}
            if chosen
            else data
        )

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if not (self.adapter.train_unet or self.adapter.train_text_encoder or self.words.starts):
            raise ValueError(
                "adapter.train_unet: got false, and adapter.train_text_encoder too; expected true for one of them, or "
                "words.starts to learn new words alone"
            )
        text_encoder_only = {
            "optim.text_encoder_learning_rate": self.optim.text_encoder_learning_rate,
            "adapter.text_encoder_rank": self.adapter.text_encoder_rank,
        }
        for key, value in text_encoder_only.items():
            if value is not None and not self.adapter.train_text_encoder:
                raise ValueError(f"{key}: got {value}, but adapter.train_text_encoder is false; expected null, or true")
        if self.optim.max_weight_norm is not None:
            _check_weight_norm(self.optim.max_weight_norm, self.adapter)
        if os.path.exists(self.output_dir) and not os.path.isdir(self.output_dir):
            raise ValueError(f"output_dir: got the file {str(self.output_dir)!r}, expected a folder, new or old")
        _check_export(self)
        _refuse_shared_folders(self)
        _refuse_two_densities(self.loss.timesteps, self.flow)
        _check_best(self)
        if self.prior.mode == "adapter_off":
            _check_asked_with(self.prior, self.words, has_class_pictures=self.has_class_pictures)
        return self

    @property
    def has_class_pictures(self) -> bool:
        """Whether class pictures are trained, whoever made them."""
        prior = self.prior
        is_drawn = prior.mode == "generated" and bool(prior.prompts)
        return is_drawn or prior.class_dir is not None or any(one.role == "class" for one in self.data.concepts)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, str] | None = None) -> "TrainConfig":
        """Read a configuration.

        Relative paths in the file start at its folder; `output_dir` and paths in overrides at the current directory.

        Args:
            path: the YAML file.
            overrides: dotted key -> a YAML scalar (or `[list]`) that replaces the file's; see `parse_overrides`.

        Raises:
            ValueError: one line that names the file or flag, the key, what was got and what was expected.
        """
        file = yaml_config.read(Path(path), cls)
        _start_paths_at(file.data, file.path.parent)
        overrides = overrides or {}
        for key, value in overrides.items():
            yaml_config.override(file.data, key, value, cls)
        try:
            return cls.model_validate(file.data)
        except ValidationError as error:
            raise ValueError(yaml_config.one_line(error, file, overrides, cls)) from None

    def to_yaml(self) -> str:
        """Every key with its value; `from_yaml` of it gives an equal configuration, in whatever folder it lies."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @staticmethod
    def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
        """`["--optim.steps", "10", "--adapter.rank=4"]` -> `{"optim.steps": "10", "adapter.rank": "4"}`.

        Raises:
            ValueError: something that is no `--key value`, a key without a value, or a key given twice.
        """
        overrides: dict[str, str] = {}
        rest = iter(arguments)
        for argument in rest:
            name, has_value, value = argument.partition("=")
            if not name.startswith("--") or len(name) < 3:
                raise ValueError(f"got {argument!r}, expected --section.key value, such as --optim.steps 400")
            if not has_value:
                value = next(rest, "--")
                if value.startswith("--"):
                    raise ValueError(f"{name}: got no value, expected {name} VALUE or {name}=VALUE")
            if name[2:] in overrides:
                raise ValueError(f"{name}: given twice, {overrides[name[2:]]!r} and {value!r}; expected it once")
            overrides[name[2:]] = value
        return overrides


def _given(section: Any) -> Mapping[Any, Any]:
    """What is said of a section's keys."""
    if isinstance(section, BaseModel):
        return {name: getattr(section, name) for name in section.model_fields_set}
    return section if isinstance(section, dict) else {}


def _check_export(config: TrainConfig) -> None:
    if twice := [name for name in config.export if config.export.count(name) > 1]:
        raise ValueError(f"export: got {twice[0]!r} twice, expected it once")
    if config.export and not (config.adapter.train_unet or config.adapter.train_text_encoder):
        raise ValueError(
            f"export: got {config.export} where new words are learnt alone, which files of their own hold; expected []"
        )


def _refuse_shared_folders(config: TrainConfig) -> None:
    """What a run writes or draws must not lie among the pictures that it learns or measures."""
    given = {"data.instance_dir": config.data.instance_dir, "data.validation_dir": config.data.validation_dir}
    for index, concept in enumerate(config.data.concepts):
        if concept.role != "class":
            given[f"data.concepts[{index}].dir"] = concept.dir
    written = {"output_dir": config.output_dir}
    if config.prior.mode != "adapter_off" and (config.prior.prompts or config.prior.class_dir):
        written["prior.class_dir"] = config.prior.class_dir or config.output_dir / "class"
    places = {key: os.path.realpath(folder) for key, folder in given.items() if folder is not None}
    for key, folder in written.items():
        shared = next((other for other, place in places.items() if place == os.path.realpath(folder)), None)
        if shared is not None:
            raise ValueError(f"{key}: got {str(folder)!r}, which is {shared} too; expected a folder of its own")


def _check_weight_norm(limit: float, adapter: AdapterConfig) -> None:
    """A ValueError when there is nothing that could be cut."""
    if adapter.init == "pissa":
        raise ValueError(
            f"optim.max_weight_norm: got {limit} with adapter.init 'pissa', whose update is a difference that shorter "
            "factors do not shorten; expected null, or another init"
        )
    if not (adapter.train_unet or adapter.train_text_encoder):
        raise ValueError(f"optim.max_weight_norm: got {limit}, but no adapter is trained; expected null")


def _refuse_two_densities(timesteps: TimestepsConfig, flow: FlowConfig) -> None:
    """Of a flow, both sections could say where timesteps lie."""
    for name in ("density", "logit_mean", "logit_std", "mode_scale"):
        value = getattr(flow, name)
        if timesteps.density is not None and value != FlowConfig.model_fields[name].default:
            raise ValueError(
                f"flow.{name}: got {value!r} beside loss.timesteps.density, expected one of them: loss.timesteps"
            )


def _check_best(config: TrainConfig) -> None:
    """A ValueError when a best is asked for that nothing tells."""
    if config.checkpoint.final == "best" and not config.checkpoint.keep_best:
        raise ValueError("checkpoint.final: got 'best' with checkpoint.keep_best false, expected true for it")
    asked = {
        "checkpoint.keep_best": config.checkpoint.keep_best or None,
        "validation.patience": config.validation.patience,
    }
    for key, value in asked.items():
        if value is not None and not config.data.holds_out:
            raise ValueError(
                f"{key}: got {str(value).lower()} without held-out pictures, whose loss alone tells what is best; "
                "expected data.validation_share, data.validation_dir, or a concept with the role validation"
            )


def _check_asked_with(prior: PriorConfig, words: WordsConfig, *, has_class_pictures: bool) -> None:
    """A ValueError when base and adapter cannot be asked alike."""
    if prior.asked_with == "class" and not (prior.prompts or has_class_pictures):
        raise ValueError(
            "prior.mode: got 'adapter_off' without prior.class_prompt to ask with; expected one, class pictures, or "
            "prior.caption blank or instance"
        )
    if words.starts and prior.asked_with == "instance":
        raise ValueError(
            "prior.caption: got 'instance' beside words.starts, whose words the base cannot read; expected class or "
            "blank"
        )
    for word in words.starts:
        if found := [prompt for prompt in prior.prompts if word.lower() in prompt.lower()]:
            raise ValueError(
                f"prior.class_prompt: {found[0]!r} holds the new word {word!r}, which the base cannot read; expected "
                "words that it knows"
            )


def _start_paths_at(data: dict[Any, Any], folder: Path) -> None:
    """Let the relative paths of a file's data start at `folder`."""
    for key in _PATHS_BESIDE_FILE:
        *sections, name = key.split(".")
        for fields in _sections_at(data, sections):
            value = fields.get(name)
            if isinstance(value, str) and value:
                fields[name] = _beside(folder, value)
            elif isinstance(value, dict):  # whose keys are files
                fields[name] = {_beside(folder, file): setting for file, setting in value.items()}
    model = data.get("model")
    if isinstance(model, str) and model.startswith(("./", "../")):
        data["model"] = os.path.abspath(folder / model)


def _beside(folder: Path, file: Any) -> Any:
    return str(folder / os.path.expanduser(file)) if isinstance(file, str) and file else file


def _sections_at(data: Any, sections: Sequence[str]) -> list[dict[Any, Any]]:
    """The mappings of a file's data at `data`, or at `data.concepts[]`; what is of another kind is not there."""
    if not sections:
        return [data] if isinstance(data, dict) else []
    inner = data.get(sections[0].removesuffix("[]")) if isinstance(data, dict) else None
    items = inner if sections[0].endswith("[]") and isinstance(inner, list) else [inner]
    return [found for item in items for found in _sections_at(item, sections[1:])]
