"""One comparison: contestants on one workload, and claims about how many times faster one is than another.

Knows nothing about how rows are run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from benchmarks.oracle import MINIMUM_COSINE, minimum_cosine
from benchmarks.texts import Workload
from benchmarks.timing import Contestant, Result, inspect, race


@dataclass(frozen=True)
class Claim:
    """`faster` beats `than` (None: the baseline) `goal` times; without a goal the ratio only explains another."""

    faster: Contestant
    goal: float | None = None
    than: Contestant | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of a claim. Ratios say how many times faster; the paired ones have an entry for each round."""

    faster: str
    than: str
    goal: float | None
    ratio_of_medians: float
    paired_wall: list[float]
    paired_cpu: list[float]

    @property
    def held(self) -> bool | None:
        """Whether the medians of the paired ratios reach the goal, in wall and in CPU time; None without a goal.

        CPU time too, because a neighbour that runs during one contestant's turns changes wall time alone.
        """
        return None if self.goal is None else min(median(self.paired_wall), median(self.paired_cpu)) >= self.goal


@dataclass(frozen=True)
class Comparison:
    """A race on one workload. `tried` are the baseline's other batch sizes, which ran once."""

    name: str
    workload: Workload
    repeats: int
    results: list[Result]
    verdicts: list[Verdict]
    tried: list[Result]

    @property
    def unequal(self) -> list[Result]:
        """Results that the oracle does not confirm."""
        found = [result for result in self.results if result.minimum_cosine is not None]
        # Put so that a cosine that is no number counts as unequal too.
        return [result for result in found if not (result.minimum_cosine or 0.0) >= MINIMUM_COSINE]


def compare(
    name: str,
    workload: Workload,
    *,
    baselines: Sequence[Contestant],
    others: Sequence[Contestant],
    claims: Sequence[Claim],
    expected: Tensor,
    repeats: int,
) -> Comparison:
    """Inspect every contestant, keep the baseline that needs the least CPU time, and race it with the others."""

    def cosine(means: Tensor) -> float:
        return minimum_cosine(means, expected, workload.positive)

    tried = [inspect(contestant, cosine) for contestant in baselines]
    best = min(range(len(tried)), key=lambda index: tried[index].first_cpu)
    results = [tried.pop(best), *(inspect(contestant, cosine) for contestant in others)]
    race([baselines[best], *others], results, repeats)
    by_name = {result.name: result for result in results}
    verdicts = [
        _verdict(claim, by_name[claim.faster.name], by_name[(claim.than or baselines[best]).name]) for claim in claims
    ]
    return Comparison(name, workload, repeats, results, verdicts, tried)


def _verdict(claim: Claim, faster: Result, than: Result) -> Verdict:
    return Verdict(
        faster=faster.name,
        than=than.name,
        goal=claim.goal,
        ratio_of_medians=median(than.wall) / median(faster.wall),
        paired_wall=[slow / fast for slow, fast in zip(than.wall, faster.wall, strict=True)],
        paired_cpu=[slow / fast for slow, fast in zip(than.cpu, faster.cpu, strict=True)],
    )
