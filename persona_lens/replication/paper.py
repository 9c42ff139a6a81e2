"""The paper's numbers, as data: paper.toml beside this file, with the section and the model of each.

A number that the paper prints as a picture alone is marked so, and nothing was read off a picture.
Knows nothing about ours.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

DEFAULT_MODEL = "Qwen2.5-7B-Instruct"
"""Whose figures stand beside those of a model that the paper does not have."""
OF_ONE_MODEL = ("layers.chosen", "dose.trait", "dose.coherence")
"""Figures in a model's own units, its layers and the norm of its vectors: beside another model they mean nothing."""


@dataclass(frozen=True)
class PaperFigure:
    """A number, or a range of numbers, to stand beside ours.

    Attributes:
        figure: What was measured; the name that ours has.
        subject: Of which trait; empty for all of them.
        condition: At which coefficient.
        low: The number, or the lower end of its range; None where the paper prints a picture alone.
        high: The number again, or the upper end.
        model: Of which model; empty where none is named beside it.
        section: Where it stands.
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
    found: list[PaperFigure] = []
    for row in tomllib.loads(text)["figure"]:
        shared = (row.get("model", ""), row["section"], row.get("source", "paper"), row.get("words", ""))
        values = {("", name): [value, value] for name, value in row.get("values", {}).items()}
        values |= {("", name): ends for name, ends in row.get("ranges", {}).items()}
        for coefficient, traits in row.get("by_coefficient", {}).items():
            values |= {(coefficient, name): [value, value] for name, value in traits.items()}
        if "range" in row or not values:
            values["", ""] = row.get("range", [None, None])
        for (condition, subject), (low, high) in values.items():
            found.append(PaperFigure(row["figure"], subject, condition, low, high, *shared))
    return tuple(found)


def paper_figure(figure: str, subject: str, condition: str, model: str) -> PaperFigure | None:
    """The number beside ours: of this trait and model, or what comes nearest; None where there is none.

    A number of the trait goes before one of all traits, a printed one before a picture.
    """
    of_model = model or DEFAULT_MODEL
    fitting = [
        each
        for each in paper_figures()
        if each.figure == figure
        and each.subject in ("", subject)
        and (each.condition == condition or each.low is None)
        and each.model in ("", model if figure in OF_ONE_MODEL else of_model)
    ]
    return min(fitting, key=lambda each: (each.low is None, not each.subject, each.source != "paper"), default=None)
