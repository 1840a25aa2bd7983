"""Sizes and angles of what adapters change, against whole dense differences."""

import json

import pytest
import torch
from torch import Tensor

from dora_diffusion.blending import interference
from dora_diffusion.blending.interference import block_of
from dora_diffusion.functional.blend_modes import MODES, AdapterTerm
from dora_diffusion.state import AdapterState
from tests.unit.blending.adapters import CONV, LINEAR, SHAPES, TEXT, adapter, base


def change(path: str, found: AdapterState) -> Tensor:
    module = found.modules[path]
    dense = MODES["additive"](base(path), [AdapterTerm(module.delta(), module.magnitude, module.axis)])
    return (dense - base(path)).flatten()


def whole(found: AdapterState) -> Tensor:
    return torch.cat([change(path, found) if path in found.modules else 0 * base(path).flatten() for path in SHAPES])


def test_norms_and_cosines_are_those_of_the_dense_differences() -> None:
    adapters = {"a": adapter(1), "b": adapter(20, axis="in"), "c": adapter(40, dora=False, paths=(LINEAR, CONV))}
    found = interference(adapters, base=base)
    for name, one in adapters.items():
        assert found.overall[name] == pytest.approx(float(whole(one).norm()))
        assert found.norms[name]["unet.down_blocks.0"] == pytest.approx(float(change(LINEAR, one).norm()))
    for (one, other), cosine in found.overall_cosines.items():
        a, b = whole(adapters[one]), whole(adapters[other])
        assert cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)))
        a, b = change(CONV, adapters[one]), change(CONV, adapters[other])
        expected = float(torch.cosine_similarity(a, b, dim=0))
        assert found.cosines[one, other]["unet.up_blocks.1"] == pytest.approx(expected)
    assert "text_encoder.encoder.layers.0" not in found.norms["c"]
    assert found.cosines["a", "c"]["text_encoder.encoder.layers.0"] == 0
    assert found.shared == {("a", "b"): 3, ("a", "c"): 2, ("b", "c"): 2}


def test_an_adapter_and_itself_pull_together() -> None:
    found = interference({"a": adapter(1), "b": adapter(1)}, base=base)
    assert found.overall_cosines["a", "b"] == pytest.approx(1)


def test_it_reads_for_people_and_as_json() -> None:
    found = interference({"a": adapter(1), "long name": adapter(20, paths=(TEXT,))}, base=base)
    lines = found.table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["block", "a", "long", "name", "a", "~", "long", "name"]
    assert lines[-1].startswith("all")
    facts = json.loads(json.dumps(found.as_json()))
    assert facts["pairs"][0]["adapters"] == ["a", "long name"]
    assert facts["norms"]["a"]["overall"] == pytest.approx(found.overall["a"])


def test_blocks() -> None:
    assert block_of("unet.down_blocks.1.attentions.0.proj_in") == "unet.down_blocks.1"
    assert block_of("transformer.single_transformer_blocks.12.attn.to_q") == "transformer.single_transformer_blocks.12"
    assert block_of("unet.conv_in") == "unet.conv_in"
    assert block_of("unet.time_embedding.linear_1") == "unet.time_embedding"
