"""What a safeguard is, and the record of each time that one raised an alert.

Knows nothing about models that run: a projection comes in, whether it is past the threshold goes out.
"""

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal, get_args

from jaxtyping import Bool, Float
from torch import Tensor

from persona_lens.interventions import Intervention
from persona_lens.vectors import PersonaVector, units_of

Direction = Literal["above", "below"]


@dataclass(frozen=True, eq=False)
class Safeguard:
    """Raise an alert the first time that a token of a reply projects past a threshold, and then intervene.

    The last token of the prompt, from which the reply's first one is predicted, counts as a token of the reply. A
    safeguard fires once a reply, and for that reply alone. Its intervention stays on until the reply ends, and it acts
    on the very next token: the pass that runs the token which set it off predicts the next one too, so at the watched
    layer and above the intervention acts in that same pass already, on that token, after the projection was read; at
    the layers below the watched one it acts from the next pass on.

    Attributes:
        vector: The direction that is watched, at its layer.
        threshold: In the units of `vector.project`.
        intervention: What is switched on, at the layers of its own vectors; None only raises the alert.
        direction: Which side of the threshold is past it.
    """

    vector: PersonaVector
    threshold: float
    intervention: Intervention | None = None
    direction: Direction = "above"

    def __post_init__(self) -> None:
        trait = self.vector.trait
        units_of([self.vector])  # a direction of zeros is refused now, not in the middle of a reply
        if not isfinite(self.threshold):
            raise ValueError(f"{trait}: a safeguard's threshold is a finite number, got {self.threshold}.")
        if self.direction not in get_args(Direction):
            raise ValueError(f"{trait}: direction is one of {', '.join(get_args(Direction))}, got {self.direction!r}.")
        if self.intervention is None:
            return
        if not isinstance(self.intervention, Intervention):
            got = type(self.intervention).__name__
            raise TypeError(f"{trait}: a safeguard switches on a Steer, Ablate or Cap, got {got}.")
        if self.intervention.n_rows is not None:
            raise ValueError(
                f"{trait}: a safeguard treats every reply that sets it off alike: "
                "pass one coefficient, not one for each row."
            )

    def passed(self, projections: Float[Tensor, " row"]) -> Bool[Tensor, " row"]:
        """Which projections are past the threshold."""
        return projections > self.threshold if self.direction == "above" else projections < self.threshold

    @property
    def action(self) -> str:
        """What it does beside raising the alert, in words; `alert` where that is all."""
        return "alert" if self.intervention is None else str(self.intervention)


@dataclass(frozen=True)
class Alert:
    """That a safeguard fired, and on what.

    Attributes:
        time: UTC, in ISO 8601.
        key: The key of the reply's row.
        token_index: Of the reply's tokens, counted from 0; -1 is the last token of the prompt.
        token: The id of that token.
        token_text: The text of that token alone.
        trait: The trait of the watched vector.
        layer: The layer of the watched vector.
        projection: What the token projected to.
        threshold: The safeguard's threshold.
        direction: The side of the threshold that is past it.
        action: `alert`, or in words the intervention that was switched on.
        intervention: The fingerprint of that intervention; None where there is none.
    """

    time: str
    key: str
    token_index: int
    token: int
    token_text: str
    trait: str
    layer: int
    projection: float
    threshold: float
    direction: Direction
    action: str
    intervention: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return asdict(self)
