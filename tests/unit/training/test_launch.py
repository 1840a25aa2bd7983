"""What a launcher asks for: taken, or refused by its name before anything is built."""

import os
from typing import Any

import pytest

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run import train as training
from dora_diffusion.training.run.launch import as_plain_processes, check_launch, check_sharded

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize("environment", [{}, {"FSDP_VERSION": "1"}, {"ACCELERATE_USE_DEEPSPEED": "false"}])
def test_plain_processes_are_taken(environment: dict[str, str]) -> None:
    assert check_launch(environment) is False


def test_fsdp2_is_taken_and_accelerate_does_not_hear_of_it(monkeypatch) -> None:
    assert check_launch(FSDP2) is True
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with as_plain_processes():
        assert "ACCELERATE_USE_FSDP" not in os.environ
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true: DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1 is not supported"),
        ({"ACCELERATE_USE_FSDP": "True"}, "FSDP1 is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM=true: Megatron-LM"),
        ({**FSDP2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "ACCELERATE_USE_PARALLELISM_CONFIG=true"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS=true"),
    ],
)
def test_what_is_not_done_is_refused_by_name_before_accelerate_is_built(
    environment: dict[str, str], said: str, tmp_path, monkeypatch
) -> None:
    def build(**_: Any) -> None:
        raise AssertionError("it was built")

    monkeypatch.setattr(training, "Accelerator", build)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = TrainConfig.model_validate({"output_dir": tmp_path / "run", "data": {"instance_dir": tmp_path}})
    with pytest.raises(ValueError) as refused:
        training.train(config)
    line = str(refused.value)
    assert said in line and "--use_fsdp --fsdp_version 2" in line and "\n" not in line


@pytest.mark.parametrize(
    ("fields", "pipeline", "key"),
    [
        ({"base": {"quantise": "nf4"}}, None, "base.quantise"),
        ({"export": ["kohya"]}, None, "export"),
        ({}, object(), "pipeline"),
    ],
)
def test_what_a_spread_base_cannot_have_is_refused_by_its_key(fields, pipeline, key, tmp_path) -> None:
    plain = {"output_dir": tmp_path / "run", "data": {"instance_dir": tmp_path}}
    check_sharded(TrainConfig.model_validate(plain), None)
    with pytest.raises(ValueError, match=key):
        check_sharded(TrainConfig.model_validate(plain | fields), pipeline)
