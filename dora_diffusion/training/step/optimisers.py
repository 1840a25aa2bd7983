"""The optimiser over what is trained, with each part's own rate and decay."""

from typing import Any

import torch

from dora_diffusion.training.base.trainable import TrainablePipeline, own_setting
from dora_diffusion.training.config import OptimConfig, WordsConfig


def build_optimizer(trainable: TrainablePipeline, optim: OptimConfig, words: WordsConfig) -> torch.optim.AdamW:
    """AdamW with each component's own rate; B has LoRA+'s ratio, magnitudes a multiplier and no weight decay."""
    groups: list[dict[str, Any]] = []
    for name, injection in trainable.injections.items():
        is_text = name != trainable.family.denoiser.name
        rate = own_setting(optim.text_encoder_learning_rate if is_text else None, name, optim.learning_rate)
        decay = optim.weight_decay
        groups.append({"params": injection.downs(), "lr": rate, "weight_decay": decay})
        groups.append({"params": injection.ups(), "lr": rate * optim.loraplus_lr_ratio, "weight_decay": decay})
        if magnitudes := injection.magnitudes():
            groups.append({"params": magnitudes, "lr": rate * optim.magnitude_lr_multiplier, "weight_decay": 0.0})
    if trainable.words is not None:
        until = max(1, round(words.share * optim.steps))
        rate = optim.words_learning_rate
        groups.append({"params": trainable.words.parameters(), "lr": rate, "weight_decay": 0.0, "until": until})
    return torch.optim.AdamW(groups)
