"""A run's findings in numbers: what the page begins with and scripts read.

Knows nothing about pages.
"""

from dataclasses import asdict
from typing import Any

from persona_lens.evaluation.layer_selection import LayerChoice, LayerSweep
from persona_lens.extraction.pipeline import best_layer
from persona_lens.pages.run_folder import Run

MAKERS = {
    "trait.json": "persona-lens extract",
    "rollouts.jsonl": "persona-lens extract",
    "scores.jsonl": "persona-lens judge",
    "vectors.safetensors": "persona-lens extract",
    "summary.json": "persona-lens extract",
    "layer_sweep.json": "persona-lens select-layer",
    "dose_response.json": "persona-lens select-layer",
}
"""The files that a page is made of, and the commands that make them."""


def findings(run: Run, *, min_coherence: float = 75.0) -> dict[str, Any]:
    """The run's numbers as JSON: the recommended layer and coefficient, the pairs kept, the judge, what is missing.

    A part is None where the folder does not hold it, and `best` also where no cell has a mean coherence of at least
    `min_coherence`.
    """
    choice = None if run.sweep is None else choice_of(run.sweep, min_coherence)
    layer = None if run.vectors is None else best_layer(run.vectors)
    return {
        "trait": run.name,
        "model": model_name(run),
        "best": None if choice is None else asdict(choice),
        "unsteered": None if run.sweep is None else run.sweep.baseline.summary(),
        "confirmed": None if run.confirmed is None else str(run.confirmed),
        "best_layer_held_out": layer,
        "pairs": None if run.report is None else asdict(run.report),
        "judge": judge_name(run),
        "judge_diagnostics": None if run.calibration is None else dict(run.calibration.diagnostics),
        "missing": missing(run),
    }


def choice_of(sweep: LayerSweep, min_coherence: float) -> LayerChoice | None:
    """The recommended cell, None where none is coherent enough."""
    try:
        return sweep.best(min_coherence)
    except ValueError:
        return None


def model_name(run: Run) -> str | None:
    """The model that the vectors came from, None where that is unknown."""
    known = run.vectors and run.vectors.provenance
    return known.model.name if known else None


def judge_name(run: Run) -> str | None:
    """Who scored the rollouts, or the sweep where there are none; None where nobody did."""
    if run.summary.get("judge"):
        return str(run.summary["judge"])
    return run.sweep.judge if run.sweep is not None else None


def missing(run: Run) -> dict[str, str]:
    """The files of a whole run that this folder lacks, and what makes each of them."""
    here = {name for name, _ in run.files}
    return {name: maker for name, maker in MAKERS.items() if name not in here}
