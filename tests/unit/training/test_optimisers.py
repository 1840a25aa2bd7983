"""Optimisers: each is its library's own, with what that advises; rates by pattern, norms that are cut, averages."""

import copy
import math
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from dora_diffusion.functional.dora import low_rank_delta
from dora_diffusion.functional.weight_norms import factor_to_norm, update_norm
from dora_diffusion.state import AdapterState
from dora_diffusion.training.base.memory import estimate_memory
from dora_diffusion.training.base.meta import without_numbers
from dora_diffusion.training.base.trainable import TrainablePipeline, prepare_trainable
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.known_optimisers import OPTIMISERS
from dora_diffusion.training.run.checkpoint import resumable_part
from dora_diffusion.training.step.average import average_of
from dora_diffusion.training.step.optimisers import build_optimizer, check_optimizer, limit_weight_norms
from dora_diffusion.training.step.rates import RateSchedule
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

NAMES = sorted(OPTIMISERS)
Library = Callable[[list[dict[str, object]]], torch.optim.Optimizer]


def adamw8bit(groups):
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(groups, lr=1e-4, weight_decay=0.01)


def prodigy(groups):
    from prodigyopt import Prodigy

    return Prodigy(groups, lr=1.0, weight_decay=0.01, safeguard_warmup=True, use_bias_correction=True)


def schedulefree(groups):
    from schedulefree import AdamWScheduleFree

    made = AdamWScheduleFree(groups, lr=3e-4, warmup_steps=4)
    made.train()
    return made


def adafactor(groups):
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False, warmup_init=False)


def lion(groups):
    from lion_pytorch import Lion

    return Lion(groups, lr=3e-5, weight_decay=0.03)


def came(groups):
    from came_pytorch import CAME

    return CAME(groups, lr=5e-5, weight_decay=0.01)


# name -> the library as its own guide has it, the rate, the decay
LITERALLY: dict[str, tuple[Library, float, float]] = {
    "adamw": (lambda groups: torch.optim.AdamW(groups), 1e-4, 0.01),
    "adamw8bit": (adamw8bit, 1e-4, 0.01),
    "prodigy": (prodigy, 1.0, 0.01),
    "schedulefree": (schedulefree, 3e-4, 0.0),
    "adafactor": (adafactor, 1e-3, 0.0),
    "lion": (lion, 3e-5, 0.03),
    "came": (came, 5e-5, 0.01),
}


def config_of(folder, *, adapter: dict[str, object] | None = None, words: bool = False, **optim) -> TrainConfig:
    sections = {"words": {"starts": {"<zqx>": "cat"}}} if words else {}
    return TrainConfig.model_validate(
        {
            "output_dir": folder / "run",
            "data": {"instance_dir": folder, "instance_prompt": "a <zqx> cat", "resolution": 32},
            "adapter": {"rank": 4, "train_text_encoder": True, **(adapter or {})},
            "optim": {"steps": 10, **optim},
            **sections,
        }
    )


def trainable_of(config: TrainConfig) -> TrainablePipeline:
    """Ready to train, B other than 0 so that nothing of A's gradient is 0."""
    trainable = prepare_trainable(random_pocket_pipeline(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for injection in trainable.injections.values():
            for up in injection.ups():
                up.copy_(0.1 * torch.randn(up.shape, generator=generator))
    return trainable


def optimizer_of(trainable: TrainablePipeline, config: TrainConfig) -> torch.optim.Optimizer:
    if config.optim.optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    return build_optimizer(trainable, config.optim, config.words)


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = 0.01 * torch.randn(parameter.shape, generator=generator)


def literal_groups(trainable: TrainablePipeline, rate: float, decay: float) -> tuple[list, dict[str, nn.Parameter]]:
    """Copies of what is trained, in groups as they are meant: A, B and m of the denoiser, then of the text encoder."""
    copies = {
        name: nn.Parameter(tensor.detach().clone())
        for name, tensor in trainable.named_tensors().items()
        if tensor.requires_grad
    }
    groups = [
        {
            "params": [one for name, one in copies.items() if name.startswith(f"{part}.") and name.endswith(kind)],
            "lr": rate,
            "weight_decay": 0.0 if kind == "magnitude" else decay,
        }
        for part in ("unet", "text_encoder")
        for kind in ("down", "up", "magnitude")
    ]
    return groups, copies


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_library_as_its_guide_has_it(tmp_path, name) -> None:
    library, rate, decay = LITERALLY[name]
    config = config_of(tmp_path, optimizer=name, **({"warmup_steps": 4} if name == "schedulefree" else {}))
    trainable = trainable_of(config)
    groups, copies = literal_groups(trainable, rate, decay)
    ours, theirs = optimizer_of(trainable, config), library(groups)
    assert [len(group["params"]) for group in ours.param_groups] == [len(group["params"]) for group in groups]
    rates = RateSchedule(ours, config.optim)
    for step in range(5):
        rates.set(step)
        for group in theirs.param_groups:
            factor = 1.0 if name == "schedulefree" else 0.5 * (1 + math.cos(math.pi * step / 10))
            group["lr"] = rate * factor
        give_gradients([parameter for group in ours.param_groups for parameter in group["params"]], step)
        give_gradients([parameter for group in theirs.param_groups for parameter in group["params"]], step)
        ours.step()
        theirs.step()
    now = {key: tensor for key, tensor in trainable.named_tensors().items() if tensor.requires_grad}
    assert_identical(now, copies)
    begun = trainable_of(config).named_tensors()
    assert [key for key, tensor in now.items() if torch.equal(tensor, begun[key])] == []


@pytest.mark.parametrize("name", NAMES)
def test_magnitudes_never_decay(tmp_path, name) -> None:
    ended = []
    for decay in (0.0, 0.9):
        config = config_of(tmp_path, optimizer=name, weight_decay=decay)
        trainable = trainable_of(config)
        optimizer = optimizer_of(trainable, config)
        give_gradients(trainable.parameters(), 0)
        optimizer.step()
        ended.append(trainable.injections["unet"])
    assert_identical(ended[0].magnitudes(), ended[1].magnitudes())
    assert not [one for one, other in zip(ended[0].downs(), ended[1].downs(), strict=True) if torch.equal(one, other)]


@pytest.mark.parametrize("name", NAMES)
def test_the_record_says_how_many_bytes_are_kept(tmp_path, name) -> None:
    config = config_of(tmp_path, optimizer=name, adapter={"rank": 16})
    trainable = trainable_of(config)
    optimizer = optimizer_of(trainable, config)
    give_gradients(trainable.parameters(), 0)
    optimizer.step()
    shared = {"qmap1", "qmap2"}  # one table for all codes
    for parameter in trainable.parameters():
        kept = optimizer.state[parameter]
        tensors = [value for key, value in kept.items() if isinstance(value, Tensor) and key not in shared]
        steps = 0 if name in ("adafactor", "came") else sum(one.nbytes for one in tensors if one.dim() == 0)
        assert config.optim.kind.state_bytes(parameter.shape, {}) == sum(one.nbytes for one in tensors) - steps


def test_options_that_change_what_is_kept_count(tmp_path) -> None:
    for name, options in (("prodigy", {"slice_p": 11}), ("adafactor", {"beta1": 0.9})):
        config = config_of(tmp_path, optimizer=name, optimizer_options=options)
        trainable = trainable_of(config)
        optimizer = optimizer_of(trainable, config)
        give_gradients(trainable.parameters(), 0)
        optimizer.step()
        for parameter in trainable.parameters():
            kept = sum(value.nbytes for value in optimizer.state[parameter].values() if isinstance(value, Tensor))
            assert config.optim.kind.state_bytes(parameter.shape, config.optim.options) == kept


def test_the_memory_estimate_knows_the_optimiser_and_the_average(tmp_path) -> None:
    found = {}
    for name, settings in {
        "adamw": {},
        "lion": {"optimizer": "lion"},
        "both": {"optimizer": "lion", "ema_decay": 0.9},
        "adafactor": {"optimizer": "adafactor"},
    }.items():
        config = config_of(tmp_path, **settings)
        trainable = prepare_trainable(without_numbers(random_pocket_pipeline()), config)
        found[name] = estimate_memory(trainable, config, device="cpu")
    numbers = found["adamw"].gradients
    assert found["adamw"].optimiser == 2 * numbers
    assert found["lion"].optimiser == numbers and found["both"].optimiser == 2 * numbers
    assert found["adafactor"].optimiser < numbers / 2
    assert found["adamw"].total - found["lion"].total == numbers


def test_defaults_are_what_they_were(tmp_path) -> None:
    optim = config_of(tmp_path).optim
    assert (optim.rate, optim.words_rate, optim.decay, optim.schedule) == (1e-4, 5e-4, 1e-2, "cosine")
    assert optim.options == {}
    said = resumable_part(config_of(tmp_path))["optim"]  # as checkpoints have said it before there was null
    expected = {"learning_rate": 1e-4, "words_learning_rate": 5e-4, "weight_decay": 1e-2, "lr_scheduler": "cosine"}
    assert {key: said[key] for key in expected} == expected


def test_new_words_have_a_rate_of_their_own_and_prodigys_is_that_of_all(tmp_path) -> None:
    for optim, rates in (
        ({}, (1e-4, 5e-4)),
        ({"optimizer": "lion"}, (3e-5, 1.5e-4)),
        ({"optimizer": "prodigy"}, (1.0, 1.0)),
        ({"optimizer": "prodigy", "learning_rate": 0.5}, (0.5, 0.5)),
        ({"optimizer": "came", "words_learning_rate": 1e-2}, (5e-5, 1e-2)),
    ):
        config = config_of(tmp_path, words=True, **optim)
        groups = optimizer_of(trainable_of(config), config).param_groups
        assert (groups[0]["lr"], groups[-1]["lr"]) == pytest.approx(rates)
        assert groups[-1]["weight_decay"] == 0 and groups[-1]["until"] == 10


def test_the_rate_that_is_told_of_prodigy_is_the_one_that_it_has_found(tmp_path) -> None:
    config = config_of(tmp_path, optimizer="prodigy", lr_scheduler="constant")
    trainable = trainable_of(config)
    optimizer = optimizer_of(trainable, config)
    rates = RateSchedule(optimizer, config.optim)
    assert rates.set(0) == 1e-6  # d0
    for step in range(24):
        give_gradients(trainable.parameters(), 3)
        optimizer.step()
        assert rates.set(step) == optimizer.param_groups[0]["d"]
    assert optimizer.param_groups[0]["d"] > 2e-6 and optimizer.param_groups[0]["lr"] == 1.0


# rates by pattern


def test_patterns_reach_exactly_the_layers_that_they_name(tmp_path) -> None:
    patterns = {r"unet\..*attn1.to_q": 0.25, "to_q": 0.0, r"text_encoder\..*": 3.0}
    config = config_of(tmp_path, learning_rate=1e-3, lr_pattern=patterns, text_encoder_learning_rate=1e-4)
    trainable = trainable_of(config)
    optimizer = optimizer_of(trainable, config)
    of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    named = {key: tensor for key, tensor in trainable.named_tensors().items() if tensor.requires_grad}
    assert len(of) == len(named) == sum(len(group["params"]) for group in optimizer.param_groups)
    expected = {
        key: 3e-4
        if key.startswith("text_encoder.")
        else (0.25e-3 if ".attn1." in key else 0.0)
        if ".to_q." in key
        else 1e-3
        for key in named
    }
    assert {key: of[id(tensor)]["lr"] for key, tensor in named.items()} == pytest.approx(expected)
    assert len(set(expected.values())) == 4
    decays = {key: of[id(tensor)]["weight_decay"] for key, tensor in named.items()}
    assert {key for key, decay in decays.items() if decay == 0} == {key for key in named if key.endswith("magnitude")}
    begun = {key: tensor.detach().clone() for key, tensor in named.items()}
    RateSchedule(optimizer, config.optim).set(0)
    give_gradients(list(named.values()), 0)
    optimizer.step()
    still = {key for key, tensor in named.items() if torch.equal(tensor, begun[key])}
    assert still == {key for key, rate in expected.items() if rate == 0}


def test_without_patterns_the_groups_are_those_of_before(tmp_path) -> None:
    config = config_of(tmp_path)
    trainable = trainable_of(config)
    parts = [trainable.injections[name] for name in ("unet", "text_encoder")]
    lists = [found for part in parts for found in (part.downs(), part.ups(), part.magnitudes())]
    groups = optimizer_of(trainable, config).param_groups
    assert [[id(one) for one in group["params"]] for group in groups] == [[id(one) for one in each] for each in lists]


def test_a_pattern_of_no_layer_is_refused(tmp_path) -> None:
    config = config_of(tmp_path, lr_pattern={"to_nothing": 0.5})
    with pytest.raises(
        ValueError, match=r"^optim.lr_pattern: 'to_nothing' decides for none of the \d+ targeted layers"
    ):
        optimizer_of(trainable_of(config), config)


# norms


@pytest.mark.parametrize("shapes", [((4, 24), (16, 4)), ((3, 5, 3, 3), (8, 3, 1, 1)), ((70, 20), (30, 70))])
def test_an_update_is_as_long_as_its_dense_form_and_is_cut_to_the_limit(shapes) -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in shapes)
    norm = torch.linalg.vector_norm(low_rank_delta(down, up, 0.5))
    assert_close(update_norm(down, up, 0.5), norm)
    factor = factor_to_norm(down, up, 0.5, float(norm) / 3)
    cut = low_rank_delta(factor * down, factor * up, 0.5)
    assert_close(cut, low_rank_delta(down, up, 0.5) / 3)  # its direction stays
    assert factor_to_norm(down, up, 0.5, 1.001 * float(norm)) == 1
    assert factor_to_norm(down, torch.zeros_like(up), 0.5, 1e-3) == 1
    assert update_norm(down, torch.zeros_like(up), 0.5) == 0


def test_after_each_step_no_update_is_longer_than_the_limit_and_nothing_else_moves(tmp_path) -> None:
    ended = []
    for limit in (None, 2.5):
        config = config_of(tmp_path, max_weight_norm=limit, learning_rate=1e-3, adapter={"target_modules": "all"})
        trainable = trainable_of(config)
        optimizer = optimizer_of(trainable, config)
        limit_weight_norms(optimizer, trainable, limit)
        give_gradients(trainable.parameters(), 0)
        optimizer.step()
        ended.append(trainable)
    free, cut = ({key: one.detach() for key, one in each.named_tensors().items()} for each in ended)
    lengths = {}
    for name, injection in ended[1].injections.items():
        for path in injection.matched:
            key, scale = f"{name}.{path}", injection.scale(path)
            long = torch.linalg.vector_norm(low_rank_delta(free[f"{key}.down"], free[f"{key}.up"], scale))
            now = torch.linalg.vector_norm(low_rank_delta(cut[f"{key}.down"], cut[f"{key}.up"], scale))
            lengths[key] = float(long)
            assert_close(now, long.clamp(max=2.5))
            share = torch.clamp(2.5 / long, max=1).sqrt()  # kohya's: of each of the two
            assert_close(cut[f"{key}.up"], share * free[f"{key}.up"])
            if long < 2.5:
                assert_identical([cut[f"{key}.{part}"] for part in ("down", "up")],
                                 [free[f"{key}.{part}"] for part in ("down", "up")])  # fmt: skip
    assert min(lengths.values()) < 2.5 < max(lengths.values())
    others = [key for key in free if key.endswith("magnitude")]
    assert_identical([cut[key] for key in others], [free[key] for key in others])


# averages


def test_the_moving_average_is_what_it_says(tmp_path) -> None:
    """a <- a - (1 - d)(a - p), d = min(decay, (1 + n) / (10 + n)), and the first p itself."""
    config = config_of(tmp_path, ema_decay=0.3, learning_rate=1e-2, words=True)
    trainable = trainable_of(config)
    optimizer = optimizer_of(trainable, config)
    average = average_of(trainable, optimizer, config.optim)
    literal: list[Tensor] = []
    for n in range(6):
        give_gradients(trainable.parameters(), n)
        optimizer.step()
        decay = min(0.3, (1 + n) / (10 + n)) if n else 0.0
        now = [parameter.detach().double() for parameter in trainable.parameters()]
        literal = now if not n else [a - (1 - decay) * (a - p) for a, p in zip(literal, now, strict=True)]
    assert (1 + 1) / (10 + 1) < 0.3 < (1 + 5) / (10 + 5)  # both halves of min were met
    trained = [parameter.detach().clone() for parameter in trainable.parameters()]
    with average.shown():
        shown = [parameter.detach().clone() for parameter in trainable.parameters()]
    assert_close([one.double() for one in shown], literal)
    assert not [one for one, other in zip(shown, trained, strict=True) if torch.equal(one, other)]
    assert_identical([parameter.detach() for parameter in trainable.parameters()], trained)
    assert int(average.tensors["average.steps"]) == 6
    assert len(average.tensors) == len(trained) + 1


def test_schedule_free_shows_what_its_library_evaluates_and_leaves_no_trace(tmp_path) -> None:
    config = config_of(tmp_path, optimizer="schedulefree", learning_rate=1e-2)
    trainable = trainable_of(config)
    groups, copies = literal_groups(trainable, 1e-2, 0.0)
    optimizer = optimizer_of(trainable, config)
    average = average_of(trainable, optimizer, config.optim)
    from schedulefree import AdamWScheduleFree

    theirs = AdamWScheduleFree(groups, lr=1e-2)
    theirs.train()
    for step in range(4):
        give_gradients([parameter for group in optimizer.param_groups for parameter in group["params"]], step)
        give_gradients([parameter for group in theirs.param_groups for parameter in group["params"]], step)
        optimizer.step()
        theirs.step()
    trained = copy.deepcopy(copies)
    theirs.eval()
    with average.shown():
        assert_identical({key: trainable.named_tensors()[key] for key in copies}, copies)
    assert not [key for key in copies if torch.equal(copies[key], trained[key])]
    assert_identical({key: trainable.named_tensors()[key] for key in copies}, trained)
    assert all(group["train_mode"] for group in optimizer.param_groups)
    with pytest.raises(RuntimeError, match="drawn"), average.shown():
        raise RuntimeError("drawn")
    assert_identical({key: trainable.named_tensors()[key] for key in copies}, trained)


def test_without_an_average_nothing_is_touched(tmp_path) -> None:
    config = config_of(tmp_path)
    trainable = trainable_of(config)
    average = average_of(trainable, optimizer_of(trainable, config), config.optim)
    versions = [parameter._version for parameter in trainable.parameters()]
    with average.shown():
        pass
    assert [parameter._version for parameter in trainable.parameters()] == versions and not average.tensors


# what is refused


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"optimizer": "schedulefree", "lr_scheduler": "cosine"},
            "optim.lr_scheduler: got 'cosine' with optim.optimizer 'schedulefree', whose rate stays; expected null",
        ),
        (
            {"optimizer": "schedulefree", "ema_decay": 0.9},
            "optim.ema_decay: got 0.9 with optim.optimizer 'schedulefree', which averages by itself; expected null",
        ),
        ({"optimizer": "schedulefree", "max_weight_norm": 1.0}, "optim.max_weight_norm: got 1.0 with optim.optimizer"),
        (
            {"optimizer": "prodigy", "loraplus_lr_ratio": 16.0},
            "optim.loraplus_lr_ratio: got 16.0 with optim.optimizer 'prodigy', which finds one rate for all; "
            "expected 1",
        ),
        ({"optimizer": "prodigy", "magnitude_lr_multiplier": 0.5}, "optim.magnitude_lr_multiplier: got 0.5 with "),
        ({"optimizer": "prodigy", "text_encoder_learning_rate": 0.1}, "optim.text_encoder_learning_rate: got 0.1 with"),
        ({"optimizer": "prodigy", "text_encoder_learning_rate": {"text_encoder": 0.1}}, "expected null"),
        ({"optimizer": "prodigy", "words_learning_rate": 5e-4}, "optim.words_learning_rate: got 0.0005 with "),
        ({"optimizer": "prodigy", "lr_pattern": {"to_q": 0.5}}, "optim.lr_pattern: got {'to_q': 0.5} with "),
        ({"warmup_steps": 3, "lr_scheduler": "constant"}, "optim.warmup_steps: got 3 with optim.lr_scheduler"),
        ({"warmup_steps": 30, "optimizer": "schedulefree"}, "optim.warmup_steps: got 30, expected at most optim.steps"),
    ],
)
def test_settings_that_an_optimiser_makes_no_sense_of_are_refused(tmp_path, settings, complaint) -> None:
    with pytest.raises(ValueError) as caught:
        config_of(tmp_path, **settings)
    assert complaint in str(caught.value)


def test_settings_that_fit_are_taken(tmp_path) -> None:
    taken: list[dict[str, object]] = [
        {"optimizer": "prodigy", "magnitude_lr_multiplier": 0.0, "lr_pattern": {"to_q": 0.0, "to_k": 1.0}},
        {"optimizer": "prodigy", "learning_rate": 0.5, "text_encoder_learning_rate": 0.5},
        {"optimizer": "schedulefree", "lr_scheduler": "constant", "warmup_steps": 3},
        {"optimizer": "lion", "loraplus_lr_ratio": 16.0, "ema_decay": 0.99, "max_weight_norm": 1.0},
    ]
    for settings in taken:
        optim = config_of(tmp_path, **settings).optim
        assert {name: getattr(optim, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("adapter", "complaint"),
    [
        ({"init": "pissa"}, "optim.max_weight_norm: got 1.0 with adapter.init 'pissa'"),
        ({"train_unet": False, "train_text_encoder": False}, "optim.max_weight_norm: got 1.0, but no adapter"),
    ],
)
def test_a_limit_of_what_has_no_length_is_refused(tmp_path, adapter, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        config_of(tmp_path, words=True, adapter=adapter, max_weight_norm=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_library_that_is_missing_is_named_with_what_installs_it(tmp_path, monkeypatch, name) -> None:
    kind = OPTIMISERS[name]
    monkeypatch.setitem(sys.modules, kind.module, None)
    with pytest.raises(ValueError) as caught:
        check_optimizer(config_of(tmp_path, optimizer=name).optim)
    said = str(caught.value)
    assert said.startswith(f"optim.optimizer: {name!r} needs the package {kind.package} (") and "\n" not in said
    assert f"pip install {kind.package}, or pip install 'dora-diffusion[" in said


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        (
            "prodigy",
            {"d_coeff": 2.0},
            "optim.optimizer_options.d_coeff: no option of prodigy (Prodigy) that can be set",
        ),
        ("prodigy", {"lr": 2.0}, "optim.optimizer_options.lr: no option of prodigy"),
        ("adamw", {"weight_decay": 0.1}, "optim.optimizer_options.weight_decay: no option of adamw"),
        ("adafactor", {"relative_step": True}, "optim.optimizer_options.relative_step: no option of adafactor"),
        ("schedulefree", {"warmup_steps": 3}, "optim.optimizer_options.warmup_steps: no option of schedulefree"),
        ("came", {"betas": [0.9, 0.99]}, "betas: got [0.9, 0.99], expected the kind of its default, (0.9, 0.999, 0.99"),
        ("adamw", {"betas": 0.9}, "optim.optimizer_options.betas: got 0.9, expected the kind of its default"),
        ("adamw", {"amsgrad": 1}, "optim.optimizer_options.amsgrad: got 1, expected the kind of its default, False"),
        ("adamw", {"eps": True}, "optim.optimizer_options.eps: got True, expected the kind of its default, 1e-08"),
        ("prodigy", {"beta3": [0.9]}, "optim.optimizer_options.beta3: got [0.9], expected the kind of its default"),
        ("adamw", {"eps": -1.0}, "optim.optimizer_options: AdamW refuses {'eps': -1.0}: Invalid epsilon value: -1.0"),
        ("lion", {"betas": [1.5, 0.9]}, "optim.optimizer_options: Lion refuses {'betas': (1.5, 0.9)}: it takes other"),
    ],
)
def test_options_are_those_of_the_class(tmp_path, name, options, complaint) -> None:
    with pytest.raises(ValueError) as caught:
        check_optimizer(config_of(tmp_path, optimizer=name, optimizer_options=options).optim)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_options_reach_the_class(tmp_path) -> None:
    config = config_of(tmp_path, optimizer="prodigy", optimizer_options={"d_coef": 2, "betas": [0.9, 0.99]})
    group = optimizer_of(trainable_of(config), config).param_groups[-1]
    assert (group["d_coef"], group["betas"], group["use_bias_correction"]) == (2, (0.9, 0.99), True)


def test_bitsandbytes_is_asked_for_its_class_of_8_bits(tmp_path, monkeypatch) -> None:
    """By a library that stands in for it, wherever it is not installed."""
    library = ModuleType("bitsandbytes.optim")

    class AdamW8bit(torch.optim.SGD):
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2, min_8bit_size=4096, is_paged=False):
            super().__init__(params, lr=lr, weight_decay=weight_decay)
            self.told = (betas, min_8bit_size, is_paged)

    library.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", library)
    config = config_of(tmp_path, optimizer="adamw8bit", optimizer_options={"min_8bit_size": 1024})
    made = build_optimizer(trainable_of(config), config.optim, config.words)
    assert type(made) is AdamW8bit and made.told == ((0.9, 0.999), 1024, False)
    assert [(group["lr"], group["weight_decay"]) for group in made.param_groups][:3] == [(1e-4, 1e-2)] * 2 + [(1e-4, 0)]
    with pytest.raises(ValueError, match="is_paged: no option of adamw8bit"):
        check_optimizer(config_of(tmp_path, optimizer="adamw8bit", optimizer_options={"is_paged": True}).optim)


@pytest.mark.parametrize("optim", [{"ema_decay": 0.5}, {"optimizer": "schedulefree"}], ids=["ema", "schedulefree"])
def test_what_is_looked_at_has_the_norms_of_the_average(tmp_path, optim: dict[str, object]) -> None:
    """Libraries write it where autograd does not see it: norms that are kept would be those of what is trained."""
    config = config_of(tmp_path, learning_rate=5e-2, adapter={"train_text_encoder": False}, **optim)
    trainable = trainable_of(config)
    optimizer = optimizer_of(trainable, config)
    average = average_of(trainable, optimizer, config.optim)
    for step in range(3):
        give_gradients(trainable.parameters(), step)
        optimizer.step()
    asked = torch.randn(1, 8, 8, 8), torch.tensor(500), torch.randn(1, 77, 256)
    trainable.refresh_norms()
    trained = trainable.denoiser(*asked).sample
    with average.shown(), trainable.drawing():
        looked_at = trainable.denoiser(*asked).sample
        averaged = trainable.adapter({})
    assert_identical(trainable.denoiser(*asked).sample, trained)
    for injection in trainable.injections.values():
        injection.load(AdapterState({path.partition(".")[2]: one for path, one in averaged.modules.items()}))
    with trainable.drawing():
        assert_identical(trainable.denoiser(*asked).sample, looked_at)
    assert not torch.equal(looked_at, trained)
