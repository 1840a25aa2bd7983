"""PEFT's config in the metadata of diffusers' files: alpha of each layer, read and written."""

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from dora_diffusion.state import Module

METADATA_KEY = "lora_adapter_metadata"
# PEFT takes the keys of alpha_pattern as regular expressions, the first that fits counts. A stranger's expression is
# never run; what people and tools write are ends of paths, with `.*` at most.
_PLAIN = re.compile(r"[\w.*-]{1,300}")
_MOST_STARS = 3
# A star that is no `.*`: `to_*` are underscores to PEFT, not a wildcard.
_OTHER_STAR = re.compile(r"(?:^|[^.]|\\\.)\*")


class Scales:
    """Alpha of each layer, from PEFT's config in the metadata; without one alpha is the rank."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            self._config: dict[str, Any] = json.loads(metadata.get(METADATA_KEY, "{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"metadata {METADATA_KEY} is not JSON ({error})") from None
        if not isinstance(self._config, dict):
            raise ValueError(f"metadata {METADATA_KEY}: expected a JSON object")
        for key, value in self._config.items():
            if key.endswith(".alpha_pattern") and not isinstance(value, dict | None):
                raise ValueError(f"metadata {METADATA_KEY}: {key} is {str(value)[:40]!r}, expected an object")

    def of(self, path: str, rank: int) -> tuple[float, bool]:
        """(alpha, rank-stabilised) of a layer.

        Raises:
            ValueError: alpha is no number, or is told by an expression that is not run here.
        """
        component, inner = path.split(".", 1) if "." in path else ("", path)
        patterns = self._config.get(f"{component}.alpha_pattern") or {}
        alpha = self._config.get(f"{component}.lora_alpha", rank)
        pattern = next((pattern for pattern in patterns if _fits(inner, pattern)), None)
        alpha = alpha if pattern is None else patterns[pattern]
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not abs(alpha) < 1e30:
            raise ValueError(f"metadata {METADATA_KEY}: alpha of {path} is {str(alpha)[:40]}, expected a number")
        return float(alpha), bool(self._config.get(f"{component}.use_rslora", False))


def _fits(path: str, pattern: str) -> bool:
    expression = _expression(pattern)
    if expression is None:
        raise ValueError(
            f"metadata {METADATA_KEY}: alpha_pattern {pattern[:60]!r} is an expression that is not run here; expected "
            "ends of paths"
        )
    return expression.fullmatch(path) is not None


@cache
def _expression(pattern: str) -> re.Pattern[str] | None:
    """An end of a path, anchored or not; None for anything that could cost time."""
    plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".").replace(".*", "*")
    if _OTHER_STAR.search(pattern) or not _PLAIN.fullmatch(plain) or plain.count("*") > _MOST_STARS:
        return None
    before = "" if pattern.startswith("^") else r"(?:.*\.)?"
    return re.compile(before + ".*".join(map(re.escape, plain.split("*"))))


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
    ranks = [module.rank for module in modules.values()]
    common = max(set(ranks), key=ranks.count)
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
