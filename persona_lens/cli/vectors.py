"""The commands that make, show and convert vectors."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli.inputs import KeepSettings, ResponseFiles, load_vectors
from persona_lens.cli.interrupts import lock
from persona_lens.cli.options import (
    DEFAULT_MODEL,
    AfterOption,
    JsonOption,
    JudgeOptions,
    LengthOption,
    LoadOptions,
    ModelOptions,
    Position,
    SeedOption,
    ServerFieldsOption,
    TraitOption,
    command,
)
from persona_lens.cli.output import interval, number, print_table, records, say, tell, tell_json
from persona_lens.cli.steering import show_doses, sweep_as_json

if TYPE_CHECKING:
    from persona_lens.vectors.persona_vectors import PersonaVectors

RELATIONS = {
    "same": "the model that the vectors came from",
    "adapted": "a finetuned or adapted model of the vectors' base",
    "unknown": "a model of their shape; the vectors do not say which model they came from",
}


@command
def demo(
    load: LoadOptions,
    output: Annotated[Path, typer.Option(help="Folder of the run; a second call resumes it.")] = Path("runs/demo"),
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

    lock(output)
    trait = load_trait("optimistic")
    model = load.load_by_name(DEFAULT_MODEL)
    # Two other pairs instead of four halve the judging, for .02 of its AUC (docs/experiments.md).
    judge = LikelihoodRatioJudge(model, calibration_questions=6, contrast_pairs=2)
    vectors = extract_persona_vectors(
        model, trait, judge=judge, per_question=1, max_new_tokens=32, output_dir=output, seed=seed
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
        likelihood_proxy=False,
        output_dir=output,
        seed=seed,
    )
    if as_json:
        tell_json({"vectors": vectors_as_json(vectors), "sweep": sweep_as_json(sweep)})
    else:
        show_vectors(vectors)
        tell(judge_diagnostics(output))
        show_doses(sweep, trait, min_coherence=75.0)
    say(f"Everything is in {output}: rollouts, scores, vectors.safetensors, layer_sweep.json.")
    try:
        from persona_lens.pages.run_report import write_report

        say(f"The page to read is {write_report(output)}.")
    except ImportError as error:
        say(f"No page: {error}")


@command
def extract(
    trait: TraitOption,
    output: Annotated[Path, typer.Option(help="The .safetensors file to write; without inputs, the run's folder.")],
    models: ModelOptions,
    judges: JudgeOptions,
    positive: Annotated[Path | None, typer.Option(help="Responses with the trait: .csv or .jsonl of messages.")] = None,
    negative: Annotated[Path | None, typer.Option(help="Responses without it, in the same form.")] = None,
    rollouts: Annotated[Path | None, typer.Option(help="Rollouts, with --scores.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Their scores.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first n kept pairs.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=100, help="Trait score that divides the sides.")] = 50.0,
    negative_below: Annotated[
        float | None, typer.Option(min=0, max=100, help="Negatives score below this; below --threshold by default.")
    ] = None,
    min_coherence: Annotated[float, typer.Option(min=0, max=100, help="Coherence that both sides need.")] = 50.0,
    min_pairs: Annotated[int, typer.Option(min=1, help="Fewer kept pairs are an error.")] = 10,
    position: Annotated[Position, typer.Option(help="Which tokens are averaged.")] = Position.RESPONSE_MEAN,
    after: AfterOption = None,
    drop_unclosed: Annotated[bool, typer.Option(help="Drop responses that never say --after.")] = False,
    truncate: Annotated[bool, typer.Option(help="Cut responses that exceed the context, and count them.")] = False,
    per_question: Annotated[int, typer.Option(min=1, help="Samples a question, where rollouts are made.")] = 10,
    max_new_tokens: LengthOption = 1000,
    server: Annotated[str | None, typer.Option(help="Sample on this OpenAI-compatible server.")] = None,
    server_model: Annotated[str | None, typer.Option(help="The model's name there; --model by default.")] = None,
    server_extra_body: ServerFieldsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Persona vectors from given responses, from judged rollouts, or from the model in one go.

    Example: persona-lens extract --trait evil --positive evil_pos.csv --negative evil_neg.csv --output evil.safetensors
    """
    from persona_lens.extraction.extract import extract_from_responses
    from persona_lens.extraction.pipeline import extract_persona_vectors
    from persona_lens.judges.likelihood_ratio import LikelihoodRatioJudge
    from persona_lens.rollouts.server import ServerEngine

    keep = KeepSettings(threshold, min_coherence, min_pairs, negative_below)
    responses = ResponseFiles(positive, negative, rollouts, scores).read(trait, keep, limit, output)
    if responses is not None and (server or judges.judge != "likelihood"):
        raise typer.BadParameter("--server samples rollouts and --judge scores them: omit both where files have them")
    if server_model and not server:
        raise typer.BadParameter("--server-model is a name on a --server, and none is given")
    if server_extra_body is not None and not server:
        raise typer.BadParameter("--server-extra-body goes to a --server, and none is given")
    where: dict[str, Any] = {"position": position.value, "after": after, "seed": seed}
    if responses is not None:
        vectors = extract_from_responses(
            models.load(),
            responses.positive,
            responses.negative,
            trait=trait,
            unclosed="drop" if drop_unclosed else "error",
            too_long="truncate" if truncate else "error",
            sampled_by=responses.sampled_by,
            **where,
        )
        vectors.save(output)
    else:
        lock(output)
        client = server and judges.connect(server, server_model or models.model, output, extra_body=server_extra_body)
        make_judge = judges.load_judge(output)
        model = models.load()
        vectors = extract_persona_vectors(
            model,
            trait,
            judge=make_judge(lambda: LikelihoodRatioJudge(model)),
            engine=ServerEngine(client, max_new_tokens) if client else None,
            per_question=per_question,
            max_new_tokens=max_new_tokens,
            output_dir=output,
            **where,
            **keep._asdict(),
        )
        if client:
            say(f"Rollouts: {client.usage}.")
    if as_json:
        tell_json(vectors_as_json(vectors))
    else:
        show_vectors(vectors)


@command
def show(
    vectors: Annotated[Path, typer.Argument(help="A vectors file, or a run's folder.")],
    load: LoadOptions,
    model: Annotated[str | None, typer.Option(help="Also check that they belong to this model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """A vectors file by layer: norms, split-half cosine, placebo, held-out AUC with its interval.

    Example: persona-lens show runs/demo
    """
    loaded = load_vectors(vectors)
    if model is not None:
        say(f"{model} is {RELATIONS[loaded.check(load.load_by_name(model))]}.")
    if as_json:
        tell_json(vectors_as_json(loaded))
    else:
        show_vectors(loaded)


class OutputFormat(StrEnum):
    """What `convert` writes."""

    PERSONA_LENS = "persona_lens"
    REFERENCE = "reference"
    LAYERS = "layers"
    GGUF = "gguf"


class LastRow(StrEnum):
    """Where the last row of a file with one row a block was read."""

    FINAL_NORM = "final_norm"
    RESIDUAL = "residual"


@command
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="File, run's folder, or folder with a manifest.json.")
    ],
    output: Annotated[Path, typer.Option(help="File to write: .safetensors (ours), .pt or .gguf.")],
    load: LoadOptions,
    format: Annotated[OutputFormat | None, typer.Option(help="By default, that of the output's ending.")] = None,
    n_layers: Annotated[int | None, typer.Option(min=1, help="How many layers the model has.")] = None,
    model: Annotated[str | None, typer.Option(help="The model instead; the vectors then remember it.")] = None,
    trait: Annotated[str | None, typer.Option(help="The trait's name, or which one of a folder's.")] = None,
    layer: Annotated[list[int] | None, typer.Option(min=0, help="Repeatable: only these, from 0.")] = None,
    position: Annotated[Position | None, typer.Option(help="Which tokens were averaged.")] = None,
    last_row: Annotated[LastRow, typer.Option(help="Where a .pt's last row was read.")] = LastRow.FINAL_NORM,
) -> None:
    """Convert vectors: the reference's .pt, one row a block, a dict by layer, GGUF control vectors, and our own.

    Example: persona-lens convert runs/demo --layer 15 --output optimistic.gguf
    """
    from persona_lens.interop.conversion import read_vectors, write_vectors
    from persona_lens.storage.files import ensure_writable

    ensure_writable(output)
    options: dict[str, Any] = {"position": position and position.value, "last_row": last_row.value}
    loaded = None if model is None else load.load_by_name(model)
    vectors = read_vectors(source, trait=trait, model=loaded, n_layers=n_layers, **options)
    formatted: Any = format and format.value
    write_vectors(vectors, output, format=formatted, layers=layer)
    say(f"{vectors!r} is in {output}.")
    if len(vectors.missing) <= 3:  # of a control vector it would be nearly all
        for index, reason in vectors.missing.items():
            say(f"Layer {index} is missing: {reason}.")


def show_vectors(vectors: "PersonaVectors") -> None:
    """Print the vectors by layer: norms and, where they were measured, the statistics."""
    from persona_lens.extraction.pipeline import best_layer

    best = best_layer(vectors)
    head = ["layer", "norm", "norm / residual"]
    if vectors.statistics is not None:
        head += ["split-half cosine", "placebo AUC 95 %", "held-out AUC [95 %]"]
    rows = []
    table: Any = vectors.table()
    for layer, row in table.iterrows():
        cells = [f"{'*' * (layer == best)}{layer}", f"{row['norm']:.2f}", number(row["relative_norm"])]
        if vectors.statistics is not None:
            auc = interval(row["held_out_auc"], row["held_out_auc_low"], row["held_out_auc_high"])
            cells += [number(row["split_half"]), number(row["placebo_auc_95"]), auc]
        rows.append(cells)
    tell(repr(vectors))
    print_table(head, rows)
    if best is not None:
        tell(f"* layer {best} separates held-out questions best (layers count from 0: the paper's layer {best + 1}).")


def vectors_as_json(vectors: "PersonaVectors") -> dict[str, Any]:
    """The vectors' table, counts and best layer by held-out AUC."""
    from persona_lens.extraction.pipeline import best_layer

    rows = records(vectors.table())
    return {"trait": vectors.trait, "counts": dict(vectors.counts), "best_layer": best_layer(vectors), "layers": rows}


def judge_diagnostics(folder: Path) -> str:
    """The judge's diagnostics, which stand beside every result of it."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    diagnostics, tokens = summary["judge_calibration"]["diagnostics"], summary["judge_tokens"]

    def shown(name: str) -> str:
        return number(diagnostics[name], missing="undefined")

    return (
        f"Judge (likelihood ratio, not independent of the model), on {diagnostics['rows']} calibration rollouts: AUC "
        f"{shown('auc_without_own_pair')} without the own pair, {shown('auc_with_own_pair')} with it; Spearman with "
        f"length {shown('spearman_length_positive')} (positive), {shown('spearman_length_negative')} (negative). "
        f"Coherence, on {diagnostics['neutral_rows']} neutral ones: AUC {shown('coherence_auc_shuffled')} against "
        f"shuffled, {shown('coherence_auc_looping')} against looping text. Sharing prompts, it ran "
        f"{tokens['shared']:,} tokens instead of {tokens['unshared']:,} ({tokens['shared'] / tokens['unshared']:.2f})."
    )
