"""Steps of diffusers' recipe and of ours on one base, in turns."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.peers.variants import put
from benchmarks.training.bases import Base, pictures
from benchmarks.training.clock import Round, Stopwatch, Way, alternate
from benchmarks.training.dreambooth import DreamBoothLora, Recipe, lora_layers
from benchmarks.training.ours import FRESH_VIEWS, Adapted, adapted, config_of, numbers_of, our_trainer
from dora_diffusion.generation.prompts import encode_captions
from dora_diffusion.training.config import TrainConfig

PROMPT = "a zqx robot, a flat style drawing"
PICTURES = 4
RECIPE, PRECOMPUTED = "diffusers' recipe, LoRA", "diffusers' recipe, LoRA, text pre-computed"
LORA, DORA, FRESH = "our LoRA", "our DoRA", "our DoRA, no latents kept"
CAPTION = "a caption encoded"
STEPS = (RECIPE, PRECOMPUTED, LORA, DORA, FRESH)


@dataclass(frozen=True)
class Case:
    """A base and how it is trained.

    Attributes:
        base: the base.
        batch_size: pictures in a step.
        names: whose steps are taken.
    """

    base: Base
    batch_size: int
    names: Sequence[str] = STEPS


def steps_in_turns(case: Case, folder: Path, *, rounds: int) -> list[Round]:
    """Turns of a step each, and of a caption encoded. The base is used up: somebody's layers stay in it.

    Raises:
        AssertionError: the two sides do not train the same layers, or not as many numbers of A and B: there is nothing
            to compare.
    """
    photos = pictures(folder / "pictures", case.base.side, PICTURES)
    pipe, watch = case.base.pipe, Stopwatch()
    makers = _Makers(case, photos, watch, rounds + 1)
    with _noting_forward(pipe.unet, watch):
        ways = {name: makers.way(name) for name in case.names}
        family = makers.family
        ways[CAPTION] = Way(torch.no_grad()(lambda: encode_captions(pipe, family, [PROMPT])))
        return alternate(ways, rounds=rounds, watch=watch)


@contextmanager
def _noting_forward(denoiser: nn.Module, watch: Stopwatch) -> Iterator[None]:
    """While the block lasts the time of the denoiser's forward passes is a part."""
    hooks = [
        denoiser.register_forward_pre_hook(lambda *_: watch.start("forward")),
        denoiser.register_forward_hook(lambda *_: watch.stop("forward")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Makers:
    """Who takes part, each with layers of its own over the same base layers; ways of one kind share their layers."""

    def __init__(self, case: Case, photos: Path, watch: Stopwatch, steps: int) -> None:
        self._case, self._photos, self._watch, self._steps = case, photos, watch, steps
        self._unet = case.base.pipe.unet
        self._own = {use_dora: self._adapted(use_dora) for use_dora in (False, True)}
        layers = self._own[True].layers
        self._bases = {path: layer.base for path, layer in layers.items()}
        put(self._unet, self._bases)
        self._peft = lora_layers(self._unet, self._config({}).adapter.rank)
        put(self._unet, self._bases)
        self.family = self._own[True].trainable.family
        self._check()

    def way(self, name: str) -> Way:
        """Somebody's steps."""
        return self._theirs(name == PRECOMPUTED) if name in (RECIPE, PRECOMPUTED) else self._ours(name)

    def _config(self, data: Mapping[str, Any]) -> TrainConfig:
        return config_of(self._photos, PROMPT, self._case.base.side, self._case.batch_size, data)

    def _adapted(self, use_dora: bool) -> Adapted:
        config = self._config({})
        adapter = config.adapter.model_copy(update={"use_dora": use_dora})
        own = adapted(self._case.base, config.model_copy(update={"adapter": adapter}))
        put(self._unet, {path: layer.base for path, layer in own.layers.items()})
        return own

    def _check(self) -> None:
        """The same layers, the same numbers of A and B; m has one more for each row."""
        lora, dora = ({path: own.layers[path] for path in own.layers} for own in self._own.values())
        theirs = {path: layer.base_layer for path, layer in self._peft.items()}
        if theirs != self._bases or lora.keys() != dora.keys():
            raise AssertionError("the two train other layers: there is nothing to compare")
        rows = sum(base.weight.shape[0] for base in theirs.values())
        counts = [numbers_of([*layers.values()]) for layers in (self._peft, lora, dora)]
        if counts != [counts[0], counts[0], counts[0] + rows]:
            raise AssertionError(f"they train {counts} numbers, {rows} rows: there is nothing to compare")

    def _theirs(self, precomputes_text: bool) -> Way:
        case, rank = self._case, self._config({}).adapter.rank
        recipe = Recipe(self._photos, PROMPT, case.base.side, case.batch_size, rank, precomputes_text)

        def enter() -> None:
            put(self._unet, self._peft)
            self._unet.train()

        enter()
        return Way(DreamBoothLora(case.base.pipe, recipe, self._watch).take, enter)

    def _ours(self, name: str) -> Way:
        own = self._own[name != LORA]

        def enter() -> None:
            put(self._unet, own.layers)
            own.trainable.train()

        enter()
        config = self._config(FRESH_VIEWS if name == FRESH else {})
        return Way(our_trainer(own, config, self._watch, steps=self._steps).take, enter)
