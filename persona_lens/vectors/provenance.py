"""Where vectors came from, and the rules by which they are refused on a model that they do not belong to.

A finetuned or adapted model of the same base is accepted, because the paper steers finetuned models with the base's
vectors (arXiv:2507.21509, sections 4 and 5); another shape, hook point or residual basis never is.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from persona_lens.models.structure import Model, ModelIdentity, identify
from persona_lens.storage.text import refuse_controls, shown_name

HOOK_POINT = "blocks.{layer}.hook_resid_post"
Relation = Literal["same", "adapted", "other", "unknown"]

_RECORDED_LIBRARIES = ("persona-lens", "transformer-lens", "transformers", "torch")
# Correlation of the embedding samples: finetuning hardly moves it, and another class of the same weights not at all.
_SAME_BASE, _SAME_WEIGHTS = 0.9, 0.9999


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where vectors came from: enough to refuse them where they do not belong, and to make them again.

    Attributes:
        model: The model whose activations they are differences of.
        hook_point: Where the activations were read.
        template_hash: Fingerprint of the chat template that made the prompts; empty where none did.
        settings: Whatever else decided the result, as JSON.
        library_versions: Versions by distribution name.
        created: When, in ISO form, UTC.
    """

    model: ModelIdentity
    hook_point: str = HOOK_POINT
    template_hash: str
    settings: dict[str, Any]
    library_versions: dict[str, str]
    created: str

    def __post_init__(self) -> None:
        try:
            settings = json.loads(json.dumps(self.settings, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Expected provenance settings that JSON can hold: {error}.") from error
        object.__setattr__(self, "settings", settings)

    @classmethod
    def of(cls, model: Model, *, settings: Mapping[str, Any], template_hash: str = "") -> "Provenance":
        """The provenance of vectors that are made now, on this model, with the installed libraries."""
        versions = {}
        for library in _RECORDED_LIBRARIES:
            with suppress(PackageNotFoundError):  # run from a checkout that is not installed
                versions[library] = version(library)
        return cls(
            model=identify(model),
            template_hash=template_hash,
            settings=dict(settings),
            library_versions=versions,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def header(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return asdict(self)

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> "Provenance":
        """The provenance that a file keeps as `header`.

        Raises ValueError for names with control characters; a path that an older file has as the model's name is cut.
        """
        model = {**header["model"], "embedding_sample": tuple(header["model"]["embedding_sample"])}
        texts = {**model, **header, **header["library_versions"]}
        for field, value in texts.items():
            refuse_controls("A name of a field", field)
            if isinstance(value, str):
                refuse_controls(field, value)
        model["name"] = shown_name(model["name"])
        return cls(**{**header, "model": ModelIdentity(**model)})

    def relation_to(self, model: ModelIdentity) -> Relation:
        """Whether `model` has the same weights, is finetuned or adapted from the same base, or is another model.

        The base is the same where the embedding samples have a Pearson correlation above 0.9. The hash of equal weights
        differs between the model classes, so there the same embeddings (above 0.9999) count as the same weights.
        """
        if model.weights_hash == self.model.weights_hash:
            return "same"
        samples = (self.model.embedding_sample, model.embedding_sample)
        if len(samples[0]) != len(samples[1]) or len(samples[0]) < 2:
            return "other"
        correlation = float(torch.corrcoef(torch.tensor(samples, dtype=torch.float64))[0, 1])
        if model.model_class != self.model.model_class and correlation > _SAME_WEIGHTS:
            return "same"
        return "adapted" if correlation > _SAME_BASE else "other"


def check_model(
    model: ModelIdentity,
    trait: str,
    provenance: Provenance | None,
    *,
    d_model: int,
    n_layers: int | None,
    allow_other_model: bool,
) -> Relation:
    """The relation of a model to the one that the vectors of `trait` came from; `unknown` without a provenance.

    Raises:
        ValueError: The model differs in d_model, n_layers, hook point or residual basis, or it is unrelated and
            `allow_other_model` is false.
    """
    shape_remedy = "use the model that the vectors came from, or extract them again on this one"
    facts: list[tuple[str, Any, Any, str]] = [("d_model", d_model, model.d_model, shape_remedy)]
    if n_layers is not None:
        facts.append(("n_layers", n_layers, model.n_layers, shape_remedy))
    if provenance is not None:
        basis = provenance.model.residual_basis
        facts += [
            ("hook point", provenance.hook_point, HOOK_POINT, "extract them again at the outputs of the blocks"),
            ("residual basis", basis, model.residual_basis, "load the model with weights processed as they were"),
        ]
    for fact, expected, got, remedy in facts:
        if expected != got:
            raise ValueError(f"{trait}: the vectors expect {fact} {expected}, and {model.name} has {got}: {remedy}.")
    relation = "unknown" if provenance is None else provenance.relation_to(model)
    if provenance is not None and relation == "other" and not allow_other_model:
        raise ValueError(
            f"{trait}: the vectors come from {provenance.model.name}, and {model.name} has unrelated embeddings: "
            "extract them again on this model, or pass allow_other_model=True."
        )
    return relation
