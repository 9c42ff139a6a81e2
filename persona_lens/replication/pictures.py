"""The pictures of a replication, in the axes of the paper's figures, drawn from what its folder holds."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from persona_lens.replication.context import KINDS, trait_folder
from persona_lens.replication.reported_number import NOT_MEASURED, ReportedNumber
from persona_lens.replication.result import Replication
from persona_lens.replication.set_numbers import TunedSet, tuned_sets
from persona_lens.replication.stages import BASE
from persona_lens.vectors.persona_vectors import PersonaVectors, cosine_matrix

if TYPE_CHECKING:
    import plotly.graph_objects


class StagePicture(NamedTuple):
    """A picture to be drawn: its id on the page, what it shows, and what draws it."""

    place: str
    caption: str
    draw: "Callable[[], plotly.graph_objects.Figure]"
    height: int = 340


def stage_pictures(replication: Replication, stage: str) -> Iterable[StagePicture]:
    """The pictures of a stage; none where it has no numbers."""
    makers: dict[str, Callable[[Replication], Iterable[StagePicture]]] = {
        "layers": _sweeps,
        "dose-response": _doses,
        "monitoring": _monitored,
        "cosines": _cosines,
        "finetuning": lambda run: shift_pictures(run, tuned_sets(run.preset, run.folder)),
        "projection-difference": lambda run: difference_pictures(run, tuned_sets(run.preset, run.folder)),
        "mitigation": mitigation_pictures,
        "real-chats": partial(_bars, stage="real-chats", upward="mean trait score (0 to 100)"),
        "new-facts": partial(_bars, stage="new-facts", upward="share of questions answered right"),
    }
    draw = replication.stages[stage].pictures or makers.get(stage)
    return draw(replication) if draw is not None and replication.numbers.get(stage) else ()


def _folders(replication: Replication, file: str) -> Iterator[tuple[str, Path]]:
    for trait in replication.preset.traits:
        if (folder := trait_folder(replication.folder, trait) / file).exists():
            yield trait, folder.parent


def _sweeps(replication: Replication) -> Iterator[StagePicture]:
    for trait, folder in _folders(replication, "layer_sweep.json"):
        caption = f"{trait}: trait score at every layer (counted from 0) and coefficient, as in section B.4."
        least = replication.preset.layers.min_coherence
        draw = partial(plot_layer_sweep, LayerSweep.load(folder), min_coherence=least)
        yield StagePicture(f"sweep-{trait}", caption, draw)


def _doses(replication: Replication) -> Iterator[StagePicture]:
    for trait, folder in _folders(replication, "dose_response.json"):
        caption = f"{trait}: trait score and coherence against the coefficient; thin lines are random directions."
        yield StagePicture(f"dose-{trait}", caption, partial(plot_dose_response, DoseResponse.load(folder)), 420)


def _monitored(replication: Replication) -> Iterator[StagePicture]:
    for trait in replication.preset.traits:
        for kind in KINDS:
            path = replication.folder / "monitoring" / f"{trait}_{kind}" / "experiment.json"
            if path.exists():
                draw = partial(plot_monitoring_experiment, MonitoringExperiment.load(path))
                caption = f"{trait}, {kind}: trait score against the last prompt token's projection, as in section 3.3."
                yield StagePicture(f"monitoring-{trait}-{kind}", caption, draw)


def _cosines(replication: Replication) -> Iterator[StagePicture]:
    layer = replication.preset.cosines.layer
    folders = _folders(replication, "summary.json")
    vectors = [PersonaVectors.load(folder / "vectors.safetensors") for _, folder in folders]
    caption = f"Cosines between the traits' directions at layer {layer}, counted from 0."
    yield StagePicture("cosines", caption, lambda: plot_cosine_matrix(cosine_matrix(vectors, layer)), 380)


def shift_pictures(replication: Replication, sets: Sequence[TunedSet]) -> Iterator[StagePicture]:
    """The scores after training on every set, and the scores against the finetuning shift."""
    import pandas

    table = pandas.DataFrame(
        {tuned.name: {trait: score.value for trait, score in tuned.scores.items()} for tuned in sets}, dtype=float
    ).T
    caption = "Mean trait score after finetuning on every set, the base model first, as in section 4."
    height = 60 + 26 * len(sets)
    yield StagePicture("trait-scores", caption, lambda: plot_trait_scores(table, base=BASE), height)
    panels = _panels(
        replication.numbers["finetuning"], "finetuning.shift", sets, lambda tuned, trait: tuned.shift(trait, trait)
    )
    caption = "Trait score after finetuning against the finetuning shift, a point a set, as in section 4."
    names = [tuned.name for tuned in sets]
    draw = partial(plot_shift_scores, panels, names, base=BASE)
    yield StagePicture("shifts", caption, draw, _panels_height(panels))


def difference_pictures(replication: Replication, sets: Sequence[TunedSet]) -> Iterator[StagePicture]:
    """The scores after training against the sets' projection differences before it."""
    sets = [tuned for tuned in sets if tuned.screening is not None]
    numbers = replication.numbers["projection-difference"]
    panels = _panels(numbers, "projection.trait", sets, lambda tuned, trait: tuned.before(trait, "difference"))
    caption = "Trait score after finetuning against the set's projection difference before it, as in section 6."
    how = {"across": "projection difference", "note": "mean over the set's rows, before training"}
    draw = partial(plot_shift_scores, panels, [tuned.name for tuned in sets], **how)
    yield StagePicture("differences", caption, draw, _panels_height(panels))


def _panels(
    numbers: Sequence[ReportedNumber],
    figure: str,
    sets: Sequence[TunedSet],
    across: Callable[[TunedSet, str], float | None],
) -> list[TraitShifts]:
    """A panel for each trait that has the correlation of a figure."""
    return [
        TraitShifts(
            number.subject,
            [across(tuned, number.subject) for tuned in sets],
            [tuned.scores.get(number.subject, NOT_MEASURED) for tuned in sets],
            number.ours,
            [tuned.name for tuned in sets if tuned.made_for == number.subject],
        )
        for number in numbers
        if number.figure == figure and not number.is_control
    ]


def _panels_height(panels: Sequence[TraitShifts]) -> int:
    return 260 * -(-len(panels) // 3)


def mitigation_pictures(replication: Replication) -> Iterator[StagePicture]:
    """Score, coherence and capability by method and dose."""
    by_trait: dict[str, dict[str, dict[str, ReportedNumber]]] = {}
    for number in replication.numbers["mitigation"]:
        by_trait.setdefault(number.subject, {}).setdefault(number.condition, {})[number.figure] = number
    points = {trait: [_point(method, numbers) for method, numbers in of.items()] for trait, of in by_trait.items()}
    caption = "Trait score, coherence and multiple choice by method and dose, as in sections 5 and J."
    draw = partial(plot_mitigation, points, capability="multiple choice, share right")
    yield StagePicture("mitigation", caption, draw, 560)


def _point(condition: str, numbers: dict[str, ReportedNumber]) -> MitigationPoint:
    method, _, dose = condition.rpartition(", ")
    has_dose = bool(method) and dose.lstrip("-").replace(".", "", 1).isdigit()
    estimates = (numbers[f"mitigation.{part}"].ours for part in ("score", "coherence", "accuracy"))
    return MitigationPoint(method if has_dose else condition, abs(json.loads(dose)) if has_dose else None, *estimates)


def _bars(replication: Replication, *, stage: str, upward: str) -> Iterator[StagePicture]:
    groups: dict[str, dict[str, object]] = {}
    for number in replication.numbers[stage]:
        groups.setdefault(number.subject, {})[number.condition or number.subject] = number.ours
    yield StagePicture(stage, upward, lambda: plot_grouped_estimates(groups, title=stage, upward=upward))  # pyright: ignore
