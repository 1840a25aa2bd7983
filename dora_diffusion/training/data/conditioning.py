"""What the text encoders say of captions: encoded once and kept while none of them is trained."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_diffusion.generation.prompts import encode_captions
from dora_diffusion.training.base.identity import weights_digest
from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import DataConfig
from dora_diffusion.training.data.cache import TensorCache, Tensors, made_of
from dora_diffusion.training.processes import ALONE, Processes


class ConditioningSource:
    """Conditioning of captions; those of pictures stay, on disk too, those that a step makes up for as long as it can
    use them."""

    def __init__(self, trainable: TrainablePipeline, data: DataConfig, processes: Processes = ALONE) -> None:
        folder = None if data.cache_dir is None else data.cache_dir / "captions"
        limit = data.cache_memory * 2**30
        self._trainable = trainable
        self._kept, self._passing = TensorCache(folder, limit), TensorCache(None, limit)
        # what frozen encoders say of texts that steps make up is of no use to another run
        self._answers = TensorCache(None if data.captions.are_open else folder, limit)
        self._own: frozenset[str] = frozenset()
        self._ahead: frozenset[str] = frozenset()
        self._processes = processes if folder is not None else ALONE
        self._times = 0

    def keep(self, captions: Iterable[str]) -> None:
        """Encode what is new among captions, once and for all."""
        if self._trainable.trains_text():
            self._own |= self._ask(captions)
        else:
            self._encode_new(captions, self._kept)

    def keep_together(self, captions: Iterable[str]) -> None:
        """`keep`, called with the same captions in all processes: each encodes a share into the folder."""
        every, self._times = sorted(set(captions)), self._times + 1
        self._encode_new(self._processes.share(every), self._kept)
        self._processes.meet(f"captions {self._times}")
        self._encode_new(every, self._kept)

    def look_ahead(self, captions: Iterable[str]) -> None:
        """Encode what is new among the captions of the next steps."""
        if self._trainable.trains_text():
            self._ahead = self._ask(captions)
        else:
            self._encode_new(captions, self._passing)

    def keep_prompts(self, prompts: Iterable[str]) -> None:
        """Let the frozen text encoders know prompts that will be drawn."""
        self._ask(prompts)

    def _ask(self, captions: Iterable[str]) -> frozenset[str]:
        """Ask the frozen text encoders about captions, of which they then know."""
        frozen, asked = self._trainable.frozen, frozenset(captions)
        frozen.remember_in(self._answers)
        new = sorted(asked - self._own - self._ahead) if frozen else []
        if new:
            # what is trained is not asked: its dropout would draw numbers that the step's own are to be
            with self._trainable.base_alone():
                for caption in new:
                    with frozen.recalled([caption]):
                        encode_captions(self._trainable.pipe, self._trainable.family, [caption])
        return asked

    def _encode_new(self, captions: Iterable[str], cache: TensorCache) -> None:
        new = sorted({caption for caption in captions if self._find(caption) is None})
        if new:
            self._trainable.bring_encoders()
            with torch.no_grad():
                for caption in new:
                    made = encode_captions(self._trainable.pipe, self._trainable.family, [caption])
                    cache.add(self._key(caption), made)

    def _find(self, caption: str) -> Tensors | None:
        key = self._key(caption)
        return self._kept.find(key) or self._passing.find(key)

    def knows(self, captions: Iterable[str]) -> bool:
        """Whether nothing has to be encoded for these, for it is here or is encoded anew at every step."""
        if self._trainable.trains_text():
            return not self._trainable.frozen or all(one in self._own or one in self._ahead for one in captions)
        return all(self._find(caption) for caption in captions)

    def encode(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """Captions -> batched conditioning, with gradients when a text encoder is trained."""
        trainable = self._trainable
        if trainable.trains_text():
            return self._anew(captions)
        if not self.knows(captions):
            self.keep(captions)
        found = [self._find(caption) for caption in captions]
        known = [made for made in found if made is not None]
        device = trainable.device
        return {name: _together([made[name] for made in known]).to(device) for name in known[0]}

    def encode_untrained(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """As `encode`, by the text encoders as they were before training, without gradients.

        All captions at once, as `encode` does where text is trained: another batch would be rounded differently.
        """
        if not self._trainable.trains_text():
            return self.encode(captions)
        with self._trainable.base_alone():
            return self._anew(captions)

    def _anew(self, captions: Sequence[str]) -> Mapping[str, Tensor]:
        """As the text encoders are now; what the frozen ones say stays."""
        trainable = self._trainable
        trainable.frozen.remember_in(self._answers)
        with trainable.frozen.recalled(captions):
            return encode_captions(trainable.pipe, trainable.family, list(captions))

    def _key(self, caption: str) -> str:
        return made_of(caption=caption, encoder=self._encoders)

    @cached_property
    def _encoders(self) -> str:
        """The text encoders that the base has."""
        pipe, family = self._trainable.pipe, self._trainable.family
        models = {part.name: getattr(pipe, part.name, None) for part in family.text_encoders}
        digests = [f"{name} {weights_digest(model)}" for name, model in models.items() if model is not None]
        return " ".join([family.name, *digests])


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors (1, ...) as one batch; where dimension 1 differs the shorter are padded with zeros at their end."""
    if tensors[0].dim() < 2:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    padding = [[0, 0] * (tensor.dim() - 2) + [0, longest - tensor.shape[1]] for tensor in tensors]
    return torch.cat([F.pad(tensor, pad) for tensor, pad in zip(tensors, padding, strict=True)])
