"""What people do to pipelines around adapters: each works, or is refused in one line. docs/pipelines.md lists them."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from torch import Tensor

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.formats import save_adapter
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from dora_diffusion.state import AdapterState
from tests.families.pipelines import PIPELINES
from tests.pipelines.adapters import in_training, trained
from tests.pipelines.kinds import SIDE, controlnet, draws
from tests.tolerances import assert_close, assert_identical, assert_near

ROUNDED = 1e-4  # as in test_kinds


@pytest.fixture
def pipe():
    return PIPELINES["sd1"].build()


def draw(pipe: Any, **asked: Any) -> Tensor:
    return draws(pipe, **{"prompt": "a cat", "height": SIDE, "width": SIDE, **asked})()


def loaded(pipe: Any, strength: float = 1.0, adapter: AdapterState | None = None) -> AdapterManager:
    manager = AdapterManager(pipe)
    manager.load_adapter(trained(pipe) if adapter is None else adapter, name="a")
    manager.set_adapters({"a": strength})
    return manager


def test_a_saved_base_is_the_base(pipe, tmp_path) -> None:
    before = draw(pipe)
    manager = loaded(pipe)
    pipe.save_pretrained(tmp_path / "active")
    manager.set_adapters({"a": 1.0}, blend="compose")
    pipe.save_pretrained(tmp_path / "mode")
    for name in ("active", "mode"):
        assert_identical(draw(DiffusionPipeline.from_pretrained(tmp_path / name)), before)


def test_a_fused_pipeline_is_saved_with_the_mix(pipe, tmp_path) -> None:
    manager = loaded(pipe)
    manager.fuse()
    pipe.save_pretrained(tmp_path)
    assert_identical(draw(DiffusionPipeline.from_pretrained(tmp_path)), draw(pipe))


def test_vectors_are_not_saved_into_the_base(pipe, tmp_path) -> None:
    own = pipe.unet.conv_in.bias.clone()
    loaded(pipe, adapter=AdapterState({}, vectors={"unet.conv_in.bias": torch.ones_like(own)}))
    assert_close(pipe.unet.conv_in.bias, own + 1)
    pipe.unet.save_pretrained(tmp_path)
    assert_identical(UNet2DConditionModel.from_pretrained(tmp_path).conv_in.bias, own)


def test_a_model_in_training_is_saved_and_loads_as_the_base(pipe) -> None:
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    with in_training(pipe):
        saved = pipe.unet.state_dict()
        assert weights.keys() < saved.keys()
        assert_identical({name: saved[name] for name in weights}, weights)
        pipe.unet.load_state_dict(saved)
    pipe.unet.load_state_dict(weights)


def test_a_state_dict_of_the_base_is_loaded_under_adapters(pipe) -> None:
    manager = loaded(pipe)
    other = PIPELINES["sd1"].build(seed=1)
    pipe.unet.load_state_dict(other.unet.state_dict())
    manager.unload()
    assert_identical(pipe.unet.state_dict(), other.unet.state_dict())


def test_projections_fused_before_are_refused(pipe) -> None:
    adapter = trained(pipe)
    pipe.fuse_qkv_projections()
    manager = AdapterManager(pipe)
    with pytest.raises(ValueError, match=r"fuse_qkv_projections\(\) is on.*unfuse_qkv_projections") as refused:
        manager.load_adapter(adapter, name="a")
    assert "\n" not in str(refused.value) and not manager.names
    pipe.unfuse_qkv_projections()
    manager.load_adapter(adapter, name="a")


def test_projections_fused_after_are_refused_when_drawn(pipe) -> None:
    manager = loaded(pipe)
    expected = draw(pipe)
    pipe.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"fuse_qkv_projections\(\) is on"):
        draw(pipe)
    with pytest.raises(ValueError, match=r"fuse_qkv_projections\(\) is on"):
        manager.fuse()
    pipe.unfuse_qkv_projections()
    assert_identical(draw(pipe), expected)


def test_projections_fused_after_fuse_hold_the_mix(pipe) -> None:
    loaded(pipe).fuse()
    expected = draw(pipe)
    pipe.fuse_qkv_projections()
    assert_near(draw(pipe), expected, ROUNDED)


def test_the_scale_of_a_call_multiplies_strengths(pipe) -> None:
    manager = loaded(pipe, 0.5)
    expected = draw(pipe)
    manager.set_adapters({"a": 1.0})
    full = draw(pipe)
    assert_identical(draw(pipe, cross_attention_kwargs={"scale": 0.5}), expected)
    assert_identical(draw(pipe), full)


@pytest.mark.parametrize("family", ["flux-dev", "sd3"])
def test_the_scale_of_a_call_by_its_other_names(family: str) -> None:
    pipe = PIPELINES[family].build()
    manager = loaded(pipe, 0.5)
    expected = draw(pipe)
    manager.set_adapters({"a": 1.0})
    assert_identical(draw(pipe, joint_attention_kwargs={"scale": 0.5}), expected)


def test_the_scale_of_a_call_and_a_mask(pipe) -> None:
    manager = loaded(pipe, 0.5)
    expected = draw(pipe)
    manager.set_adapters({"a": 1.0})
    manager.set_mask("a", torch.ones(4, 4))
    assert_near(draw(pipe, cross_attention_kwargs={"scale": 0.5}), expected, ROUNDED)


def test_a_scale_that_cannot_act_is_refused(pipe) -> None:
    manager = loaded(pipe)
    text = pipe.text_encoder(torch.arange(16)[None])[0]
    asked = {"prompt": None, "prompt_embeds": text, "negative_prompt_embeds": text}
    with pytest.raises(ValueError, match="the scale 0.5 of this call did not reach text_encoder"):
        draw(pipe, **asked, cross_attention_kwargs={"scale": 0.5})
    manager.fuse()
    with pytest.raises(ValueError, match="cannot act on adapters that are fused"):
        draw(pipe, cross_attention_kwargs={"scale": 0.5})


def test_a_scale_is_of_one_call(pipe) -> None:
    manager = loaded(pipe)
    text = pipe.text_encoder(torch.arange(16)[None])[0].detach()
    given = {"prompt": None, "prompt_embeds": text, "negative_prompt_embeds": text}
    full, by_embeds = draw(pipe), draw(pipe, **given)
    scaled = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    assert_identical(draw(pipe, **given), by_embeds)  # no text was encoded since the scaled call
    draw(pipe, cross_attention_kwargs={"scale": 0.5})
    manager.fuse()
    assert_near(draw(pipe), full, ROUNDED)
    manager.unfuse()
    assert_identical(draw(pipe), full)
    assert_identical(draw(pipe, cross_attention_kwargs={"scale": 0.5}), scaled)
    manager.set_adapters({"a": 1.0}, blend="compose")
    assert_near(draw(pipe), full, ROUNDED)


def test_a_scale_leaves_no_trace_in_what_is_encoded(pipe) -> None:
    loaded(pipe)
    asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    plain, _ = pipe.encode_prompt("a cat", **asked)
    draw(pipe, cross_attention_kwargs={"scale": 0.0})
    assert_identical(pipe.encode_prompt("a cat", **asked)[0], plain)
    none, _ = pipe.encode_prompt("a cat", lora_scale=0.0, **asked)
    assert_identical(none, PIPELINES["sd1"].build().encode_prompt("a cat", **asked)[0])
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    draws(sibling, prompt="a cat", image=torch.zeros(1, 3, SIDE, SIDE), strength=1.0)()


def test_a_scale_beside_a_controlnet() -> None:
    drawn = controlnet()
    image = {"image": torch.zeros(1, 3, SIDE, SIDE)}
    adapter = trained(drawn.pipe)
    elsewhere = {path: module for path, module in adapter.modules.items() if not path.startswith("controlnet")}
    manager = loaded(drawn.pipe, 0.5, AdapterState(elsewhere))
    expected = draw(drawn.pipe, **image)
    manager.set_adapters({"a": 1.0})
    assert_identical(draw(drawn.pipe, **image, cross_attention_kwargs={"scale": 0.5}), expected)
    manager.unload()
    loaded(drawn.pipe, 1.0, adapter)
    with pytest.raises(ValueError, match="did not reach controlnet, which has adapters, too"):
        draw(drawn.pipe, **image, cross_attention_kwargs={"scale": 0.5})
    draw(drawn.pipe, **image)


@pytest.mark.parametrize("scale", [float("nan"), "0.5"])
def test_a_scale_that_is_no_number_is_refused(pipe, scale: Any) -> None:
    loaded(pipe)
    with pytest.raises(ValueError, match="the scale of a call must be a finite number"):
        draw(pipe, cross_attention_kwargs={"scale": scale})
    pipe.unet(torch.ones(1, 4, 16, 16), 500, torch.ones(1, 16, 16), cross_attention_kwargs={"scale": None})


def test_an_interrupted_drawing_keeps_nobody_waiting(pipe) -> None:
    manager = loaded(pipe)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = pipe.unet.conv_out.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe)
    hook.remove()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(manager.set_adapters, {"a": 0.0}).result(timeout=600)
    assert_identical(draw(pipe), draw(PIPELINES["sd1"].build()))


def test_layers_that_the_pipeline_asks_for_their_sizes() -> None:
    pipe = PIPELINES["sdxl"].build()
    injection = inject(pipe.unet, DoRAConfig(rank=2, target_modules=["add_embedding.linear_1"]))
    injection.ups()[0].data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    learnt, adapter = draw(pipe), injection.state().under("unet")
    injection.eject()
    manager = loaded(pipe, 1.0, adapter)
    assert_near(draw(pipe), learnt, ROUNDED)
    layer = pipe.unet.add_embedding.linear_1
    assert (layer.in_features, layer.out_features) == (layer.base.in_features, layer.base.out_features)
    with pytest.raises(AttributeError, match="no attribute 'nowhere'"):
        layer.nowhere  # noqa: B018
    manager.unload()


def test_a_replaced_model_gets_the_adapters_at_the_next_call(pipe) -> None:
    manager, other = loaded(pipe), PIPELINES["sd1"].build(seed=1)
    old, adapter = pipe.unet, trained(PIPELINES["sd1"].build())
    pipe.unet = other.unet
    manager.set_adapters({"a": 0.7})
    loaded(expected := PIPELINES["sd1"].build(), 0.7, adapter)
    expected.unet = PIPELINES["sd1"].build(seed=1).unet
    AdapterManager(expected)
    manager_of_other = loaded(right := PIPELINES["sd1"].build(seed=1), 0.7, adapter)
    right.text_encoder, right.vae = PIPELINES["sd1"].build().text_encoder, PIPELINES["sd1"].build().vae
    manager_of_other.set_adapters({"a": 0.7})
    assert_identical(draw(pipe), draw(right))
    assert_identical(old.state_dict(), PIPELINES["sd1"].build().unet.state_dict())
    assert not any(type(module).__name__ == "BlendedLayer" for module in old.modules())


def test_a_copy_that_holds_adapters_is_refused_as_a_replacement(pipe) -> None:
    own, manager = pipe.unet.conv_in.bias.clone(), AdapterManager(pipe)
    manager.load_adapter(AdapterState({}, vectors={"unet.conv_in.bias": torch.ones_like(own)}), name="v")
    manager.set_adapters({"v": 1.0})
    first, pipe.unet = pipe.unet, copy.deepcopy(pipe.unet)
    with pytest.raises(ValueError, match=r"unet was replaced by a model that holds adapters \(a copy\?\)"):
        manager.set_adapters({"v": 1.0})
    pipe.unet = first
    manager.unload()
    assert_identical(pipe.unet.conv_in.bias, own)


def test_a_second_manager_takes_over(pipe) -> None:
    adapters = trained(pipe, 0), trained(pipe, 1)
    first = loaded(pipe, 1.0, adapters[0])
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    with pytest.warns(UserWarning, match=r"another AdapterManager had adapters on unet \(a\): they are unloaded"):
        second = loaded(other, 1.0, adapters[1])
    assert not first.names and not first.active and second.active == {"a": 1.0}
    both = draw(pipe)
    second.unload()
    loaded(pipe, 1.0, adapters[1])
    assert_identical(draw(pipe), both)


@pytest.mark.parametrize("state", ["a bias", "a mode", "fused"])
def test_a_state_dict_that_would_be_lost_is_refused(pipe, state: str) -> None:
    bias = torch.ones_like(pipe.unet.conv_in.bias)
    vectors = AdapterState({}, vectors={"unet.conv_in.bias": bias})
    manager = loaded(pipe, adapter=vectors if state == "a bias" else None)
    if state == "a mode":
        manager.set_adapters({"a": 1.0}, blend="compose")
    elif state == "fused":
        manager.fuse()
    with pytest.raises(ValueError, match="a state dict cannot be loaded into .* under adapters") as refused:
        pipe.unet.load_state_dict(PIPELINES["sd1"].build(seed=1).unet.state_dict())
    assert "\n" not in str(refused.value)
    manager.unload()
    pipe.unet.load_state_dict(PIPELINES["sd1"].build(seed=1).unet.state_dict())


def test_a_bias_under_a_layer_refuses_it_as_well(pipe) -> None:
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    adapter = trained(pipe)
    both = AdapterState({path: adapter.modules[path]}, vectors={f"{path}.bias": torch.ones(8)})
    loaded(pipe, adapter=both)
    with pytest.raises(ValueError, match=r"one adds to its bias: unload\(\) first"):
        pipe.unet.load_state_dict(PIPELINES["sd1"].build().unet.state_dict())


def test_a_replaced_model_that_does_not_fit_is_refused(pipe) -> None:
    manager = loaded(pipe)
    pipe.unet = PIPELINES["sdxl"].build().unet
    with pytest.raises(ValueError, match="unet was replaced; a: .* fit this pipeline"):
        manager.set_adapters({"a": 1.0})
    manager.unload()
    assert not manager.names


def test_an_encoder_that_is_put_away(pipe) -> None:
    manager = loaded(pipe)
    text = pipe.text_encoder(torch.arange(16)[None])[0].detach()
    given = {"prompt": None, "prompt_embeds": text, "negative_prompt_embeds": text}
    expected = draw(pipe, **given)
    pipe.text_encoder = None
    manager.set_adapters({"a": 0.0})
    assert not torch.allclose(draw(pipe, **given), expected, atol=1e-3)
    manager.set_adapters({"a": 1.0})
    assert_identical(draw(pipe, **given), expected)
    manager.unload()


def test_threads_that_set_strengths_and_draw(pipe) -> None:
    manager = AdapterManager(pipe)
    adapters = {name: trained(pipe, seed) for seed, name in enumerate("abc")}
    for name, adapter in adapters.items():
        manager.load_adapter(adapter, name=name)
    sets: list[dict[str, float]] = [{"a": 1.0}, {"a": 0.5, "b": 0.5}, {}, {"b": 1.0, "c": 1.0, "a": 1.0}]
    with ThreadPoolExecutor(4) as pool:
        changes = [
            pool.submit(manager.set_adapters, weights) for weights, _ in zip(cycle(sets), range(60), strict=False)
        ]
        drawings = [pool.submit(pipe.unet, torch.ones(1, 4, 16, 16), 500, torch.ones(1, 16, 16)) for _ in range(8)]
        for future in (*changes, *drawings):
            future.result()
    manager.set_adapters({"a": 1.0})
    after = draw(pipe)
    manager.unload()
    loaded(pipe, adapter=adapters["a"])
    assert_identical(after, draw(pipe))


def peft_lora(pipe: Any, folder: Any, *, use_dora: bool = False) -> Any:
    adapter = trained(pipe, 5, use_dora=use_dora)
    return save_adapter(adapter, folder / "lora.safetensors")


def test_a_lora_of_diffusers_beneath_ours(pipe, tmp_path) -> None:
    file, adapter = peft_lora(pipe, tmp_path), trained(pipe)
    manager = AdapterManager(pipe)
    manager.load_adapter(file, name="first")
    manager.load_adapter(adapter, name="second")
    manager.set_adapters({"first": 1.0, "second": 0.8})
    both = draw(pipe)
    manager.unload()
    plain = draw(pipe)
    pipe.load_lora_weights(str(file))
    theirs = draw(pipe)
    manager.load_adapter(adapter, name="second")
    manager.set_adapters({"second": 0.8})
    assert_near(draw(pipe), both, ROUNDED)
    manager.set_adapters({})
    assert_identical(draw(pipe), theirs)
    manager.set_adapters({"second": 0.8})
    pipe.unload_lora_weights()
    ours = draw(pipe)
    manager.unload()
    assert_identical(draw(pipe), plain)
    loaded(pipe, 0.8, adapter)
    assert_identical(ours, draw(pipe))


def test_a_dora_of_diffusers_and_a_fused_one_are_refused(pipe, tmp_path) -> None:
    adapter = trained(pipe)
    pipe.load_lora_weights(str(peft_lora(pipe, tmp_path, use_dora=True)))
    with pytest.raises(ValueError, match=r"carries a DoRA of PEFT's.*unload_lora_weights\(\)"):
        AdapterManager(pipe).load_adapter(adapter, name="a")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(str(peft_lora(pipe, tmp_path)))
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"is fused into its weight: call unfuse_lora\(\)"):
        AdapterManager(pipe).load_adapter(adapter, name="a")
    with pytest.raises(ValueError, match="PEFT"):
        inject(pipe.unet, DoRAConfig(rank=2))


def test_a_lora_of_diffusers_after_ours_is_refused_by_peft(pipe, tmp_path) -> None:
    file = peft_lora(pipe, tmp_path)
    loaded(pipe)
    with pytest.raises(ValueError, match="not supported"):
        pipe.load_lora_weights(str(file))


def test_a_copy_is_a_pipeline_of_its_own(pipe) -> None:
    manager = loaded(pipe)
    expected = draw(pipe)
    twin = copy.deepcopy(pipe)
    manager.unload()
    assert_identical(draw(twin), expected)
    assert_identical(draw(twin, cross_attention_kwargs={"scale": 0.0}), draw(pipe))


def test_from_pipe_shares_the_adapters(pipe) -> None:
    manager = loaded(pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    photo = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    asked = {"image": photo, "height": None, "width": None, "strength": 1.0}
    asked = {name: value for name, value in asked.items() if value is not None}
    image_to_image = draws(other, prompt="a cat", **asked)
    with_it = image_to_image()
    manager.set_adapters({})
    assert not torch.allclose(image_to_image(), with_it, atol=1e-3)


def test_a_forgotten_manager_leaves_the_adapters(pipe) -> None:
    manager = loaded(pipe)
    expected = draw(pipe)
    del manager
    gc.collect()
    assert_identical(draw(pipe), expected)


SWITCHES = {
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(),
    "VAE tiling": lambda pipe: pipe.vae.enable_tiling(),
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_the_pipeline(pipe, switch: str) -> None:
    with in_training(pipe) as adapter:
        SWITCHES[switch](pipe)
        learnt = draw(pipe)
    loaded(pipe, adapter=adapter)
    assert_near(draw(pipe), learnt, ROUNDED)


@pytest.mark.parametrize("order", ["load, then cast", "cast, then load"])
def test_a_pipeline_in_another_dtype(pipe, order: str) -> None:
    adapter = trained(pipe)
    expected = draw(pipe) if loaded(pipe, adapter=adapter) is None else draw(pipe)
    other = PIPELINES["sd1"].build()
    if order.startswith("cast"):
        other.to(torch.bfloat16)
    loaded(other, adapter=adapter)
    other.to(torch.bfloat16)
    assert_near(draw(other).float(), expected, 0.1)


@pytest.mark.parametrize("order", ["load, then cast", "cast, then load"])
def test_weights_that_are_stored_in_fp8(pipe, order: str) -> None:
    adapter = trained(pipe)
    pipe.to(torch.bfloat16)
    if order.startswith("cast"):
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    before = draw(pipe)
    manager = loaded(pipe, adapter=adapter)
    if order.startswith("load"):
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    with_it = draw(pipe)
    assert torch.isfinite(with_it).all() and not torch.allclose(with_it.float(), before.float(), atol=1e-2)
    manager.set_adapters({"a": 0.0})
    if order.startswith("cast"):
        assert_identical(draw(pipe), before)
    manager.unload()
    if order.startswith("cast"):
        assert_identical(draw(pipe), before)


def test_compilation_in_place_and_whole(pipe) -> None:
    loaded(pipe)
    expected = draw(pipe)
    pipe.unet.compile(backend="eager")
    assert_near(draw(pipe), expected, ROUNDED)
    torch._dynamo.reset()
    other = PIPELINES["sd1"].build()
    manager = loaded(other, 0.5)
    other.unet = torch.compile(other.unet, backend="eager", fullgraph=True)
    manager.set_adapters({"a": 1.0})
    assert_near(draw(other), expected, ROUNDED)
    manager.unload()
    assert_near(draw(other), draw(PIPELINES["sd1"].build()), ROUNDED)
    torch._dynamo.reset()


def sequential(pipe: Any) -> None:
    """As enable_sequential_cpu_offload does, with the CPU as the device: it takes no CPU itself."""
    from accelerate import cpu_offload

    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)


def test_sequential_offload_after_loading(pipe) -> None:
    with in_training(pipe) as adapter:
        learnt = draw(pipe)
    manager = loaded(pipe, adapter=adapter)
    sequential(pipe)
    assert pipe.unet.conv_in.weight.is_meta
    assert_near(draw(pipe), learnt, ROUNDED)
    manager.set_adapters({"a": 0.5})
    half = draw(pipe)
    expected = PIPELINES["sd1"].build()
    loaded(expected, 0.5, adapter)
    assert_near(half, draw(expected), ROUNDED)
    manager.unload()
    assert_near(draw(pipe), draw(PIPELINES["sd1"].build()), ROUNDED)


def test_sequential_offload_before_loading(pipe) -> None:
    with in_training(pipe) as adapter:
        learnt = draw(pipe)
    sequential(pipe)
    before = draw(pipe)
    manager = loaded(pipe, adapter=adapter)
    assert_near(draw(pipe), learnt, ROUNDED)
    manager.set_adapters({})
    assert_identical(draw(pipe), before)
    manager.unload()
    assert_identical(draw(pipe), before)


def test_group_offload(pipe) -> None:
    from diffusers.hooks import apply_group_offloading

    with in_training(pipe) as adapter:
        learnt = draw(pipe)
    manager = loaded(pipe, adapter=adapter)
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert_near(draw(pipe), learnt, ROUNDED)
    manager.unload()
    assert_near(draw(pipe), draw(PIPELINES["sd1"].build()), ROUNDED)


def test_a_modular_pipeline_and_its_components() -> None:
    from diffusers import StableDiffusionXLModularPipeline

    parts = PIPELINES["sdxl"].build()
    blocks = StableDiffusionXLModularPipeline().blocks
    pipe = blocks.init_pipeline()
    pipe.update_components(**{name: part for name, part in parts.components.items() if part is not None})
    adapter = trained(parts)
    manager = AdapterManager(pipe)
    report = manager.load_adapter(adapter, name="a")
    assert set(report.components) == {"unet", "text_encoder", "text_encoder_2"}
    manager.set_adapters({"a": 1.0})
    with_it = draw(parts)
    manager.unload()
    assert not torch.allclose(draw(parts), with_it, atol=1e-3)


@pytest.mark.parametrize("use_dora", [True, False])
def test_gpt2_s_own_linear_layer_as_peft_has_it(use_dora: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=32, n_positions=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2Model(config).eval()
    ids = torch.arange(8)[None]
    with in_training(model, use_dora=use_dora) as adapter:
        learnt = model(ids).last_hidden_state.detach()
    assert {path.rpartition(".")[2] for path in adapter.modules} == {"c_attn", "c_proj"}
    theirs = copy.deepcopy(model)
    names = [path.partition(".")[2] for path in adapter.modules]
    inject_adapter_in_model(
        LoraConfig(r=2, lora_alpha=2, target_modules=names, use_dora=use_dora, fan_in_fan_out=True), theirs
    )
    for path, module in adapter.modules.items():
        layer = theirs.get_submodule(path.partition(".")[2])
        layer.lora_A["default"].weight.data.copy_(module.down)
        layer.lora_B["default"].weight.data.copy_(module.up)
        if use_dora:
            layer.lora_magnitude_vector["default"].weight.data.copy_(module.magnitude)
    assert_close(learnt, theirs(ids).last_hidden_state.detach())
    manager = AdapterManager(model)
    manager.load_adapter(adapter, name="a")
    manager.set_adapters({"a": 1.0})
    assert_close(model(ids).last_hidden_state.detach(), learnt)
    manager.fuse()
    assert_close(model(ids).last_hidden_state.detach(), learnt)


def test_blocks_that_answer_from_a_cache(pipe) -> None:
    """As DeepCache: a block's forward is replaced on the instance, and its answer kept for the second step."""
    block = pipe.unet.mid_block
    plain, kept = block.forward, []

    def cached(*arguments: Any, **keywords: Any) -> Any:
        if not kept:
            kept.append(plain(*arguments, **keywords))
        return kept[0]

    with in_training(pipe) as adapter:
        block.forward = cached
        learnt = draw(pipe)
        kept.clear()
    before = draw(pipe)
    kept.clear()
    manager = loaded(pipe, adapter=adapter)
    assert_near(draw(pipe), learnt, ROUNDED)
    kept.clear()
    manager.unload()
    assert_identical(draw(pipe), before)


def test_compiled_blocks(pipe) -> None:
    loaded(pipe)
    expected = draw(pipe)
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert_near(draw(pipe), expected, ROUNDED)
    torch._dynamo.reset()
