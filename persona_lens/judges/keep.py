"""The keep rule: the pairs of rollouts from which vectors are made (arXiv:2507.21509, section 2.2).

A pair is a positive and a negative rollout of the same question, instruction and sample. It is kept if the positive one
scores at least 50 on the trait, the negative one below 50, and both at least 50 on coherence; a missing score drops it.
For other thresholds the paper's reference code keeps negatives below 100 - threshold: pass that as `negative_below`.
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
    """The numbers of pairs, kept and dropped by reason (each pair once), and the rule.

    `negative_below` is None where the negative side was compared with `threshold` too.
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
    """One side of a pair."""

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
    """(positive, negative) rollouts of the same question, instruction and sample; None for a missing side.

    Neutral rollouts are left out.
    """
    sides: dict[tuple[str, int | None, int], dict[str, ScoredRollout]] = {}
    for row in scored:
        rollout = row.rollout
        if rollout.polarity != "neutral":
            pair = (rollout.question, rollout.instruction, rollout.sample)
            sides.setdefault(pair, {})[rollout.polarity] = row
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
    """The (positive, negative) pairs that the rule keeps, and a report on all of them.

    In a kept pair the positive side scores at least `threshold` on the trait and the negative one less than
    `negative_below`, by default the same threshold; the paper's reference code has 100 - threshold.

    Raises:
        ValueError: Fewer than `min_pairs` are kept, or a limit is not from 0 to 100.
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
