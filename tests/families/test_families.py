"""What every family must do, on a tiny pipeline of each: predict as its own pipeline, train, save, load, fold, eject.

`make families` writes docs/families.md from the outcomes of these very tests (see conftest.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.families import FAMILIES, component_of_model, coverage, family_of_pipeline, pixel_multiple
from dora_diffusion.formats import load_adapter, save_adapter
from dora_diffusion.functional.objectives import weighted_squared_error
from dora_diffusion.generation.generate import GenerationSettings, StepReport, generate
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import Injection, inject
from dora_diffusion.state import AdapterState, join
from dora_diffusion.training.config import DataConfig, TrainConfig
from dora_diffusion.training.step.objective import objective_of
from tests.families.pipelines import PIPELINES
from tests.families.pipelines.record import Tiny
from tests.formats.adapters import KINDS, adapter_of, dense, layers_of
from tests.tolerances import assert_close, assert_identical

PROMPT = "a noto style cat on a red background"
FEW = 3  # steps, where an adapter shall only be one that was trained


@pytest.fixture(params=sorted(PIPELINES))
def tiny(request) -> Tiny:
    return PIPELINES[request.param]


def weights_of(pipe: Any) -> dict[str, Tensor]:
    """A copy of all that a pipeline's models hold."""
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": v.clone() for name, model in models.items() for key, v in model.state_dict().items()}


def text_encoders(pipe: Any) -> list[str]:
    family = family_of_pipeline(pipe)
    return [part.name for part in family.text_encoders if getattr(pipe, part.name, None) is not None]


def draw(pipe: Any, tiny: Tiny, **changes: Any) -> np.ndarray:
    """A picture as fp32 in 0..1, by the pipeline's own call."""
    settings = GenerationSettings(PROMPT, steps=2, guidance_scale=1.0, **changes)
    result = pipe(
        **family_of_pipeline(pipe).arguments(pipe, settings),
        num_inference_steps=settings.steps,
        height=tiny.side,
        width=tiny.side,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    return result.images[0]


@pytest.mark.column("coverage")
def test_every_layer_is_adapted_by_a_preset_or_left_alone_by_name(tiny) -> None:
    pipe = tiny.build()
    family = family_of_pipeline(pipe)
    assert family.name == tiny.family
    for name in [family.denoiser.name, *text_encoders(pipe)]:
        part = component_of_model(getattr(pipe, name))
        assert part is not None, name
        found = coverage(part, getattr(pipe, name))
        assert found.unmatched == (), name
        assert 0 < found.matched["attention"] <= found.matched["all-linear"] <= found.matched["all"] <= found.total
        for preset, count in found.matched.items():
            injection = inject(getattr(pipe, name), DoRAConfig(rank=1, target_modules=preset))
            assert len(injection.matched) == count
            injection.eject()


@pytest.mark.column("predicts as its pipeline")
def test_encode_and_predict_are_what_the_pipeline_itself_does(tiny) -> None:
    pipe = tiny.build()
    family = family_of_pipeline(pipe)
    calls = []
    step = pipe.scheduler.step

    def watched(model_output: Tensor, timestep: Tensor, sample: Tensor, **keywords: Any) -> Any:
        calls.append((model_output.clone(), timestep, sample.clone()))
        return step(model_output, timestep, sample, **keywords)

    pipe.scheduler.step = watched
    draw(pipe, tiny)
    side = tiny.side // pipe.vae_scale_factor
    with torch.no_grad():
        conditioning = family.encode(pipe, [PROMPT])
        for output, timestep, sample in calls:
            latents = family.unpack(sample, side, side)
            expected = family.unpack(output, side, side)
            original = tiny.original or tiny.side
            frames = torch.tensor([[original, original, 0, 0, tiny.side, tiny.side]], dtype=torch.float32)
            denoiser = getattr(pipe, family.denoiser.name)
            times = torch.as_tensor(timestep).reshape(1)
            assert_close(family.predict(denoiser, latents, times, conditioning, frames), expected)
    assert len(calls) == 2


def test_captions_of_several_lengths_are_predicted_as_each_alone(tiny) -> None:
    from dora_diffusion.training.data.conditioning import ConditioningSource

    pipe = tiny.build()
    family = family_of_pipeline(pipe)
    trainable: Any = SimpleNamespace(
        pipe=pipe,
        family=family,
        device=torch.device("cpu"),
        trains_text=lambda: False,
        bring_encoders=lambda: None,
    )
    source = ConditioningSource(trainable, DataConfig(instance_dir="."))
    captions = [PROMPT, "a cat", ""]
    denoiser = getattr(pipe, family.denoiser.name)
    latents, timesteps, frames = some_latents(pipe, tiny, len(captions))
    with torch.no_grad():
        together = family.predict(denoiser, latents, timesteps, source.encode(captions), frames)
        for i, caption in enumerate(captions):
            alone = family.predict(
                denoiser, latents[i : i + 1], timesteps[i : i + 1], family.encode(pipe, [caption]), frames[i : i + 1]
            )
            assert_close(together[i : i + 1], alone)
        live = family.encode(pipe, captions)  # as a trained text encoder is asked
        assert_close(family.predict(denoiser, latents, timesteps, live, frames), together)


def test_blank_conditioning_is_a_caption_s_and_predicts_on_the_meta_device(tiny) -> None:
    pipe = tiny.build()
    family = family_of_pipeline(pipe)
    denoiser = getattr(pipe, family.denoiser.name)
    latents, timesteps, frames = (tensor.to("meta") for tensor in some_latents(pipe, tiny, 1))
    real, blank = family.encode(pipe, [PROMPT]), family.blank(denoiser.config)
    assert all("mask" in name for name in real.keys() - blank.keys())
    for name, tensor in blank.items():
        assert tensor.is_meta and tensor.dim() == real[name].dim(), name
        assert tensor.shape[2:] == real[name].shape[2:], name
    predicted = family.predict(denoiser.to("meta"), latents, timesteps, blank, frames)
    assert predicted.is_meta and predicted.shape == latents.shape


def some_latents(pipe: Any, tiny: Tiny, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (N, C, h, w) as the family encodes pictures, timesteps (N,) and frames (N, 6)."""
    family = family_of_pipeline(pipe)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(count, 3, tiny.side, tiny.side, generator=generator) * 2 - 1
    frames = torch.tensor([[48, 64, 0, 5, tiny.side, tiny.side]], dtype=torch.float32).expand(count, -1)
    return family.codec.encode(pipe, pixels), torch.linspace(100, 800, count).round(), frames


@pytest.mark.column("predicts as its pipeline")
def test_latents_are_decoded_as_the_pipeline_does_and_encoded_the_other_way(tiny, monkeypatch) -> None:
    pipe = tiny.build()
    family = family_of_pipeline(pipe)
    after: list[Tensor] = []
    step = pipe.scheduler.step

    def watched(*arguments: Any, **keywords: Any) -> Any:
        result = step(*arguments, **keywords)
        after.append(result[0])
        return result

    monkeypatch.setattr(pipe.scheduler, "step", watched)
    picture = draw(pipe, tiny)
    side = tiny.side // pipe.vae_scale_factor
    latents = family.unpack(after[-1], side, side)  # `output_type="latent"` is not always what the loop ends with
    pixels = family.codec.decode(pipe, latents)
    assert_close(torch.as_tensor(picture), (pixels[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0))
    given: dict[str, Tensor] = {}

    def keep(z: Tensor, **_: Any) -> Any:
        given["z"] = z
        return SimpleNamespace(sample=z)

    monkeypatch.setattr(pipe.vae, "decode", keep)
    family.codec.decode(pipe, latents)
    answer = SimpleNamespace(latent=given["z"], latent_dist=SimpleNamespace(mode=lambda: given["z"]))
    monkeypatch.setattr(pipe.vae, "encode", lambda pixels: answer)
    assert_close(family.codec.encode(pipe, pixels), latents)


@dataclass(frozen=True)
class Trained:
    """A pipeline after some steps, and what it was."""

    pipe: Any
    injections: Mapping[str, Injection]
    starts: Mapping[str, Tensor]
    losses: tuple[float, ...]
    base: Mapping[str, Tensor]

    def adapter(self) -> AdapterState:
        return join([injection.state().under(name) for name, injection in self.injections.items()], {})


def train_steps(tiny: Tiny, parts: tuple[str, ...], *, steps: int, preset: str = "all-linear") -> Trained:
    """Steps on one batch: the same pictures, noise and timesteps each time; few steps are longer ones."""
    pipe = tiny.build()
    family = family_of_pipeline(pipe)
    base = weights_of(pipe)
    injections = {name: inject(getattr(pipe, name), DoRAConfig(rank=2, target_modules=preset)) for name in parts}
    named = {f"{n}.{path}": p for n, part in injections.items() for path, p in part.named_parameters().items()}
    starts = {name: parameter.detach().clone() for name, parameter in named.items()}
    latents, _, frames = some_latents(pipe, tiny, 2)
    config = TrainConfig.model_validate({"output_dir": "unused", "data": {"instance_dir": "."}})
    multiple = pixel_multiple(pipe, family)
    objective = objective_of(pipe, config.optim, config.flow, tokens=(tiny.side // multiple) ** 2)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = objective.timesteps(2, generator)
    noisy, goal = objective.add_noise(latents, noise, timesteps), objective.target(latents, noise, timesteps)
    denoiser = getattr(pipe, family.denoiser.name)
    optimizer = torch.optim.AdamW(named.values(), lr=0.1 / steps, weight_decay=0)
    trains_text = set(parts) != {family.denoiser.name}
    conditioning: Any = None
    losses = []
    for _ in range(steps + 1):
        if trains_text or conditioning is None:
            conditioning = family.encode(pipe, [PROMPT, "a small castle"])
        predicted = family.predict(denoiser, noisy, timesteps, conditioning, frames)
        loss = weighted_squared_error(predicted, goal, objective.weights(timesteps))
        losses.append(loss.item())
        if len(losses) <= steps:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return Trained(pipe, injections, starts, tuple(losses), base)


def unmoved_layers(trained: Trained) -> set[str]:
    """`COMPONENT.PATH` of layers of which some A, B or m is what it was."""
    now = {f"{n}.{path}": p for n, i in trained.injections.items() for path, p in i.named_parameters().items()}
    return {
        name.rpartition(".")[0]
        for name, parameter in now.items()
        if torch.equal(parameter.detach(), trained.starts[name])
    }


def assert_ejects_and_moved_all_that_matters(trained: Trained, tiny: Tiny) -> None:
    """The loss fell, the base is what it was, and layers that did not move could not.

    With other base weights in those layers the pipeline predicts the same bits. Such are the text queries of Stable
    Diffusion 3's last block, and the layers after the one that a pipeline reads.
    """
    assert trained.losses[-1] < trained.losses[0]
    pipe, layers = trained.pipe, unmoved_layers(trained)
    assert len(layers) < len(trained.starts) / 6, layers
    for injection in trained.injections.values():
        injection.eject()
    assert_identical(weights_of(pipe), trained.base)
    family = family_of_pipeline(pipe)
    latents, timesteps, frames = some_latents(pipe, tiny, 2)

    @torch.no_grad()
    def predicted() -> Tensor:
        conditioning = family.encode(pipe, [PROMPT, "a small castle"])
        return family.predict(getattr(pipe, family.denoiser.name), latents, timesteps, conditioning, frames)

    before = predicted()
    for layer in layers:
        component, path = layer.split(".", 1)
        torch.nn.init.normal_(getattr(pipe, component).get_submodule(path).weight)
    assert_identical(predicted(), before)


@pytest.mark.column("train")
def test_ten_steps_lower_the_loss_move_every_number_and_leave_the_base(tiny) -> None:
    denoiser = family_of_pipeline(tiny.build()).denoiser.name
    assert_ejects_and_moved_all_that_matters(train_steps(tiny, (denoiser,), steps=10, preset="all"), tiny)


@pytest.mark.column("text encoders")
def test_every_text_encoder_can_be_trained(tiny) -> None:
    encoders = tuple(text_encoders(tiny.build()))
    assert_ejects_and_moved_all_that_matters(train_steps(tiny, encoders, steps=10), tiny)


@pytest.mark.column("save, load, draw")
def test_a_saved_adapter_draws_what_was_trained_and_folds_and_leaves_no_trace(tiny, tmp_path) -> None:
    pipe = tiny.build()
    parts = (family_of_pipeline(pipe).denoiser.name, *text_encoders(pipe))
    trained = train_steps(tiny, parts, steps=FEW)
    expected, before = draw(trained.pipe, tiny), draw(pipe, tiny)
    assert np.abs(expected - before).max() > 0.01
    path = save_adapter(trained.adapter(), tmp_path / "adapter.safetensors")
    manager = AdapterManager(pipe)
    report = manager.load_adapter(path, name="trained")
    assert report.matched == report.total == sum(len(i.matched) for i in trained.injections.values())
    manager.set_adapters({"trained": 1.0})
    assert_close(torch.as_tensor(draw(pipe, tiny)), torch.as_tensor(expected), computed_in=torch.float16)
    manager.fuse()
    assert_close(torch.as_tensor(draw(pipe, tiny)), torch.as_tensor(expected), computed_in=torch.float16)
    manager.unfuse()
    manager.unload()
    assert_identical(weights_of(pipe), trained.base)
    assert np.array_equal(draw(pipe, tiny), before)


@pytest.mark.column("plain diffusers")
def test_plain_diffusers_draws_the_same_from_the_file(tiny, tmp_path) -> None:
    pipe = tiny.build()
    if tiny.plain_load is not None:
        assert not hasattr(pipe, "load_lora_weights")
        pytest.skip(tiny.plain_load)
    loadable = {"text_encoder", "text_encoder_2"} & set(pipe._lora_loadable_modules)
    parts = (family_of_pipeline(pipe).denoiser.name, *(name for name in text_encoders(pipe) if name in loadable))
    trained = train_steps(tiny, parts, steps=FEW)
    expected = draw(trained.pipe, tiny)
    path = save_adapter(trained.adapter(), tmp_path / "adapter.safetensors")
    pipe.load_lora_weights(path)
    assert_close(torch.as_tensor(draw(pipe, tiny)), torch.as_tensor(expected), computed_in=torch.float16)


def assert_comes_back(tiny: Tiny, path: Path, format: str) -> None:
    """DoRAs and LoRAs of every layer that a file can name, whole tensors."""
    pipe = tiny.build()
    weights = dict(layers_of(pipe, (family_of_pipeline(pipe).denoiser.name, *text_encoders(pipe))))
    for kind in ("DoRA", "LoRA"):
        original = adapter_of(weights.items(), KINDS[kind])
        read = load_adapter(save_adapter(original, path, format=format))
        assert read.origin == format
        assert read.modules.keys() == original.modules.keys()
        for layer, module in original.modules.items():
            assert_close(dense(weights[layer], read.modules[layer]), dense(weights[layer], module))


@pytest.mark.column("kohya file")
def test_a_kohya_file_holds_every_layer(tiny, tmp_path) -> None:
    assert_comes_back(tiny, tmp_path / "adapter.safetensors", "kohya")


@pytest.mark.column("LyCORIS file")
def test_a_lycoris_file_holds_every_layer(tiny, tmp_path) -> None:
    assert_comes_back(tiny, tmp_path / "adapter.safetensors", "lycoris")


def test_generate_shows_its_steps_and_a_schedule_follows_them(tiny) -> None:
    pipe = tiny.build()
    family = family_of_pipeline(pipe)
    reports: list[StepReport] = []
    settings = GenerationSettings(PROMPT, steps=3, guidance_scale=1.0, width=64, height=64)
    settings = replace(settings, width=max(64, tiny.side), height=max(64, tiny.side))
    generate(pipe, settings, on_step=reports.append, preview_every=1)
    assert [report.step for report in reports] == [1, 2, 3]
    assert all(report.preview is not None for report in reports[:2])
    trained = train_steps(tiny, (family.denoiser.name,), steps=FEW)
    manager = AdapterManager(pipe)
    manager.load_adapter(trained.adapter(), name="a")
    before = draw(pipe, tiny)
    manager.set_adapters({"a": 1.0})
    whole = draw(pipe, tiny)
    manager.set_schedule("a", [(0.0, 0.0), (1.0, 0.0)])
    assert np.array_equal(draw(pipe, tiny), before)
    manager.set_schedule("a", [(0.0, 1.0), (1.0, 1.0)])
    assert np.array_equal(draw(pipe, tiny), whole)
    manager.set_schedule("a", [(0.0, 1.0), (0.4, 1.0), (0.6, 0.0), (1.0, 0.0)])  # of two steps, the first alone
    assert not np.array_equal(draw(pipe, tiny), whole) and not np.array_equal(draw(pipe, tiny), before)
    manager.set_schedule("a", None)


def test_guidance_and_a_negative_prompt_draw_or_are_refused_in_words(tiny) -> None:
    pipe = tiny.build()
    side = max(64, tiny.side)
    settings = GenerationSettings(PROMPT, steps=2, guidance_scale=30.0, width=side, height=side)
    guided = generate(pipe, settings)
    try:
        away = generate(pipe, replace(settings, negative_prompt="a castle"))
    except ValueError as error:
        assert "negative prompt" in str(error)
    else:
        assert away.size == guided.size == (side, side)
        assert not np.array_equal(np.asarray(away), np.asarray(guided))


def test_a_mask_keeps_an_adapter_to_its_part_of_the_picture(tiny) -> None:
    pipe = tiny.build()
    trained = train_steps(tiny, (family_of_pipeline(pipe).denoiser.name,), steps=FEW)
    manager = AdapterManager(pipe)
    before = draw(pipe, tiny)
    manager.load_adapter(trained.adapter(), name="a")
    manager.set_adapters({"a": 1.0})
    whole = draw(pipe, tiny)
    manager.set_mask("a", torch.zeros(8, 8))
    assert_close(torch.as_tensor(draw(pipe, tiny)), torch.as_tensor(before))
    manager.set_mask("a", torch.ones(8, 8))
    assert_close(torch.as_tensor(draw(pipe, tiny)), torch.as_tensor(whole), computed_in=torch.float16)
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    family = family_of_pipeline(pipe)
    side = tiny.side // pipe.vae_scale_factor
    first: list[Tensor] = []
    step = pipe.scheduler.step

    def watched(model_output: Tensor, *rest: Any, **keywords: Any) -> Any:
        first.append(family.unpack(model_output, side, side).clone())
        return step(model_output, *rest, **keywords)

    pipe.scheduler.step = watched
    for mask in (torch.zeros(8, 8), torch.ones(8, 8), left):
        manager.set_mask("a", mask)
        draw(pipe, tiny)
    without, inside, mixed = first[0], first[2], first[4]
    columns = without.shape[-1]
    assert_close(mixed[..., : columns // 4], inside[..., : columns // 4])
    assert_close(mixed[..., -columns // 4 :], without[..., -columns // 4 :])
    assert (inside - without).abs().max() > 1e-3


def test_training_runs_from_a_folder(tiny, tmp_path) -> None:
    from PIL import Image

    from dora_diffusion.training.run.train import train

    pipe, base, images = tiny.build(), tmp_path / "base", tmp_path / "images"
    pipe.save_pretrained(base)
    can_checkpoint = getattr(pipe, family_of_pipeline(pipe).denoiser.name)._supports_gradient_checkpointing
    images.mkdir()
    for name, colour in (("a cat", "red"), ("a long caption of a castle", "blue")):
        Image.new("RGB", (70, 80), colour).save(images / f"{colour}.png")
        (images / f"{colour}.txt").write_text(name)
    config = TrainConfig.model_validate(
        {
            "model": str(base),
            "output_dir": tmp_path / "run",
            "data": {"instance_dir": images, "resolution": tiny.side, "caption_dropout": 0.3},
            "adapter": {"rank": 2, "train_text_encoder": bool(text_encoders(pipe))},
            "optim": {"steps": 2, "batch_size": 2, "gradient_checkpointing": can_checkpoint},
            "validation": {"every": 0, "repeats": 1},
        }
    )
    result = train(config)
    report = AdapterManager(tiny.build()).load_adapter(result.adapter, name="trained")
    assert report.matched == report.total > 0


def test_every_family_has_a_tiny_pipeline() -> None:
    assert {tiny.family for tiny in PIPELINES.values()} == {family.name for family in FAMILIES}


def test_the_table_in_docs_has_every_pipeline_and_no_failure() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "families.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    assert sorted(row[1] for row in rows) == sorted(PIPELINES)
    cells = {cell for row in rows for cell in row[2:]}
    assert "yes" in cells and not cells & {"FAILS", "not run"}
