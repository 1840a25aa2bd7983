"""A layer that stands in for its base and has its parameters as its own, under the names they have without it.

To a model it is the base: `save_pretrained` writes a base that can be loaded again, a base's state dict can be loaded,
`to_q.weight` is found where it was, and what moves parameters about (offloading, casts) finds one layer, not two.
"""

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn


class Transparent(nn.Module):
    """A module with the very parameters of its `base`, which is kept as a plain attribute and is no child of it."""

    base: Any

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "base", base)
        self._parameters = base._parameters

    def __getattr__(self, name: str) -> Any:
        """What models ask a layer beside its parameters: `in_features`, `kernel_size`, `num_embeddings`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base" not in vars(self):
                raise
            return getattr(self.base, name)

    @property
    def weight(self) -> Any:
        """The base's weight."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias; None where its kind has none."""
        return getattr(self.base, "bias", None)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The base's own, then the children's."""
        destination = self.base.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name, module in self.named_children():
            module.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
        return destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """As every module does; who watches the base's loading is asked as well."""
        for hook in self.base._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, *rest)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def train(self, mode: bool = True) -> Self:
        """Train or evaluate, the base too."""
        self.base.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts: of the base, which has the parameters, then of everything else here."""
        self.base._apply(fn, recurse)
        own, self._parameters = self._parameters, {}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters = own
        return self
