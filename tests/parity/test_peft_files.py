"""PEFT's folders, both ways, with PEFT itself as the judge: what it merges from a folder is what the folder means."""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_diffusion.formats import detect_format, load_adapter, save_adapter
from dora_diffusion.formats.peft import CONFIG, WEIGHTS
from dora_diffusion.layers.base_layers import dense_weight
from dora_diffusion.state import AdapterState, ModuleState
from tests.families.pipelines import PIPELINES
from tests.formats.adapters import Make, adapter_of, dense, dora, full, in_dora, layers_of, loha, lora, tucker
from tests.tolerances import assert_identical, assert_near

# Of the largest number. Files are fp32 and both sides merge them in fp64; a scale folded into B, or a pair that is
# computed on the way into a file, is rounded to fp32.
TOLERANCE, ROUNDED = 1e-12, 1e-6
KINDS = (nn.Linear, nn.Conv2d, nn.Embedding)
UNET = ("to_q", "to_out.0", "proj_in", "conv1", "ff.net.2")  # linear, convolutions of 1x1 and of 3x3


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Dense weight of every layer, by path without CLIP's `text_model.`; copies in fp64."""
    return {
        path.removeprefix("text_model."): dense_weight(module).detach().double().clone()
        for path, module in model.named_modules()
        if isinstance(module, KINDS)
    }


@cache
def _pipeline(name: str) -> Any:
    return PIPELINES[name].build()


def build(pipeline: str, component: str) -> nn.Module:
    return deepcopy(getattr(_pipeline(pipeline), component))


def one_of_each(pipeline: str, components: Iterable[str]) -> dict[str, Tensor]:
    """Weights of layers, one of every sort in a block of every sort: those whose paths differ in more than numbers."""
    weights = dict(layers_of(_pipeline(pipeline), components))
    found = {re.sub(r"\.\d+", "", path): path for path in weights}
    return {path: weights[path] for path in found.values()}


def trained(model: nn.Module, config: LoraConfig) -> PeftModel:
    """PEFT's adapter as it were after training: B is not zero, magnitudes are not norms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(0.6 + torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def save(model: PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def reloaded(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What PEFT merges from a folder; no key may be missing or strange."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wrapped = PeftModel.from_pretrained(model, str(folder))
    assert not [str(warning.message) for warning in said if "adapter keys" in str(warning.message)]
    found = {name for name, _ in wrapped.named_parameters() if "lora_" in name}
    stored = load_file(folder / WEIGHTS)
    assert len(found) == len(stored)
    return merged(wrapped)


def merged(wrapped: PeftModel) -> dict[str, Tensor]:
    """What PEFT merges, in fp64."""
    return weights_of(wrapped.double().merge_and_unload())


def assert_means(
    adapter: AdapterState,
    component: str,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    tolerance: float = TOLERANCE,
) -> None:
    """`adapter` changes exactly the layers that changed, and to the same weights."""
    changed = {path for path in before if not torch.equal(before[path], after[path])}
    assert {path.removeprefix(f"{component}.") for path in adapter.modules} == changed
    assert changed
    for path in changed:
        assert_near(dense(before[path], adapter.modules[f"{component}.{path}"]), after[path], tolerance)


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha is the rank": {"lora_alpha": 2},
    "alpha is not the rank": {"lora_alpha": 7},
    "rsLoRA": {"lora_alpha": 3, "use_rslora": True},
    "patterns of ranks": {"lora_alpha": 3, "rank_pattern": {"to_q": 1, "conv1": 3}},
    "patterns of alphas": {"lora_alpha": 3, "alpha_pattern": {"attn1.to_q": 5, "mid_block.resnets.1.conv1": 1}},
    "the first that fits": {"lora_alpha": 3, "alpha_pattern": {"attn1.to_q": 5, "to_q": 9}},
    "the general one first": {"lora_alpha": 3, "alpha_pattern": {"conv1": 9, "resnets.0.conv1": 5}},
    "anchored and dotted expressions": {
        "lora_alpha": 3,
        "alpha_pattern": {r"^mid_block.*to_q": 5, r"attn2\.to_q$": 9, "^down_blocks.0.attentions.0.proj_in": 1},
    },
    "all at once": {
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"attn1.to_q": 3},
        "alpha_pattern": {"to_q": 5, "proj_in": 0.5},
    },
}


@pytest.mark.parametrize("name, use_dora", [*((name, True) for name in CONFIGS), ("all at once", False)])
def test_a_folder_of_peft_means_what_peft_merges(tmp_path: Path, name: str, use_dora: bool) -> None:
    unet = build("sd1", "unet")
    before = weights_of(unet)
    config = LoraConfig(r=2, target_modules=list(UNET), use_dora=use_dora, **CONFIGS[name])
    save(trained(unet, config), tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.is_dora == use_dora and adapter.origin == "peft" and not adapter.extra
    # PEFT sorts the patterns of its config when it saves: what the folder means is what it gives when loaded again
    assert_means(adapter, "unet", before, reloaded(build("sd1", "unet"), tmp_path))


COMPONENTS = {
    ("sdxl", "unet"): ["to_k", "conv_shortcut", "add_embedding.linear_1"],
    ("sd3", "transformer"): ["to_q", "add_v_proj", "norm1.linear"],
    ("flux-dev", "transformer"): ["to_q", "add_k_proj", "proj_mlp", "proj_out", "norm.linear"],
    ("sd1", "text_encoder"): ["q_proj", "fc1", "token_embedding"],
    ("sdxl", "text_encoder_2"): ["q_proj", "fc2", "position_embedding"],
    ("sd3", "text_encoder_3"): ["q", "wo", "relative_attention_bias"],
}


@pytest.mark.parametrize("use_dora", [True, False], ids=["DoRA", "LoRA"])
@pytest.mark.parametrize("pipeline, component", COMPONENTS)
def test_folders_of_every_sort_of_model(tmp_path: Path, pipeline: str, component: str, use_dora: bool) -> None:
    """Named by its component, or not named: then the layers tell which, as far as they can."""
    model = build(pipeline, component)
    before = weights_of(model)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=COMPONENTS[pipeline, component], use_dora=use_dora)
    wrapped = trained(model, config)
    save(wrapped, tmp_path / component)
    save(wrapped, tmp_path / "bare")
    after = merged(wrapped)
    assert_means(load_adapter(tmp_path), component, before, after)
    assert_means(load_adapter(tmp_path / component), component, before, after)
    if component == "text_encoder_3":  # a T5 is FLUX.1's second encoder, too
        with pytest.raises(ValueError, match=r"its text encoder may be that of .*sd3.*say which \(family="):
            load_adapter(tmp_path / "bare")
    bare = load_adapter(tmp_path / "bare", family=pipeline if component == "text_encoder_3" else None)
    first = "text_encoder" if component == "text_encoder_2" else component  # both are CLIP; alone it is the first
    assert_means(bare, first, before, after)


def test_biases_of_b_are_read_with_their_scale_and_other_biases_are_kept(tmp_path: Path) -> None:
    unet = build("sd1", "unet")
    biases = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["proj_in", "ff.net.2"], lora_bias=True)
    wrapped = trained(unet, config)
    save(wrapped, tmp_path)
    adapter = load_adapter(tmp_path)
    after = dict(wrapped.double().merge_and_unload().named_parameters())
    assert adapter.vectors and adapter.vectors.keys() == {f"{path}.bias" for path in adapter.modules}
    for path, vector in adapter.vectors.items():
        name = path.removeprefix("unet.")
        assert_near(biases[name].double() + vector, after[name].detach(), ROUNDED)


def test_trained_biases_of_the_base_are_kept_and_reported(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["to_q", "conv1"], bias="lora_only")
    save(trained(build("sd1", "unet"), config), tmp_path)
    adapter = load_adapter(tmp_path)
    others = {key for key in load_file(tmp_path / WEIGHTS) if "lora_" not in key}
    assert others and {f"base_model.model.{key}" for key in adapter.extra} == others


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """A DoRA folder with alpha = r, so that it means the same without its config; weights before and after."""
    unet = build("sd1", "unet")
    before = weights_of(unet)
    wrapped = trained(unet, LoraConfig(r=2, lora_alpha=2, target_modules=list(UNET), use_dora=True))
    save(wrapped, tmp_path / "a")
    return tmp_path / "a", before, merged(wrapped)


def _with_weight(key: str) -> str:
    return f"{key}.weight" if key.endswith("lora_magnitude_vector") else key


def _with_default(key: str) -> str:
    stem, dot, last = key.rpartition(".")
    return f"{key}.default" if last == "lora_magnitude_vector" else f"{stem}.default{dot}{last}"


SPELLINGS: dict[str, Callable[[str], str]] = {
    "as PEFT writes them": lambda key: key,
    "magnitudes with .weight": _with_weight,
    "older dumps with .default": _with_default,
    "both": lambda key: f"{_with_default(key)}.weight" if "magnitude" in key else _with_default(key),
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
}


@pytest.mark.parametrize("has_config", [True, False], ids=["folder", "file alone"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_with_and_without_the_config(folder: tuple, spelling: str, has_config: bool) -> None:
    path, before, after = folder
    tensors = {SPELLINGS[spelling](key): tensor for key, tensor in load_file(path / WEIGHTS).items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    source = path if has_config else path / WEIGHTS
    assert detect_format(source) == "peft"
    adapter = load_adapter(source)
    assert_means(adapter, "unet", before, after)
    assert not adapter.extra


REFUSED_PATTERNS = ["(to_q|to_k)", "to_[qk]", "to_*", r"attn1\.*to_q"]


@pytest.mark.parametrize("pattern", REFUSED_PATTERNS)
def test_expressions_that_peft_would_take_otherwise_are_refused(folder: tuple, pattern: str) -> None:
    """In PEFT `to_*` is any number of underscores, not a wildcard: nothing is guessed."""
    path = folder[0]
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "alpha_pattern": {pattern: 9}}))
    with pytest.raises(ValueError, match="alpha_pattern .* is an expression that is not run here") as caught:
        load_adapter(path)
    assert "\n" not in str(caught.value)


def varied(weight: Tensor, generator: torch.Generator) -> ModuleState:
    """A DoRA of rank 1, 2 or 3, by the shape of the weight, alpha other than the rank."""
    rank = 1 + sum(weight.shape) % 3
    return replace(lora(weight, generator, rank=rank), magnitude=dora(weight, generator).magnitude)


WRITTEN = {
    "sd1": ("unet", "text_encoder"),
    "sd2": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"),
    "flux-dev": ("transformer", "text_encoder", "text_encoder_2"),
    **dict.fromkeys(("auraflow", "flux2-dev", "flux2-klein", "lumina2", "pixart-alpha"), ("transformer",)),
    **dict.fromkeys(("pixart-sigma", "hunyuan-dit-1.1", "qwen-image", "sana", "z-image"), ("transformer",)),
}


@pytest.mark.parametrize(
    "name, make", [*((name, varied) for name in WRITTEN), ("sd1", dora), ("sd1", lora), ("flux-dev", lora)]
)
def test_what_is_written_peft_loads_and_merges_alike(tmp_path: Path, name: str, make: Make) -> None:
    layers = one_of_each(name, WRITTEN[name]).items()
    # PEFT takes no convolution of groups at these ranks
    original = adapter_of(((path, weight) for path, weight in layers if not path.endswith("conv_depth")), make)
    save_adapter(original, tmp_path / "a", format="peft")
    for component in WRITTEN[name]:
        model = build(name, component)
        before = weights_of(model)
        mine = AdapterState({p: m for p, m in original.modules.items() if p.startswith(f"{component}.")})
        assert_means(mine, component, before, reloaded(model, tmp_path / "a" / component), ROUNDED)
    again = load_adapter(tmp_path / "a")
    assert again.modules.keys() == original.modules.keys()
    assert {path: module.rank for path, module in again.modules.items()} == {
        path: module.rank for path, module in original.modules.items()
    }


def test_a_layer_whose_path_is_the_end_of_others_is_told_apart(tmp_path: Path) -> None:
    """FLUX has `proj_out` and `single_transformer_blocks.0.proj_out`; PEFT's names are ends of paths."""
    weights = dict(layers_of(_pipeline("flux-dev"), ["transformer"]))
    generator = torch.Generator().manual_seed(0)
    last, inner = "transformer.proj_out", "transformer.single_transformer_blocks.0.proj_out"
    for number, modules in enumerate(
        [
            {last: lora(weights[last], generator)},
            {last: lora(weights[last], generator), inner: lora(weights[inner], generator, rank=3)},
            {last: lora(weights[last], generator, rank=3), inner: lora(weights[inner], generator)},
        ]
    ):
        folder = save_adapter(AdapterState(modules), tmp_path / str(number), format="peft")
        fresh = build("flux-dev", "transformer")
        before = weights_of(fresh)
        assert_means(AdapterState(modules), "transformer", before, reloaded(fresh, folder / "transformer"), ROUNDED)
        again = load_adapter(folder)
        assert {path: module.rank for path, module in again.modules.items()} == {
            path: module.rank for path, module in modules.items()
        }


@pytest.mark.parametrize("make", [lora, dora])
def test_embeddings_are_written_as_peft_names_them(tmp_path: Path, make: Make) -> None:
    model = build("sd1", "text_encoder")
    before = weights_of(model)
    layer = "embeddings.token_embedding"
    original = AdapterState({f"text_encoder.{layer}": make(before[layer], torch.Generator().manual_seed(0))})
    folder = save_adapter(original, tmp_path / "a", format="peft")
    after = reloaded(model, folder / "text_encoder")
    assert_means(original, "text_encoder", before, after, ROUNDED)
    # with a magnitude PEFT's merge of an embedding differs from fp64 by less than a rounding to fp32 (3.8e-8 here)
    assert_means(load_adapter(folder), "text_encoder", before, after, TOLERANCE if make is lora else ROUNDED)


def test_pairs_of_other_kinds_are_written_where_they_are_exact(tmp_path: Path) -> None:
    """A Tucker core is multiplied into A, a LoHa is a pair of rank r^2: the same weights in PEFT."""
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    cases: dict[str, Make] = {"mid_block.resnets.0.conv1": tucker, attention: loha}
    for number, (layer, make) in enumerate(cases.items()):
        unet = build("sd1", "unet")
        before = weights_of(unet)
        generator = torch.Generator().manual_seed(0)
        original = AdapterState({f"unet.{layer}": make(before[layer], generator)})
        folder = save_adapter(original, tmp_path / str(number), format="peft")
        after = reloaded(unet, folder / "unet")
        delta = original.modules[f"unet.{layer}"].to(dtype=torch.float64).delta().reshape(before[layer].shape)
        assert_near(after[layer], before[layer] + delta, ROUNDED)


def test_metadata_and_strangers_survive_a_round_trip(tmp_path: Path) -> None:
    weights = layers_of(_pipeline("sd1"), ["unet"])[:2]
    base = adapter_of(weights, dora)
    original = AdapterState(base.modules, {"ss_tag_frequency": "{}", "note": "kept"}, extra={"stranger": torch.ones(2)})
    again = load_adapter(save_adapter(original, tmp_path / "a", format="peft"))
    assert {key: again.metadata[key] for key in original.metadata} == original.metadata
    assert_identical(again.extra, original.extra)


def _mixed(weights: dict[str, Tensor]) -> AdapterState:
    generator = torch.Generator().manual_seed(0)
    original_for = [dora, lora]
    return AdapterState(
        {path: original_for[n % 2](weight, generator) for n, (path, weight) in enumerate(weights.items())}
    )


def _whole(make: Make) -> Callable[[dict[str, Tensor]], AdapterState]:
    return lambda weights: adapter_of(weights.items(), make)


def _biased(weights: dict[str, Tensor]) -> AdapterState:
    plain = adapter_of(weights.items(), lora)
    return AdapterState(plain.modules, vectors={"unet.conv_in.bias": torch.ones(8)})


REFUSALS: dict[str, tuple[Callable[[dict[str, Tensor]], AdapterState], str]] = {
    "mixed": (_mixed, r"a plain LoRA among DoRA layers, which PEFT and diffusers cannot hold apart .*to_dora"),
    "vectors": (_biased, r"unet.conv_in.bias: PEFT's LoRA holds no differences of biases"),
    "in axis": (_whole(in_dora), r"magnitudes of the out axis only, got the in axis; convert it first"),
    "whole differences": (_whole(full), r"is no low-rank pair, and the format holds nothing else"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_peft_cannot_hold_is_refused_in_one_line_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    weights = dict(layers_of(_pipeline("sd1"), ["unet"])[:4])
    make, message = REFUSALS[kind]
    with pytest.raises(ValueError, match=message) as caught:
        save_adapter(make(weights), tmp_path / "a", format="peft")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_components_may_differ_in_kind(tmp_path: Path) -> None:
    """Each component has a config of its own: a DoRA UNet beside a plain text encoder is no mixture to PEFT."""
    plain = adapter_of(one_of_each("sd1", ["text_encoder"]).items(), lora)
    decomposed = adapter_of(one_of_each("sd1", ["unet"]).items(), dora)
    folder = save_adapter(AdapterState({**plain.modules, **decomposed.modules}), tmp_path / "a", format="peft")
    for component, mine in {"unet": decomposed, "text_encoder": plain}.items():
        model = build("sd1", component)
        before = weights_of(model)
        assert_means(mine, component, before, reloaded(model, folder / component), ROUNDED)


BROKEN: dict[str, tuple[Mapping[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3', expected LORA"),
    "a base that was changed": ({"init_lora_weights": "pissa_niter_4"}, "changed the base's weights as well"),
    "alpha of words": ({"lora_alpha": "much"}, "expected a number"),
    "patterns in a list": ({"alpha_pattern": ["to_q"]}, "expected an object"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_wrong_config_gives_one_line_with_the_folder(folder: tuple, kind: str) -> None:
    path = folder[0]
    change, message = BROKEN[kind]
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_with_a_pickle_only_says_so(folder: tuple) -> None:
    path = folder[0]
    (path / WEIGHTS).rename(path / "adapter_model.bin")
    with pytest.raises(
        ValueError,
        match="adapter_model.bin: a pickle, which can run code when it is opened; convert it to safetensors: python",
    ):
        load_adapter(path)
