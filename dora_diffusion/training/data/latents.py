"""Latents of pictures: each view that is shown again is encoded once and kept."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dora_diffusion.training.base.identity import weights_digest
from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import DataConfig
from dora_diffusion.training.data.cache import TensorCache, Tensors, made_of
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.data.views import Sample, View, are_few, load_sample
from dora_diffusion.training.processes import ALONE, Processes
from dora_diffusion.utils.atomic import sha256_of
from dora_diffusion.utils.images import UnreadablePicture
from dora_diffusion.utils.text import shown_path

Shown = tuple[Example, View]

# So many pictures are decoded ahead of the one that is encoded.
_DECODED_AHEAD = 8


class Latent(NamedTuple):
    """A picture as a step sees it: latents (1, C, h, w), its frame (1, 6), and its mask (1, 1, h, w) or None."""

    values: Tensor
    frame: Tensor
    mask: Tensor | None


class LatentSource:
    """Latents of pictures, the mode of the VAE's posterior, scaled; from a cache where the views are few."""

    def __init__(self, trainable: TrainablePipeline, data: DataConfig, processes: Processes = ALONE) -> None:
        self._trainable, self._data = trainable, data
        folder = None if data.cache_dir is None else data.cache_dir / "latents"
        self._cache = TensorCache(folder, data.cache_memory * 2**30)
        self._hashes: dict[Path, str] = {}
        self._processes = processes if folder is not None else ALONE

    def latent(self, example: Example, view: View) -> Latent:
        """One view of a picture, on the device where steps are taken."""
        if are_few(self._data):
            entry = self._cache.get(self._key(example, view), lambda: self._encoded(self._sample(example, view)))
        else:
            entry = self._encoded(self._sample(example, view))
        device = self._trainable.device
        values, frame, mask = entry["latents"], entry["frame"], entry.get("mask")
        return Latent(values.to(device), frame.to(device), None if mask is None else mask.to(device))

    def prepare(self, shown: Iterable[Shown]) -> None:
        """Encode what will be shown and is not there yet, while the next pictures are decoded by other threads.

        Several processes that have a folder in common are to ask for the same, in the same order: each encodes a share.
        """
        if not are_few(self._data):
            return
        mine = self._processes.share(list(dict.fromkeys(shown)))
        new = [one for one in mine if self._key(*one) not in self._cache]
        for one, sample in tqdm(self._decoded(new), total=len(new), desc="pictures", disable=not new):
            self._cache.add(self._key(*one), self._encoded(sample))
        self._processes.meet("pictures")

    def _decoded(self, shown: Iterable[Shown]) -> Iterator[tuple[Shown, Sample]]:
        with ThreadPoolExecutor() as pool:
            waiting: deque[tuple[Shown, Future[Sample]]] = deque()
            for one in shown:
                waiting.append((one, pool.submit(self._sample, *one)))
                if len(waiting) > _DECODED_AHEAD:
                    first, sample = waiting.popleft()
                    yield first, sample.result()
            for first, sample in waiting:
                yield first, sample.result()

    def _sample(self, example: Example, view: View) -> Sample:
        return load_sample(example, view, with_mask=self._data.mask_outside is not None)

    def _encoded(self, sample: Sample) -> Tensors:
        """One by one, so that what a picture is encoded to does not depend on its neighbours."""
        latents = self._trainable.encode_pictures(sample.pixels[None])
        made = {"latents": latents, "frame": sample.frame[None]}
        if sample.mask is None:
            return made
        return made | {"mask": F.adaptive_avg_pool2d(sample.mask[None], (latents.shape[-2], latents.shape[-1]))}

    def _key(self, example: Example, view: View) -> str:
        mask = example.mask if self._data.mask_outside is not None else None
        return made_of(
            picture=self._hash_of(example.path),
            mask=None if mask is None else self._hash_of(mask),
            alpha=self._data.mask_outside is not None and mask is None,
            size=example.size,
            flip=view.flip,
            offset=view.offset,
            encoder=self._encoder,
        )

    def _hash_of(self, path: Path) -> str:
        if path not in self._hashes:
            try:
                self._hashes[path] = sha256_of(path)
            except OSError as error:
                raise UnreadablePicture(f"{shown_path(path)}: cannot be read ({error.strerror})") from None
        return self._hashes[path]

    @cached_property
    def _encoder(self) -> str:
        """The VAE and how its latents are scaled; always in fp32, rounded as the base was loaded."""
        vae = self._trainable.pipe.vae
        return f"{self._trainable.family.name} {type(vae).__name__} {weights_digest(vae)}"
