"""What every intervention is: vectors with the layers they belong to, an optional condition, and a pure `apply`.

Knows nothing about which forward pass runs: activations, positions and a layer come in.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_lens.interventions.directions import Vectors, as_given, each_vector, layers_text
from persona_lens.interventions.positions import At, check_positions, positions_of
from persona_lens.interventions.records import (
    RECORD_VERSION,
    decode_value,
    decode_vectors,
    encode_value,
    encode_vectors,
)
from persona_lens.models.pass_context import CurrentPass, KnownPass, announced
from persona_lens.models.structure import Model, ModelIdentity, identify, resid_post_name
from persona_lens.storage.files import DAMAGE
from persona_lens.vectors.persona_vector import PersonaVector, refuse_absent_layer, units_of
from persona_lens.vectors.persona_vectors import PersonaVectors
from persona_lens.vectors.provenance import Relation, check_model

Residual = Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True, eq=False)
class When:
    """Only at tokens whose projection on the vector of their layer, as the intervention finds it, passes a threshold.

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
        if len(self.probes) < len(each_vector(self.vectors)):
            raise ValueError("A condition takes one vector a layer, got several at one: pass one of them.")
        units_of(each_vector(self.vectors))  # a direction of zeros is refused now, not in the middle of a forward pass

    @cached_property
    def probes(self) -> dict[int, PersonaVector]:
        """The vector of each layer."""
        return {vector.layer: vector for vector in each_vector(self.vectors)}

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
    """What `Steer`, `Ablate` and `Cap` share; not to be made by itself."""

    vectors: Vectors
    _: KW_ONLY
    when: When | None = None
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        widths = sorted({vector.d_model for vector in self.each})
        if len(widths) > 1:
            raise ValueError(f"{self.traits}: the vectors are {widths} wide: take them from one model.")
        absent = set() if self.when is None else set(self.layers) - set(self.when.probes)
        if absent:
            raise ValueError(f"{self.traits}: the condition has no vector for layer {min(absent)}: pass one for each.")

    @cached_property
    def each(self) -> tuple[PersonaVector, ...]:
        """Its vectors, one after another; `PersonaVectors` count as those of all their layers."""
        return each_vector(self.vectors)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers of its vectors, ascending."""
        return tuple(sorted({vector.layer for vector in self.each}))

    @cached_property
    def acting_layers(self) -> tuple[int, ...]:
        """The layers at which it is not the identity."""
        return self.layers

    @property
    def n_rows(self) -> int | None:
        """How many rows it treats each in its own way; None where it treats all alike."""
        return None

    @cached_property
    def traits(self) -> str:
        """The traits of its vectors, in order."""
        return ", ".join(dict.fromkeys(vector.trait for vector in self.each))

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of what decides what it does; where its vectors come from does not."""
        own = [encode_value(getattr(self, each.name)) for each in fields(self) if each.name not in _SHARED]
        probes = [] if self.when is None else [probe.fingerprint for probe in self.when.probes.values()]
        bounds = self.when and (self.when.above, self.when.below)
        parts = [self.kind, own, [vector.fingerprint for vector in self.each], probes, bounds]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]

    def apply(
        self,
        resid: Residual,
        positions: Bool[Tensor, "batch pos"] | None = None,
        *,
        layer: int | None = None,
        rows: Int[Tensor, " batch"] | None = None,
    ) -> Residual:
        """The residual stream with the intervention at `positions` (None: all); the input is left as it is.

        `layer` may be left out where it has only one. `rows` say which row of a coefficient matrix each row of the
        batch is; by default they correspond one to one. Raises ValueError for a layer or width that is not its own.
        """
        if layer is None and len(self.layers) == 1:
            layer = self.layers[0]
        if layer is None or layer not in self.layers:
            raise ValueError(f"{self.traits}: acts at {layers_text(self.layers)}, got layer={layer}.")
        if resid.shape[-1] != self.each[0].d_model:
            raise ValueError(
                f"{self.traits}: the vectors are {self.each[0].d_model} wide and the residual stream is "
                f"{resid.shape[-1]}: take them from the model that they came from."
            )
        if layer not in self.acting_layers:
            return resid
        if self.when is not None:
            met = self.when.holds(resid, layer=layer)
            positions = met if positions is None else met & positions.to(met.device)
        changed = self._change(resid, layer, rows)
        if positions is None:
            return changed
        return torch.where(rearrange(positions.to(resid.device), "batch pos -> batch pos 1"), changed, resid)

    def _change(self, resid: Residual, layer: int, rows: Int[Tensor, " batch"] | None) -> Residual:
        raise NotImplementedError

    def _constant(self, name: str, layer: int) -> Tensor:
        raise NotImplementedError

    def _at(self, layer: int) -> list[int]:
        """Which of its vectors belong to a layer."""
        return [index for index, vector in enumerate(self.each) if vector.layer == layer]

    @cached_property
    def _placed(self) -> dict[Any, Tensor]:
        return {}

    def _place(self, name: str, layer: int, like: Tensor) -> Tensor:
        """A constant of one layer on the device and in the dtype of the activations, copied there once."""
        key = (name, layer, like.device, like.dtype)
        if key not in self._placed:
            # Made under inference mode, where some models generate, a constant could not be trained through later.
            with torch.inference_mode(False):
                constant = self._constant(name, layer)
                # First in its dtype, then to its device: some accelerators have no float64.
                placed = constant.to(like.dtype).to(like.device).clone()
            # A bound that a cap has not is infinite from the start.
            if bool((placed.isinf() & constant.isfinite().to(placed.device)).any()):
                raise ValueError(
                    f"{self.traits}: at layer {layer} the intervention is too large for the model's {like.dtype}: "
                    "take a smaller coefficient, or load the model with a wider dtype (float32)."
                )
            self._placed[key] = placed
        return self._placed[key]

    def check(self, model: Model, *, allow_other_model: bool = False) -> tuple[Relation, ...]:
        """Refuse a model that a vector does not belong to, as `PersonaVectors.check` does; a relation for each."""
        return self.check_identity(identify(model), allow_other_model=allow_other_model)

    def check_identity(self, found: ModelIdentity, *, allow_other_model: bool = False) -> tuple[Relation, ...]:
        """As `check`, for a model that was identified already."""
        conditions = [] if self.when is None else as_given(self.when.vectors)
        relations: list[Relation] = []
        for given in [*as_given(self.vectors), *conditions]:
            source = given.provenance and given.provenance.model
            relation = check_model(
                found,
                given.trait,
                given.provenance,
                d_model=given.d_model,
                n_layers=given.n_layers if isinstance(given, PersonaVectors) else source and source.n_layers,
                allow_other_model=allow_other_model,
            )
            relations.append(relation)
            if isinstance(given, PersonaVector):
                refuse_absent_layer(given.trait, given.layer, found.n_layers)
        return tuple(relations)

    def fwd_hooks(
        self, model: Model, *, at: At = "all", allow_other_model: bool = False
    ) -> list[tuple[str, Callable[..., Residual]]]:
        """The same as TransformerLens hooks, for `run_with_hooks(fwd_hooks=...)` and `model.hooks(fwd_hooks=...)`.

        `at` is `all`, or a mask [batch, pos] for one forward pass: a hook of this kind cannot see the key-value cache,
        by which `intervene` follows a generation. Raises ValueError for a model that the vectors do not belong to.
        """
        check_positions(at, None)
        if isinstance(at, str) and at != "all":
            raise ValueError(f"TransformerLens hooks cannot know at={at!r}: pass a mask, or use intervene().")
        self.check(model, allow_other_model=allow_other_model)
        return [(resid_post_name(layer), partial(self._as_hook, at=at, layer=layer)) for layer in self.acting_layers]

    def _as_hook(self, resid: Residual, hook: Any = None, *, at: At, layer: int) -> Residual:
        known = announced()
        positions = positions_of(at, (resid.shape[0], resid.shape[1]), current=CurrentPass(), known=known)
        return self.apply(resid, positions, layer=layer, rows=rows_in_flight(self, known))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON, directions included, so that a run records what was done; `from_dict` reads it."""
        own = {each.name: encode_value(getattr(self, each.name)) for each in fields(self) if each.name not in _SHARED}
        when = self.when and {
            **encode_vectors(list(self.when.probes.values())),
            "above": self.when.above,
            "below": self.when.below,
        }
        return {"version": RECORD_VERSION, "kind": self.kind, **encode_vectors(self.each), **own, "when": when}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Intervention":
        """The intervention that `to_dict` recorded: of this class, or called on `Intervention` of any.

        Raises ValueError where the record is damaged, of another version or of another kind.
        """
        kinds = {each.kind: each for each in Intervention.__subclasses__() if issubclass(each, cls)}
        found = record if isinstance(record, dict) else {}
        if found.get("version") != RECORD_VERSION or str(found.get("kind")) not in kinds:
            raise ValueError(
                f"Expected a record of version {RECORD_VERSION} and kind {' or '.join(kinds)}, got version "
                f"{found.get('version')} and kind {found.get('kind')!r}."
            )
        kind: Any = kinds[record["kind"]]
        try:
            own = {each.name: decode_value(record[each.name]) for each in fields(kind) if each.name not in _SHARED}
            when = record["when"]
            condition = when and When(decode_vectors(when), above=when["above"], below=when["below"])
            return kind(decode_vectors(record), **own, when=condition)
        except DAMAGE as error:
            raise ValueError(f"The record of an intervention is damaged: {error}") from error

    def _suffix(self) -> str:
        return "" if self.when is None else f", {self.when}"


_SHARED = {"vectors", "when"}


def rows_in_flight(intervention: Intervention, known: KnownPass | None) -> Int[Tensor, " batch"] | None:
    """Which rows of the plan a pass runs; None where its batch is the plan.

    Raises ValueError where a row of the pass serves several rows, which a row-wise intervention would treat alike.
    """
    if intervention.n_rows is None or known is None:
        return None
    if known.rows is None:
        raise ValueError(
            f"{intervention.traits}: a shared prompt runs once for several rows, which have coefficients of their own: "
            "attach row-wise coefficients with intervene(), around generate, with at='response'."
        )
    return known.rows
