"""Persona vectors as values: their algebra, their projections, their files, and the models they may be used with.

The vector of layer l is the mean residual stream over responses that show the trait minus the mean over responses that
do not (arXiv:2507.21509, section 2.2); a projection is the scalar one, onto the unit vector along it.
Knows nothing about how activations are made or how a vector is applied: tensors come in, tensors go out.
"""

from persona_lens.vectors.cache import Cache
from persona_lens.vectors.comparison import cosine_matrix
from persona_lens.vectors.directions import difference_in_means, orthonormal_basis
from persona_lens.vectors.files import refuse_other_vectors
from persona_lens.vectors.layer_statistics import LayerStatistics
from persona_lens.vectors.persona_vector import PersonaVector, Position, refuse_absent_layer, units_of
from persona_lens.vectors.persona_vectors import PersonaVectors
from persona_lens.vectors.provenance import HOOK_POINT, Provenance, Relation, check_model

__all__ = [
    "HOOK_POINT",
    "Cache",
    "LayerStatistics",
    "PersonaVector",
    "PersonaVectors",
    "Position",
    "Provenance",
    "Relation",
    "check_model",
    "cosine_matrix",
    "difference_in_means",
    "orthonormal_basis",
    "refuse_absent_layer",
    "refuse_other_vectors",
    "units_of",
]
