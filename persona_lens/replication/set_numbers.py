"""The numbers of the stages on sets: finetuning shifts, projection differences, and what held a trait down.

Whatever made the sets, the user's grid or a study, they are compared in one form.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from persona_lens.replication.context import CHOICES
from persona_lens.replication.preset import Preset
from persona_lens.replication.reported_number import ReportedNumber, correlation, without_interval
from persona_lens.replication.stages import BASE, grid_folder
from persona_lens.screening.result import Screening
from persona_lens.statistics import Estimate, auc
from persona_lens.storage.files import read_json

Form = Literal["difference", "proxy", "response"]
FORMS: tuple[Form, ...] = ("difference", "proxy", "response")


@dataclass(frozen=True)
class TunedSet:
    """One set after training, or the base model.

    Attributes:
        name: Its name.
        made_for: The trait or mood that it is made for; empty for none.
        version: Which of the sets of that name it is, such as `misaligned_2` or `full`; empty for the base model.
        scores: Trait score after training, by trait.
        shifts: Finetuning shift on the questions of a trait along the vector of a trait: by both.
        screening: Its rows before training; None where they were not screened.
        layer: The layer of the vectors that it was screened with, where there are several of each trait.
    """

    name: str
    made_for: str
    version: str
    scores: dict[str, Estimate]
    shifts: dict[str, dict[str, float]]
    screening: Screening | None = field(default=None, repr=False)
    layer: int | None = None

    def score(self, trait: str) -> float | None:
        """The trait score after training; None where that trait was not measured on this set."""
        return self.scores[trait].value if trait in self.scores else None

    def shift(self, trait: str, vector: str) -> float | None:
        """The finetuning shift on a trait's questions along a trait's vector; None where it was not measured."""
        return self.shifts.get(trait, {}).get(vector)

    def before(self, trait: str, form: Form) -> float | None:
        """The set's score before training on a trait's vector; None where it was not screened."""
        screening = self.screening
        return None if screening is None else screening.dataset_score(self.name, self._vector(trait), form).value

    def samples(self, trait: str) -> np.ndarray:
        """The projection differences of its rows on a trait's vector."""
        assert self.screening is not None, "only screened sets are asked"
        return self.screening.score(self._vector(trait), "difference").dropna().to_numpy(dtype=float)

    @property
    def mean_length(self) -> float:
        """Mean tokens of its rows' responses."""
        assert self.screening is not None, "only screened sets are asked"
        return float(np.mean(self.screening.rows["response_tokens"].to_numpy(dtype=float)))

    def _vector(self, trait: str) -> str:
        assert self.screening is not None, "only screened sets are asked"
        return self.screening.vector(trait) if self.layer is None else f"{trait}@{self.layer}"


Contrast = Callable[[str, Sequence[TunedSet]], tuple[TunedSet | None, list[TunedSet]]]
"""The set with the most of a trait, and the sets that its samples are told apart from."""


def tuned_sets(preset: Preset, folder: Path) -> list[TunedSet]:
    """Every finished set of the user's grid, the base model first."""
    sets: list[TunedSet] = []
    table = preset.bring.finetuning
    # From the table and not from the file's name: names and versions may hold "_" themselves.
    parts = {} if table is None else table.set_parts
    for path in sorted((grid_folder(folder) / "runs").glob("*.json"), key=lambda path: (path.stem != BASE, path.stem)):
        record = read_json(path)
        scores = {trait: Estimate(**estimate) for trait, estimate in record["traits"].items()}
        name, version = parts.get(path.stem, ("", ""))
        made_for = "" if table is None else table.traits.get(name, "")
        rows = screening_in(grid_folder(folder) / "screened" / path.stem)
        sets.append(TunedSet(path.stem, made_for, version, scores, record["shift"], rows))
    return sets


def screening_in(folder: Path) -> Screening | None:
    """The finished screening of a folder."""
    return Screening.load(folder) if (folder / "summary.json").exists() else None


def grid_contrast(preset: Preset) -> Contrast:
    """A trait's last version against its `normal` one."""
    table = preset.bring.finetuning

    def contrast(trait: str, sets: Sequence[TunedSet]) -> tuple[TunedSet | None, list[TunedSet]]:
        own = [tuned for tuned in sets if tuned.made_for == trait]
        worst = next((tuned for tuned in own if table is not None and tuned.version == table.versions[-1]), None)
        return worst, [tuned for tuned in own if tuned.version == "normal"]

    return contrast


def finetuning_numbers(sets: Sequence[TunedSet], seed: int) -> Iterator[ReportedNumber]:
    """R of shift and trait over the sets, own trait and, beside it, along the other traits' vectors."""
    if len(sets) < 2:
        return
    traits = list(sets[0].scores)
    for trait in traits:
        after = [tuned.score(trait) for tuned in sets]
        by_vector = {
            vector: correlation([tuned.shift(trait, vector) for tuned in sets], after, seed) for vector in traits
        }
        what = "r of the shift with the trait score after finetuning"
        yield ReportedNumber("finetuning.shift", trait, what, by_vector[trait], "sets")
        for vector in traits:
            if vector != trait:
                what = f"r of the shift along {vector} with this trait's score"
                yield ReportedNumber("finetuning.cross-trait", trait, what, by_vector[vector], "sets")
    for tuned in sets:
        if tuned.made_for in tuned.scores:
            what = f"{tuned.made_for} score after finetuning"
            yield ReportedNumber("finetuning.score", tuned.name, what, tuned.scores[tuned.made_for], "questions")
    for trait in traits:
        what, score = f"{trait} score before finetuning", sets[0].scores[trait]
        yield ReportedNumber("finetuning.score", BASE, what, score, "questions", trait, is_control=True)


def projection_numbers(sets: Sequence[TunedSet], seed: int, contrast: Contrast) -> Iterator[ReportedNumber]:
    """R of each form of a set's score, before training, with its trait score and with its shift after it."""
    sets = [tuned for tuned in sets if tuned.screening is not None]
    if len(sets) < 2:
        return
    for trait in sets[0].scores:
        after = [tuned.score(trait) for tuned in sets]
        shifts = [tuned.shift(trait, trait) for tuned in sets]
        before = {form: [tuned.before(trait, form) for tuned in sets] for form in FORMS}
        difference, lengths = before["difference"], [tuned.mean_length for tuned in sets]
        rows = [
            ("trait", "the projection difference with the trait score after training", difference, after),
            ("shift", "the projection difference with the finetuning shift", difference, shifts),
            ("proxy", "the proxy, by the last prompt token, with the trait score", before["proxy"], after),
            ("response", "the projection of the training data alone with the trait score", before["response"], after),
            ("trait", "the sets' mean response length with the trait score", lengths, after),
        ]
        for figure, what, x, y in rows:
            r, is_control = correlation(x, y, seed), x is lengths
            yield ReportedNumber(f"projection.{figure}", trait, f"r of {what}", r, "sets", is_control=is_control)
        yield from sample_level(trait, *contrast(trait, sets))


def sample_level(trait: str, worst: TunedSet | None, others: Sequence[TunedSet]) -> Iterator[ReportedNumber]:
    """How well sample scores tell the trait's worst set from the others."""
    if worst is None or not others:
        return
    positive, negative = worst.samples(trait), np.concatenate([tuned.samples(trait) for tuned in others])
    what = f"AUC of sample scores, {worst.name} against {', '.join(tuned.name for tuned in others)}"
    value = without_interval(auc(positive, negative), len(positive) + len(negative))
    yield ReportedNumber("projection.auc", trait, what, value)


def mitigation_numbers(preset: Preset, folder: Path) -> Iterator[ReportedNumber]:
    """The score under every method, with coherence and capability."""
    for path in sorted((grid_folder(folder) / "mitigation").glob("*.json")):
        record = read_json(path)
        estimates = (Estimate(**record[name]) for name in ("score", "coherence", "capability"))
        yield from method_numbers(record["trait"], method_name(record["method"], record["coefficient"]), *estimates)


def method_numbers(
    trait: str, method: str, score: Estimate, coherence: Estimate, accuracy: Estimate
) -> Iterator[ReportedNumber]:
    """One method's three numbers."""
    yield ReportedNumber("mitigation.score", trait, f"{method}: trait score", score, "questions", method)
    yield ReportedNumber("mitigation.coherence", trait, f"{method}: coherence", coherence, "questions", method)
    yield ReportedNumber("mitigation.accuracy", trait, f"{method}: multiple choice", accuracy, "questions", method)


def method_name(method: str, coefficient: float) -> str:
    """A method with its dose, where it has one."""
    return f"{method}, {coefficient:g}" if coefficient else method


def fact_numbers(preset: Preset, folder: Path) -> Iterator[ReportedNumber]:
    """Questions on new facts and narrow tasks answered right."""
    for path in sorted((folder / "facts").glob("*.json")):
        record = read_json(path)
        what, accuracy = f"questions right, {record['how']}", Estimate(**record["accuracy"])
        yield ReportedNumber("facts.accuracy", record["set"], what, accuracy, "questions", record["how"])


def chat_numbers(preset: Preset, folder: Path) -> Iterator[ReportedNumber]:
    """The trait score after training on each choice of real chats."""
    for choice in CHOICES:
        if (path := folder / "chats" / f"{choice}.json").exists():
            record = read_json(path)
            what = f"{record['trait']} score after the {choice} samples"
            yield ReportedNumber("chats.score", choice, what, Estimate(**record["score"]), "questions")


def benchmark_numbers(preset: Preset, folder: Path, rows: list[dict[str, Any]]) -> Iterator[ReportedNumber]:
    """R of the user's benchmark scores with the judge's trait scores, over the sets that have both."""
    sets = {tuned.name: tuned for tuned in tuned_sets(preset, folder)}
    for trait in dict.fromkeys(row["trait"] for row in rows):
        both = [row for row in rows if row["trait"] == trait and row["set"] in sets]
        ours = [sets[row["set"]].score(trait) for row in both]
        r = correlation([row["score"] for row in both], ours, preset.seed)
        yield ReportedNumber("benchmarks", trait, "r of the benchmark with the judge's score", r, "sets")
