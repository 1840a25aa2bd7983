"""Part b: a training step and a guided inference step of real architectures at full width, with random weights."""

import gc
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from benchmarks.peers.memory import kept_for_backward, peak_of
from benchmarks.peers.single_layers import Setting
from benchmarks.peers.timing import timed
from benchmarks.peers.variants import Variant, build, check_agreement, standing
from dora_diffusion.layers.targets import target_paths as paths_of

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
NAMES = ["PEFT LoRA", "PEFT DoRA", "LyCORIS DoRA", "our LoRA", "our DoRA", "our DoRA, exact"]


@dataclass(frozen=True)
class Case:
    """A model and one call of it. `call(2)` is a guided step: both halves in one batch."""

    name: str
    model: nn.Module
    call: Callable[[int], Tensor]


def sd15_unet(setting: Setting) -> Case:
    """SD1.5's UNet, 860 M parameters, on 32x32 latents (256 px)."""
    from diffusers import UNet2DConditionModel

    width = {"block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": 4}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    small = {**width, **blocks, "sample_size": 8} if setting.is_quick else {"sample_size": 64, "attention_head_dim": 8}
    model = UNet2DConditionModel(cross_attention_dim=768, **small).to(setting.device, setting.dtype)
    side = 8 if setting.is_quick else 32
    options = {"device": setting.device, "dtype": setting.dtype}
    latents, text = torch.randn(2, 4, side, side, **options), torch.randn(2, 77, 768, **options)
    timestep = torch.tensor([500], device=setting.device)
    return Case("SD1.5 UNet", model, lambda n: model(latents[:n], timestep, text[:n]).sample)


def sd3_slice(setting: Setting) -> Case:
    """Two of SD3-medium's blocks at full width (24 heads of 64), 64x64 latents (512 px), 333 text tokens."""
    from diffusers import SD3Transformer2DModel

    heads, side = (2, 16) if setting.is_quick else (24, 64)
    model = SD3Transformer2DModel(
        sample_size=128,
        num_layers=2,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        pos_embed_max_size=192,
    ).to(setting.device, setting.dtype)
    options = {"device": setting.device, "dtype": setting.dtype}
    latents = torch.randn(2, 16, side, side, **options)
    text, pooled = torch.randn(2, 333, 4096, **options), torch.randn(2, 2048, **options)
    timestep = torch.tensor([500.0, 500.0], device=setting.device)
    return Case("SD3 two blocks", model, lambda n: model(latents[:n], text[:n], pooled[:n], timestep[:n]).sample)


def flux_slice(setting: Setting) -> Case:
    """One double and one single block of FLUX.1 at full width (24 heads of 128), 256 picture and 128 text tokens."""
    from diffusers import FluxTransformer2DModel

    heads, tokens = (2, 16) if setting.is_quick else (24, 256)
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=heads)
    model = model.to(setting.device, setting.dtype)
    options = {"device": setting.device, "dtype": setting.dtype}
    latents, text = torch.randn(2, tokens, 64, **options), torch.randn(2, 128, 4096, **options)
    pooled, timestep = torch.randn(2, 768, **options), torch.tensor([0.5, 0.5], device=setting.device)
    ids, text_ids = torch.zeros(tokens, 3, device=setting.device), torch.zeros(128, 3, device=setting.device)

    def call(n: int) -> Tensor:
        places = {"img_ids": ids, "txt_ids": text_ids}
        inputs = {"encoder_hidden_states": text[:n], "pooled_projections": pooled[:n], "timestep": timestep[:n]}
        answer: Tensor = model(latents[:n], **inputs, **places).sample
        return answer

    return Case("FLUX.1 two blocks", model, call)


CASES = (sd15_unet, sd3_slice, flux_slice)


def measure(setting: Setting) -> list[dict[str, object]]:
    """Training steps of each library's adapters on each model, beside the frozen base."""
    found = []
    for make in CASES:
        torch.manual_seed(0)
        case = make(setting)
        print(f"  {case.name}", flush=True)
        found.append({"model": case.name, **_training(case, setting)})
        del case
        gc.collect()  # some libraries' layers hold each other
    return found


def _training(case: Case, setting: Setting) -> dict[str, object]:
    model = case.model.train()
    paths = paths_of(model, ATTENTION)
    bases = {path: model.get_submodule(path) for path in paths}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variants = build(model, paths, NAMES)
    check_agreement(lambda: case.call(1), model, variants)
    steps = {name: step_of(case, variant, bases) for name, variant in variants.items()}
    steps = {"base": _base_step(case, bases), **steps}
    known = [*model.parameters(), *(p for variant in variants.values() for p in variant.parameters)]
    return {
        "layers": len(paths),
        "weight_bytes": sum(weight.numel() * weight.element_size() for weight in model.parameters()),
        "step": {k: asdict(v) for k, v in _timed_steps(steps, setting).items()},
        "kept_bytes": {name: _kept(case, variant, bases, known) for name, variant in variants.items()},
        "peak_bytes": {name: peak_of(step, setting.device) for name, step in steps.items()},
    }


def _timed_steps(steps: Mapping[str, Callable[[], None]], setting: Setting):
    return timed(steps, "PEFT LoRA", rounds=setting.rounds, device=setting.device)


def step_of(case: Case, variant: Variant, bases: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(variant.parameters, lr=1e-6)

    def step() -> None:
        with standing(case.model, variant, bases):
            case.call(1).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _base_step(case: Case, bases: Mapping[str, nn.Module]) -> Callable[[], None]:
    """The frozen base's forward and backward, through one of its biases so that gradients run all the way."""
    first = next(parameter for parameter in case.model.parameters() if parameter.dim() == 1)

    def step() -> None:
        first.requires_grad_(True)
        case.call(1).float().square().mean().backward()
        first.grad = None
        first.requires_grad_(False)

    return step


def _kept(case: Case, variant: Variant, bases: Mapping[str, nn.Module], known: Iterable[Tensor]) -> int:
    with standing(case.model, variant, bases):
        return kept_for_backward(lambda: case.call(1), known)
