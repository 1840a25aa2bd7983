"""diffusers' format: what is written comes back, and what is broken says so in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dora_diffusion.formats import detect_format, examine, load_adapter, save_adapter
from dora_diffusion.formats.peft_alphas import METADATA_KEY
from dora_diffusion.functional.dora import dora_weight
from dora_diffusion.state import AdapterState, ModuleState
from tests.tolerances import assert_close, assert_identical

UNET = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CLIP = "text_encoder.encoder.layers.0.self_attn.q_proj"
CONV = "unet.mid_block.resnets.0.conv1"


def adapter(alpha: float = 2.0) -> AdapterState:
    torch.manual_seed(0)
    return AdapterState(
        {
            UNET: ModuleState(torch.randn(2, 6), torch.randn(5, 2), alpha, torch.rand(5)),
            CLIP: ModuleState(torch.randn(3, 6), torch.randn(4, 3), alpha, torch.rand(4)),
            CONV: ModuleState(torch.randn(2, 6, 3, 3), torch.randn(5, 2, 1, 1), alpha, torch.rand(5)),
        },
        {"note": "kept"},
    )


def test_round_trip_is_exact_at_scale_one(tmp_path) -> None:
    original = AdapterState(
        {path: ModuleState(m.down, m.up, float(m.rank), m.magnitude) for path, m in adapter().modules.items()}
    )
    read = load_adapter(save_adapter(original, tmp_path / "a.safetensors"))
    assert read.modules.keys() == original.modules.keys()
    for path, module in original.modules.items():
        assert_identical(
            [read.modules[path].down, read.modules[path].up, read.modules[path].magnitude],
            [module.down, module.up, module.magnitude],
        )
        assert read.modules[path].scale == 1.0


@pytest.mark.parametrize("alpha", [0.5, 2.0, 7.0])
def test_scale_survives_as_a_fold_into_b(tmp_path, alpha: float) -> None:
    original = adapter(alpha)
    read = load_adapter(save_adapter(original, tmp_path / "a.safetensors"))
    for path, module in original.modules.items():
        base = torch.randn(module.up.shape[0], *module.down.shape[1:])
        expected = dora_weight(base, module.down, module.up, module.scale, module.magnitude)
        other = read.modules[path]
        assert_close(dora_weight(base, other.down, other.up, other.scale, other.magnitude), expected)
    assert read.metadata["note"] == "kept"


def test_keys_are_those_that_diffusers_and_transformers_read(tmp_path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(save_adapter(adapter(), tmp_path / "a.safetensors"))
    prefix = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    assert {key for key in tensors if key.startswith("text_encoder")} == {
        f"{prefix}.lora_A.weight",
        f"{prefix}.lora_B.weight",
        f"{prefix}.lora_magnitude_vector.weight",
    }
    assert tensors[f"{CONV}.lora_magnitude_vector.weight"].shape == (1, 5, 1, 1)


def test_both_magnitude_spellings_and_alpha_of_the_metadata_are_read(tmp_path) -> None:
    module = adapter().modules[UNET]
    tensors = {
        f"{UNET}.lora_A.weight": module.down,
        f"{UNET}.lora_B.weight": module.up,
        f"{UNET}.lora_magnitude_vector": module.magnitude,
    }
    config = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 3}, "unet.use_rslora": True}
    save_file(tensors, tmp_path / "a.safetensors", metadata={METADATA_KEY: json.dumps(config)})
    read = load_adapter(tmp_path / "a.safetensors").modules[UNET]
    assert_identical(read.magnitude, module.magnitude)
    assert read.alpha == 3
    assert read.scale == pytest.approx(3 / 2**0.5)


BROKEN = {
    "empty": (b"", "cut short"),
    "text": (b"hello, this is no adapter at all", "cut short"),
    "truncated": (None, "cut short"),
    "pickle": (b"\x80\x04\x95" + bytes(60), "a pickle, which can run code"),
    "bad json": ((8).to_bytes(8, "little") + b"{{{{{{{{", "not the JSON"),
    "duplicate": (len(b'{"a":{},"a":{}}').to_bytes(8, "little") + b'{"a":{},"a":{}}', "twice"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_give_one_line_that_names_them(tmp_path, kind: str) -> None:
    data, message = BROKEN[kind]
    path = tmp_path / "broken.safetensors"
    if data is None:
        data = save_adapter(adapter(), tmp_path / "whole.safetensors").read_bytes()[:-10]
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{UNET}.lora_B.weight"), "its B .lora_B, lora_up. is missing"),
        (lambda t: t.update({f"{UNET}.lora_B.weight": torch.ones(5, 3)}), "no low-rank pair"),
        (lambda t: t.update({f"{UNET}.lora_magnitude_vector.weight": torch.ones(4)}), "expected .5,."),
        (lambda t: t.update({f"{UNET}.lora_A.weight": torch.full((2, 6), float("nan"))}), "NaN"),
    ],
)
def test_wrong_contents_are_named(tmp_path, change, message: str) -> None:
    from safetensors.torch import load_file

    tensors = load_file(save_adapter(adapter(), tmp_path / "a.safetensors"))
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        '{"unet.alpha_pattern": [1]}',
        '{"unet.lora_alpha": NaN}',
        '{"unet.lora_alpha": true}',
        '{"unet.lora_alpha": 1' + "0" * 400 + "}",
        "[1]",
        "{" * 5000,
        '{"a":' * 20000,
    ],
    ids=["list", "nan", "bool", "huge", "array", "braces", "deep"],
)
def test_hostile_metadata_gives_one_line(tmp_path, config: str) -> None:
    from safetensors.torch import load_file

    path = save_adapter(adapter(), tmp_path / "a.safetensors")
    save_file(load_file(path), path, metadata={METADATA_KEY: config})
    with pytest.raises(ValueError, match="lora_adapter_metadata") as caught:
        load_adapter(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(", "a|b", ".*.*.*.*.*x", "[ab]"])
def test_patterns_of_strangers_are_not_run(tmp_path, pattern: str) -> None:
    from safetensors.torch import load_file

    path = save_adapter(adapter(), tmp_path / "a.safetensors")
    config = {"unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 9}}
    save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps(config)})
    with pytest.raises(ValueError, match="is an expression that is not run here"):
        load_adapter(path)


def test_a_key_of_no_layer_is_kept_and_reported(tmp_path) -> None:
    from safetensors.torch import load_file

    path = save_adapter(adapter(), tmp_path / "a.safetensors")
    save_file({**load_file(path), "stranger": torch.ones(1)}, path)
    assert examine(path).unknown == ("stranger",)
    read = load_adapter(path)
    assert_identical(read.extra, {"stranger": torch.ones(1)})
    again = load_adapter(save_adapter(read, tmp_path / "b.safetensors", format="kohya"))
    assert_identical(again.extra, read.extra)


def test_file_without_adapter_keys_is_refused(tmp_path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no adapter format known"):
        detect_format(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_adapter(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="format 'ckpt' is unknown"):
        save_adapter(adapter(), tmp_path / "x.safetensors", format="ckpt")


def test_magnitudes_of_the_in_axis_are_not_written_as_if_they_were_of_the_out_axis(tmp_path) -> None:
    module = ModuleState(torch.ones(2, 4), torch.ones(4, 2), 2.0, torch.ones(4), axis="in")
    with pytest.raises(ValueError, match="unet.to_q: .* got the in axis"):
        save_adapter(AdapterState({"unet.to_q": module}), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
