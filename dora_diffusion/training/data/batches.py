"""Batches of latents and conditioning. Everything random is a function of (seed, step): a resumed run sees the same."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import DataConfig, OptimConfig, TrainConfig
from dora_diffusion.training.data.buckets import Size
from dora_diffusion.training.data.captions import caption_at
from dora_diffusion.training.data.conditioning import ConditioningSource
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.data.latents import Latent, LatentSource
from dora_diffusion.training.data.missing import MissingPictures
from dora_diffusion.training.data.order import Place, StepSampler
from dora_diffusion.training.data.views import View, view_at
from dora_diffusion.training.processes import ALONE, Processes
from dora_diffusion.utils.images import UnreadablePicture

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
        size: (width, height) of the pictures in pixels.
        masks: what counts of each, (N, 1, h, w); None = all of all.
        share: of the micro-batch's samples, those that cannot be read counted in.
        untrained: conditioning of the same captions by the text encoders as they were, where the target is what the
            base says of it; None where the target is the objective's.
    """

    latents: Tensor
    conditioning: Mapping[str, Tensor]
    frames: Tensor
    weights: Tensor
    names: tuple[str, ...]
    size: tuple[int, int]
    masks: Tensor | None = None
    share: float = 1.0
    untrained: Mapping[str, Tensor] | None = None


def step_seed(seed: int, step: int, purpose: int) -> int:
    """A seed for one purpose of one step; distinct steps and purposes never share one in practice."""
    return (seed * 1_000_003 + step) * 16 + purpose


class Shown(NamedTuple):
    """A sample: a picture, the caption and the view that it is trained with, its weight in the loss, and whether the
    target is what the base itself says of it."""

    example: Example
    caption: str
    view: View
    weight: float = 1.0
    is_kept: bool = False


class Samples:
    """The samples of each step, of one kind: examples in the run's order, each with the text and view of that step."""

    def __init__(self, examples: Sequence[Example], data: DataConfig, *, batch_size: int, seed: int) -> None:
        self._examples = [example for example in examples for _ in range(example.repeats)]
        self._order = StepSampler(_buckets(self._examples), batch_size=batch_size, seed=seed)
        self._data, self._rules, self._seed = data, data.captions, seed
        self._dropout = data.caption_dropout or data.captions.dropout

    def at(self, index: int, rng: Random) -> list[Shown]:
        """Those of a micro-batch, all of one size; fresh views are drawn from `rng`."""
        return [self._at(place, rng) for place in self._order.places_at(index)]

    def views_at(self, index: int, rng: Random) -> list[tuple[Example, View]]:
        """Their pictures and views alone."""
        return [(self._examples[place.sample], self._view(place, rng)) for place in self._order.places_at(index)]

    def _at(self, place: Place, rng: Random) -> Shown:
        example = self._examples[place.sample]
        return Shown(example, self._caption(place), self._view(place, rng), example.weight)

    def _view(self, place: Place, rng: Random) -> View:
        example = self._examples[place.sample]
        return view_at(self._data, example, rng, seed=self._seed, place=_name(place))

    def _caption(self, place: Place) -> str:
        example = self._examples[place.sample]
        dropout = self._dropout if example.dropout is None else example.dropout
        return caption_at(example.captions, self._rules, seed=self._seed, place=_name(place), dropout=dropout)


def _name(place: Place) -> str:
    return f"{place.epoch}/{place.sample}"


def _buckets(examples: Sequence[Example]) -> list[list[int]]:
    """The samples of each size, sizes in the order in which they come."""
    buckets: dict[tuple[int, int], list[int]] = {}
    for index, example in enumerate(examples):
        buckets.setdefault(example.size, []).append(index)
    return list(buckets.values())


class BatchSource:
    """The batches of any step: instance examples, then as many class examples when there is prior preservation.

    Under `prior.mode` adapter_off the second half is a batch of its own, of class examples if there are any, else of
    the same instance examples: a batch of another size would be rounded differently from the base's own prediction.

    Args:
        trainable: encodes pictures and captions.
        config: data, batch size, seed, the prior's weight.
        instances: to learn; each has a `size`.
        classes: to keep as they are; each has a `size`.
        processes: that train together: with `data.cache_dir` each encodes a share of what all need, without it what it
            needs itself.
    """

    def __init__(
        self,
        trainable: TrainablePipeline,
        config: TrainConfig,
        *,
        instances: Sequence[Example],
        classes: Sequence[Example],
        processes: Processes = ALONE,
    ) -> None:
        self._processes, self._trains_text = processes, trainable.trains_text()
        self._data, self._prior, self._seed = config.data, config.prior, config.optim.seed
        self._latents = LatentSource(trainable, config.data, processes)
        self._captions = ConditioningSource(trainable, config.data, processes)
        batch, seed = config.optim.batch_size, config.optim.seed
        self._instances = Samples(instances, config.data, batch_size=batch, seed=seed)
        self._classes = Samples(classes, config.data, batch_size=batch, seed=seed + 1) if classes else None
        self._missing = MissingPictures(len({one.path for one in (*instances, *classes)}), share=config.guard.missing)
        if not config.data.captions.are_open:
            own = [caption for one in (*instances, *classes) for caption in one.captions]
            every = ["", *own, *(config.prior.prompts if config.prior.mode == "adapter_off" else ())]
            is_apart = processes.count > 1 and config.data.cache_dir is None
            self.keep_captions(self._captions_of_all(config.optim) if is_apart else every)

    def keep_captions(self, captions: Iterable[str]) -> None:
        """Encode captions that will be asked for beside those of the steps, while the text encoders are at hand."""
        if self._trains_text:
            self._captions.keep(captions)
        else:
            self._captions.keep_together(captions)

    def keep_prompts(self, prompts: Iterable[str]) -> None:
        """Let the text encoders that are not trained know prompts that will be drawn."""
        self._captions.keep_prompts(prompts)

    def _captions_of_all(self, optim: OptimConfig) -> set[str]:
        """Those of every micro-batch of this process."""
        count = optim.steps * optim.gradient_accumulation * self._processes.count
        indices = range(self._processes.rank, count, self._processes.count)
        return {caption for index in indices for caption in self._captions_at(index)}

    def prepare(self, indices: Iterable[int]) -> None:
        """Encode the pictures of some of this process's micro-batches beforehand, where they are kept."""
        rank, others = self._processes.rank, range(self._processes.count if self._data.cache_dir is not None else 1)
        if len(others) > 1:
            indices = (index - rank + other for index in indices for other in others)
        self._latents.prepare(view for index in indices for view in self._views_at(index))

    def measured(self, example: Example, rng: Random, *, place: str) -> Shown:
        """A sample that is measured and not trained; a fresh view is drawn from `rng`."""
        view = view_at(self._data, example, rng, seed=self._seed, place=place)
        return Shown(example, example.caption, view)

    def batches_at(self, index: int) -> list[Batch]:
        """Micro-batch `index` (optimiser step times accumulation, plus the micro step), in batches of one shape.

        Instances and class pictures of one size are one batch. What can no longer be read is left out.

        Raises:
            PicturesMissing: too many pictures cannot.
        """
        self._look_ahead(index)
        read: dict[tuple[Path, Size, View], Latent] = {}  # what is learnt may be kept too, in the same view
        chosen = _by_size(self._chosen_at(index))
        total = sum(map(len, chosen))
        parts = [self._readable(part, read) for part in chosen]
        batches = [self._batch(part, share=len(part) / total) for part in parts if part]
        return [*batches, *self._padding(index, batches)] if self._processes.in_step else batches

    def _padding(self, index: int, batches: Sequence[Batch]) -> list[Batch]:
        """Batches without a share, where another process has more: all do as many forwards."""
        first = index - self._processes.rank
        others = range(first, first + self._processes.count)
        most = max(len(_by_size(self._chosen_at(other))) for other in others)
        return [replace(batches[-1], share=0.0)] * (most - len(batches))

    def _look_ahead(self, index: int) -> None:
        if not self._captions.knows(self._captions_at(index)):
            ahead = range(index, index + _AHEAD)
            self._captions.look_ahead(caption for later in ahead for caption in self._captions_at(later))

    def _captions_at(self, index: int) -> list[str]:
        return [one.caption for part in self._chosen_at(index) for one in part]

    def _views_at(self, index: int) -> Iterator[tuple[Example, View]]:
        rng = self._rng(index)
        for samples in self._kinds():
            yield from samples.views_at(index, rng)

    def _rng(self, index: int) -> Random:
        return Random(step_seed(self._seed, index, 1))

    def _kinds(self) -> Iterator[Samples]:
        yield self._instances
        if self._classes is not None:
            yield self._classes

    def _chosen_at(self, index: int) -> list[list[Shown]]:
        """What a micro-batch learns, and what it keeps."""
        rng = self._rng(index)
        instances = self._instances.at(index, rng)
        classes = None if self._classes is None else self._classes.at(index, rng)
        if self._prior.mode == "adapter_off":
            classes = self._asked(index, instances if classes is None else classes)
        if classes is None:
            return [instances]
        # twice, since the mean runs over both halves: mean(instances) + weight * mean(classes)
        return [_weighed(instances, 2.0), _weighed(classes, 2.0 * self._prior.weight)]

    def _asked(self, index: int, samples: Sequence[Shown]) -> list[Shown]:
        """Samples with the captions under which adapter and base are to predict alike; class prompts take turns."""
        prior, first = self._prior, index * len(samples)
        kept = [one._replace(is_kept=True) for one in samples]
        if prior.asked_with == "blank":
            return [one._replace(caption="") for one in kept]
        if prior.asked_with == "instance" or self._classes is not None:
            return kept
        turns = (prior.prompts[number % len(prior.prompts)] for number in range(first, first + len(kept)))
        return [one._replace(caption=prompt) for one, prompt in zip(kept, turns, strict=True)]

    def _readable(
        self, shown: Sequence[Shown], read: dict[tuple[Path, Size, View], Latent]
    ) -> list[tuple[Shown, Latent]]:
        """Samples with their latents, those left out whose pictures cannot be read any more; `read`: those so far."""
        found = []
        for one in shown:
            key = (one.example.path, one.example.size, one.view)
            try:
                read[key] = read[key] if key in read else self._latents.latent(one.example, one.view)
                found.append((one, read[key]))
            except UnreadablePicture as error:
                if self._processes.in_step:  # the others would wait for its forwards
                    raise
                self._missing.note(one.example.path, error)
            else:
                self._missing.found(one.example.path)
        return found

    def batch_of(self, shown: Sequence[Shown]) -> Batch:
        """A batch of chosen samples of one size."""
        return self._batch([(one, self._latents.latent(one.example, one.view)) for one in shown])

    def _batch(self, samples: Sequence[tuple[Shown, Latent]], *, share: float = 1.0) -> Batch:
        shown, encoded = zip(*samples, strict=True)
        latents, captions = torch.cat([latent.values for latent in encoded]), [one.caption for one in shown]
        return Batch(
            latents,
            self._captions.encode(captions),
            torch.cat([latent.frame for latent in encoded]),
            torch.tensor([one.weight for one in shown], device=latents.device),
            tuple(one.example.path.name for one in shown),
            shown[0].example.size,
            None if shown[0].is_kept else self._masks(encoded),  # masks say where to learn
            share,
            self._captions.encode_untrained(captions) if shown[0].is_kept else None,
        )

    def _masks(self, encoded: Sequence[Latent]) -> Tensor | None:
        """Weights of places: 1 where a mask is white, `mask_outside` where it is black, 1 where there is no mask."""
        outside = self._data.mask_outside
        if outside is None or all(latent.mask is None for latent in encoded):
            return None
        masks = [torch.ones_like(one.values[:, :1]) if one.mask is None else one.mask for one in encoded]
        return outside + (1 - outside) * torch.cat(masks)


def _weighed(shown: Sequence[Shown], factor: float) -> list[Shown]:
    return [one._replace(weight=factor * one.weight) for one in shown]


def _by_size(parts: Sequence[list[Shown]]) -> list[list[Shown]]:
    """Parts of one size and of one kind of target, joined."""
    joined: dict[object, list[Shown]] = {}
    for part in parts:
        joined.setdefault((part[0].example.size, part[0].is_kept), []).extend(part)
    return list(joined.values())
