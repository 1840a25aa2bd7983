"""Bases: a pipeline loaded from wherever it lies, its parts, its weights, and new words for its text encoders."""

from dora_diffusion.pipelines.loading import load_pipeline

__all__ = ["load_pipeline"]
