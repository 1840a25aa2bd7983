"""An empty caption trains what guidance guides away from: for Gemma's families that is text without the instruction."""

import pytest
import torch

from dora_diffusion.families import family_of_pipeline
from tests.families.pipelines import PIPELINES
from tests.tolerances import assert_close


@pytest.mark.parametrize("name", ["sana", "lumina2"])
def test_an_empty_caption_is_what_the_pipeline_guides_away_from(name) -> None:
    pipe = PIPELINES[name].build()
    with torch.no_grad():
        conditioning = family_of_pipeline(pipe).encode(pipe, ["a cat", ""])
        _, _, hidden, mask = pipe.encode_prompt("a cat", True, negative_prompt="")
    assert_close(conditioning["encoder_hidden_states"][1:], hidden)
    assert_close(conditioning["encoder_attention_mask"][1:], mask)
    assert int(conditioning["encoder_attention_mask"][1].sum()) < int(conditioning["encoder_attention_mask"][0].sum())
