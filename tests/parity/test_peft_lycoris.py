"""PEFT's LoHa and LoKr, from its own folders: drawn as PEFT draws them, whatever alpha, r and their patterns are."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.formats import load_adapter, save_adapter
from dora_diffusion.inspection.report import inspect_adapter
from tests.parity.test_lycoris_wrapper import near, predicted
from tests.pocket_random import random_pocket_pipeline

TARGETS = ["to_q", "to_k", "to_out.0", "conv1", "proj_in"]
PATTERNS = {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_q": 5, "down_blocks.1.attentions.0.proj_in": 7}}
CONFIGS: dict[str, Any] = {
    "LoHa": peft.LoHaConfig(r=4, alpha=3, target_modules=TARGETS),
    "LoHa, patterns, cores": peft.LoHaConfig(
        r=4, alpha=3, target_modules=TARGETS, use_effective_conv2d=True, **PATTERNS
    ),
    "LoKr": peft.LoKrConfig(r=4, alpha=3, target_modules=TARGETS),
    "LoKr, patterns, cores, of pairs": peft.LoKrConfig(
        r=4, alpha=3, target_modules=TARGETS, use_effective_conv2d=True, decompose_both=True, **PATTERNS
    ),
    "LoKr of whole factors": peft.LoKrConfig(r=64, alpha=3, target_modules=TARGETS),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_s_folder_draws_what_peft_draws(tmp_path: Path, kind: str) -> None:
    pipe = random_pocket_pipeline()
    base = predicted(pipe.unet)
    theirs = peft.get_peft_model(pipe.unet, CONFIGS[kind])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "hada_" in name or "lokr_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    expected = predicted(theirs)
    theirs.float().save_pretrained(tmp_path / "unet")
    fresh = random_pocket_pipeline()
    manager = AdapterManager(fresh)
    manager.load_adapter(tmp_path, name="folder")
    manager.load_adapter(tmp_path / "unet" / "adapter_model.safetensors", name="file")  # its config lies beside it
    ours = save_adapter(load_adapter(tmp_path), tmp_path / "ours.safetensors", format="lycoris")
    manager.load_adapter(ours, name="converted")
    for name in manager.names:
        manager.set_adapters({name: 1.0})
        near(predicted(fresh.unet), expected, base)


def test_a_lora_s_file_alone_reads_the_config_beside_it(tmp_path: Path) -> None:
    pipe = random_pocket_pipeline()
    base = predicted(pipe.unet)
    config = peft.LoraConfig(r=4, lora_alpha=16, use_rslora=True, init_lora_weights=False, target_modules=TARGETS)
    theirs = peft.get_peft_model(pipe.unet, config)
    expected = predicted(theirs)
    theirs.float().save_pretrained(tmp_path / "unet")
    fresh = random_pocket_pipeline()
    manager = AdapterManager(fresh)
    manager.load_adapter(tmp_path / "unet" / "adapter_model.safetensors", name="file")
    manager.set_adapters({"file": 1.0})
    near(predicted(fresh.unet), expected, base)
    assert inspect_adapter(tmp_path / "unet" / "adapter_model.safetensors")["notes"] == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "style.safetensors"])
def test_a_file_that_has_lost_its_config_says_which_scale_is_assumed(tmp_path: Path, name: str) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=TARGETS)
    peft.get_peft_model(random_pocket_pipeline().unet, config).save_pretrained(tmp_path / "unet")
    (tmp_path / "unet" / "adapter_model.safetensors").rename(tmp_path / name)
    (note,) = inspect_adapter(tmp_path / name)["notes"]
    assert "adapter_config.json, which is not beside it; alpha is taken for the rank, scale 1" in note
    assert {module.scale for module in load_adapter(tmp_path / name).modules.values()} == {1.0}


@pytest.mark.parametrize("config", [peft.OFTConfig(oft_block_size=4), peft.IA3Config(feedforward_modules=[])])
def test_its_other_kinds_are_refused_by_name(tmp_path: Path, config: Any) -> None:
    config.target_modules = ["to_q"]
    peft.get_peft_model(random_pocket_pipeline().unet, config).save_pretrained(tmp_path / "unet")
    kind = config.peft_type.value
    with pytest.raises(ValueError, match=f"peft_type is '{kind}', expected LORA, LOHA, LOKR; merge it"):
        load_adapter(tmp_path)
    (tmp_path / "unet" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"PEFT's (OFT|\(IA\)\^3) .*not computed here"):
        load_adapter(tmp_path / "unet" / "adapter_model.safetensors")
