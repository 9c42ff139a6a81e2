"""What the stages on sets found: finetuning shifts, projection differences, and what held a trait down.

The moods' study and the user's own grid are read into one form, so that both are compared alike.
Knows nothing about models: a folder comes in, findings go out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from persona_lens.experiments.finetuning_result import FinetuningStudy, read_study
from persona_lens.replication.brought_stages import CHOICES
from persona_lens.replication.finding import Finding, alone, correlation
from persona_lens.replication.grid_stages import BASE, grid_folder
from persona_lens.replication.mood_stages import screen_folder, study_folder
from persona_lens.replication.preset import Preset
from persona_lens.screening.result import Screening
from persona_lens.statistics import Estimate, auc
from persona_lens.storage.files import read_json

Form = Literal["difference", "proxy", "response"]
FORMS: tuple[Form, ...] = ("difference", "proxy", "response")
NOT_MEASURED = Estimate(None, None, None, 0)


@dataclass(frozen=True)
class MeasuredSet:
    """One set after training, or the base model.

    Attributes:
        name: Its name.
        made_for: The trait or mood that it is made for; empty for none.
        version: Which of the sets of that name it is, such as `misaligned_2` or `full`; empty for the base model.
        scores: Trait score after training, by trait.
        shifts: Finetuning shift on the questions of a trait along the vector of a trait: by both.
        screening: Its rows before training; None where they were not screened.
    """

    name: str
    made_for: str
    version: str
    scores: dict[str, Estimate]
    shifts: dict[str, dict[str, float]]
    screening: Screening | None = field(default=None, repr=False)

    def score(self, trait: str) -> float | None:
        """The trait score after training; None where that trait was not measured on this set."""
        return self.scores[trait].value if trait in self.scores else None

    def shift(self, trait: str, vector: str) -> float | None:
        """The finetuning shift on a trait's questions along a trait's vector; None where it was not measured."""
        return self.shifts.get(trait, {}).get(vector)


def mood_study(preset: Preset, folder: Path) -> FinetuningStudy | None:
    """The moods' study as far as it has come; None where it has not begun."""
    if preset.moods is None or not (study_folder(folder) / "runs" / "base.json").exists():
        return None
    return read_study(study_folder(folder))


def measured_sets(preset: Preset, folder: Path) -> list[MeasuredSet]:
    """Every finished set, the base model first."""
    if preset.finetuning.source == "moods":
        return _mood_sets(preset, folder)
    found: list[MeasuredSet] = []
    table = preset.bring.finetuning
    # From the table and not from the file's name: names and versions may hold "_" themselves.
    parts = {} if table is None else table.set_parts
    for path in sorted((grid_folder(folder) / "runs").glob("*.json"), key=lambda path: (path.stem != BASE, path.stem)):
        record = read_json(path)
        scores = {trait: Estimate(**each) for trait, each in record["traits"].items()}
        name, version = parts.get(path.stem, ("", ""))
        own = "" if table is None else table.traits.get(name, "")
        rows = _screening(grid_folder(folder) / "screened" / path.stem)
        found.append(MeasuredSet(path.stem, own, version, scores, record["shift"], rows))
    return found


def _mood_sets(preset: Preset, folder: Path) -> list[MeasuredSet]:
    study = mood_study(preset, folder)
    if study is None or preset.moods is None:
        return []
    moods = preset.moods.moods
    found: list[MeasuredSet] = []
    for each in sorted(study.sets, key=lambda each: (each.run.rows != "base", each.run.name)):
        shifts = {vector: each.shift(vector, study.layer) for vector in moods}
        scores = {mood: each.score(mood) for mood in moods}
        rows = _screening(screen_folder(folder, each.run.name))
        version = "" if each.run.rows == "base" else each.run.rows
        found.append(MeasuredSet(each.run.name, each.run.mood, version, scores, dict.fromkeys(moods, shifts), rows))
    return found


def _screening(folder: Path) -> Screening | None:
    return Screening.load(folder) if (folder / "summary.json").exists() else None


def vector_name(preset: Preset, folder: Path, trait: str, screening: Screening) -> str:
    """The vector of a screening that stands for a trait: the study's layer for moods, the trait's own otherwise."""
    study = mood_study(preset, folder)
    if preset.finetuning.source == "moods" and study is not None:
        return f"{trait}@{study.layer}"
    return screening.vector(trait)


def set_score(preset: Preset, folder: Path, each: MeasuredSet, trait: str, form: Form) -> float | None:
    """A set's score before training on a trait's vector; None where it was not screened."""
    if each.screening is None:
        return None
    name = vector_name(preset, folder, trait, each.screening)
    return each.screening.dataset_score(each.name, name, form).value


def finetuning_findings(preset: Preset, folder: Path) -> Iterator[Finding]:
    """R of shift and trait over the sets, own trait and, beside it, along the other traits' vectors."""
    sets = measured_sets(preset, folder)
    if len(sets) < 2:
        return
    traits = list(sets[0].scores)
    for trait in traits:
        after = [each.score(trait) for each in sets]
        by_vector = {
            vector: correlation([each.shift(trait, vector) for each in sets], after, preset.seed) for vector in traits
        }
        what = "r of the shift with the trait score after finetuning"
        yield Finding("finetuning.shift", trait, what, by_vector[trait], "sets")
        for vector in traits:
            if vector != trait:
                what = f"r of the shift along {vector} with this trait's score"
                yield Finding("finetuning.cross-trait", trait, what, by_vector[vector], "sets")
    for each in sets:
        if each.made_for in each.scores:
            what = f"{each.made_for} score after finetuning"
            yield Finding("finetuning.score", each.name, what, each.scores[each.made_for], "questions")
    for trait in traits:
        what = f"{trait} score before finetuning"
        yield Finding("finetuning.score", BASE, what, sets[0].scores[trait], "questions", trait, is_control=True)


def projection_findings(preset: Preset, folder: Path) -> Iterator[Finding]:
    """R of each form of a set's score, before training, with its trait score and with its shift after it."""
    sets = [each for each in measured_sets(preset, folder) if each.screening is not None]
    if len(sets) < 2:
        return
    for trait in sets[0].scores:
        after = [each.score(trait) for each in sets]
        shifts = [each.shift(trait, trait) for each in sets]
        by_form = {form: [set_score(preset, folder, each, trait, form) for each in sets] for form in FORMS}
        what = "r of the projection difference with the trait score after training"
        yield Finding("projection.trait", trait, what, correlation(by_form["difference"], after, preset.seed), "sets")
        what = "r of the projection difference with the finetuning shift"
        yield Finding("projection.shift", trait, what, correlation(by_form["difference"], shifts, preset.seed), "sets")
        what = "r of the proxy, by the last prompt token, with the trait score"
        yield Finding("projection.proxy", trait, what, correlation(by_form["proxy"], after, preset.seed), "sets")
        what = "r of the projection of the training data alone with the trait score"
        yield Finding("projection.response", trait, what, correlation(by_form["response"], after, preset.seed), "sets")
        lengths = [float(np.mean(_column(each, "response_tokens"))) for each in sets]
        what = "r of the sets' mean response length with the trait score"
        found = correlation(lengths, after, preset.seed)
        yield Finding("projection.trait", trait, what, found, "sets", is_control=True)
        yield from _sample_level(preset, folder, sets, trait)


def _sample_level(preset: Preset, folder: Path, sets: list[MeasuredSet], trait: str) -> Iterator[Finding]:
    """How well sample scores tell the trait's worst set from the other moods' worst sets, or from its normal one."""
    worst = next((each for each in sets if each.made_for == trait and _is_worst(preset, each)), None)
    if preset.finetuning.source == "moods":
        others = [each for each in sets if each.made_for != trait and _is_worst(preset, each)]
    else:
        others = [each for each in sets if each.made_for == trait and each.version == "normal"]
    if worst is None or not others:
        return
    positive, *negative = (_samples(preset, folder, each, trait) for each in (worst, *others))
    value = auc(positive, np.concatenate(negative))
    what = f"AUC of sample scores, {worst.name} against {', '.join(each.name for each in others)}"
    yield Finding("projection.auc", trait, what, alone(value, len(positive) + sum(map(len, negative))))


def _is_worst(preset: Preset, each: MeasuredSet) -> bool:
    """Whether it is the version with the most of the trait: the last one of the user's, and `full` of a mood."""
    table = preset.bring.finetuning
    worst = "full" if preset.finetuning.source == "moods" or table is None else table.versions[-1]
    return each.version == worst


def _samples(preset: Preset, folder: Path, each: MeasuredSet, trait: str) -> np.ndarray:
    assert each.screening is not None
    found = each.screening.score(vector_name(preset, folder, trait, each.screening), "difference")
    return found.dropna().to_numpy(dtype=float)


def _column(each: MeasuredSet, name: str) -> np.ndarray:
    assert each.screening is not None
    return each.screening.rows[name].to_numpy(dtype=float)


def mitigation_findings(preset: Preset, folder: Path) -> Iterator[Finding]:
    """The score under every method, coherence and capability beside it; for moods also the paired difference."""
    study = mood_study(preset, folder)
    if study is not None and preset.moods is not None:
        yield from _mood_mitigation(study, preset.moods.moods)
        return
    for path in sorted((grid_folder(folder) / "mitigation").glob("*.json")):
        record = read_json(path)
        method, trait = _named(record["method"], record["coefficient"]), record["trait"]
        yield from _method(trait, method, *(Estimate(**record[name]) for name in ("score", "coherence", "capability")))


def _mood_mitigation(study: FinetuningStudy, moods: tuple[str, ...]) -> Iterator[Finding]:
    for mood in moods:
        plain = study.runs.get(f"{mood}_full")
        own = [each for each in study.runs.values() if each.run.mood == mood and each.run.rows == "full"]
        if plain is None or len(own) < 2:
            continue
        for each in own:
            method = _named(each.run.method, each.run.coefficient)
            yield from _method(mood, method, each.own, each.coherence, each.accuracy)
            if each is not plain:
                difference = study.difference(each, plain)
                what = f"{method}: score minus that without it"
                yield Finding("mitigation.difference", mood, what, difference, "questions", method)


def _method(trait: str, method: str, score: Estimate, coherence: Estimate, able: Estimate) -> Iterator[Finding]:
    yield Finding("mitigation.score", trait, f"{method}: trait score", score, "questions", method)
    yield Finding("mitigation.coherence", trait, f"{method}: coherence", coherence, "questions", method)
    yield Finding("mitigation.accuracy", trait, f"{method}: multiple choice", able, "questions", method)


def _named(method: str, coefficient: float) -> str:
    return f"{method}, {coefficient:g}" if coefficient else method


def brought_findings(folder: Path) -> Iterator[Finding]:
    """Facts learnt, sets of real chats, and the benchmarks that the user scored."""
    for path in sorted((folder / "facts").glob("*.json")):
        record = read_json(path)
        what = f"questions right, {record['how']}"
        yield Finding("facts.accuracy", record["set"], what, Estimate(**record["accuracy"]), "questions", record["how"])
    for choice in CHOICES:
        path = folder / "chats" / f"{choice}.json"
        if path.exists():
            record = read_json(path)
            what = f"{record['trait']} score after the {choice} samples"
            yield Finding("chats.score", choice, what, Estimate(**record["score"]), "questions")


def benchmark_findings(preset: Preset, folder: Path, rows: list[dict[str, Any]]) -> Iterator[Finding]:
    """R of the user's benchmark scores with the judge's trait scores, over the sets that have both."""
    sets = {each.name: each for each in measured_sets(preset, folder)}
    for trait in dict.fromkeys(row["trait"] for row in rows):
        both = [row for row in rows if row["trait"] == trait and row["set"] in sets]
        ours = [sets[row["set"]].score(trait) for row in both]
        found = correlation([row["score"] for row in both], ours, preset.seed)
        yield Finding("benchmarks", trait, "r of the benchmark with the judge's score", found, "sets")
