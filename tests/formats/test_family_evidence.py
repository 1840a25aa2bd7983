"""What tells a file's family is said, in the library, in the facts, and as people read them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dora_diffusion.formats import examine, load_examined
from dora_diffusion.inspection.report import describe, inspect_adapter

SDXL = "lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_attn2_to_k"
SHARED = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
FLUX = "transformer.single_transformer_blocks.0"


def layer(name: str, out: int, columns: int) -> dict[str, Any]:
    return {f"{name}.lora_down.weight": torch.ones(2, columns), f"{name}.lora_up.weight": torch.ones(out, 2)}


CERTAIN = "certain: names, sizes and blocks are those of no other model known here"
CASES: dict[str, tuple[dict[str, Any], dict[str, str], str | None, str]] = {
    "sizes": (layer(SDXL, 1280, 2048), {}, "sdxl", CERTAIN),
    "several": (layer(SHARED, 640, 640), {}, None, "sd1, sd2 or sdxl fit"),
    "metadata": (
        layer(SHARED, 640, 640),
        {"ss_base_model_version": "sd_v2"},
        "sd2",
        "as its metadata say; by its layers sd1, sd2 or sdxl fit",
    ),
    "our own": (
        layer(SHARED, 640, 640),
        {"dora_diffusion.family": "sd1"},
        "sd1",
        "as was told: dora_diffusion.family, --family",
    ),
    "nothing": (
        layer("transformer.distilled.x", 8, 8) | layer(f"{FLUX}.proj_mlp", 8, 8),
        {},
        None,
        "no model known here has layers of these names",
    ),
    "tiny": (
        layer(f"{FLUX}.proj_mlp", 32, 8), {}, "flux", "by names alone: it is smaller than any published model",
    ),
    "of no published size": (
        layer(f"{FLUX}.proj_mlp", 4000, 1000), {}, None, "its names are flux's, in sizes that no published one has",
    ),
    "of no published size, but told": (
        layer(f"{FLUX}.proj_mlp", 4000, 1000),
        {"modelspec.architecture": "flux-1-dev/lora"},
        "flux",
        "as its metadata say; its sizes are no published model's",
    ),
    "another model": (
        layer(f"{FLUX}.proj_mlp", 12288, 3072),
        {"modelspec.architecture": "chroma"},
        None,
        "its metadata name another model, which has layers of these names and sizes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_evidence_is_told(tmp_path: Path, case: str) -> None:
    tensors, metadata, family, evidence = CASES[case]
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata)
    examined = examine(path)
    assert (examined.family, examined.family_evidence) == (family, evidence)
    loaded = load_examined(path)[1]
    assert (loaded.family, loaded.family_evidence) == (family, evidence)
    facts = inspect_adapter(path)
    assert (facts["family"], facts["family_evidence"]) == (family, evidence)
    line = f"{family} ({evidence})" if family else f"not told: {evidence}"
    assert f"  family           {line}" in describe(facts).splitlines()


def test_a_layer_that_is_refused_leaves_the_family_open(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"{SDXL}.lora_down.weight": torch.ones(2, 2048)}, path)
    assert examine(path).family is None
    assert (
        examine(path).family_evidence == f"{SDXL}: its B (lora_B, lora_up) is missing; expected both halves of the pair"
    )
