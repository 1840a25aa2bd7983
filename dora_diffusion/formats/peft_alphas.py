"""PEFT's config in the metadata of diffusers' files: alpha of each layer, read and written."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dora_diffusion.formats.json_metadata import json_object
from dora_diffusion.state import Module
from dora_diffusion.utils.text import shown

METADATA_KEY = "lora_adapter_metadata"
# PEFT takes the keys of alpha_pattern as regular expressions, the first that fits counts. A stranger's expression is
# never run; what people and tools write are ends of paths, with `.*` at most.
_PLAIN = re.compile(r"[\w.*-]{1,300}")
_MOST_STARS = 3
_MOST_STARRED = 50
# A star that is no `.*`: `to_*` are underscores to PEFT, not a wildcard.
_OTHER_STAR = re.compile(r"(?:^|[^.]|\\\.)\*")


class Scales:
    """Alpha of each layer, from PEFT's config in the metadata; without one alpha is the rank."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        what = f"metadata {METADATA_KEY}"
        self._config = json_object(metadata.get(METADATA_KEY, "{}"), what)
        self._patterns: dict[str, _Patterns] = {}
        for key, value in self._config.items():
            if key.endswith(".alpha_pattern"):
                if not isinstance(value, dict | None):
                    raise ValueError(f"{what}: {shown(key)} is {shown(value, 40)}, expected an object")
                self._patterns[key.removesuffix(".alpha_pattern")] = _Patterns(value or {})

    def of(self, path: str, rank: int) -> tuple[float, bool]:
        """(alpha, rank-stabilised) of a layer.

        Raises:
            ValueError: alpha is no number, or is told by an expression that is not run here.
        """
        component, inner = path.split(".", 1) if "." in path else ("", path)
        alpha = self._config.get(f"{component}.lora_alpha", rank)
        if component in self._patterns:
            alpha = self._patterns[component].of(inner, alpha)
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not abs(alpha) < 1e30:
            raise ValueError(f"metadata {METADATA_KEY}: alpha of {path} is {shown(alpha, 40)}, expected a number")
        return float(alpha), bool(self._config.get(f"{component}.use_rslora", False))


class _Patterns:
    """PEFT's alpha_pattern: the first of its keys that fits a path counts."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = list(values.values())
        self._ends: dict[str, int] = {}
        self._whole: dict[str, int] = {}
        self._starred: list[tuple[int, re.Pattern[str]]] = []
        for number, pattern in enumerate(values):
            plain = _plain(pattern)
            if "*" in plain:
                before = "" if pattern.startswith("^") else r"(?:.*\.)?"
                self._starred.append((number, re.compile(before + ".*".join(map(re.escape, plain.split("*"))))))
            else:
                (self._whole if pattern.startswith("^") else self._ends).setdefault(plain, number)
        if len(self._starred) > _MOST_STARRED:
            raise ValueError(
                f"metadata {METADATA_KEY}: {len(self._starred)} patterns of alpha with `.*`, expected at most "
                f"{_MOST_STARRED}"
            )

    def of(self, path: str, otherwise: Any) -> Any:
        """The value of the first pattern that fits, or another."""
        words = path.split(".")
        ends = (".".join(words[start:]) for start in range(len(words)))
        found = [self._ends[end] for end in ends if end in self._ends]
        found += [self._whole[path]] if path in self._whole else []
        found += [number for number, expression in self._starred if expression.fullmatch(path)]
        return self._values[min(found)] if found else otherwise


def _plain(pattern: str) -> str:
    """An end of a path, or a whole one, with `*` for `.*`; a ValueError for anything that could cost time."""
    plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".").replace(".*", "*")
    if _OTHER_STAR.search(pattern) or not _PLAIN.fullmatch(plain) or plain.count("*") > _MOST_STARS:
        raise ValueError(
            f"metadata {METADATA_KEY}: alpha_pattern {shown(pattern, 60)!r} is an expression that is not run here; "
            "expected ends of paths"
        )
    return plain


def peft_config(component: str, modules: Mapping[str, Module]) -> dict[str, Any]:
    """What PEFT needs to know of one component's layers, with the scale already folded into B (alpha = rank).

    PEFT matches the end of a path, so paths without `text_model.` fit every version of transformers. A name of one word
    may be the end of others (`proj_out` of FLUX, and of its single blocks): where there is one, expressions fit whole
    paths instead.

    Raises:
        ValueError: some layers are DoRA and some are not. `use_dora` is for all: PEFT would give the others magnitudes.
    """
    plain = [path for path, module in modules.items() if module.magnitude is None]
    if plain and len(plain) < len(modules):
        raise ValueError(
            f"{component}.{plain[0]}: a plain LoRA among DoRA layers, which PEFT and diffusers cannot hold apart "
            f"({len(plain)} of {len(modules)} layers of the {component}); make all DoRA first (to_dora), or use "
            "another format (kohya, lycoris)"
        )
    counts = Counter(module.rank for module in modules.values())
    common = max(sorted(counts), key=counts.__getitem__)  # the lowest of several that are as common, in any order
    has_word = any("." not in path for path in modules)
    other = {_anchored(path): module.rank for path, module in modules.items() if module.rank != common}
    targets = sorted(modules)
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": rf"(?:text_model\.)?(?:{'|'.join(map(re.escape, targets))})" if has_word else targets,
        "use_dora": not plain,
        "use_rslora": False,
    }


def _anchored(path: str) -> str:
    return path if "." in path else f"^{path}"
