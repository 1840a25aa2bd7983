"""A tiny pipeline with random weights for every family, and for every variant that takes another path.

Every file of this folder with a `PIPELINES` is found by itself.
"""

from importlib import import_module
from pkgutil import iter_modules

from tests.families.pipelines.record import Tiny

_MODULES = [import_module(f"{__name__}.{file.name}") for file in iter_modules(__path__)]

PIPELINES: dict[str, Tiny] = {
    name: tiny for module in _MODULES for name, tiny in getattr(module, "PIPELINES", {}).items()
}
