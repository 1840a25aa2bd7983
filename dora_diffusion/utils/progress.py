"""How work that takes long tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""How much is done, how much there is: layers, or bytes where that is said."""

LayerProgress = Callable[[int, int, str], None]
"""Called after every layer: how many are done, how many there are, the layer's path."""
