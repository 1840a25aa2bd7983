"""Values of other trainers as ours: numbers in texts, precisions, sizes, schedules."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dora_diffusion.training.import_config.records import Answer, Row, Source, needless, several, to
from dora_diffusion.utils.text import shown_value

LATENT = 8
"""Sides of training pictures are multiples of it."""
_DEVICES = re.compile(r"cpu|mps|(cuda|xpu)(:\d+)?")
_PRECISIONS = {
    **dict.fromkeys(("no", "fp32", "float32", "float", "float_32", "tfloat_32", "tf32"), "no"),
    **dict.fromkeys(("fp16", "float16", "float_16", "half"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16", "bfloat_16"), "bf16"),
}
_FREE = re.compile(r"prodigy|dadapt|d-adapt", re.IGNORECASE)
_PRODIGY = re.compile(r"(?:.*\.)?prodigy_?(?:8_?bit)?", re.IGNORECASE)


def number(value: Any) -> float | int:
    """A number, or a text that is one; whole ones stay whole."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"got {shown_value(value)}, expected a number") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"got {shown_value(value)}, expected a number")
    return value


def real(value: Any) -> float:
    """A number with a point."""
    return float(number(value))


def whole(value: Any) -> int:
    """A whole number."""
    found = number(value)
    if found != int(found):
        raise ValueError(f"got {shown_value(value)}, expected a whole number")
    return int(found)


def flag(value: Any) -> bool:
    """True or false, also as text or as 0 and 1."""
    if isinstance(value, str) and value.strip().lower() in {"true", "false", "1", "0", "yes", "no"}:
        return value.strip().lower() in {"true", "1", "yes"}
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise ValueError(f"got {shown_value(value)}, expected true or false")


def text(value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ValueError(f"got {shown_value(value)}, expected text")
    return value


def texts(value: Any) -> list[str]:
    """A list of texts."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"got {shown_value(value)}, expected a list of texts")
    return value


def precision(value: Any) -> str:
    """`bfloat16`, `BFLOAT_16`, `bf16` ... -> bf16."""
    found = _PRECISIONS.get(text(value).lower())
    if found is None:
        raise ValueError(f"got {value}, expected fp32, fp16 or bf16")
    return found


def device(value: Any) -> str:
    """`cuda`, `cuda:0`, `cpu` ..., as they are called here too."""
    found = text(value).lower()
    if not _DEVICES.fullmatch(found):
        raise ValueError(f"got {value}, expected cpu, cuda, cuda:N, xpu or mps")
    return found


def is_free_of_rates(optimiser: Any) -> bool:
    """Whether an optimiser finds its own rate, so that a learning rate of 1 is usual."""
    return bool(_FREE.search(str(optimiser)))


def crop(value: Any, source: Source) -> Answer:
    """Whether pictures are cropped at random."""
    return to("data.crop", "random" if flag(value) else "center")


def learning_rate(key: str, value: Any, optimiser: Any) -> Answer:
    """A learning rate, unless the optimiser takes it for a factor and is not there here."""
    rate = real(value)
    refuse_factor(optimiser)
    return to(key, rate)


def refuse_factor(optimiser: Any) -> None:
    """A ValueError when an optimiser that is not there here takes a learning rate for a factor."""
    if is_free_of_rates(optimiser) and not _PRODIGY.fullmatch(str(optimiser)):
        raise ValueError(f"with {optimiser} it is a factor and no rate, which AdamW could not be given")


def schedule(name: Any, warmup: float) -> Answer:
    """The name of a schedule of the learning rate.

    Args:
        name: diffusers' or OneTrainer's.
        warmup: how much of it is warm-up, in whatever unit; 0 = none.
    """
    known = text(name).lower()
    if known == "constant" and warmup:
        return to("optim.lr_scheduler", "constant_with_warmup")
    if known in {"constant", "constant_with_warmup", "linear", "cosine"}:
        return to("optim.lr_scheduler", known)
    if known in {"cosine_with_restarts", "cosine_with_hard_restarts", "cosine_with_min_lr", "cosine_annealing"}:
        return to("optim.lr_scheduler", "cosine", "no restarts and no floor here")
    if known in {"polynomial", "rex", "inverse_sqrt", "step", "piecewise_constant", "warmup_stable_decay"}:
        return to("optim.lr_scheduler", "linear", f"the nearest: {known} has no counterpart")
    raise ValueError(f"got {name}, expected constant, constant_with_warmup, linear or cosine")


def sides(value: Any) -> list[tuple[int, int]]:
    """`512`, `"1024,768"`, `[512, 768]`, `"512x768, 640"`: sizes as numbers, in whatever way they are meant."""
    items = value if isinstance(value, list) else re.split(r"[,\s]+", str(value).strip())
    found = []
    for item in items:
        width, by, height = str(item).partition("x")
        try:
            found.append((int(width), int(height if by else width)))
        except ValueError:
            raise ValueError(f"got {shown_value(value)}, expected pixels, such as 512 or 1024,768") from None
    if any(side < LATENT for size in found for side in size) or not found:
        raise ValueError(f"got {shown_value(value)}, expected at least {LATENT} pixels")
    return found


def side_of(width: int, height: int) -> int:
    """The side of a square of the same area, a multiple of 8."""
    return max(LATENT, round(math.sqrt(width * height) / LATENT) * LATENT)


def one_size(key: str, value: Any) -> Answer:
    """A size whose two numbers are width and height."""
    found = sides(value)
    width, height = found[0] if len(found) == 1 else (found[0][0], found[1][0])
    side = side_of(width, height)
    if width == height == side:
        return to(key, side)
    return to(key, side, f"a square of the area of {width} x {height}, which is what buckets of shapes start from")


def several_sizes(key: str, value: Any) -> Answer:
    """Sizes of which each is trained."""
    found = [side_of(*size) for size in sides(value)]
    return to(key, found[0] if len(set(found)) == 1 else list(dict.fromkeys(found)))


def warmup(value: Any, steps: float | None, *, is_share: bool) -> Answer:
    """Steps of warm-up, given as such or as a share of all.

    Args:
        value: the number.
        steps: of the run; None when not known.
        is_share: whether it is one.
    """
    count = number(value)
    if not is_share:
        return to("optim.warmup_steps", whole(count)) if count else needless("none, as here")
    if not count:
        return needless("none, as here")
    if steps is None:
        raise ValueError("a share of steps that are not known; set optim.warmup_steps")
    return to("optim.warmup_steps", int(count * steps))


def text_encoders(rates: Mapping[str, float], *, all_of_them: bool) -> Answer:
    """Which text encoders are trained, with the rate of each.

    Args:
        rates: component -> its rate.
        all_of_them: whether one rate is said of whatever there is.
    """
    trained = {name: rate for name, rate in rates.items() if rate}
    if not trained:
        return several({"adapter.train_text_encoder": False})
    if all_of_them:
        return several(
            {
                "adapter.train_text_encoder": True,
                "optim.text_encoder_learning_rate": next(iter(trained.values())),
            }
        )
    return several({"adapter.train_text_encoder": list(trained), "optim.text_encoder_learning_rate": trained})


def named_arguments(value: Any) -> dict[str, Any]:
    """`["algo=lora", "conv_dim=8"]`, or a text with spaces between -> a mapping."""
    items: Sequence[Any] = value.split() if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and "=" in item for item in items):
        raise ValueError(f'got {shown_value(value)}, expected a list such as ["conv_dim=8"]')
    return {key.strip(): rest.strip() for key, _, rest in (item.partition("=") for item in items)}


def model_name(value: Any, source: Source) -> Answer:
    """The base: a hub id stays, a path starts at the file's folder."""
    name = text(value)
    says = "a pickle: make a .safetensors file of it first" if name.lower().endswith((".ckpt", ".pt", ".bin")) else ""
    return to("model", name, says)


def loss_kind(value: Any, source: Source) -> Answer:
    """`l2` and `huber`, as sd-scripts and the scripts of scheduled Huber call them."""
    kind = text(value).lower()
    if kind not in {"l2", "mse", "huber"}:
        raise ValueError(f"got {kind}, expected l2 or huber: the nearest is `loss.kind: huber`, with a small huber_c")
    return to("loss.kind", "huber" if kind == "huber" else "mse")


def of_huber(name: str, ours: str, read: Callable[[Any], Any], example: Any) -> Row:
    """A row that counts with `loss_type: huber` alone."""

    def convert(value: Any, source: Source) -> Answer:
        if str(source.get("loss_type", "l2")).lower() != "huber":
            return needless("with loss_type huber")
        return to(ours, read(value))

    return Row(name, (ours,), "with loss_type huber", convert, example, beside={"loss_type": "huber"})


def preview_of(prompt: str, said: Mapping[str, Any]) -> str | dict[str, Any]:
    """An entry of `preview.prompts`: the text alone where nothing else is said.

    Args:
        prompt: what is drawn.
        said: by our names, and `width` and `height`; None is left out.
    """
    own = {key: value for key, value in said.items() if value not in (None, "") and key not in ("width", "height")}
    if said.get("width") and said.get("height"):
        own["size"] = [min(4096, max(64, round(number(said[side]) / 8) * 8)) for side in ("width", "height")]
    return {"prompt": prompt, **own} if own else prompt


def tracker(value: Any, source: Source) -> Answer:
    """The names of trackers: accelerate's, which are ours."""
    wanted = text(value).strip().lower()
    names = ["tensorboard", "wandb"] if wanted == "all" else [wanted]
    return needless("off there too") if wanted in ("", "none") else to("logging.trackers", names)
