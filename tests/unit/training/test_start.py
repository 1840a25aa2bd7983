"""Starting from an adapter that exists, adapters below what is trained, and bases that were distilled."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dora_diffusion.adapters import AdapterManager
from dora_diffusion.conversion import resize
from dora_diffusion.families.distilled import DISTILLED, distilled_kind
from dora_diffusion.formats import load_adapter, save_adapter
from dora_diffusion.layers.base_layers import dense_weight
from dora_diffusion.pipelines.modules import PipelineModules
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.state import AdapterState, FactoredState
from dora_diffusion.training.base.below import lay_below, plan_below
from dora_diffusion.training.base.meta import without_numbers
from dora_diffusion.training.base.start import plan_start
from dora_diffusion.training.base.trainable import TrainablePipeline, prepare_trainable
from dora_diffusion.training.config import TrainConfig
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical


def config(folder: Path, start: Path | None, **adapter) -> TrainConfig:
    background("red", 32).save(folder / "red.png")
    settings = {"rank": 4, "alpha": 4, "train_text_encoder": True, "start": start, **adapter}
    data = {"instance_dir": folder, "instance_prompt": "a cat", "resolution": 32}
    return TrainConfig.model_validate({"output_dir": folder / "run", "data": data, "adapter": settings})


def started(folder: Path, adapter: AdapterState, *, format: str = "diffusers", **settings) -> TrainablePipeline:
    file = save_adapter(adapter, folder / ("start" if format == "peft" else "start.safetensors"), format=format)
    return prepare_trainable(random_pocket_pipeline(), config(folder, file, **settings))


@torch.no_grad()
def predicted(pipe, family) -> Tensor:
    """One call of the denoiser behind the text encoder."""
    latents = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    conditioning = family.encode(pipe, ["a noto style cat on a red background"])
    pipe.unet.eval()
    return family.predict(pipe.unet, latents, torch.tensor([300]), conditioning, torch.zeros(1, 6))


def drawn_by(adapter: AdapterState, family, strength: float = 1.0) -> Tensor:
    pipe = random_pocket_pipeline()
    manager = AdapterManager(pipe)
    manager.load_adapter(adapter, name="it")
    manager.set_adapters({"it": strength})
    return predicted(pipe, family)


@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_of_its_own_rank_it_is_the_very_adapter_and_draws_as_it_does(tmp_path, format, use_dora) -> None:
    adapter = random_adapter(random_pocket_pipeline(), use_dora=use_dora)
    trainable = started(tmp_path, adapter, format=format, use_dora=use_dora)
    again = load_adapter(save_adapter(trainable.adapter({}), tmp_path / "again.safetensors"))
    assert again.modules.keys() == adapter.modules.keys()
    for path, module in adapter.modules.items():
        assert_identical(again.modules[path].tensors, module.tensors)
    assert_close(predicted(trainable.pipe, trainable.family), drawn_by(adapter, trainable.family))
    base = predicted(random_pocket_pipeline(), trainable.family)
    assert not torch.allclose(predicted(trainable.pipe, trainable.family), base, atol=1e-2)


def test_of_a_higher_rank_and_another_scale_it_draws_the_same_and_the_rest_is_fresh(tmp_path) -> None:
    adapter = random_adapter(random_pocket_pipeline())
    trainable = started(tmp_path, adapter, rank=7, alpha=21)
    fresh = prepare_trainable(random_pocket_pipeline(), config(tmp_path, None, rank=7, alpha=21)).named_tensors()
    for path, module in trainable.adapter({}).modules.items():
        assert module.rank == 7 and module.scale == 3
        torch.testing.assert_close(module.delta(), adapter.modules[path].delta(), rtol=1e-5, atol=1e-7)
    for name, tensor in trainable.named_tensors().items():
        if name.endswith(".down"):
            assert_identical(tensor[4:], fresh[name][4:])
        if name.endswith(".up"):
            assert not tensor[:, 4:].any() and tensor[:, :4].any()
    assert_close(predicted(trainable.pipe, trainable.family), drawn_by(adapter, trainable.family))
    assert trainable.started.endswith("rank 4 in rank 7")


def test_of_a_lower_rank_it_is_the_nearest_and_the_error_is_told(tmp_path) -> None:
    adapter = random_adapter(random_pocket_pipeline())
    trainable = started(tmp_path, adapter, rank=2, alpha=2)
    reports: list = []
    expected = resize(adapter, rank=2, base=random_pocket_pipeline(), report=reports.append)
    for path, module in trainable.adapter({}).modules.items():
        torch.testing.assert_close(module.delta(), expected.modules[path].delta(), rtol=1e-4, atol=1e-6)
        assert_identical(module.magnitude, adapter.modules[path].magnitude)
    (report,) = reports
    assert f"relative error {report.mean:.2g} on average, {report.largest:.2g} at most" in trainable.started
    assert 0.01 < report.mean < 1


def test_a_lora_in_a_dora_run_draws_bit_for_bit_what_it_drew(tmp_path) -> None:
    adapter = random_adapter(random_pocket_pipeline(), use_dora=False)
    as_dora, as_lora = (started(tmp_path, adapter, use_dora=use_dora) for use_dora in (True, False))
    assert as_dora.adapter({}).is_dora
    assert_identical(predicted(as_dora.pipe, as_dora.family), predicted(as_lora.pipe, as_lora.family))


def test_layers_that_the_file_lacks_start_fresh_and_are_counted(tmp_path) -> None:
    adapter = random_adapter(random_pocket_pipeline())
    some = dict(list(adapter.modules.items())[:5])
    trainable = started(tmp_path, replace(adapter, modules=some))
    count = len(trainable.adapter({}).modules)
    assert trainable.started == f"start.safetensors: DoRA, 5 layers; rank 4; {count - 5} layers start fresh"
    others = [module for path, module in trainable.adapter({}).modules.items() if path not in some]
    assert others and not any(module.up.any() for module in others)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"target_modules": ["to_q"]}, r"layers of .* are not trained here, unet\..* first; widen adapter.target_mod"),
        ({"train_text_encoder": False}, r"text_encoder\..* first; set adapter.train_text_encoder to true, or put"),
        ({"use_dora": False}, r"is a DoRA, and adapter.use_dora is false; set it true, or make a LoRA"),
    ],
)
def test_what_a_run_would_lose_is_refused_by_the_run_and_its_plan(tmp_path, settings, complaint) -> None:
    adapter = random_adapter(random_pocket_pipeline())
    with pytest.raises(ValueError, match=f"^adapter.start: .*{complaint}") as said:
        started(tmp_path, adapter, **settings)
    assert "\n" not in str(said.value)
    chosen = config(tmp_path, tmp_path / "start.safetensors", **settings)
    skeleton = prepare_trainable(without_numbers(random_pocket_pipeline()), chosen, from_start=False)
    with pytest.raises(ValueError, match=f"^adapter.start: .*{complaint}"):
        plan_start(skeleton.injections, chosen.adapter, "sd1")


def test_a_file_that_is_not_there_or_of_another_base_is_one_line(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^adapter.start: .*none.safetensors") as said:
        prepare_trainable(random_pocket_pipeline(), config(tmp_path, tmp_path / "none.safetensors"))
    assert "\n" not in str(said.value)
    adapter = random_adapter(random_pocket_pipeline())
    path, module = next(iter(adapter.modules.items()))
    wide = replace(module, down=torch.zeros(4, 999))
    with pytest.raises(ValueError, match=r"^adapter.start: .*is this another base model"):
        started(tmp_path, replace(adapter, modules={path: wide}))
    with pytest.raises(ValueError, match="beside adapter.init 'pissa'"):
        config(tmp_path, tmp_path / "start.safetensors", init="pissa")


def test_magnitudes_of_the_in_axis_become_a_dora_of_the_out_axis_with_its_error(tmp_path) -> None:
    pipe = random_pocket_pipeline()
    adapter = random_adapter(pipe)
    path, module = next((p, m) for p, m in adapter.modules.items() if p.startswith("unet."))
    weight = dense_weight(PipelineModules(pipe).layer(path)[1])
    norms = 1.1 * torch.linalg.vector_norm(weight + module.delta().reshape(weight.shape), dim=0)
    older = replace(module, magnitude=norms, axis="in")
    trainable = started(tmp_path, AdapterState({path: older}), format="lycoris")
    assert "1 layers are only near it: relative error" in trainable.started
    held = trainable.adapter({}).modules[path]
    assert held.axis == "out" and held.magnitude.shape == (weight.shape[0],)


def test_a_loha_is_started_from_exactly_where_its_rank_fits(tmp_path) -> None:
    pipe = random_pocket_pipeline()
    path, module = next(
        (p, m) for p, m in random_adapter(pipe, use_dora=False).modules.items() if p.startswith("unet.")
    )
    out, columns = module.shape
    generator = torch.Generator().manual_seed(0)
    shapes = {"hada_w1_a": (out, 2), "hada_w1_b": (2, columns), "hada_w2_a": (out, 2), "hada_w2_b": (2, columns)}
    factors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    loha = FactoredState("loha", factors, scale=0.5, alpha=1.0)
    trainable = started(tmp_path, AdapterState({path: loha}), format="lycoris", use_dora=False)
    held = trainable.adapter({}).modules[path]
    torch.testing.assert_close(held.delta().reshape(out, columns), loha.delta().reshape(out, columns))
    assert "LoHa, 1 layers; rank 4;" in trainable.started


def test_a_whole_difference_is_cut_and_its_error_told(tmp_path) -> None:
    adapter = random_adapter(random_pocket_pipeline(), use_dora=False)
    path, module = next((p, m) for p, m in adapter.modules.items() if p.startswith("unet."))
    noise = torch.randn(module.shape, generator=torch.Generator().manual_seed(0))
    diff = module.delta() + 1e-3 * noise
    whole = FactoredState("full", {"diff": diff})
    trainable = started(tmp_path, AdapterState({path: whole}), format="lycoris", use_dora=False)
    missed = trainable.adapter({}).modules[path].delta() - diff
    error = float(torch.linalg.vector_norm(missed) / torch.linalg.vector_norm(diff))
    assert f"relative error {error:.2g} on average, {error:.2g} at most ({path})" in trainable.started
    assert 1e-4 < error < 0.1


def test_the_plan_says_what_the_run_says_without_numbers(tmp_path) -> None:
    trainable = started(tmp_path, random_adapter(random_pocket_pipeline()), rank=6)
    chosen = config(tmp_path, tmp_path / "start.safetensors", rank=6)
    skeleton = prepare_trainable(without_numbers(random_pocket_pipeline()), chosen, from_start=False)
    assert plan_start(skeleton.injections, chosen.adapter, "sd1") == trainable.started
    assert plan_start(skeleton.injections, config(tmp_path, None).adapter, "sd1") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_below_are_the_managers_mix_folded_in(tmp_path, dtype) -> None:
    dora = random_adapter(random_pocket_pipeline(), 1)
    lora = random_adapter(random_pocket_pipeline(), 2, use_dora=False)
    files = {save_adapter(dora, tmp_path / "a.safetensors"): 0.7, save_adapter(lora, tmp_path / "b.safetensors"): -0.4}
    pipe, other = random_pocket_pipeline().to(dtype), random_pocket_pipeline().to(dtype)
    below = lay_below(pipe, files)
    manager = AdapterManager(other)
    for file in files:
        manager.load_adapter(file, name=file.stem)
    manager.set_adapters({file.stem: strength for file, strength in files.items()})
    manager.fuse()
    for component in ("unet", "text_encoder"):
        own, expected = getattr(pipe, component).state_dict(), getattr(other, component).state_dict()
        assert all(own[key].dtype == dtype for key in own)
        assert_identical(own, {key: expected[key] for key in own})
    assert [(each.name, each.strength, each.kind) for each in below] == [
        ("a.safetensors", 0.7, "DoRA"),
        ("b.safetensors", -0.4, "LoRA"),
    ]
    skeleton = without_numbers(random_pocket_pipeline())
    assert [each.line() for each in plan_below(skeleton, files)] == [each.line() for each in below]


def test_what_is_trained_starts_from_the_base_with_what_lies_below(tmp_path) -> None:
    adapter = random_adapter(random_pocket_pipeline())
    pipe = random_pocket_pipeline()
    lay_below(pipe, {save_adapter(adapter, tmp_path / "below.safetensors"): 0.5})
    trainable = prepare_trainable(pipe, config(tmp_path, None))
    assert_close(predicted(pipe, trainable.family), drawn_by(adapter, trainable.family, 0.5))
    path, module = next(iter(trainable.adapter({}).modules.items()))
    weight = dense_weight(PipelineModules(random_pocket_pipeline()).layer(path)[1])
    norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    assert not torch.allclose(module.magnitude, norms, rtol=1e-3)  # the lengths of the rows of W', not of W


def test_an_adapter_below_of_another_base_changes_nothing(tmp_path) -> None:
    adapter = random_adapter(random_pocket_pipeline())
    good = save_adapter(adapter, tmp_path / "good.safetensors")
    strange = {path.replace("unet.", "unet.nowhere."): module for path, module in adapter.modules.items()}
    pipe = random_pocket_pipeline()
    bad = save_adapter(replace(adapter, modules=strange), tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"^base.adapters: .*bad.safetensors"):
        lay_below(pipe, {good: 1.0, bad: 1.0})
    assert_identical(pipe.unet.state_dict(), random_pocket_pipeline().unet.state_dict())


def part(kind: str, **facts) -> object:
    return type(kind, (), {"config": facts})()


SCHNELL = {
    "transformer": part("FluxTransformer2DModel", guidance_embeds=False),
    "scheduler": part("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=False, shift=1.0),
}
DEV = {
    "transformer": part("FluxTransformer2DModel", guidance_embeds=True),
    "scheduler": part("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, shift=3.0),
}
XL = {"addition_embed_type": "text_time"}


@pytest.mark.parametrize(
    ("parts", "model", "expected"),
    [
        (SCHNELL, "my/own", "FLUX.1-schnell"),
        (DEV, "black-forest-labs/FLUX.1-dev", None),
        (DEV, "black-forest-labs/FLUX.1-schnell", "FLUX.1-schnell"),
        ({"config": {"is_distilled": True}}, "own", "FLUX.2 klein"),
        ({"config": {"is_distilled": False}}, "own", None),
        ({"unet": part("UNet2DConditionModel", time_cond_proj_dim=256)}, "own", "a latent consistency model"),
        ({"unet": part("UNet2DConditionModel", time_cond_proj_dim=None)}, "own", None),
        ({"scheduler": part("LCMScheduler")}, "own", "a latent consistency model"),
        (
            {
                "unet": part("UNet2DConditionModel", **XL),
                "scheduler": part("EulerAncestralDiscreteScheduler", timestep_spacing="trailing"),
            },
            "own",
            "SDXL-turbo",
        ),
        ({"unet": part("UNet2DConditionModel", **XL), "scheduler": part("EulerDiscreteScheduler")}, "sdxl", None),
        ({}, "Tongyi-MAI/Z-Image-Turbo", "Z-Image-Turbo"),
        ({}, "Tongyi-MAI/Z-Image", None),
        ({}, "/models/SDXL-Lightning-4step", "a distilled model"),
        ({}, "stabilityai/sd-turbo", "a distilled model"),
        ({}, "someone/Hyper-SD", "a distilled model"),
        ({}, "someone/turbot-fish", None),
        ({}, "/turbo/stable-diffusion", None),
        ({}, "pocket", None),
    ],
)
def test_distilled_bases_are_told_by_their_configs_then_by_name(parts, model, expected) -> None:
    kind = distilled_kind(SimpleNamespace(**parts), model)
    assert (kind and kind.name) == expected


def test_every_kind_of_distilled_base_says_why_and_what_to_do() -> None:
    assert all(kind.evidence and kind.instead and (kind.facts or kind.called) for kind in DISTILLED)
    assert distilled_kind(random_pocket_pipeline(), "pocket") is None
