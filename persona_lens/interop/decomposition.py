"""A persona vector in the features of a sparse autoencoder.

Feature i writes row i of the decoder into the residual stream: its cosine with the vector says how far they point the
same way. Where the class means are at hand, the encoder also says how much more a feature is active with the trait.
Knows nothing about what a feature means.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from persona_lens.interop.sparse_autoencoders import SparseAutoencoder
from persona_lens.vectors import PersonaVector

if TYPE_CHECKING:
    import pandas


class Feature(NamedTuple):
    """A feature of an SAE beside a vector; `activation_difference` is None where no class means were given."""

    number: int
    cosine: float
    activation_difference: float | None


@dataclass(frozen=True)
class Decomposition:
    """The features whose directions are closest to a persona vector.

    Attributes:
        trait: The vector's trait.
        layer: The vector's and the SAE's layer, counted from 0.
        model_name: The model that the SAE was trained on, as SAELens calls it.
        features: By falling cosine with the vector.
        random_cosine: The control: the 95th percentile, over random directions, of the highest cosine that any
            feature has with one.
    """

    trait: str
    layer: int
    model_name: str
    features: tuple[Feature, ...]
    random_cosine: float

    def table(self) -> "pandas.DataFrame":
        """One row for each feature, by falling cosine."""
        import pandas

        return pandas.DataFrame(self.features, columns=list(Feature._fields)).set_index("number")


def decompose(
    vector: PersonaVector,
    sae: SparseAutoencoder,
    *,
    positive_mean: Float[Tensor, " d_model"] | None = None,
    negative_mean: Float[Tensor, " d_model"] | None = None,
    top: int = 20,
    n_random: int = 100,
    seed: int = 0,
) -> Decomposition:
    """The `top` features of an SAE by the cosine of their decoder directions with a persona vector.

    With the mean activations of responses with the trait and without it, each feature also has the difference of its
    activations at the two (encode(positive) - encode(negative)). A mean is not an activation that the SAE was trained
    on: read that difference as a hint. `-vector` gives the features that point the other way. A feature whose direction
    is zero has cosine 0.

    Raises:
        ValueError: The SAE is of another layer, width or residual basis, or only one mean is given.
    """
    _refuse_unfitting(vector, sae)
    if (positive_mean is None) != (negative_mean is None):
        raise ValueError(f"{vector.trait}: a difference of activations needs both class means: pass the other one too.")
    if not 1 <= top <= sae.n_features:
        raise ValueError(f"{vector.trait}: top is from 1 to the SAE's {sae.n_features} features, got {top}.")
    difference = None
    if positive_mean is not None and negative_mean is not None:
        difference = sae.encode(positive_mean) - sae.encode(negative_mean)
    decoder = torch.nn.functional.normalize(sae.W_dec, dim=-1)
    cosines = einsum(decoder, vector.unit.direction, "feature d_model, d_model -> feature").clamp(-1, 1)
    highest = cosines.topk(top)
    return Decomposition(
        vector.trait,
        vector.layer,
        sae.model_name,
        tuple(
            Feature(index, cosine, None if difference is None else float(difference[index]))
            for cosine, index in zip(highest.values.tolist(), highest.indices.tolist(), strict=True)
        ),
        _random_cosine(decoder, n_random, seed),
    )


def _random_cosine(decoder: Float[Tensor, "feature d_model"], n_random: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n_random, decoder.shape[1], generator=generator), dim=-1)
    highest = torch.stack(
        [(decoder @ direction).max() for direction in directions]
    )  # one at a time: decoders are large
    return float(highest.quantile(0.95))


def _refuse_unfitting(vector: PersonaVector, sae: SparseAutoencoder) -> None:
    for fact, ours, theirs in (("layer", vector.layer, sae.layer), ("d_model", vector.d_model, sae.d_model)):
        if ours != theirs:
            raise ValueError(
                f"{vector.trait}: the vector has {fact} {ours} and the SAE {theirs}: pass an SAE of the "
                "vector's model at its layer (blocks.{l}.hook_resid_post)."
            )
    basis = vector.provenance and vector.provenance.model.residual_basis
    if basis is not None and sae.centred is not None and (basis == "centred") > sae.centred:
        raise ValueError(
            f"{vector.trait}: the vector is of a centred residual stream and the SAE of a raw one: "
            "extract the vector from a model without processed weights."
        )
