"""What the layers allocate and keep, counted tensor by tensor."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dora_diffusion import functional as f
from dora_diffusion.injection import DoRAConfig, inject

SIZE = 1536


class Largest(TorchDispatchMode):
    """The most bytes of one tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_grad", ["detached", "exact"])
def test_the_norm_makes_no_tensor_of_the_weights_size(dtype: torch.dtype, norm_grad: str) -> None:
    with torch.device("cpu"):
        model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False)).to(dtype)
    inject(model, DoRAConfig(rank=4, target_modules=["0"], norm_grad=norm_grad))
    with torch.no_grad():
        model[0].adapter.up.normal_()
    with Largest() as largest:
        gain = model[0].gain()
        gain.sum().backward()
    block = 4 * (f.BLOCK if dtype == torch.bfloat16 else 0)
    assert largest.bytes <= max(block, 4 * 4 * SIZE)
    assert largest.bytes < 4 * SIZE * SIZE / 2
    with Largest() as dense:
        (model[0].base.weight.float() + model[0].adapter.up @ model[0].adapter.down).norm(dim=1)
    assert dense.bytes == 4 * SIZE * SIZE  # the measure sees what it should


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for the backward pass, parameters not counted."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    return sum(found.values())


@pytest.mark.parametrize("bias", [True, False])
def test_a_dora_layer_keeps_one_activation_more_than_a_lora_layer(bias: bool) -> None:
    tokens, out, rank = 512, 48, 4
    sizes = {}
    for use_dora in (False, True):
        model = nn.Sequential(nn.Linear(32, out, bias=bias))
        inject(model, DoRAConfig(rank=rank, target_modules=["0"], use_dora=use_dora)).keep_norms()
        sizes[use_dora] = kept(model, torch.randn(tokens, 32))
    extra = sizes[True] - sizes[False]
    assert 4 * tokens * out <= extra <= 4 * tokens * out + 4 * 8 * out
