"""The finetuning study's sets under screening: what each form of dataset score says, and what the training then did.

A set's score is the mean over its rows (arXiv:2507.21509, section 6); from a random subset of them it costs as much
less as the subset is smaller, and varies from subset to subset (section I).
"""

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from jaxtyping import Float

from persona_lens.statistics import Estimate, pearson
from studies.finetuning_materials import Materials
from studies.finetuning_plan import StudySettings
from studies.finetuning_result import FinetuningStudy
from studies.mood_texts import training_rows
from studies.screening_plan import Form, ScreeningSettings
from studies.screening_pool import Pool


def measure_sets(
    pool: Pool,
    study: FinetuningStudy,
    materials: Materials,
    trained: StudySettings,
    settings: ScreeningSettings,
    layers: Sequence[int],
) -> dict[str, Any]:
    """Every set's scores on every mood, by form and layer, beside its trait scores after training; as JSON."""
    members = set_members(pool, study, materials, trained)
    after = {name: {mood: study.runs[name].score(mood) for mood in study.moods} for name in members}
    sets: dict[str, Any] = {}
    for name, rows in members.items():
        scores = {
            form: {
                str(layer): {mood: _mean(pool.scores(mood, form, layer)[rows]) for mood in study.moods}
                for layer in (layers if form != "classifier" else [study.layer])
            }
            for form in get_args(Form)
        }
        run = study.runs[name].run
        traits = {mood: estimate._asdict() for mood, estimate in after[name].items()}
        sets[name] = {"mood": run.mood, "rows": len(rows), "scores": scores, "traits": traits}
    subsets = {
        f"{fraction:g}": {
            mood: subset_loss(
                [pool.scores(mood, "difference", study.layer)[rows] for rows in members.values()],
                np.array([after[name][mood].value for name in members]),
                fraction,
                n_subsets=settings.subsets,
                seed=settings.seed,
            )
            for mood in study.moods
        }
        for fraction in settings.fractions
    }
    return {"layer": study.layer, "sets": sets, "subsets": subsets}


def set_members(
    pool: Pool, study: FinetuningStudy, materials: Materials, trained: StudySettings
) -> dict[str, list[int]]:
    """The places in the pool of each set's rows, which are drawn as the finetuning study drew them."""
    members: dict[str, list[int]] = {}
    for run in study.sets:
        rows = run.run.rows
        if rows == "full" or rows == "half":
            chats = training_rows(materials.split, run.run.mood, rows, materials.neutral, trained.rows, trained.seed)
            turns = [chat["messages"] for chat in chats]
            members[run.run.name] = [pool.place[turn[-2]["content"], turn[-1]["content"]] for turn in turns]
    return members


def _mean(scores: np.ndarray) -> float | None:
    finite = scores[~np.isnan(scores)]
    return float(finite.mean()) if len(finite) else None


def subset_loss(
    scores: Sequence[Float[np.ndarray, " row"]],
    after: Float[np.ndarray, " set"],
    fraction: float,
    *,
    n_subsets: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """What is lost where each set's score is the mean of a random `fraction` of its rows.

    As JSON: the root mean squared error against the mean of all rows, the standard deviation of the sets' scores to
    compare it with, and Pearson's r with the trait after training, its mean and central 95 % over subsets.
    """
    draw = np.random.default_rng(seed)
    finite = [values[~np.isnan(values)] for values in scores]
    whole = np.array([values.mean() for values in finite])
    drawn = np.array(
        [
            [draw.choice(values, max(1, round(fraction * len(values))), replace=False).mean() for values in finite]
            for _ in range(n_subsets)
        ]
    )
    rs = [pearson(means, after) for means in drawn]
    correlations = np.array([np.nan if r is None else r for r in rs])
    mean = float(np.nanmean(correlations)) if np.isfinite(correlations).any() else float("nan")
    return {
        "rmse": float(np.sqrt(((drawn - whole) ** 2).mean())),
        "spread": float(whole.std()),
        "r": Estimate.of(mean, correlations, len(finite))._asdict(),
    }
