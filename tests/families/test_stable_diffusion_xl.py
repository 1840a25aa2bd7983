"""What only SDXL does: an empty caption is zeros, as its pipeline asks without a negative prompt."""

import torch

from dora_diffusion.families import family_of_pipeline
from tests.families.pipelines import PIPELINES
from tests.tolerances import assert_identical


def test_an_empty_caption_is_what_the_pipeline_guides_away_from() -> None:
    pipe = PIPELINES["sdxl"].build()
    with torch.no_grad():
        ours = family_of_pipeline(pipe).encode(pipe, ["", "a cat"])
        hidden, empty, pooled, empty_pooled = pipe.encode_prompt("a cat", do_classifier_free_guidance=True)
    assert_identical(ours["encoder_hidden_states"][:1], empty)
    assert_identical(ours["text_embeds"][:1], empty_pooled)
    assert torch.count_nonzero(hidden) and torch.count_nonzero(pooled)
    torch.testing.assert_close(ours["encoder_hidden_states"][1:], hidden)
    torch.testing.assert_close(ours["text_embeds"][1:], pooled)
