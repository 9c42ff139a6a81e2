"""The experiments that `persona-lens monitor --experiment` runs: sampled, judged, correlated, drawn.

Knows nothing about how chats are monitored.
"""

from collections.abc import Callable
from enum import StrEnum
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from persona_lens.cli.inputs import load_run, selected_layer
from persona_lens.cli.judging import judge_of
from persona_lens.cli.output import print_table, say, tell, tell_json

if TYPE_CHECKING:
    from persona_lens.judges.scores import Judge
    from persona_lens.models.structure import Model
    from persona_lens.monitoring.experiment import MonitoringExperiment
    from persona_lens.rollouts.rows import Prompt
    from persona_lens.traits.trait import Trait


class Experiment(StrEnum):
    """What shifts the persona."""

    SYSTEM_PROMPTS = "system-prompts"
    MANY_SHOT = "many-shot"


class Design(NamedTuple):
    """What an experiment samples, and who judges it."""

    kind: Experiment
    layer: int | None
    shots: tuple[int, ...]
    n_questions: int
    per_question: int
    judge: str
    seed: int
    aliases: tuple[str, ...] = ()


def run_experiment(
    design: Design, run: Path, output: Path | None, load_model: "Callable[[], Model]", *, as_json: bool
) -> None:
    """Run an experiment on a run's vectors, print its table and write experiment.json and two pictures."""
    from persona_lens.extraction.pipeline import calibrated_judge
    from persona_lens.judges.scores import scorable_questions
    from persona_lens.monitoring.experiment import monitoring_experiment

    if not run.is_dir():
        raise typer.BadParameter(f"--experiment needs the folder of a run, which knows its trait; {run} is none")
    found = load_run(run, None, None)
    layer = selected_layer(run, found.vectors) if design.layer is None else design.layer
    folder = run / f"monitoring-{design.kind.value}" if output is None else output
    chosen = judge_of(design.judge, folder, concurrency=20, timeout=60.0, aliases=design.aliases)
    model = load_model()

    def own() -> "Judge":
        return calibrated_judge(model, found.trait, run, max_new_tokens=found.max_new_tokens, seed=design.seed)

    judge = chosen(own)
    questions = scorable_questions(judge, found.trait, found.trait.evaluation_questions)[: design.n_questions]
    result = monitoring_experiment(
        model,
        found.trait,
        found.vectors,
        _plan(design, found.trait, run, questions),
        judge=judge,
        layer=layer,
        max_new_tokens=found.max_new_tokens,
        output=folder,
        seed=design.seed,
    )
    _show(result, folder, as_json=as_json)


def _plan(design: Design, trait: "Trait", run: Path, questions: list[str]) -> "list[Prompt]":
    from persona_lens.monitoring.experiment import judged_examples, many_shot, system_prompts

    if design.kind is Experiment.SYSTEM_PROMPTS:
        return system_prompts(trait, questions, per_question=design.per_question)
    shown = judged_examples(run)
    return many_shot(trait, questions, shown, shots=design.shots, per_question=design.per_question, seed=design.seed)


def _show(result: "MonitoringExperiment", folder: Path, *, as_json: bool) -> None:
    from persona_lens.plots.monitoring_experiment import plot_experiment_layers, plot_monitoring_experiment
    from persona_lens.storage.files import write_whole

    if as_json:
        tell_json(result.summary())
    else:
        head = ["condition", "projection", f"{result.trait}", "scored"]
        rows = [
            [
                str(name),
                f"{row['projection']:.2f}",
                "-" if isnan(row["trait_score"]) else f"{row['trait_score']:.1f}",
                f"{row['scored']:.0f} of {row['responses']:.0f}",
            ]
            for name, row in result.table().to_dict("index").items()
        ]
        print_table(head, rows)
        tell(f"{result}.")
    try:
        for name, figure in (("experiment", plot_monitoring_experiment), ("layers", plot_experiment_layers)):
            write_whole(folder / f"{name}.html", figure(result).to_html(include_plotlyjs=True).encode())
    except ImportError as error:
        say(f"No pictures: {error}")
    say(f"Everything is in {folder}.")
