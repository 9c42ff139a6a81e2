"""The commands that make vectors and show them, each a few lines over one of the library's functions."""

from pathlib import Path
from typing import Annotated, Any

import typer

from persona_lens.cli.ending import claim
from persona_lens.cli.inputs import KeepChoices, ModelClass, checked_position, load, load_vectors, read_sides
from persona_lens.cli.judging import judge_of
from persona_lens.cli.options import (
    DEFAULT_MODEL,
    RELATIONS,
    AliasOption,
    ClassOption,
    ConcurrencyOption,
    JsonOption,
    JudgeExtraOption,
    JudgeOption,
    ModelOption,
    SeedOption,
    ServerExtraOption,
    ServerModelOption,
    ServerOption,
    ThreadsOption,
    TimeoutOption,
    TokensOption,
    TraitOption,
    app,
)
from persona_lens.cli.output import (
    judge_findings,
    say,
    show_doses,
    show_vectors,
    sweep_as_json,
    tell,
    tell_json,
    vectors_as_json,
)
from persona_lens.cli.servers import connect


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run; a second call resumes it.")] = Path("runs/demo"),
    model_class: ClassOption = ModelClass.BRIDGE,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """The whole pipeline on the embedded model: rollouts, judge, vectors of `optimistic`, the layer to steer, a page.

    Example: persona-lens demo --output runs/demo
    """
    from persona_lens.evaluation.layer_selection import select_layer
    from persona_lens.extraction.pipeline import extract_persona_vectors
    from persona_lens.judges.likelihood_ratio import LikelihoodRatioJudge
    from persona_lens.traits.trait import load_trait

    claim(output)
    trait = load_trait("optimistic")
    model = load(DEFAULT_MODEL, model_class, threads)
    # Two other pairs instead of four halve the judging, for .02 of its AUC (docs/experiments.md).
    judge = LikelihoodRatioJudge(model, calibration_questions=6, contrast_pairs=2)
    vectors = extract_persona_vectors(
        model, trait, judge=judge, per_question=1, max_new_tokens=32, output=output, seed=seed
    )
    sweep = select_layer(
        model,
        vectors,
        trait,
        judge=judge,
        layers=range(1, vectors.n_layers, 3),
        coefficients=(2.0, 4.0, 6.0),
        questions=trait.extraction_questions[:4],
        max_new_tokens=32,
        likelihood_screen=False,
        output=output,
        seed=seed,
    )
    if as_json:
        tell_json({"vectors": vectors_as_json(vectors), "sweep": sweep_as_json(sweep)})
    else:
        show_vectors(vectors, as_json=False)
        tell(judge_findings(output))
        show_doses(sweep, trait, min_coherence=75.0)
    say(f"Everything is in {output}: rollouts, scores, vectors.safetensors, layer_sweep.json.")
    try:
        from persona_lens.pages.run_report import write_report

        say(f"The page to read is {write_report(output)}.")
    except ImportError as error:
        say(f"No page: {error}")


@app.command()
def extract(
    trait: TraitOption,
    output: Annotated[Path, typer.Option(help="The .safetensors file to write; without inputs, the run's folder.")],
    model: ModelOption = DEFAULT_MODEL,
    positive: Annotated[Path | None, typer.Option(help="Responses with the trait: .csv or .jsonl of messages.")] = None,
    negative: Annotated[Path | None, typer.Option(help="Responses without it, in the same form.")] = None,
    rollouts: Annotated[Path | None, typer.Option(help="Rollouts, with --scores.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Their scores.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many pairs that are kept.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=100, help="Trait score that divides the sides.")] = 50.0,
    negative_below: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Negatives score below this; below --threshold by default."),
    ] = None,
    min_coherence: Annotated[float, typer.Option(min=0, max=100, help="Coherence that both sides need.")] = 50.0,
    min_pairs: Annotated[int, typer.Option(min=1, help="Fewer kept pairs are an error.")] = 10,
    position: Annotated[str, typer.Option(help="response_mean, prompt_mean or prompt_last.")] = "response_mean",
    after: Annotated[str | None, typer.Option(help="Average only what follows this text, such as '</think>'.")] = None,
    drop_unclosed: Annotated[bool, typer.Option(help="Drop responses that never say --after.")] = False,
    truncate: Annotated[bool, typer.Option(help="Cut responses that exceed the context, and count them.")] = False,
    per_question: Annotated[int, typer.Option(min=1, help="Samples a question, where rollouts are made.")] = 10,
    max_new_tokens: TokensOption = 1000,
    judge: JudgeOption = "likelihood",
    server: ServerOption = None,
    server_model: ServerModelOption = None,
    judge_extra_body: JudgeExtraOption = None,
    server_extra_body: ServerExtraOption = None,
    concurrency: ConcurrencyOption = 20,
    timeout: TimeoutOption = 60.0,
    alias: AliasOption = None,
    model_class: ClassOption = ModelClass.BRIDGE,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Persona vectors from responses that are given, from judged rollouts, or from the model in one go.

    Example: persona-lens extract --trait evil --positive evil_pos.csv --negative evil_neg.csv --output evil.safetensors
    """
    from persona_lens.extraction.extract import extract_from_responses
    from persona_lens.extraction.pipeline import extract_persona_vectors
    from persona_lens.judges.likelihood_ratio import LikelihoodRatioJudge
    from persona_lens.rollouts.server import ServerEngine

    choices = KeepChoices(threshold, min_coherence, min_pairs, negative_below)
    where = checked_position(position)
    sides = read_sides(trait, positive, negative, rollouts, scores, choices, limit, output)
    if sides is not None and (server or judge != "likelihood"):
        raise typer.BadParameter(
            "--server samples rollouts and --judge scores them: leave both out where they are given"
        )
    if server_model and not server:
        raise typer.BadParameter("--server-model is a name on a --server, and none is given")
    if sides is None:
        claim(output)
    if server_extra_body is not None and not server:
        raise typer.BadParameter("--server-extra-body goes to a --server, and none is given")
    settings: dict[str, Any] = {"concurrency": concurrency, "timeout": timeout, "aliases": alias}
    client = server and connect(server, server_model or model, output, **settings, extra_body=server_extra_body)
    chosen = judge_of(judge, output, **settings, extra_body=judge_extra_body)
    ready = load(model, model_class, threads)
    if sides is None:
        vectors = extract_persona_vectors(
            ready,
            trait,
            judge=chosen(lambda: LikelihoodRatioJudge(ready)),
            engine=ServerEngine(client, max_new_tokens) if client else None,
            per_question=per_question,
            max_new_tokens=max_new_tokens,
            position=where,
            after=after,
            output=output,
            seed=seed,
            **choices._asdict(),
        )
        if client:
            say(f"Rollouts: {client.usage}.")
    else:
        vectors = extract_from_responses(
            ready,
            sides.positive,
            sides.negative,
            trait=trait,
            position=where,
            after=after,
            unclosed="drop" if drop_unclosed else "error",
            too_long="truncate" if truncate else "error",
            sampled_by=sides.sampled_by,
            seed=seed,
        )
        vectors.save(output)
    show_vectors(vectors, as_json=as_json)


@app.command()
def show(
    vectors: Annotated[Path, typer.Argument(help="A vectors file, or a run's folder.")],
    model: Annotated[str | None, typer.Option(help="Also check that they belong to this model.")] = None,
    model_class: ClassOption = ModelClass.BRIDGE,
    as_json: JsonOption = False,
) -> None:
    """A vectors file by layer: norms, split-half cosine, placebo, held-out AUC with its interval.

    Example: persona-lens show runs/demo
    """
    loaded = load_vectors(vectors)
    if model is not None:
        relation = loaded.check(load(model, model_class, threads=None))
        say(f"{model} is {RELATIONS[relation]}.")
    show_vectors(loaded, as_json=as_json)
