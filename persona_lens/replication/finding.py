"""A number that was found, with its interval, and whether the interval holds the paper's.

Knows nothing about how it was measured.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from persona_lens.replication.paper import PaperFigure, paper_figure
from persona_lens.statistics import N_RESAMPLES, Estimate, pearson, question_resamples, resampled_pearson


class Finding(NamedTuple):
    """A number that was found.

    Attributes:
        figure: What was measured; the name that the paper's number has.
        subject: Of which trait, mood or set.
        what: In words.
        ours: The number, its 95 % interval, and n.
        over: What the interval resamples; empty where there is no interval.
        condition: At which dose, or of which method.
        is_control: Whether it stands beside a headline to be held against it.
    """

    figure: str
    subject: str
    what: str
    ours: Estimate
    over: str = ""
    condition: str = ""
    is_control: bool = False

    def papers(self, model: str) -> PaperFigure | None:
        """The number of the paper that stands beside it; none beside a control."""
        return None if self.is_control else paper_figure(self.figure, self.subject, self.condition, model)

    def holds(self, model: str) -> bool | None:
        """Whether the interval meets the paper's number or range; None where one of them is missing."""
        theirs = self.papers(model)
        if theirs is None or theirs.low is None or theirs.high is None or self.ours.low is None:
            return None
        assert self.ours.high is not None
        return self.ours.low <= theirs.high and theirs.low <= self.ours.high

    def as_json(self, model: str) -> dict[str, Any]:
        """The finding beside the paper's number, as JSON."""
        theirs = self.papers(model)
        beside = None
        if theirs is not None:
            beside = {"section": theirs.section, "source": theirs.source, "model": theirs.model}
            beside |= {"low": theirs.low, "high": theirs.high, "words": theirs.words}
        own = {"figure": self.figure, "subject": self.subject, "condition": self.condition, "what": self.what}
        numbers = {**self.ours._asdict(), "over": self.over, "control": self.is_control}
        return {**own, **numbers, "paper": beside, "holds": self.holds(model)}


def correlation(x: Sequence[float | None], y: Sequence[float | None], seed: int = 0) -> Estimate:
    """Pearson's r over rows that have both, with its bootstrap interval over them."""
    pairs = [(one, other) for one, other in zip(x, y, strict=True) if one is not None and other is not None]
    first, second = (np.array(side, dtype=float) for side in (zip(*pairs, strict=True) if pairs else ([], [])))
    found = pearson(first, second)
    if found is None:
        return Estimate(None, None, None, len(pairs))
    drawn = question_resamples(len(pairs), N_RESAMPLES, seed)
    return Estimate.of(found, resampled_pearson(first, second, drawn), len(pairs))


def alone(value: float | None, n: int = 1) -> Estimate:
    """A number without an interval."""
    return Estimate(None if value is None or np.isnan(value) else float(value), None, None, n)
