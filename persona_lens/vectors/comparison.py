"""Several traits beside each other: the cosines between their directions at one layer.

Knows nothing about where the vectors came from.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from einops import einsum

from persona_lens.vectors.algebra import refuse_unlike
from persona_lens.vectors.persona_vectors import PersonaVectors

if TYPE_CHECKING:
    import pandas


def cosine_matrix(vectors: Sequence[PersonaVectors], layer: int) -> "pandas.DataFrame":
    """Cosines between traits at one layer, with their names on both axes."""
    import pandas

    if not vectors:
        raise ValueError("There are no vectors to compare: pass at least one.")
    for other in vectors:
        refuse_unlike(vectors[0], other, "n_layers", "d_model")
    rows = torch.stack([each.at(layer).unit.direction for each in vectors])
    cosines = einsum(rows, rows, "row d_model, column d_model -> row column").clamp(-1, 1)
    names = [each.trait for each in vectors]
    return pandas.DataFrame(cosines.numpy(), index=names, columns=names)
