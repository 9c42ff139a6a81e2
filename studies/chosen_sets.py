"""Sets of rows that were chosen by their projection difference, what training on one did, and what was predicted of it.

The paper trains on the highest, random and lowest samples of a pool, also after a judge has removed the obvious ones
(arXiv:2507.21509, section L).
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from persona_lens.statistics import Estimate

Choice = Literal["high", "random", "low"]

CHOICES: tuple[Choice, ...] = ("high", "random", "low")


@dataclass(frozen=True)
class ChosenSet:
    """Rows of the pool that were chosen by their projection difference on one mood's vector, to train on.

    Attributes:
        mood: Whose vector.
        choice: The highest rows, random ones, or the lowest.
        is_filtered: Whether the rows that the mood's classifier finds obvious were removed before.
    """

    mood: str
    choice: Choice
    is_filtered: bool

    @property
    def name(self) -> str:
        """What names its files."""
        return f"{self.mood}_{self.choice}" + "_filtered" * self.is_filtered


def chosen_sets(targets: tuple[str, ...]) -> list[ChosenSet]:
    """Every set, mood by mood, before the filter and after it."""
    return [
        ChosenSet(mood, choice, is_filtered) for mood in targets for is_filtered in (False, True) for choice in CHOICES
    ]


class Prediction(NamedTuple):
    """A number that was predicted to be above a bound; it held where the whole interval is."""

    what: str
    found: Estimate
    bound: float

    @property
    def held(self) -> bool:
        """Whether the interval's lower end is above the bound; a missing one holds nothing."""
        return self.found.low is not None and self.found.low > self.bound


@dataclass(frozen=True)
class MeasuredSet:
    """One chosen set after training; `record` is what `screening_study` wrote."""

    chosen: ChosenSet
    record: dict[str, Any] = field(repr=False)

    @property
    def score(self) -> Estimate:
        """Mean classifier score, 0 to 100, of its own mood."""
        return Estimate(**self.record["traits"][self.chosen.mood])

    @property
    def coherence(self) -> Estimate:
        """Mean coherence, 0 to 100, under the base model."""
        return Estimate(**self.record["coherence"])

    @property
    def own_rows(self) -> int:
        """How many of its rows are of its own mood."""
        return self.record["sources"].get(self.chosen.mood, 0)
