"""Batches of latents and conditioning. Everything random is a function of (seed, step): a resumed run sees the same."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.generation.prompts import encode_captions
from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import DataConfig, TrainConfig
from dora_diffusion.training.data.captions import caption_at
from dora_diffusion.training.data.examples import Example, Place, StepSampler, load_sample

# So many micro-batches' captions are encoded together, where each step has others.
_AHEAD = 64


@dataclass(frozen=True)
class Batch:
    """Samples of one shape.

    Attributes:
        latents: clean, (N, C, h, w).
        conditioning: of their captions.
        frames: (N, 6), see `frame_of`.
        weights: in the loss, (N,).
        names: of their pictures.
        share: of the micro-batch's samples.
        untrained: conditioning of the same captions by the text encoders as they were, where the target is what the
            base says of it; None where the target is the objective's.
    """

    latents: Tensor
    conditioning: Mapping[str, Tensor]
    frames: Tensor
    weights: Tensor
    names: tuple[str, ...]
    share: float = 1.0
    untrained: Mapping[str, Tensor] | None = None


def step_seed(seed: int, step: int, purpose: int) -> int:
    """A seed for one purpose of one step; distinct steps and purposes never share one in practice."""
    return (seed * 1_000_003 + step) * 16 + purpose


class Latent(NamedTuple):
    """A picture's latents (1, C, h, w) and its frame (1, 6)."""

    values: Tensor
    frame: Tensor


class LatentCache:
    """Latents of examples, encoded once when nothing random is done to the pixels, else at every use."""

    def __init__(self, trainable: TrainablePipeline, data: DataConfig, size: tuple[int, int]) -> None:
        self._trainable = trainable
        self._data = data
        self._size = size
        self._kept: dict[tuple[str, bool], Latent] = {}

    def latent(self, example: Example, rng: Random) -> "Latent":
        """The mode of the VAE's posterior, scaled, and where the picture comes from."""
        flip = self._data.flip and rng.random() < 0.5
        key = (str(example.path), flip)
        if key in self._kept:
            return self._kept[key]
        sample = load_sample(example, size=self._size, crop=self._data.crop, flip=flip, rng=rng)
        encoded = self._trainable.family.codec.encode(self._trainable.pipe, sample.pixels[None])
        latent = Latent(encoded, sample.frame[None].to(encoded.device))
        if self._data.crop == "center":
            self._kept[key] = latent
        return latent


class ConditioningCache:
    """Conditioning of captions: kept when no text encoder is trained."""

    def __init__(self, trainable: TrainablePipeline) -> None:
        self._trainable = trainable
        self._kept: dict[str, Mapping[str, Tensor]] = {}
        self._ahead: dict[str, Mapping[str, Tensor]] = {}

    def keep(self, captions: Iterable[str]) -> None:
        """Encode what is new among captions, once and for all."""
        self._kept |= self._encoded(captions)

    def look_ahead(self, captions: Iterable[str]) -> None:
        """Encode what is new among the captions of the next steps, and let go of those of the last."""
        wanted = set(captions)
        passed = {caption: made for caption, made in self._ahead.items() if caption in wanted}
        self._ahead = {**passed, **self._encoded(wanted - passed.keys())}

    def _encoded(self, captions: Iterable[str]) -> dict[str, Mapping[str, Tensor]]:
        new = sorted(dict.fromkeys(caption for caption in captions if caption not in self._kept))
        if not new:
            return {}
        pipe, family = self._trainable.pipe, self._trainable.family
        with torch.no_grad(), self._trainable.encoders_on_device():
            return {caption: encode_captions(pipe, family, [caption]) for caption in new}

    def knows(self, captions: Iterable[str]) -> bool:
        """Whether nothing has to be encoded for these, for it is here or is encoded anew at every step."""
        known = self._kept.keys() | self._ahead.keys()
        return self._trainable.trains_text() or all(caption in known for caption in captions)

    def encode(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """Captions -> batched conditioning, with gradients when a text encoder is trained."""
        trainable = self._trainable
        if trainable.trains_text():
            return encode_captions(trainable.pipe, trainable.family, list(captions))
        if not self.knows(captions):
            self.keep(captions)
        kept = [self._kept.get(caption) or self._ahead[caption] for caption in captions]
        return {name: _together([made[name] for made in kept]) for name in kept[0]}

    def encode_untrained(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """As `encode`, by the text encoders as they were before training, without gradients.

        All captions at once, as `encode` does where text is trained: another batch would be rounded differently.
        """
        if not self._trainable.trains_text():
            return self.encode(captions)
        with self._trainable.base_alone():
            return encode_captions(self._trainable.pipe, self._trainable.family, list(captions))


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors (1, ...) as one batch; where dimension 1 differs the shorter are padded with zeros at their end."""
    if tensors[0].dim() < 2:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    padding = [[0, 0] * (tensor.dim() - 2) + [0, longest - tensor.shape[1]] for tensor in tensors]
    return torch.cat([F.pad(tensor, pad) for tensor, pad in zip(tensors, padding, strict=True)])


class _Samples:
    """The samples of each step, of one kind: examples in the run's order, each with the text of that step."""

    def __init__(self, examples: Sequence[Example], data: DataConfig, *, batch_size: int, seed: int) -> None:
        self._examples = [example for example in examples for _ in range(example.repeats)]
        self._order = StepSampler(len(self._examples), batch_size=batch_size, seed=seed)
        self._rules, self._seed = data.captions, seed
        self._dropout = data.caption_dropout or data.captions.dropout

    @property
    def is_open(self) -> bool:
        """Whether captions are made that no picture has as it stands."""
        return self._rules.shuffle or self._rules.wildcards or self._rules.tag_dropout > 0

    def at(self, index: int) -> list[tuple[Example, str]]:
        """Those of a micro-batch."""
        return [self._at(place) for place in self._order.places_at(index)]

    def _at(self, place: Place) -> tuple[Example, str]:
        example = self._examples[place.sample]
        dropout = self._dropout if example.dropout is None else example.dropout
        where = f"{place.epoch}/{place.sample}"
        caption = caption_at(example.captions, self._rules, seed=self._seed, place=where, dropout=dropout)
        return example, caption


class BatchSource:
    """The batch of any step: instance examples, then as many class examples when there is prior preservation.

    Under `prior.mode` adapter_off the second half is a batch of its own, of class examples if there are any, else of
    the same instance examples: a batch of another size would be rounded differently from the base's own prediction.
    """

    def __init__(
        self,
        trainable: TrainablePipeline,
        config: TrainConfig,
        size: tuple[int, int],
        *,
        instances: Sequence[Example],
        classes: Sequence[Example],
    ) -> None:
        self._config = config
        self._latents = LatentCache(trainable, config.data, size)
        self._captions = ConditioningCache(trainable)
        batch, seed = config.optim.batch_size, config.optim.seed
        self._instances = _Samples(instances, config.data, batch_size=batch, seed=seed)
        self._classes = _Samples(classes, config.data, batch_size=batch, seed=seed + 1) if classes else None
        self._trains_text = trainable.trains_text()
        if not self._instances.is_open:
            own = [caption for one in (*instances, *classes) for caption in one.captions]
            self.keep_captions(["", *own, *(config.prior.prompts if config.prior.mode == "adapter_off" else ())])

    def keep_captions(self, captions: Iterable[str]) -> None:
        """Encode captions that will be asked for beside those of the steps, while the text encoders are at hand."""
        if not self._trains_text:
            self._captions.keep(captions)

    def batches_at(self, index: int) -> list[Batch]:
        """The micro-batch `index` (optimiser step times accumulation, plus the micro step), in batches of one shape."""
        if self._config.prior.mode != "adapter_off":
            return [self.batch_at(index)]
        rng, chosen = self._prepared_at(index)
        count, weight = self._config.optim.batch_size, self._config.prior.weight
        learnt, kept = (self._half(part, rng) for part in (chosen[:count], chosen[count:]))
        untrained = self._captions.encode_untrained([caption for _, caption in chosen[count:]])
        return [learnt, replace(kept, weights=weight * kept.weights, untrained=untrained)]

    def _half(self, chosen: Sequence[tuple[Example, str]], rng: Random) -> Batch:
        """Half of a micro-batch, by itself; weighed twice, as the halves of `batch_at` are."""
        examples, captions = zip(*chosen, strict=True)
        batch = self.batch_of(examples, captions, rng, weights=[2.0 * example.weight for example in examples])
        return replace(batch, share=0.5)

    def _prepared_at(self, index: int) -> tuple[Random, list[tuple[Example, str]]]:
        """What is random about the pixels of a micro-batch, and `_chosen_at`, of which the captions are encoded."""
        chosen = self._chosen_at(index)
        if not self._captions.knows(caption for _, caption in chosen):
            ahead = (self._chosen_at(later) for later in range(index, index + _AHEAD))
            self._captions.look_ahead(caption for batch in ahead for _, caption in batch)
        return Random(step_seed(self._config.optim.seed, index, 1)), chosen

    def batch_at(self, index: int) -> Batch:
        """The micro-batch `index` in one batch."""
        rng, chosen = self._prepared_at(index)
        examples, captions = zip(*chosen, strict=True)
        count = self._config.optim.batch_size
        # twice beside class pictures, since the mean runs over both halves: mean(instances) + weight * mean(classes)
        factor = 1.0 if self._classes is None else 2.0
        weights = [factor * example.weight for example in examples]
        weights[count:] = [self._config.prior.weight * weight for weight in weights[count:]]
        return self.batch_of(examples, captions, rng, weights=weights)

    def _chosen_at(self, index: int) -> list[tuple[Example, str]]:
        """The examples of a micro-batch with the captions that they are trained with, the class's last."""
        instances = self._instances.at(index)
        classes = None if self._classes is None else self._classes.at(index)
        if self._config.prior.mode == "adapter_off":
            classes = self._asked(index, instances if classes is None else classes)
        return [*instances, *(classes or ())]

    def _asked(self, index: int, samples: Sequence[tuple[Example, str]]) -> list[tuple[Example, str]]:
        """Samples with the captions under which adapter and base are to predict alike; class prompts take turns."""
        prior, first = self._config.prior, index * len(samples)
        if prior.asked_with == "blank":
            return [(example, "") for example, _ in samples]
        if prior.asked_with == "instance" or self._classes is not None:
            return list(samples)
        turns = (prior.prompts[number % len(prior.prompts)] for number in range(first, first + len(samples)))
        return [(example, prompt) for (example, _), prompt in zip(samples, turns, strict=True)]

    def batch_of(
        self, examples: Sequence[Example], captions: Sequence[str], rng: Random, *, weights: Sequence[float]
    ) -> Batch:
        """A batch of chosen examples under given captions and loss weights."""
        encoded = [self._latents.latent(example, rng) for example in examples]
        latents, frames = (torch.cat(part) for part in zip(*encoded, strict=True))
        conditioning = self._captions.encode(captions)
        names = tuple(example.path.name for example in examples)
        return Batch(latents, conditioning, frames, torch.tensor(weights, device=latents.device), names)
