"""What a forward pass left behind, by hook name: TransformerLens's `ActivationCache`, or any mapping like it.

Knows nothing about vectors.
"""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Cache(Protocol):
    """Activations by hook name: TransformerLens's `ActivationCache`, or a dict."""

    def keys(self) -> Iterable[str]:
        """The hook names."""
        ...

    def __getitem__(self, name: str, /) -> Tensor: ...
