"""Presets of models that no family knows: language models, and denoisers of other makers."""

from collections.abc import Callable

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaModel

import dora_diffusion as dd
from dora_diffusion.layers.targets import preset_paths

_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=1, tie_word_embeddings=True))


def roberta() -> nn.Module:
    return RobertaModel(RobertaConfig(**_SIZES))


def gpt2() -> nn.Module:
    return GPT2Model(GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=32))


def wan() -> nn.Module:
    return WanTransformer3DModel(num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=32, text_dim=16)


COUNTS = {  # attention, all-linear, all
    llama: (2 * 4, 2 * 7, 2 * 7),  # its table is its output too: an adapter would be folded into both
    roberta: (2 * 4, 2 * 6 + 1, 2 * 6 + 1 + 3),
    gpt2: (2 * 2, 2 * 4, 2 * 4 + 2),
    wan: (2 * 8, 2 * 10 + 6, 2 * 10 + 6 + 1),
}


@pytest.mark.parametrize("make", COUNTS, ids=lambda make: make.__name__)
def test_presets_find_what_their_names_say(make: Callable[[], nn.Module]) -> None:
    model = make()
    found = [preset_paths(model, preset) for preset in ("attention", "all-linear", "all")]
    assert tuple(map(len, found)) == COUNTS[make]
    assert set(found[0]) <= set(found[1]) <= set(found[2])
    assert all("attn" in path or "attention" in path for path in found[0])


@pytest.mark.parametrize("make", COUNTS, ids=lambda make: make.__name__)
def test_injection_and_a_manager_take_them(make: Callable[[], nn.Module]) -> None:
    model = make()
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    injection = dd.inject(model, dd.DoRAConfig(rank=2, target_modules="all-linear"))
    assert len(injection.matched) == COUNTS[make][1]
    injection.eject()
    manager = dd.AdapterManager(model)
    manager.enable_hotswap(max_rank=2)
    manager.unload()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_blocks_that_hold_attention_beside_other_layers_are_none() -> None:
    class CrossAttnBlock2D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attentions = nn.ModuleList([nn.ModuleDict({"attn1": nn.Linear(2, 2), "proj": nn.Linear(2, 2)})])
            self.time_emb_proj = nn.Linear(2, 2)
            self.self_attn = nn.ModuleDict({"q": nn.Linear(2, 2)})

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(2, 2)
            self.inner = CrossAttnBlock2D()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = CrossAttnBlock2D()
            self.mixer = SelfAttention()

    found = preset_paths(Model(), "attention")
    assert found is not None
    assert "mixer.q" in found and "block.time_emb_proj" not in found and "block.attentions.0.proj" not in found


def test_a_name_that_is_no_preset_is_an_expression() -> None:
    assert preset_paths(llama(), r"model\.layers\.0\.mlp\.\w+_proj") is None
    injection = dd.inject(llama(), dd.DoRAConfig(rank=1, target_modules=r"model\.layers\.0\.mlp\.\w+_proj"))
    assert len(injection.matched) == 3
