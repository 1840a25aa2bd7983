"""The makers' names of models' layers: one file per architecture, one entry here."""

from dora_diffusion.formats.layouts.record import Fusion, Layout

__all__ = ["LAYOUTS", "Fusion", "Layout"]

LAYOUTS: tuple[Layout, ...] = ()
