"""Drawing tokens: a row has uniform numbers of its own, and its token is where the cumulative distribution passes one.

So a row's text depends on its key and the seed, not on the batch that it runs in.
Knows nothing about models: logits come in, token ids go out.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def row_uniforms(seed: int, keys: Sequence[str], steps: int) -> Float[Tensor, "row step"]:
    """Uniform numbers in [0, 1), one a row and step, that depend on (seed, key, step) alone."""
    rows = []
    for key in keys:
        digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
        rows.append(np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(steps))
    return torch.from_numpy(np.stack(rows))


def sample(
    logits: Float[Tensor, "row d_vocab"],
    uniforms: Float[Tensor, " row"],
    *,
    temperature: float,
    top_p: float = 1.0,
) -> Int[Tensor, " row"]:
    """Draw a token a row from softmax(logits / temperature), cut to the most likely `top_p` of its mass.

    The draw is the first token at which the cumulative distribution passes the row's uniform number.
    Raises ValueError for logits that are not numbers.
    """
    if temperature == 0:
        best = logits.max(dim=-1)
        _refuse_nan(best.values)
        return best.indices
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(outside, 0))
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    _refuse_nan(cumulative[:, -1])
    threshold = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    # right=True steps over tokens of zero probability where the threshold falls exactly on their boundary
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _refuse_nan(one_a_row: Float[Tensor, " row"]) -> None:
    # One NaN in a row makes the row's maximum and its sum NaN, so the whole vocabulary need not be searched.
    if bool(one_a_row.isnan().any()):
        raise ValueError("The model's logits are not numbers. Load it with a wider dtype (float32).")
