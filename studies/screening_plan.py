"""The settings of the screening study: how projections are taken and compared, and how much of everything.

Scores are compared as the paper compares them: the projection difference, its cheap proxy, and the projection of the
training data alone (arXiv:2507.21509, sections 6, H, I, L); a text classifier stands for what needs no model.
"""

from dataclasses import dataclass
from typing import Literal

Form = Literal["difference", "proxy", "response", "classifier"]
"""What scores a row: three forms of the projection (see `Screening`), or the mood's text classifier."""


@dataclass(frozen=True)
class ScreeningSettings:
    """What the study is made with, beside the finetuning study's settings; the defaults are the committed results'.

    Attributes:
        layers: Where dataset scores are taken for the curve, beside the finetuning study's layer.
        pool: Rows of each mood that sets are chosen among, where it has so many: those of its full set, and others.
        base_tokens: Length limit of the model's own greedy responses.
        fractions: Shares of the rows that a subset's dataset score is taken from.
        subsets: Random subsets of each share.
        hidden: Shares of mood rows that are hidden among others.
        mixtures: Random mixtures of each share.
        targets: The moods for which sets are chosen and trained on, in the order in which that is done.
        rows: Rows of a chosen set.
        obvious: Classifier score from which on a row is removed by the filter.
        pairs: A/B pairs on each side of their division by question.
        seed: Of everything random.
    """

    layers: tuple[int, ...] = (4, 9, 14, 19)
    pool: int = 128
    base_tokens: int = 80
    fractions: tuple[float, ...] = (0.1, 0.25, 0.5)
    subsets: int = 200
    hidden: tuple[float, ...] = (0.01, 0.05, 0.2)
    mixtures: int = 1000
    targets: tuple[str, ...] = ("depressed", "childish", "happy")
    rows: int = 64
    obvious: float = 50.0
    pairs: int = 150
    seed: int = 0
