"""The command that evaluates: a model's trait, coherence and diversity, and what it still can, one row a condition."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from persona_lens.cli.ending import claim
from persona_lens.cli.finetuning import refuse_without_adapters
from persona_lens.cli.inputs import ModelClass, load, load_run, selected_layer
from persona_lens.cli.judging import judge_of
from persona_lens.cli.monitoring import PASSED
from persona_lens.cli.options import (
    DEFAULT_MODEL,
    AliasOption,
    ClassOption,
    ConcurrencyOption,
    JsonOption,
    JudgeExtraOption,
    JudgeOption,
    ModelOption,
    SeedOption,
    ThreadsOption,
    TimeoutOption,
    app,
)
from persona_lens.cli.output import print_table, say, tell, tell_json

if TYPE_CHECKING:
    from persona_lens.evaluation.capability_result import Capability
    from persona_lens.evaluation.evaluate import Evaluation
    from persona_lens.interventions.values import Intervention
    from persona_lens.judges.scores import Judge
    from persona_lens.models.structure import Model
    from persona_lens.statistics import Estimate
    from persona_lens.traits.trait import Trait
    from persona_lens.vectors.persona_vectors import PersonaVectors


class Subject(NamedTuple):
    """Whose trait is scored, and along which vectors the model is steered; None where that was not asked for."""

    vectors: "PersonaVectors | None"
    trait: "Trait | None"
    folder: Path | None
    max_new_tokens: int


@dataclass(frozen=True)
class Row:
    """A condition: what acts while the model answers, and what was measured; None where that was not asked for."""

    name: str
    interventions: "tuple[Intervention, ...]" = ()
    evaluation: "Evaluation | None" = None
    capability: "Capability | None" = None

    def __str__(self) -> str:
        return "; ".join(map(str, self.interventions)) or self.name

    def folder(self, output: Path) -> Path:
        """Its own, in that of the command."""
        return output / self.name.replace(" ", "-")


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="A run's folder (of `extract` or `demo`), or its vectors.")] = None,
    trait: Annotated[str | None, typer.Option(help="Bundled trait or JSON; by default the run's own.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of an adapter that is on the model throughout.")] = None,
    layer: Annotated[int | None, typer.Option(help="Counted from 0; by default the one that was selected.")] = None,
    coefficient: Annotated[list[float] | None, typer.Option(help="Steer by it; repeat for a row each.")] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="A row with the direction ablated at every layer.")] = False,
    cap: Annotated[float | None, typer.Option(help="A row with the projection at the layer capped there.")] = None,
    at: Annotated[str, typer.Option(help="Which tokens: response, prompt or all.")] = "response",
    judge: JudgeOption = "likelihood",
    n_questions: Annotated[
        int | None, typer.Option(min=0, help="Only the first so many questions; 0 for --capability alone.")
    ] = None,
    per_question: Annotated[int, typer.Option(min=1, help="Answers to each question.")] = 1,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Length limit; by default the run's.")] = None,
    capability: Annotated[bool, typer.Option("--capability", help="Also what the model still can.")] = False,
    questions: Annotated[
        Path | None, typer.Option(help="Of --capability: multiple choice as .jsonl; MMLU's by default.")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="Of --capability: chats as .jsonl, for their likelihood.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder, with one in it for each row; a second call resumes.")
    ] = None,
    fail_above: Annotated[float | None, typer.Option(help="Exit with 3 if a mean trait score is greater.")] = None,
    judge_extra_body: JudgeExtraOption = None,
    concurrency: ConcurrencyOption = 20,
    timeout: TimeoutOption = 60.0,
    alias: AliasOption = None,
    model: ModelOption = DEFAULT_MODEL,
    model_class: ClassOption = ModelClass.BRIDGE,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Trait score, coherence and diversity of a model's answers, and (--capability) what it still can.

    The model is as it is, with an adapter, or steered, ablated or capped along a run's vectors, one row each; a row of
    --coefficient 0 is what to hold the others against.

    Example: persona-lens evaluate runs/demo --adapter runs/ft --coefficient 0 --coefficient -2 --capability
    """
    from persona_lens.judges.scores import scorable_questions
    from persona_lens.models.adapters import Adapter, adapted

    if at not in ("response", "prompt", "all"):
        raise typer.BadParameter(f"--at is response, prompt or all; got {at}")
    subject = _subject(run, trait, max_new_tokens, answers=n_questions != 0)
    rows = _conditions(run, subject.vectors, layer, coefficient, ablate, cap)
    able = _abilities(capability, questions, texts)
    folder = _folder(subject, output, fail_above, capability=capability)
    if output is not None:
        _refuse_other_results(rows, output)
    if adapter is not None:
        refuse_without_adapters(model_class)
    if output is not None:
        claim(output)
    worn = None if adapter is None else Adapter.load(adapter)
    settings: dict[str, Any] = {"concurrency": concurrency, "timeout": timeout, "aliases": alias}
    settings["extra_body"] = judge_extra_body
    chosen = None if folder is None else judge_of(judge, folder, **settings)
    ready = load(model, model_class, threads)
    if subject.trait is not None and chosen is not None and folder is not None:
        source = subject.folder or folder
        # Calibrated before the adapter is on, which is no part of the judge.
        referee = chosen(lambda: _own_judge(ready, subject, source, seed))
        settings = {
            "questions": scorable_questions(referee, subject.trait, subject.trait.evaluation_questions)[:n_questions],
            "per_question": per_question,
            "max_new_tokens": subject.max_new_tokens,
            "at": at,
            "seed": seed,
        }
        with nullcontext() if worn is None else adapted(ready, worn):
            rows = [_evaluated(ready, subject.trait, referee, row, output, settings) for row in rows]
    if able is not None:
        able |= {"at": at, "adapter": adapter, "seed": seed}
        rows = [_measured(ready, row, output, able) for row in rows]
    _show(rows, adapter, as_json=as_json)
    if fail_above is not None and (passed := _first_above(rows, fail_above)):
        say(f"persona-lens: {passed}")
        raise typer.Exit(PASSED)


def _subject(run: Path | None, trait: str | None, max_new_tokens: int | None, *, answers: bool) -> Subject:
    from persona_lens.traits.trait import load_trait

    if run is None:
        named = None if trait is None else load_trait(trait)
        subject = Subject(None, named, None, max_new_tokens or 1000)
    else:
        subject = Subject(*load_run(run, trait, max_new_tokens))
    return subject if answers else subject._replace(trait=None)


def _conditions(
    run: Path | None,
    vectors: "PersonaVectors | None",
    layer: int | None,
    coefficients: list[float] | None,
    ablate: bool,
    cap: float | None,
) -> list[Row]:
    """A row for each intervention that is asked for; without any, the model as it is."""
    from persona_lens.interventions.values import Ablate, Cap, Steer

    at_a_layer = bool(coefficients) or cap is not None
    if layer is not None and not at_a_layer:
        raise typer.BadParameter("--layer goes with --coefficient or --cap")
    if not (at_a_layer or ablate):
        return [Row("no intervention")]
    if run is None or vectors is None:
        raise typer.BadParameter("--coefficient, --ablate and --cap need the vectors of a RUN")
    rows = [Row("ablated", (Ablate(vectors),))] if ablate else []
    if at_a_layer:
        vector = vectors.at(selected_layer(run, vectors) if layer is None else layer)
        amounts = dict.fromkeys(coefficients or [])
        steered = [Row(f"layer {vector.layer} by {each:g}", (Steer(vector, each),)) for each in amounts]
        capped = [] if cap is None else [Row(f"layer {vector.layer} capped at {cap:g}", (Cap(vector, maximum=cap),))]
        rows = [*steered, *rows, *capped]
    return rows


def _abilities(wanted: bool, questions: Path | None, texts: Path | None) -> dict[str, Any] | None:
    """What the capability is measured on, read before a model is loaded; None where it is not asked for."""
    from persona_lens.evaluation.capability_result import mmlu_sample, read_questions
    from persona_lens.extraction.responses import read_messages

    if wanted:
        asked = mmlu_sample() if questions is None else read_questions(questions)
        return {"questions": asked, "texts": [] if texts is None else read_messages(texts)}
    if questions or texts:
        raise typer.BadParameter("--questions and --texts go with --capability")
    return None


def _refuse_other_results(rows: list[Row], output: Path) -> None:
    from persona_lens.evaluation.evaluate import RECORD_KEYS
    from persona_lens.storage.files import refuse_other_json

    for row in rows:
        refuse_other_json(row.folder(output) / "evaluation.json", RECORD_KEYS)
        refuse_other_json(row.folder(output) / "capability.json", ("format_version", "answers", "texts"))


def _folder(subject: Subject, output: Path | None, fail_above: float | None, *, capability: bool) -> Path | None:
    """Where the judge keeps what it needs; None where nothing is judged. Bad usage where nothing is measured."""
    if subject.trait is not None:
        folder = subject.folder if output is None else output
        if folder is None:
            raise typer.BadParameter(
                "--output is needed where no run's folder is given: the judge keeps its files there"
            )
        return folder
    if not capability:
        raise typer.BadParameter("give a RUN or a --trait to score, or --capability")
    if fail_above is not None:
        raise typer.BadParameter("--fail-above is about the trait score, and none is asked for")
    return None


def _own_judge(model: "Model", subject: Subject, source: Path, seed: int) -> "Judge":
    from persona_lens.extraction.pipeline import calibrated_judge

    assert subject.trait is not None
    return calibrated_judge(model, subject.trait, source, max_new_tokens=subject.max_new_tokens, seed=seed)


def _evaluated(
    model: "Model", trait: "Trait", judge: "Judge", row: Row, output: Path | None, settings: dict[str, Any]
) -> Row:
    from persona_lens.evaluation.evaluate import evaluate as score

    folder = None if output is None else row.folder(output)
    found = score(model, trait, judge, interventions=row.interventions, output=folder, **settings)
    return replace(row, evaluation=found)


def _measured(model: "Model", row: Row, output: Path | None, settings: dict[str, Any]) -> Row:
    from persona_lens.evaluation.capability import measure_capability

    found = measure_capability(model, interventions=row.interventions, **settings)
    if output is not None:
        row.folder(output).mkdir(parents=True, exist_ok=True)
        found.save(row.folder(output) / "capability.json")
    return replace(row, capability=found)


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
    scored = [(row, row.evaluation) for row in rows if row.evaluation is not None]
    if scored:
        head = ["condition", "dose", f"{scored[0][1].trait} [95 %]", "coherence [95 %]", "diversity", "scored"]
        print_table(head, [_scores(*each) for each in scored])
    able = [(row, row.capability) for row in rows if row.capability is not None]
    if able:
        chance = able[0][1].chance
        guessed = "accuracy [95 %]" if chance is None else f"accuracy [95 %] (chance {chance:.2f})"
        head = ["condition", guessed, "margin, nats", "letter mass", "NLL, nats a token"]
        print_table(head, [_capability_cells(*each) for each in able])


def _scores(row: Row, found: "Evaluation") -> list[str]:
    from persona_lens.interventions.values import Steer

    doses = [dose for each in row.interventions if isinstance(each, Steer) for dose in each.doses if dose is not None]
    diversity = "-" if found.diversity is None else f"{found.diversity:.2f}"
    counts = f"{found.trait_score.n} of {len(found.scored)}"
    dose = f"{doses[0]:+.2f}" if doses else ""
    return [row.name, dose, str(found.trait_score), str(found.coherence), diversity, counts]


def _capability_cells(row: Row, found: "Capability") -> list[str]:
    return [row.name, *map(_decimals, (found.accuracy, found.margin, found.letter_mass, found.nll))]


def _decimals(found: "Estimate") -> str:
    if found.value is None:
        return "-"
    return f"{found.value:.2f}" + ("" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]")


def _first_above(rows: list[Row], threshold: float) -> str | None:
    """One sentence about the first mean trait score above a threshold; None where there is none.

    Raises ValueError where a row has no trait score, which is no proof of a low one.
    """
    for row in rows:
        assert row.evaluation is not None
        value = row.evaluation.trait_score.value
        if value is None:
            raise ValueError(
                f"{row}: none of {len(row.evaluation.scored)} answers has a trait score to hold against "
                "--fail-above: read them, or take another --judge."
            )
        if value > threshold:
            return f"{row}: the mean {row.evaluation.trait} score is {value:.1f}, above the threshold of {threshold:g}."
    return None
