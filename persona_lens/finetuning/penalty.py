"""The control that the paper found weak: a penalty on how far finetuning moves the projections.

loss + weight * mean over tokens and vectors of (p - p_base)², where p is a token's scalar projection on a unit vector
while training and p_base the one without the adapter (arXiv:2507.21509, section J.5, which gives no formula).
Knows nothing about datasets or trainers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from persona_lens.activations import Projections
from persona_lens.vectors import PersonaVector, PersonaVectors


@dataclass(frozen=True)
class ProjectionPenalty:
    """Hold projections on vectors where the base model has them.

    Attributes:
        vectors: One vector, or those of every layer.
        weight: What a squared change of one, in the units of the residual stream, adds to the loss.
    """

    vectors: PersonaVector | PersonaVectors
    weight: float

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"The weight of a penalty is positive, got {self.weight}: leave the penalty out for none.")

    @property
    def each(self) -> tuple[PersonaVector, ...]:
        """Its vectors, one after another."""
        given = self.vectors
        return (given,) if isinstance(given, PersonaVector) else tuple(given.at(layer) for layer in given.known_layers)

    def __str__(self) -> str:
        layers = sorted({vector.layer for vector in self.each})
        where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
        return f"penalty of {self.weight:g} on the projection change of {self.each[0].trait}, {where}"


def projection_change(
    before: Float[Tensor, "batch pos vector"],
    after: Float[Tensor, "batch pos vector"],
    attended: Bool[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """Mean square of the change of projections, over tokens that are not padding and over vectors."""
    squares = (after - before).square() * rearrange(attended, "batch pos -> batch pos 1")
    return squares.sum() / (attended.sum() * after.shape[-1])


def penalised(loss: Tensor, carrier: Any, inputs: dict[str, Any], found: Projections, weight: float) -> Tensor:
    """A loss whose forward pass left its projections in `found`, with the penalty; runs the pass without the adapter.

    `carrier` is the PEFT model that ran.
    """
    after = found.read()
    # In evaluation mode, so that what acts in training only is off too.
    carrier.eval()
    try:
        with torch.no_grad(), carrier.disable_adapter():
            carrier(**{name: value for name, value in inputs.items() if name != "labels"})
    finally:
        carrier.train()
    return loss + weight * projection_change(found.read(), after, inputs["attention_mask"].bool().cpu()).to(loss)
