"""Flat names: every path of every known model comes back from its flat name, and nothing is guessed."""

import re
import time
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.full_size.models import pipeline_of
from benchmarks.full_size.published import PUBLISHED
from dora_diffusion.families import FAMILIES, family_of_pipeline
from dora_diffusion.formats.flat_names import DIFFUSERS, MAKERS, TEXT_ENCODERS, choices, flatten, unflatten
from dora_diffusion.formats.layouts import LAYOUTS
from tests.families.pipelines import PIPELINES

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
WORDS = sorted({word for line in (*DIFFUSERS, *TEXT_ENCODERS, *MAKERS) for word in re.split(r"[^A-Za-z0-9]+", line)})


@pytest.mark.parametrize("name", PIPELINES)
def test_every_path_of_every_model_comes_back(name: str) -> None:
    pipe = PIPELINES[name].build()
    for component in (family_of_pipeline(pipe).denoiser.name, *ENCODERS):
        if (model := getattr(pipe, component, None)) is not None:
            # from `1` on, a name would be a bare number
            paths = [path for path, _ in model.named_modules() if path]
            paths += [path.removeprefix("text_model.") for path in paths if path != "text_model"]
            wrong = {path: unflatten(flatten(path)) for path in paths if unflatten(flatten(path)) != path}
            assert wrong == {}, component


@cache
def paths_of(name: str, component: str) -> tuple[str, ...]:
    published = next(model for model in PUBLISHED if model.name == name)
    model = getattr(pipeline_of(published), component)
    holders = {parameter.rpartition(".")[0] for parameter, _ in model.named_parameters()}
    return tuple(path.removeprefix("text_model.") for path in holders if path)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_name_of_the_makers_comes_back_at_real_size(layout) -> None:
    seen = set()
    for published in PUBLISHED:
        if published.family in layout.families and layout.component in published.parts:
            fusions = [layout.of_path(path) for path in paths_of(published.name, layout.component)]
            seen |= {fusion.original for fusion in fusions if fusion is not None}
    assert seen and {name: unflatten(flatten(name)) for name in seen if unflatten(flatten(name)) != name} == {}


def test_no_two_patterns_look_the_same_when_flat() -> None:
    whole = {path for line in (*DIFFUSERS, *TEXT_ENCODERS, *MAKERS) for path in choices(line)}
    paths = {".".join(path.split(".")[:end]) for path in whole for end in range(1, path.count(".") + 2)}
    assert len({flatten(path) for path in paths}) == len(paths)


@pytest.mark.parametrize(
    "flat",
    [
        *(
            "",
            "_",
            "0",
            "to_q",
            "down_blocks_",
            "_down_blocks_0",
            "down_blocks_0_",
            "down__blocks_0",
            "down_blocks_0_to",
        ),
        *("down_blocks_x_resnets_0", "down_blocks_#_resnets_0", "down_blocks_2-1_resnets_0", "down_blocks_٣_resnets_0"),
        *("blocks_0_attn_to_q", "transformer_blocks_0_attn1_to_q_proj", "mid_block.resnets_0", "wan_blocks_0_ffn_0"),
        *("down_blocks_0_resnets_0\n", "mid_block_attentions_0_transformer_blocks_0_attn3_to_q"),
    ],
)
def test_what_no_model_has_is_not_guessed(flat: str) -> None:
    assert unflatten(flat) is None


@given(st.text() | st.lists(st.sampled_from([*WORDS, "0", "11", "-", "#"])).map("_".join))
def test_a_guess_flattens_to_the_same_text(flat: str) -> None:
    path = unflatten(flat)
    assert path is None or flatten(path) == flat.replace(".", "_") == flat


def test_hostile_names_take_no_time() -> None:
    hostile = ["down_blocks_" + "0_" * 5000, "transformer_blocks_0_" * 11, "to_out_0_" * 28, "norm_out_" * 2000]
    start = time.perf_counter()
    for _ in range(25_000):
        assert not any(unflatten(flat) for flat in hostile)
    assert time.perf_counter() - start < 10


def test_every_family_is_among_the_pipelines() -> None:
    assert {family_of_pipeline(tiny.build()).name for tiny in PIPELINES.values()} == {
        family.name for family in FAMILIES
    }
