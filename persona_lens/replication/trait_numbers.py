"""The numbers of the stages on traits, read from their folders: directions, layers, doses, monitoring, cosines."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from persona_lens.evaluation.dose_response import DoseResponse
from persona_lens.evaluation.layer_selection import LayerSweep
from persona_lens.extraction.pipeline import best_layer
from persona_lens.judges.keep import keep_pairs, pair_rollouts
from persona_lens.judges.scores import read_scores
from persona_lens.monitoring.experiment import MonitoringExperiment
from persona_lens.replication.context import KINDS, best_cell, selected_layer, trait_folder
from persona_lens.replication.preset import Preset
from persona_lens.replication.reported_number import ReportedNumber, without_interval
from persona_lens.rollouts.rows import read_rollouts
from persona_lens.statistics import N_RESAMPLES, Estimate, pearson, question_resamples
from persona_lens.storage.files import read_json
from persona_lens.vectors.persona_vectors import PersonaVectors

SHUFFLES = 200


def _folders(preset: Preset, folder: Path, file: str) -> Iterator[tuple[str, Path]]:
    """The traits whose folder has a file, with the folder."""
    for name in preset.traits:
        if (trait_folder(folder, name) / file).exists():
            yield name, trait_folder(folder, name)


def extraction_numbers(preset: Preset, folder: Path) -> Iterator[ReportedNumber]:
    """How many pairs were kept, and how well the direction tells held-out questions' sides apart."""
    for name, here in _folders(preset, folder, "summary.json"):
        pairs = read_json(here / "summary.json")["pairs"]
        share = without_interval(pairs["kept"] / pairs["pairs"], pairs["pairs"])
        yield ReportedNumber("extraction.kept", name, "pairs kept by the judge, share of all", share)
        vectors = PersonaVectors.load(here / "vectors.safetensors")
        statistics = vectors.statistics
        assert statistics is not None, "an extraction leaves statistics"
        try:
            layer = selected_layer(folder, name, preset)
        except ValueError:  # before there is a sweep, the layer of the best held-out AUC
            layer = best_layer(vectors) or 0
        auc = _statistic(vectors, "held_out_auc", layer, statistics.n_rows)
        yield ReportedNumber("extraction.auc", name, f"AUC on held-out questions, layer {layer}", auc, "questions")
        placebo = without_interval(_number(statistics.placebo_auc_95[layer]), statistics.n_rows)
        what = "the same with polarity swapped at random, 95th percentile"
        yield ReportedNumber("extraction.auc", name, what, placebo, is_control=True)
        if statistics.embedding is not None:
            lexical = without_interval(statistics.embedding["held_out_auc"], statistics.n_rows)
            yield ReportedNumber("extraction.auc", name, "the same of the embedding row", lexical, is_control=True)
        halves = _statistic(vectors, "split_half", layer, statistics.n_questions)
        what = "cosine of the directions of two halves"
        yield ReportedNumber("extraction.split-half", name, what, halves, "questions")


def _statistic(vectors: PersonaVectors, name: str, layer: int, n: int) -> Estimate:
    assert vectors.statistics is not None, "an extraction leaves statistics"
    value, low, high = (_number(vectors.statistics.by_layer[name + end][layer]) for end in ("", "_low", "_high"))
    return Estimate(value, low, high, n)


def _number(value: torch.Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def layer_numbers(preset: Preset, folder: Path) -> Iterator[ReportedNumber]:
    """The layer of the best cell, counted from 1 as the paper does, by our rule and by the paper's."""
    for name, here in _folders(preset, folder, "layer_sweep.json"):
        sweep = LayerSweep.load(here)
        ours, best = best_cell(sweep, preset), sweep.best(None)
        ties = sorted({layer + 1 for layer, _ in ours.ties} - {ours.layer + 1})
        tied = f"; not told apart from {ties}" if ties else ""
        what = f"layer by trait and coherence, counted from 1{tied}"
        number = without_interval(ours.layer + 1, ours.trait_score.n)
        yield ReportedNumber("layers.chosen", name, what, number)
        number = without_interval(best.layer + 1, best.trait_score.n)
        yield ReportedNumber("layers.chosen", name, "layer by the trait alone (the paper's rule)", number)
        cell = f"layer {ours.layer} x {ours.coefficient:g}"
        what = f"trait score of the best cell, {cell}"
        yield ReportedNumber("layers.trait", name, what, ours.trait_score, "questions")
        yield ReportedNumber("layers.coherence", name, f"its coherence, {cell}", ours.coherence, "questions")


def dose_numbers(preset: Preset, folder: Path) -> Iterator[ReportedNumber]:
    """Trait and coherence at each dose, the slope, and the slopes of random directions."""
    for name, here in _folders(preset, folder, "dose_response.json"):
        response = DoseResponse.load(here)
        what = f"trait score for each 1.0 of the coefficient, layer {response.layer}, coherent doses"
        yield ReportedNumber("dose.slope", name, what, response.slope(), "questions")
        for number, slope in enumerate(response.random_slopes()):
            what = f"the same of random direction {number} of equal norm"
            yield ReportedNumber("dose.slope", name, what, slope, "questions", is_control=True)
        for amount, cell in zip(response.coefficients, response.evaluations, strict=True):
            dose = f"{amount:g}"
            yield ReportedNumber("dose.trait", name, f"trait score at {dose}", cell.trait_score, "questions", dose)
            yield ReportedNumber("dose.coherence", name, f"coherence at {dose}", cell.coherence, "questions", dose)


def monitoring_numbers(preset: Preset, folder: Path) -> Iterator[ReportedNumber]:
    """Both correlations, and the overall one that the conditions alone would give."""
    for name in preset.traits:
        for kind in KINDS:
            path = folder / "monitoring" / f"{name}_{kind}" / "experiment.json"
            if not path.exists():
                continue
            experiment = MonitoringExperiment.load(path)
            figure, where = f"monitoring.{kind}", f"{kind}, layer {experiment.layer}"
            what = f"r of projection and trait, {where}"
            yield ReportedNumber(f"{figure}.overall", name, what, experiment.overall(), "questions")
            what = f"mean r within conditions, {where}"
            yield ReportedNumber(f"{figure}.within", name, what, experiment.within(), "questions")
            what, control = "overall r with scores shuffled within each condition", shuffled_within(experiment)
            yield ReportedNumber(f"{figure}.overall", name, what, control, "shuffles", is_control=True)


def shuffled_within(experiment: MonitoringExperiment) -> Estimate:
    """The overall correlation with scores shuffled within conditions: what the conditions' means give by themselves.

    Its mean and central 95 % over shuffles.
    """
    draw = np.random.default_rng(experiment.seed)
    points = experiment.compared
    x = np.array([point.projections[experiment.layer] for point in points])
    scores = np.array([point.trait_score for point in points], dtype=float)
    conditions = np.array([experiment.conditions.index(point.condition) for point in points])
    groups = [np.flatnonzero(conditions == number) for number in range(len(experiment.conditions))]
    values: list[float] = []
    for _ in range(SHUFFLES):
        y = scores.copy()
        for group in groups:
            y[group] = scores[draw.permutation(group)]
        correlation = pearson(x, y)
        values += [] if correlation is None else [correlation]
    if not values:
        return Estimate(None, None, None, len(points))
    return Estimate.of(float(np.mean(values)), np.array(values), len(points))


def cosine_numbers(preset: Preset, folder: Path) -> Iterator[ReportedNumber]:
    """Cosines between traits at the preset's layer, and between the two halves of each trait's own direction."""
    layer = preset.cosines.layer
    folders = dict(_folders(preset, folder, "summary.json"))
    contrasts = {name: _question_contrasts(here, name, layer, preset) for name, here in folders.items()}
    where = f"layer {layer + 1} counted from 1"
    for one, other in combinations(folders, 2):
        cosine = _cosine(contrasts[one], contrasts[other], preset.seed)
        subject = f"{other}, {one}" if other == "evil" else f"{one}, {other}"  # the paper's pairs begin with evil
        yield ReportedNumber("cosines", subject, f"cosine at {where}", cosine, "questions")
    for name, here in folders.items():
        statistics = PersonaVectors.load(here / "vectors.safetensors").statistics
        assert statistics is not None, "an extraction leaves statistics"
        halves = without_interval(_number(statistics.split_half[layer]), statistics.n_questions)
        yield ReportedNumber("cosines", name, f"cosine of its own two halves at {where}", halves, is_control=True)


def _question_contrasts(folder: Path, name: str, layer: int, preset: Preset) -> tuple[np.ndarray, np.ndarray]:
    """Sums of positive minus negative means over each question's kept pairs [question, d_model], and their numbers.

    The extraction leaves the kept responses' means in row_means.npy, positive ones first, in the order of the pairs.
    """
    how = preset.extraction
    scored = read_scores(folder / "scores.jsonl", read_rollouts(folder / "rollouts.jsonl"))
    kept, _ = keep_pairs(
        pair_rollouts(scored), trait=name, threshold=how.threshold, min_coherence=how.min_coherence, min_pairs=0
    )
    rows = np.load(folder / "row_means.npy", mmap_mode="r")
    if len(rows) != 2 * len(kept):
        raise ValueError(f"{folder / 'row_means.npy'} has {len(rows)} rows for {len(kept)} pairs: extract again.")
    differences = np.asarray(rows[: len(kept), layer + 1], dtype=float) - rows[len(kept) :, layer + 1]
    questions = [pair[0].rollout.question for pair in kept]
    names = list(dict.fromkeys(questions))
    sums, counts = np.zeros((len(names), differences.shape[1])), np.zeros(len(names))
    for question, row in zip(questions, differences, strict=True):
        sums[names.index(question)] += row
        counts[names.index(question)] += 1
    return sums, counts


def _cosine(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], seed: int) -> Estimate:
    """The cosine of two directions; each is resampled over its own questions.

    Resampled directions hold more noise than the directions themselves, which draws the interval towards 0: it is
    shifted so that its middle is the cosine.
    """
    directions = [sums.sum(axis=0) / counts.sum() for sums, counts in (one, other)]
    value = float(directions[0] @ directions[1] / np.prod([np.linalg.norm(direction) for direction in directions]))
    resampled = [
        question_resamples(len(sums), N_RESAMPLES, seed + place) @ sums for place, (sums, _) in enumerate((one, other))
    ]
    norms = np.prod([np.linalg.norm(rows, axis=1) for rows in resampled], axis=0)
    with np.errstate(invalid="ignore"):
        cosines = (resampled[0] * resampled[1]).sum(axis=1) / norms
    n = int(one[1].sum() + other[1].sum())
    estimate = Estimate.of(value, cosines + (value - np.nanmedian(cosines)), n)
    if estimate.low is None or estimate.high is None:
        return estimate
    return estimate._replace(low=max(-1.0, estimate.low), high=min(1.0, estimate.high))
