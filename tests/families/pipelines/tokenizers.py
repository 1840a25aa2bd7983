"""Small tokenizers of the kinds that the families have, learnt on the spot, for none can be downloaded."""

import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5TokenizerFast,
)

from dora_diffusion.pretrain.tokens import train_tokenizer

CAPTIONS = ("a noto style cat on a red background", "a small flat style castle in a forest") * 2


def clip_tokenizer(length: int = 32) -> CLIPTokenizer:
    """CLIP's kind."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(CAPTIONS, Path(folder))
    tokenizer.model_max_length = length
    return tokenizer


def letters() -> list[str]:
    """The printable ASCII characters."""
    return [chr(code) for code in range(32, 127)]


def t5_tokenizer(length: int = 16) -> T5TokenizerFast:
    """T5's kind: a unigram model of single characters, `</s>` at the end."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -2.0), *((c, -3.0) for c in letters()[1:])]
    model = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=model, model_max_length=length, extra_ids=0)


QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's kind: byte-level BPE that never merges, and its chat template."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    pieces = (*special, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Qwen2Tokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(special[1:])})
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


MISTRAL_CHAT = (
    "{% for message in messages %}{% set text = message.content[0].text %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ text }}[/INST]"
    "{% endif %}{% endfor %}"
)


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Mistral 3's kind, without the processor of pictures around it, which needs torchvision: padded on the left."""
    special = ("<pad>", "<s>", "</s>", "[IMG]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    pieces = (*special, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    model = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(special[3:]),
        padding_side="left",
        chat_template=MISTRAL_CHAT,
    )
