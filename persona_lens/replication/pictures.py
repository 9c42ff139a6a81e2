"""The pictures of a replication, in the axes of the paper's figures, drawn from what its folder holds.

Knows nothing about the page around them.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from persona_lens.evaluation.dose_response import DoseResponse
from persona_lens.evaluation.layer_selection import LayerSweep
from persona_lens.monitoring.experiment import MonitoringExperiment
from persona_lens.plots.estimates import plot_grouped_estimates
from persona_lens.plots.finetuning import TraitShifts, plot_shift_scores, plot_trait_scores
from persona_lens.plots.layers import plot_cosine_matrix, plot_dose_response, plot_layer_sweep
from persona_lens.plots.mitigation import MitigationPoint, plot_mitigation
from persona_lens.plots.monitoring_experiment import plot_monitoring_experiment
from persona_lens.replication.context import trait_folder
from persona_lens.replication.finding import Finding
from persona_lens.replication.result import Replication
from persona_lens.replication.set_findings import BASE, NOT_MEASURED, measured_sets, set_score
from persona_lens.replication.tables import Stage
from persona_lens.replication.trait_findings import KINDS
from persona_lens.vectors.persona_vectors import PersonaVectors, cosine_matrix

if TYPE_CHECKING:
    import plotly.graph_objects


class Drawn(NamedTuple):
    """A picture to be drawn: its id on the page, what it shows, and what draws it."""

    place: str
    caption: str
    draw: "Callable[[], plotly.graph_objects.Figure]"
    height: int = 340


def stage_pictures(found: Replication, stage: Stage) -> Iterator[Drawn]:
    """The pictures of a stage; none where it has no numbers."""
    if not found.findings.get(stage):
        return
    makers: dict[Stage, Callable[[Replication], Iterator[Drawn]]] = {
        "layers": _sweeps,
        "dose-response": _doses,
        "monitoring": _monitored,
        "cosines": _cosines,
        "finetuning": _shifts,
        "projection-difference": _differences,
        "mitigation": _mitigation,
        "real-chats": partial(_bars, stage="real-chats", upward="mean trait score (0 to 100)"),
        "new-facts": partial(_bars, stage="new-facts", upward="share of questions answered right"),
    }
    if stage in makers:
        yield from makers[stage](found)


def _files(found: Replication, name: str) -> Iterator[tuple[str, Path]]:
    for trait in found.preset.traits:
        if (path := trait_folder(found.folder, trait) / name).exists():
            yield trait, path.parent


def _sweeps(found: Replication) -> Iterator[Drawn]:
    for trait, folder in _files(found, "layer_sweep.json"):
        sweep = LayerSweep.load(folder)
        caption = f"{trait}: trait score at every layer (counted from 0) and coefficient, as in section B.4."
        least = found.preset.layers.min_coherence
        yield Drawn(f"sweep-{trait}", caption, partial(plot_layer_sweep, sweep, min_coherence=least))


def _doses(found: Replication) -> Iterator[Drawn]:
    for trait, folder in _files(found, "dose_response.json"):
        response = DoseResponse.load(folder)
        caption = f"{trait}: trait score and coherence against the coefficient; thin lines are random directions."
        yield Drawn(f"dose-{trait}", caption, partial(plot_dose_response, response), 420)


def _monitored(found: Replication) -> Iterator[Drawn]:
    for trait in found.preset.traits:
        for kind in KINDS:
            path = found.folder / "monitoring" / f"{trait}_{kind}" / "experiment.json"
            if path.exists():
                experiment = MonitoringExperiment.load(path)
                caption = f"{trait}, {kind}: trait score against the last prompt token's projection, as in section 3.3."
                yield Drawn(f"monitoring-{trait}-{kind}", caption, partial(plot_monitoring_experiment, experiment))


def _cosines(found: Replication) -> Iterator[Drawn]:
    layer = found.preset.cosines.layer
    vectors = [PersonaVectors.load(folder / "vectors.safetensors") for _, folder in _files(found, "summary.json")]
    caption = f"Cosines between the traits' directions at layer {layer}, counted from 0."
    yield Drawn("cosines", caption, lambda: plot_cosine_matrix(cosine_matrix(vectors, layer)), 380)


def _correlations(found: Replication, stage: Stage, figure: str) -> dict[str, Finding]:
    return {each.subject: each for each in found.findings[stage] if each.figure == figure and not each.is_control}


def _shifts(found: Replication) -> Iterator[Drawn]:
    import pandas

    sets = measured_sets(found.preset, found.folder)
    table = pandas.DataFrame(
        {each.name: {trait: score.value for trait, score in each.scores.items()} for each in sets}, dtype=float
    ).T
    caption = "Mean trait score after finetuning on every set, the base model first, as in section 4."
    yield Drawn("trait-scores", caption, lambda: plot_trait_scores(table, base=BASE), 60 + 26 * len(sets))
    by_trait = _correlations(found, "finetuning", "finetuning.shift")
    panels = [
        TraitShifts(
            trait,
            [each.shift(trait, trait) for each in sets],
            [each.scores.get(trait, NOT_MEASURED) for each in sets],
            correlation.ours,
            [each.name for each in sets if each.made_for == trait],
        )
        for trait, correlation in by_trait.items()
    ]
    caption = "Trait score after finetuning against the finetuning shift, a point a set, as in section 4."
    names = [each.name for each in sets]
    yield Drawn("shifts", caption, lambda: plot_shift_scores(panels, names, base=BASE), _panels_height(len(panels)))


def _differences(found: Replication) -> Iterator[Drawn]:
    sets = [each for each in measured_sets(found.preset, found.folder) if each.screening is not None]
    by_trait = _correlations(found, "projection-difference", "projection.trait")
    panels = [
        TraitShifts(
            trait,
            [set_score(found.preset, found.folder, each, trait, "difference") for each in sets],
            [each.scores.get(trait, NOT_MEASURED) for each in sets],
            correlation.ours,
            [each.name for each in sets if each.made_for == trait],
        )
        for trait, correlation in by_trait.items()
    ]
    caption = "Trait score after finetuning against the set's projection difference before it, as in section 6."
    how = {"across": "projection difference", "note": "mean over the set's rows, before training"}
    names = [each.name for each in sets]
    yield Drawn("differences", caption, lambda: plot_shift_scores(panels, names, **how), _panels_height(len(panels)))


def _panels_height(panels: int) -> int:
    return 260 * -(-panels // 3)


def _mitigation(found: Replication) -> Iterator[Drawn]:
    by_trait: dict[str, dict[str, dict[str, Finding]]] = {}
    for each in found.findings["mitigation"]:
        by_trait.setdefault(each.subject, {}).setdefault(each.condition, {})[each.figure] = each
    points = {trait: [_point(method, numbers) for method, numbers in of.items()] for trait, of in by_trait.items()}
    caption = "Trait score, coherence and multiple choice by method and dose, as in sections 5 and J."
    draw = partial(plot_mitigation, points, capability="multiple choice, share right")
    yield Drawn("mitigation", caption, draw, 560)


def _point(named: str, numbers: dict[str, Finding]) -> MitigationPoint:
    method, _, dose = named.rpartition(", ")
    is_dose = bool(method) and dose.lstrip("-").replace(".", "", 1).isdigit()
    score, coherence, able = (numbers[f"mitigation.{part}"].ours for part in ("score", "coherence", "accuracy"))
    return MitigationPoint(
        method if is_dose else named, abs(json.loads(dose)) if is_dose else None, score, coherence, able
    )


def _bars(found: Replication, *, stage: Stage, upward: str) -> Iterator[Drawn]:
    groups: dict[str, dict[str, object]] = {}
    for each in found.findings[stage]:
        groups.setdefault(each.subject, {})[each.condition or each.subject] = each.ours
    yield Drawn(stage, upward, lambda: plot_grouped_estimates(groups, title=stage, upward=upward))  # pyright: ignore
