"""One direction, `PersonaVector`, and the algebra it shares with `PersonaVectors`: `-v`, `2 * v`, `v + w`, `v - w`.

An operator writes what it did into the trait's name, so that a plot or a file made from `evil - optimistic` says so.
The projection of an activation a on a vector v is the scalar a . v / |v| (arXiv:2507.21509, section 3.3).
"""

import hashlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from statistics import fmean
from typing import Any, Literal, TypeVar

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from persona_lens.models.structure import Model, ModelIdentity, identify
from persona_lens.storage.text import refuse_controls
from persona_lens.vectors.directions import norms, orthonormal_basis, owned, refuse_non_finite, units
from persona_lens.vectors.provenance import Provenance, Relation, check_model

Vector = TypeVar("Vector", bound="VectorAlgebra")


class VectorAlgebra:
    """The operators of a vector space, made from `_map` over one vector's tensors and `_zip` over those of two."""

    trait: str
    provenance: Provenance | None
    d_model: Any

    def check(self, model: Model | ModelIdentity, *, allow_other_model: bool = False) -> Relation:
        """Refuse a model (or what `identify` says of it) that this does not belong to; say how an accepted one relates.

        Returns:
            `same` for equal weights, `adapted` for a finetuned or adapted model of the same base, `other` for an
            unrelated one that `allow_other_model` let through, `unknown` without a provenance.

        Raises:
            ValueError: The model has another d_model, n_layers, hook point or residual basis, or is unrelated.
        """
        return check_model(
            model if isinstance(model, ModelIdentity) else identify(model),
            self.trait,
            self.provenance,
            d_model=self.d_model,
            n_layers=getattr(self, "n_layers", self.provenance and self.provenance.model.n_layers),
            allow_other_model=allow_other_model,
        )

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


Position = Literal["response_mean", "prompt_mean", "prompt_last"]


@dataclass(frozen=True, eq=False)
class PersonaVector(VectorAlgebra):
    """The direction of one trait at the output of one block; `-v`, `2 * v`, `v / 2`, `v + w`, `v - w` are vectors too.

    Attributes:
        trait: The trait it points to; an operator writes down what it did (`-evil`, `evil + optimistic`).
        layer: The block, counted from 0.
        direction: From responses without the trait to responses with it; not normalised.
        residual_norm: Mean norm of the residual stream at this layer; None where it was not measured.
        position: The tokens whose activations were averaged.
        provenance: Where it came from; None where that is unknown.
    """

    trait: str
    layer: int
    direction: Float[Tensor, " d_model"]
    _: KW_ONLY
    residual_norm: float | None = None
    position: Position = "response_mean"
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        refuse_controls("The name of a trait", self.trait)
        if self.direction.ndim != 1:
            shape = list(self.direction.shape)
            raise ValueError(f"{self.trait}: one layer's direction has shape [d_model], got {shape}: pass one row.")
        object.__setattr__(self, "direction", owned(self.direction))
        refuse_non_finite(self._as_row(), self.trait, first_layer=self.layer)

    def __repr__(self) -> str:
        model = f", model={self.provenance.model.name!r}" if self.provenance else ""
        return f"PersonaVector({self.trait!r}, layer={self.layer}, d_model={self.d_model}, norm={self.norm:.4g}{model})"

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.direction.shape[0]

    @property
    def norm(self) -> float:
        """Euclidean norm of the direction."""
        return float(norms(self.direction))

    @property
    def fingerprint(self) -> str:
        """A short hash of the layer and the direction's exact numbers: vectors that act alike have the same one."""
        return hashlib.sha256(f"{self.layer}\0".encode() + self.direction.numpy().tobytes()).hexdigest()[:8]

    @property
    def unit(self) -> "PersonaVector":
        """The same direction with norm 1; a zero direction has none and raises a ValueError."""
        row = units(self._as_row(), self.trait, first_layer=self.layer)
        return replace(self, direction=rearrange(row, "1 d_model -> d_model"))

    def project(self, activations: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """Scalar projection a . v / |v| of each activation, in float32, on the activations' device."""
        width = activations.shape[-1]
        if width != self.d_model:
            raise ValueError(
                f"{self.trait}: the vector is {self.d_model} wide and the activations are {width}: "
                "take them from the model that the vector came from."
            )
        unit = self.unit.direction.to(activations.device)
        return einsum(activations.float(), unit, "... d_model, d_model -> ...")

    def cosine_similarity(self, other: "PersonaVector") -> float:
        """Cosine of the angle to another vector, at the same layer or another."""
        refuse_unlike(self, other, "d_model")
        return float(einsum(self.unit.direction, other.unit.direction, "d_model, d_model ->").clamp(-1, 1))

    def orthogonal_to(self, *others: "PersonaVector") -> "PersonaVector":
        """The vector without its component in the span of others, so that each can be steered or capped by itself.

        Raises ValueError where nothing is left of it. Source: orthogonalised steering, arXiv:2603.03326.
        """
        if not others:
            raise ValueError(f"{self.trait}: pass the vectors that it is to be orthogonal to, got none.")
        for other in others:
            refuse_unlike(self, other, "d_model", "layer")
        basis = orthonormal_basis(torch.stack([other.unit.direction for other in others]))
        own = self.direction.double()
        inside = einsum(own, basis, "d_model, span d_model -> span")
        rest = own - einsum(inside, basis, "span, span d_model -> d_model")
        if float(rest.norm()) <= 1e-6 * self.norm:
            raise ValueError(f"{self.trait}: nothing of it is orthogonal to {', '.join(o.trait for o in others)}.")
        names = ", ".join(other.trait for other in others)
        return replace(self, trait=f"({self.trait} without {names})", direction=rest.float())

    def check(self, model: Model | ModelIdentity, *, allow_other_model: bool = False) -> Relation:
        """As `PersonaVectors.check`; a layer that the model does not have is refused too."""
        identity = model if isinstance(model, ModelIdentity) else identify(model)
        relation = super().check(identity, allow_other_model=allow_other_model)
        refuse_absent_layer(self.trait, self.layer, identity.n_layers)
        return relation

    def _as_row(self) -> Float[Tensor, "1 d_model"]:
        return rearrange(self.direction, "d_model -> 1 d_model")

    def _map(self, function: Callable[[Tensor], Tensor], trait: str) -> "PersonaVector":
        return replace(self, trait=trait, direction=function(self.direction))

    def _zip(self, other: "PersonaVector", function: Callable[[Tensor, Tensor], Tensor], trait: str) -> "PersonaVector":
        refuse_unlike(self, other, "d_model", "layer", "position")
        measured = [each.residual_norm for each in (self, other) if each.residual_norm is not None]
        return replace(
            self,
            trait=trait,
            direction=function(self.direction, other.direction),
            residual_norm=fmean(measured) if measured else None,
            provenance=joint_provenance(self, other),
        )


def units_of(vectors: Sequence[PersonaVector]) -> Float[Tensor, "vector d_model"]:
    """Each direction divided by its norm; a direction of zeros raises a ValueError that names its layer."""
    for vector in vectors:
        if vector.norm == 0:
            raise ValueError(
                f"{vector.trait}: the direction at layer {vector.layer} is exactly zero and has no unit vector: "
                "leave that layer out."
            )
    rows = torch.stack([vector.direction for vector in vectors]).double()
    return rows / rearrange(torch.linalg.vector_norm(rows, dim=-1), "vector -> vector 1")


def refuse_absent_layer(trait: str, layer: int, n_layers: int) -> None:
    """Raise a ValueError unless `layer` is one of `n_layers`, counted from 0."""
    if not 0 <= layer < n_layers:
        raise ValueError(
            f"{trait}: layer {layer} is outside 0 to {n_layers - 1}; "
            "layers count from 0 here, so the paper's layer 20 is 19 (from_paper_layer)."
        )
