"""What the layers allocate and keep, counted tensor by tensor."""

import pytest
import torch
from torch import nn

from benchmarks.peers.memory import kept_for_backward, largest_tensor
from dora_diffusion.functional import dora as f
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject

SIZE = 1536


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_grad", ["detached", "exact"])
def test_the_norm_makes_no_tensor_of_the_weights_size(dtype: torch.dtype, norm_grad: str) -> None:
    with torch.device("cpu"):
        model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False)).to(dtype)
    inject(model, DoRAConfig(rank=4, target_modules=["0"], norm_grad=norm_grad))
    with torch.no_grad():
        model[0].adapter.up.normal_()
    largest = largest_tensor(lambda: model[0].gain().sum().backward())
    block = 4 * (f.BLOCK if dtype == torch.bfloat16 else 0)
    assert largest <= max(block, 4 * 4 * SIZE)
    assert largest < 4 * SIZE * SIZE / 2
    adapter, weight = model[0].adapter, model[0].base.weight
    dense = largest_tensor(lambda: (weight.float() + adapter.up @ adapter.down).norm(dim=1))
    assert dense == 4 * SIZE * SIZE  # the measure sees what it should


@pytest.mark.parametrize("bias", [True, False])
def test_a_dora_layer_keeps_one_activation_more_than_a_lora_layer(bias: bool) -> None:
    tokens, out, rank = 512, 48, 4
    sizes = {}
    for use_dora in (False, True):
        model = nn.Sequential(nn.Linear(32, out, bias=bias))
        inject(model, DoRAConfig(rank=rank, target_modules=["0"], use_dora=use_dora)).keep_norms()
        x = torch.randn(tokens, 32)
        sizes[use_dora] = kept_for_backward(lambda model=model, x=x: model(x), list(model.parameters()))
    extra = sizes[True] - sizes[False]
    assert 4 * tokens * out <= extra <= 4 * tokens * out + 4 * 8 * out
