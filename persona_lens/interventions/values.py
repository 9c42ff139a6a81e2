"""Steer, Ablate and Cap: frozen values, each with a pure `apply` to the residual stream h at the output of a block.

Steer: h + coefficient * v (arXiv:2507.21509, section 3.2). Ablate: h without its component in the directions, or with
that of given activations (zero ablation while finetuning is CAFT, section J.4). Cap: h with its projection kept within
bounds (activation capping, arXiv:2601.10387). hooks.py attaches them to a model.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from math import isfinite
from typing import Any, ClassVar

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_lens.interventions.records import (
    RECORD_VERSION,
    decode_value,
    decode_vectors,
    encode_value,
    encode_vectors,
)
from persona_lens.models.structure import Model, ModelIdentity, identify
from persona_lens.storage.files import DAMAGE
from persona_lens.vectors.directions import orthonormal_basis
from persona_lens.vectors.persona_vector import PersonaVector, units_of
from persona_lens.vectors.persona_vectors import PersonaVectors
from persona_lens.vectors.provenance import Relation

Vectors = PersonaVector | PersonaVectors | Sequence[PersonaVector | PersonaVectors]
Residual = Float[Tensor, "batch pos d_model"]
Rows = Int[Tensor, " batch"]

# The cosine below which directions count as orthogonal: what float32 leaves of orthogonalised ones.
_ORTHOGONAL = 1e-4
_SHARED_FIELDS = {"vectors", "when"}


def as_list(vectors: Vectors) -> list[PersonaVector | PersonaVectors]:
    """The vectors as a list; raises ValueError for an empty one and TypeError for anything else."""
    items = [vectors] if isinstance(vectors, PersonaVector | PersonaVectors) else list(vectors)
    if not items:
        raise ValueError("An intervention needs at least one vector, got none.")
    for item in items:
        if not isinstance(item, PersonaVector | PersonaVectors):
            raise TypeError(
                f"An intervention takes PersonaVector or PersonaVectors, got {type(item).__name__}: "
                "wrap a tensor of your own with PersonaVectors.from_directions."
            )
    return items


def layer_vectors(vectors: Vectors) -> tuple[PersonaVector, ...]:
    """The vectors one by one, `PersonaVectors` as those of all layers that they have."""
    flat: list[PersonaVector] = []
    for item in as_list(vectors):
        flat += [item] if isinstance(item, PersonaVector) else [item.at(layer) for layer in item.known_layers]
    return tuple(flat)


def layers_text(layers: Sequence[int]) -> str:
    """Layers as a person would write them: `layer 3`, `layers 3, 5`, `layers 0 to 29`."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)) and len(layers) > 2:
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"


@dataclass(frozen=True, eq=False)
class When:
    """Act only on tokens whose projection on the vector of their layer passes a threshold.

    The projection is that of the residual stream as the intervention meets it.

    Attributes:
        vectors: One vector for each layer that the intervention acts on.
        above: The scalar projection must be greater; None for no such bound.
        below: The scalar projection must be smaller; None for no such bound.
    """

    vectors: Vectors
    _: KW_ONLY
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        if self.above is None and self.below is None:
            raise ValueError("A condition needs a threshold: pass above=, below= or both.")
        flat = layer_vectors(self.vectors)
        if len(self.probes) < len(flat):
            raise ValueError("A condition takes one vector a layer, got several at one: pass one of them.")
        units_of(flat)  # a direction of zeros is refused now, not in the middle of a forward pass

    @cached_property
    def probes(self) -> dict[int, PersonaVector]:
        """The vector of each layer."""
        return {vector.layer: vector for vector in layer_vectors(self.vectors)}

    def holds(self, resid: Residual, *, layer: int) -> Bool[Tensor, "batch pos"]:
        """Which tokens meet the condition."""
        projection = self.probes[layer].project(resid)
        met = torch.ones_like(projection, dtype=torch.bool)
        if self.above is not None:
            met = met & (projection > self.above)
        if self.below is not None:
            met = met & (projection < self.below)
        return met

    def __str__(self) -> str:
        bounds = [f"{sign} {bound:g}" for sign, bound in ((">", self.above), ("<", self.below)) if bound is not None]
        return f"where {next(iter(self.probes.values())).trait} {' and '.join(bounds)}"


@dataclass(frozen=True, eq=False)
class Intervention:
    """What `Steer`, `Ablate` and `Cap` share: vectors with their layers, and a condition. Use one of those three."""

    vectors: Vectors
    _: KW_ONLY
    when: When | None = None
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        widths = sorted({vector.d_model for vector in self.layer_vectors})
        if len(widths) > 1:
            raise ValueError(f"{self.traits}: the vectors are {widths} wide: take them from one model.")
        absent = set() if self.when is None else set(self.layers) - set(self.when.probes)
        if absent:
            raise ValueError(f"{self.traits}: the condition has no vector for layer {min(absent)}: pass one for each.")

    def apply(
        self,
        resid: Residual,
        positions: Bool[Tensor, "batch pos"] | None = None,
        *,
        layer: int | None = None,
        rows: Rows | None = None,
    ) -> Residual:
        """The residual stream with the intervention at `positions` (None: all); the input is left as it is.

        `layer` may be left out where the intervention has only one. `rows` say which row of a coefficient matrix each
        row of the batch is; by default they correspond one to one. Raises ValueError for another layer or width.
        """
        raise NotImplementedError

    @cached_property
    def layer_vectors(self) -> tuple[PersonaVector, ...]:
        """The vectors one by one, `PersonaVectors` as those of all layers that they have."""
        return layer_vectors(self.vectors)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers of its vectors, ascending."""
        return tuple(sorted({vector.layer for vector in self.layer_vectors}))

    @cached_property
    def acting_layers(self) -> tuple[int, ...]:
        """The layers at which it is not the identity."""
        return self.layers

    @property
    def n_rows(self) -> int | None:
        """How many rows have coefficients of their own; None where all rows are treated alike."""
        return None

    @cached_property
    def traits(self) -> str:
        """The traits of its vectors, in order."""
        return ", ".join(dict.fromkeys(vector.trait for vector in self.layer_vectors))

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of what it does; where its vectors come from does not count."""
        probes = [] if self.when is None else [probe.fingerprint for probe in self.when.probes.values()]
        bounds = self.when and (self.when.above, self.when.below)
        vectors = [vector.fingerprint for vector in self.layer_vectors]
        parts = [self.kind, list(self._settings().values()), vectors, probes, bounds]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]

    def check(self, model: Model | ModelIdentity, *, allow_other_model: bool = False) -> tuple[Relation, ...]:
        """Refuse a model that a vector does not belong to, as `PersonaVectors.check` does; a relation for each."""
        identity = model if isinstance(model, ModelIdentity) else identify(model)
        checked = as_list(self.vectors) + ([] if self.when is None else as_list(self.when.vectors))
        return tuple(vectors.check(identity, allow_other_model=allow_other_model) for vectors in checked)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON, directions included, so that a run records what was done; `from_dict` reads it."""
        when = self.when and {
            **encode_vectors(list(self.when.probes.values())),
            "above": self.when.above,
            "below": self.when.below,
        }
        shared = {"version": RECORD_VERSION, "kind": self.kind, **encode_vectors(self.layer_vectors)}
        return {**shared, **self._settings(), "when": when}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Intervention":
        """The intervention that `to_dict` recorded: of this class, or called on `Intervention` of any.

        Raises ValueError where the record is damaged, of another version or of another kind.
        """
        kinds: dict[str, Any] = {kind.kind: kind for kind in Intervention.__subclasses__() if issubclass(kind, cls)}
        header = record if isinstance(record, dict) else {}
        if header.get("version") != RECORD_VERSION or str(header.get("kind")) not in kinds:
            raise ValueError(
                f"Expected a record of version {RECORD_VERSION} and kind {' or '.join(kinds)}, got version "
                f"{header.get('version')} and kind {header.get('kind')!r}."
            )
        kind = kinds[record["kind"]]
        try:
            names = [field.name for field in fields(kind) if field.name not in _SHARED_FIELDS]
            own = {name: decode_value(record[name]) for name in names}
            when = record["when"]
            condition = when and When(decode_vectors(when), above=when["above"], below=when["below"])
            return kind(decode_vectors(record), **own, when=condition)
        except DAMAGE as error:
            raise ValueError(f"The record of an intervention is damaged: {error}") from error

    def _settings(self) -> dict[str, Any]:
        """The fields of its own kind, as JSON."""
        names = [field.name for field in fields(self) if field.name not in _SHARED_FIELDS]
        return {name: encode_value(getattr(self, name)) for name in names}

    def _suffix(self) -> str:
        return "" if self.when is None else f", {self.when}"

    def _own_layer(self, layer: int | None, resid: Residual) -> int:
        """The layer to act at. Raises ValueError where it, or the width of the stream, is not the vectors' own."""
        if layer is None and len(self.layers) == 1:
            layer = self.layers[0]
        if layer is None or layer not in self.layers:
            raise ValueError(f"{self.traits}: acts at {layers_text(self.layers)}, got layer={layer}.")
        if resid.shape[-1] != self.layer_vectors[0].d_model:
            raise ValueError(
                f"{self.traits}: the vectors are {self.layer_vectors[0].d_model} wide and the residual stream is "
                f"{resid.shape[-1]}: take them from the model that they came from."
            )
        return layer

    def _changed_at(
        self, positions: Bool[Tensor, "batch pos"] | None, resid: Residual, changed: Residual, layer: int
    ) -> Residual:
        """The changed stream where the positions and the condition say so, and the given one elsewhere."""
        if self.when is not None:
            met = self.when.holds(resid, layer=layer)
            positions = met if positions is None else met & positions.to(met.device)
        if positions is None:
            return changed
        return torch.where(rearrange(positions.to(resid.device), "batch pos -> batch pos 1"), changed, resid)

    def _columns(self, layer: int) -> list[int]:
        """Which of its vectors belong to a layer."""
        return [index for index, vector in enumerate(self.layer_vectors) if vector.layer == layer]

    def _constants(self, layer: int) -> tuple[Tensor, ...]:
        """The tensors that `apply` needs at a layer, in full precision on the CPU."""
        raise NotImplementedError

    @cached_property
    def _placed(self) -> dict[Any, tuple[Tensor, ...]]:
        return {}

    def _constants_like(self, resid: Residual, layer: int) -> tuple[Tensor, ...]:
        """The constants on the device and in the dtype of the activations, computed and copied there once."""
        key = (layer, resid.device, resid.dtype)
        if key not in self._placed:
            # Made under inference mode, where some models generate, a constant could not be trained through later.
            with torch.inference_mode(False):
                self._placed[key] = tuple(self._copied(constant, resid, layer) for constant in self._constants(layer))
        return self._placed[key]

    def _copied(self, constant: Tensor, resid: Residual, layer: int) -> Tensor:
        # First in its dtype, then to its device: some accelerators have no float64.
        placed = constant.to(resid.dtype).to(resid.device).clone()
        # The bound that a cap does not have is infinite from the start; anything else has overflowed.
        if bool((placed.isinf() & constant.isfinite().to(placed.device)).any()):
            raise ValueError(
                f"{self.traits}: at layer {layer} the intervention is too large for the model's {resid.dtype}: "
                "take a smaller coefficient, or load the model with a wider dtype (float32)."
            )
        return placed


@dataclass(frozen=True, eq=False)
class Steer(Intervention):
    """Add `coefficient` times each vector to the residual stream at its layer. Source: arXiv:2507.21509, section 3.2.

    Vectors are not normalised, so 1.0 moves a token by the whole difference in means; with `vectors.incremental()`
    every layer is steered at once (section J.3). A coefficient matrix steers the rows of one batch differently:
    [row, vector], one column for each vector in order (for `PersonaVectors`, for each layer), or [row] where there is
    one vector.
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
        table, n_vectors = self.coefficient.detach().to("cpu", torch.float32).clone(), len(self.layer_vectors)
        if table.ndim == 1 and n_vectors == 1:
            table = rearrange(table, "row -> row 1")
        if table.ndim != 2 or table.shape[1] != n_vectors or not len(table):
            raise ValueError(
                f"{self.traits}: coefficients have shape [row, {n_vectors}], a column for each vector, "
                f"got {list(self.coefficient.shape)}."
            )
        if not bool(table.isfinite().all()):
            raise ValueError(f"{self.traits}: the coefficients hold NaN or infinite values.")
        object.__setattr__(self, "coefficient", table)

    def apply(
        self,
        resid: Residual,
        positions: Bool[Tensor, "batch pos"] | None = None,
        *,
        layer: int | None = None,
        rows: Rows | None = None,
    ) -> Residual:
        """H + coefficient * v, see `Intervention.apply`."""
        layer = self._own_layer(layer, resid)
        if layer not in self.acting_layers:
            return resid
        if isinstance(self.coefficient, Tensor):
            delta = self._row_deltas(resid, layer, rows)
        else:
            (delta,) = self._constants_like(resid, layer)
        return self._changed_at(positions, resid, resid + delta, layer)

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
        return tuple(sorted({vector.layer for vector, acts in zip(self.layer_vectors, acting, strict=True) if acts}))

    @property
    def doses(self) -> tuple[float | None, ...]:
        """Relative dose of each vector: coefficient * |v| / |h|, |h| being the residual norm stored at extraction.

        None where that norm is unknown. Raises ValueError for a coefficient matrix.
        """
        if isinstance(self.coefficient, Tensor):
            raise ValueError(f"{self.traits}: rows with coefficients of their own have no common dose.")
        coefficient = self.coefficient
        return tuple(v.residual_norm and coefficient * v.norm / v.residual_norm for v in self.layer_vectors)

    def _constants(self, layer: int) -> tuple[Tensor, ...]:
        """`coefficient * v`, or the columns of the coefficient matrix and their directions."""
        columns = self._columns(layer)
        directions = torch.stack([self.layer_vectors[column].direction for column in columns]).double()
        if isinstance(self.coefficient, Tensor):
            return self.coefficient[:, columns], directions
        return (self.coefficient * directions.sum(dim=0),)

    def _row_deltas(self, resid: Residual, layer: int, rows: Rows | None) -> Float[Tensor, "batch 1 d_model"]:
        """What is added to each row of a batch, kept because a decode loop runs the same rows step after step."""
        key = (layer, resid.device, resid.dtype)
        last_rows, deltas = self._last_deltas.get(key, (None, None))
        if deltas is None or last_rows is not rows or len(deltas) != len(resid):
            self._refuse_unfitting(len(resid), rows)
            table, directions = self._constants_like(_wide(resid), layer)
            with torch.inference_mode(False):
                coefficients = table if rows is None else table[rows.to(table.device)]
                delta = einsum(coefficients, directions, "batch vector, vector d_model -> batch d_model")
                deltas = rearrange(delta, "batch d_model -> batch 1 d_model").to(resid.dtype)
            self._last_deltas[key] = rows, deltas
        return deltas

    def _refuse_unfitting(self, batch: int, rows: Rows | None) -> None:
        count = self.n_rows or 0
        if (batch != count) if rows is None else (int(rows.max()) >= count):
            got = f"a batch of {batch}" if rows is None else f"row {int(rows.max())}"
            raise ValueError(
                f"{self.traits}: coefficients for {count} rows meet {got}: pass a row for each of the batch."
            )

    @cached_property
    def _last_deltas(self) -> dict[Any, tuple[Tensor | None, Tensor]]:
        return {}

    def __str__(self) -> str:
        what = f"steer {self.traits} at {layers_text(self.layers)}"
        if isinstance(self.coefficient, Tensor):
            return f"{what}, {len(self.coefficient)} rows by coefficients of their own{self._suffix()}"
        doses = [dose for dose in self.doses if dose is not None]
        dose = f" ({max(doses, key=abs):+.2f} of the residual norm)" if doses else ""
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
        units_of(self.layer_vectors)  # a direction of zeros is refused now, not in the middle of a forward pass
        if self.around is None:
            return
        self._check_around(next((v.n_layers for v in as_list(self.vectors) if isinstance(v, PersonaVectors)), None))
        if not bool(self.around.isfinite().all()):
            raise ValueError(f"{self.traits}: `around` holds NaN or infinite values.")
        object.__setattr__(self, "around", self.around.detach().to("cpu", torch.float32).clone())

    def apply(
        self,
        resid: Residual,
        positions: Bool[Tensor, "batch pos"] | None = None,
        *,
        layer: int | None = None,
        rows: Rows | None = None,
    ) -> Residual:
        """H - U U^T (h - around), U being an orthonormal basis of the directions; see `Intervention.apply`."""
        layer, work = self._own_layer(layer, resid), _wide(resid)
        basis, *around = self._constants_like(work, layer)
        excess = work - around[0] if around else work
        inside = einsum(excess, basis, "batch pos d_model, span d_model -> batch pos span")
        changed = (work - einsum(inside, basis, "batch pos span, span d_model -> batch pos d_model")).to(resid.dtype)
        return self._changed_at(positions, resid, changed, layer)

    def check(self, model: Model | ModelIdentity, *, allow_other_model: bool = False) -> tuple[Relation, ...]:
        """As `Intervention.check`, and `around` must have a row for every layer of the model."""
        identity = model if isinstance(model, ModelIdentity) else identify(model)
        self._check_around(identity.n_layers)
        return super().check(identity, allow_other_model=allow_other_model)

    def _check_around(self, n_layers: int | None) -> None:
        """Refuse activations that have not a row for each layer, such as hidden states with the embedding first."""
        if self.around is None:
            return
        width, shape = self.layer_vectors[0].d_model, list(self.around.shape)
        rows_fit = len(self.layers) == 1 if len(shape) == 1 else shape[0] == (n_layers or shape[0]) > max(self.layers)
        if shape[-1] != width or len(shape) > 2 or not rows_fit:
            raise ValueError(
                f"{self.traits}: `around` has shape [layer, {width}] with a row for every layer of the model, or "
                f"[{width}] for one ablated layer; got {shape} for {layers_text(self.layers)}"
                + (f" of {n_layers}." if n_layers else ".")
            )

    def _constants(self, layer: int) -> tuple[Tensor, ...]:
        """The basis of what is removed and, where there is one, the centre."""
        basis = orthonormal_basis(units_of([self.layer_vectors[column] for column in self._columns(layer)]))
        if self.around is None:
            return (basis,)
        return basis, self.around if self.around.ndim == 1 else self.around[layer]

    def __str__(self) -> str:
        centre = "" if self.around is None else " around given activations"
        return f"ablate {self.traits} at {layers_text(self.layers)}{centre}{self._suffix()}"


@dataclass(frozen=True, eq=False)
class Cap(Intervention):
    """Keep the scalar projection on each vector, at its layer, within `maximum`, `minimum` or both.

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

    def apply(
        self,
        resid: Residual,
        positions: Bool[Tensor, "batch pos"] | None = None,
        *,
        layer: int | None = None,
        rows: Rows | None = None,
    ) -> Residual:
        """H + (clamp(h . u) - h . u) u for each unit vector u, see `Intervention.apply`."""
        layer, work = self._own_layer(layer, resid), _wide(resid)
        units, minimum, maximum = self._constants_like(work, layer)
        projection = einsum(work, units, "batch pos d_model, vector d_model -> batch pos vector")
        excess = projection.clamp(minimum, maximum) - projection
        change = einsum(excess, units, "batch pos vector, vector d_model -> batch pos d_model")
        return self._changed_at(positions, resid, (work + change).to(resid.dtype), layer)

    def _check_bound(self, name: str) -> None:
        bound = getattr(self, name)
        if isinstance(bound, Tensor):
            if bound.shape != (len(self.layer_vectors),):
                raise ValueError(
                    f"{self.traits}: {name} is one number, or [{len(self.layer_vectors)}] for its vectors, "
                    f"got shape {list(bound.shape)}."
                )
            object.__setattr__(self, name, bound.detach().to("cpu", torch.float32).clone())
        if bound is not None and not bool(torch.as_tensor(bound).isfinite().all()):
            raise ValueError(f"{self.traits}: {name} is finite, or None where there is no such bound; got {bound}.")

    def _bounds(self, name: str) -> Float[Tensor, " vector"]:
        bound = getattr(self, name)
        missing = torch.inf if name == "maximum" else -torch.inf
        return torch.as_tensor(missing if bound is None else bound, dtype=torch.float64).expand(len(self.layer_vectors))

    def _constants(self, layer: int) -> tuple[Tensor, ...]:
        """The unit vectors of a layer and their bounds."""
        columns = self._columns(layer)
        units = units_of([self.layer_vectors[column] for column in columns])
        return units, self._bounds("minimum")[columns], self._bounds("maximum")[columns]

    def __str__(self) -> str:
        bounds = [
            f"{name} {bound:g}" if not isinstance(bound, Tensor) else f"a {name} for each"
            for name, bound in (("minimum", self.minimum), ("maximum", self.maximum))
            if bound is not None
        ]
        return f"cap {self.traits} at {layers_text(self.layers)}, {' and '.join(bounds)}{self._suffix()}"


def refuse_conflicting_caps(caps: Sequence[Cap]) -> None:
    """Raise ValueError where caps that act together bound directions at one layer that are not orthogonal."""
    for layer in sorted({layer for cap in caps for layer in cap.layers}):
        capped = [vector for cap in caps for vector in cap.layer_vectors if vector.layer == layer]
        units = units_of(capped)
        cosines = einsum(units, units, "row d_model, column d_model -> row column").abs()
        cosine = float(cosines.fill_diagonal_(0).max())
        if cosine > _ORTHOGONAL:
            names = ", ".join(vector.trait for vector in capped)
            raise ValueError(
                f"These caps conflict: the directions at layer {layer} ({names}) are not orthogonal "
                f"(|cosine| {cosine:.2g}), so one cap would undo the other: make them orthogonal first "
                "(vector.orthogonal_to), or nest two contexts, of which the inner one has the last word."
            )


def _wide(resid: Residual) -> Residual:
    """At least float32: in half precision a component along a direction cannot be taken out exactly."""
    return resid.float() if resid.dtype in (torch.float16, torch.bfloat16) else resid
