"""One comparison: contestants on one workload, each at its best batch size, and claims about who is faster.

Knows nothing about how rows are run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.oracle import MINIMUM_COSINE
from benchmarks.texts import Workload
from benchmarks.timing import Contestant, Result, inspect, race

Variants = Sequence[Contestant]
"""One way to do the work at several batch sizes; each runs once, and the one that needs the least CPU time races."""


@dataclass(frozen=True)
class Claim:
    """What `faster` names is `goal` times faster than what `than` names; without a goal the ratio only explains.

    CPU time does not count where one of them only waits.
    """

    faster: str
    than: str
    goal: float | None = None
    cpu_counts: bool = True


@dataclass(frozen=True)
class Verdict:
    """What became of a claim. Ratios say how many times faster; the paired ones have an entry for each round."""

    faster: str
    than: str
    goal: float | None
    ratio_of_medians: float
    paired_wall: list[float]
    paired_cpu: list[float]
    cpu_counts: bool = True

    @property
    def held(self) -> bool | None:
        """Whether the medians of the paired ratios reach the goal, in wall and in CPU time; None without a goal.

        CPU time too, because a neighbour that runs during one contestant's turns changes wall time alone.
        """
        if self.goal is None:
            return None
        counting = [self.paired_wall, self.paired_cpu] if self.cpu_counts else [self.paired_wall]
        return min(map(median, counting)) >= self.goal


@dataclass(frozen=True)
class Comparison:
    """A race on one workload. `tried` are the batch sizes that did not race: they ran once."""

    name: str
    workload: Workload
    repeats: int
    results: list[Result]
    tried: list[Result]
    verdicts: list[Verdict]
    minimum: float

    @property
    def unequal(self) -> list[Result]:
        """Results that do not agree with what they should be."""
        found = [each for each in (*self.results, *self.tried) if each.agreement is not None]
        # Put so that an agreement that is no number counts as unequal too.
        return [result for result in found if not (result.agreement or 0.0) >= self.minimum]


def compare(
    name: str,
    workload: Workload,
    contestants: Mapping[str, Variants],
    claims: Sequence[Claim],
    *,
    agreement: Callable[[Any], float],
    minimum: float = MINIMUM_COSINE,
    repeats: int,
) -> Comparison:
    """Inspect every variant of every contestant, race the best variant of each, and judge the claims by its rounds.

    `agreement` says how far a result is what it should be; below `minimum` it counts as unequal.
    """
    racing: dict[str, tuple[Contestant, Result]] = {}
    tried: list[Result] = []
    for label, variants in contestants.items():
        inspected = [(variant, inspect(variant, agreement)) for variant in variants]
        racing[label] = min(inspected, key=lambda pair: pair[1].first_cpu)
        tried += [result for _, result in inspected if result is not racing[label][1]]
    race(list(racing.values()), repeats)
    verdicts = [verdict(claim, racing[claim.faster][1], racing[claim.than][1]) for claim in claims]
    return Comparison(name, workload, repeats, [result for _, result in racing.values()], tried, verdicts, minimum)


def verdict(claim: Claim, faster: Result, than: Result) -> Verdict:
    """What became of a claim about two contestants that took turns."""
    return Verdict(
        faster=faster.name,
        than=than.name,
        goal=claim.goal,
        ratio_of_medians=median(than.wall) / median(faster.wall),
        paired_wall=[slow / fast for slow, fast in zip(than.wall, faster.wall, strict=True)],
        paired_cpu=[slow / fast for slow, fast in zip(than.cpu, faster.cpu, strict=True)],
        cpu_counts=claim.cpu_counts,
    )
