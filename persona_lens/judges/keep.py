"""The keep rule: which pairs of rollouts a vector is made of (arXiv:2507.21509, section 2.2, and its reference code).

A pair is a positive and a negative rollout of the same question, instruction and sample. It stays if the positive one
scores at least 50 on the trait, the negative one below 50, and both at least 50 on coherence; a missing score drops it.
Away from 50 the reference code keeps negatives below 100 - threshold: pass that as `negative_below`.
Knows nothing about how scores were made.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, runtime_checkable

from persona_lens.judges.scores import ScoredRollout

Reason = Literal[
    "unpaired",
    "empty response",
    "no coherence score",
    "incoherent",
    "no trait score",
    "positive side below the threshold",
    "negative side at or above the threshold",
    "negative side at or above its own threshold",
]


@dataclass(frozen=True)
class KeepReport:
    """How many pairs there were, how many stayed, why the others went, and the rule; each dropped pair counts once.

    `negative_below` is None where the negative side was held against `threshold` too.
    """

    pairs: int
    kept: int
    dropped: Mapping[Reason, int] = field(default_factory=dict)
    threshold: float = 50.0
    min_coherence: float = 50.0
    negative_below: float | None = None

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        return f"{self.kept} of {self.pairs} pairs kept" + (f" (dropped: {reasons})" if reasons else "")


@runtime_checkable
class Judged(Protocol):
    """A side of a pair: anything with the two scores that knows whether it is empty."""

    @property
    def trait_score(self) -> float | None:
        """0 to 100, or None."""
        ...

    @property
    def coherence(self) -> float | None:
        """0 to 100, or None."""
        ...

    @property
    def is_empty(self) -> bool:
        """Whether there is no response."""
        ...


Side = TypeVar("Side", bound=Judged)


def pair_rollouts(scored: Sequence[ScoredRollout]) -> list[tuple[ScoredRollout | None, ScoredRollout | None]]:
    """(positive, negative) rollouts of the same question, instruction and sample; None for a side that is missing.

    Neutral rollouts take no part.
    """
    sides: dict[tuple[str, int | None, int], dict[str, ScoredRollout]] = {}
    for row in scored:
        if row.rollout.polarity != "neutral":
            place = (row.rollout.question, row.rollout.instruction, row.rollout.sample)
            sides.setdefault(place, {})[row.rollout.polarity] = row
    return [(pair.get("positive"), pair.get("negative")) for pair in sides.values()]


def keep_pairs(
    pairs: Sequence[tuple[Side | None, Side | None]],
    *,
    trait: str,
    threshold: float = 50.0,
    min_coherence: float = 50.0,
    min_pairs: int = 1,
    negative_below: float | None = None,
) -> tuple[list[tuple[Side, Side]], KeepReport]:
    """The (positive, negative) pairs that stay, and a report of all of them.

    The positive side scores at least `threshold` on the trait, and the negative one less than `negative_below`, which
    is the threshold where it is None. The reference code has `negative_below=100 - threshold`: the same at 50.

    Raises:
        ValueError: Fewer than `min_pairs` stay (with the reasons and the remedy), or a limit is not from 0 to 100.
    """
    for name, limit in (("threshold", threshold), ("negative_below", negative_below), ("min_coherence", min_coherence)):
        if limit is not None and not 0 <= limit <= 100:
            raise ValueError(f"{name} is a score from 0 to 100, got {limit}.")
    kept: list[tuple[Side, Side]] = []
    dropped: Counter[Reason] = Counter()
    for positive, negative in pairs:
        if positive is None or negative is None:
            dropped["unpaired"] += 1
        elif reason := _why_dropped(positive, negative, threshold, min_coherence, negative_below):
            dropped[reason] += 1
        else:
            kept.append((positive, negative))
    reasons = dict(dropped.most_common())
    report = KeepReport(len(pairs), len(kept), reasons, threshold, min_coherence, negative_below)
    if len(kept) < min_pairs:
        raise ValueError(
            f"{trait}: {report}; at least {min_pairs} needed. Sample more rollouts per question, lower the threshold "
            f"({threshold:g}), or check that the model follows the instructions."
        )
    return kept, report


def _why_dropped(
    positive: Judged, negative: Judged, threshold: float, min_coherence: float, negative_below: float | None
) -> Reason | None:
    if positive.is_empty or negative.is_empty:
        return "empty response"
    if positive.coherence is None or negative.coherence is None:
        return "no coherence score"
    if min(positive.coherence, negative.coherence) < min_coherence:
        return "incoherent"
    if positive.trait_score is None or negative.trait_score is None:
        return "no trait score"
    if positive.trait_score < threshold:
        return "positive side below the threshold"
    if negative_below is None and negative.trait_score >= threshold:
        return "negative side at or above the threshold"
    if negative_below is not None and negative.trait_score >= negative_below:
        return "negative side at or above its own threshold"
    return None
