"""Part c: guided inference with adapters, and what a person does with them: load, re-weight, fuse, swap."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.peers.models import ATTENTION, Case, paths_of, sd15_unet
from benchmarks.peers.single_layers import Setting
from benchmarks.peers.timing import Timing, compare, once
from benchmarks.peers.variants import RANK, UP_STD, put
from dora_diffusion import AdapterManager, DoRAConfig, inject
from dora_diffusion.state import AdapterState

STRENGTHS = (0.8, 0.5, -0.3, 0.4, 0.6, -0.2, 0.7, 0.3)
COUNTS = (1, 2, 3, 4, 8)


def measure(setting: Setting) -> dict[str, object]:
    """Inference and operations on SD1.5's UNet."""
    torch.manual_seed(0)
    case = sd15_unet(setting)
    case.model.eval().requires_grad_(False)
    states = [_state(case.model, seed) for seed in range(max(COUNTS))]
    print("  guided inference", flush=True)
    inference = _inference(case, states, setting)
    print("  operations", flush=True)
    return {"inference": inference, "operations": _operations(case, states, setting)}


def _state(model: nn.Module, seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    injection = inject(model, DoRAConfig(rank=RANK, alpha=RANK, target_modules=ATTENTION), generator=generator)
    with torch.no_grad():
        for up in injection.ups():
            up.copy_(UP_STD * torch.randn(up.shape, generator=generator))
    state = injection.state().under("unet")
    injection.eject()
    return state


def _manager(case: Case, states: list[AdapterState]) -> AdapterManager:
    """The manager needs of a pipeline its class's name, its parts and its scheduler."""
    pipe = type("StableDiffusionPipeline", (SimpleNamespace,), {})(unet=case.model, text_encoder=None, scheduler=None)
    manager = AdapterManager(pipe)
    for index, state in enumerate(states):
        manager.load_adapter(state, name=str(index))
    return manager


def _weights(count: int) -> dict[str, float]:
    return {str(index): STRENGTHS[index] for index in range(count)}


def _inference(case: Case, states: list[AdapterState], setting: Setting) -> dict[str, object]:
    """A guided step bare, with PEFT's adapters, and with ours from one to eight, unfused and fused."""
    model, paths = case.model, paths_of(case.model, DoRAConfig(target_modules=ATTENTION))
    bases = {path: model.get_submodule(path) for path in paths}
    peft = {name: _peft_layers(model, paths, bases, states, name) for name in ("LoRA x1", "DoRA x1", "DoRA x3")}
    manager = _manager(case, states)
    taken: dict[str, list[float]] = {}

    def run(name: str) -> None:
        with torch.no_grad():
            taken.setdefault(name, []).append(once(lambda: case.call(2), setting.device))

    for _ in range(setting.rounds + 1):
        manager.set_adapters({})
        run("bare")
        ours = {path: model.get_submodule(path) for path in paths}
        for name, layers in peft.items():
            put(model, layers)
            run(f"PEFT {name}")
        put(model, ours)
        for count in COUNTS:
            manager.set_adapters(_weights(count))
            run(f"ours x{count}")
        manager.set_adapters(_weights(3))
        manager.fuse()
        run("ours x3, fused")
        manager.unfuse()
    manager.unload()
    return {name: asdict(t) for name, t in compare({n: s[1:] for n, s in taken.items()}, "bare").items()}


def _peft_layers(
    model: nn.Module, paths: list[str], bases: Mapping[str, nn.Module], states: list[AdapterState], name: str
) -> dict[str, nn.Module]:
    """PEFT's layers with one or three active adapters."""
    from peft import LoraConfig, inject_adapter_in_model

    count = int(name[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in range(count):
            settings = {"use_dora": "DoRA" in name, "target_modules": paths}
            inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, **settings), model, str(index))
    layers = {path: model.get_submodule(path) for path in paths}
    for path, layer in layers.items():
        with torch.no_grad():
            for index in range(count):
                module = states[index].modules[f"unet.{path}"]
                layer.lora_A[str(index)].weight.copy_(module.down)
                layer.lora_B[str(index)].weight.copy_(module.up)
        layer.set_adapter([str(index) for index in range(count)])
        layer.requires_grad_(False).eval()
    put(model, bases)
    return layers


def _operations(case: Case, states: list[AdapterState], setting: Setting) -> dict[str, object]:
    """Seconds of each operation with three adapters, PEFT's beside ours, and the weights read and written once."""
    model, paths = case.model, paths_of(case.model, DoRAConfig(target_modules=ATTENTION))
    bases = {path: model.get_submodule(path) for path in paths}
    weights = [base.weight for base in bases.values()]
    peft = _peft_layers(model, paths, bases, states, "DoRA x3")
    taken: dict[str, list[float]] = {}

    def run(name: str, call: Callable[[], object]) -> None:
        taken.setdefault(name, []).append(once(call, setting.device))

    for number in range(3 * setting.rounds):
        manager = _manager(case, states[:2])
        run("load one adapter", lambda m=manager: m.load_adapter(states[2], name="2"))
        run("three set for the first time", lambda m=manager: m.set_adapters(_weights(3)))
        run("re-weight three", lambda m=manager, n=number: m.set_adapters({"0": 0.1 + n, "1": 0.2, "2": 0.9}))
        run("swap one for another", lambda m=manager: _swap(m, states[3]))
        run("fuse three", manager.fuse)
        run("unfuse", manager.unfuse)
        manager.unload()
        run("weights read and written once", lambda: [weight.clone() for weight in weights])
        run("PEFT: re-weight three", lambda: [layer.set_scale("0", 0.7) for layer in peft.values()])
        kept = {path: base.weight.detach().clone() for path, base in bases.items()}
        run("PEFT: merge three", lambda: [layer.merge() for layer in peft.values()])
        run("PEFT: unmerge", lambda: [layer.unmerge() for layer in peft.values()])
        restored = [torch.equal(base.weight, kept[path]) for path, base in bases.items()]
        with torch.no_grad():
            for path, base in bases.items():
                base.weight.data = kept[path]
    timings: dict[str, Timing] = compare(taken, "weights read and written once")
    return {
        **{name: asdict(timing) for name, timing in timings.items()},
        "layers_restored_bitwise_by_peft": sum(restored),
        "layers": len(paths),
        "weight_bytes": sum(weight.numel() * weight.element_size() for weight in weights),
    }


def _swap(manager: AdapterManager, state: AdapterState) -> Tensor | None:
    manager.delete_adapter("1")
    manager.load_adapter(state, name="1")
    manager.set_adapters(_weights(3))
    return None
