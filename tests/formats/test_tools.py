"""Files as other tools write them, key by key, and what they come to. Row 11 of the test matrix.

The keys are spelt out from the tools' own code: OneTrainer `modules/util/convert_lora_util.py` and its models'
`lora_text_encoders`; kohya-ss/sd-scripts `networks/lora.py`, `lora_flux.py`, `lora_sd3.py`; LyCORIS `wrapper.py`;
ostris/ai-toolkit `toolkit/network_mixins.py`; diffusers before 0.20 `loaders.py`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from dora_diffusion.formats import detect_format, load_adapter, save_adapter
from dora_diffusion.state import AdapterState, FactoredState, ModuleState
from tests.tolerances import assert_identical

ATTN = "transformer_blocks.0.attn1.to_q"
SD_PATH = f"unet.mid_block.attentions.0.{ATTN}"
SDXL_PATH = f"unet.down_blocks.1.attentions.0.{ATTN}"
CLIP = "encoder.layers.0.self_attn.q_proj"
T5 = "encoder.block.0.layer.0.SelfAttention.q"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def kohya(layer: str, out: int = 6, inputs: int = 4, *, scale: bool = True) -> dict[str, Tensor]:
    """lora_down, lora_up, alpha and a (1, in) dora_scale, as OneTrainer and older LyCORIS write it."""
    tensors = {
        f"{layer}.lora_down.weight": numbers(2, inputs),
        f"{layer}.lora_up.weight": numbers(out, 2),
        f"{layer}.alpha": torch.tensor(1.0),
    }
    return {**tensors, **({f"{layer}.dora_scale": numbers(1, inputs).abs()} if scale else {})}


def mixed(layer: str, out: int = 6, inputs: int = 4) -> dict[str, Tensor]:
    """lora_A and lora_B with alpha and dora_scale: OneTrainer's `original` and `comfy`."""
    return {
        f"{layer}.lora_A.weight": numbers(2, inputs),
        f"{layer}.lora_B.weight": numbers(out, 2),
        f"{layer}.alpha": torch.tensor(1.0),
        f"{layer}.dora_scale": numbers(out, 1).abs(),
    }


def folded(layer: str, magnitude: str, out: int = 6, inputs: int = 4) -> dict[str, Tensor]:
    """lora_A and lora_B with alpha folded in, and a flat magnitude."""
    return {
        f"{layer}.lora_A.weight": numbers(2, inputs),
        f"{layer}.lora_B.weight": numbers(out, 2),
        f"{layer}.{magnitude}": numbers(out).abs(),
    }


def pair(layer: str, suffix: str) -> dict[str, Tensor]:
    return {f"{layer}{suffix}.down.weight": numbers(2, 4), f"{layer}{suffix}.up.weight": numbers(6, 2)}


WORD = {"bundle_emb.cat.clip_l": torch.ones(2, 8), "bundle_emb.cat.clip_g": torch.ones(2, 8)}

# tool -> (format, its tensors, layers that they come to)
FILES: Mapping[str, tuple[str, dict[str, Tensor], set[str]]] = {
    "OneTrainer diffusers": (
        "diffusers",
        {
            **folded(SDXL_PATH, "lora_magnitude_vector.weight"),
            **folded(f"text_encoder_2.text_model.{CLIP}", "lora_magnitude_vector.weight"),
            **WORD,
        },
        {SDXL_PATH, f"text_encoder_2.{CLIP}"},
    ),
    "OneTrainer kohya": (
        "kohya",
        {
            **kohya("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
            **kohya("lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
            **kohya("lora_te2_text_model_encoder_layers_0_self_attn_q_proj"),
            **WORD,
        },
        {SDXL_PATH, f"text_encoder.{CLIP}", f"text_encoder_2.{CLIP}"},
    ),
    "OneTrainer original": (
        "original",
        {
            **mixed("double_blocks.0.img_attn.proj"),
            **mixed("double_blocks.0.img_mod.lin"),  # FLUX.2 has the other two as well
            **mixed("single_blocks.1.linear2"),
        },
        {
            *("transformer.transformer_blocks.0.attn.to_out.0", "transformer.transformer_blocks.0.norm1.linear"),
            "transformer.single_transformer_blocks.1.proj_out",
        },
    ),
    "OneTrainer comfy": (
        "comfyui",
        {
            **mixed("diffusion_model.double_blocks.0.img_attn.qkv", out=12),
            **mixed(f"text_encoders.clip_l.transformer.text_model.{CLIP}"),
            **mixed(f"text_encoders.t5xxl.transformer.{T5}"),
        },
        {
            *(f"transformer.transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")),
            *(f"text_encoder.{CLIP}", f"text_encoder_2.{T5}"),
        },
    ),
    "OneTrainer legacy": (
        "onetrainer-legacy",
        {
            **kohya("lora_transformer_single_transformer_blocks_0_attn_to_q"),
            **kohya("lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
            **kohya("lora_te2_encoder_block_0_layer_0_SelfAttention_q"),
        },
        {"transformer.single_transformer_blocks.0.attn.to_q", f"text_encoder.{CLIP}", f"text_encoder_2.{T5}"},
    ),
    "OMI": (
        "omi",
        {
            **kohya("transformer.double_blocks.0.img_attn.qkv.0"),
            **kohya("transformer.double_blocks.0.img_attn.qkv.2"),
            **kohya("transformer.single_blocks.0.linear1.3"),
            **kohya(f"clip_l.text_model.{CLIP}"),
            **kohya(f"t5.{T5}"),
        },
        {
            *(f"transformer.transformer_blocks.0.attn.{name}" for name in ("to_q", "to_v")),
            *("transformer.single_transformer_blocks.0.proj_mlp", f"text_encoder.{CLIP}", f"text_encoder_2.{T5}"),
        },
    ),
    "ai-toolkit": (
        "ai-toolkit",
        folded("transformer.transformer_blocks.0.attn.to_q", "magnitude"),
        {"transformer.transformer_blocks.0.attn.to_q"},
    ),
    "kohya FLUX with T5": (
        "kohya",
        {
            **kohya("lora_unet_double_blocks_0_img_mlp_0", scale=False),
            **kohya("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", scale=False),
            **kohya("lora_te3_encoder_block_0_layer_0_SelfAttention_q", scale=False),
        },
        {"transformer.transformer_blocks.0.ff.net.0.proj", f"text_encoder.{CLIP}", f"text_encoder_2.{T5}"},
    ),
    "kohya SD3 with T5": (
        "kohya",
        {
            **kohya("lora_unet_joint_blocks_0_x_block_attn_proj", scale=False),
            **kohya("lora_te3_encoder_block_0_layer_0_SelfAttention_q", scale=False),
        },
        {"transformer.transformer_blocks.0.attn.to_out.0", f"text_encoder_3.{T5}"},
    ),
    "SimpleTuner LyCORIS": (
        "lycoris",
        kohya("lycoris_transformer_blocks_0_attn_to_q"),
        {"transformer.transformer_blocks.0.attn.to_q"},
    ),
    "old diffusers": (
        "old-diffusers",
        {
            **pair("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor", ".to_q_lora"),
            **pair("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor", ".to_out_lora"),
            **pair(f"text_encoder.text_model.{CLIP}", ".lora_linear_layer"),
        },
        {SD_PATH, SD_PATH.replace("to_q", "to_out.0"), f"text_encoder.{CLIP}"},
    ),
}


def written(path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None):
    save_file(dict(tensors), path, metadata=dict(metadata or {}))
    return path


@pytest.mark.parametrize("tool", FILES)
def test_a_tools_file_is_read_and_written_back_bit_for_bit(tmp_path, tool: str) -> None:
    format, tensors, layers = FILES[tool]
    path = written(tmp_path / "theirs.safetensors", tensors, {"ss_sd_model_name": "x", "note": "kept"})
    assert detect_format(path) == format
    read = load_adapter(path)
    assert read.modules.keys() == layers
    assert read.extra.keys() == {key for key in tensors if key.startswith("bundle_emb")}
    assert {"ss_sd_model_name": "x", "note": "kept"}.items() <= read.metadata.items()
    again = load_file(save_adapter(read, tmp_path / "ours.safetensors", format=format))
    assert_identical(again, tensors)


def test_scales_axes_and_magnitudes_are_those_of_the_file(tmp_path) -> None:
    read = load_adapter(written(tmp_path / "a.safetensors", FILES["OneTrainer kohya"][1])).modules[SDXL_PATH]
    assert isinstance(read, ModuleState)
    assert (read.axis, read.alpha, read.scale) == ("in", 1.0, 0.5)
    read = load_adapter(written(tmp_path / "b.safetensors", FILES["OneTrainer comfy"][1]))
    key = read.modules["transformer.transformer_blocks.0.attn.to_k"]
    assert key.axis == "out" and key.alpha == 1.0
    assert_identical(key.magnitude, numbers(12, 1).abs()[4:8, 0])
    assert load_adapter(written(tmp_path / "c.safetensors", FILES["ai-toolkit"][1])).ranks == (2,)


DEBRIS = {
    "$$": "transformer$$transformer_blocks$$0$$attn$$to_q.lora_A.weight",
    "default": "transformer.transformer_blocks.0.attn.to_q.lora_A.default.weight",
    "base_model": "base_model.model.transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "bare base_model": "base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight",
    "compiled": "transformer._orig_mod.transformer_blocks.0.attn.to_q.lora_A.weight",
}


@pytest.mark.parametrize("kind", DEBRIS)
def test_debris_of_wrappers_is_read(tmp_path, kind: str) -> None:
    down = DEBRIS[kind]
    tensors = {down: numbers(2, 4), down.replace("lora_A", "lora_B"): numbers(6, 2)}
    read = load_adapter(written(tmp_path / "a.safetensors", tensors))
    assert list(read.modules) == ["transformer.transformer_blocks.0.attn.to_q"]
    assert not read.extra


def test_factors_norms_and_biases_of_lycoris(tmp_path) -> None:
    name = "lycoris_transformer_blocks_0"
    tensors = {
        **{f"{name}_attn_to_q.hada_w1_a": numbers(6, 2), f"{name}_attn_to_q.hada_w1_b": numbers(2, 4)},
        **{f"{name}_attn_to_q.hada_w2_a": numbers(6, 2, seed=1), f"{name}_attn_to_q.hada_w2_b": numbers(2, 4, seed=1)},
        f"{name}_attn_to_q.alpha": torch.tensor(1.0),
        **{f"{name}_attn_to_k.lokr_w1": numbers(2, 2), f"{name}_attn_to_k.lokr_w2": numbers(3, 2)},
        f"{name}_attn_to_k.alpha": torch.tensor(9.0),
        **{f"{name}_attn_to_v.diff": numbers(6, 4), f"{name}_attn_to_v.diff_b": numbers(6)},
        **{f"{name}_attn_norm_q.w_norm": numbers(6), f"{name}_attn_norm_q.b_norm": numbers(6, seed=2)},
    }
    read = load_adapter(written(tmp_path / "a.safetensors", tensors))
    block = "transformer.transformer_blocks.0.attn"
    kinds = {path.rpartition(".")[2]: module for path, module in read.modules.items()}
    assert all(isinstance(module, FactoredState) for module in kinds.values())
    assert {name: (m.algorithm, m.scale) for name, m in kinds.items()} == {
        "to_q": ("loha", 0.5),
        "to_k": ("lokr", 1.0),  # two whole factors: alpha counts for nothing
        "to_v": ("full", 1.0),
    }
    assert read.vectors.keys() == {f"{block}.to_v.bias", f"{block}.norm_q.weight", f"{block}.norm_q.bias"}
    assert_identical(load_file(save_adapter(read, tmp_path / "b.safetensors", format="lycoris")), tensors)
    with pytest.raises(ValueError, match="to_k: this lokr is no low-rank pair"):
        save_adapter(read, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="cannot hold its w_norm; use lycoris"):
        save_adapter(replace(read, modules={}), tmp_path / "c.safetensors")


def test_hashes_and_ranks_in_metadata_are_those_of_the_file_that_is_written(tmp_path) -> None:
    stale = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8, "modelspec.hash_sha256": "0x0"}
    metadata = {**stale, "ss_network_dim": "32", "ss_network_alpha": "16", "ss_note": "kept"}
    read = load_adapter(written(tmp_path / "a.safetensors", FILES["OneTrainer kohya"][1], metadata))
    path = save_adapter(read, tmp_path / "b.safetensors", format="kohya")
    metadata = load_adapter(path).metadata
    # as kohya-ss/sd-scripts takes them: of a file whose metadata are the `ss_` ones alone, behind its header
    data = save(load_file(path), {key: text for key, text in metadata.items() if key.startswith("ss_")})
    behind = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(behind).hexdigest()
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_note"]) == (
        "2",
        "1",
        "kept",
    )


@pytest.mark.parametrize("format", ["kohya", "comfyui", "lycoris", "omi", "onetrainer-legacy", "diffusers"])
def test_a_t5_beside_a_part_of_flux_stays_the_second_encoder(tmp_path, format: str) -> None:
    layers = {f"transformer.transformer_blocks.0.attn.{name}": 3072 for name in ("to_q", "to_k", "to_v")}
    sizes = {**layers, f"text_encoder_2.{T5}": 4096}
    modules = {path: ModuleState(numbers(1, size), numbers(size, 1), 1.0) for path, size in sizes.items()}
    adapter = AdapterState(modules, {"dora_diffusion.family": "flux"})
    read = load_adapter(save_adapter(adapter, tmp_path / "a.safetensors", format=format))
    assert read.modules.keys() == modules.keys()


def test_a_layer_in_two_forms_is_refused_and_so_are_numbers_that_are_none(tmp_path) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    whole = kohya(layer, scale=False)
    wrong = {
        "a pair and as a whole difference": {f"{layer}.diff": numbers(6, 4)},
        "both magnitude and dora_scale": {f"{layer}.dora_scale": numbers(6, 1), f"{layer}.magnitude": numbers(6)},
        "expected floating-point numbers": {f"{layer}.lora_up.weight": numbers(6, 2).to(torch.complex64)},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            load_adapter(written(tmp_path / "a.safetensors", {**whole, **change}))


def test_scales_are_folded_where_the_dtype_has_the_digits(tmp_path) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for dtype in (torch.float16, torch.float8_e4m3fn):
        down, up = (
            numbers(64, 8).to(dtype),
            (1e-4 * numbers(8, 64) if dtype == torch.float16 else numbers(8, 64)).to(dtype),
        )
        tensors = {
            f"{layer}.lora_down.weight": down,
            f"{layer}.lora_up.weight": up,
            f"{layer}.alpha": torch.tensor(1.0),
        }
        read = load_adapter(written(tmp_path / "a.safetensors", tensors))
        again = load_adapter(save_adapter(read, tmp_path / "b.safetensors")).modules[path].to(dtype=torch.float32)
        exact = read.modules[path].to(dtype=torch.float32).delta()
        assert (again.delta() - exact).norm() <= 1e-3 * exact.norm()
