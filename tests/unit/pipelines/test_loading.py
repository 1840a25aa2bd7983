"""Bases load from wherever they lie, are known by their configs alone, run no code, and fail in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.cli import main
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.formats import save_adapter
from dora_diffusion.functional.dora import gain_form
from dora_diffusion.layers.blended import BlendedLayer
from dora_diffusion.pipelines.loading import EMBEDDED, load_pipeline
from dora_diffusion.state import ModuleState
from tests import original_layouts
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

NAMES = ("sd1", "sd2", "sd3", "sd3.5-medium")
LAYOUTS = {
    "sd1": original_layouts.stable_diffusion,
    "sd2": original_layouts.stable_diffusion,
    "sd3": original_layouts.stable_diffusion_3,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved tiny pipeline of each name, made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("base")
            PIPELINES[name].build().save_pretrained(made[name])
        return made[name]

    return folder


def without_weights(folder: Path, target: Path) -> Path:
    """Configs and tokenizers alone: what the hub gives beside a single file."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def assert_same_weights(pipe: Any, expected: Any) -> None:
    assert modules(pipe).keys() == modules(expected).keys()
    for name, part in modules(expected).items():
        found = modules(pipe)[name].state_dict()
        assert found.keys() == part.state_dict().keys()
        for key, tensor in part.state_dict().items():
            assert_identical(found[key], tensor)


def picture(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    return pipe("a cat", generator=torch.Generator().manual_seed(3), **arguments).images


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load_pipeline(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_embedded_bases_go_by_name() -> None:
    assert family_of_pipeline(load_pipeline("pocket")).name == "sd1"
    for name, folder in EMBEDDED.items():
        if not folder.is_dir():
            assert "this installation came without that base" in refusal(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_family_is_found_from_configs_whatever_the_folder_is_called(
    folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    for misleading in ("stable-diffusion-xl-base-1.0", "FLUX.1-dev", "sd2.safetensors"):
        shutil.copytree(folders(name), tmp_path / misleading)
        assert family_of_pipeline(load_pipeline(tmp_path / misleading)).name == PIPELINES[name].family


def test_a_folder_loads_in_the_dtype_asked_for(folders: Callable[[str], Path]) -> None:
    pipe = load_pipeline(folders("sd1"), dtype=torch.bfloat16)
    assert {weight.dtype for part in modules(pipe).values() for weight in part.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", NAMES)
def test_a_single_file_is_the_pipeline_it_was_written_from(
    folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    pipe = PIPELINES[name].build()
    if PIPELINES[name].family == "sd3":
        pipe.text_encoder.text_projection.weight.copy_(torch.eye(16))  # as in the original, whose files have none
    path = original_layouts.save(LAYOUTS[PIPELINES[name].family](pipe), tmp_path / "anything-xl.safetensors")
    loaded = load_pipeline(path, config=without_weights(folders(name), tmp_path / "configs"))
    assert family_of_pipeline(loaded).name == PIPELINES[name].family
    assert_same_weights(loaded, pipe)
    assert not any(part.training for part in modules(loaded).values())
    assert_close(picture(loaded), picture(pipe))  # weights elsewhere in memory may be summed in another order


@pytest.mark.parametrize("name, denoiser", [("sd1", "unet"), ("sd3", "transformer")])
@pytest.mark.parametrize("layout", ["its makers'", "diffusers'"])
def test_a_file_of_the_denoiser_alone_takes_the_rest_from_its_config(
    folders: Callable[[str], Path], tmp_path: Path, name: str, denoiser: str, layout: str
) -> None:
    tuned = PIPELINES[name].build(seed=1)
    model = getattr(tuned, denoiser)
    tensors = model.state_dict()
    if layout == "its makers'":
        originals = original_layouts.unet(model) if name == "sd1" else original_layouts.mmdit(model)
        tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in originals.items()}
    path = original_layouts.save(tensors, tmp_path / "tuned.safetensors")
    expected = load_pipeline(folders(name))
    setattr(expected, denoiser, model)
    assert_same_weights(load_pipeline(path, config=folders(name)), expected)
    bare = without_weights(folders(name), tmp_path / "configs")
    assert "the file holds no" in refusal(path, config=bare)


def test_an_embedded_base_can_lend_its_configs(tmp_path: Path) -> None:
    pipe = load_pipeline("pocket")
    path = original_layouts.save(pipe.unet.state_dict(), tmp_path / "tuned.safetensors")
    assert_same_weights(load_pipeline(path, config="pocket"), pipe)


def test_a_single_file_that_does_not_fit_its_config_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = original_layouts.stable_diffusion(PIPELINES["sd1"].build())
    for part, words in (
        ("middle_block.2", "lacks weights"),
        ("final_layer_norm", "lacks 2 weights of text_encoder"),
        ("model.diffusion_model", "UNet2DConditionModel"),
    ):
        lacking = {key: tensor for key, tensor in tensors.items() if part not in key}
        path = original_layouts.save(lacking, tmp_path / "lacking.safetensors")
        assert words in refusal(path, config=folders("sd1"))
    whole = original_layouts.save(tensors, tmp_path / "whole.safetensors")
    assert str(folders("sd3")) in refusal(whole, config=folders("sd3"))
    assert str(whole) in refusal(whole, config=folders("sd2"))


def test_files_that_are_no_checkpoint_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    config = folders("sd1")
    whole = original_layouts.save({"model.diffusion_model.out.0.weight": torch.zeros(8)}, tmp_path / "a.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-3])
    (tmp_path / "text.safetensors").write_text("hello")
    assert "cut short" in refusal(tmp_path / "cut.safetensors", config=config)
    assert "text.safetensors" in refusal(tmp_path / "text.safetensors", config=config)
    assert "no such file" in refusal(tmp_path / "absent.safetensors", config=config)
    assert "no checkpoint layout known" in refusal(whole)
    torch.save({"state_dict": {}}, tmp_path / "old.ckpt")
    assert "a pickle, which can run code" in refusal(tmp_path / "old.ckpt", config=config)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "expected a .safetensors file" in refusal(tmp_path / "model.gguf")
    adapter = save_adapter(random_adapter(random_pocket_pipeline()), tmp_path / "ink.safetensors")
    assert "--adapter" in refusal(adapter)
    assert "takes no config" in refusal(config, config=config)
    assert "no such folder" in refusal(whole, config="./nowhere")


@pytest.mark.parametrize("online", [False, True])
def test_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: bool, caplog: Any) -> None:
    """With HF_HUB_OFFLINE, and without it where the network is gone: nothing listens on the port asked."""
    if online:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        for place in ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.hf_api.ENDPOINT"):
            monkeypatch.setattr(place, "http://127.0.0.1:9", raising=False)
    reason = "offline" if online else "HF_HUB_OFFLINE"
    assert reason in refusal("someone/some-model-1.0")
    tensors = original_layouts.stable_diffusion(PIPELINES["sd1"].build())
    path = original_layouts.save(tensors, tmp_path / "whole.safetensors")
    message = refusal(path)
    assert reason in message and "--model-config" in message and "stable-diffusion-v1-5" in message
    assert reason in refusal(path, config="someone/some-model")
    assert caplog.records == []


def hostile(folder: Path, target: Path, **changes: Any) -> Path:
    """A folder whose Python files write a witness beside them when they are run."""
    shutil.copytree(folder, target)
    code = f"open({str(target / 'witness')!r}, 'w').close()\nclass Evil: pass\n"
    for place in (".", "unet", "text_encoder", "tokenizer"):
        (target / place / "evil.py").write_text(code)
    index = target / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))
    return target


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": ["evil", "Evil"]},
        {"_class_name": "Evil"},
        {"_class_name": "AutoencoderKL"},
        {"unet": ["evil", "Evil"]},
        {"text_encoder": ["transformers", "AutoModel"]},
    ],
)
def test_code_in_a_folder_is_never_run(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    target = hostile(folders("sd1"), tmp_path / "hostile", **changes)
    names_code(target / "text_encoder" / "config.json")
    monkeypatch.syspath_prepend(target)
    message = refusal(target)
    assert "never run" in message
    path = original_layouts.save(
        original_layouts.stable_diffusion(PIPELINES["sd1"].build()), tmp_path / "a.safetensors"
    )
    assert refusal(path, config=target) == message
    assert not (target / "witness").exists()


def names_code(config: Path) -> None:
    facts = json.loads(config.read_text())
    classes = ("AutoConfig", "AutoModel", "AutoTokenizer")
    config.write_text(json.dumps({**facts, "auto_map": dict.fromkeys(classes, "evil.Evil")}))


def test_code_that_lies_beside_a_known_class_is_ignored(folders: Callable[[str], Path], tmp_path: Path) -> None:
    target = hostile(folders("sd1"), tmp_path / "hostile")
    for place in ("text_encoder/config.json", "tokenizer/tokenizer_config.json", "unet/config.json"):
        names_code(target / place)
    assert_same_weights(load_pipeline(target), PIPELINES["sd1"].build())
    assert not (target / "witness").exists()


def test_pickled_weights_in_a_folder_are_not_opened(folders: Callable[[str], Path], tmp_path: Path) -> None:
    target = tmp_path / "pickled"
    shutil.copytree(folders("sd1"), target)
    weights = target / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    assert "could not be loaded" in refusal(target)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"_class_name": 3}', "{}", "\x00"])
def test_a_broken_index_is_one_line(tmp_path: Path, text: str) -> None:
    assert "model_index.json" in refusal(tmp_path)
    (tmp_path / "model_index.json").write_text(text)
    assert "model_index.json" in refusal(tmp_path)


def test_devices_and_offloading_are_checked_before_anything_is_loaded() -> None:
    assert "device is 'cpu'" in refusal("someone/some-model", offload="model")
    assert "offload 'disk' is unknown" in refusal("someone/some-model", offload="disk")
    assert "cannot be used here" in refusal("someone/some-model", device="nonsense")


def offloaded(pipe: Any, offload: Callable[[nn.Module], Any]) -> None:
    """What `enable_*_cpu_offload` does, with the CPU in the accelerator's place."""
    for part in modules(pipe).values():
        offload(part)


def test_adapters_draw_the_same_under_model_offload() -> None:
    from accelerate import cpu_offload_with_hook

    pipe = random_pocket_pipeline()
    adapter = random_adapter(pipe)
    pictures = []
    for hooked in (False, True):
        if hooked:
            offloaded(pipe, lambda part: cpu_offload_with_hook(part, torch.device("cpu")))
        manager = AdapterManager(pipe)
        manager.load_adapter(adapter, name="ink")
        manager.set_adapters({"ink": 0.8})
        manager.set_schedule("ink", [(0.0, 0.5), (1.0, 1.0)])
        pictures.append(picture(pipe))
        manager.unload()
    assert_identical(*pictures)


def test_strengths_follow_a_layer_that_moved() -> None:
    """As under CPU offload, where a schedule speaks to a layer that came over since its adapters were taken up."""
    base = nn.Linear(6, 4)
    module = ModuleState(torch.randn(2, 6), torch.randn(4, 2), 2.0, torch.rand(4) + 0.5)
    term = gain_form(base.weight.detach(), module.down, module.up, module.scale, module.magnitude)
    layer = BlendedLayer(base)
    layer.set_terms([term])
    layer.to("meta")
    layer.set_strengths(
        torch.ones(1, device="meta")
    )  # "meta" multiplies with any device, a GPU does not: look at the operands
    assert layer._held.offsets.device.type == layer._held.owners.device.type == "meta"


@pytest.mark.parametrize("action", ["fuse", "mode"])
def test_sequential_offload_refuses_to_fold_in_one_line(action: str) -> None:
    from accelerate import cpu_offload

    pipe = random_pocket_pipeline()
    manager = AdapterManager(pipe)
    manager.load_adapter(random_adapter(pipe), name="ink")
    manager.set_adapters({"ink": 1.0})
    offloaded(pipe, lambda part: cpu_offload(part, torch.device("cpu")))
    calls = {"fuse": manager.fuse, "mode": lambda: manager.set_adapters({"ink": 0.5}, blend="compose")}
    with pytest.raises(ValueError, match="sequential CPU offload.*offload='model'") as caught:
        calls[action]()
    assert "\n" not in str(caught.value)
    manager.set_adapters({"ink": 0.5})


def test_the_command_line_says_these_things_in_one_line(
    folders: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.png"
    tensors = original_layouts.stable_diffusion(PIPELINES["sd1"].build())
    path = original_layouts.save(tensors, tmp_path / "whole.safetensors")
    draw = ("generate", "--prompt", "a cat", "--steps", "1", "--width", "64", "--height", "64", "--output", str(output))
    for options, words in (
        (("--model", str(path)), "--model-config"),
        (("--model", "someone/some-model"), "HF_HUB_OFFLINE"),
        (("--offload", "model"), "device is 'cpu'"),
    ):
        assert main([*draw, *options]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and "\n" not in error
    assert main([*draw, "--model", str(path), "--model-config", str(folders("sd1"))]) == 0
    assert output.is_file()
