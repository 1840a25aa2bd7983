"""Bases as people have them on disk: one variant or several, shards, a component in a file of its own, extra keys."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from dora_diffusion.pipelines.component_files import load_component
from dora_diffusion.pipelines.hub import may_be_hub_id
from dora_diffusion.pipelines.loading import load_pipeline
from dora_diffusion.pipelines.variants import variant_of
from dora_diffusion.training.base.trainable import load_base
from dora_diffusion.training.config import BaseConfig
from tests import original_layouts
from tests.denoisers import DENOISERS, prediction
from tests.families.pipelines import PIPELINES
from tests.pipelines.adapters import trained
from tests.pipelines.kinds import draws
from tests.tolerances import assert_identical, assert_near

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture
def pipe():
    return PIPELINES["sd1"].build()


def saved(pipe: Any, folder: Path, *variants: str | None, **options: Any) -> Path:
    """A folder with the weights in several variants, each rounded to its own dtype."""
    for variant in variants:
        other = PIPELINES["sd1"].build()
        other.to(HALVES.get(variant, torch.float32))
        other.save_pretrained(folder, variant=variant, **options)
    return folder


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("there", "dtype", "expected"),
    [
        (("fp16",), torch.float32, "fp16"),
        (("fp16",), torch.bfloat16, "fp16"),
        (("fp16", "bf16", "fp32"), torch.bfloat16, "bf16"),
        (("fp16", "bf16", "fp32"), torch.float32, "fp32"),
        ((None, "fp16"), torch.float16, "fp16"),
        ((None, "fp16"), torch.float32, None),
        ((None, "ema"), torch.float32, None),
        (("ema",), torch.float32, "ema"),
    ],
)
def test_the_variant_that_fits_the_dtype_is_loaded(pipe, tmp_path, there, dtype, expected) -> None:
    folder = saved(pipe, tmp_path, *there)
    assert variant_of(folder, dtype) == expected
    loaded = load_pipeline(folder, dtype=dtype)
    rounded = {name: t.to(HALVES.get(expected, torch.float32)).to(dtype) for name, t in weights(pipe.unet).items()}
    assert_identical(weights(loaded.unet), rounded)


def test_a_variant_that_only_some_components_have(pipe, tmp_path) -> None:
    folder = saved(pipe, tmp_path, None)
    pipe.unet.half().save_pretrained(folder / "unet", variant="fp16")
    assert variant_of(folder, torch.float16) == "fp16"
    load_pipeline(folder, dtype=torch.float16)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert variant_of(folder, torch.float32) == "fp16"
    load_pipeline(folder)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(pipe, tmp_path, variant) -> None:
    folder = saved(pipe, tmp_path, variant, max_shard_size="60KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    expected = {name: t.to(HALVES.get(variant, torch.float32)).float() for name, t in weights(pipe.unet).items()}
    assert_identical(weights(load_pipeline(folder).unet), expected)


def test_a_component_in_a_file_of_its_own(pipe, tmp_path) -> None:
    folder = saved(pipe, tmp_path / "base", None)
    other = PIPELINES["sd1"].build(seed=1)
    save_file(other.unet.state_dict(), tmp_path / "unet.safetensors")
    save_file(other.vae.state_dict(), tmp_path / "vae.safetensors")
    loaded = load_pipeline(folder, unet=tmp_path / "unet.safetensors", vae=str(tmp_path / "vae.safetensors"))
    assert_identical(weights(loaded.unet), weights(other.unet))
    assert_identical(weights(loaded.vae), weights(other.vae))
    assert_identical(weights(loaded.text_encoder), weights(pipe.text_encoder))
    assert not loaded.unet.training


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_component_in_its_makers_names_with_other_keys_beside(pipe, tmp_path, prefix) -> None:
    folder = saved(pipe, tmp_path / "base", None)
    other = PIPELINES["sd1"].build(seed=1)
    whole = original_layouts.stable_diffusion(other)
    own = {
        key.removeprefix("model.diffusion_model."): t for key, t in whole.items() if key.startswith("model.diffusion")
    }
    extra = {"model_ema.decay": torch.ones(1), "step": torch.ones(1)}
    save_file({prefix + key: t.contiguous() for key, t in own.items()} | extra, tmp_path / "unet.safetensors")
    assert_identical(weights(load_pipeline(folder, unet=tmp_path / "unet.safetensors").unet), weights(other.unet))


def scaled_fp8(state: dict[str, Tensor], *, per_row: bool) -> dict[str, Tensor]:
    """As ComfyUI's scaled fp8 files: matrices divided by a scale that is beside them."""
    found: dict[str, Tensor] = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for key, tensor in state.items():
        if tensor.dim() == 2 and key.endswith(".weight"):
            largest = tensor.abs().amax(1) if per_row else tensor.abs().max()
            scale = largest.float().clamp(min=1e-6) / 448
            found[key.replace(".weight", ".scale_weight")] = scale
            tensor = (tensor / (scale[:, None] if per_row else scale)).to(torch.float8_e4m3fn)
        found[key] = tensor
    return found


@pytest.mark.parametrize("per_row", [False, True])
def test_fp8_with_scales(pipe, tmp_path, per_row) -> None:
    folder = saved(pipe, tmp_path / "base", None)
    other = PIPELINES["sd1"].build(seed=1)
    save_file(scaled_fp8(other.unet.state_dict(), per_row=per_row), tmp_path / "unet.safetensors")
    loaded = load_pipeline(folder, unet=tmp_path / "unet.safetensors")
    assert {p.dtype for p in loaded.unet.parameters()} == {torch.float32}
    for name, tensor in weights(other.unet).items():
        error = (weights(loaded.unet)[name] - tensor).abs()
        assert float((error - 2**-4 * tensor.abs()).max()) <= 1e-3 * float(tensor.abs().max())  # 3 bits, less near zero
    manager = AdapterManager(loaded)
    manager.load_adapter(trained(pipe), name="a")
    manager.set_adapters({"a": 1.0})
    manager.fuse()


def test_what_does_not_fit_is_one_line(pipe, tmp_path) -> None:
    folder = saved(pipe, tmp_path / "base", None)
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    torch.save({}, tmp_path / "pickle.ckpt")
    for asked, line in (
        ({"unet": tmp_path / "none.safetensors"}, "no such file; expected the weights of a UNet2DConditionModel"),
        ({"unet": tmp_path / "pickle.ckpt"}, "expected a .safetensors or .gguf file"),
        ({"unet": tmp_path / "other.safetensors"}, "not the weights of this UNet2DConditionModel"),
        ({"transformer": tmp_path / "other.safetensors"}, "has no transformer.*it has unet, vae|it has vae, unet"),
    ):
        with pytest.raises(ValueError, match=line) as refused:
            load_pipeline(folder, **asked)
        assert "\n" not in str(refused.value)


def test_the_hub_is_asked_for_one_variant_and_a_revision(pipe, tmp_path, monkeypatch) -> None:
    hub, asked = saved(pipe, tmp_path / "hub", "fp16"), []

    def download(name: str, *, variant: str | None, revision: str | None, **options: Any) -> str:
        asked.append((name, variant, revision))
        if variant not in ("fp16", None):
            raise ValueError(f"You are trying to load the model files of the `variant={variant}`")
        if variant is None:  # what diffusers does where there are no such files: the rest
            shutil.copytree(
                hub, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True
            )
            return str(tmp_path / "configs")
        return str(hub)

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    load_pipeline("owner/name@v1.2", dtype=torch.float16)
    assert asked == [("owner/name", "fp16", "v1.2")]
    asked.clear()
    load_pipeline("owner/name")
    assert asked == [("owner/name", variant, None) for variant in (None, "fp32", "bf16", "fp16")]
    assert not may_be_hub_id("owner/name@")


def test_a_checkpoint_with_averages_beside_its_weights(pipe, tmp_path) -> None:
    folder = saved(pipe, tmp_path / "base", None)
    whole = {key: t.contiguous() for key, t in original_layouts.stable_diffusion(pipe).items()}
    names = [key for key in whole if key.startswith("model.diffusion_model.")]
    averages = {"model_ema." + key.replace(".", ""): whole[key] + 1 for key in names}
    save_file(whole | averages | {"global_step": torch.ones(1)}, tmp_path / "whole.safetensors")
    assert load_file(tmp_path / "whole.safetensors").keys() > whole.keys()
    loaded = load_pipeline(tmp_path / "whole.safetensors", config=folder)
    assert_identical(weights(loaded.unet), weights(pipe.unet))


def gguf_of(tensors: dict[str, Tensor], path: Path) -> Path:
    """A GGUF file of a model's tensors: matrices as Q8_0 where their rows divide into blocks, the rest as fp32."""
    import gguf

    kind, writer = gguf.GGMLQuantizationType.Q8_0, gguf.GGUFWriter(path, "sd3")
    for name, tensor in tensors.items():
        values = tensor.float().contiguous().numpy()
        if tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf: make test-quantised")
def test_a_gguf_stays_quantised_and_takes_adapters(tmp_path) -> None:
    base = PIPELINES["sd3"].build()
    wide = {"attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32}  # a block is 32 numbers
    base.register_modules(transformer=type(base.transformer).from_config({**base.transformer.config, **wide}).eval())
    base.save_pretrained(tmp_path / "base")
    whole = original_layouts.stable_diffusion_3(base)
    prefix = "model.diffusion_model."
    own = {key.removeprefix(prefix): t for key, t in whole.items() if key.startswith(prefix)}
    loaded = load_pipeline(tmp_path / "base", transformer=gguf_of(own, tmp_path / "model.gguf"))
    kinds = {type(module).__name__ for module in loaded.transformer.modules()}
    assert "GGUFLinear" in kinds
    adapter = trained(base)
    manager = AdapterManager(loaded)
    before = draws(loaded, prompt="a cat", height=32, width=32)()
    manager.load_adapter(adapter, name="a")
    manager.set_adapters({"a": 0.0})
    assert_identical(draws(loaded, prompt="a cat", height=32, width=32)(), before)
    manager.set_adapters({"a": 1.0})
    assert not torch.allclose(draws(loaded, prompt="a cat", height=32, width=32)(), before, atol=1e-2)
    with pytest.raises(ValueError, match="a quantised GGUFLinear cannot be folded"):
        manager.fuse()


def test_training_starts_from_such_a_file(pipe, tmp_path) -> None:
    folder = saved(pipe, tmp_path / "base", None)
    other = PIPELINES["sd1"].build(seed=1)
    save_file(other.unet.state_dict(), tmp_path / "unet.safetensors")
    files = BaseConfig(unet=tmp_path / "unet.safetensors")
    loaded = load_base(str(folder), torch.float32, files)
    assert_identical(weights(loaded.unet), weights(other.unet))
    assert not any(parameter.requires_grad for parameter in loaded.unet.parameters())


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao: make test-quantised")
@pytest.mark.filterwarnings("ignore")  # the library warns of kernels that a CPU lacks
def test_a_folder_that_was_quantised_beforehand(tmp_path) -> None:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    base = PIPELINES["sd3"].build()
    base.save_pretrained(tmp_path / "base")
    adapter, kind = trained(base), type(base.transformer)
    how = TorchAoConfig(Int8WeightOnlyConfig())
    base.register_modules(
        transformer=kind.from_pretrained(
            tmp_path / "base" / "transformer", quantization_config=how, dtype=torch.bfloat16
        )
    )
    base.save_pretrained(tmp_path / "quantised")
    loaded = load_pipeline(tmp_path / "quantised", dtype=torch.bfloat16)
    draw = draws(loaded, prompt="a cat", height=32, width=32)
    before = draw()
    manager = AdapterManager(loaded)
    manager.load_adapter(adapter, name="a")
    assert_identical(draw(), before)
    manager.set_adapters({"a": 1.0})
    assert not torch.allclose(draw(), before, atol=1e-2)
    with pytest.raises(ValueError, match="a quantised Linear cannot be folded"):
        manager.fuse()
    manager.unload()
    injection = inject(loaded.transformer, DoRAConfig(rank=2))
    assert_identical(draw(), before)
    injection.eject()


@pytest.mark.parametrize("name", [name for name in DENOISERS if "UNet" not in name and hasattr(diffusers, name)])
@pytest.mark.filterwarnings("ignore")  # diffusers' own models warn of old names
def test_every_denoiser_comes_from_a_file_as_it_was(name: str, tmp_path: Path) -> None:
    model = DENOISERS[name].make()
    model.save_config(tmp_path)
    save_file({key: t.contiguous() for key, t in model.state_dict().items()}, tmp_path / "own.safetensors")
    loaded = load_component(type(model), tmp_path / "own.safetensors", tmp_path, torch.float32)
    with torch.no_grad():
        found, expected = (prediction(each(**DENOISERS[name].inputs())) for each in (loaded, model))
    assert_identical(weights(loaded), weights(model))
    assert_near(found, expected, 1e-5)  # the same numbers at other addresses: some kernels sum in another order


def test_scales_that_are_not_known_and_other_shapes_are_one_line(pipe, tmp_path) -> None:
    folder = saved(pipe, tmp_path / "base", None)
    state = scaled_fp8(pipe.unet.state_dict(), per_row=True)
    inverse = {key.replace(".scale_weight", ".weight_scale_inv"): t for key, t in state.items()}
    save_file(inverse, tmp_path / "inverse.safetensors")
    named = weights(load_pipeline(folder, unet=tmp_path / "inverse.safetensors").unet)
    save_file(state, tmp_path / "plain.safetensors")
    assert_identical(named, weights(load_pipeline(folder, unet=tmp_path / "plain.safetensors").unet))
    blocks = {key: t[:, None].repeat(1, 2) if key.endswith("scale_weight") else t for key, t in state.items()}
    save_file(blocks, tmp_path / "blocks.safetensors")
    save_file({k: torch.cat([t, t]) for k, t in pipe.unet.state_dict().items()}, tmp_path / "wide.safetensors")
    for file, line in (
        ("blocks", "are not read here; expected one, or one a row"),
        ("wide", "the weights of another UNet"),
    ):
        with pytest.raises(ValueError, match=line) as refused:
            load_pipeline(folder, unet=tmp_path / f"{file}.safetensors")
        assert "\n" not in str(refused.value)
