"""Where a run trains and in what precision, and what devices without fp64 are spared."""

import itertools
import json
import math
import os
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dora_diffusion.adapters import AdapterManager
from dora_diffusion.blending import blend, interference
from dora_diffusion.conversion import Extraction, extract
from dora_diffusion.formats import load_adapter
from dora_diffusion.generation.generate import GenerationSettings, generate
from dora_diffusion.pipelines.textual_inversion import add_words
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.base.devices import accelerate_on, device_for, precision_for
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run import train as running
from dora_diffusion.training.run.dry_run import describe_plan
from dora_diffusion.utils import hardware
from dora_diffusion.utils.atomic import MANIFEST, sha256_of
from dora_diffusion.utils.hardware import best_precision, device_of, in_float64
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("red", "blue"):
        background(name, 32).save(folder / f"{name}.png")
    return folder


def config_of(photos: Path, run: str = "run", **sections: Any) -> TrainConfig:
    base = {
        "output_dir": photos.parent / run,
        "data": {"instance_dir": photos, "instance_prompt": "a zqx cat", "resolution": 32},
        "adapter": {"rank": 2},
        "optim": {"steps": 2},
        "validation": {"every": 0, "timesteps": 1, "pictures": 1},
        "logging": {"trackers": []},
    }
    return TrainConfig.model_validate(base | sections)


def test_a_device_has_a_name(photos: Path) -> None:
    for name in ("auto", "cpu", "mps", "cuda", "cuda:1", "xpu:0"):
        assert config_of(photos, device=name).device == name


@pytest.mark.parametrize("name", ["GPU", "cuda:", "cuda:-1", "cpu:0", "", "CUDA"])
def test_another_name_is_refused_in_one_line(photos: Path, name: str) -> None:
    file = photos.parent / "run.yaml"
    file.write_text(f"device: '{name}'\noutput_dir: run\ndata: {{instance_dir: photos, instance_prompt: a}}\n")
    with pytest.raises(ValueError, match=rf"^{file}:1: device: got '{name}', expected auto, cpu, cuda, cuda:N, "):
        TrainConfig.from_yaml(file)


def test_a_device_that_is_not_here_is_refused_before_anything_is_read(photos: Path) -> None:
    config = config_of(photos, device="cuda:7")
    expected = "^device: got 'cuda:7', which is not here; expected cpu or auto$"
    for refused in (running.train, running.check_start, describe_plan):
        with pytest.raises(ValueError, match=expected):
            refused(config)
    assert not config.output_dir.exists()


def test_what_is_launched_for_the_cpu_trains_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of("auto") == "cuda"
    assert device_for("auto", {"ACCELERATE_USE_CPU": "true"}) == CPU
    assert device_for("auto", {"ACCELERATE_USE_CPU": "true"}) == device_for("cpu", {})


def test_one_of_several_processes_has_the_device_that_it_is_given() -> None:
    launched = {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    with pytest.raises(ValueError, match="^device: got 'cuda:0' in one of several processes.*expected cuda or auto$"):
        device_for("cuda:0", launched)
    assert device_for("cpu", launched) == CPU


def test_accelerate_takes_the_device_that_it_is_given_whatever_it_had_before() -> None:
    before = dict(os.environ)
    for device in ("meta", "cpu", "meta"):  # the second device that every machine has
        with accelerate_on(torch.device(device)):
            assert Accelerator(cpu=device == "cpu").device == torch.device(device)
    with accelerate_on(CPU):
        assert Accelerator().device == CPU
    assert dict(os.environ) == before | {key: os.environ[key] for key in os.environ.keys() - before.keys()}
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ


@pytest.mark.parametrize(
    ("name", "device", "before", "taken"),
    [
        ("auto", CPU, None, "no"),
        ("auto", GPU, None, "bf16"),
        ("auto", CPU, "bf16", "bf16"),  # a run keeps what it began with
        ("auto", GPU, "no", "no"),
        ("auto", CPU, "fp16", "no"),  # which the comparison with the checkpoint then refuses
        ("auto", GPU, "fp16", "fp16"),
        ("no", GPU, "bf16", "no"),
        ("bf16", CPU, None, "bf16"),
        ("fp16", GPU, None, "fp16"),
    ],
)
def test_auto_is_what_the_device_does_best(name: str, device: torch.device, before: str | None, taken: str) -> None:
    assert precision_for(name, device, before=before) == taken


@pytest.mark.parametrize(("computes", "taken"), [(True, "bf16"), (False, "fp16")])
def test_fp16_where_a_gpu_only_emulates_bf16(monkeypatch: pytest.MonkeyPatch, computes: bool, taken: str) -> None:
    asked: list[bool] = []

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return computes or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    assert best_precision("cuda:1") == taken and asked == [False]


def test_fp16_on_a_cpu_is_refused_in_one_line(photos: Path) -> None:
    config = config_of(photos, optim={"steps": 2, "mixed_precision": "fp16"})
    for refused in (running.train, running.check_start, describe_plan):
        with pytest.raises(ValueError, match=r"^optim.mixed_precision: got 'fp16' on a CPU, .*expected auto, no or bf"):
            refused(config)
    assert not config.output_dir.exists()


def test_auto_trains_on_a_cpu_bit_for_bit_as_fp32_and_the_run_says_what_it_was(photos: Path) -> None:
    made = {}
    for precision in ("auto", "no"):
        config = config_of(photos, precision, optim={"steps": 2, "mixed_precision": precision})
        made[precision] = load_file(running.train(config, pipeline=random_pocket_pipeline()).adapter)
        (saved,) = config.output_dir.glob("checkpoints/*/progress.json")
        said = json.loads(saved.read_text())
        assert said["settings"]["optim"]["mixed_precision"] == "no" and said["device"] == "cpu"
        assert TrainConfig.from_yaml(config.output_dir / "config.yaml").optim.mixed_precision == "no"
    assert_identical(made["auto"], made["no"])


def rewritten(config: TrainConfig, **said: Any) -> None:
    """Let the checkpoint say that it is from elsewhere."""
    (path,) = config.output_dir.glob("checkpoints/*/progress.json")
    progress = json.loads(path.read_text())
    progress["device"] = said.get("device", progress["device"])
    progress["settings"]["optim"]["mixed_precision"] = said.get("precision", "no")
    path.write_text(json.dumps(progress))
    sizes = json.loads((path.parent / MANIFEST).read_text())
    sizes[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (path.parent / MANIFEST).write_text(json.dumps(sizes))


def test_a_run_that_goes_on_elsewhere_keeps_its_precision_and_says_so(photos: Path, capsys) -> None:
    running.train(config_of(photos, optim={"steps": 2, "mixed_precision": "bf16"}), pipeline=random_pocket_pipeline())
    config = config_of(photos)
    rewritten(config, device="cuda", precision="bf16")
    running.train(config, extend=3, pipeline=random_pocket_pipeline())
    said = capsys.readouterr().out
    assert "resuming from step-00000002; it was trained on cuda and goes on on cpu" in said
    newest = max(config.output_dir.glob("checkpoints/*/progress.json"))
    assert json.loads(newest.read_text())["settings"]["optim"]["mixed_precision"] == "bf16"


def test_what_was_trained_in_fp16_does_not_go_on_in_silence_on_a_cpu(photos: Path) -> None:
    config = config_of(photos)
    running.train(config, pipeline=random_pocket_pipeline())
    rewritten(config, device="cuda", precision="fp16")
    with pytest.raises(ValueError, match="optim.mixed_precision was 'fp16' and is now 'no'"):
        running.train(config, extend=3, pipeline=random_pocket_pipeline())


class NoFloat64(TorchFunctionMode):
    """Pretends that all tensors lie on a device without fp64, but for those that were moved to main memory.

    What libraries do is theirs: they ask for the kind of device, which here is a CPU.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        tensors = [one for one in _flat((args, kwargs)) if isinstance(one, Tensor)]
        if getattr(func, "__name__", "") in ("cpu", "numpy"):
            made = made.clone() if isinstance(made, Tensor) else made
            moved = True
        else:
            moved = not tensors or any(getattr(one, "is_host", False) for one in tensors)
        for one in _flat(made):
            if isinstance(one, Tensor) and one.dtype == torch.float64 and not moved and _is_ours():
                raise TypeError(f"fp64 by {getattr(func, '__name__', func)}")
            if isinstance(one, Tensor) and moved and tensors:
                one.is_host = True
        return made


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [one for part in value for one in _flat(part)] if isinstance(value, (list, tuple)) else [value]


def _is_ours() -> bool:
    frames = [frame.filename for frame in traceback.extract_stack()]
    callers = [name for name in frames if "/torch/" not in name and name != __file__]
    return "dora_diffusion/" in callers[-1]


def test_no_fp64_is_made_on_a_device_that_lacks_it(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_float64", lambda device: False)
    pipe, changed = PIPELINES["sd1"].build(), PIPELINES["sd1"].build(seed=1)
    config = config_of(
        photos,
        adapter={"rank": 2, "train_text_encoder": True, "init": "pissa"},
        optim={"steps": 2, "ema_decay": 0.9},
        loss={"kind": "huber", "noise_offset": 0.1, "timesteps": {"density": "beta", "alpha": 2.0}},
        preview={"prompts": ["a cat"], "steps": 2},
    )
    with NoFloat64():
        result = running.train(config, pipeline=pipe)
        adapter = load_adapter(result.adapter)
        other = replace(adapter, metadata={})
        blended = blend({"a": adapter, "b": other}, {"a": 0.5, "b": 1.0}, base=pipe, rank=2)
        assert interference({"a": adapter, "b": other}, base=pipe).cosines
        for use_dora in (True, False):
            options = Extraction(["attn1.to_q"], error=0.5, use_dora=use_dora)
            extract(changed, pipe, rank=4, options=options)
        manager = AdapterManager(pipe)
        manager.load_adapter(result.adapter, name="a")
        manager.set_adapters({"a": 0.7})
        manager.set_schedule("a", [(0.0, 1.0), (1.0, 0.5)])
        generate(pipe, GenerationSettings("a cat", steps=2, width=64, height=64))
        assert blended is not None


def test_the_pretence_finds_fp64() -> None:
    with NoFloat64(), pytest.raises(TypeError, match="fp64 by double"):
        in_float64(torch.ones(2))  # a CPU has it, so that it stays where it is


def test_fp64_is_taken_in_main_memory_where_a_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_float64", lambda device: False)
    tensor = torch.tensor([1.5, 2.5])
    with NoFloat64():
        assert_close(in_float64(tensor), tensor.to(torch.float64))


@pytest.mark.parametrize("trains", ["words", "words and adapters"])
def test_new_words_train_in_bf16_and_stay_fp32(photos: Path, trains: str) -> None:
    config = config_of(
        photos,
        adapter={"rank": 2, "train_unet": trains != "words", "train_text_encoder": trains != "words"},
        words={"starts": {"zqx": "cat"}, "share": 0.5},
        optim={"steps": 4, "mixed_precision": "bf16"},
        preview={"prompts": ["a zqx cat"], "steps": 1},
    )
    result = running.train(config, pipeline=random_pocket_pipeline())
    (word,) = (load_file(path) for path in result.words)
    (vectors,) = word.values()
    assert vectors.dtype == torch.float32 and bool(vectors.isfinite().all())


def test_words_in_a_bf16_pipeline_leave_its_dtype_and_draw() -> None:
    pipe = random_pocket_pipeline().to(torch.bfloat16)
    words = add_words(pipe, {"zqx": "cat"})
    assert pipe.text_encoder.dtype == pipe.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in words.parameters()} == {torch.float32}
    generate(pipe, GenerationSettings("a zqx", steps=1, width=64, height=64))
    words.remove()


def as_on_a_gpu(**settings: Any) -> Accelerator:
    """fp16 with its scaler, on a CPU."""
    accelerator = Accelerator(**settings)
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=1024.0)
    return accelerator


@pytest.mark.parametrize("trains", ["words", "words and adapters", "adapters"])
def test_fp16_trains_words_and_adapters_and_words_beyond_their_share(
    photos: Path, monkeypatch: pytest.MonkeyPatch, trains: str
) -> None:
    monkeypatch.setattr(running, "Accelerator", as_on_a_gpu)
    monkeypatch.setattr(running, "with_precision", lambda config, device, before: config)
    has_adapters = "adapters" in trains
    config = config_of(
        photos,
        adapter={"rank": 2, "train_unet": has_adapters, "train_text_encoder": has_adapters},
        words={"starts": {"zqx": "cat"}, "share": 0.5} if "words" in trains else {},
        optim={"steps": 4, "mixed_precision": "fp16", "learning_rate": 1e-2, "words_learning_rate": 1e-2},
        checkpoint={"every": 1, "keep": 9},
    )
    result = running.train(config, pipeline=random_pocket_pipeline())
    losses = [float(line.split(",")[1]) for line in (config.output_dir / "loss.csv").read_text().splitlines()[1:]]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    states = [load_file(path) for path in sorted(config.output_dir.glob("checkpoints/*/parameters.safetensors"))]
    assert all(bool(tensor.isfinite().all()) for state in states for tensor in state.values())
    names = {name for name in states[0] if name.startswith("words")}
    assert bool(names) == ("words" in trains) == bool(result.words)
    pairs = list(itertools.pairwise(states))
    moved = {name: [not torch.equal(one[name], other[name]) for one, other in pairs] for name in states[0]}
    assert all(moved[name] == [True, False, False] for name in names), "vectors move for half of the steps"
    ups = [any(moved[name]) for name in moved if name.endswith(".up")]
    assert sum(ups) >= 0.9 * len(ups), "the few whose gradients are too small for fp16 stand still"
