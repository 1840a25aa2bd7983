"""What a run was made of: told apart by hashes of weights, pictures, captions and settings."""

import pytest
import torch
from torch import nn

from dora_diffusion.training.base.identity import weights_digest


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(8, 4), nn.Linear(700, 600))
    with torch.no_grad():
        for index, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return made


def test_a_digest_is_of_names_shapes_dtypes_and_values() -> None:
    digest = weights_digest(model())
    assert weights_digest(model()) == digest and len(digest) == 64
    others = [nn.Sequential(model()), model().half(), model()[:1]]
    changed = model()
    with torch.no_grad():
        changed[0].bias[3] += 1e-6
    fine_tuned = model()
    with torch.no_grad():
        fine_tuned[1].weight.add_(1e-6)  # of 1.6 MiB, of which a part is read
    reshaped = model()
    reshaped[0].weight = nn.Parameter(reshaped[0].weight.detach().reshape(8, 4))
    digests = [weights_digest(other) for other in (*others, changed, fine_tuned, reshaped)]
    assert len({digest, *digests}) == 7


def test_a_digest_does_not_depend_on_the_layout_in_memory() -> None:
    there = model()
    there[1].weight.data = there[1].weight.data.T.contiguous().T
    assert not there[1].weight.is_contiguous()
    assert weights_digest(there) == weights_digest(model())


@pytest.mark.parametrize("column", [0, 1, 1023])
def test_every_column_of_a_large_matrix_is_seen(column) -> None:
    """At a distance of 4 in rows of 1,024 three columns of four would never be read."""
    large = nn.Linear(1024, 1024, bias=False)
    before = weights_digest(large)
    with torch.no_grad():
        large.weight[:, column] += 1
    assert weights_digest(large) != before


def test_dtypes_of_quantised_weights_and_empty_tensors_are_read() -> None:
    odd = nn.Module()
    odd.register_buffer("packed", torch.arange(6, dtype=torch.uint8))
    odd.register_buffer("eighth", torch.ones(3).to(torch.float8_e4m3fn))
    odd.register_buffer("brain", torch.ones(3, dtype=torch.bfloat16))
    odd.register_buffer("none", torch.empty(0, 4))
    odd.register_buffer("number", torch.tensor(3))
    odd.register_buffer("flags", torch.tensor([True, False]))
    before = weights_digest(odd)
    odd.flags[1] = True
    assert weights_digest(odd) != before


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="weight: is on the meta device"):
        weights_digest(nn.Linear(2, 2, device="meta", bias=False))
