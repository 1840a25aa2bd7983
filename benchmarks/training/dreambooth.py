"""A step of diffusers' DreamBooth-LoRA recipe, said again in our words.

What is said again is `examples/dreambooth/train_dreambooth_lora.py` of huggingface/diffusers at commit 58eb52c
(2026-08-23), which no release of the library contains: LoRA by PEFT on the UNet's attention layers, every picture read,
scaled, cropped and put through the VAE at every step, the prompt through the text encoder at every step unless
`--pre_compute_text_embeddings` is given, AdamW, gradients cut to length 1, a constant rate. Its defaults are kept where
nothing else is said; its prior preservation, validation, checkpoints, trackers and progress bar are left out, as they
are on our side. The script crops with torchvision, which is no dependency of ours: PIL does the same here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from PIL import Image
from PIL.ImageOps import exif_transpose
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.training.clock import Stopwatch

TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]


@dataclass(frozen=True)
class Recipe:
    """The script's arguments that are not at their defaults.

    Attributes:
        pictures: --instance_data_dir.
        prompt: --instance_prompt.
        resolution: side of a picture in pixels.
        batch_size: --train_batch_size.
        rank: of the LoRA; its alpha is the same.
        precomputes_text: --pre_compute_text_embeddings.
    """

    pictures: Path
    prompt: str
    resolution: int
    batch_size: int
    rank: int
    precomputes_text: bool = False


class Examples(Dataset[dict[str, Tensor]]):
    """Pictures and what the prompt is encoded from; both made anew each time."""

    def __init__(self, recipe: Recipe, tokenizer: Any, embeddings: Tensor | None) -> None:
        self._recipe, self._tokenizer, self._embeddings = recipe, tokenizer, embeddings
        self._paths = sorted(recipe.pictures.glob("*.png"))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        picture = exif_transpose(Image.open(self._paths[index])).convert("RGB")
        text = tokens(self._tokenizer, self._recipe.prompt) if self._embeddings is None else self._embeddings
        return {"pixels": pixels_of(picture, self._recipe.resolution), "text": text}


def pixels_of(picture: Image.Image, side: int) -> Tensor:
    """The shorter side scaled to `side`, a random square of it, in [-1, 1]: (3, side, side) fp32."""
    scale = side / min(picture.size)
    width, height = (max(side, round(scale * length)) for length in picture.size)
    left, top = (int(torch.randint(0, room + 1, ())) for room in (width - side, height - side))
    scaled = picture.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous().float().div(255).sub(0.5).div(0.5)


def tokens(tokenizer: Any, prompt: str) -> Tensor:
    """(1, length) token ids of a prompt."""
    length = tokenizer.model_max_length
    return tokenizer(prompt, truncation=True, padding="max_length", max_length=length, return_tensors="pt").input_ids


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch."""
    pixels = torch.stack([example["pixels"] for example in examples]).contiguous().float()
    return {"pixels": pixels, "text": torch.cat([example["text"] for example in examples])}


class DreamBoothLora:
    """The recipe on a pipeline's own models.

    Args:
        pipe: of SD1.5's kind, frozen, the LoRA's layers in its UNet.
        recipe: the arguments.
        watch: told when the backward pass begins and ends.
    """

    def __init__(self, pipe: Any, recipe: Recipe, watch: Stopwatch) -> None:
        self._pipe, self._recipe, self._watch = pipe, recipe, watch
        self.parameters = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
        self._noise = DDPMScheduler.from_config(pipe.scheduler.config)
        optimizer = torch.optim.AdamW(self.parameters, lr=5e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        watch.notes("optimiser", optimizer)
        rates = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0, num_training_steps=1000)
        with torch.no_grad():
            embeddings = self._encoded(tokens(pipe.tokenizer, recipe.prompt)) if recipe.precomputes_text else None
        examples = Examples(recipe, pipe.tokenizer, embeddings)
        loader = DataLoader(examples, batch_size=recipe.batch_size, shuffle=True, collate_fn=collate)
        self._accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1)
        self._unet, self._optimizer, self._loader, self._rates = self._accelerator.prepare(
            pipe.unet, optimizer, loader, rates
        )
        self._batches = self._epochs()

    def _epochs(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self._loader

    def _encoded(self, ids: Tensor) -> Tensor:
        return self._pipe.text_encoder(ids, attention_mask=None, return_dict=False)[0]

    def _latents(self, pixels: Tensor) -> Tensor:
        return self._pipe.vae.encode(pixels).latent_dist.sample() * self._pipe.vae.config.scaling_factor

    def take(self) -> float:
        """One step; returns its loss."""
        batch = self._watch.around("batch", next)(self._batches)
        with self._accelerator.accumulate(self._unet):
            loss = self._loss(batch)
            self._watch.around("backward", self._accelerator.backward)(loss)
            if self._accelerator.sync_gradients:
                self._accelerator.clip_grad_norm_(self.parameters, 1.0)
            self._optimizer.step()
            self._rates.step()
            self._optimizer.zero_grad()
        return loss.detach().item()

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        latents = self._watch.around("batch", self._latents)(batch["pixels"])
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self._noise.config.num_train_timesteps, (len(latents),)).long()
        noisy = self._noise.add_noise(latents, noise, timesteps)
        read = (lambda text: text) if self._recipe.precomputes_text else self._encoded
        text = self._watch.around("batch", read)(batch["text"])
        predicted = self._unet(noisy, timesteps, text, class_labels=None, return_dict=False)[0]
        if self._noise.config.prediction_type == "v_prediction":
            return F.mse_loss(predicted.float(), self._noise.get_velocity(latents, noise, timesteps).float())
        return F.mse_loss(predicted.float(), noise.float())


def lora_layers(unet: nn.Module, rank: int) -> dict[str, nn.Module]:
    """PEFT's LoRA layers as the script puts them into a UNet, by path; they stand in it afterwards."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, init_lora_weights="gaussian", target_modules=TARGETS)
    unet.requires_grad_(False)
    unet.add_adapter(config)
    return {path: layer for path, layer in unet.named_modules() if isinstance(layer, LoraLayer)}
