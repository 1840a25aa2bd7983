"""Which strength a layer gets."""

import pytest

from dora_diffusion.functional.strengths import check_strength, strength_at, strengths_by_name


def test_longest_part_decides() -> None:
    weight = {"unet": 0.8, "unet.up_blocks": 1.2, "unet.up_blocks.1": 0.1}
    paths = ["unet.mid.x", "unet.up_blocks.0.x", "unet.up_blocks.1.x", "unet.up_blocks.10.x", "text_encoder.x"]
    assert [strength_at(path, weight) for path in paths] == [0.8, 1.2, 0.1, 1.2, 0.0]


def test_a_whole_component_may_be_named_without_layers_a_part_may_not() -> None:
    check_strength("a", {"text_encoder_2": 0.5, "unet": 1.0, "unet.mid": 0.0}, ["unet.mid.x"])
    with pytest.raises(ValueError, match="'unet.up' holds none of its layers"):
        check_strength("a", {"unet.up": 1.0}, ["unet.mid.x"])


@pytest.mark.parametrize(
    ("adapters", "weights", "meant"),
    [
        ({"a": 0.5, "b": {"unet": 2.0}}, None, {"a": 0.5, "b": {"unet": 2.0}}),
        (["a", "b"], [0.5, {"unet": 2.0}], {"a": 0.5, "b": {"unet": 2.0}}),
        (("b", "a"), (0.5, None), {"b": 0.5, "a": 1.0}),
        (["a", "b"], 0.25, {"a": 0.25, "b": 0.25}),
        (["a", "b"], {"unet": 0.25}, {"a": {"unet": 0.25}, "b": {"unet": 0.25}}),
        (["a", "b"], None, {"a": 1.0, "b": 1.0}),
        ("ink", 0.5, {"ink": 0.5}),
        ("ink", [0.5], {"ink": 0.5}),
        ("ink", None, {"ink": 1.0}),
        ([], None, {}),
    ],
)
def test_names_and_strengths_are_taken_as_diffusers_takes_them(adapters, weights, meant) -> None:
    by_name = strengths_by_name(adapters, weights)
    assert by_name == meant and list(by_name) == list(meant)


@pytest.mark.parametrize(
    ("adapters", "weights", "message"),
    [
        (["a", "b"], [1.0], "set_adapters: 2 adapters and 1 weights; expected one each"),
        ("ink", [1.0, 2.0, 3.0], "set_adapters: 1 adapters and 3 weights; expected one each"),
        (["a", "b", "a"], [1.0, 0.5, 0.5], "set_adapters: 'a' is named twice; expected every adapter once"),
        ({"a": 1.0}, [1.0], 'set_adapters: strengths twice; expected {"ink": 0.8}, or ["ink"] and [0.8]'),
        (None, None, 'set_adapters: got nothing (NoneType), expected {"ink": 0.8}, or ["ink"] and [0.8]'),
        ([1, 2], None, 'set_adapters: got [1, 2] (list), expected {"ink": 0.8}, or ["ink"] and [0.8]'),
    ],
)
def test_names_without_their_strengths_are_refused_in_one_line(adapters, weights, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        strengths_by_name(adapters, weights)
    assert str(refused.value) == message
