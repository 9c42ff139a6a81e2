"""The commands that judge: scores of rollouts by any judge, and how far two judges agree."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli.inputs import ModelClass, load
from persona_lens.cli.options import (
    DEFAULT_MODEL,
    AliasOption,
    ClassOption,
    ConcurrencyOption,
    DryRunOption,
    JsonOption,
    JudgeExtraOption,
    JudgeOption,
    ModelOption,
    SeedOption,
    ThreadsOption,
    TimeoutOption,
    TraitOption,
    app,
)
from persona_lens.cli.output import say, tell, tell_json
from persona_lens.cli.servers import client_of

if TYPE_CHECKING:
    from persona_lens.judges.llm import LLMJudge
    from persona_lens.judges.scores import Judge
    from persona_lens.models.structure import Model
    from persona_lens.rollouts.rows import Rollout
    from persona_lens.traits.trait import Trait

RolloutsOption = Annotated[Path, typer.Option("--rollouts", help="JSON-lines file of `persona-lens rollouts`.")]


def judge_of(
    spec: str,
    folder: Path,
    *,
    concurrency: int,
    timeout: float,
    aliases: Sequence[str] | None = None,
    extra_body: str | None = None,
) -> "Callable[[Callable[[], Judge]], Judge]":
    """What makes the judge that `--judge` names, given what makes the likelihood judge, which needs the model.

    The classifier is read and the server's name checked at once, before a model is loaded. A classifier knows no
    coherence, and takes it from the likelihood judge. Answers of a server are kept in the folder's calls.sqlite, and
    `extra_body` (JSON) goes to it with every request.
    """
    from persona_lens.judges.classifier import ClassifierJudge, TextClassifier
    from persona_lens.judges.coherence import CombinedJudge

    if extra_body is not None and not spec.startswith("openai:"):
        raise typer.BadParameter(f"--judge-extra-body goes to a judge on a server, and --judge is {spec}")
    if spec == "likelihood":
        return lambda own: own()
    if spec.startswith("classifier:"):
        classifier = ClassifierJudge(TextClassifier.load(spec.removeprefix("classifier:")))
        return lambda own: CombinedJudge(classifier, own())
    settings: dict[str, Any] = {"concurrency": concurrency, "timeout": timeout}
    llm = llm_judge(spec, folder, **settings, aliases=aliases, extra_body=extra_body)
    return lambda own: llm


def llm_judge(
    spec: str,
    folder: Path,
    *,
    concurrency: int,
    timeout: float,
    dry_run: bool = False,
    aliases: Sequence[str] | None = None,
    extra_body: str | None = None,
) -> "LLMJudge":
    """The judge on a server that `--judge` names; a dry run makes no file for its answers."""
    from persona_lens.judges.llm import LLMJudge

    if not spec.startswith("openai:"):
        raise typer.BadParameter(
            f"--judge is likelihood, classifier:FILE, openai:MODEL or openai:MODEL@URL; got {spec}"
        )
    settings: dict[str, Any] = {"concurrency": concurrency, "timeout": timeout, "dry_run": dry_run}
    return LLMJudge(client_of(spec, folder, **settings, aliases=aliases, extra_body=extra_body))


@app.command()
def judge(
    trait: TraitOption,
    rollouts: RolloutsOption,
    output: Annotated[Path, typer.Option(help="JSON-lines file of scores; a second call resumes it.")],
    by: JudgeOption = "likelihood",
    dry_run: DryRunOption = False,
    write_batch: Annotated[
        Path | None,
        typer.Option(help="Write the calls as files for OpenAI's Batch API, and make but one, a probe."),
    ] = None,
    read_batch: Annotated[list[Path] | None, typer.Option(help="Take a batch's results first; repeatable.")] = None,
    judge_extra_body: JudgeExtraOption = None,
    concurrency: ConcurrencyOption = 20,
    timeout: TimeoutOption = 60.0,
    alias: AliasOption = None,
    model: ModelOption = DEFAULT_MODEL,
    calibration_questions: Annotated[int, typer.Option(min=2, help="Evaluation questions to calibrate on.")] = 10,
    model_class: ClassOption = ModelClass.BRIDGE,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
) -> None:
    """Score rollouts: by likelihood ratio on the model itself, by an LLM on a server, or by a text classifier.

    The first one's calibration, and what a server answered (calls.sqlite), are kept beside the scores.

    Example: persona-lens judge --trait evil --rollouts runs/evil/rollouts.jsonl --output runs/evil/scores.jsonl
    """
    from persona_lens.rollouts.rows import read_rollouts
    from persona_lens.storage.files import ensure_writable
    from persona_lens.traits.trait import load_trait

    loaded, rows = load_trait(trait), read_rollouts(rollouts)
    ensure_writable(output)
    settings: dict[str, Any] = {"concurrency": concurrency, "timeout": timeout, "aliases": alias}
    settings["extra_body"] = judge_extra_body
    if dry_run or write_batch or read_batch:
        llm = llm_judge(by, output.parent, **settings, dry_run=dry_run)
        if dry_run:
            tell(_told(llm, loaded, rows, output))
            return
        _exchange_batches(llm, loaded, rows, write_batch, read_batch or [])
        if write_batch:
            return
    chosen = judge_of(by, output.parent, **settings)

    def own() -> "Judge":
        ready = load(model, model_class, threads)
        return _calibrated(ready, loaded, rows, output.parent, calibration_questions, seed)

    _score(chosen(own), loaded, rows, output)


def _calibrated(
    model: "Model", trait: "Trait", rows: "list[Rollout]", folder: Path, calibration_questions: int, seed: int
) -> "Judge":
    from persona_lens.extraction.pipeline import calibrate
    from persona_lens.judges.likelihood_ratio import LikelihoodRatioJudge
    from persona_lens.rollouts.engines import ModelEngine
    from persona_lens.rollouts.rows import longest_response

    referee = LikelihoodRatioJudge(model, calibration_questions=calibration_questions)
    # Calibration responses as long as the judged ones: likelihood per token depends on length.
    engine = ModelEngine(model, max_new_tokens=longest_response(rows, model.tokenizer))
    calibrate(referee, trait, engine, folder=folder, seed=seed)
    return referee


def _told(llm: "LLMJudge", trait: "Trait", rows: "list[Rollout]", output: Path) -> str:
    """What a run would ask, for a dry run."""
    from persona_lens.judges.scores import unscored

    missing = unscored(rows, output)
    return (
        f"{len(rows) - len(missing)} of {len(rows)} rollouts are scored in {output}.\n"
        f"The others: {llm.estimate(trait, missing)}; and one call to find out how {llm.client.endpoint.model} writes "
        "numbers (where it splits them into digits, a judgement takes several calls more)."
    )


def _exchange_batches(
    llm: "LLMJudge", trait: "Trait", rows: "list[Rollout]", write: Path | None, read: list[Path]
) -> None:
    """Take results of a batch into the cache, and write the calls that are still missing as files of a new one."""
    from persona_lens.clients.batches import read_batch, write_batch

    for path in read:
        say(f"{path}: {read_batch(llm.client, path)}.")
    if write is None:
        return
    files = write_batch(llm.client, llm.requests(trait, rows), write)
    if not files:
        say("Every call is answered already: run again without --write-batch.")
        return
    say(f"{', '.join(map(str, files))}: submit to the Batch API, and pass the results with --read-batch.")


def _score(referee: "Judge", trait: "Trait", rows: "list[Rollout]", output: Path) -> None:
    from persona_lens.judges.keep import keep_pairs, pair_rollouts
    from persona_lens.judges.llm import LLMJudge
    from persona_lens.judges.scores import score_rollouts

    scored = score_rollouts(referee, trait, rows, output=output)
    missing, refused = sum(row.trait_score is None for row in scored), sum(row.refused for row in scored)
    rejected = sum(row.rejected for row in scored)
    _, report = keep_pairs(pair_rollouts(scored), trait=trait.name, min_pairs=0)
    refusals = f", {refused} of them refusals" if refused else ""
    rejections = f"; the server did not take {rejected} rows, such as ones too long for it" if rejected else ""
    say(f"{len(scored)} scores in {output} ({missing} without a trait score{refusals}{rejections}). {report}.")
    silent = [row.evidence["trait_mass"] for row in scored if row.trait_score is None and "trait_mass" in row.evidence]
    if len(silent) > refused:
        mean = sum(silent) / len(silent)
        say(f"Where a score is missing, numbers held {mean:.0%} of the probability: it may not heed the rubric.")
    if isinstance(referee, LLMJudge):
        say(f"{referee.client.usage}.")


@app.command()
def agreement(
    rollouts: RolloutsOption,
    scores: Annotated[Path, typer.Option(help="Scores of `persona-lens judge`.")],
    against: Annotated[Path, typer.Option(help="Scores of another judge (.jsonl), or of people (.csv with --column).")],
    column: Annotated[str | None, typer.Option(help="The column of people's scores, 0 to 100.")] = None,
    coherence: Annotated[bool, typer.Option("--coherence", help="Compare coherence, not the trait.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the picture, as .html.")] = None,
    as_json: JsonOption = False,
) -> None:
    """How far two judges agree on the same rollouts, or a judge and people.

    Example: persona-lens agreement --rollouts rollouts.jsonl --scores scores.jsonl --against llm_scores.jsonl
    """
    from persona_lens.judges.agreement import judge_agreement, read_human_scores
    from persona_lens.judges.scores import read_scores
    from persona_lens.rollouts.rows import read_rollouts
    from persona_lens.storage.files import ensure_writable, write_whole

    if (against.suffix == ".csv") != (column is not None):
        raise typer.BadParameter("--column names the scores in a .csv file: give both, or another judge's .jsonl")
    if output is not None:
        ensure_writable(output)
    rows = read_rollouts(rollouts)
    first = read_scores(scores, rows)
    second = read_scores(against, rows) if column is None else read_human_scores(against, rows, column)
    names = (scores.stem, against.stem if column is None else column)
    if names[0] == names[1]:  # such as the scores.jsonl of two folders
        names = (str(scores), str(against) if column is None else f"{column} ({against})")
    found = judge_agreement(first, second, names=names, of="coherence" if coherence else "trait_score")
    tell_json(found.summary()) if as_json else tell(found)
    if output is not None:
        from persona_lens.plots.agreement import plot_agreement

        write_whole(output, plot_agreement(found).to_html(include_plotlyjs=True).encode())
        say(f"The picture is in {output}.")
