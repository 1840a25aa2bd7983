"""Whatever part of a published model an adapter changes, in every format: never taken for another family's.

A file may leave open what it is for (many models share names and sizes of their attention): then the family is None, or
an error asks where the layers lie. With the family told, every layer is where it was.
"""

import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dora_diffusion.formats import FORMATS
from dora_diffusion.formats.dialects import PEFT_FILE
from dora_diffusion.formats.family_detection import family_of
from dora_diffusion.formats.reading import FAMILY_KEY, read, take_apart
from dora_diffusion.formats.writing import write
from dora_diffusion.state import AdapterState, FactoredState, Module
from tests.formats.published_layers import MODELS, Shapes, blank, layers_of, pair


def some_of(shapes: Shapes, how: str, chosen: random.Random) -> Shapes:
    """One layer, one block, one kind of layer, a few, or all of them."""
    names = list(shapes)
    one = chosen.choice(names)
    block = ".".join(one.split(".")[:3]) + "."
    kept = {
        "one": [one],
        "few": chosen.sample(names, min(len(names), 5)),
        "block": [name for name in names if name.startswith(block)][:60],
        "kind": [name for name in names if name.rpartition(".")[2] == one.rpartition(".")[2]][:60],
        "component": [name for name in names if name.split(".")[0] == one.split(".")[0]],
    }[how]
    return {name: shapes[name] for name in kept or [one]}


def module(shape: tuple[int, ...], algorithm: str) -> Module:
    out, *rest = shape
    if algorithm == "lokr" and out % 2 == 0 and rest[0] % 2 == 0:
        factors = {
            "lokr_w1": blank(2, 2),
            "lokr_w2_a": blank(out // 2, 1),
            "lokr_w2_b": blank(1, rest[0] // 2, *rest[1:]),
        }
        return FactoredState("lokr", factors, alpha=1.0)
    if algorithm == "loha" and len(rest) == 1:  # flat factors of a convolution do not tell that it is one
        columns = torch.Size(rest).numel()
        factors = {
            f"hada_w{number}_{half}": blank(*size)
            for number in (1, 2)
            for half, size in (("a", (out, 1)), ("b", (1, columns)))
        }
        return FactoredState("loha", factors, alpha=1.0)
    return pair(shape)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    format=st.sampled_from(sorted(set(FORMATS) - {PEFT_FILE.name})),
    how=st.sampled_from(["one", "few", "block", "kind", "component"]),
    algorithm=st.sampled_from(["pair", "pair", "lokr", "loha"]),
    seed=st.integers(0, 10**6),
)
def test_a_part_of_a_model_is_of_its_family_or_of_none(
    name: str, format: str, how: str, algorithm: str, seed: int
) -> None:
    family, shapes = layers_of(name)
    part = some_of(shapes, how, random.Random(seed))
    modules = {path: module(shape, algorithm) for path, shape in part.items()}
    try:
        tensors, _ = write(AdapterState(modules, {FAMILY_KEY: family}), FORMATS[format])
    except ValueError:
        assume(False)  # what a format cannot hold, it says
    sizes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    told = {FAMILY_KEY: family}
    known = read(tensors, told, take_apart(sizes, told))
    # a part of a fused layer is written with zeros for the others
    assert modules.keys() <= known.modules.keys() <= shapes.keys() and not known.extra
    assert family_of(known) == family
    try:
        found = read(tensors, {}, take_apart(sizes, {}))
    except ValueError as asks:
        assert "say which (family=" in str(asks) and family in str(asks)
        return
    assert family_of(found) in (family, None)
    if family_of(found) == family:
        assert found.modules.keys() == known.modules.keys()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_whole_denoiser_is_told_in_its_makers_names(name: str) -> None:
    family, shapes = layers_of(name)
    denoiser = {path: shape for path, shape in shapes.items() if not path.startswith("text_encoder")}
    modules = {path: module(shape, "pair") for path, shape in denoiser.items()}
    try:
        tensors, _ = write(AdapterState(modules, {FAMILY_KEY: family}), FORMATS["comfyui"])
    except ValueError as error:
        pytest.skip(f"no original names: {error}")
    found = read(tensors, {}, take_apart({key: tuple(tensor.shape) for key, tensor in tensors.items()}, {}))
    told = None if family == "pixart-sigma" else family  # its layers are all alpha's too
    assert family_of(found) == told and found.modules.keys() == modules.keys()
