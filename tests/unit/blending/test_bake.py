"""A baked base draws the mix by itself: adapted layers are W' rounded once, everything else keeps its bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.blending.bake import NOTE, bake, verify
from dora_diffusion.formats import save_adapter
from dora_diffusion.functional.blend_modes import MODES
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from dora_diffusion.pipelines.base_weights import base_weights
from dora_diffusion.pipelines.loading import EMBEDDED, load_pipeline
from dora_diffusion.state import AdapterState, FactoredState, ModuleState, join
from tests import original_layouts
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

WEIGHTS = {"ink": 0.8, "tin": {"unet": 0.6, "text_encoder": -0.5}}
PROMPT = "a small flat style castle in a forest"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket architecture with random weights, fp32, saved."""
    path = tmp_path_factory.mktemp("base") / "pocket"
    random_pocket_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters() -> dict[str, AdapterState]:
    pipe = random_pocket_pipeline()
    return {"ink": random_adapter(pipe, 1), "tin": random_adapter(pipe, 2, use_dora=False)}


def for_parts(pipe: Any, *components: str, presets: str = "all-linear", seed: int = 3) -> AdapterState:
    """A random DoRA for components of any tiny pipeline, which stays as it was."""
    generator, states = torch.Generator().manual_seed(seed), []
    for component in components:
        injection = inject(getattr(pipe, component), DoRAConfig(rank=2, target_modules=presets), generator=generator)
        with torch.no_grad():
            for up in injection.ups():
                up.copy_(0.1 * torch.randn(up.shape, generator=generator))
        states.append(injection.state().under(component))
        injection.eject()
    return join(states, {})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cast(folder: Path, target: Path, dtype: torch.dtype) -> Path:
    """The same base in another dtype."""
    shutil.copytree(folder, target)
    for path in target.rglob("*.safetensors"):
        save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return target


def refusal(base: Any, adapters: Mapping[str, AdapterState], weights: Any, output: Path, **options: Any) -> str:
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(ValueError) as caught:
        bake(base, adapters, weights, output, **options)
    assert "\n" not in str(caught.value)
    assert sorted(output.parent.rglob("*")) == before
    return str(caught.value)


def pictures(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 4, "height": 64, "width": 64, "output_type": "np"}
    drawn = pipe(PROMPT, generator=torch.Generator().manual_seed(3), **arguments).images
    return np.round(255 * drawn)


def test_a_baked_folder_holds_the_fused_weights_and_leaves_all_else(
    folder: Path, adapters: dict[str, AdapterState], tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    report = bake(folder, adapters, WEIGHTS, tmp_path / "baked", on_progress=lambda *bytes: seen.append(bytes))
    assert report.layers == len(adapters["ink"].modules)
    assert (report.left_out, report.extra) == ((), ())
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]

    pipe = random_pocket_pipeline()
    manager = AdapterManager(pipe)
    for name, adapter in adapters.items():
        manager.load_adapter(adapter, name=name)
    manager.set_adapters(WEIGHTS)
    manager.fuse()
    for component in ("unet", "text_encoder"):
        baked = getattr(load_pipeline(tmp_path / "baked"), component).state_dict()
        assert_close(baked, getattr(pipe, component).state_dict())

    base = base_weights(folder)
    untouched = [path for path in base.paths() if path not in adapters["ink"].modules]
    assert untouched
    new = base_weights(tmp_path / "baked")
    assert_identical({path: new(path) for path in untouched}, {path: base(path) for path in untouched})
    rewritten = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    before, after = files(folder), files(tmp_path / "baked")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == rewritten


def test_a_baked_base_draws_what_the_live_mix_draws(tmp_path: Path) -> None:
    pipe = load_pipeline("pocket")
    adapters = {"ink": random_adapter(pipe, 1), "tin": random_adapter(pipe, 2, use_dora=False)}
    bake("pocket", adapters, WEIGHTS, tmp_path / "baked")
    cast(EMBEDDED["pocket"], tmp_path / "fp32", torch.float32)
    bake(tmp_path / "fp32", adapters, WEIGHTS, tmp_path / "exact")
    manager = AdapterManager(pipe)
    plain = pictures(pipe)
    for name, adapter in adapters.items():
        manager.load_adapter(adapter, name=name)
    manager.set_adapters(WEIGHTS)
    live = pictures(pipe)
    assert np.abs(live - plain).max() > 20
    assert np.abs(pictures(load_pipeline(tmp_path / "exact")) - live).max() <= 1
    assert np.abs(pictures(load_pipeline(tmp_path / "baked")) - live).mean() <= 1  # the shipped base is fp16


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_bakes_what_it_draws(
    folder: Path, adapters: dict[str, AdapterState], tmp_path: Path, mode: str
) -> None:
    bake(folder, adapters, WEIGHTS, tmp_path / "baked", mode=mode)
    pipe = random_pocket_pipeline()
    manager = AdapterManager(pipe)
    for name, adapter in adapters.items():
        manager.load_adapter(adapter, name=name)
    manager.set_adapters(WEIGHTS, blend=mode)
    if mode == "additive":
        manager.fuse()
    baked = base_weights(tmp_path / "baked")
    for path in adapters["ink"].modules:
        component, inner = path.split(".", 1)
        assert_close(baked(path), getattr(pipe, component).get_submodule(inner).weight.detach())
    assert verify(tmp_path / "baked", folder, adapters, WEIGHTS, mode=mode).error == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_base_keeps_its_dtype_and_loses_nothing_but_rounding(
    folder: Path, adapters: dict[str, AdapterState], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = cast(folder, tmp_path / "base", dtype)
    bake(base, adapters, WEIGHTS, tmp_path / "baked")
    for component in ("unet", "text_encoder"):
        tensors = load_file(next((tmp_path / "baked" / component).glob("*.safetensors")))
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    check = verify(tmp_path / "baked", base, adapters, WEIGHTS)
    assert 0 <= check.error <= check.rounding == torch.finfo(dtype).eps / 2
    assert check.checked == len(adapters["ink"].modules)
    assert check.changed == ()
    load_pipeline(tmp_path / "baked", dtype=torch.float32)


def test_verify_sees_a_wrong_weight_and_a_changed_one(
    folder: Path, adapters: dict[str, AdapterState], tmp_path: Path
) -> None:
    bake(folder, adapters, WEIGHTS, tmp_path / "baked")
    path = tmp_path / "baked" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    layer = next(layer for layer in adapters["ink"].modules if layer.startswith("unet."))
    tensors[f"{layer.removeprefix('unet.')}.weight"] *= 1.01
    tensors["conv_in.bias"] += 1
    save_file(tensors, path)
    check = verify(tmp_path / "baked", folder, adapters, WEIGHTS)
    assert check.layer == layer and check.error == pytest.approx(0.01, rel=1e-3)
    assert check.changed == ("conv_in.bias",)


@pytest.mark.parametrize(
    ("name", "layout", "parts"),
    [
        ("sd1", original_layouts.stable_diffusion, ("unet", "text_encoder")),
        ("sd3", original_layouts.stable_diffusion_3, ("transformer", "text_encoder_2", "text_encoder_3")),
        ("sd3.5-medium", original_layouts.stable_diffusion_3, ("transformer", "text_encoder")),
    ],
)
@pytest.mark.parametrize("presets", ["all-linear", "all"])
def test_a_single_file_is_baked_in_its_makers_names(
    name: str, layout: Any, parts: tuple[str, ...], presets: str, tmp_path: Path
) -> None:
    pipe = PIPELINES[name].build()
    if name.startswith("sd3"):
        pipe.text_encoder.text_projection.weight.copy_(torch.eye(16))  # as in the original, whose files have none
    pipe.save_pretrained(tmp_path / "folder")
    base = original_layouts.save(layout(pipe), tmp_path / "base.safetensors")
    adapters = {"ink": for_parts(pipe, *parts, presets=presets)}
    bake(base, adapters, {"ink": 0.9}, tmp_path / "baked.safetensors")
    bake(tmp_path / "folder", adapters, {"ink": 0.9}, tmp_path / "baked")
    check = verify(tmp_path / "baked.safetensors", base, adapters, {"ink": 0.9})
    assert (check.error, check.changed, check.checked) == (0, (), len(adapters["ink"].modules))
    loaded = load_pipeline(tmp_path / "baked.safetensors", config=tmp_path / "folder")
    expected = load_pipeline(tmp_path / "baked")
    for part in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        if getattr(expected, part, None) is not None:
            assert_identical(getattr(loaded, part).state_dict(), getattr(expected, part).state_dict())
    new, old = load_file(tmp_path / "baked.safetensors"), load_file(base)
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert list(new) == list(old)
    assert changed and not any(key.startswith("first_stage_model.") or key.endswith(".bias") for key in changed)


def test_vectors_are_added_to_biases_and_normalisations(folder: Path, tmp_path: Path) -> None:
    paths = {"unet.conv_norm_out.weight": (64,), "unet.down_blocks.0.resnets.0.conv1.bias": (64,)}
    base = base_weights(folder)
    vectors = {path: torch.randn(base.parameter(path).shape) for path in paths}
    adapters = {"norms": AdapterState({}, vectors=vectors, extra={"bundle_emb.cat": torch.zeros(2)})}
    report = bake(folder, adapters, {"norms": 0.5}, tmp_path / "baked")
    assert (report.layers, report.vectors, report.extra) == (0, 2, ("norms: bundle_emb.cat",))
    baked = base_weights(tmp_path / "baked")
    for path, vector in vectors.items():
        assert_close(baked.parameter(path), base.parameter(path) + 0.5 * vector)
    assert verify(tmp_path / "baked", folder, adapters, {"norms": 0.5}).changed == ()


def test_an_embedding_and_a_whole_difference_are_baked(folder: Path, tmp_path: Path) -> None:
    base = base_weights(folder)
    table, conv = "text_encoder.embeddings.token_embedding", "unet.conv_in"
    out, count = base(table).shape
    modules = {
        table: ModuleState(torch.randn(2, count), torch.randn(out, 2), 2.0, magnitude=torch.rand(out) + 0.5),
        conv: FactoredState("full", {"diff": torch.randn(base(conv).shape)}),
    }
    pipe = random_pocket_pipeline()
    manager = AdapterManager(pipe)
    manager.load_adapter(AdapterState(modules), name="a")
    manager.set_adapters({"a": 0.7})
    manager.fuse()
    bake(folder, {"a": AdapterState(modules)}, {"a": 0.7}, tmp_path / "baked")
    baked = base_weights(tmp_path / "baked")
    assert_close(baked(table), pipe.text_encoder.get_submodule("embeddings.token_embedding").weight.T)
    assert_close(baked(conv), pipe.unet.conv_in.weight.detach())


def test_a_sharded_folder_keeps_its_shards_and_loses_other_forms(
    folder: Path, adapters: dict[str, AdapterState], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    unet = base / "unet"
    load_pipeline(base).unet.save_pretrained(unet, max_shard_size="8MB")
    (unet / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    (unet / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"the same once more")
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"and a pickle")
    (base / "everything.safetensors").write_bytes(b"and a single file")
    (base / ".cache").mkdir()
    (base / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"of a part that no adapter touches")
    assert len(list(unet.glob("*-of-*.safetensors"))) > 1
    report = bake(base, adapters, WEIGHTS, tmp_path / "baked")
    assert sorted(report.left_out) == [
        ".cache",
        "everything.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert files(base).keys() - files(tmp_path / "baked").keys() == set(report.left_out) - {".cache"}
    bake(folder, adapters, WEIGHTS, tmp_path / "whole")
    assert_identical(
        load_pipeline(tmp_path / "baked").unet.state_dict(), load_pipeline(tmp_path / "whole").unet.state_dict()
    )
    assert verify(tmp_path / "baked", base, adapters, WEIGHTS).changed == ()


def test_metadata_says_what_was_baked_and_drops_old_hashes(
    adapters: dict[str, AdapterState], folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base.safetensors"
    metadata = {"modelspec.title": "My model", "modelspec.hash_sha256": "0x1234", "format": "pt"}
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(tensors, base, metadata=metadata)
    own = replace(adapters["ink"], modules={p: m for p, m in adapters["ink"].modules.items() if p.startswith("unet")})
    bake(base, {"ink": own}, {"ink": {"unet": 1}}, tmp_path / "baked.safetensors")
    with safe_open(tmp_path / "baked.safetensors", "pt") as file:
        found = file.metadata()
    note = json.loads(found.pop(NOTE))
    assert found == {
        "modelspec.title": "My model",
        "format": "pt",
        "modelspec.merged_from": "base.safetensors, ink",
    }
    assert (
        note["base"] == "base.safetensors" and note["adapters"] == {"ink": {"unet": 1}} and note["mode"] == "additive"
    )


def test_what_cannot_be_baked_is_refused_in_one_line(
    folder: Path, adapters: dict[str, AdapterState], tmp_path: Path
) -> None:
    out = tmp_path / "baked"
    assert "mode 'sum' is unknown" in refusal(folder, adapters, WEIGHTS, out, mode="sum")
    assert "no adapter named 'oil'" in refusal(folder, adapters, {"oil": 1.0}, out)
    assert "must be a finite number" in refusal(folder, adapters, {"ink": float("nan")}, out)
    assert "nothing to bake" in refusal(folder, adapters, {}, out)
    assert "so expected the name of a folder" in refusal(folder, adapters, WEIGHTS, tmp_path / "a.safetensors")
    assert "lie one in the other" in refusal(folder, adapters, WEIGHTS, folder / "baked")
    assert "lie one in the other" in refusal(folder, adapters, WEIGHTS, folder)
    module = next(iter(adapters["ink"].modules.values()))
    foreign = {"a": AdapterState({"unet.conv_in": module, "unet.nowhere": module, "transformer.x": module})}
    assert "2 of the adapters' 3 layers are missing" in refusal(folder, foreign, {"a": 1.0}, out)
    misfit = {"a": AdapterState({"unet.conv_in": module})}
    assert "a: unet.conv_in.weight is for a weight of" in refusal(folder, misfit, {"a": 1.0}, out)
    longer = {"a": AdapterState({}, vectors={"unet.conv_in.bias": torch.zeros(3)})}
    assert "has shape (3,), expected (64,)" in refusal(folder, longer, {"a": 1.0}, out)


def test_a_weight_that_overflows_its_dtype_stops_the_bake(folder: Path, tmp_path: Path) -> None:
    base = cast(folder, tmp_path / "base", torch.float16)
    adapters = {"a": AdapterState({}, vectors={"unet.conv_in.bias": torch.full((64,), 1e5)})}
    assert "does not fit torch.float16" in refusal(base, adapters, {"a": 1.0}, tmp_path / "baked")


def test_a_quantised_base_is_refused_where_an_adapter_touches_it(
    folder: Path, adapters: dict[str, AdapterState], tmp_path: Path
) -> None:
    base = cast(folder, tmp_path / "base", torch.float8_e4m3fn)
    assert "stored as F8_E4M3" in refusal(base, adapters, WEIGHTS, tmp_path / "baked")
    own = {"a": AdapterState({}, vectors={"unet.conv_in.bias": torch.zeros(64)})}
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "conv_in.bias": torch.ones(64)}, path)
    bake(base, own, {"a": 1.0}, tmp_path / "baked")
    assert_identical(load_file(tmp_path / "baked" / "unet" / path.name)["conv_in.weight"], tensors["conv_in.weight"])


def test_only_our_own_output_is_written_over(folder: Path, adapters: dict[str, AdapterState], tmp_path: Path) -> None:
    out = tmp_path / "baked"
    out.mkdir()
    assert "was not baked here" in refusal(folder, adapters, WEIGHTS, out)
    (out / "notes.txt").write_text("mine")
    assert "was not baked here" in refusal(folder, adapters, WEIGHTS, out)
    assert (out / "notes.txt").read_text() == "mine"
    shutil.rmtree(out)
    bake(folder, adapters, {"ink": 0.5}, out)
    first = files(out)
    bake(folder, adapters, WEIGHTS, out)
    assert files(out) != first and files(out).keys() == first.keys()
    assert list(tmp_path.iterdir()) == [out]
    single = original_layouts.save(load_file(next((folder / "unet").glob("*.safetensors"))), tmp_path / "a.safetensors")
    shutil.copy(single, tmp_path / "b.safetensors")
    assert "was not baked here" in refusal(single, adapters, {"ink": {"unet": 1.0}}, tmp_path / "b.safetensors")


def test_an_error_in_the_middle_leaves_nothing(folder: Path, adapters: dict[str, AdapterState], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bake(folder, adapters, WEIGHTS, tmp_path / "baked", on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_in_the_middle_leaves_no_output_and_the_next_bake_cleans_up(
    folder: Path, adapters: dict[str, AdapterState], tmp_path: Path
) -> None:
    save_adapter(adapters["ink"], tmp_path / "ink.safetensors")
    program = (
        "import sys, time\n"
        "from dora_diffusion.blending.bake import bake\n"
        "from dora_diffusion.formats import load_adapter\n"
        "def wait(done, total):\n"
        "    if done > total // 2: print('half', flush=True); time.sleep(100)\n"
        "bake(sys.argv[1], {'ink': load_adapter(sys.argv[2])}, {'ink': 1.0}, sys.argv[3], on_progress=wait)\n"
    )
    out = tmp_path / "room" / "baked"
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "ink.safetensors"), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not out.exists() and list(out.parent.iterdir())
    bake(folder, adapters, WEIGHTS, out)
    assert list(out.parent.iterdir()) == [out]
