"""A number of the report, beside the paper's number and whether its interval holds it.

The paper's numbers are data: paper.toml beside this file, with the section and the model of each. A number that the
paper prints as a picture alone is marked so; nothing was read off a picture.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from persona_lens.statistics import N_RESAMPLES, Estimate, pearson, question_resamples, resampled_pearson

DEFAULT_MODEL = "Qwen2.5-7B-Instruct"
"""Whose numbers stand beside those of a model that the paper does not have."""
OF_ONE_MODEL = ("layers.chosen", "dose.trait", "dose.coherence")
"""Figures in a model's own units, its layers and the norm of its vectors: beside another model they mean nothing."""
NOT_MEASURED = Estimate(None, None, None, 0)


@dataclass(frozen=True)
class PaperFigure:
    """A number of the paper, or a range of numbers.

    Attributes:
        figure: What was measured; the name that ours has.
        subject: Of which trait; empty for all of them.
        condition: At which coefficient.
        low: The number, or the lower end of its range; None where the paper prints a picture alone.
        high: The number again, or the upper end.
        model: Of which model; empty where none is named beside it.
        section: Its section.
        source: `paper`, `reviewers` who quote it, or an independent `replication`.
        words: What the picture shows, where there is no number.
    """

    figure: str
    subject: str
    condition: str
    low: float | None
    high: float | None
    model: str
    section: str
    source: str
    words: str

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return "not printed as a number"
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"


@cache
def paper_figures() -> tuple[PaperFigure, ...]:
    """Every number of paper.toml."""
    text = (files("persona_lens.replication") / "paper.toml").read_text(encoding="utf-8")
    figures: list[PaperFigure] = []
    for row in tomllib.loads(text)["figure"]:
        shared = (row.get("model", ""), row["section"], row.get("source", "paper"), row.get("words", ""))
        values = {("", name): [value, value] for name, value in row.get("values", {}).items()}
        values |= {("", name): ends for name, ends in row.get("ranges", {}).items()}
        for coefficient, traits in row.get("by_coefficient", {}).items():
            values |= {(coefficient, name): [value, value] for name, value in traits.items()}
        if "range" in row or not values:
            values["", ""] = row.get("range", [None, None])
        for (condition, subject), (low, high) in values.items():
            figures.append(PaperFigure(row["figure"], subject, condition, low, high, *shared))
    return tuple(figures)


def paper_figure(figure: str, subject: str, condition: str, model: str) -> PaperFigure | None:
    """The paper's number for a trait and model, or what comes nearest; None where there is none.

    A number of the trait goes before one of all traits, a printed one before a picture.
    """
    of_model = model if figure in OF_ONE_MODEL else model or DEFAULT_MODEL
    fitting = [
        number
        for number in paper_figures()
        if number.figure == figure
        and number.subject in ("", subject)
        and (number.condition == condition or number.low is None)
        and number.model in ("", of_model)
    ]
    return min(
        fitting, key=lambda number: (number.low is None, not number.subject, number.source != "paper"), default=None
    )


class ReportedNumber(NamedTuple):
    """A number of the report.

    Attributes:
        figure: What was measured; the name that the paper's number has.
        subject: Of which trait, mood or set.
        what: In words.
        ours: The number, its 95 % interval, and n.
        over: What the interval resamples; empty where there is no interval.
        condition: At which dose, or of which method.
        is_control: Whether it is a control of a headline number.
    """

    figure: str
    subject: str
    what: str
    ours: Estimate
    over: str = ""
    condition: str = ""
    is_control: bool = False

    def papers(self, model: str) -> PaperFigure | None:
        """The paper's number for it; None for a control."""
        return None if self.is_control else paper_figure(self.figure, self.subject, self.condition, model)

    def holds(self, model: str) -> bool | None:
        """Whether the interval meets the paper's number or range; None where one of them is missing."""
        theirs = self.papers(model)
        if theirs is None or theirs.low is None or theirs.high is None or self.ours.low is None:
            return None
        assert self.ours.high is not None
        return self.ours.low <= theirs.high and theirs.low <= self.ours.high

    def as_json(self, model: str) -> dict[str, Any]:
        """The number with the paper's, as JSON."""
        theirs = self.papers(model)
        beside = None
        if theirs is not None:
            beside = {name: getattr(theirs, name) for name in ("section", "source", "model", "low", "high", "words")}
        own = {"figure": self.figure, "subject": self.subject, "condition": self.condition, "what": self.what}
        numbers = {**self.ours._asdict(), "over": self.over, "control": self.is_control}
        return {**own, **numbers, "paper": beside, "holds": self.holds(model)}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "ReportedNumber":
        """A number as a report.json has it."""
        ours = Estimate(*(row[name] for name in Estimate._fields))
        return cls(row["figure"], row["subject"], row["what"], ours, row["over"], row["condition"], row["control"])


def correlation(x: Sequence[float | None], y: Sequence[float | None], seed: int = 0) -> Estimate:
    """Pearson's r over rows that have both, with its bootstrap interval over them."""
    pairs = [(one, other) for one, other in zip(x, y, strict=True) if one is not None and other is not None]
    first, second = (np.array(side, dtype=float) for side in (zip(*pairs, strict=True) if pairs else ([], [])))
    value = pearson(first, second)
    if value is None:
        return Estimate(None, None, None, len(pairs))
    drawn = question_resamples(len(pairs), N_RESAMPLES, seed)
    return Estimate.of(value, resampled_pearson(first, second, drawn), len(pairs))


def without_interval(value: float | None, n: int = 1) -> Estimate:
    """A number without an interval; NaN is no number."""
    return Estimate(None if value is None or np.isnan(value) else float(value), None, None, n)
