"""What the stages on traits found, read from their folders: directions, layers, doses, monitoring, cosines.

Knows nothing about models: a folder comes in, findings go out.
"""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from persona_lens.evaluation.dose_response import DoseResponse
from persona_lens.evaluation.layer_selection import LayerChoice, LayerSweep
from persona_lens.extraction.pipeline import best_layer
from persona_lens.judges.keep import keep_pairs, pair_rollouts
from persona_lens.judges.scores import read_scores
from persona_lens.monitoring.experiment import MonitoringExperiment
from persona_lens.replication.context import selected_layer, trait_folder
from persona_lens.replication.finding import Finding, alone
from persona_lens.replication.preset import Preset
from persona_lens.rollouts.rows import read_rollouts
from persona_lens.statistics import N_RESAMPLES, Estimate, pearson, question_resamples
from persona_lens.storage.files import read_json
from persona_lens.vectors.persona_vectors import PersonaVectors

KINDS = ("system-prompts", "many-shot")
SHUFFLES = 200


def extraction_findings(preset: Preset, folder: Path) -> Iterator[Finding]:
    """How many pairs were kept, and how well the direction tells held-out questions' sides apart."""
    for name in preset.traits:
        here = trait_folder(folder, name)
        if not (here / "summary.json").exists():
            continue
        pairs = read_json(here / "summary.json")["pairs"]
        share = alone(pairs["kept"] / pairs["pairs"], pairs["pairs"])
        yield Finding("extraction.kept", name, "pairs kept by the judge, share of all", share)
        vectors = PersonaVectors.load(here / "vectors.safetensors")
        statistics = vectors.statistics
        assert statistics is not None
        layer = _layer(folder, name, preset, vectors)
        auc = _statistic(vectors, "held_out_auc", layer, statistics.n_rows)
        where = f"layer {layer}"
        yield Finding("extraction.auc", name, f"AUC on held-out questions, {where}", auc, "questions")
        placebo = alone(_number(statistics.placebo_auc_95[layer]), statistics.n_rows)
        what = "the same with polarity swapped at random, 95th percentile"
        yield Finding("extraction.auc", name, what, placebo, is_control=True)
        if statistics.embedding is not None:
            lexical = alone(statistics.embedding["held_out_auc"], statistics.n_rows)
            yield Finding("extraction.auc", name, "the same of the embedding row", lexical, is_control=True)
        halves = _statistic(vectors, "split_half", layer, statistics.n_questions)
        yield Finding("extraction.split-half", name, "cosine of the directions of two halves", halves, "questions")


def _layer(folder: Path, name: str, preset: Preset, vectors: PersonaVectors) -> int:
    """The selected layer, or before there is one that of the best held-out AUC."""
    try:
        return selected_layer(folder, name, preset)
    except ValueError:
        return best_layer(vectors) or 0


def _statistic(vectors: PersonaVectors, name: str, layer: int, n: int) -> Estimate:
    assert vectors.statistics is not None
    value, low, high = (_number(vectors.statistics.by_layer[name + end][layer]) for end in ("", "_low", "_high"))
    return Estimate(value, low, high, n)


def _number(value: torch.Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def layer_findings(preset: Preset, folder: Path) -> Iterator[Finding]:
    """The layer of the best cell, counted from 1 as the paper does, by our rule and by the paper's."""
    for name in preset.traits:
        here = trait_folder(folder, name)
        if not (here / "layer_sweep.json").exists():
            continue
        sweep = LayerSweep.load(here)
        ours = selected_layer(folder, name, preset)
        best = sweep.best(None)
        chosen = _chosen(sweep, preset)
        n = chosen.trait_score.n
        ties = sorted({layer + 1 for layer, _ in chosen.ties} - {ours + 1})
        told = f"; not told apart from {ties}" if ties else ""
        what = f"layer by trait and coherence, counted from 1{told}"
        yield Finding("layers.chosen", name, what, alone(ours + 1, n))
        what = "layer by the trait alone (the paper's rule)"
        yield Finding("layers.chosen", name, what, alone(best.layer + 1, best.trait_score.n))
        cell = f"layer {chosen.layer} x {chosen.coefficient:g}"
        yield Finding("layers.trait", name, f"trait score of the best cell, {cell}", chosen.trait_score, "questions")
        yield Finding("layers.coherence", name, f"its coherence, {cell}", chosen.coherence, "questions")


def _chosen(sweep: LayerSweep, preset: Preset) -> LayerChoice:
    """The best coherent cell, or the best of all where none is coherent enough."""
    try:
        return sweep.best(preset.layers.min_coherence)
    except ValueError:
        return sweep.best(None)


def dose_findings(preset: Preset, folder: Path) -> Iterator[Finding]:
    """Trait and coherence at each dose, the slope, and the slopes of random directions."""
    for name in preset.traits:
        here = trait_folder(folder, name)
        if not (here / "dose_response.json").exists():
            continue
        found = DoseResponse.load(here)
        slope = found.slope()
        what = f"trait score for each 1.0 of the coefficient, layer {found.layer}, coherent doses"
        yield Finding("dose.slope", name, what, slope, "questions")
        for number, each in enumerate(found.random_slopes()):
            what = f"the same of random direction {number} of equal norm"
            yield Finding("dose.slope", name, what, each, "questions", is_control=True)
        for amount, cell in zip(found.coefficients, found.evaluations, strict=True):
            dose = f"{amount:g}"
            yield Finding("dose.trait", name, f"trait score at {dose}", cell.trait_score, "questions", dose)
            yield Finding("dose.coherence", name, f"coherence at {dose}", cell.coherence, "questions", dose)


def monitoring_findings(preset: Preset, folder: Path) -> Iterator[Finding]:
    """Both correlations, and the overall one that the conditions alone would give."""
    for name in preset.traits:
        for kind in KINDS:
            path = folder / "monitoring" / f"{name}_{kind}" / "experiment.json"
            if not path.exists():
                continue
            found = MonitoringExperiment.load(path)
            where = f"{kind}, layer {found.layer}"
            yield Finding(
                f"monitoring.{kind}.overall", name, f"r of projection and trait, {where}", found.overall(), "questions"
            )
            yield Finding(
                f"monitoring.{kind}.within", name, f"mean r within conditions, {where}", found.within(), "questions"
            )
            what = "overall r with scores shuffled within each condition"
            yield Finding(f"monitoring.{kind}.overall", name, what, shuffled_within(found), "shuffles", is_control=True)


def shuffled_within(found: MonitoringExperiment) -> Estimate:
    """The overall correlation with scores shuffled within conditions: what the conditions' means give by themselves.

    Its mean and central 95 % over shuffles.
    """
    draw = np.random.default_rng(found.seed)
    points = found.compared
    x = np.array([point.projections[found.layer] for point in points])
    scores = np.array([point.trait_score for point in points], dtype=float)
    conditions = np.array([found.conditions.index(point.condition) for point in points])
    groups = [np.flatnonzero(conditions == number) for number in range(len(found.conditions))]
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


def cosine_findings(preset: Preset, folder: Path) -> Iterator[Finding]:
    """Cosines between traits at the preset's layer, and how like itself each direction is."""
    layer = preset.cosines.layer
    names = [name for name in preset.traits if (trait_folder(folder, name) / "summary.json").exists()]
    contrasts = {name: _question_contrasts(trait_folder(folder, name), name, layer, preset) for name in names}
    where = f"layer {layer + 1} counted from 1"
    for one, other in combinations(names, 2):
        found = _cosine(contrasts[one], contrasts[other], preset.seed)
        subject = f"{one}, {other}" if (one, other) == _paper_order(one, other) else f"{other}, {one}"
        yield Finding("cosines", subject, f"cosine at {where}", found, "questions")
    for name in names:
        statistics = PersonaVectors.load(trait_folder(folder, name) / "vectors.safetensors").statistics
        assert statistics is not None
        halves = alone(_number(statistics.split_half[layer]), statistics.n_questions)
        yield Finding("cosines", name, f"cosine of its own two halves at {where}", halves, is_control=True)


def _paper_order(one: str, other: str) -> tuple[str, str]:
    """The paper's pairs begin with evil."""
    return (other, one) if other == "evil" else (one, other)


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
    value = float(directions[0] @ directions[1] / np.prod([np.linalg.norm(each) for each in directions]))
    resampled = [
        question_resamples(len(sums), N_RESAMPLES, seed + place) @ sums for place, (sums, _) in enumerate((one, other))
    ]
    norms = np.prod([np.linalg.norm(each, axis=1) for each in resampled], axis=0)
    with np.errstate(invalid="ignore"):
        cosines = (resampled[0] * resampled[1]).sum(axis=1) / norms
    n = int(one[1].sum() + other[1].sum())
    found = Estimate.of(value, cosines + (value - np.nanmedian(cosines)), n)
    if found.low is None or found.high is None:
        return found
    return found._replace(low=max(-1.0, found.low), high=min(1.0, found.high))
