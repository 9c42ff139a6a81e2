"""Numbers that stand by themselves, each with a limit where it has one: seconds of a process, memory, exponents.

What is measured against something else in turns is a `Comparison` instead. Knows nothing about how they were measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.oracle import MINIMUM_COSINE


@dataclass(frozen=True)
class Measure:
    """One quantity, with an entry for each time it was measured; it should be at most `limit`."""

    name: str
    values: Sequence[float]
    unit: str
    limit: float | None = None
    agreement: float | None = None
    """Of what was computed with what it should be; None for a quantity of something that gives no numbers."""
    size: int | None = None
    """Of the workload, where the same is measured at several."""

    @property
    def held(self) -> bool | None:
        """Whether the median keeps the limit; None without one."""
        return None if self.limit is None else median(self.values) <= self.limit


@dataclass(frozen=True)
class Measures:
    """The measures of one workload."""

    name: str
    workload: str
    measures: Sequence[Measure]
    minimum: float = MINIMUM_COSINE

    @property
    def unequal(self) -> list[Measure]:
        """Measures of results that do not agree with what they should be."""
        found = [each for each in self.measures if each.agreement is not None]
        # Put so that an agreement that is no number counts as unequal too.
        return [each for each in found if not (each.agreement or 0.0) >= self.minimum]
