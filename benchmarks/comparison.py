"""One comparison: a baseline at its best batch size, and what is measured against it, with goals.

Knows nothing about how rows are run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from benchmarks.oracle import MINIMUM_COSINE, minimum_cosine
from benchmarks.texts import Workload
from benchmarks.timing import Contestant, Result, inspect, paired_ratios, race, ratio_of_medians


@dataclass(frozen=True)
class Entry:
    """A contestant, and how many times faster than the baseline it is to be; without a goal it explains another."""

    contestant: Contestant
    goal: float | None = None


@dataclass(frozen=True)
class Measured:
    """What an entry did, beside its baseline. Ratios say how many times faster than the baseline."""

    result: Result
    goal: float | None
    ratio_of_medians: float
    paired_ratios: list[float]
    cpu_ratio: float
    """Ratio of the medians of CPU time, which neighbours disturb less than wall time."""

    @property
    def ratio(self) -> float:
        """The median of the paired ratios, by which a goal is held or missed."""
        return median(self.paired_ratios)

    @property
    def held(self) -> bool | None:
        """Whether the goal is held; None without a goal."""
        return None if self.goal is None else self.ratio >= self.goal


@dataclass(frozen=True)
class Comparison:
    """A race on one workload. `tried` are the baseline's other batch sizes, which ran once."""

    name: str
    workload: Workload
    repeats: int
    baseline: Result
    measured: list[Measured]
    tried: list[Result]

    @property
    def unequal(self) -> list[Result]:
        """Results that the oracle does not confirm."""
        every = [self.baseline, *(each.result for each in self.measured)]
        return [r for r in every if r.minimum_cosine is not None and not r.minimum_cosine >= MINIMUM_COSINE]


def compare(
    name: str,
    workload: Workload,
    baselines: Sequence[Contestant],
    entries: Sequence[Entry],
    *,
    expected: Tensor,
    repeats: int,
) -> Comparison:
    """Inspect every contestant, take the baseline that needs the least CPU time, and let it race the entries."""

    def cosine(means: Tensor) -> float:
        return minimum_cosine(means, expected, workload.positive)

    tried = [inspect(contestant, cosine) for contestant in baselines]
    best = min(range(len(tried)), key=lambda index: tried[index].first_cpu)
    baseline = tried.pop(best)
    results = [inspect(entry.contestant, cosine) for entry in entries]
    race([baselines[best], *(entry.contestant for entry in entries)], [baseline, *results], repeats)
    measured = [
        Measured(
            result=result,
            goal=entry.goal,
            ratio_of_medians=ratio_of_medians(baseline.wall, result.wall),
            paired_ratios=paired_ratios(baseline.wall, result.wall),
            cpu_ratio=ratio_of_medians(baseline.cpu, result.cpu),
        )
        for entry, result in zip(entries, results, strict=True)
    ]
    return Comparison(name, workload, repeats, baseline, measured, tried)
