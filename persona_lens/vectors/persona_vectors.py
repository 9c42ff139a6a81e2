"""The direction of one trait at every layer, with what is recorded about it, and the file that it is saved in.

Row l is the output of block l, counted from 0: the paper's layer l + 1 (arXiv:2507.21509, section 2.2). The file is
one safetensors file whose metadata hold a JSON header, with a format version and all fields that are no tensor; it is
written whole or not at all, and nothing is pickled.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args, runtime_checkable

import safetensors.torch
import torch
from einops import einsum, pack
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from persona_lens.models.structure import Model, resid_post_name
from persona_lens.storage.files import DAMAGE, ensure_writable, write_whole
from persona_lens.storage.text import refuse_controls
from persona_lens.vectors.direction_statistics import LayerStatistics
from persona_lens.vectors.directions import norms, owned, refuse_non_finite, units
from persona_lens.vectors.persona_vector import (
    PersonaVector,
    Position,
    VectorAlgebra,
    joint_provenance,
    refuse_absent_layer,
    refuse_unlike,
)
from persona_lens.vectors.provenance import Provenance

if TYPE_CHECKING:
    import pandas


FORMAT_VERSION = 1
_HEADER = "persona_lens"
_STATISTIC = "statistics."


@runtime_checkable
class Cache(Protocol):
    """Activations by hook name: TransformerLens's `ActivationCache`, or a dict."""

    def keys(self) -> Iterable[str]:
        """The hook names."""
        ...

    def __getitem__(self, name: str, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class PersonaVectors(VectorAlgebra):
    """The direction of one trait at every layer; `-v`, `2 * v`, `v / 2`, `v + w`, `v - w` are persona vectors too.

    Operators keep what still holds: the embedding row and the provenance where every operand has one, and the counts
    of a single operand. Statistics were measured on one extraction and are dropped.

    Attributes:
        trait: The trait they point to; an operator writes down what it did (`-evil`, `evil + optimistic`).
        directions: From responses without the trait to responses with it, at each block's output; not normalised.
        residual_norm: Mean norm of the residual stream at each layer; NaN where it was not measured.
        position: The tokens whose activations were averaged.
        embedding: The same difference where the stream enters block 0 (the lexical control).
        counts: How many responses, questions and so on are behind the directions.
        provenance: Where they came from; None where that is unknown.
        statistics: How good they are; None where that was not measured.
        increments: Whether row l is v_l - v_(l-1), as `incremental` makes them.
        missing: Why a layer has no direction, by layer, as vectors from elsewhere may have none: its row is zero,
            `at` refuses it, projections on it are NaN, and interventions leave it out.
    """

    trait: str
    directions: Float[Tensor, "layer d_model"]
    residual_norm: Float[Tensor, " layer"]
    _: KW_ONLY
    position: Position = "response_mean"
    embedding: Float[Tensor, " d_model"] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    provenance: Provenance | None = None
    statistics: LayerStatistics | None = None
    increments: bool = False
    missing: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_controls("The name of a trait", self.trait)
        for reason in self.missing.values():
            refuse_controls("The reason why a layer is missing", reason)
        if self.directions.ndim != 2 or self.directions.numel() == 0:
            shape = list(self.directions.shape)
            raise ValueError(
                f"{self.trait}: directions have shape [layer, d_model], got {shape}: pass one row a layer."
            )
        if self.position not in get_args(Position):
            raise ValueError(f"{self.trait}: position is one of {get_args(Position)}, got {self.position!r}.")
        self._refuse_unfitting()
        object.__setattr__(self, "directions", owned(self.directions))
        object.__setattr__(self, "residual_norm", owned(self.residual_norm))
        object.__setattr__(self, "counts", {name: int(count) for name, count in self.counts.items()})
        object.__setattr__(self, "missing", dict(sorted(self.missing.items())))
        for layer in self.missing:
            refuse_absent_layer(self.trait, layer, self.n_layers)
        if not self.known_layers:
            raise ValueError(f"{self.trait}: every layer is missing, and one is needed.")
        self.directions[list(self.missing)] = 0
        refuse_non_finite(self.directions, self.trait)
        if (self.residual_norm <= 0).any() or self.residual_norm.isinf().any():
            raise ValueError(f"{self.trait}: a residual norm is positive, or NaN where it was not measured.")
        if self.embedding is not None:
            object.__setattr__(self, "embedding", owned(self.embedding))
            if not self.embedding.isfinite().all():
                raise ValueError(f"{self.trait}: the embedding row holds NaN or infinite values.")

    def _refuse_unfitting(self) -> None:
        """Refuse parts that belong to directions of another shape."""
        model = self.provenance and self.provenance.model
        for part, got, expected in (
            ("residual_norm", self.residual_norm.shape, [self.n_layers]),
            ("embedding", None if self.embedding is None else self.embedding.shape, [self.d_model]),
            ("statistics", self.statistics and self.statistics.held_out_auc.shape, [self.n_layers]),
            ("a provenance with a model", model and (model.n_layers, model.d_model), [self.n_layers, self.d_model]),
        ):
            if got is not None and list(got) != expected:
                raise ValueError(f"{self.trait}: the directions need {part} of shape {expected}, got {list(got)}.")

    def __repr__(self) -> str:
        parts = [f"{self.trait!r}, n_layers={self.n_layers}, d_model={self.d_model}, position={self.position!r}"]
        parts += ["increments=True"] if self.increments else []
        parts += [f"missing={list(self.missing)}"] if self.missing else []
        parts += [f"counts={dict(self.counts)}"] if self.counts else []
        parts += [f"model={self.provenance.model.name!r}"] if self.provenance else []
        return f"PersonaVectors({', '.join(parts)})"

    @classmethod
    def from_directions(
        cls,
        directions: Float[Tensor, "layer d_model"],
        *,
        trait: str,
        model: Model | None = None,
        residual_norm: Float[Tensor, " layer"] | None = None,
        embedding: Float[Tensor, " d_model"] | None = None,
        position: Position = "response_mean",
    ) -> "PersonaVectors":
        """Persona vectors from directions that you made yourself, row l for the output of block l.

        With `model` they remember whose they are, and are refused where they do not belong.
        """
        if residual_norm is None:
            residual_norm = torch.full(directions.shape[:1], nan, dtype=torch.float32)
        provenance = None if model is None else Provenance.of(model, settings={"source": "from_directions"})
        return cls(trait, directions, residual_norm, position=position, embedding=embedding, provenance=provenance)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.directions.shape[0]

    @property
    def known_layers(self) -> list[int]:
        """The layers that have a direction: all but those in `missing`."""
        return [layer for layer in range(self.n_layers) if layer not in self.missing]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.directions.shape[1]

    @property
    def hook_names(self) -> list[str]:
        """TransformerLens's names of the hook points, row by row: a `names_filter` for `run_with_cache`."""
        return [resid_post_name(layer) for layer in range(self.n_layers)]

    @property
    def norms(self) -> Float[Tensor, " layer"]:
        """Euclidean norm |v_l| of each direction; NaN where it is missing."""
        return self._without_missing(norms(self.directions).float())

    @property
    def relative_norms(self) -> Float[Tensor, " layer"]:
        """|v_l| over the mean norm of the residual stream there; NaN where that was not measured."""
        return self.norms / self.residual_norm

    def at(self, layer: int) -> PersonaVector:
        """The direction at the output of block `layer`, counted from 0."""
        refuse_absent_layer(self.trait, layer, self.n_layers)
        if layer in self.missing:
            raise ValueError(
                f"{self.trait}: layer {layer} has no direction ({self.missing[layer]}): "
                "choose one of known_layers, or extract the vectors on the model."
            )
        residual_norm = float(self.residual_norm[layer])
        return PersonaVector(
            self.trait,
            layer,
            self.directions[layer],
            residual_norm=None if isnan(residual_norm) else residual_norm,
            position=self.position,
            provenance=self.provenance,
        )

    def incremental(self) -> "PersonaVectors":
        """v_l - v_(l-1) at every layer, where v_(-1) is the embedding row: what to add to steer at all layers at once.

        Added up to layer l they give v_l minus the embedding row. Source: arXiv:2507.21509, section 3.2 and J.3.
        """
        if self.increments:
            raise ValueError(f"{self.trait}: these vectors are increments already: use them as they are.")
        if self.embedding is None:
            raise ValueError(f"{self.trait}: increments begin at the embedding row: construct the vectors with one.")
        previous, _ = pack([self.embedding, self.directions[:-1]], "* d_model")
        above = {layer + 1: f"layer {layer} below it is missing" for layer in self.missing if layer + 1 < self.n_layers}
        missing = {**above, **self.missing}
        return replace(self, directions=self.directions - previous, statistics=None, increments=True, missing=missing)

    def project(self, means: Float[Tensor, "*batch layer d_model"]) -> Float[Tensor, "*batch layer"]:
        """Scalar projection a_l . v_l / |v_l| at every layer, in float32, on the means' device; NaN where missing."""
        if means.shape[-2:] != self.directions.shape:
            raise ValueError(
                f"{self.trait}: the vectors are {list(self.directions.shape)} and the means "
                f"{list(means.shape[-2:])} in [layer, d_model]: take them from the model that the vectors came from."
            )
        unit = self._units().to(means.device)
        return einsum(means.float(), unit, "... layer d_model, layer d_model -> ... layer")

    def project_cache(self, cache: Cache) -> Float[Tensor, "layer *batch pos"]:
        """Scalar projection of every token in a TransformerLens cache (or any mapping by hook name), at every layer."""
        cached = set(cache.keys())
        absent = [name for name in self.hook_names if name not in cached]
        if absent:
            shown = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
            raise ValueError(
                f"{self.trait}: the cache lacks {shown}: "
                "run_with_cache(tokens, names_filter=vectors.hook_names) keeps what is needed."
            )
        # A missing layer is projected on the first known one, for the shape, and emptied.
        used = [self.known_layers[0] if layer in self.missing else layer for layer in range(self.n_layers)]
        rows = [self.at(layer).project(cache[name]) for layer, name in zip(used, self.hook_names, strict=True)]
        return self._without_missing(torch.stack(rows))

    def cosine_similarity(self, other: "PersonaVectors") -> Float[Tensor, " layer"]:
        """Cosine of the angle to another trait's, or position's, direction at every layer; NaN where one is missing."""
        refuse_unlike(self, other, "n_layers", "d_model")
        return einsum(self._units(), other._units(), "layer d_model, layer d_model -> layer").clamp(-1, 1)

    def table(self) -> "pandas.DataFrame":
        """Norms and statistics, one row for each layer; first the row `embedding` where there is one."""
        import pandas

        columns = {"norm": self.norms, "relative_norm": self.relative_norms}
        columns |= self.statistics.by_layer if self.statistics else {}
        table = pandas.DataFrame({name: values.numpy() for name, values in columns.items()})
        if self.embedding is not None:
            control = (self.statistics and self.statistics.embedding) or {}
            row = {"norm": float(norms(self.embedding)), **control}
            table = pandas.concat([pandas.DataFrame([row], index=["embedding"], columns=table.columns), table])
        return table.rename_axis("layer")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one `.safetensors` file; `load` gives back the same bits.

        An older file of that name stays until the new one is whole.

        Raises:
            ValueError: The name does not end in `.safetensors`.
            OSError: The folder is missing or cannot be written to.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"Vectors are saved as .safetensors, got {path.name!r}: change the ending of the name.")
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
        header = {"format_version": FORMAT_VERSION} | {n: part for n, part in parts.items() if n not in tensors}
        if self.provenance is not None:
            header["provenance"] = self.provenance.header()
        if self.statistics is not None:
            header["statistics"] = self.statistics.header()
            tensors |= {_STATISTIC + name: values for name, values in self.statistics.by_layer.items()}
        metadata = {_HEADER: json.dumps(header, allow_nan=False)}
        write_whole(path, safetensors.torch.save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PersonaVectors":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is cut short, foreign, damaged, or of another format version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}): copy it or save it again.") from error
        if _HEADER not in metadata:
            raise ValueError(
                f"{path} was not saved by persona_lens: read its tensors with safetensors "
                "and hand them to PersonaVectors.from_directions."
            )
        try:
            header = json.loads(metadata[_HEADER])
            version = header.pop("format_version")
            parts = _parts(tensors, header) if version == FORMAT_VERSION else {}
        except DAMAGE as error:
            raise ValueError(f"{path} has a damaged header ({error!r}): copy it or save it again.") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, and this persona_lens reads {FORMAT_VERSION}: "
                "install the persona_lens that wrote it, or a newer one."
            )
        try:
            return cls(**parts)
        except DAMAGE as error:
            raise ValueError(f"{path} does not hold whole persona vectors: {error}") from error

    def _units(self) -> Float[Tensor, "layer d_model"]:
        """Each direction divided by its norm; NaN at missing layers."""
        known = self.directions.clone()
        known[list(self.missing)] = 1
        return self._without_missing(units(known, self.trait))

    def _without_missing(self, values: Float[Tensor, "layer *rest"]) -> Float[Tensor, "layer *rest"]:
        values[list(self.missing)] = nan
        return values

    def _map(self, function: Callable[[Tensor], Tensor], trait: str) -> "PersonaVectors":
        embedding = None if self.embedding is None else function(self.embedding)
        return replace(self, trait=trait, directions=function(self.directions), embedding=embedding, statistics=None)

    def _zip(
        self, other: "PersonaVectors", function: Callable[[Tensor, Tensor], Tensor], trait: str
    ) -> "PersonaVectors":
        refuse_unlike(self, other, "n_layers", "d_model", "position", "increments")
        ours, theirs = self.embedding, other.embedding
        return replace(
            self,
            trait=trait,
            directions=function(self.directions, other.directions),
            residual_norm=torch.stack([self.residual_norm, other.residual_norm]).nanmean(dim=0),
            embedding=None if ours is None or theirs is None else function(ours, theirs),
            counts={},
            provenance=joint_provenance(self, other),
            statistics=None,
            missing={**other.missing, **self.missing},
        )


def _parts(tensors: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Any]:
    """The fields of `PersonaVectors` from a file's tensors and header."""
    by_layer = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_STATISTIC)}
    if header["provenance"] is not None:
        header["provenance"] = Provenance.from_header(header["provenance"])
    if header["statistics"] is not None:
        by_layer = {name.removeprefix(_STATISTIC): values for name, values in by_layer.items()}
        header["statistics"] = LayerStatistics.from_header(header["statistics"], by_layer)
    # A file without the field is older than it; JSON's keys are strings.
    header["missing"] = {int(layer): why for layer, why in header.get("missing", {}).items()}
    return header | tensors


def refuse_other_vectors(path: Path) -> None:
    """Raise ValueError, having changed nothing, where a file is there, is not empty and was not saved by persona_lens.

    Raises OSError in one sentence where it could not be written.
    """
    ensure_writable(path)
    if not path.exists() or not path.stat().st_size:
        return
    try:
        with safe_open(path, framework="pt") as file:
            is_ours = _HEADER in (file.metadata() or {})
    except SafetensorError:
        is_ours = False
    if not is_ours:
        raise ValueError(
            f"{path} holds something else: expected vectors that persona_lens saved, which would be replaced. Choose "
            "another output, or move that file away."
        )


def cosine_matrix(vectors: Sequence[PersonaVectors], layer: int) -> "pandas.DataFrame":
    """Cosines between traits at one layer, with their names on both axes."""
    import pandas

    if not vectors:
        raise ValueError("There are no vectors to compare: pass at least one.")
    for other in vectors:
        refuse_unlike(vectors[0], other, "n_layers", "d_model")
    rows = torch.stack([one.at(layer).unit.direction for one in vectors])
    cosines = einsum(rows, rows, "row d_model, column d_model -> row column").clamp(-1, 1)
    names = [one.trait for one in vectors]
    return pandas.DataFrame(cosines.numpy(), index=names, columns=names)
