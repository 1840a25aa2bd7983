"""Textual inversion (arXiv 2208.01618): new words for CLIP text encoders, as vectors beside the frozen vocabulary.

    words = add_words(pipe, {"<zqx>": "robot"})      # <zqx> starts as what "robot" is
    words.parameters()                               # fp32, to train, alone or with an adapter (pivotal tuning)
    save_words(words.state(), folder)                # one file a word, keyed as diffusers and A1111 key them
    words.remove()                                   # the pipeline is what it was

Every CLIP encoder of the pipeline gets its own vectors. The encoder's embedding stays whole: ids beyond it are looked
up in the new vectors. CLIP configs of before 2023 find the pooled end of a text at its highest id, which a new word
would be: while words are there, the end is found by its own id.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.formats.bundled_words import parts_by_word
from dora_diffusion.formats.safetensors_reader import read_tensors
from dora_diffusion.utils.atomic import save_tensors
from dora_diffusion.utils.checks import check_fields

# The keys of files for two encoders, as A1111 and ComfyUI name them, in the order of the pipeline's CLIP encoders.
PAIR_KEYS = ("clip_l", "clip_g")
_METADATA = "dora_diffusion.word"


@dataclass(frozen=True)
class WordState:
    """One new word.

    Attributes:
        word: as prompts spell it.
        vectors: for each CLIP encoder in the pipeline's order, (vectors, width).
        sha256: of the file that it was read from, hex; None for a word that came from memory.

    Examples:
        ```python
        import dora_diffusion as dd

        word = dd.load_word("zqx.safetensors")
        print(word.word, [tuple(vectors.shape) for vectors in word.vectors])
        ```
    """

    word: str
    vectors: tuple[Tensor, ...]
    sha256: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        shapes = ", ".join(" x ".join(map(str, vectors.shape)) for vectors in self.vectors)
        return f"WordState({self.word!r}, vectors {shapes})"


class ExtendedEmbedding(nn.Module):
    """An embedding and new vectors (n, width) for the ids from `first` on."""

    def __init__(self, base: nn.Embedding, first: int, vectors: Tensor) -> None:
        super().__init__()
        self.base = base
        self.first = first
        # in a module of its own, after the base: a model's first parameter tells libraries the dtype of all of it
        self.new = nn.ParameterList([nn.Parameter(vectors)])

    @property
    def vectors(self) -> nn.Parameter:
        """(n, width)."""
        vectors: nn.Parameter = self.new[0]
        return vectors

    @property
    def weight(self) -> Tensor:
        """The vocabulary's own vectors; transformers asks embeddings for their weight."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (N, T) -> (N, T, width), in the base's dtype."""
        is_new = ids >= self.first
        known: Tensor = self.base(ids.masked_fill(is_new, 0))
        new = F.embedding((ids - self.first).clamp(min=0), self.vectors).to(known.dtype)
        return torch.where(is_new[..., None], new, known)


@dataclass(frozen=True)
class _Encoder:
    """A CLIP encoder with new words, and what it was."""

    name: str
    model: Any
    tokenizer_name: str
    tokenizer: Any
    extended: Any
    embedding: ExtendedEmbedding
    ends: tuple[tuple[Any, int], ...]

    @property
    def is_covered(self) -> bool:
        """Whether further words stand on top of these."""
        on_top = self.model.get_input_embeddings()
        return on_top is not self.embedding and isinstance(on_top, ExtendedEmbedding)


class Words:
    """New words in a pipeline: their vectors, and the way back.

    Examples:
        ```python
        import torch

        import dora_diffusion as dd

        pipe = dd.load_pipeline("pocket")
        words = dd.add_words(pipe, {"<zqx>": "robot"})
        optimizer = torch.optim.AdamW(words.parameters(), lr=5e-3)  # train as you like, then
        dd.save_words(words.state(), "words")
        words.remove()  # tokenizer and encoder are what they were
        ```
    """

    def __init__(self, pipe: Any, encoders: Sequence[_Encoder], counts: Mapping[str, int]) -> None:
        self._pipe = pipe
        self._encoders = list(encoders)
        self._counts = dict(counts)

    def __repr__(self) -> str:
        return f"Words({', '.join(self.names)}; read by {', '.join(self.encoders) or 'no encoder any more'})"

    @property
    def names(self) -> tuple[str, ...]:
        """The words, in the order of their ids."""
        return tuple(self._counts)

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders that read them."""
        return tuple(encoder.name for encoder in self._encoders)

    def parameters(self) -> list[nn.Parameter]:
        """The vectors, fp32 (n, width), one tensor for each encoder."""
        return [encoder.embedding.vectors for encoder in self._encoders]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`ENCODER.vectors` -> parameter."""
        return {f"{encoder.name}.vectors": encoder.embedding.vectors for encoder in self._encoders}

    def state(self) -> list[WordState]:
        """A copy of every word."""
        parts = [encoder.embedding.vectors.detach().split(list(self._counts.values())) for encoder in self._encoders]
        return [
            WordState(word, tuple(part[index].clone() for part in parts)) for index, word in enumerate(self._counts)
        ]

    def remove(self) -> None:
        """Leave the pipeline as it was; a tokenizer or an encoder that has been replaced since stays.

        Raises:
            ValueError: an adapter's words were added on top of these.
        """
        self._take_out()
        self._encoders.clear()

    @contextmanager
    def off(self) -> Iterator[None]:
        """While the block lasts the pipeline does not know the words: it reads them by their letters, as before.

        Raises:
            ValueError: an adapter's words were added on top of these.
        """
        self._take_out()
        try:
            yield
        finally:
            for encoder in self._encoders:
                encoder.model.set_input_embeddings(encoder.embedding)
                if getattr(self._pipe, encoder.tokenizer_name, None) is encoder.tokenizer:
                    setattr(self._pipe, encoder.tokenizer_name, encoder.extended)
                for module, _ in encoder.ends:
                    module.eos_token_id = encoder.tokenizer.eos_token_id

    def _take_out(self) -> None:
        if any(encoder.is_covered for encoder in self._encoders):
            raise ValueError(f"{', '.join(self.names)}: adapters brought further words after these; unload them first")
        for encoder in self._encoders:
            encoder.model.set_input_embeddings(encoder.embedding.base)
            if getattr(self._pipe, encoder.tokenizer_name, None) is encoder.extended:
                setattr(self._pipe, encoder.tokenizer_name, encoder.tokenizer)
            for module, end in encoder.ends:
                module.eos_token_id = end


def add_words(pipe: Any, starts: Mapping[str, str], *, vectors: int = 1) -> Words:
    """Add words to every CLIP encoder of a pipeline, to be trained.

    Args:
        pipe: a diffusers pipeline.
        starts: word -> the text that it starts from: its tokens' vectors in turn, or their mean for one vector.
        vectors: how many vectors, and so tokens, a word has.

    Raises:
        ValueError: no CLIP encoder, a word that the vocabulary has or that has spaces, a start of no known token, or
            several vectors for a pipeline that cannot spell them out.

    Examples:
        ```python
        import dora_diffusion as dd

        pipe = dd.load_pipeline("pocket")
        words = dd.add_words(pipe, {"<zqx>": "robot"}, vectors=2)
        picture = pipe("a <zqx> on the beach", num_inference_steps=4).images[0]  # still any robot
        words.remove()
        ```
    """
    names = _clip_encoders(pipe)
    _refuse_second(pipe, names)
    states = [
        WordState(word, tuple(_start_vectors(pipe, name, word, text, vectors) for name in names))
        for word, text in starts.items()
    ]
    return install_words(pipe, states)


def install_words(pipe: Any, states: Iterable[WordState]) -> Words:
    """Put words with known vectors into a pipeline, for drawing or further training.

    Raises:
        ValueError: the pipeline has no CLIP encoders, other ones, or weights that are away; a word that it has already,
            that is given twice, or that has several vectors when the pipeline cannot spell them out.

    Examples:
        ```python
        import dora_diffusion as dd

        pipe = dd.load_pipeline("pocket")
        words = dd.install_words(pipe, [dd.load_word("zqx.safetensors")])
        picture = pipe("a <zqx> on the beach", num_inference_steps=4).images[0]
        ```
    """
    states, names = list(states), _clip_encoders(pipe)
    _refuse_second(pipe, names)
    return install_on_top(pipe, states)


def install_on_top(pipe: Any, states: Sequence[WordState]) -> Words:
    """As `install_words`, beside the words that the pipeline may have already; these must be removed before those."""
    names = _clip_encoders(pipe)
    for state in states:
        _check_widths(pipe, names, state)
    _check_spellings(pipe, states, names)
    encoders = [_extend(pipe, name, states, index) for index, name in enumerate(names)]
    return Words(pipe, encoders, {state.word: len(state.vectors[0]) for state in states})


def _check_widths(pipe: Any, names: Sequence[str], state: WordState) -> None:
    widths = [int(getattr(pipe, name).get_input_embeddings().weight.shape[1]) for name in names]
    got = [int(vector.shape[1]) for vector in state.vectors]
    if got != widths:
        raise ValueError(f"{state.word}: vectors of width {got}, expected {widths}; is it for another base model?")


def _clip_encoders(pipe: Any) -> list[str]:
    """The names of a pipeline's CLIP text encoders; a ValueError when there are none."""
    family = family_of_pipeline(pipe)
    names = [
        part.name
        for part in family.text_encoders
        if any(name.startswith("CLIP") for name in part.model_classes) and getattr(pipe, part.name, None) is not None
    ]
    if not names:
        raise ValueError(f"{family.name}: this pipeline has no CLIP text encoder, which new words need")
    return names


def _refuse_second(pipe: Any, names: Sequence[str]) -> None:
    """A ValueError when the encoders hold words already."""
    if any(isinstance(getattr(pipe, name).get_input_embeddings(), ExtendedEmbedding) for name in names):
        raise ValueError("the pipeline holds new words already: remove them first, or add all of them together")


def _check_spellings(pipe: Any, states: Sequence[WordState], names: Sequence[str]) -> None:
    if any(len(state.vectors[0]) > 1 for state in states) and not hasattr(pipe, "maybe_convert_prompt"):
        most = max(len(state.vectors[0]) for state in states)
        raise ValueError(f"{type(pipe).__name__} reads words of one vector only, got {most} vectors")
    spellings = [spelling for state in states for spelling in _spellings(state)]
    lowered = [spelling.lower() for spelling in spellings]  # which is how CLIP reads them
    for spelling in spellings:
        if lowered.count(spelling.lower()) > 1:
            raise ValueError(f"{spelling!r}: two words are spelt so; expected each once")
        if any(_has(pipe, name, spelling) for name in names):
            raise ValueError(f"{spelling!r}: the base's vocabulary has it already; choose another word")


def _tokenizer_name(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def _has(pipe: Any, encoder: str, word: str) -> bool:
    tokenizer = getattr(pipe, _tokenizer_name(encoder))
    added = {spelling.lower() for spelling in tokenizer.get_added_vocab()}
    return bool(tokenizer.get_vocab().keys() & {word, word.lower()}) or word.lower() in added


def _start_vectors(pipe: Any, encoder: str, word: str, text: str, count: int) -> Tensor:
    """(count, width) fp32: the vectors of the text's tokens in turn, or their mean for one."""
    if not re.fullmatch(r"\S+", word) or word != word.lower():
        raise ValueError(f"{word!r}: a new word has no spaces and no capitals (CLIP reads none), such as '<robot>'")
    tokenizer = getattr(pipe, _tokenizer_name(encoder))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"{word}: got {text!r} to start from, expected a text that the vocabulary knows")
    weight: Tensor = getattr(pipe, encoder).get_input_embeddings().weight
    known = weight.detach()[torch.tensor(ids, device=weight.device)].float()
    if count == 1:
        return known.mean(0, keepdim=True)
    return known[torch.arange(count, device=known.device) % len(known)]


def _extend(pipe: Any, name: str, states: Sequence[WordState], index: int) -> _Encoder:
    """Give one encoder its vectors and one tokenizer its words."""
    model, tokenizer_name = getattr(pipe, name), _tokenizer_name(name)
    tokenizer = getattr(pipe, tokenizer_name)
    extended = copy.deepcopy(tokenizer)
    first = len(extended)
    extended.add_tokens([spelling for state in states for spelling in _spellings(state)])
    base = model.get_input_embeddings()
    if base.weight.is_meta and not states[0].vectors[index].is_meta:
        raise ValueError(f"{name}: its weights are away (sequential CPU offload); words need offload='model' or none")
    vectors = torch.cat([state.vectors[index] for state in states]).to(base.weight.device, torch.float32)
    embedding = ExtendedEmbedding(base, first, vectors)
    ends = tuple((module, module.eos_token_id) for module in model.modules() if hasattr(module, "eos_token_id"))
    model.set_input_embeddings(embedding)
    setattr(pipe, tokenizer_name, extended)
    for module, _ in ends:
        module.eos_token_id = tokenizer.eos_token_id
    return _Encoder(name, model, tokenizer_name, tokenizer, extended, embedding, ends)


def _spellings(state: WordState) -> list[str]:
    """A word's tokens: `<zqx>`, `<zqx>_1` ..., as diffusers spells out words of several vectors."""
    return [state.word, *(f"{state.word}_{number}" for number in range(1, len(state.vectors[0])))]


def bundled_words(pipe: Any, extra: Mapping[str, Tensor]) -> tuple[tuple[WordState, ...], tuple[str, ...]]:
    """The words that an adapter file bundles, for a pipeline, and a line for each that this pipeline does not read.

    Args:
        pipe: a diffusers pipeline.
        extra: tensors of the file beside its layers, by key.

    Raises:
        ValueError: vectors that are none, or of other widths than the pipeline's.
    """
    bundled = parts_by_word(extra)
    if not bundled:
        return (), ()
    try:
        family, names = family_of_pipeline(pipe), _clip_encoders(pipe)
    except ValueError as error:
        return (), tuple(f"new word {word!r} is kept and not used: {error}" for word in bundled)
    words, notes = [], []
    for word, parts in bundled.items():
        named = {part: _encoder_of(part, names, family.signature.encoders) for part in parts}
        vectors = {name: _bundled_vectors(word, parts[part]) for part, name in named.items() if name is not None}
        lacks = [name for name in names if name not in vectors]
        taken = [name for name in names if _has(pipe, name, word)]
        if lacks:
            notes.append(f"new word {word!r} is kept and not used: it has no vectors for {', '.join(lacks)}")
        elif taken:
            notes.append(f"new word {word!r} is kept and not used: prompts have a word of that name already")
        else:
            words.append(WordState(word, tuple(vectors[name] for name in names)))
            _check_widths(pipe, names, words[-1])
            if unread := [part for part, name in named.items() if name is None]:
                notes.append(f"new word {word!r}: its vectors for {', '.join(unread)} are kept and not used")
    return tuple(words), tuple(notes)


def _encoder_of(part: str, names: Sequence[str], encoders: Mapping[str, str]) -> str | None:
    """Which of the CLIP encoders a part of a bundled word is for; None where it is for none of them."""
    if part.endswith("_out") or part.startswith("t5"):
        return None
    if encoders.get(part) in names:
        return encoders[part]
    return names[0] if len(names) == 1 and part not in encoders else None


def _bundled_vectors(word: str, tensor: Tensor) -> Tensor:
    """(vectors, width) fp32."""
    vectors = tensor[None] if tensor.dim() == 1 else tensor
    if vectors.dim() != 2 or not vectors.numel() or not vectors.is_floating_point():
        raise ValueError(f"new word {word!r}: expected vectors (count, width), got {tuple(tensor.shape)}")
    return vectors.float()


def save_words(states: Iterable[WordState], folder: str | Path) -> list[Path]:
    """Write a file for each word, atomically: `folder/zqx.safetensors` for `<zqx>`.

    One encoder's vectors are keyed by the word, as diffusers does; two are `clip_l` and `clip_g`.

    Examples:
        ```python
        import dora_diffusion as dd

        words = dd.add_words(dd.load_pipeline("pocket"), {"<zqx>": "robot", "<ink>": "pen"})
        print(dd.save_words(words.state(), "words"))  # words/zqx.safetensors, words/ink.safetensors
        ```
    """
    taken: set[str] = set()
    paths = []
    for state in states:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", state.word).strip("-") or "word"
        candidates = (plain, *(f"{plain}-{number}" for number in range(2, 10_000)))
        stem = next(name for name in candidates if name.lower() not in taken)  # some disks know no capitals
        taken.add(stem.lower())
        paths.append(_save_word(state, Path(folder), stem))
    return paths


def _save_word(state: WordState, folder: Path, stem: str) -> Path:
    path = folder / f"{stem}.safetensors"
    keys = (state.word,) if len(state.vectors) == 1 else PAIR_KEYS
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(dict(zip(keys, state.vectors, strict=True)), path, {"format": "pt", _METADATA: state.word})
    return path


def load_word(path: str | Path, *, word: str | None = None) -> WordState:
    """Read a word's file: ours, diffusers' or A1111's.

    Args:
        path: a safetensors file.
        word: how prompts shall spell it; None takes what the file says.

    Raises:
        ValueError: one line that names the file: broken, no vectors of words, or a word that it does not tell.

    Examples:
        ```python
        import dora_diffusion as dd

        word = dd.load_word("zqx.safetensors", word="<robot>")  # prompts shall spell it so
        words = dd.install_words(dd.load_pipeline("pocket"), [word])
        ```
    """
    contents = read_tensors(path)
    tensors = contents.tensors
    keys = list(tensors)
    if set(keys) == set(PAIR_KEYS):
        vectors, spelt = tuple(tensors[key] for key in PAIR_KEYS), None
    elif len(keys) == 1:
        vectors, spelt = (tensors[keys[0]],), None if keys[0] in ("emb_params", "*") else keys[0]
    else:
        raise ValueError(f"{path}: expected the vectors of one word, got {len(keys)} tensors, {keys[:1]} first")
    vectors = tuple(vector[None] if vector.dim() == 1 else vector for vector in vectors)
    if any(vector.dim() != 2 or not vector.is_floating_point() for vector in vectors):
        raise ValueError(f"{path}: expected vectors (count, width), got {tuple(vectors[0].shape)}")
    if len({len(vector) for vector in vectors}) > 1:
        raise ValueError(f"{path}: expected as many vectors for each encoder, got {[len(v) for v in vectors]}")
    name = word or contents.metadata.get(_METADATA) or spelt or Path(path).stem
    return WordState(name, tuple(vector.float() for vector in vectors), contents.sha256)
