"""The first thing on the page: the findings as a few large numbers, and the sentence that recommends.

Knows nothing about where the findings come from.
"""

from math import isnan

from persona_lens.evaluation.layer_selection import LayerChoice
from persona_lens.extraction.pipeline import best_layer
from persona_lens.pages.page import visible
from persona_lens.pages.run_findings import choice_of, judge_name, model_name
from persona_lens.pages.run_folder import Run
from persona_lens.pages.sections import note
from persona_lens.plots.style import number
from persona_lens.statistics import Estimate
from persona_lens.vectors.persona_vectors import PersonaVectors

UNKNOWN = "–"


def headline(run: Run, min_coherence: float) -> str:
    """What the run is of, its numbers, and why this layer."""
    choice = None if run.sweep is None else choice_of(run.sweep, min_coherence)
    tiles = _steering(run, choice) + _pairs(run) + _held_out(run.vectors) + _judge(run)
    return f"{_about(run)}<dl class=tiles>{tiles}</dl>{_reason(run, choice, min_coherence)}"


def _about(run: Run) -> str:
    """The trait's description and the model, under the title."""
    description = "" if run.trait is None else f"<p class=lead>{visible(run.trait.description, breaks=False)}</p>"
    name, vectors = model_name(run), run.vectors
    if vectors is None or name is None:
        return description + note("The folder does not say which model this is of.")
    about = f"{name}: {vectors.n_layers} layers of width {vectors.d_model}. Layers count from 0, the paper's from 1."
    return description + note(about)


def _steering(run: Run, choice: LayerChoice | None) -> str:
    """The recommended cell, and both scores there against those without steering."""
    if run.sweep is None:
        return _tile("Steer", UNKNOWN, "no layer was chosen yet")
    if choice is None:
        return _tile("Steer", UNKNOWN, "no cell is coherent enough")
    start = run.sweep.baseline
    dose = "" if choice.dose is None else f"dose {choice.dose:.2f} of the residual norm"
    return (
        _tile("Steer", f"layer {choice.layer} × {choice.coefficient:g}", dose, strong=True)
        + _tile("Trait score", *_change(start.trait_score, choice.trait_score))
        + _tile("Coherence", *_change(start.coherence, choice.coherence))
    )


def _change(before: Estimate, after: Estimate) -> tuple[str, str]:
    interval = "" if after.low is None else f"steered: [{number(after.low, 0)}, {number(after.high, 0)}]"
    return f"{number(before.value, 0)} → {number(after.value, 0)}", interval


def _pairs(run: Run) -> str:
    report = run.report
    if report is None:
        return _tile("Pairs kept", UNKNOWN, "no summary.json")
    below = "below" if report.negative_below is None else f"< {report.negative_below:g}"
    rule = f"trait ≥ {report.threshold:g} against {below}, coherence ≥ {report.min_coherence:g}"
    return _tile("Pairs kept", f"{report.kept} of {report.pairs}", rule)


def _held_out(vectors: PersonaVectors | None) -> str:
    """How well the best layer separates questions that its direction has not seen."""
    layer = None if vectors is None else best_layer(vectors)
    if vectors is None or vectors.statistics is None or layer is None:
        return _tile("Held-out AUC", UNKNOWN, "not measured")
    found = vectors.statistics
    values = (found.held_out_auc, found.held_out_auc_low, found.held_out_auc_high, found.placebo_auc_95)
    area, low, high, placebo = (float(each[layer]) for each in values)
    interval = "" if isnan(low) else f" [{low:.2f}, {high:.2f}]"
    return _tile(
        "Held-out AUC", f"{area:.2f}", f"layer {layer}{interval}" + f"; placebo {placebo:.2f}" * (not isnan(placebo))
    )


def _judge(run: Run) -> str:
    name = judge_name(run)
    if name is None:
        return _tile("Judge", UNKNOWN, "nothing was judged")
    area = None if run.calibration is None else run.calibration.diagnostics.get("auc_without_own_pair")
    kind = name.partition(",")[0].partition(" (")[0]
    return _tile(
        "Judge",
        f"AUC {number(area)}" if area is not None else "–",
        kind if area is not None else f"{kind}; no AUC here",
    )


def _reason(run: Run, choice: LayerChoice | None, min_coherence: float) -> str:
    if choice is not None:
        said = choice.reason[0].upper() + choice.reason[1:]
        warned = (
            ". The best of many cells scores higher than it will on other questions, where it is yet to be confirmed"
        )
        return f"<p class=reason>{visible(said + warned * (run.confirmed is None), breaks=False)}.</p>"
    if run.sweep is None:
        return ""
    try:
        run.sweep.best(min_coherence)
    except ValueError as error:
        return f"<p class=reason>{visible(str(error), breaks=False)}</p>"
    return ""


def _tile(name: str, value: str, about: str, *, strong: bool = False) -> str:
    mark = " class=main" if strong else ""
    return (
        f"<div{mark}><dt>{visible(name)}</dt><dd>{visible(value, breaks=False)}</dd>"
        f"<dd class=about>{visible(about, breaks=False)}</dd></div>"
    )
