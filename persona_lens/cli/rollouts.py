"""The commands that sample rollouts, judge them, and compare judges."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli.options import (
    DryRunOption,
    JsonOption,
    JudgeOptions,
    LengthOption,
    ModelOptions,
    Polarity,
    QuestionSet,
    SeedOption,
    ServerFieldsOption,
    ServerOptions,
    TraitOption,
    command,
)
from persona_lens.cli.output import say, tell, tell_json, write_page

if TYPE_CHECKING:
    from persona_lens.judges.llm import LLMJudge
    from persona_lens.judges.scores import Judge
    from persona_lens.rollouts.engines import RolloutEngine
    from persona_lens.rollouts.rows import Rollout
    from persona_lens.traits.trait import Trait

RolloutsOption = Annotated[Path, typer.Option("--rollouts", help="JSON-lines file of `persona-lens rollouts`.")]


@command
def rollouts(
    trait: TraitOption,
    output: Annotated[Path, typer.Option(help="JSON-lines file to append to; a second call resumes it.")],
    models: ModelOptions,
    servers: ServerOptions,
    polarity: Annotated[
        list[Polarity] | None, typer.Option(help="Repeatable; positive and negative by default.")
    ] = None,
    question_set: Annotated[QuestionSet, typer.Option("--questions", help="Which questions.")] = QuestionSet.EXTRACTION,
    n_questions: Annotated[int | None, typer.Option(min=1, help="Only the first n questions.")] = None,
    per_question: Annotated[int, typer.Option(min=1, help="Samples a question and instruction.")] = 10,
    max_new_tokens: LengthOption = 1000,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    server: Annotated[str | None, typer.Option(help="Sample on this server: http://localhost:8000/v1.")] = None,
    server_extra_body: ServerFieldsOption = None,
    dry_run: DryRunOption = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows decoded together, without a server.")] = 100,
    seed: SeedOption = 0,
) -> None:
    """Sample responses under the trait's system prompts, from a model here or (--server) elsewhere.

    With --server, --model is the model's name there, and every answer is also kept in calls.sqlite beside the output.

    Example: persona-lens rollouts --trait evil --per-question 2 --max-new-tokens 64 --output runs/evil/rollouts.jsonl
    """
    from persona_lens.rollouts.collection import collect_rollouts, plan_rollouts, unanswered
    from persona_lens.rollouts.engines import ModelEngine
    from persona_lens.rollouts.server import ServerEngine
    from persona_lens.storage.files import ensure_writable
    from persona_lens.traits.trait import load_trait

    loaded = load_trait(trait)
    ensure_writable(output)
    extraction = question_set is QuestionSet.EXTRACTION
    prompts = plan_rollouts(
        loaded,
        polarities=[side.value for side in polarity or (Polarity.POSITIVE, Polarity.NEGATIVE)],
        questions=(loaded.extraction_questions if extraction else loaded.evaluation_questions)[:n_questions],
        per_question=per_question,
    )
    engine: RolloutEngine
    if server is None:
        if dry_run:
            raise typer.BadParameter("--dry-run is for the calls to a --server")
        if server_extra_body is not None:
            raise typer.BadParameter("--server-extra-body goes to a --server, and none is given")
        engine = ModelEngine(models.load(), max_new_tokens, temperature, top_p, batch_size)
    else:
        client = servers.connect(server, models.model, output.parent, extra_body=server_extra_body, dry_run=dry_run)
        engine = ServerEngine(client, max_new_tokens, temperature, top_p)
        if dry_run:
            missing = unanswered(engine, prompts, seed=seed, output_file=output)
            tell(f"{len(prompts) - len(missing)} of {len(prompts)} rollouts are in {output}.")
            tell(f"The others: {engine.estimate(missing, seed=seed)}.\nRollouts by {engine.name}.")
            return
    rows = collect_rollouts(engine, prompts, seed=seed, output_file=output)
    rejected = [row for row in rows if row.rejected]
    rejections = f", {len(rejected)} of them prompts that the server rejected" if rejected else ""
    say(f"{len(rows)} rollouts in {output} ({sum(row.is_empty for row in rows)} empty{rejections}).")
    if rejected:
        say(f"The first of these was {rejected[0].finish_reason}")
    if isinstance(engine, ServerEngine):
        say(f"{engine.client.usage}.")


@command
def judge(
    trait: TraitOption,
    rollouts: RolloutsOption,
    output: Annotated[Path, typer.Option(help="JSON-lines file of scores; a second call resumes it.")],
    models: ModelOptions,
    judges: JudgeOptions,
    dry_run: DryRunOption = False,
    write_batch: Annotated[
        Path | None,
        typer.Option(help="Write the calls as files for OpenAI's Batch API, and make only a probe."),
    ] = None,
    read_batch: Annotated[
        list[Path] | None, typer.Option(help="First read the results of such a batch; repeatable.")
    ] = None,
    calibration_questions: Annotated[int, typer.Option(min=2, help="Evaluation questions to calibrate on.")] = 10,
    seed: SeedOption = 0,
) -> None:
    """Score rollouts: by likelihood ratio on the model itself, by an LLM on a server, or by a text classifier.

    The likelihood judge's calibration, and a server's answers (calls.sqlite), are kept beside the scores.

    Example: persona-lens judge --trait evil --rollouts runs/evil/rollouts.jsonl --output runs/evil/scores.jsonl
    """
    from persona_lens.extraction.pipeline import calibrate
    from persona_lens.judges.likelihood_ratio import LikelihoodRatioJudge
    from persona_lens.judges.llm import LLMJudge
    from persona_lens.judges.scores import unscored
    from persona_lens.rollouts.engines import ModelEngine
    from persona_lens.rollouts.rows import longest_response, read_rollouts
    from persona_lens.storage.files import ensure_writable
    from persona_lens.traits.trait import load_trait

    loaded, rows = load_trait(trait), read_rollouts(rollouts)
    ensure_writable(output)
    if dry_run or write_batch or read_batch:
        llm = LLMJudge(judges.judge_client(output.parent, dry_run=dry_run))
        if dry_run:
            missing = unscored(rows, output)
            tell(f"{len(rows) - len(missing)} of {len(rows)} rollouts are scored in {output}.")
            tell(
                f"The others: {llm.estimate(loaded, missing)}; and one call to find out how "
                f"{llm.client.endpoint.model} writes numbers (where it splits them into digits, a judgement takes "
                "several calls more)."
            )
            return
        _exchange_batches(llm, loaded, rows, write_batch, read_batch or [])
        if write_batch:
            return
    make_judge = judges.load_judge(output.parent)

    def likelihood_judge() -> "Judge":
        model = models.load()
        own = LikelihoodRatioJudge(model, calibration_questions=calibration_questions)
        # Calibration responses as long as the judged ones: likelihood per token depends on length.
        engine = ModelEngine(model, max_new_tokens=longest_response(rows, model.tokenizer))
        calibrate(own, loaded, engine, folder=output.parent, seed=seed)
        return own

    _score(make_judge(likelihood_judge), loaded, rows, output)


def _exchange_batches(
    llm: "LLMJudge", trait: "Trait", rows: "list[Rollout]", write: Path | None, read: list[Path]
) -> None:
    """Take a batch's results into the cache, and write the calls that are still missing as files of a new one."""
    from persona_lens.clients.cache import read_batch, write_batch

    for path in read:
        say(f"{path}: {read_batch(llm.client, path)}.")
    if write is None:
        return
    files = write_batch(llm.client, llm.requests(trait, rows), write)
    if not files:
        say("Every call is answered already: run again without --write-batch.")
        return
    say(f"{', '.join(map(str, files))}: submit to the Batch API, and pass the results with --read-batch.")


def _score(judge: "Judge", trait: "Trait", rows: "list[Rollout]", output: Path) -> None:
    from persona_lens.judges.keep import keep_pairs, pair_rollouts
    from persona_lens.judges.llm import LLMJudge
    from persona_lens.judges.scores import score_rollouts

    scored = score_rollouts(rows, trait, judge=judge, output_file=output)
    missing, refused = sum(row.trait_score is None for row in scored), sum(row.refused for row in scored)
    rejected = sum(row.rejected for row in scored)
    _, report = keep_pairs(pair_rollouts(scored), trait=trait.name, min_pairs=0)
    refusals = f", {refused} of them refusals" if refused else ""
    rejections = f"; the server rejected {rejected} rows, such as ones too long for it" if rejected else ""
    say(f"{len(scored)} scores in {output} ({missing} without a trait score{refusals}{rejections}). {report}.")
    mass = [row.evidence["trait_mass"] for row in scored if row.trait_score is None and "trait_mass" in row.evidence]
    if len(mass) > refused:
        mean = sum(mass) / len(mass)
        say(f"Where a score is missing, numbers held {mean:.0%} of the probability: the judge may ignore the rubric.")
    if isinstance(judge, LLMJudge):
        say(f"{judge.client.usage}.")


@command
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
    from persona_lens.storage.files import ensure_writable

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
    result = judge_agreement(first, second, names=names, of="coherence" if coherence else "trait_score")
    tell_json(result.summary()) if as_json else tell(result)
    if output is not None:
        from persona_lens.plots.agreement import plot_agreement

        write_page(output, plot_agreement(result))
        say(f"The picture is in {output}.")
