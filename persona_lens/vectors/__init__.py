"""Persona vectors as values: their algebra, their projections, their files, and the models they may be used with.

The vector of layer l is the mean residual stream over responses that show the trait minus the mean over responses that
do not (arXiv:2507.21509, section 2.2); a projection is the scalar one, onto the unit vector along it.
Knows nothing about how activations are made or how a vector is applied: tensors come in, tensors go out.
"""
