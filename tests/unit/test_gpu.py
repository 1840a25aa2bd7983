"""What only a GPU can tell: the same numbers as on the CPU, half-precision training, and no wait beyond one a norm."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.cli import main
from dora_diffusion.formats import save_adapter
from dora_diffusion.generation.generate import GenerationSettings
from dora_diffusion.generation.png_metadata import read_metadata
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from dora_diffusion.pipelines.loading import load_pipeline
from tests.kinds import KINDS, disturb, make_input, make_model
from tests.pocket_random import random_adapter, random_pocket_pipeline
from ui.backend.interference import measure
from ui.backend.request import AdapterChoice, DrawRequest
from ui.backend.session import Session

pytestmark = pytest.mark.gpu
CONFIG = {"rank": 2, "alpha": 3, "target_modules": ["layer"]}


@KINDS
@pytest.mark.parametrize("norm_grad", ["detached", "exact"])
def test_forward_and_gradients_are_the_cpus(kind: str, norm_grad: str) -> None:
    answers = []
    for device in ("cpu", "cuda"):
        model, x = make_model(kind), make_input(kind).to(device)
        injection = inject(model, DoRAConfig(**CONFIG, norm_grad=norm_grad))
        disturb(model.layer)
        model.to(device)
        out = model(x)
        grads = torch.autograd.grad(out.square().sum(), injection.parameters())
        answers.append([part.detach().cpu() for part in (out, *grads)])
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3)  # TF32 convolutions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_fp32_masters_with_fused_adamw_and_a_scaler(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64)).to("cuda", dtype)
    injection = inject(model, DoRAConfig(rank=4, target_modules=["0", "2"]))
    injection.keep_norms()
    optimizer = torch.optim.AdamW(injection.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    x, goal = torch.randn(32, 64, device="cuda", dtype=dtype), torch.randn(32, 64, device="cuda")
    losses = []
    for _ in range(30):
        loss = (model(x).float() - goal).square().mean()
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    injection.eject()


def test_a_pipeline_blends_fuses_and_moves_on_the_gpu() -> None:
    pipe = random_pocket_pipeline()
    adapters = [random_adapter(pipe, seed) for seed in range(2)]
    answers = []
    for device in ("cpu", "cuda"):
        pipe.to(device)
        manager = AdapterManager(pipe)
        for index, adapter in enumerate(adapters):
            manager.load_adapter(adapter, name=str(index))
        manager.set_adapters({"0": 0.8, "1": -0.3})
        generator = torch.Generator().manual_seed(5)
        noisy = torch.randn(1, 8, 16, 16, generator=generator).to(device)
        text = torch.randn(1, 32, 256, generator=generator).to(device)
        with torch.no_grad():
            blended = pipe.unet(noisy, 500, text).sample
            manager.fuse()
            fused = pipe.unet(noisy, 500, text).sample
            manager.unfuse()
        manager.unload()
        answers += [blended.cpu(), fused.cpu()]
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("moves", ["offload", "to"])
def test_adapters_and_their_schedules_follow_a_pipeline_that_moves(moves: str, tmp_path: Path) -> None:
    random_pocket_pipeline().save_pretrained(tmp_path)
    pictures = []
    for device in ("cpu", "cuda"):
        offload = "model" if moves == "offload" and device == "cuda" else None
        pipe = load_pipeline(tmp_path, device=device if offload else "cpu", offload=offload)
        pipe.set_progress_bar_config(disable=True)
        manager = AdapterManager(pipe)
        manager.load_adapter(random_adapter(random_pocket_pipeline()), name="ink")
        manager.set_adapters({"ink": 0.8})
        manager.set_schedule("ink", [(0.0, 0.2), (1.0, 1.0)])
        if offload is None:
            pipe.to(device)
        for strength in (0.8, -0.3):  # the second after everything has gone over and back
            manager.set_adapters({"ink": strength})
            generator = torch.Generator().manual_seed(5)
            latents = pipe("a cat", num_inference_steps=3, generator=generator, output_type="latent").images
            pictures.append(latents.cpu())
    torch.testing.assert_close(pictures[2:], pictures[:2], rtol=2e-2, atol=2e-2)


def test_sequential_offload_draws_what_the_cpu_draws(tmp_path: Path) -> None:
    random_pocket_pipeline().save_pretrained(tmp_path)
    pictures = []
    for device, offload in (("cpu", None), ("cuda", "sequential")):
        pipe = load_pipeline(tmp_path, device=device, offload=offload)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        latents = pipe("a cat", num_inference_steps=3, generator=generator, output_type="latent").images
        pictures.append(latents.cpu())
    torch.testing.assert_close(*pictures, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="sequential CPU offload"):
        AdapterManager(pipe).load_adapter(random_adapter(random_pocket_pipeline()), name="ink")


def test_generate_takes_the_gpu_and_a_recipe_draws_the_same_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random_pocket_pipeline().save_pretrained("base")
    save_adapter(random_adapter(random_pocket_pipeline()), Path("ink.safetensors"))
    mix = ("--adapter", "ink.safetensors:0.8", "--schedule", "ink=fade in", "--steps", "3")
    assert main(["generate", "--model", "base", "--prompt", "a cat", *mix, "--output", "first.png"]) == 0
    assert main(["generate", "--recipe", "first.png", "--output", "again.png"]) == 0
    record = read_metadata(Path("again.png"))
    assert record is not None and record.origin.base is not None and record.origin.base.device == "cuda"
    with Image.open("first.png") as first, Image.open("again.png") as again:
        assert first.tobytes() == again.tobytes()


def test_the_app_draws_and_measures_on_the_gpu(tmp_path: Path) -> None:
    pipe = random_pocket_pipeline().to("cuda")
    save_adapter(random_adapter(random_pocket_pipeline()), tmp_path / "ink.safetensors")
    session = Session(pipe, model="random", folder=tmp_path, output=tmp_path / "out")
    request = DrawRequest(GenerationSettings("a cat", steps=2), (AdapterChoice("ink", 0.8),))
    assert list(session.start(request, owner="tab").updates())[-1].phase == "done"
    assert "ink" in measure(session, ["ink"]).norms
    session.close()
