"""Pretraining in small: every stage runs, a stopped run goes on bit for bit, and what comes out is a pipeline."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from dora_diffusion.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from dora_diffusion.pipelines.loading import POCKET, load_pipeline
from dora_diffusion.pretrain import dit, run
from dora_diffusion.pretrain.autoencoder import AutoencoderRecipe, build_autoencoder, encode_pictures, whiten
from dora_diffusion.pretrain.denoiser import DenoiserRecipe
from dora_diffusion.pretrain.package import assemble_dit
from dora_diffusion.pretrain.scenes import Scene, vocabulary
from dora_diffusion.pretrain.text import TextRecipe, patches
from dora_diffusion.utils.atomic import valid_checkpoints
from tests.tolerances import assert_close, assert_identical

pytest.importorskip("resvg_py", reason="needs the pretrain extra: pip install 'dora-diffusion[pretrain]'")

AUTOENCODER = AutoencoderRecipe(steps=3, whole_picture_steps=1, batch=2, whole_picture_batch=1, checkpoint_every=1)
TEXT = TextRecipe(steps=2, batch=2, checkpoint_every=1)
DENOISER = DenoiserRecipe(steps=4, batch=2, checkpoint_every=2)
PAIRS = [("rocket", "noto", "beach"), ("crown", "flat", "blue"), ("owl", "twemoji", "red")]
SCENES = [Scene(*pair, size) for pair in PAIRS for size in ("large", "small")]


@pytest.fixture
def folders(tmp_path, monkeypatch) -> run.PretrainFolder:
    """A working folder with icon sets of one drawing each, so that npm is not asked."""
    icons = tmp_path / "work" / "icons"
    icons.mkdir(parents=True)
    drawing = {"body": '<circle cx="8" cy="8" r="6" fill="#c33"/>', "width": 16, "height": 16}
    for name in vocabulary().styles.values():
        data = {"icons": {scene.object: drawing for scene in SCENES}}
        (icons / f"{name}.json").write_text(json.dumps(data))
    monkeypatch.setattr(run, "all_scenes", lambda: SCENES)
    monkeypatch.setattr(run, "AUTOENCODER_PICTURES", 3)
    return run.PretrainFolder(tmp_path / "work")


def newest(folders: run.PretrainFolder) -> Path:
    return valid_checkpoints(folders.denoiser)[-1]


def test_every_stage_runs_resumes_bit_for_bit_and_ships(folders, tmp_path) -> None:
    run.pretrain(folders, AUTOENCODER, TEXT, DENOISER)
    whole = {name: load_file(newest(folders) / f"{name}.safetensors") for name in ("average", "model", "optimizer")}
    assert newest(folders).name == "step-00000004"
    (newest(folders) / "manifest.json").unlink()  # as if it had been stopped after the step before
    assert newest(folders).name == "step-00000002"
    run.pretrain(folders, AUTOENCODER, TEXT, DENOISER)
    for name, tensors in whole.items():
        assert_identical(load_file(newest(folders) / f"{name}.safetensors"), tensors)
    run.ship_newest(folders, tmp_path / "shipped")
    names = {path.name for path in (tmp_path / "shipped" / "tokenizer").iterdir()}
    assert {"vocab.json", "merges.txt"} <= names
    shipped = load_file(tmp_path / "shipped" / "unet" / "diffusion_pytorch_model.safetensors")
    assert_identical(shipped, {name: tensor.half() for name, tensor in whole["average"].items()})


def test_the_dit_runs_resumes_bit_for_bit_and_ships(folders, tmp_path) -> None:
    run.pretrain_dit(folders, POCKET, TEXT, DENOISER)
    newest = valid_checkpoints(folders.dit)[-1]
    whole = {name: load_file(newest / f"{name}.safetensors") for name in ("average", "model", "optimizer")}
    (newest / "manifest.json").unlink()
    run.pretrain_dit(folders, POCKET, TEXT, DENOISER)
    for name, tensors in whole.items():
        assert_identical(load_file(newest / f"{name}.safetensors"), tensors)
    run.ship_newest_dit(folders, POCKET, tmp_path / "shipped")
    shipped = load_file(tmp_path / "shipped" / "transformer" / "diffusion_pytorch_model.safetensors")
    prefix = "transformer."
    trained = {name.removeprefix(prefix): t.half() for name, t in whole["average"].items() if name.startswith(prefix)}
    assert_identical({name: shipped[name] for name in trained}, trained)
    assert shipped.keys() - trained.keys() == {"pos_embed.pos_embed"}
    pipe = load_pipeline(tmp_path / "shipped")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a noto style rocket on the beach", num_inference_steps=1).images[0].size == (128, 128)


def test_one_zero_token_counted_256_times_is_the_pipelines_256() -> None:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(POCKET / "tokenizer")
    painter, learning = dit.PooledPainter(tokenizer), dit.Learning(tokenizer)
    for parameter in learning.transformer.parameters():  # zero at the start, its modulation would hide the attention
        torch.nn.init.normal_(parameter, std=0.1)
    text = dit.DiTText(tokenizer, painter.text.eval())
    pipe = assemble_dit(learning, AutoencoderKL.from_pretrained(POCKET / "vae"), text)
    captions = ["a noto style rocket on the beach", ""]
    latents, timesteps = torch.randn(2, 8, 16, 16), torch.tensor([300.0, 900.0])
    with torch.no_grad():
        conditioning = STABLE_DIFFUSION_3.encode(pipe, captions)
        expected = STABLE_DIFFUSION_3.predict(pipe.transformer, latents, timesteps, conditioning, torch.empty(2, 6))
        learning.transformer.set_attn_processor(dit.CountedZeroTokens(dit.ZERO_TOKENS))
        context, pooled = dit.context_of(text, learning.text_encoder_2, captions)
        counted = learning.transformer(latents, context, pooled, timesteps).sample
    assert context.shape[1] == 33 and conditioning["encoder_hidden_states"].shape[1] == 32 + 256
    assert_close(counted, expected)


def test_autoencoder_resumes_bit_for_bit(tmp_path) -> None:
    pictures = torch.randint(0, 256, (3, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    recipe = replace(AUTOENCODER, steps=3)
    expected = run.train_autoencoder(pictures, recipe, tmp_path / "a").state_dict()
    (tmp_path / "a" / "step-00000003" / "manifest.json").unlink()
    assert_identical(run.train_autoencoder(pictures, recipe, tmp_path / "a").state_dict(), expected)


def test_whitening_changes_the_latents_scale_and_not_the_picture() -> None:
    torch.manual_seed(0)
    vae = build_autoencoder().eval()
    pictures = torch.randint(0, 256, (4, 3, 128, 128), dtype=torch.uint8)
    latents = encode_pictures(vae, pictures)
    with torch.no_grad():
        before = vae.decode(latents).sample
        white = whiten(vae, latents)
        after = vae.decode(white).sample
    assert_close(white.mean((0, 2, 3)), torch.zeros(8))
    assert_close(white.std((0, 2, 3)), torch.ones(8))
    torch.testing.assert_close(encode_pictures(vae, pictures), white, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_patches_are_the_blocks_of_the_picture_row_by_row() -> None:
    latents = torch.arange(2 * 8 * 16 * 16, dtype=torch.float32).reshape(2, 8, 16, 16)
    cut = patches(latents)
    assert cut.shape == (2, 16, 128)
    for index in range(16):
        y, x = 4 * (index // 4), 4 * (index % 4)
        assert_identical(cut[:, index], latents[:, :, y : y + 4, x : x + 4].flatten(1))
