"""Schedules and masks where no family's record tells in which unit a denoiser is told the time, or where tokens lie."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.functional.schedules import reading_of
from dora_diffusion.state import AdapterState
from tests.denoisers import DENOISERS, prediction
from tests.families.pipelines import PIPELINES
from tests.parity.test_lora_pipelines import pipeline
from tests.pipelines.adapters import trained
from tests.pipelines.kinds import KINDS
from tests.tolerances import assert_identical, assert_near


def loaded(name: str):
    pipe, models = pipeline(name)
    object.__setattr__(pipe, "scheduler", FlowMatchEulerDiscreteScheduler())
    pipe.scheduler.set_timesteps(5)
    manager = AdapterManager(pipe)
    manager.load_adapter(trained(pipe, size=1.0), name="a")
    manager.set_adapters({"a": 1.0})
    return pipe, models["transformer"], manager


def predict(model: torch.nn.Module, **changes) -> torch.Tensor:
    with torch.no_grad():
        return prediction(model(**{**DENOISERS[type(model).__name__].inputs(), **changes}))


@pytest.mark.parametrize("unit", [1.0, 1e-3])
def test_a_schedule_finds_the_step_whatever_the_unit(unit: float) -> None:
    pipe, model, manager = loaded("Krea2Pipeline")
    times = pipe.scheduler.timesteps
    plain = [predict(model, timestep=time[None] * unit) for time in times]
    manager.set_adapters({})
    without = [predict(model, timestep=time[None] * unit) for time in times]
    manager.set_adapters({"a": 1.0})
    manager.set_schedule("a", [(0.0, 0.0), (0.25, 1.0)])
    assert_identical(predict(model, timestep=times[:1] * unit), without[0])
    for step in range(1, 5):
        assert_identical(predict(model, timestep=times[step : step + 1] * unit), plain[step])


def test_the_nearest_reading_of_a_time_is_taken() -> None:
    timesteps = torch.tensor([999.0, 750.0, 500.0, 250.0])
    for told, expected in ((750.0, 750.0), (0.75, 750.0), (0.25, 250.0), (1 - 0.999, 999.0)):
        assert reading_of(told, timesteps)(told) == pytest.approx(expected)


def test_a_one_is_read_by_the_calls_before_it() -> None:
    timesteps = torch.tensor([1000.0, 500.0, 1.0])
    for run, expected in (((1000.0, 500.0, 1.0), (1000, 500, 1)), ((1.0, 0.5, 0.001), (1000, 500, 1))):
        known, read = None, []
        for told in run:
            known = reading_of(told, timesteps, known)
            read.append(known(told))
        assert read == pytest.approx(expected)


def test_a_schedule_without_a_scheduler_is_one_line() -> None:
    pipe, model, manager = loaded("Krea2Pipeline")
    del pipe.scheduler
    manager.set_schedule("a", [(0.0, 0.0), (1.0, 1.0)])
    with pytest.raises(ValueError, match="a schedule needs a pipeline with a scheduler"):
        predict(model)
    manager.set_schedule("a", None)
    predict(model)


def test_a_mask_on_maps_of_an_unknown_model() -> None:
    _, model, manager = loaded("WanPipeline")
    with_it = predict(model)
    manager.set_adapters({})
    without = predict(model)
    manager.set_adapters({"a": 1.0})
    manager.set_mask("a", torch.ones(4, 4))
    assert_near(predict(model), with_it, 1e-5)
    manager.set_mask("a", torch.zeros(4, 4))
    assert_identical(predict(model), without)


def test_a_mask_on_tokens_of_an_unknown_model_is_refused_when_drawn() -> None:
    _, model, manager = loaded("Krea2Pipeline")
    with_it = predict(model)
    manager.set_mask("a", torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"where its \(1, 4, 16\) tokens lie in the picture is not known") as refused:
        predict(model)
    assert "\n" not in str(refused.value)
    manager.set_mask("a", None)
    assert_identical(predict(model), with_it)


@pytest.mark.parametrize("kind", ["ControlNet", "FLUX Kontext"])
@pytest.mark.filterwarnings("ignore:.FluxPosEmbed:FutureWarning")
def test_a_mask_and_a_schedule_in_known_models_of_other_pipelines(kind: str) -> None:
    """Kontext's reference picture is more tokens behind the picture's."""
    drawn = KINDS[kind]()
    before = drawn.draw()
    manager = AdapterManager(drawn.pipe)
    denoiser = "unet" if hasattr(drawn.pipe, "unet") else "transformer"
    manager.load_adapter(trained(drawn.pipe), name="a")
    manager.set_adapters({"a": {denoiser: 1.0}})  # text encoders know no places, nor does a ControlNet
    full = drawn.draw()
    manager.set_mask("a", torch.ones(4, 4))
    assert_near(drawn.draw(), full, 1e-4)
    manager.set_mask("a", torch.zeros(4, 4))
    assert_near(drawn.draw(), before, 1e-4)
    manager.set_mask("a", None)
    manager.set_schedule("a", [(0.0, 0.0)])
    assert_identical(drawn.draw(), before)
    manager.set_schedule("a", [(0.0, 1.0)])
    assert_identical(drawn.draw(), full)


def test_the_time_is_found_in_its_place() -> None:
    """An SD3 transformer takes it fourth; a call by place is as one by name."""
    pipe = PIPELINES["sd3"].build()
    pipe.scheduler.set_timesteps(5)
    manager = AdapterManager(pipe)
    manager.load_adapter(trained(pipe), name="a")
    manager.set_adapters({"a": 1.0})
    manager.set_schedule("a", [(0.0, 0.0), (1.0, 1.0)])
    latents, text, pooled = torch.ones(1, 4, 16, 16), torch.ones(1, 6, 48), torch.ones(1, 40)
    with torch.no_grad():
        for time in pipe.scheduler.timesteps[:, None]:
            named = pipe.transformer(latents, encoder_hidden_states=text, pooled_projections=pooled, timestep=time)
            placed = pipe.transformer(latents, text, pooled, time)
            assert_identical(placed.sample, named.sample)
    with pytest.raises(ValueError, match="a schedule needs the time of a step, and this call has none"):
        pipe.transformer(latents, text, pooled)


def test_a_controlnet_s_adapters_know_no_mask() -> None:
    drawn = KINDS["ControlNet"]()
    adapter = trained(drawn.pipe)
    net = {path: module for path, module in adapter.modules.items() if path.startswith("controlnet")}
    manager = AdapterManager(drawn.pipe)
    manager.load_adapter(AdapterState(net), name="a")
    manager.set_adapters({"a": 1.0})
    full = drawn.draw()
    manager.set_mask("a", torch.ones(4, 4))
    assert_near(drawn.draw(), full, 1e-4)


def test_what_is_refused_leaves_nothing() -> None:
    pipe = PIPELINES["sd1"].build()
    manager = AdapterManager(pipe)
    adapter = trained(pipe)
    with pytest.raises(ValueError, match="norm1"):
        manager.enable_hotswap(max_rank=4, target_modules=["attn1.to_q", "norm1"])
    manager.load_adapter(adapter, name="a")
    manager.set_adapters({"a": 1.0})
    pipe.unet.compile(backend="eager")
    with pytest.raises(ValueError, match="unet was compiled in place"):
        manager.set_schedule("a", [(0.0, 0.0), (1.0, 1.0)])
    with pytest.raises(ValueError, match="unet was compiled in place"):
        manager.set_mask("a", torch.ones(4, 4))
    manager.fuse()
    torch._dynamo.reset()
