"""Which scenes and captions a pretraining step sees: a function of (seed, step) alone, so resuming needs no state."""

from collections.abc import Sequence
from random import Random
from typing import Protocol

from torch import Tensor
from transformers import CLIPTokenizer

from dora_diffusion.pretrain.scenes import Scene, varied_caption


class SamplingRecipe(Protocol):
    """The part of a recipe that says how scenes and captions are drawn."""

    @property
    def batch(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def empty_caption_share(self) -> float: ...
    @property
    def styleless_share(self) -> float: ...
    @property
    def small_share(self) -> float: ...


class SceneSampler:
    """A pair (object, style) evenly, then size and background."""

    def __init__(self, scenes: list[Scene], recipe: SamplingRecipe) -> None:
        self._recipe = recipe
        self._scenes = scenes
        self._by_pair: dict[tuple[str, str], dict[str, list[int]]] = {}
        for index, scene in enumerate(scenes):
            assert scene.style is not None
            self._by_pair.setdefault((scene.object, scene.style), {}).setdefault(scene.size, []).append(index)
        self._pairs = sorted(self._by_pair)

    def batch_at(self, step: int) -> tuple[list[int], list[str]]:
        """Indices of the scenes and a caption for each."""
        rng = Random(self._recipe.seed * 1_000_003 + step)
        indices = []
        for _ in range(self._recipe.batch):
            sizes = self._by_pair[rng.choice(self._pairs)]
            size = "small" if rng.random() < self._recipe.small_share else "large"
            indices.append(rng.choice(sizes[size]))
        return indices, [self._caption(self._scenes[i], rng) for i in indices]

    def _caption(self, scene: Scene, rng: Random) -> str:
        draw = rng.random()
        if draw < self._recipe.empty_caption_share:
            return ""
        if draw < self._recipe.empty_caption_share + self._recipe.styleless_share:
            scene = Scene(scene.object, None, scene.background, scene.size)
        return varied_caption(scene, rng)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Captions -> token ids (N, 32), padded as the pipeline pads them."""
    tokens: Tensor = tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return tokens
