"""A small byte-pair tokenizer in CLIP's file format, learnt from the captions; unseen words fall back to letters."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from dora_diffusion.utils.atomic import write_atomically

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 32


def train_tokenizer(captions: Iterable[str], folder: Path, size: int = 1400) -> CLIPTokenizer:
    """Learn merges from captions and write `vocab.json` and `merges.txt` as CLIP's tokenizer reads them.

    Args:
        captions: training text.
        folder: where the two files go.
        size: an upper bound on the vocabulary (512 byte symbols, then merges, then the two marks).
    """
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = Lowercase()
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted(ByteLevel.alphabet())
    words = (word for caption in captions for word in caption.replace(",", " , ").split())
    trainer = BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, end_of_word_suffix="</w>", min_frequency=2, show_progress=False
    )
    learner.train_from_iterator(words, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    symbols = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges), START, END]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False).encode())
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    write_atomically(folder / "merges.txt", ("\n".join(lines) + "\n").encode())  # last: it says that all is there
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=MAX_TOKENS
    )
