"""Which strength a layer gets."""

import pytest

from dora_diffusion.functional.strengths import check_strength, strength_at


def test_longest_part_decides() -> None:
    weight = {"unet": 0.8, "unet.up_blocks": 1.2, "unet.up_blocks.1": 0.1}
    paths = ["unet.mid.x", "unet.up_blocks.0.x", "unet.up_blocks.1.x", "unet.up_blocks.10.x", "text_encoder.x"]
    assert [strength_at(path, weight) for path in paths] == [0.8, 1.2, 0.1, 1.2, 0.0]


def test_a_whole_component_may_be_named_without_layers_a_part_may_not() -> None:
    check_strength("a", {"text_encoder_2": 0.5, "unet": 1.0, "unet.mid": 0.0}, ["unet.mid.x"])
    with pytest.raises(ValueError, match="'unet.up' holds none of its layers"):
        check_strength("a", {"unet.up": 1.0}, ["unet.mid.x"])
