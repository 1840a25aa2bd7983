"""A tiny Gemma 2 and its kind of tokenizer."""

from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from tests.families.pipelines.tokenizers import letters

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def gemma_tokenizer(instruction: str) -> GemmaTokenizer:
    """Tokens of characters, joined where the instruction that a pipeline puts first has them often: it is long."""
    pieces = (*SPECIAL, "\u2581", *letters()[1:], "\n")
    tokenizer = GemmaTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, padding_side="right")
    return tokenizer.train_new_from_iterator([instruction, *letters()], vocab_size=600)


def gemma(tokenizer: GemmaTokenizer, width: int = 16) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
