"""The command that monitors: chats projected on persona vectors turn by turn, or the paper's monitoring experiments."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli.inputs import load_run, load_vector, selected_layer
from persona_lens.cli.options import (
    THRESHOLD_PASSED,
    AfterOption,
    FailAboveOption,
    JsonOption,
    JudgeOptions,
    LayerOption,
    ModelOptions,
    SeedOption,
    VectorsOption,
    command,
)
from persona_lens.cli.output import number, print_table, say, tell, tell_json, write_page

if TYPE_CHECKING:
    from persona_lens.monitoring.experiment import MonitoringExperiment
    from persona_lens.monitoring.result import Monitoring
    from persona_lens.vectors.persona_vector import PersonaVector


class Experiment(StrEnum):
    """What shifts the persona."""

    SYSTEM_PROMPTS = "system-prompts"
    MANY_SHOT = "many-shot"


@command
def monitor(
    vectors: VectorsOption,
    models: ModelOptions,
    judges: JudgeOptions,
    chats: Annotated[Path | None, typer.Argument(help="Chats: .jsonl, .json or .parquet with messages.")] = None,
    layer: LayerOption = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Every token, in --output and --json.")] = False,
    window: Annotated[int | None, typer.Option(min=2, help="Read at most n tokens, the newest messages.")] = None,
    after: AfterOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Write a .jsonl or .parquet file; for --experiment, a folder.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the turns as .html; with --tokens, the first chat's.")
    ] = None,
    fail_above: FailAboveOption = None,
    calibrate: Annotated[
        float | None, typer.Option(help="The chats are benign: keep this percentile beside the vectors as a threshold.")
    ] = None,
    experiment: Annotated[
        Experiment | None, typer.Option(help="Instead of chats: does the prompt's projection predict the trait?")
    ] = None,
    shots: Annotated[list[int] | None, typer.Option(help="Examples of many-shot; repeat. 0, 5, 10, 15, 20.")] = None,
    n_questions: Annotated[int, typer.Option(min=2, help="Questions of an experiment.")] = 20,
    per_question: Annotated[int, typer.Option(min=1, help="Answers to each question of an experiment.")] = 10,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Project each turn of chats on persona vectors, before and after the model speaks.

    --experiment samples answers under the trait's eight monitoring prompts, or after examples of the trait, judges
    them, and correlates their mean trait score with the projection of the prompt's last token.

    Example: persona-lens monitor chats.jsonl --vectors runs/demo --window 2048 --output projections.jsonl
    """
    if (experiment is None) == (chats is None):
        raise typer.BadParameter("give a file of chats, or an --experiment")
    if experiment is not None:
        if len(vectors) > 1:
            raise typer.BadParameter("an --experiment is about the --vectors of one run")
        settings = tuple(shots or (0, 5, 10, 15, 20)), n_questions, per_question
        _run_experiment(experiment, vectors[0], layer, settings, output, models, judges, seed, as_json=as_json)
        return
    assert chats is not None
    from persona_lens.monitoring.projection import monitor as project
    from persona_lens.monitoring.result import checked_output
    from persona_lens.monitoring.transcripts import read_chats
    from persona_lens.storage.files import ensure_writable

    if tokens and not (output or as_json or picture):
        raise typer.BadParameter("--tokens goes with --output, --picture or --json: a table has a row for each turn")
    if output is not None:
        checked_output(output)
    if picture is not None:
        ensure_writable(picture)
    read = read_chats(chats)
    directions = [load_vector(path, layer) for path in vectors]
    monitoring = project(models.load(), read, directions, tokens=tokens, window=window, after=after, output_file=output)
    if as_json:
        tell_json(monitoring.to_dict())
    else:
        _show(monitoring)
    if calibrate is not None:
        _calibrate(monitoring, directions, vectors, calibrate, chats)
    if picture is not None:
        _draw(monitoring, picture, tokens=tokens)
    if read.rejected:
        say(f"{chats}: {read.in_words} Rows that could not be read are left out; --json and --output list them.")
    if fail_above is not None and (message := _first_above(monitoring, fail_above)):
        say(f"persona-lens: {message}")
        raise typer.Exit(THRESHOLD_PASSED)


def _calibrate(
    monitoring: "Monitoring", directions: "Sequence[PersonaVector]", paths: list[Path], percentile: float, chats: Path
) -> None:
    """Keep the percentile of the benign chats' response means as each vector's threshold, beside the vector."""
    from persona_lens.monitoring.thresholds import calibrate_threshold, save_thresholds

    for index, (vector, path) in enumerate(zip(directions, paths, strict=True)):
        rows = [(chat.name, turn.response[index]) for chat in monitoring.chats for turn in chat.turns if turn.response]
        threshold = calibrate_threshold(
            [value for _, value in rows],
            vector=vector,
            percentile=percentile,
            chats=[name for name, _ in rows],
            source=chats.name,
        )
        say(f"{vector.trait}@{vector.layer}: threshold {threshold.value:.3f} in {save_thresholds(path, [threshold])}.")


def _draw(monitoring: "Monitoring", path: Path, *, tokens: bool) -> None:
    from persona_lens.pages.tokens import monitoring_html
    from persona_lens.plots.monitoring import plot_turns
    from persona_lens.storage.files import write_whole

    if tokens:
        write_whole(path, monitoring_html(monitoring).encode())
    else:
        write_page(path, plot_turns(monitoring, vector=None))
    say(f"The picture is in {path}.")


def _show(monitoring: "Monitoring") -> None:
    """Print a row a turn; below it, what was dropped and what could not be averaged."""
    shown = monitoring.table().drop(columns=["message", "n_tokens", "dropped_messages"])
    rows = [
        [number(value) if isinstance(value, float) else str(value) for value in row]
        for row in shown.itertuples(index=False)
    ]
    print_table(list(shown.columns), rows)
    shortened = [turn for chat in monitoring.chats for turn in chat.turns if turn.dropped_messages]
    if shortened:
        most = max(turn.dropped_messages for turn in shortened)
        tell(f"{len(shortened)} turns were read without their oldest messages, up to {most} of them (--window).")
    if monitoring.unclosed:
        tell(f"{monitoring.unclosed} responses never say {monitoring.after!r}, and so have no response projection.")


def _first_above(monitoring: "Monitoring", threshold: float) -> str | None:
    """One sentence about the first turn whose projection is above a threshold; None where there is none."""
    for chat in monitoring.chats:
        for index, turn in enumerate(chat.turns, start=1):
            for when, values in (("prompt", turn.prompt), ("response", turn.response or ())):
                for vector, value in zip(monitoring.vectors, values, strict=False):
                    if value > threshold:
                        return (
                            f"{chat.name}, turn {index}: the {when} projection on {vector.name} is {value:.3f}, "
                            f"above the threshold of {threshold:g}."
                        )
    return None


def _run_experiment(
    kind: Experiment,
    run: Path,
    layer: int | None,
    settings: tuple[tuple[int, ...], int, int],
    output: Path | None,
    models: ModelOptions,
    judges: JudgeOptions,
    seed: int,
    *,
    as_json: bool,
) -> None:
    """Run an experiment on a run's vectors, print its table and write experiment.json and two pictures."""
    from persona_lens.judges.scores import scorable_questions
    from persona_lens.monitoring.experiment import judged_examples, many_shot, monitoring_experiment, system_prompts

    if not run.is_dir():
        raise typer.BadParameter(f"--experiment needs the folder of a run, which has its trait; {run} is no folder")
    shots, n_questions, per_question = settings
    loaded = load_run(run, None, None)
    trait = loaded.trait
    layer = selected_layer(run, loaded.vectors) if layer is None else layer
    folder = run / f"monitoring-{kind.value}" if output is None else output
    make_judge = judges.load_judge(folder)
    model = models.load()
    judge = make_judge(lambda: loaded.likelihood_judge(model, run, seed))
    questions = scorable_questions(judge, trait, trait.evaluation_questions)[:n_questions]
    if kind is Experiment.SYSTEM_PROMPTS:
        prompts = system_prompts(trait, questions, per_question=per_question)
    else:
        examples = judged_examples(run)
        prompts = many_shot(trait, questions, examples, shots=shots, per_question=per_question, seed=seed)
    result = monitoring_experiment(
        model,
        loaded.vectors,
        trait,
        prompts,
        judge=judge,
        layer=layer,
        max_new_tokens=loaded.max_new_tokens,
        output_dir=folder,
        seed=seed,
    )
    _show_experiment(result, folder, as_json=as_json)


def _show_experiment(result: "MonitoringExperiment", folder: Path, *, as_json: bool) -> None:
    from persona_lens.plots.monitoring_experiment import plot_experiment_layers, plot_monitoring_experiment

    if as_json:
        tell_json(result.summary())
    else:
        rows = [
            [
                str(name),
                f"{row['projection']:.2f}",
                number(row["trait_score"], ".1f"),
                f"{row['scored']:.0f} of {row['responses']:.0f}",
            ]
            for name, row in result.table().to_dict("index").items()
        ]
        print_table(["condition", "projection", result.trait, "scored"], rows)
        tell(f"{result}.")
    try:
        write_page(folder / "experiment.html", plot_monitoring_experiment(result))
        write_page(folder / "layers.html", plot_experiment_layers(result))
    except ImportError as error:
        say(f"No pictures: {error}")
    say(f"Everything is in {folder}.")
