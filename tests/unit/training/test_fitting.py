"""Settings that fit a card: the least is given up first, and what is told fits."""

import re
from typing import Any

import pytest

from dora_diffusion.training.base.memory import MemoryEstimate
from dora_diffusion.training.config import PRESETS, TrainConfig
from dora_diffusion.training.run.fitting import GIB, fitted, fitting_lines, usable, with_settings

STEP = "a step of 1"
BLOCKS = 10


def config_of(folder: Any, **sections: dict[str, Any]) -> TrainConfig:
    return TrainConfig.model_validate({"output_dir": folder / "run", "data": {"instance_dir": folder}, **sections})


def estimate(config: TrainConfig) -> MemoryEstimate:
    """A base of 20 GiB in bf16 and 5 in nf4, of ten blocks; activations of 8 a picture, of 2 with checkpointing."""
    half = config.optim.mixed_precision == "bf16"
    weights = (5 if config.base.quantise else 20) * (1 if half else 2) * GIB
    activations = (2 if config.optim.gradient_checkpointing else 8) * config.optim.batch_size * GIB
    spared = tuple(max(0, count - 2) * weights * 6 // 100 for count in range(BLOCKS + 1))
    places = {STEP: ("unet",)}
    found = MemoryEstimate({"unet": weights}, 0, 0, 0, {STEP: activations}, places, 512, "unet", spared)
    return found.with_swapped(config.base.swap_blocks) if config.base.swap_blocks else found


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (50, {}),
        (30, {"optim.mixed_precision": "bf16"}),
        (23, {"optim.gradient_checkpointing": True}),
        (18, {"base.swap_blocks": 6}),
        (6, {"base.quantise": "nf4", "base.swap_blocks": 6}),
        (8, {"base.quantise": "nf4"}),
    ],
)
def test_the_least_that_fits_is_taken(tmp_path, room: int, expected: dict[str, Any]) -> None:
    config = config_of(tmp_path, optim={"mixed_precision": "no"})
    tried = fitted(config, room * GIB, estimate)
    assert expected.items() <= tried[-1].settings.items()
    assert ("base.quantise" in tried[-1].settings) == ("base.quantise" in expected)
    assert tried[-1].estimate.total <= room * GIB
    assert all(one.estimate.total > room * GIB for one in tried[:-1])
    again = estimate(with_settings(config, tried[-1].settings))  # as a run with these settings has it
    assert again.total == tried[-1].estimate.total


def test_a_batch_is_taken_picture_by_picture_before_anything_is_swapped(tmp_path) -> None:
    config = config_of(
        tmp_path,
        optim={"batch_size": 4, "gradient_accumulation": 2, "mixed_precision": "bf16", "gradient_checkpointing": True},
    )
    tried = fitted(config, 23 * GIB, estimate)
    assert tried[-1].settings == {"optim.batch_size": 1, "optim.gradient_accumulation": 8}
    assert tried[-1].line() == "--optim.batch_size 1 --optim.gradient_accumulation 8"


def test_what_fits_nowhere_is_said(tmp_path) -> None:
    tried = fitted(config_of(tmp_path), 2 * GIB, estimate)
    assert tried[-1].settings["base.quantise"] == "nf4" and "base.swap_blocks" not in tried[-1].settings
    lines = fitting_lines(tried, 2.5)
    assert "nothing fits" in lines[-1] and not any("<- fits" in line for line in lines)


def test_a_base_that_cannot_is_asked_for_the_next(tmp_path) -> None:
    def without_checkpointing(config: TrainConfig) -> MemoryEstimate:
        if config.optim.gradient_checkpointing:
            raise ValueError("has none")
        return estimate(config)

    tried = fitted(config_of(tmp_path, optim={"mixed_precision": "bf16"}), 24 * GIB, without_checkpointing)
    assert "optim.gradient_checkpointing" not in tried[-1].settings and tried[-1].estimate.total <= 24 * GIB
    with pytest.raises(ValueError, match="has none"):
        fitted(config_of(tmp_path, optim={"gradient_checkpointing": True}), GIB, without_checkpointing)


def test_a_card_is_not_all_for_tensors() -> None:
    assert usable(24) < 24 * GIB and usable(0.1) == 0 and usable(24) > usable(12) > 10 * GIB


def test_lines_name_what_was_tried(tmp_path) -> None:
    lines = fitting_lines(fitted(config_of(tmp_path), usable(24), estimate), 24)
    assert re.match(r"tried +[\d.]+ GiB  as it is$", lines[0])
    assert lines[-2].endswith("<- fits") and "--optim.gradient_checkpointing true" in lines[-2]
    assert lines[-1] == "card       24 GiB, of which tensors can have 22.3"


def test_a_preset_sets_what_is_not_set_otherwise(tmp_path) -> None:
    config = config_of(tmp_path, optim={"preset": "low-memory"})
    assert (config.base.quantise, config.optim.mixed_precision) == ("nf4", "bf16")
    assert config.optim.gradient_checkpointing
    own = config_of(tmp_path, optim={"preset": "low-memory", "mixed_precision": "fp16"}, base={"quantise": None})
    assert (own.base.quantise, own.optim.mixed_precision, own.optim.gradient_checkpointing) == (None, "fp16", True)
    assert config_of(tmp_path).optim == config_of(tmp_path, optim={"preset": None}).optim
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert TrainConfig.from_yaml(file) == config
    file.write_text(own.to_yaml())
    assert TrainConfig.from_yaml(file) == own
    for name, sections in PRESETS.items():
        for section, values in sections.items():
            told = config_of(tmp_path, optim={"preset": name}).model_dump()[section]
            assert values.items() <= told.items()
