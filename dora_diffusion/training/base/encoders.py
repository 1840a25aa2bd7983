"""Text encoders that are not trained: each is asked once about a text, and rests in main memory meanwhile."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dora_diffusion.training.base.identity import weights_digest

_PART = "part"
_KEYS = 100_000  # texts whose tokens' hashes are known by heart


class Answers(Protocol):
    """What keeps answers, by what they are made of; it may forget."""

    def find(self, key: str) -> Mapping[str, Tensor] | None:
        """An answer; None where there is none any more."""

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Keep an answer, in main memory, and give it back."""


class FrozenEncoders:
    """The text encoders of a pipeline that nothing is trained in.

    While they are `recalled`, the pipeline asks stand-ins: an answer that is known is given again, row by row, and only
    a row that is new is computed, alone, so that no answer depends on the texts beside it. Encoders come to the
    device when they have something to compute.

    Args:
        pipe: the pipeline.
        names: of its frozen encoders.
        device: where steps are taken.
        bring: has them there.
    """

    def __init__(
        self, pipe: Any, names: Sequence[str], device: Callable[[], torch.device], bring: Callable[[], None]
    ) -> None:
        self._pipe, self._device, self._bring = pipe, device, bring
        self._models: dict[str, nn.Module] = {name: getattr(pipe, name) for name in names}
        self._stand_ins: dict[str, _StandIn] = {}

    def __bool__(self) -> bool:
        return bool(self._models)

    def remember_in(self, answers: Answers) -> None:
        """Keep answers there from now on."""
        for name, model in self._models.items():
            known = self._stand_ins.setdefault(name, _StandIn(model, self._device, self._bring, answers))
            known.answers = answers

    @contextmanager
    def recalled(self, texts: Sequence[str] = ()) -> Iterator[None]:
        """While the block lasts the pipeline gets known answers again.

        Args:
            texts: that it encodes meanwhile, once, where they are known: their tokens, which may be on the device, need
                not be waited for then.
        """
        attributes = vars(self._pipe)  # a pipeline would note another class of component in its config
        with ExitStack() as leaving:
            for name, stand_in in self._stand_ins.items():
                leaving.callback(attributes.__setitem__, name, attributes[name])
                attributes[name] = stand_in
                stand_in.begin(texts)
            yield


class _StandIn:
    """An encoder as pipelines use one: called, and asked for its config, dtype and device."""

    def __init__(
        self, model: nn.Module, device: Callable[[], torch.device], bring: Callable[[], None], answers: Answers
    ) -> None:
        self.answers = answers
        self._model, self._device, self._bring = model, device, bring
        self._texts: tuple[str, ...] = ()
        self._calls = 0
        self.keys: dict[tuple[object, ...], str] = {}

    def begin(self, texts: Sequence[str]) -> None:
        """It will be asked about these, in their order, or nobody knows about what."""
        self._texts, self._calls = tuple(texts), 0
        if len(self.keys) > _KEYS:
            self.keys.clear()

    @property
    def device(self) -> torch.device:
        """Where it answers."""
        return self._device()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: object) -> Any:
        """What `forward` takes; pipelines differ in its options, which change what an answer holds, not its values."""
        if any(isinstance(option, Tensor) for option in options.values()):
            return self.compute(input_ids, attention_mask, options)
        masks = [None] * len(input_ids) if attention_mask is None else list(attention_mask.split(1))
        self._calls += 1
        known = len(self._texts) == len(input_ids)
        call = (self._calls, str(options), input_ids.shape[1])
        names = [(*call, text) for text in self._texts] if known else [None] * len(input_ids)
        rows = zip(names, input_ids.split(1), masks, strict=True)
        return _Answer([_Row(self, name, ids, mask, options) for name, ids, mask in rows])

    @torch.no_grad()
    def compute(self, ids: Tensor, mask: Tensor | None, options: Mapping[str, object]) -> Any:
        """Ask the encoder itself, on the device."""
        self._bring()
        masked = {} if mask is None else {"attention_mask": mask.to(self.device)}
        return self._model(ids.to(self.device), **masked, **options)

    def part(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """A part of an answer, from those that are known or made and then known."""
        found = self.answers.find(key)
        if found is None:
            found = self.answers.add(key, {_PART: make()})
        return found[_PART].to(self.device)

    @cached_property
    def digest(self) -> str:
        """Which encoder it is."""
        return weights_digest(self._model)


@dataclass(eq=False)
class _Row:
    """One text that an encoder is asked about.

    Attributes:
        encoder: that is asked.
        name: which text, in which call; None where that is not known.
        ids: (1, tokens).
        mask: (1, tokens), or None.
        options: of the call.
    """

    encoder: _StandIn
    name: tuple[object, ...] | None
    ids: Tensor
    mask: Tensor | None
    options: Mapping[str, object]

    def part(self, name: str, read: Callable[[Any], Tensor]) -> Tensor:
        """A part of what the encoder says of it, (1, ...)."""
        return self.encoder.part(f"{self._key} {name}", lambda: read(self._said))

    @cached_property
    def _said(self) -> Any:
        return self.encoder.compute(self.ids, self.mask, self.options)

    @cached_property
    def _key(self) -> str:
        """What is asked, in short."""
        keys = self.encoder.keys
        if self.name is None:
            return self._read()
        if self.name not in keys:
            keys[self.name] = self._read()
        return keys[self.name]

    def _read(self) -> str:
        mask = None if self.mask is None else self.mask.tolist()
        asked = f"{self.ids.tolist()} {mask} {sorted(self.options.items())}"
        return f"{self.encoder.digest} {hashlib.sha256(asked.encode()).hexdigest()}"


class _Answer:
    """What an encoder says of some texts; of what it would hold only the parts that are read are made and kept."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __getitem__(self, index: int) -> Tensor:
        return self._part(f"[{index}]", lambda said: said[index])

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._part(name, lambda said: getattr(said, name))

    @property
    def hidden_states(self) -> "_Layers":
        """The layers' own answers, by their numbers."""
        return _Layers(self)

    def layer(self, index: int) -> Tensor:
        """One of them, (N, tokens, width)."""
        return self._part(f"hidden_states[{index}]", lambda said: said.hidden_states[index])

    def _part(self, name: str, read: Callable[[Any], Tensor]) -> Tensor:
        return torch.cat([row.part(name, read) for row in self._rows])


@dataclass(frozen=True)
class _Layers:
    answer: _Answer

    def __getitem__(self, index: int) -> Tensor:
        return self.answer.layer(index)
