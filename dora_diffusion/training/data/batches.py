"""Batches of latents and conditioning. Everything random is a function of (seed, step): a resumed run sees the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import DataConfig, TrainConfig
from dora_diffusion.training.data.examples import Example, StepSampler, load_sample


@dataclass(frozen=True)
class Batch:
    """One micro-batch: clean latents (N, C, h, w), conditioning, frames (N, 6), and weights in the loss (N,)."""

    latents: Tensor
    conditioning: Mapping[str, Tensor]
    frames: Tensor
    weights: Tensor
    names: tuple[str, ...]


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

    def keep(self, captions: Sequence[str]) -> None:
        """Encode what is new among captions, once and for all."""
        trainable = self._trainable
        if new := dict.fromkeys(caption for caption in captions if caption not in self._kept):
            with torch.no_grad(), trainable.encoders_on_device():
                self._kept.update({caption: trainable.family.encode(trainable.pipe, [caption]) for caption in new})

    def encode(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """Captions -> batched conditioning, with gradients when a text encoder is trained."""
        trainable = self._trainable
        if trainable.trains_text():
            return trainable.family.encode(trainable.pipe, list(captions))
        self.keep(captions)
        names = self._kept[captions[0]].keys()
        return {name: _together([self._kept[caption][name] for caption in captions]) for name in names}


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors (1, ...) as one batch; where dimension 1 differs the shorter are padded with zeros at their end."""
    if tensors[0].dim() < 2:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    padding = [[0, 0] * (tensor.dim() - 2) + [0, longest - tensor.shape[1]] for tensor in tensors]
    return torch.cat([F.pad(tensor, pad) for tensor, pad in zip(tensors, padding, strict=True)])


class BatchSource:
    """The batch of any step: instance examples, then as many class examples when there is prior preservation."""

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
        self._instances, self._classes = instances, classes
        batch, seed = config.optim.batch_size, config.optim.seed
        if not trainable.trains_text():
            self._captions.keep(["", *(example.caption for example in (*instances, *classes))])
        self._instance_order = StepSampler(len(instances), batch_size=batch, seed=seed)
        self._class_order = StepSampler(len(classes), batch_size=batch, seed=seed + 1) if classes else None

    def batch_at(self, index: int) -> Batch:
        """The micro-batch `index` (optimiser step times accumulation, plus the micro step)."""
        rng = Random(step_seed(self._config.optim.seed, index, 1))
        examples = [self._instances[i] for i in self._instance_order.batch_at(index)]
        dropout = self._config.data.caption_dropout
        captions = ["" if rng.random() < dropout else example.caption for example in examples]
        weights = [1.0] * len(examples)
        if self._class_order is not None:
            others = [self._classes[i] for i in self._class_order.batch_at(index)]
            examples += others
            captions += [example.caption for example in others]
            # twice, since the mean runs over both halves: loss = mean(instances) + weight * mean(classes)
            weights = [2.0] * len(weights) + [2.0 * self._config.prior.weight] * len(others)
        return self.batch_of(examples, captions, rng, weights=weights)

    def batch_of(
        self, examples: Sequence[Example], captions: Sequence[str], rng: Random, *, weights: Sequence[float]
    ) -> Batch:
        """A batch of chosen examples under given captions and loss weights."""
        encoded = [self._latents.latent(example, rng) for example in examples]
        latents, frames = (torch.cat(part) for part in zip(*encoded, strict=True))
        conditioning = self._captions.encode(captions)
        names = tuple(example.path.name for example in examples)
        return Batch(latents, conditioning, frames, torch.tensor(weights, device=latents.device), names)
