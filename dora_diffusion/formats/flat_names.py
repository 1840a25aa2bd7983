"""Flat names of layers, as kohya's tools write them, and the dotted paths that they were.

`down_blocks_0_attentions_0_proj_in` has lost which of its underscores were dots. It is never guessed: every path that a
layer of a known model can have is a pattern below, and a flat name is looked up among them, flattened.
"""

import re
from functools import cache

from dora_diffusion.families import FAMILIES
from dora_diffusion.families.text import decoder_paths
from dora_diffusion.formats.layouts import LAYOUTS

_NUMBER = re.compile(r"(?<![^_-])[0-9]+(?![^_-])")
_DOTTED_NUMBER = re.compile(r"(?<![^.-])[0-9]+(?![^.-])")
_CHOICE = re.compile(r"\(([^()]*)\)")
# Longer than any layer's name: what is longer is not looked at.
_LONGEST = 256

# Names that are in no family's signature and in no layout. What stands before a dot of a pattern is a path too.
OTHERS = (
    # older UNets'
    "class_embedding.(linear_#|act|act_#)",
    # language models', as they were called before transformers 4.52
    *decoder_paths("(model.|language_model.)"),
)


def flatten(path: str) -> str:
    """A dotted path as kohya's tools write it: `mid_block.resnets.0` -> `mid_block_resnets_0`."""
    return path.replace(".", "_")


def unflatten(flat: str) -> str | None:
    """The dotted path of a layer's flat name, without the prefix of its component; None where no known model has it.

    Paths of diffusers' and transformers' models and the original own are known, of layers and of what holds layers.
    """
    if len(flat) > _LONGEST or "#" in flat:
        return None
    pattern = _patterns().get(_NUMBER.sub("#", flat))
    if pattern is None:
        return None
    numbers = iter(_NUMBER.findall(flat))
    return "".join(next(numbers) if character == "#" else character for character in pattern)


def patterns() -> tuple[str, ...]:
    """Of every path that a known model has: in diffusers' and transformers' names, in original ones, in older ones."""
    parts = (part for family in FAMILIES for part in family.signature.parts.values())
    ours = (path for part in parts for path in part.paths)
    originals = (name for layout in LAYOUTS for name in layout.names)
    return tuple(dict.fromkeys((*ours, *originals, *OTHERS)))


@cache
def _patterns() -> dict[str, str]:
    """Flat pattern -> dotted pattern."""
    found = {}
    for line in patterns():
        for pattern in choices(line):
            words = _DOTTED_NUMBER.sub("#", pattern).split(".")
            for end in range(1, len(words) + 1):
                path = ".".join(words[:end])
                found[flatten(path)] = path
    return found


def choices(pattern: str) -> list[str]:
    """A pattern with every choice made, choices in choices too: `(a|b.(c|d)).e` -> `a.e`, `b.c.e`, `b.d.e`."""
    found = _CHOICE.search(pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    made = [path for option in found[1].split("|") for path in choices(before + option + after)]
    return list(dict.fromkeys(made))
