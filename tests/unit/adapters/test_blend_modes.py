"""Other modes than additive: folded densely, in the order named, and unfolded bit for bit."""

import pytest
import torch
from torch import Tensor

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.functional.blend_modes import MODES, AdapterTerm
from dora_diffusion.state import AdapterState, FactoredState, ModuleState
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

FOLDED = [mode for mode in MODES if mode != "additive"]
QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
NORM = "unet.mid_block.attentions.0.norm.bias"


@pytest.fixture(scope="module")
def states() -> dict[str, AdapterState]:
    pipe = random_pocket_pipeline()
    generator = torch.Generator().manual_seed(9)
    factors = {"lokr_w1": torch.randn(3, 2, generator=generator), "lokr_w2": torch.randn(64, 96, generator=generator)}
    lora = random_adapter(pipe, 2, use_dora=False).modules
    size = pipe.unet.get_submodule(NORM.removeprefix("unet.").removesuffix(".bias")).bias.shape
    return {
        "dora": _disturbed(random_adapter(pipe, 1)),
        "other": _disturbed(random_adapter(pipe, 3)),
        "lora": AdapterState({**lora, QUERY: FactoredState("lokr", factors, 0.2)}, vectors={NORM: torch.ones(size)}),
    }


def _disturbed(adapter: AdapterState) -> AdapterState:
    """Magnitudes away from the norms, as after training."""
    modules = {}
    for number, (path, module) in enumerate(adapter.modules.items()):
        generator = torch.Generator().manual_seed(number)
        factor = 0.7 + 0.6 * torch.rand(module.magnitude.shape, generator=generator)
        modules[path] = ModuleState(module.down, module.up, module.alpha, module.magnitude * factor)
    return AdapterState(modules)


@pytest.fixture(scope="module")
def shared():
    """A pipeline and a manager for all tests here; each leaves it empty."""
    pipe = random_pocket_pipeline()
    return pipe, AdapterManager(pipe)


@pytest.fixture
def pipe(shared, states):
    pipe, manager = shared
    for name, state in states.items():
        manager.load_adapter(state, name=name)
    yield pipe
    manager.unload()


@pytest.fixture
def manager(shared, pipe):
    return shared[1]


def weights_of(pipe) -> dict[str, Tensor]:
    """Every parameter of the parts that adapters change, copied: what draws, which a state dict need not be."""
    return {
        f"{part}.{name}": parameter.detach().clone()
        for part in ("unet", "text_encoder")
        for name, parameter in getattr(pipe, part).named_parameters()
    }


def modules_of(pipe) -> list[int]:
    return [id(module) for part in (pipe.unet, pipe.text_encoder) for module in part.modules()]


def term(state: AdapterState, path: str, strength: float) -> AdapterTerm:
    module = state.modules[path]
    return AdapterTerm(module.delta(), module.magnitude, module.axis, strength)


@pytest.mark.parametrize("mode", FOLDED)
def test_a_mode_folds_its_own_weights_and_back_to_additive_restores_every_bit(pipe, manager, states, mode) -> None:
    before = weights_of(pipe)
    named = {"other": 0.8, "lora": -0.4, "dora": 1.2}
    manager.set_adapters(named, blend=mode)
    assert manager.blend == mode
    after = weights_of(pipe)
    for path in states["dora"].modules:
        terms = [term(states[name], path, strength) for name, strength in named.items()]
        assert_close(after[f"{path}.weight"], MODES[mode](before[f"{path}.weight"], terms))
    assert_close(after[NORM], before[NORM] - 0.4)
    changed = {f"{path}.weight" for path in states["dora"].modules} | {NORM}
    assert_identical({n: after[n] for n in after.keys() - changed}, {n: before[n] for n in before.keys() - changed})
    manager.set_adapters({})
    assert manager.blend == "additive"
    assert_identical(weights_of(pipe), before)


@pytest.mark.parametrize("mode", ["peft", "comfyui", "a1111"])
def test_order_is_that_of_the_naming_where_it_matters(pipe, manager, mode) -> None:
    folded = []
    for names in (["dora", "other"], ["other", "dora"], ["dora", "other"]):
        manager.set_adapters(dict.fromkeys(names, 0.7), blend=mode)
        folded.append(weights_of(pipe)[f"{QUERY}.weight"])
    assert_identical(folded[0], folded[2])
    assert (folded[0] - folded[1]).abs().max() > 1e-3


def test_a_change_of_strengths_starts_from_the_base_again(pipe, manager) -> None:
    manager.set_adapters({"dora": 0.5, "lora": 1.0}, blend="comfyui")
    once = weights_of(pipe)
    manager.set_adapters({"dora": -2.0}, blend="lycoris")
    manager.set_adapters({"dora": 0.5, "lora": 1.0}, blend="comfyui")
    assert_identical(weights_of(pipe), once)


def test_compose_of_one_at_full_strength_is_what_additive_draws(pipe, manager) -> None:
    def draw() -> Tensor:
        noisy, text = torch.ones(1, 8, 16, 16), torch.ones(1, 32, 256)
        with torch.no_grad():
            return pipe.unet(noisy, torch.tensor(500), text).sample

    base = draw()
    manager.set_adapters({"dora": 1.0})
    additive = draw()
    manager.set_adapters({"dora": 1.0}, blend="compose")
    assert_close(draw(), additive)
    assert (additive - base).abs().max() > 1e-3


def test_strength_zero_is_the_tool_s_own_and_a_part_not_named_is_the_base(pipe, manager) -> None:
    before = weights_of(pipe)
    for mode in ("compose", "comfyui", "a1111"):
        manager.set_adapters({"dora": 0.0}, blend=mode)
        assert_close(weights_of(pipe), before)
    manager.set_adapters({"dora": 0.0}, blend="peft")
    assert (weights_of(pipe)[f"{QUERY}.weight"] - before[f"{QUERY}.weight"]).abs().max() > 1e-3
    manager.set_adapters({"dora": {"unet.up_blocks": 1.0}}, blend="peft")
    after = weights_of(pipe)
    kept = {name for name in before if not name.startswith("unet.up_blocks")}
    assert_identical({name: after[name] for name in kept}, {name: before[name] for name in kept})
    assert not torch.equal(after[(name := next(n for n in after if "up_blocks" in n and "to_q" in n))], before[name])


def test_loading_and_deleting_meanwhile_keep_the_mode(pipe, manager, states) -> None:
    manager.set_adapters({"dora": 0.5, "other": 0.5}, blend="comfyui")
    folded = weights_of(pipe)
    manager.load_adapter(states["other"], name="late")
    assert_identical(weights_of(pipe), folded)
    manager.delete_adapter("other")
    assert manager.blend == "comfyui"
    alone = weights_of(pipe)
    manager.set_adapters({"dora": 0.5}, blend="comfyui")
    assert_identical(weights_of(pipe), alone)
    manager.set_adapters({"dora": 0.5, "late": 0.5}, blend="comfyui")  # its gain forms are of the base, not of the fold
    assert_identical(weights_of(pipe), folded)
    manager.set_adapters({"late": 0.3})
    manager.fuse()
    late = weights_of(pipe)
    manager.unload()
    manager.load_adapter(states["other"], name="fresh")
    manager.set_adapters({"fresh": 0.3})
    manager.fuse()
    assert_identical(weights_of(pipe), late)


def test_unload_leaves_nothing(shared, states) -> None:
    pipe, manager = shared
    before, modules = weights_of(pipe), modules_of(pipe)
    manager.load_adapter(states["lora"], name="a")
    manager.set_adapters({"a": 1.0}, blend="peft")
    assert modules_of(pipe) == modules  # folded: plain layers
    manager.unload()
    assert manager.blend == "additive"
    assert modules_of(pipe) == modules
    assert_identical(weights_of(pipe), before)


def test_what_a_folded_mode_cannot_do_is_refused_in_one_line(pipe, manager) -> None:
    manager.set_adapters({"dora": 0.5}, blend="lycoris")
    folded = weights_of(pipe)
    for action, message in (
        (
            lambda: manager.set_schedule("dora", [(0, 0), (1, 1)]),
            "a schedule needs blend='additive': the mode 'lycoris'",
        ),
        (lambda: manager.set_mask("dora", torch.ones(4, 4)), "a mask needs blend='additive'"),
        (lambda: manager.fuse(), r"fuse\(\) needs blend='additive'"),
        (lambda: manager.unfuse(), "nothing is fused"),
        (lambda: manager.set_adapters({"dora": 1.0}, blend="average"), "unknown blend 'average'; expected additive, "),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            action()
        assert "\n" not in str(caught.value)
    assert manager.weights == {"dora": 0.5}
    assert_identical(weights_of(pipe), folded)


def test_a_schedule_or_hot_swap_refuses_a_folded_mode(pipe, manager, states) -> None:
    manager.set_adapters({"dora": 0.5})
    manager.set_schedule("dora", [(0.0, 0.0), (1.0, 1.0)])
    with pytest.raises(ValueError, match="a schedule or mask changes strengths as the picture is drawn: end it first"):
        manager.set_adapters({"dora": 1.0}, blend="peft")
    assert (manager.blend, manager.weights) == ("additive", {"dora": 0.5})
    manager.unload()
    manager.enable_hotswap(max_rank=4)
    manager.load_adapter(states["dora"], name="dora")
    with pytest.raises(ValueError, match="which enable_hotswap leaves alone"):
        manager.set_adapters({"dora": 1.0}, blend="peft")
    manager.unload()
    manager.set_adapters({}, blend="peft")
    with pytest.raises(ValueError, match="hot swap needs blend='additive'"):
        manager.enable_hotswap(max_rank=4)


@pytest.mark.parametrize("before_mode", ["additive", "comfyui"])
def test_a_mode_that_fails_half_way_changes_nothing(pipe, manager, states, before_mode) -> None:
    """PEFT knows no in axis: the error names the layer, and the mix before it stands again, to the bit."""
    module = states["dora"].modules[QUERY]
    inward = ModuleState(module.down, module.up, module.alpha, torch.ones(module.shape[1]), axis="in")
    manager.load_adapter(AdapterState({QUERY: inward}), name="in")
    manager.set_adapters({"dora": 0.5, "other": 0.2}, blend=before_mode)
    before, modules = weights_of(pipe), modules_of(pipe)
    with pytest.raises(ValueError, match=f"{QUERY}: mode 'peft' knows magnitudes of the out axis only") as caught:
        manager.set_adapters({"other": 1.0, "in": 1.0}, blend="peft")
    assert "\n" not in str(caught.value)
    assert (manager.blend, manager.weights) == (before_mode, {"dora": 0.5, "other": 0.2})
    assert_identical(weights_of(pipe), before)
    assert modules_of(pipe) == modules


def test_what_cannot_be_folded_is_refused_beforehand(pipe, manager) -> None:
    manager.set_adapters({"dora": 0.5})
    layer = pipe.unet.get_submodule(QUERY.removeprefix("unet.")).base
    whole = layer.weight.data
    layer.weight.data = whole.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=f"{QUERY}: a quantised Linear cannot be folded"):
        manager.set_adapters({"dora": 0.5}, blend="compose")
    assert manager.blend == "additive"
    layer.weight.data = whole
