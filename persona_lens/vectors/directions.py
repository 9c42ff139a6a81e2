"""Directions as plain tensors: difference in means, norms, unit rows.

Sums and norms are taken in float64, so that neither a thousand rows nor a tiny direction loses the result; what comes
back is float32 on the CPU.
"""

from functools import partial

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

# Unit vectors whose span has a singular value below this are the same direction, up to float32's rounding.
_DEPENDENT = 1e-5


def difference_in_means(
    positive_means: Float[Tensor, "positive layer d_model"], negative_means: Float[Tensor, "negative layer d_model"]
) -> Float[Tensor, "layer d_model"]:
    """Difference in means: from the mean negative to the mean positive activation, at every layer.

    mean_i(positive_i) - mean_j(negative_j), where each row is one response's mean over its tokens. Not normalised;
    the keep rule drops pairs whole, so the means themselves need no pairing.
    Source: arXiv:2507.21509, section 2.2.

    Raises:
        ValueError: A side is empty or holds NaN, or the sides differ in layers or width.
    """
    if positive_means.shape[1:] != negative_means.shape[1:]:
        shapes = f"{list(positive_means.shape[1:])} and {list(negative_means.shape[1:])}"
        raise ValueError(f"The two sides have [layer, d_model] of {shapes}: take both from one model.")
    return (_mean_response("positive", positive_means) - _mean_response("negative", negative_means)).float()


def _mean_response(side: str, means: Float[Tensor, "response layer d_model"]) -> Float[Tensor, "layer d_model"]:
    if len(means) == 0:
        raise ValueError(f"There is no {side} response: a difference in means needs at least one on each side.")
    finite = reduce(means.isfinite(), "response layer d_model -> response", "all")
    if not finite.all():
        row, count = int((~finite).nonzero()[0]), int((~finite).sum())
        raise ValueError(
            f"{count} {side} responses hold NaN or infinite values, the first in row {row}: "
            "leave out responses without tokens."
        )
    return reduce(means.cpu(), "response layer d_model -> layer d_model", partial(torch.mean, dtype=torch.float64))


def owned(tensor: Tensor) -> Tensor:
    """A contiguous float32 copy on the CPU: what a frozen value holds, so that nothing outside can change it."""
    return tensor.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)


def norms(directions: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
    """Euclidean norm of each direction, in float64: squares of small float32 values would vanish."""
    return torch.linalg.vector_norm(directions.double(), dim=-1)


def units(
    directions: Float[Tensor, "layer d_model"], trait: str, first_layer: int = 0
) -> Float[Tensor, "layer d_model"]:
    """Each row divided by its norm; a row of zeros has no direction and raises a ValueError."""
    lengths = norms(directions)
    if (lengths == 0).any():
        layer = first_layer + int((lengths == 0).nonzero()[0])
        raise ValueError(
            f"{trait}: the direction at layer {layer} is exactly zero and has no unit vector: "
            "leave that layer out, or check that the two sides differ."
        )
    return (directions.double() / rearrange(lengths, "layer -> layer 1")).float()


def orthonormal_basis(units: Float[Tensor, "vector d_model"]) -> Float[Tensor, "span d_model"]:
    """An orthonormal basis, in float64, of what unit vectors span; parallel ones count once."""
    _, sizes, basis = torch.linalg.svd(units.double(), full_matrices=False)
    return basis[sizes > _DEPENDENT]


def refuse_non_finite(directions: Float[Tensor, "layer d_model"], trait: str, first_layer: int = 0) -> None:
    """Raise a ValueError that names the first layer with a NaN or an infinity."""
    finite = reduce(directions.isfinite(), "layer d_model -> layer", "all")
    if not finite.all():
        layer = first_layer + int((~finite).nonzero()[0])
        raise ValueError(
            f"{trait}: the direction at layer {layer} holds NaN or infinite values: "
            "check for responses without tokens, a division by zero, or an overflow."
        )
