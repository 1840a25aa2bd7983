"""Which weights a model has, in one short text: what was made with others must not be taken for theirs."""

import hashlib
import math

import torch
from torch import Tensor, nn

from dora_diffusion.layers.offloaded import whole

_WHOLE_BYTES = 2**20


def weights_digest(module: nn.Module) -> str:
    """A hash of a model's weights: every name, shape and dtype, and of each tensor the values, or up to 1 MiB of them.

    Of a larger tensor values are taken at equal distances, from all rows and columns, so that a model of any size
    takes seconds: whoever changes a single number of a large tensor is not noticed. The device and the layout in
    memory make no difference, the dtype does, nor do processes that keep a part each. Adapters that were injected are
    weights too.

    Args:
        module: a component of a base, such as its VAE or a text encoder; not of a skeleton without weights.

    Raises:
        ValueError: a tensor has no values, being on the meta device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):  # some layers keep notes there too
            _add(digest, name, whole(tensor.detach()))
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Take a tensor into a hash; one that is made of others, as quantised ones may be, by what it is made of."""
    if tensor.is_meta:
        raise ValueError(f"{name}: is on the meta device and has no values to compare; load the weights first")
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    if hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            _add(digest, f"{name}.{inner}", getattr(tensor, inner))
        return
    digest.update(_sample(tensor).cpu().contiguous().view(torch.uint8).numpy().data)


def _sample(tensor: Tensor) -> Tensor:
    """Its values in a row, or as many of them as make up a mebibyte."""
    values = tensor.as_subclass(Tensor).reshape(-1)
    distance = math.ceil(tensor.numel() * tensor.element_size() / _WHOLE_BYTES)
    while distance > 1 and math.gcd(distance, tensor.numel()) > 1:  # a divisor of a row's length skips columns
        distance += 1
    return values[:: max(1, distance)]
