"""The three interventions, each a value with a pure function of the residual stream h at the output of a block.

Steer: h + coefficient * v (arXiv:2507.21509, section 3.2). Ablate: h without its component in the directions, or with
that of given activations (zero ablation while finetuning is CAFT, section J.4). Cap: h with its projection held within
bounds (activation capping, arXiv:2601.10387).
Knows nothing about hooks, caches or which forward pass runs.
"""

from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any, ClassVar

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from persona_lens.interventions.directions import ORTHOGONAL, as_given, layers_text, overlap
from persona_lens.interventions.intervention import Intervention, Residual
from persona_lens.models.structure import ModelIdentity
from persona_lens.vectors.directions import orthonormal_basis
from persona_lens.vectors.persona_vector import units_of
from persona_lens.vectors.persona_vectors import PersonaVectors
from persona_lens.vectors.provenance import Relation


@dataclass(frozen=True, eq=False)
class Steer(Intervention):
    """Add `coefficient` times each vector to the residual stream at its layer. Source: arXiv:2507.21509, section 3.2.

    Vectors are taken as they are, not normalised, so 1.0 moves a token by the whole difference in means; with
    `vectors.incremental()` every layer is steered at once (section J.3). A coefficient matrix steers the rows of one
    batch differently: [row, vector], one column for each vector in order (for `PersonaVectors`, for each layer), or
    [row] where there is one vector.
    """

    coefficient: float | Float[Tensor, "row vector"] | Float[Tensor, " row"] = 1.0
    kind: ClassVar[str] = "steer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.coefficient, Tensor):
            if not isfinite(self.coefficient):
                raise ValueError(f"{self.traits}: the coefficient is a finite number, got {self.coefficient}.")
            object.__setattr__(self, "coefficient", float(self.coefficient))
            return
        table = self.coefficient.detach().to("cpu", torch.float32).clone()
        if table.ndim == 1 and len(self.each) == 1:
            table = rearrange(table, "row -> row 1")
        if table.ndim != 2 or table.shape[1] != len(self.each) or not len(table):
            raise ValueError(
                f"{self.traits}: coefficients have shape [row, {len(self.each)}], a column for each vector, "
                f"got {list(self.coefficient.shape)}."
            )
        if not bool(table.isfinite().all()):
            raise ValueError(f"{self.traits}: the coefficients hold NaN or infinite values.")
        object.__setattr__(self, "coefficient", table)

    @property
    def n_rows(self) -> int | None:
        """The rows of its coefficient matrix; None where one coefficient is for all."""
        return len(self.coefficient) if isinstance(self.coefficient, Tensor) else None

    @cached_property
    def acting_layers(self) -> tuple[int, ...]:
        """The layers with a coefficient that is not zero: at the others it is the identity, bit for bit."""
        if not isinstance(self.coefficient, Tensor):
            return self.layers if self.coefficient else ()
        acting = (self.coefficient != 0).any(dim=0).tolist()
        return tuple(sorted({vector.layer for vector, acts in zip(self.each, acting, strict=True) if acts}))

    @property
    def doses(self) -> tuple[float | None, ...]:
        """Relative dose of each vector: coefficient * |v| / |h|, |h| being the residual norm stored at extraction.

        None where that norm is unknown. Raises ValueError for a coefficient matrix.
        """
        if isinstance(self.coefficient, Tensor):
            raise ValueError(f"{self.traits}: rows with coefficients of their own have no common dose.")
        coefficient = self.coefficient
        return tuple(each.residual_norm and coefficient * each.norm / each.residual_norm for each in self.each)

    def _change(self, resid: Residual, layer: int, rows: Int[Tensor, " batch"] | None) -> Residual:
        if not isinstance(self.coefficient, Tensor):
            return resid + self._place("delta", layer, resid)
        return resid + self._row_deltas(resid, layer, rows)

    def _row_deltas(
        self, resid: Residual, layer: int, rows: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch 1 d_model"]:
        """What is added to each row of a batch, kept because a decode loop asks for the same rows step after step."""
        key = (layer, resid.device, resid.dtype)
        held = self._held.get(key)
        if held is None or held[0] is not rows or len(held[1]) != len(resid):
            self._refuse_unfitting(len(resid), rows)
            work = _wide(resid)
            table, directions = self._place("coefficients", layer, work), self._place("directions", layer, work)
            with torch.inference_mode(False):
                chosen = table if rows is None else table[rows.to(table.device)]
                delta = einsum(chosen, directions, "batch vector, vector d_model -> batch d_model")
                held = (rows, rearrange(delta, "batch d_model -> batch 1 d_model").to(resid.dtype))
            self._held[key] = held
        return held[1]

    def _refuse_unfitting(self, batch: int, rows: Int[Tensor, " batch"] | None) -> None:
        count = self.n_rows or 0
        if (batch != count) if rows is None else (int(rows.max()) >= count):
            got = f"a batch of {batch}" if rows is None else f"row {int(rows.max())}"
            raise ValueError(
                f"{self.traits}: coefficients for {count} rows meet {got}: pass a row for each of the batch."
            )

    @cached_property
    def _held(self) -> dict[Any, tuple[Tensor | None, Tensor]]:
        return {}

    def _constant(self, name: str, layer: int) -> Tensor:
        columns = self._at(layer)
        if name == "coefficients":
            assert isinstance(self.coefficient, Tensor)
            return self.coefficient[:, columns]
        directions = torch.stack([self.each[index].direction for index in columns]).double()
        return directions if name == "directions" else self.coefficient * directions.sum(dim=0)

    def __str__(self) -> str:
        what = f"steer {self.traits} at {layers_text(self.layers)}"
        if isinstance(self.coefficient, Tensor):
            return f"{what}, {len(self.coefficient)} rows by coefficients of their own{self._suffix()}"
        known = [dose for dose in self.doses if dose is not None]
        dose = f" ({max(known, key=abs):+.2f} of the residual norm)" if known else ""
        return f"{what} by {self.coefficient:g}{dose}{self._suffix()}"


@dataclass(frozen=True, eq=False)
class Ablate(Intervention):
    """Remove the residual stream's component along the vectors, at each layer along those that belong to it.

    Several vectors at one layer are removed together, as the subspace that they span. With `around`, activations
    [layer, d_model] with a row for every layer of the model ([d_model] where one layer is ablated), the component
    becomes theirs instead of zero: ablation around a mean.
    """

    around: Float[Tensor, "layer d_model"] | Float[Tensor, " d_model"] | None = None
    kind: ClassVar[str] = "ablate"

    def __post_init__(self) -> None:
        super().__post_init__()
        units_of(self.each)  # a direction of zeros is refused now, not in the middle of a forward pass
        if self.around is None:
            return
        known = [given.n_layers for given in as_given(self.vectors) if isinstance(given, PersonaVectors)]
        self._check_around(known[0] if known else None)
        if not bool(self.around.isfinite().all()):
            raise ValueError(f"{self.traits}: `around` holds NaN or infinite values.")
        object.__setattr__(self, "around", self.around.detach().to("cpu", torch.float32).clone())

    def _check_around(self, n_layers: int | None) -> None:
        """Refuse activations that have not a row for each layer, such as hidden states with the embedding first."""
        if self.around is None:
            return
        width, shape = self.each[0].d_model, list(self.around.shape)
        rows_fit = len(self.layers) == 1 if len(shape) == 1 else shape[0] == (n_layers or shape[0]) > max(self.layers)
        if shape[-1] != width or len(shape) > 2 or not rows_fit:
            raise ValueError(
                f"{self.traits}: `around` has shape [layer, {width}] with a row for every layer of the model, or "
                f"[{width}] for one ablated layer; got {shape} for {layers_text(self.layers)}"
                + (f" of {n_layers}." if n_layers else ".")
            )

    def check_identity(self, found: ModelIdentity, *, allow_other_model: bool = False) -> tuple[Relation, ...]:
        """As `check`, for a model that was identified already."""
        self._check_around(found.n_layers)
        return super().check_identity(found, allow_other_model=allow_other_model)

    def _change(self, resid: Residual, layer: int, rows: Int[Tensor, " batch"] | None) -> Residual:
        work = _wide(resid)
        basis = self._place("basis", layer, work)
        excess = work if self.around is None else work - self._place("around", layer, work)
        inside = einsum(excess, basis, "batch pos d_model, span d_model -> batch pos span")
        return (work - einsum(inside, basis, "batch pos span, span d_model -> batch pos d_model")).to(resid.dtype)

    def _constant(self, name: str, layer: int) -> Tensor:
        if name == "basis":
            return orthonormal_basis(units_of([self.each[index] for index in self._at(layer)]))
        assert self.around is not None
        return self.around if self.around.ndim == 1 else self.around[layer]

    def __str__(self) -> str:
        centre = "" if self.around is None else " around given activations"
        return f"ablate {self.traits} at {layers_text(self.layers)}{centre}{self._suffix()}"


@dataclass(frozen=True, eq=False)
class Cap(Intervention):
    """Hold the scalar projection on each vector, at its layer, within `maximum`, `minimum` or both.

    A bound is in the units of `vector.project`: one for all, or [vector], one for each in order. Activations within
    their bounds are left as they are. Two vectors at one layer must be orthogonal, since otherwise one cap undoes the
    other. Raises ValueError for bounds that no projection can meet.
    """

    maximum: float | Float[Tensor, " vector"] | None = None
    minimum: float | Float[Tensor, " vector"] | None = None
    kind: ClassVar[str] = "cap"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.maximum is None and self.minimum is None:
            raise ValueError(f"{self.traits}: a cap needs a bound: pass maximum=, minimum= or both.")
        for name in ("maximum", "minimum"):
            self._check_bound(name)
        low, high = self._bounds("minimum"), self._bounds("maximum")
        if bool((low > high).any()):
            worst = int((low - high).argmax())
            raise ValueError(
                f"{self.traits}: these caps conflict: minimum {low[worst]:g} is above maximum {high[worst]:g}."
            )
        refuse_conflicting_caps([self])

    def _check_bound(self, name: str) -> None:
        bound = getattr(self, name)
        if isinstance(bound, Tensor):
            if bound.shape != (len(self.each),):
                raise ValueError(
                    f"{self.traits}: {name} is one number, or [{len(self.each)}] for its vectors, "
                    f"got shape {list(bound.shape)}."
                )
            object.__setattr__(self, name, bound.detach().to("cpu", torch.float32).clone())
        if bound is not None and not bool(torch.as_tensor(bound).isfinite().all()):
            raise ValueError(f"{self.traits}: {name} is finite, or None where there is no such bound; got {bound}.")

    def _bounds(self, name: str) -> Float[Tensor, " vector"]:
        bound = getattr(self, name)
        missing = torch.inf if name == "maximum" else -torch.inf
        return torch.as_tensor(missing if bound is None else bound, dtype=torch.float64).expand(len(self.each))

    def _change(self, resid: Residual, layer: int, rows: Int[Tensor, " batch"] | None) -> Residual:
        work = _wide(resid)
        units = self._place("units", layer, work)
        projection = einsum(work, units, "batch pos d_model, vector d_model -> batch pos vector")
        held = projection.clamp(self._place("minimum", layer, work), self._place("maximum", layer, work))
        change = einsum(held - projection, units, "batch pos vector, vector d_model -> batch pos d_model")
        return (work + change).to(resid.dtype)

    def _constant(self, name: str, layer: int) -> Tensor:
        if name == "units":
            return units_of([self.each[index] for index in self._at(layer)])
        return self._bounds(name)[self._at(layer)]

    def __str__(self) -> str:
        bounds = [
            f"{name} {bound:g}" if not isinstance(bound, Tensor) else f"a {name} for each"
            for name, bound in (("minimum", self.minimum), ("maximum", self.maximum))
            if bound is not None
        ]
        return f"cap {self.traits} at {layers_text(self.layers)}, {' and '.join(bounds)}{self._suffix()}"


def refuse_conflicting_caps(caps: list[Cap]) -> None:
    """Raise ValueError where caps that act together hold directions at one layer that are not orthogonal."""
    for layer in sorted({layer for cap in caps for layer in cap.layers}):
        here = [cap.each[index] for cap in caps for index in cap._at(layer)]
        cosine = overlap(units_of(here))
        if cosine > ORTHOGONAL:
            names = ", ".join(vector.trait for vector in here)
            raise ValueError(
                f"These caps conflict: the directions at layer {layer} ({names}) are not orthogonal "
                f"(|cosine| {cosine:.2g}), so one cap would undo the other: make them orthogonal first "
                "(vector.orthogonal_to), or nest two contexts, of which the inner one has the last word."
            )


def _wide(resid: Residual) -> Residual:
    """At least float32: in half precision a component along a direction cannot be taken out exactly."""
    return resid.float() if resid.dtype in (torch.float16, torch.bfloat16) else resid
