"""`for_tool`: each tool's own reading and arithmetic, written anew here from its source, draws what we draw."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import dora_diffusion as dd
from dora_diffusion.conversion import TOOLS, ForTool, for_tool
from dora_diffusion.formats.reading import as_stored
from dora_diffusion.functional.blend_modes import AdapterTerm, additive
from dora_diffusion.inspection.report import inspect_adapter
from dora_diffusion.inspection.verify import verify_for_tool
from dora_diffusion.state import AdapterState, FactoredState, Module, ModuleState
from tests.tolerances import assert_close

# A layer's change is fp32 in the file, and W of about its size: what is lost is rounding alone.
NEAR = 1e-5
UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CONV = "unet.down_blocks.0.resnets.0.conv1"
SHAPES: Mapping[str, tuple[int, ...]] = {
    f"{UNET}.to_q": (40, 40),
    f"{UNET}.to_k": (24, 40),
    CONV: (24, 16, 3, 3),
    "text_encoder.encoder.layers.0.self_attn.q_proj": (32, 32),
}
# What each layer is called in the tools' files.
KOHYA = {
    f"{UNET}.to_q": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    f"{UNET}.to_k": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k",
    CONV: "lora_unet_down_blocks_0_resnets_0_conv1",
    "text_encoder.encoder.layers.0.self_attn.q_proj": "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BASE = {path: normal(*shape, seed=i) / shape[1] ** 0.5 for i, (path, shape) in enumerate(SHAPES.items())}


def pair(path: str, base: Mapping[str, Tensor] = BASE, *, axis: str | None = "out", seed: int = 0) -> ModuleState:
    """Of rank 4 at scale 1/2."""
    weight = base[path]
    down = normal(4, *weight.shape[1:], seed=seed) / weight[0].numel() ** 0.5
    up = 0.7 * normal(weight.shape[0], 4, *[1] * (weight.dim() - 2), seed=seed + 1)
    if axis is None:
        return ModuleState(down, up, 2.0)
    norms = weight.transpose(0, int(axis == "in")).flatten(1).norm(dim=1)
    return ModuleState(down, up, 2.0, norms * (1 + 0.2 * normal(len(norms), seed=seed + 2)), axis=axis)


def factored(algorithm: str, path: str, *, magnitude: bool = False, seed: int = 0) -> FactoredState:
    out, columns = BASE[path].flatten(1).shape
    if algorithm == "loha":
        shapes = {"hada_w1_a": (out, 2), "hada_w1_b": (2, columns), "hada_w2_a": (out, 2), "hada_w2_b": (2, columns)}
    elif algorithm == "lokr":
        shapes = {"lokr_w1": (2, 2), "lokr_w2_a": (out // 2, 2), "lokr_w2_b": (2, columns // 2)}
    else:
        shapes = {"diff": tuple(BASE[path].shape)}
    factors = {name: 0.3 * normal(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    scale, alpha = (1.0, None) if algorithm == "full" else (0.5, 1.0)
    norms = BASE[path].flatten(1).norm(dim=1) * (1 + 0.2 * normal(out, seed=seed + 9)) if magnitude else None
    return FactoredState(algorithm, factors, scale, alpha, norms)


def tucker(path: str) -> ModuleState:
    """A core of 3 x 3 between pointwise halves, with magnitudes."""
    out, columns = SHAPES[path][:2]
    core, norms = 0.5 * normal(4, 4, 3, 3, seed=3), BASE[path].flatten(1).norm(dim=1)
    down, up = 0.3 * normal(4, columns, 1, 1, seed=4), 0.3 * normal(out, 4, 1, 1, seed=5)
    return ModuleState(down, up, 2.0, norms * (1 + 0.2 * normal(out, seed=6)), mid=core)


def adapter_of(make: Callable[[str], Module]) -> AdapterState:
    return AdapterState({path: make(path) for path in SHAPES}, {"dora_diffusion.family": "sd1"})


ADAPTERS: dict[str, AdapterState] = {
    "lora": adapter_of(lambda path: pair(path, axis=None)),
    "dora": adapter_of(pair),
    "dora-of-columns": adapter_of(lambda path: pair(path, axis="in")),
    "loha": adapter_of(lambda path: factored("loha", path)),
    "loha-with-magnitudes": adapter_of(lambda path: factored("loha", path, magnitude=True)),
    "lokr": adapter_of(lambda path: factored("lokr", path)),
    "lokr-with-magnitudes": adapter_of(lambda path: factored("lokr", path, magnitude=True)),
    "whole": adapter_of(lambda path: factored("full", path)),
    "tucker": adapter_of(lambda path: tucker(path) if path == CONV else pair(path)),
    "mixed": AdapterState(
        {path: pair(path, axis=axis) for path, axis in zip(SHAPES, ("out", None, "in", None), strict=True)},
        {"dora_diffusion.family": "sd1"},
    ),
}


def ours(module: Module, weight: Tensor) -> Tensor:
    return additive(weight, [AdapterTerm(module.delta(), module.magnitude, module.axis)])


# How the tools compute: a layer's tensors as the file has them, and its weight.


def difference(parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """D without its scale."""
    if "diff" in parts:
        return parts["diff"].reshape(weight.shape)
    if "hada_w1_a" in parts:
        whole = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    elif "lokr_w1" in parts:
        whole = torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
    elif "lora_mid.weight" in parts:
        up, down = (parts[f"lora_{half}.weight"].flatten(1) for half in ("up", "down"))
        whole = torch.einsum("mnwh,im,nj->ijwh", parts["lora_mid.weight"], up, down)
    else:
        whole = parts["lora_up.weight"].flatten(1) @ parts["lora_down.weight"].flatten(1)
    return whole.reshape(weight.shape)


def scale_of(parts: Mapping[str, Tensor]) -> float:
    """alpha / r; r of a LoHa or LoKr are the rows of its second half."""
    halves = [parts[name] for name in ("lora_down.weight", "hada_w1_b", "lokr_w2_b") if name in parts]
    return float(parts["alpha"]) / len(halves[0]) if "alpha" in parts and halves else 1.0


def column_norms(weight: Tensor) -> Tensor:
    flat = weight.transpose(0, 1).flatten(1).norm(dim=1)
    return flat.reshape(1, -1, *[1] * (weight.dim() - 2))


def comfyui(parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    moved = weight + scale_of(parts) * difference(parts, weight)
    if "dora_scale" not in parts:
        return moved
    is_out = parts["dora_scale"].shape[0] == weight.shape[0]
    norms = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1)) if is_out else column_norms(moved)
    return moved * (parts["dora_scale"] / (norms + torch.finfo(weight.dtype).eps))


def a1111(parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    moved = weight + scale_of(parts) * difference(parts, weight)
    return moved * (parts["dora_scale"] / column_norms(moved)) if "dora_scale" in parts else moved


def invokeai(parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    assert "dora_scale" not in parts or "lora_up.weight" in parts, "its DoRALayer asks for lora_up.weight"
    assert not {"dora_scale", "lora_mid.weight"} <= parts.keys(), "its DoRALayer knows no core"
    return a1111(parts, weight)


def sdnext(parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    if "dora_scale" not in parts:
        return a1111(parts, weight)
    moved = weight + difference(parts, weight)
    return weight + scale_of(parts) * (moved * (parts["dora_scale"] / column_norms(moved)) - weight)


ARITHMETIC = {"comfyui": comfyui, "forge": comfyui, "a1111": a1111, "invokeai": invokeai, "sdnext": sdnext}


def parts_by_layer(path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file by layer, `lora_A` and `lora_B` called as the tools call both spellings."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        spelt = key.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up.")
        suffix = next(end for end in (".weight", "") if spelt.endswith(end))
        name, _, part = spelt.removesuffix(suffix).rpartition(".")
        layers.setdefault(name, {})[part + suffix] = tensor
    return layers


def missed(drawn: Tensor, meant: Tensor, weight: Tensor) -> float:
    return float((drawn - meant).norm() / (meant - weight).norm())


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("tool", ARITHMETIC)
def test_a_tool_draws_from_its_file_what_we_draw(tool: str, kind: str, tmp_path: Path) -> None:
    adapter = ADAPTERS[kind]
    made = for_tool(adapter, tool, base=BASE.__getitem__)
    path = dd.save_adapter(made.adapter, tmp_path / "for.safetensors", format=made.format)
    layers = parts_by_layer(path)
    assert layers.keys() == set(KOHYA.values())
    for layer, name in KOHYA.items():
        drawn = ARITHMETIC[tool](layers[name], BASE[layer])
        assert missed(drawn, ours(adapter.modules[layer], BASE[layer]), BASE[layer]) < NEAR, layer
    stored = dd.load_adapter(path, base=as_stored, family="sd1")
    assert verify_for_tool(stored, adapter, made.tool, base=BASE.__getitem__).error < NEAR


@pytest.mark.parametrize("tool", ARITHMETIC)
def test_what_is_said_of_the_adapter_as_it_was_is_what_the_tool_computes(tool: str, tmp_path: Path) -> None:
    adapter = ADAPTERS["dora"]
    made = for_tool(adapter, tool, base=BASE.__getitem__)
    path = dd.save_adapter(adapter, tmp_path / "as-it-was.safetensors", format=made.format)
    layers = parts_by_layer(path)
    errors = [
        missed(ARITHMETIC[tool](layers[name], BASE[layer]), ours(adapter.modules[layer], BASE[layer]), BASE[layer])
        for layer, name in KOHYA.items()
    ]
    assert made.unconverted == pytest.approx(max(errors), rel=1e-3)
    assert made.unconverted > 0.1 and f"up to {made.unconverted:.2g} of a layer's change" in made.sentence()


@pytest.mark.parametrize("tool", TOOLS)
def test_plain_layers_stay_as_they_are(tool: str) -> None:
    adapter = ADAPTERS["lora"]
    made = for_tool(adapter, tool, base=BASE.__getitem__)
    assert made.made == {"as they were": 4} and "away" not in made.sentence()
    for path, module in made.adapter.modules.items():
        assert module.magnitude is None
        assert_close(module.delta(), adapter.modules[path].delta())


def test_magnitudes_for_comfyui_cost_nothing_and_are_read_back_as_ours(tmp_path: Path) -> None:
    adapter = ADAPTERS["dora"]
    made = for_tool(adapter, "comfyui", base=BASE.__getitem__)
    assert made.made == {"with magnitudes for its norms": 4}
    theirs = dd.save_adapter(made.adapter, tmp_path / "theirs.safetensors", format=made.format)
    own = dd.save_adapter(adapter, tmp_path / "own.safetensors", format=made.format)
    assert abs(theirs.stat().st_size - own.stat().st_size) < 1000  # their metadata
    back = dd.load_adapter(theirs, base=BASE.__getitem__)
    assert back.modules.keys() == adapter.modules.keys()
    for path, module in back.modules.items():
        assert_close(module.magnitude, adapter.modules[path].magnitude)
    again = dd.save_adapter(back, tmp_path / "again.safetensors", format=made.format)
    with safe_open(again, "pt") as file:  # and what is saved of it is an adapter like any other
        assert "dora_diffusion.magnitudes_over_base_norms" not in file.metadata()


def test_magnitudes_for_a_tool_are_never_drawn_as_ours(tmp_path: Path) -> None:
    made = for_tool(ADAPTERS["dora"], "forge", base=BASE.__getitem__)
    path = dd.save_adapter(made.adapter, tmp_path / "for-forge.safetensors", format=made.format)
    with pytest.raises(ValueError, match=r"for-forge.safetensors: .*made for a tool.*base at hand \(base=, --base\)"):
        dd.load_adapter(path)
    facts = inspect_adapter(path)
    assert facts["kind"].startswith("DoRA") and facts["metadata"]["dora_diffusion.made_for"].startswith("Forge")
    manager = dd.AdapterManager(dd.load_pipeline("pocket"))
    with pytest.raises(ValueError, match="'x' was made for Forge .* alone: save it"):
        manager.load_adapter(made.adapter, name="x")


def test_a_rank_makes_small_files_and_the_distance_is_said(tmp_path: Path) -> None:
    adapter = ADAPTERS["dora"]
    made = for_tool(adapter, "a1111", base=BASE.__getitem__, rank=6)
    assert made.made == {"as LoRA": 4} and made.ranks == (6,) and "4 layers as LoRA of rank 6" in made.sentence()
    path = dd.save_adapter(made.adapter, tmp_path / "for.safetensors", format=made.format)
    layers, errors = parts_by_layer(path), {}
    for layer, name in KOHYA.items():
        meant = ours(adapter.modules[layer], BASE[layer])
        errors[layer] = missed(a1111(layers[name], BASE[layer]), meant, BASE[layer])
        left = torch.linalg.svdvals((meant - BASE[layer]).flatten(1))[6:].norm()  # the best that a rank can do
        assert errors[layer] == pytest.approx(float(left / (meant - BASE[layer]).norm()), rel=1e-3)
    found = verify_for_tool(dd.load_adapter(path, family="sd1"), adapter, made.tool, base=BASE.__getitem__)
    assert found.error == pytest.approx(max(errors.values()), rel=1e-3) and "AUTOMATIC1111" in found.sentence()


FLUX = "transformer.single_transformer_blocks.0"
FLUX_BASE = {
    **{f"{FLUX}.attn.to_{name}": normal(8, 16, seed=i) for i, name in enumerate("qkv")},
    f"{FLUX}.proj_mlp": normal(32, 16, seed=7),
}


@pytest.mark.parametrize("axes", [("out", "out", "out"), ("out", None, "out"), ("out",), ("in", "in", "in")])
def test_layers_that_are_one_in_the_tools_file(axes: tuple[str | None, ...], tmp_path: Path) -> None:
    """Attention of FLUX.1's single blocks is three quarters of `linear1`: the rest stays what it is."""
    paths = list(FLUX_BASE)[: len(axes)]
    modules = {path: pair(path, FLUX_BASE, axis=axis) for path, axis in zip(paths, axes, strict=True)}
    adapter = AdapterState(modules, {"dora_diffusion.family": "flux"})
    made = for_tool(adapter, "comfyui", base=FLUX_BASE.__getitem__)
    assert made.made == {("as whole differences" if "in" in axes else "with magnitudes for its norms"): len(axes)}
    path = dd.save_adapter(made.adapter, tmp_path / "for.safetensors", format=made.format)
    (parts,) = parts_by_layer(path).values()
    weight = torch.cat(list(FLUX_BASE.values()))
    meant = torch.cat([ours(modules[p], w) if p in modules else w for p, w in FLUX_BASE.items()])
    assert missed(comfyui(parts, weight), meant, weight) < NEAR
    back = dd.load_adapter(path, base=FLUX_BASE.__getitem__)
    for layer, weight in FLUX_BASE.items():
        assert_close(ours(back.modules[layer], weight), ours(modules[layer], weight) if layer in modules else weight)


def test_diffusers_gets_the_nearest_dora_and_no_mixture() -> None:
    adapter = ADAPTERS["mixed"]
    made = for_tool(adapter, "diffusers", base=BASE.__getitem__, rank=8)
    assert made.made == {"as they were": 3, "as the nearest DoRA": 1} and made.ranks == (8,)
    for path, module in made.adapter.modules.items():
        if path.startswith("unet"):  # PEFT has one switch for a component
            assert module.magnitude is not None and module.axis == "out"
        error = missed(ours(module, BASE[path]), ours(adapter.modules[path], BASE[path]), BASE[path])
        assert error < (0.7 if path == CONV else NEAR)
    assert made.adapter.modules["text_encoder.encoder.layers.0.self_attn.q_proj"].magnitude is None


def test_models_and_layers_that_a_tool_does_not_read_are_refused_by_name() -> None:
    adapter, base = ADAPTERS["dora"], BASE.__getitem__
    with pytest.raises(ValueError, match="'webui' is no tool that is known here: expected one of comfyui, forge"):
        for_tool(adapter, "webui", base=base)
    unknown = AdapterState({"unet.odd.layer": pair(CONV)})
    with pytest.raises(ValueError, match="nothing tells which model"):
        for_tool(unknown, "comfyui", base=base)
    sana = AdapterState({f"{FLUX}.attn.to_q": pair(f"{FLUX}.attn.to_q", FLUX_BASE)}, {"dora_diffusion.family": "flux"})
    with pytest.raises(ValueError, match=r"AUTOMATIC1111 \(since 1.10\) reads no adapters of flux; it does of sd1"):
        for_tool(sana, "a1111", base=FLUX_BASE.__getitem__)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        for_tool(adapter, "a1111", base=base, rank=0)
    biased = replace(adapter, vectors={f"{CONV}.bias": torch.ones(24)})
    with pytest.raises(
        ValueError, match=rf"InvokeAI \(6\) does not read 1 of the adapter's 5 .*{CONV}.bias; .*--partial"
    ):
        for_tool(biased, "invokeai", base=base)
    made = for_tool(biased, "invokeai", base=base, strict=False)
    assert made.left_out == (f"{CONV}.bias",) and not made.adapter.vectors and "1 left out" in made.sentence()
    assert for_tool(biased, "comfyui", base=base).adapter.vectors.keys() == biased.vectors.keys()


def test_invokeai_leaves_out_what_lies_outside_of_flux_blocks() -> None:
    weights = {**FLUX_BASE, "transformer.x_embedder": normal(8, 16, seed=8)}
    modules = {path: pair(path, weights, axis=None) for path in weights}
    adapter = AdapterState(modules, {"dora_diffusion.family": "flux"})
    with pytest.raises(ValueError, match="does not read 1 of the adapter's 5 .*, such as transformer.x_embedder"):
        for_tool(adapter, "invokeai", base=weights.__getitem__)
    made: ForTool = for_tool(adapter, "invokeai", base=weights.__getitem__, strict=False)
    assert made.adapter.modules.keys() == FLUX_BASE.keys()
