"""Settings that spare memory, in whole runs: the same adapter to the bit, and a line when memory does not suffice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run import checkpoint, watchers
from dora_diffusion.training.run.exhausted import MemoryExhausted
from dora_diffusion.training.run.train import train
from dora_diffusion.training.step.training_step import TrainingStep
from tests.families.pipelines import PIPELINES
from tests.tolerances import assert_identical

SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    PIPELINES["flux-dev"].build().save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("red", "blue", "meadow"):
        background(name, 64).save(folder / f"{name}.png")
    return folder


def config(model: Path, images: Path, output: Path, *, steps: int = 4, **sections: dict[str, Any]) -> TrainConfig:
    plain: dict[str, dict[str, Any]] = {
        "data": {"instance_dir": images, "instance_prompt": "a zqx cat", "resolution": 32},
        "adapter": {"rank": 2},
        "optim": {
            "steps": steps,
            "learning_rate": 1e-3,
            "lr_scheduler": "constant",
        },  # so that a run may be made longer
        "validation": {"every": 2, "pictures": 1, "timesteps": 2},
        "checkpoint": {"every": 1, "keep": 50},
        "base": {},
    }
    merged = {name: {**values, **sections.pop(name, {})} for name, values in plain.items()}
    return TrainConfig.model_validate({"model": str(model), "output_dir": output, **merged, **sections})


@pytest.mark.parametrize("settings", [{}, {"optim": {"gradient_checkpointing": True}}], ids=["plain", "checkpointing"])
def test_a_run_with_swapped_blocks_is_the_run_without(base, images, tmp_path, settings: dict[str, Any]) -> None:
    preview = {"prompts": [{"prompt": "a cat", "size": 64}], "every": 2, "steps": 1}
    plain = train(config(base, images, tmp_path / "plain", preview=preview, **settings))
    train(config(base, images, tmp_path / "swapped", steps=2, preview=preview, base={"swap_blocks": 2}, **settings))
    # which no number depends on: it may be another when a run goes on
    swapped = config(base, images, tmp_path / "swapped", preview=preview, base={"swap_blocks": 3}, **settings)
    went_on = train(swapped, extend=4)
    assert_identical(load_file(went_on.adapter), load_file(plain.adapter))
    assert went_on.validation == plain.validation
    for step in (0, 2, 4):
        name = f"samples/step-{step:08d}.png"
        assert (tmp_path / "swapped" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
def test_a_run_with_compiled_blocks_learns_the_same(base, images, tmp_path, monkeypatch) -> None:
    compiled, compile = [], torch.compile

    def by_name(call: Any, **options: Any) -> Any:
        compiled.append(call)
        return compile(call, backend="eager", **options)  # which takes a second, and rounds as the plain forward

    monkeypatch.setattr(torch, "compile", by_name)
    torch._dynamo.reset()
    plain = train(config(base, images, tmp_path / "plain", steps=2))
    assert not compiled
    other = train(config(base, images, tmp_path / "compiled", steps=2, base={"compile": True, "swap_blocks": 2}))
    assert len(compiled) == 4
    assert_identical(load_file(other.adapter), load_file(plain.adapter))


def exhausted_at(monkeypatch: pytest.MonkeyPatch, step: int, place: str, *, says: str = SAYS) -> None:
    """Let memory be at its end in one step."""
    error = torch.OutOfMemoryError(says) if says == SAYS else RuntimeError(says)
    calls: list[int] = []
    target = {"backward": (TrainingStep, "_backward"), "optimizer": (torch.optim.AdamW, "step")}[place]
    own = getattr(*target)

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            raise error
        return own(*args, **kwargs)

    monkeypatch.setattr(*target, failing)


@pytest.mark.parametrize("says", [SAYS, "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"])
def test_a_step_without_memory_ends_with_a_checkpoint_and_the_setting_to_change(
    base, images, tmp_path, monkeypatch, says
) -> None:
    plain = train(config(base, images, tmp_path / "plain"))
    settings = config(base, images, tmp_path / "run", checkpoint={"every": 0})
    with monkeypatch.context() as patch:
        exhausted_at(patch, 3, "backward", says=says)
        with pytest.raises(MemoryExhausted) as caught:
            train(settings)
    message = str(caught.value)
    assert message.startswith("step 3: the device's memory does not suffice (") and "\n" not in message
    assert "set optim.gradient_checkpointing true" in message and "--resume latest" in message
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 2
    went_on = train(settings, resume="latest")
    assert_identical(load_file(went_on.adapter), load_file(plain.adapter))


def test_a_half_taken_step_leaves_the_checkpoint_before(base, images, tmp_path, monkeypatch) -> None:
    settings = config(base, images, tmp_path / "run", checkpoint={"every": 2})
    with monkeypatch.context() as patch:
        exhausted_at(patch, 4, "optimizer")
        with pytest.raises(MemoryExhausted, match=r"^step 4: .* finds what fits a card of 24 GiB\.$"):
            train(settings)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 2


def test_previews_without_memory_are_told_of_too(base, images, tmp_path, monkeypatch) -> None:
    def exhausted(*_: Any) -> Any:
        raise torch.OutOfMemoryError(SAYS)

    preview = {"prompts": [{"prompt": "a cat", "size": 64}], "every": 3, "steps": 1}
    settings = config(base, images, tmp_path / "run", checkpoint={"every": 0}, preview=preview)
    draw = watchers.draw_previews
    monkeypatch.setattr(
        watchers, "draw_previews", lambda *each: exhausted() if any(tmp_path.glob("run/samples/*")) else draw(*each)
    )
    with pytest.raises(MemoryExhausted, match=r"^previews or measuring after step 3: .*preview\.prompts"):
        train(settings)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 3


@pytest.mark.parametrize(
    ("sections", "advice"),
    [
        ({"gradient_checkpointing": True, "batch_size": 3}, "optim.batch_size 1 and optim.gradient_accumulation 3"),
        ({"gradient_checkpointing": True, "mixed_precision": "no"}, "optim.mixed_precision bf16"),
        ({"gradient_checkpointing": True, "mixed_precision": "bf16"}, "base.swap_blocks, or base.quantise nf4"),
    ],
)
def test_the_advice_is_what_costs_least(base, images, tmp_path, monkeypatch, sections, advice) -> None:
    exhausted_at(monkeypatch, 1, "backward")
    with pytest.raises(MemoryExhausted) as caught:
        train(config(base, images, tmp_path / "run", optim=sections))
    assert f"set {advice};" in str(caught.value) and "--resume" not in str(caught.value)


def test_other_errors_stay_what_they_are(base, images, tmp_path, monkeypatch) -> None:
    exhausted_at(monkeypatch, 1, "backward", says="a size is wrong")
    with pytest.raises(RuntimeError, match="a size is wrong"):
        train(config(base, images, tmp_path / "run"))
