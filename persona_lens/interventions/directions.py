"""What interventions make of the vectors that they are given: one list, their units, how much they overlap.

In float64, so that a removed direction is gone to the precision of the activations.
Knows nothing about what an intervention does.
"""

from collections.abc import Sequence

from einops import einsum
from jaxtyping import Float
from torch import Tensor

from persona_lens.vectors.persona_vector import PersonaVector
from persona_lens.vectors.persona_vectors import PersonaVectors

Vectors = PersonaVector | PersonaVectors | Sequence[PersonaVector | PersonaVectors]
# The cosine below which directions count as orthogonal: what float32 leaves of orthogonalised ones.
ORTHOGONAL = 1e-4


def as_given(vectors: Vectors) -> list[PersonaVector | PersonaVectors]:
    """The vectors as a list; raises ValueError for an empty one and TypeError for anything else."""
    given = [vectors] if isinstance(vectors, PersonaVector | PersonaVectors) else list(vectors)
    if not given:
        raise ValueError("An intervention needs at least one vector, got none.")
    for each in given:
        if not isinstance(each, PersonaVector | PersonaVectors):
            raise TypeError(
                f"An intervention takes PersonaVector or PersonaVectors, got {type(each).__name__}: "
                "wrap a tensor of your own with PersonaVectors.from_directions."
            )
    return given


def each_vector(vectors: Vectors) -> tuple[PersonaVector, ...]:
    """One vector after another; `PersonaVectors` count as the vectors of all layers that they have."""
    found: list[PersonaVector] = []
    for given in as_given(vectors):
        found += [given] if isinstance(given, PersonaVector) else [given.at(layer) for layer in given.known_layers]
    return tuple(found)


def overlap(units: Float[Tensor, "vector d_model"]) -> float:
    """The largest |cosine| between two of several unit vectors; 0 for one."""
    cosines = einsum(units, units, "row d_model, column d_model -> row column").abs()
    return float(cosines.fill_diagonal_(0).max())


def layers_text(layers: Sequence[int]) -> str:
    """Layers as a person would write them: `layer 3`, `layers 3, 5`, `layers 0 to 29`."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)) and len(layers) > 2:
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"
