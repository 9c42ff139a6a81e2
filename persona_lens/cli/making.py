"""The command that makes rollouts, from a model in this process or on a server."""

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
    ModelOption,
    Polarity,
    QuestionSet,
    SeedOption,
    ServerExtraOption,
    ServerOption,
    ThreadsOption,
    TimeoutOption,
    TokensOption,
    TraitOption,
    app,
)
from persona_lens.cli.output import say, tell
from persona_lens.cli.servers import connect

if TYPE_CHECKING:
    from persona_lens.rollouts.engines import RolloutEngine


@app.command()
def rollouts(
    trait: TraitOption,
    output: Annotated[Path, typer.Option(help="JSON-lines file to append to; a second call resumes it.")],
    model: ModelOption = DEFAULT_MODEL,
    polarity: Annotated[
        list[Polarity] | None, typer.Option(help="Repeatable; positive and negative by default.")
    ] = None,
    question_set: Annotated[QuestionSet, typer.Option("--questions", help="Which questions.")] = QuestionSet.EXTRACTION,
    n_questions: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")] = None,
    per_question: Annotated[int, typer.Option(min=1, help="Samples a question and instruction.")] = 10,
    max_new_tokens: TokensOption = 1000,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    server: ServerOption = None,
    server_extra_body: ServerExtraOption = None,
    concurrency: ConcurrencyOption = 20,
    timeout: TimeoutOption = 60.0,
    alias: AliasOption = None,
    dry_run: DryRunOption = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch-rows", min=1, help="Rows decoded together, without a server.")
    ] = 100,
    model_class: ClassOption = ModelClass.BRIDGE,
    threads: ThreadsOption = None,
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
    asked = loaded.extraction_questions if question_set is QuestionSet.EXTRACTION else loaded.evaluation_questions
    prompts = plan_rollouts(
        loaded,
        polarities=[each.value for each in polarity or (Polarity.POSITIVE, Polarity.NEGATIVE)],
        questions=asked[:n_questions],
        per_question=per_question,
    )
    engine: RolloutEngine
    if server is None:
        if dry_run:
            raise typer.BadParameter("--dry-run is for the calls to a --server")
        if server_extra_body is not None:
            raise typer.BadParameter("--server-extra-body goes to a --server, and none is given")
        engine = ModelEngine(load(model, model_class, threads), max_new_tokens, temperature, top_p, batch_size)
    else:
        settings: dict[str, Any] = {"concurrency": concurrency, "timeout": timeout, "aliases": alias}
        settings["extra_body"] = server_extra_body
        client = connect(server, model, output.parent, **settings, dry_run=dry_run)
        engine = ServerEngine(client, max_new_tokens, temperature, top_p)
        if dry_run:
            missing = unanswered(engine, prompts, seed=seed, output=output)
            tell(f"{len(prompts) - len(missing)} of {len(prompts)} rollouts are in {output}.")
            tell(f"The others: {engine.estimate(missing, seed=seed)}.\nRollouts by {engine.name}.")
            return
    rows = collect_rollouts(engine, prompts, seed=seed, output=output)
    rejected = [row for row in rows if row.rejected]
    told = f", {len(rejected)} of them prompts that the server did not take" if rejected else ""
    say(f"{len(rows)} rollouts in {output} ({sum(row.is_empty for row in rows)} empty{told}).")
    if rejected:
        say(f"The first of these was {rejected[0].finish_reason}")
    if isinstance(engine, ServerEngine):
        say(f"{engine.client.usage}.")
