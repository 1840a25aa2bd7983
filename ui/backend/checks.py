"""Single values as a browser sends them, checked, and the limits that they are held to."""

import re

from dora_diffusion.generation.infotext import Limits
from dora_diffusion.generation.samplers import DEFAULT as DEFAULT_SAMPLER
from dora_diffusion.generation.samplers import SAMPLERS
from dora_diffusion.utils.checks import check_number as check_number
from dora_diffusion.utils.checks import check_whole as check_whole
from dora_diffusion.utils.text import shown_value

MAX_STRENGTH = 2.0
MAX_STEPS = 100
MAX_GUIDANCE = 30.0
MAX_SEED = 2**32 - 1
MAX_PROMPT = 2000
MAX_COUNT = 16
MIN_SIDE, MAX_SIDE = 64, 2048
LIMITS = Limits(steps=MAX_STEPS, guidance=MAX_GUIDANCE, seed=MAX_SEED, side=MAX_SIDE, prompt=MAX_PROMPT)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_strength_number(name: str, value: object) -> float:
    """The value as a strength, or a factor on one.

    Raises:
        ValueError: not a finite number of [-MAX_STRENGTH, MAX_STRENGTH].
    """
    return check_number(name, value, low=-MAX_STRENGTH, high=MAX_STRENGTH)


def check_text(name: str, value: object) -> str:
    """The value as text without surrounding blanks; None counts as empty.

    Raises:
        ValueError: not text, or longer than MAX_PROMPT.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name}: got {shown_value(value)}, expected text")
    if len(value) > MAX_PROMPT:
        raise ValueError(f"{name}: got {len(value)} characters, expected at most {MAX_PROMPT}")
    return value.strip()


def check_name(what: str, value: object) -> str:
    """A name that can be a file's, without folders.

    Raises:
        ValueError: it is not of letters, digits, `.`, `_` and `-`, or too long.
    """
    if isinstance(value, str) and _NAME.fullmatch(value.strip()):
        return value.strip()
    got = "nothing" if value in (None, "") else repr(value)[:60]
    raise ValueError(f"{what}: got {got}, expected up to 64 letters, digits, dots, - and _, a letter or digit first")


def check_side(name: str, value: object) -> int | None:
    """A picture's width or height in pixels; None and 0 stand for the model's own.

    Raises:
        ValueError: no multiple of 8 of [MIN_SIDE, MAX_SIDE].
    """
    side = None if value in (None, 0) else check_whole(name, value, low=MIN_SIDE, high=MAX_SIDE)
    if side is not None and side % 8:
        raise ValueError(f"{name}: got {side}, expected a multiple of 8 from {MIN_SIDE} to {MAX_SIDE}")
    return side


def check_sampler(value: object) -> str:
    """A name of SAMPLERS; nothing stands for the default.

    Raises:
        ValueError: no such sampler.
    """
    if value is None or value == "":
        return DEFAULT_SAMPLER
    if not isinstance(value, str) or value not in SAMPLERS:
        raise ValueError(f"sampler: got {shown_value(value)}, expected one of {', '.join(SAMPLERS)}")
    return value
