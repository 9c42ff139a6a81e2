"""Persona vectors as a vector space: `-v`, `2 * v`, `v / 2`, `v + w`, `v - w`, and which two may be combined.

An operator writes what it did into the trait's name, so that a plot or a file made from `evil - optimistic` says so.
Knows nothing about layers: a subclass maps a function over its own tensors.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from persona_lens.vectors.provenance import Provenance

Vector = TypeVar("Vector", bound="VectorAlgebra")


class VectorAlgebra:
    """The operators of a vector space, made from `_map` over one vector's tensors and `_zip` over those of two."""

    trait: str
    provenance: Provenance | None

    def _map(self: Vector, function: Callable[[Tensor], Tensor], trait: str) -> Vector:
        raise NotImplementedError

    def _zip(self: Vector, other: Any, function: Callable[[Tensor, Tensor], Tensor], trait: str) -> Vector:
        raise NotImplementedError

    def __neg__(self: Vector) -> Vector:
        undone = self.trait.startswith("-") and " " not in self.trait
        return self._map(operator.neg, self.trait[1:] if undone else f"-{_grouped(self.trait)}")

    def __mul__(self: Vector, factor: float) -> Vector:
        if not isinstance(factor, float | int):
            return NotImplemented
        return self._map(lambda tensor: factor * tensor, f"{factor:g} * {_grouped(self.trait)}")

    __rmul__ = __mul__

    def __truediv__(self: Vector, divisor: float) -> Vector:
        if not isinstance(divisor, float | int):
            return NotImplemented
        return self._map(lambda tensor: tensor / divisor, f"{_grouped(self.trait)} / {divisor:g}")

    def __add__(self: Vector, other: Vector) -> Vector:
        if type(other) is not type(self):
            return NotImplemented
        return self._zip(other, operator.add, f"{self.trait} + {_grouped(other.trait)}")

    def __sub__(self: Vector, other: Vector) -> Vector:
        if type(other) is not type(self):
            return NotImplemented
        return self._zip(other, operator.sub, f"{self.trait} - {_grouped(other.trait)}")


def _grouped(trait: str) -> str:
    return f"({trait})" if " " in trait else trait


def refuse_unlike(left: VectorAlgebra, right: VectorAlgebra, *facts: str) -> None:
    """Raise a ValueError unless both agree in `facts` (attributes) and, where known, in base model and basis."""
    pair = f"{left.trait} and {right.trait}"
    for fact in facts:
        ours, theirs = getattr(left, fact), getattr(right, fact)
        if ours != theirs:
            raise ValueError(f"{pair} differ in {fact} ({ours} and {theirs}): combine or compare like with like.")
    if left.provenance is None or right.provenance is None:
        return
    ours, theirs = left.provenance.model, right.provenance.model
    if ours.residual_basis != theirs.residual_basis:
        raise ValueError(
            f"{pair} differ in residual basis ({ours.residual_basis} and {theirs.residual_basis}): "
            "extract both from models with equally processed weights."
        )
    if left.provenance.relation_to(theirs) == "other":
        raise ValueError(
            f"{pair} come from unrelated models ({ours.name} and {theirs.name}): extract both from one model, "
            "or drop what is known of one with dataclasses.replace(vectors, provenance=None)."
        )


def joint_provenance(left: VectorAlgebra, right: VectorAlgebra) -> Provenance | None:
    """The left one's, with both sides' settings; None if either is unknown, for then so is their sum's."""
    if left.provenance is None or right.provenance is None:
        return None
    return replace(
        left.provenance, settings={"combined": {"left": left.provenance.settings, "right": right.provenance.settings}}
    )
