"""The memory estimate: what it counts is what a true step makes, and it moves with the config as it should."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dora_diffusion.training.base.memory import MemoryEstimate, Watch, estimate_memory, tensor_bytes
from dora_diffusion.training.base.meta import without_numbers
from dora_diffusion.training.base.trainable import PRECISIONS, TrainablePipeline, prepare_trainable
from dora_diffusion.training.config import TrainConfig
from tests.families.pipelines import PIPELINES


def config_of(folder, **changes) -> TrainConfig:
    """A small training; `changes`: `section__key=value`."""
    data = {"instance_dir": folder, "resolution": 32}
    sections = {"data": data, "adapter": {"rank": 3}, "optim": {"mixed_precision": "no"}}
    for name, value in changes.items():
        section, key = name.split("__")
        sections.setdefault(section, {})[key] = value
    return TrainConfig.model_validate({"output_dir": folder / "run", **sections})


def trainable_of(config: TrainConfig, *, tiny: str = "sd1", has_numbers: bool = False) -> TrainablePipeline:
    pipe = PIPELINES[tiny].build()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype=PRECISIONS[config.optim.mixed_precision])
    return prepare_trainable(pipe if has_numbers else without_numbers(pipe), config)


def estimate(folder, *, device: str = "cpu", tiny: str = "sd1", **changes) -> MemoryEstimate:
    config = config_of(folder, **changes)
    return estimate_memory(trainable_of(config, tiny=tiny), config, device=device)


def step_of(found: MemoryEstimate) -> int:
    return next(size for name, size in found.moments.items() if name.startswith("a step"))


def test_watch_counts_storages_while_they_live() -> None:
    x, down, up = torch.ones(4, 8), torch.ones(8, 16), torch.ones(16, 2)
    with Watch([x, down, up]) as watch:
        hidden = x @ down  # 4 * 16 * 4 bytes
        view = hidden.T.reshape(-1)[:3]  # a copy of the same size
        assert watch.live == 2 * 256
        assert hidden[1:].view(-1).untyped_storage().nbytes() == 256 and watch.live == 2 * 256
        del view
        assert watch.live == 256
        assert watch.peak_of(lambda: (x @ down).relu() @ up) == 3 * 256  # with `hidden`, and before the product goes
        del hidden
        x.add_(1)
    assert watch.live == 0 and watch.peak == 768


def test_watch_sees_what_autograd_keeps() -> None:
    weight = torch.ones(8, 8, requires_grad=True)
    with Watch([weight]) as watch:
        y = torch.ones(2, 8) @ weight
        del y
        assert watch.live == 0
        y = (torch.ones(2, 8) @ weight).exp().sum()
        assert watch.live == 64 + 64 + 4  # the product's input, exp's own result and the sum; not the product
        y.backward()
        assert watch.live == 4 + 256  # the sum and the gradient


@pytest.mark.parametrize(
    "tiny, changes",
    [
        ("sd1", {}),
        ("sd1", {"adapter__train_text_encoder": True, "optim__batch_size": 2}),
        ("sd2", {"optim__mixed_precision": "bf16", "optim__gradient_accumulation": 2}),
        ("sd3.5-medium", {"optim__gradient_checkpointing": True}),
        ("flux-dev", {"adapter__target_modules": "all-linear", "adapter__norm_grad": "exact"}),
    ],
)
@pytest.mark.filterwarnings("ignore:There are modules")
def test_shapes_alone_give_what_a_true_step_does(tmp_path, tiny, changes) -> None:
    config = config_of(tmp_path, **changes)
    true = estimate_memory(trainable_of(config, tiny=tiny, has_numbers=True), config, device="cpu")
    assert estimate_memory(trainable_of(config, tiny=tiny), config, device="cpu") == true
    assert step_of(true) > 0


def test_parts_are_the_sizes_of_tensors(tmp_path) -> None:
    config = config_of(tmp_path, optim__mixed_precision="bf16")
    trainable = trainable_of(config, has_numbers=True)
    found = estimate_memory(trainable, config, device="cpu")
    layers = [(layer.out_features, layer.in_features) for layer in _adapted(trainable)]
    numbers = sum(3 * (inside + out) + out for out, inside in layers)
    assert (found.adapters, found.gradients, found.optimiser) == (4 * numbers, 4 * numbers, 8 * numbers)
    trainable.eject()
    for name, size in found.weights.items():
        tensors = [*getattr(trainable.pipe, name).parameters(), *getattr(trainable.pipe, name).buffers()]
        assert size == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert set(found.weights) == {"unet", "text_encoder", "vae"}
    assert found.total == sum(found.weights.values()) + 16 * numbers + found.activations


def _adapted(trainable: TrainablePipeline) -> list[nn.Linear]:
    injection = trainable.injections["unet"]
    return [trainable.pipe.unet.get_submodule(path).base for path in injection.matched]


def test_shared_weights_count_once(tmp_path) -> None:
    table = torch.zeros(5, 4)
    assert tensor_bytes([table, table, table[1:], torch.zeros(2)]) == 80 + 8
    encoder = PIPELINES["sd3"].build().text_encoder_3
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    found = estimate(tmp_path, tiny="sd3").weights["text_encoder_3"]
    assert found == sum(parameter.nbytes for parameter in encoder.parameters())


def test_frozen_magnitudes_take_neither_gradients_nor_moments(tmp_path) -> None:
    found = estimate(tmp_path, adapter__train_magnitude=False)
    assert found.gradients < found.adapters and found.optimiser == 2 * found.gradients


def test_more_pictures_and_larger_ones_take_more(tmp_path) -> None:
    one = estimate(tmp_path)
    two, large = estimate(tmp_path, optim__batch_size=2), estimate(tmp_path, data__resolution=64)
    assert step_of(one) < step_of(two) < 2 * step_of(one) + one.gradients
    assert step_of(large) > 2 * step_of(one)
    assert one.moments["encoding a picture"] == two.moments["encoding a picture"] < large.moments["encoding a picture"]
    assert replace(two, moments=one.moments, places=one.places) == one


def test_class_pictures_double_the_batch_and_accumulation_does_not(tmp_path) -> None:
    plain, doubled = estimate(tmp_path), estimate(tmp_path, optim__batch_size=2)
    assert estimate(tmp_path, prior__class_prompt="a cat") == doubled
    concepts = [{"dir": str(tmp_path), "prompt": "a cat", "role": "class"}]
    assert estimate(tmp_path, data__concepts=concepts) == doubled
    accumulated = estimate(tmp_path, optim__gradient_accumulation=4)
    assert step_of(plain) <= step_of(accumulated) <= step_of(plain) + plain.gradients


def test_the_base_beside_the_adapter_is_a_second_batch_and_no_larger_one(tmp_path) -> None:
    off = {"prior__mode": "adapter_off", "prior__class_prompt": "a cat", "optim__batch_size": 2}
    plain, doubled = estimate(tmp_path, optim__batch_size=2), estimate(tmp_path, optim__batch_size=4)
    apart, accumulated = (
        estimate(tmp_path, **off),
        estimate(tmp_path, optim__batch_size=2, optim__gradient_accumulation=2),
    )
    assert step_of(plain) < step_of(apart) < step_of(doubled)
    target = apart.side**2 * 64  # no more than the base's own prediction comes on top
    assert step_of(accumulated) <= step_of(apart) <= step_of(accumulated) + target
    assert replace(apart, moments=plain.moments, places=plain.places) == plain


def test_checkpointing_and_half_precision_spare_memory(tmp_path) -> None:
    plain = estimate(tmp_path, tiny="sd3", optim__batch_size=4)
    assert step_of(estimate(tmp_path, tiny="sd3", optim__batch_size=4, optim__gradient_checkpointing=True)) < step_of(
        plain
    )
    assert estimate(tmp_path, tiny="sd3", optim__batch_size=4, optim__mixed_precision="bf16").total < plain.total


def test_cuda_takes_norms_in_fp32_under_autocast_alone(tmp_path) -> None:
    assert estimate(tmp_path, device="cuda").moments == estimate(tmp_path, device="cpu").moments
    half = {"optim__mixed_precision": "bf16"}
    assert step_of(estimate(tmp_path, device="cuda", **half)) > step_of(estimate(tmp_path, device="cpu", **half))
    estimate(tmp_path, device="cuda", optim__gradient_checkpointing=True, **half)  # recomputes the same dtypes


def test_previews_count_their_drawing(tmp_path) -> None:
    assert "decoding a preview" not in estimate(tmp_path).moments
    found = estimate(tmp_path, preview__prompts=["a cat"])
    assert 0 < found.moments["drawing a preview"] < step_of(found)
    assert found.moments["decoding a preview"] > 0


def test_a_gpu_holds_a_component_while_it_is_used(tmp_path) -> None:
    """In main memory all of them are held, always."""
    settings = {"tiny": "sd3", "preview__prompts": ["a cat"]}
    everything, found = estimate(tmp_path, **settings), estimate(tmp_path, device="cuda", **settings)
    assert all(set(names) == set(everything.weights) for names in everything.places.values())
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    assert {name: set(names) for name, names in found.places.items()} == {
        "encoding a caption": set(encoders),
        "encoding a picture": {"vae"},
        "drawing a preview": {"transformer"},
        "decoding a preview": {"vae"},
        "a step of 1": {"transformer"},
    }
    for moment, size in found.moments.items():
        weights = sum(found.weights[name] for name in found.places[moment])
        assert found.held(moment) == weights + found.adapters + found.optimiser + max(size, found.gradients)
    assert found.total == max(map(found.held, found.moments)) < everything.total
    assert found.present.keys() | found.resting.keys() == found.weights.keys()


def test_what_every_step_uses_stays_beside_the_denoiser(tmp_path) -> None:
    def places(**changes) -> set[str]:
        return set(estimate(tmp_path, device="cuda", **changes).places["a step of 1"])

    assert places() == {"unet"}
    assert places(data__crop="random") == {"unet", "vae"}
    assert places(data__crop="random", data__cache_variants=2) == {"unet"}
    assert places(adapter__train_text_encoder=True) == {"unet", "text_encoder"}
    assert places(words__starts={"zqx": "cat"}) == {"unet", "text_encoder"}


def test_swapped_blocks_are_off_the_device_but_for_two(tmp_path) -> None:
    def weights(device: str, count: int) -> int:
        found = estimate(tmp_path, tiny="flux-dev", device=device, base__swap_blocks=count)
        return found.weights["transformer"]

    plain, two, all_of_them = (weights("cuda", count) for count in (0, 2, 4))
    assert weights("cpu", 4) == weights("cpu", 0) == plain == two  # two are on the device whatever is done
    assert all_of_them < plain


def test_pissa_adds_frozen_anchors(tmp_path) -> None:
    plain, anchored = estimate(tmp_path), estimate(tmp_path, adapter__init="pissa")
    assert anchored.adapters > plain.adapters and anchored.gradients == plain.gradients
