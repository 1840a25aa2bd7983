"""A base's weights are the same numbers from a pipeline, a folder and a single file, under an adapter's paths."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.formats.layouts import LAYOUTS
from dora_diffusion.layers.base_layers import dense_weight
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from dora_diffusion.pipelines.base_weights import base_weights, weights_of
from dora_diffusion.pipelines.loading import EMBEDDED, load_pipeline
from tests import original_layouts
from tests.families.pipelines import PIPELINES
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_identical

# T5 keeps one table under two names, Mistral's head is its table: no file has a copy.
TIED = (".encoder.embed_tokens", "lm_head")


def refusal(base: Any, path: str = "unet.conv_in") -> str:
    with pytest.raises(ValueError) as caught:
        weights_of(base)(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_base(found: Any, pipe: Any, *, without: tuple[str, ...] = TIED) -> None:
    """Every layer of the pipeline, and its list of layers."""
    found, expected = base_weights(found), base_weights(pipe)
    paths = [path for path in expected.paths() if not path.endswith(without)]
    assert sorted(path for path in found.paths() if not path.endswith(without)) == sorted(paths)
    for path in paths:
        assert_identical(found(path), expected(path))


def shards(folder: Path, names: str, count: int = 2) -> None:
    """Cut a component's file in pieces with an index, as transformers and diffusers do."""
    tensors = load_file(folder / f"{names}.safetensors")
    (folder / f"{names}.safetensors").unlink()
    files = [f"{names}-{index + 1:05}-of-{count:05}.safetensors" for index in range(count)]
    for index, file in enumerate(files):
        save_file(
            {key: tensors[key] for key in sorted(tensors)[index::count]}, folder / file, metadata={"format": "pt"}
        )
    weight_map = {key: files[index % count] for index, key in enumerate(sorted(tensors))}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{names}.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.filterwarnings("ignore:Pipelines loaded")
def test_an_embedded_base_is_its_pipeline(name: str) -> None:
    assert_same_base(name, load_pipeline(name, dtype=torch.float16))
    assert_same_base(EMBEDDED[name], load_pipeline(name, dtype=torch.float16))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_folder_of_every_family_is_its_pipeline(name: str, tmp_path: Path) -> None:
    pipe = PIPELINES[name].build()
    pipe.save_pretrained(tmp_path)
    assert_same_base(tmp_path, pipe)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("sd1", original_layouts.stable_diffusion),
        ("sd2", original_layouts.stable_diffusion),
        ("sd3", original_layouts.stable_diffusion_3),
        ("sd3.5-medium", original_layouts.stable_diffusion_3),
    ],
)
def test_a_single_file_in_its_makers_names_is_its_pipeline(name: str, layout: Any, tmp_path: Path) -> None:
    pipe = PIPELINES[name].build()
    path = original_layouts.save(layout(pipe), tmp_path / "base.safetensors")
    assert_same_base(path, pipe, without=("text_encoder.text_projection",) if name.startswith("sd3") else ())
    base = base_weights(path)
    for component in ("unet", "transformer", "text_encoder"):
        for key, parameter in getattr(getattr(pipe, component, None), "named_parameters", dict)() or ():
            if key.endswith((".weight", ".bias")) and not key.startswith("text_projection"):
                assert_identical(base.parameter(f"{component}.{key}"), parameter)


def in_original_names(model: nn.Module, layout_name: str) -> dict[str, Tensor]:
    """A transformer's tensors fused into its makers', by our own layout."""
    layout = next(layout for layout in LAYOUTS if layout.name == layout_name)
    left, found = dict(model.state_dict()), {}
    for key in list(left):
        layer, _, parameter = key.rpartition(".")
        fusion = layout.of_path(layer)
        if fusion is None or key not in left:
            continue
        whole = torch.cat([left.pop(f"{path}.{parameter}") for path in fusion.paths])
        if fusion.swaps(*(whole.shape if whole.dim() == 2 else (0, 1))):
            whole = torch.cat(whole.chunk(2)[::-1])
        ending = "scale" if "_norm" in fusion.original.rpartition(".")[2] else parameter
        found[f"{fusion.original}.{ending}"] = whole
    return found


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell"])
def test_a_flux_file_gives_the_parts_of_its_fused_layers(name: str, prefix: str, tmp_path: Path) -> None:
    pipe = PIPELINES[name].build()
    tensors = {prefix + key: tensor for key, tensor in in_original_names(pipe.transformer, "flux").items()}
    base = base_weights(original_layouts.save(tensors, tmp_path / "flux.safetensors"))
    expected = base_weights(pipe)
    own = [path for path in expected.paths() if path.startswith("transformer.")]
    assert sorted(base.paths()) == sorted(own)
    for path in own:
        assert_identical(base(path), expected(path))
    name = "transformer.transformer_blocks.0.attn.norm_added_q.weight"
    assert_identical(base.parameter(name), expected.parameter(name))


def open_clip(model: nn.Module) -> Mapping[str, Tensor]:
    """A CLIP encoder as OpenCLIP lays it out: q, k and v in one parameter, the projection transposed."""
    left = {key.removeprefix("text_model."): tensor for key, tensor in model.state_dict().items()}
    found = {"token_embedding.weight": left.pop("embeddings.token_embedding.weight")}
    found["positional_embedding"] = left.pop("embeddings.position_embedding.weight")
    found["text_projection"] = left.pop("text_projection.weight").T
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for key in list(left):
        layer, _, parameter = key.rpartition(".")
        if key not in left:
            continue
        if layer == "final_layer_norm":
            found[f"ln_final.{parameter}"] = left.pop(key)
            continue
        _, _, number, inner = layer.split(".", 3)
        block = f"transformer.resblocks.{number}"
        if inner in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            parts = [left.pop(f"encoder.layers.{number}.self_attn.{part}_proj.{parameter}") for part in "qkv"]
            found[f"{block}.attn.in_proj_{parameter}"] = torch.cat(parts)
        else:
            found[f"{block}.{names.get(inner, 'attn.out_proj')}.{parameter}"] = left.pop(key)
    return found


def test_an_xl_file_gives_both_its_text_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(original_layouts.UNET_ENDS, "add_embedding.linear_1", "label_emb.0.0")
    monkeypatch.setitem(original_layouts.UNET_ENDS, "add_embedding.linear_2", "label_emb.0.2")
    pipe = PIPELINES["sdxl"].build()
    first = {f"text_model.{key.removeprefix('text_model.')}": t for key, t in pipe.text_encoder.state_dict().items()}
    tensors = {
        **{f"model.diffusion_model.{key}": t for key, t in original_layouts.unet(pipe.unet).items()},
        **{f"conditioner.embedders.0.transformer.{key}": t for key, t in first.items()},
        **{f"conditioner.embedders.1.model.{key}": t for key, t in open_clip(pipe.text_encoder_2).items()},
    }
    base = base_weights(original_layouts.save(tensors, tmp_path / "xl.safetensors"))
    expected = base_weights(pipe)
    assert sorted(base.paths()) == sorted(expected.paths())
    for path in expected.paths():
        assert_identical(base(path), expected(path))
    bias = "text_encoder_2.encoder.layers.1.self_attn.k_proj.bias"
    assert_identical(base.parameter(bias), expected.parameter(bias))


def test_a_file_of_the_denoiser_alone_in_diffusers_names(tmp_path: Path) -> None:
    for name, component in (("sd1", "unet"), ("sd3", "transformer")):
        pipe = PIPELINES[name].build()
        model = getattr(pipe, component)
        path = original_layouts.save(model.state_dict(), tmp_path / f"{name}.safetensors")
        expected = base_weights(pipe)
        own = [path for path in expected.paths() if path.startswith(component)]
        assert sorted(base_weights(path).paths()) == sorted(own)
        for layer in own:
            assert_identical(weights_of(path)(layer), expected(layer))


def test_shards_are_one_component_and_plain_files_come_before_variants(tmp_path: Path) -> None:
    pipe = random_pocket_pipeline()
    pipe.save_pretrained(tmp_path)
    shards(tmp_path / "unet", "diffusion_pytorch_model")
    plain = tmp_path / "text_encoder" / "model.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(plain).items()}, plain.with_suffix(".fp16.safetensors"))
    variant = {key: tensor.half() for key, tensor in load_file(plain).items()}
    save_file(variant, tmp_path / "text_encoder" / "model.fp16.safetensors")
    assert_same_base(tmp_path, pipe)
    plain.unlink()
    path = "text_encoder.encoder.layers.0.mlp.fc1"
    assert_identical(weights_of(tmp_path)(path), base_weights(pipe)(path).half())


def test_a_broken_index_is_refused_in_one_line(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED["pocket"], tmp_path / "base")
    folder = tmp_path / "base" / "unet"
    shards(folder, "diffusion_pytorch_model")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    whole = index.read_text()
    index.write_text(whole.replace("-00002-of", "-00003-of"))
    assert "which is not beside it" in refusal(tmp_path / "base")
    index.write_text(whole.replace("diffusion_pytorch_model-00001", "../unet/diffusion_pytorch_model-00001"))
    assert "which is not beside it" in refusal(tmp_path / "base")
    index.write_text("[]")
    assert "not readable as the index" in refusal(tmp_path / "base")


def test_adapters_beside_the_layers_do_not_show() -> None:
    pipe = random_pocket_pipeline()
    expected = {path: base_weights(pipe)(path).clone() for path in base_weights(pipe).paths()}
    adapter = random_adapter(pipe)
    manager = AdapterManager(pipe)
    manager.load_adapter(adapter, name="a")
    manager.set_adapters({"a": 1.0})
    base = base_weights(pipe)
    assert list(base.paths()) == list(expected)
    assert_identical({path: base(path) for path in expected}, expected)
    manager.unload()
    inject(pipe.unet, DoRAConfig(rank=2))
    assert list(base.paths()) == list(expected)
    assert_identical({path: base(path) for path in expected}, expected)


def test_a_compiled_denoiser_gives_its_own_weights() -> None:
    pipe = random_pocket_pipeline()
    weight = dense_weight(pipe.unet.conv_in)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert_identical(weights_of(pipe)("unet.conv_in"), weight)
    assert all("_orig_mod" not in path for path in base_weights(pipe).paths())


def test_fused_adapters_are_refused_until_they_are_out() -> None:
    pipe = random_pocket_pipeline()
    adapter = random_adapter(pipe)
    path = next(iter(adapter.modules))
    manager = AdapterManager(pipe)
    manager.load_adapter(adapter, name="a")
    manager.set_adapters({"a": 1.0})
    manager.fuse()
    assert "call unfuse() first" in refusal(pipe, path)
    manager.unfuse()
    weights_of(pipe)(path)
    manager.set_adapters({"a": 1.0}, blend="compose")
    assert "call unfuse() first" in refusal(pipe, path)


def test_a_function_is_returned_as_it_is() -> None:
    def weight(path: str) -> Tensor:
        return torch.zeros(1)

    assert weights_of(weight) is weight
    base = base_weights("pocket")
    assert weights_of(base) is base


def test_what_is_no_base_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "no such file or folder; expected 'pocket'" in refusal("porcket")
    assert "expected a folder in diffusers' layout" in refusal(tmp_path)
    assert "got int" in refusal(3)
    (tmp_path / "unet").mkdir()
    assert "no .safetensors weights there" in refusal(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert "no denoiser or text encoder known here" in refusal(tmp_path / "a.safetensors")
    (tmp_path / "a.ckpt").write_bytes(b"pickle")
    assert "expected a .safetensors file" in refusal(tmp_path / "a.ckpt")
    for base in ("pocket", random_pocket_pipeline()):
        assert "layer unet.nowhere is not there" in refusal(base, "unet.nowhere")
        assert "layer vae.decoder.conv_in is not there" in refusal(base, "vae.decoder.conv_in")
