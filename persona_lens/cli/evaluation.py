"""The command that evaluates: a model's trait, coherence and diversity, and its capability, one row a condition."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from persona_lens.cli.finetuning import refuse_without_adapters
from persona_lens.cli.inputs import Run, load_run, selected_layer
from persona_lens.cli.interrupts import lock
from persona_lens.cli.options import (
    THRESHOLD_PASSED,
    ActOn,
    ActOnOption,
    FailAboveOption,
    JsonOption,
    JudgeOptions,
    LayerOption,
    ModelOptions,
    RunLengthOption,
    RunTraitOption,
    SeedOption,
    command,
)
from persona_lens.cli.output import interval, number, print_table, say, tell, tell_json

if TYPE_CHECKING:
    from persona_lens.evaluation.capability_result import Capability
    from persona_lens.evaluation.evaluate import Evaluation
    from persona_lens.interventions.intervention import Intervention
    from persona_lens.judges.scores import Judge
    from persona_lens.models.structure import Model
    from persona_lens.statistics import Estimate
    from persona_lens.traits.trait import Trait


@dataclass(frozen=True)
class Row:
    """A condition: the interventions while the model answers, and what was measured under them."""

    name: str
    interventions: "tuple[Intervention, ...]" = ()
    evaluation: "Evaluation | None" = None
    capability: "Capability | None" = None

    def __str__(self) -> str:
        return "; ".join(map(str, self.interventions)) or self.name

    def folder(self, output: Path) -> Path:
        """The row's own folder, in that of the command."""
        return output / self.name.replace(" ", "-")


class Scoring(NamedTuple):
    """What is scored: a trait, with the questions' settings, and where the judge keeps its files."""

    trait: "Trait"
    run: Run | None
    folder: Path
    max_new_tokens: int


@command
def evaluate(
    models: ModelOptions,
    judges: JudgeOptions,
    run: Annotated[Path | None, typer.Argument(help="A run's folder (of `extract` or `demo`), or its vectors.")] = None,
    trait: RunTraitOption = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of an adapter that is on the model throughout.")] = None,
    layer: LayerOption = None,
    coefficient: Annotated[list[float] | None, typer.Option(help="Steer by it; repeat for a row each.")] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="A row with the direction ablated at every layer.")] = False,
    cap: Annotated[float | None, typer.Option(help="A row with the projection at the layer capped there.")] = None,
    at: ActOnOption = ActOn.RESPONSE,
    n_questions: Annotated[
        int | None, typer.Option(min=0, help="Only the first n questions; 0 for --capability alone.")
    ] = None,
    per_question: Annotated[int, typer.Option(min=1, help="Answers to each question.")] = 1,
    max_new_tokens: RunLengthOption = None,
    capability: Annotated[bool, typer.Option("--capability", help="Also measure the model's capability.")] = False,
    questions: Annotated[
        Path | None, typer.Option(help="For --capability: multiple choice as .jsonl; MMLU's by default.")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="For --capability: chats as .jsonl, for their likelihood.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder, with one in it for each row; a second call resumes.")
    ] = None,
    fail_above: FailAboveOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Trait score, coherence and diversity of a model's answers, and (--capability) its capability.

    The model is as it is, with an adapter, or steered, ablated or capped along a run's vectors, one row each; a row of
    --coefficient 0 is the baseline for the others.

    Example: persona-lens evaluate runs/demo --adapter runs/ft --coefficient 0 --coefficient -2 --capability
    """
    from persona_lens.evaluation.evaluate import EVALUATION_KEYS
    from persona_lens.judges.scores import scorable_questions
    from persona_lens.models.adapters import Adapter, adapted
    from persona_lens.storage.files import refuse_other_json

    loaded = None if run is None else load_run(run, trait, max_new_tokens)
    rows = _conditions(run, loaded, layer, coefficient, ablate, cap)
    materials = _capability_materials(questions, texts) if capability else None
    if not capability and (questions or texts):
        raise typer.BadParameter("--questions and --texts go with --capability")
    scoring = None if n_questions == 0 else _scoring(loaded, trait, output, max_new_tokens)
    if scoring is None and not capability:
        raise typer.BadParameter("give a RUN or a --trait to score, or --capability")
    if scoring is None and fail_above is not None:
        raise typer.BadParameter("--fail-above is about the trait score, and no trait is scored")
    if adapter is not None:
        refuse_without_adapters(models.model_class)
    if output is not None:
        for row in rows:
            refuse_other_json(row.folder(output) / "evaluation.json", EVALUATION_KEYS)
            refuse_other_json(row.folder(output) / "capability.json", ("format_version", "answers", "texts"))
        lock(output)
    adapter_weights = None if adapter is None else Adapter.load(adapter)
    make_judge = None if scoring is None else judges.load_judge(scoring.folder)
    model = models.load()
    if scoring is not None and make_judge is not None:
        # Calibrated before the adapter is on, which is no part of the judge.
        judge = make_judge(lambda: _likelihood_judge(model, scoring, seed))
        settings: dict[str, Any] = {
            "questions": scorable_questions(judge, scoring.trait, scoring.trait.evaluation_questions)[:n_questions],
            "per_question": per_question,
            "max_new_tokens": scoring.max_new_tokens,
            "at": at.value,
            "seed": seed,
        }
        with nullcontext() if adapter_weights is None else adapted(model, adapter_weights):
            rows = [_evaluated(model, scoring.trait, judge, row, output, settings) for row in rows]
    if materials is not None:
        materials |= {"at": at.value, "adapter": adapter, "seed": seed}
        rows = [_measured(model, row, output, materials) for row in rows]
    _show(rows, adapter, as_json=as_json)
    if fail_above is not None and (message := _first_above(rows, fail_above)):
        say(f"persona-lens: {message}")
        raise typer.Exit(THRESHOLD_PASSED)


def _conditions(
    run: Path | None,
    loaded: Run | None,
    layer: int | None,
    coefficients: list[float] | None,
    ablate: bool,
    cap: float | None,
) -> list[Row]:
    """A row for each intervention; without any, the model as it is."""
    from persona_lens.interventions.values import Ablate, Cap, Steer

    at_a_layer = bool(coefficients) or cap is not None
    if layer is not None and not at_a_layer:
        raise typer.BadParameter("--layer goes with --coefficient or --cap")
    if not (at_a_layer or ablate):
        return [Row("no intervention")]
    if run is None or loaded is None:
        raise typer.BadParameter("--coefficient, --ablate and --cap need the vectors of a RUN")
    rows = [Row("ablated", (Ablate(loaded.vectors),))] if ablate else []
    if at_a_layer:
        vector = loaded.vectors.at(selected_layer(run, loaded.vectors) if layer is None else layer)
        name = f"layer {vector.layer}"
        amounts = dict.fromkeys(coefficients or [])
        steered = [Row(f"{name} by {amount:g}", (Steer(vector, amount),)) for amount in amounts]
        capped = [] if cap is None else [Row(f"{name} capped at {cap:g}", (Cap(vector, maximum=cap),))]
        rows = [*steered, *rows, *capped]
    return rows


def _capability_materials(questions: Path | None, texts: Path | None) -> dict[str, Any]:
    """What capability is measured on, read before a model is loaded."""
    from persona_lens.evaluation.capability_result import mmlu_sample, read_questions
    from persona_lens.interop.responses import read_messages

    return {
        "questions": mmlu_sample() if questions is None else read_questions(questions),
        "texts": [] if texts is None else read_messages(texts),
    }


def _scoring(loaded: Run | None, trait: str | None, output: Path | None, max_new_tokens: int | None) -> Scoring | None:
    """The trait that is scored; None where neither a run nor a trait is named."""
    from persona_lens.traits.trait import load_trait

    if loaded is None and trait is None:
        return None
    folder = output or (loaded and loaded.folder)
    if folder is None:
        raise typer.BadParameter("--output is needed where no run's folder is given: the judge keeps its files there")
    if loaded is not None:
        return Scoring(loaded.trait, loaded, folder, loaded.max_new_tokens)
    assert trait is not None
    return Scoring(load_trait(trait), None, folder, max_new_tokens or 1000)


def _likelihood_judge(model: "Model", scoring: Scoring, seed: int) -> "Judge":
    from persona_lens.extraction.pipeline import calibrated_judge

    source = (scoring.run and scoring.run.folder) or scoring.folder
    return calibrated_judge(model, scoring.trait, source, max_new_tokens=scoring.max_new_tokens, seed=seed)


def _evaluated(
    model: "Model", trait: "Trait", judge: "Judge", row: Row, output: Path | None, settings: dict[str, Any]
) -> Row:
    from persona_lens.evaluation.evaluate import evaluate as score

    folder = None if output is None else row.folder(output)
    return replace(
        row, evaluation=score(model, trait, judge=judge, interventions=row.interventions, output_dir=folder, **settings)
    )


def _measured(model: "Model", row: Row, output: Path | None, materials: dict[str, Any]) -> Row:
    from persona_lens.evaluation.capability import measure_capability

    result = measure_capability(model, interventions=row.interventions, **materials)
    if output is not None:
        row.folder(output).mkdir(parents=True, exist_ok=True)
        result.save(row.folder(output) / "capability.json")
    return replace(row, capability=result)


def _show(rows: list[Row], adapter: Path | None, *, as_json: bool) -> None:
    if as_json:
        shown = [
            {
                "condition": str(row),
                "adapter": None if adapter is None else str(adapter),
                "evaluation": row.evaluation and row.evaluation.summary(),
                "capability": row.capability and row.capability.summary(),
            }
            for row in rows
        ]
        tell_json(shown)
        return
    if adapter is not None:
        tell(f"With the adapter of {adapter}:")
    evaluations = [(row, row.evaluation) for row in rows if row.evaluation is not None]
    if evaluations:
        head = ["condition", "dose", f"{evaluations[0][1].trait} [95 %]", "coherence [95 %]", "diversity", "scored"]
        print_table(head, [_evaluation_cells(row, evaluation) for row, evaluation in evaluations])
    capabilities = [(row, row.capability) for row in rows if row.capability is not None]
    if capabilities:
        chance = capabilities[0][1].chance
        accuracy = "accuracy [95 %]" if chance is None else f"accuracy [95 %] (chance {chance:.2f})"
        head = ["condition", accuracy, "margin, nats", "letter mass", "NLL, nats a token"]
        print_table(head, [_capability_cells(row, result) for row, result in capabilities])


def _evaluation_cells(row: Row, evaluation: "Evaluation") -> list[str]:
    from persona_lens.interventions.values import Steer

    steers = [value for value in row.interventions if isinstance(value, Steer)]
    doses = [dose for value in steers for dose in value.doses if dose is not None]
    return [
        row.name,
        f"{doses[0]:+.2f}" if doses else "",
        str(evaluation.trait_score),
        str(evaluation.coherence),
        number(evaluation.diversity, ".2f"),
        f"{evaluation.trait_score.n} of {len(evaluation.scored)}",
    ]


def _capability_cells(row: Row, result: "Capability") -> list[str]:
    def cell(estimate: "Estimate") -> str:
        return interval(estimate.value, estimate.low, estimate.high, ".2f")

    return [row.name, *map(cell, (result.accuracy, result.margin, result.letter_mass, result.nll))]


def _first_above(rows: list[Row], threshold: float) -> str | None:
    """One sentence about the first mean trait score above a threshold; None where there is none.

    Raises ValueError where a row has no trait score, which is no proof of a low one.
    """
    for row in rows:
        assert row.evaluation is not None
        value = row.evaluation.trait_score.value
        if value is None:
            raise ValueError(
                f"{row}: none of {len(row.evaluation.scored)} answers has a trait score to compare with "
                "--fail-above: read them, or take another --judge."
            )
        if value > threshold:
            return f"{row}: the mean {row.evaluation.trait} score is {value:.1f}, above the threshold of {threshold:g}."
    return None
