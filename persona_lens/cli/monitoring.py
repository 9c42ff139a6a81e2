"""The command that monitors: chats projected on persona vectors turn by turn, or the paper's experiments with them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli.experiments import Design, Experiment, run_experiment
from persona_lens.cli.inputs import ModelClass, load, load_vectors, selected_layer
from persona_lens.cli.options import (
    DEFAULT_MODEL,
    AliasOption,
    ClassOption,
    JsonOption,
    JudgeOption,
    ModelOption,
    SeedOption,
    ThreadsOption,
    app,
)
from persona_lens.cli.output import print_table, say, tell, tell_json

if TYPE_CHECKING:
    from persona_lens.monitoring.result import Monitoring
    from persona_lens.vectors.persona_vector import PersonaVector

PASSED = 3
"""The exit code where a projection passes the threshold that the user set."""


@app.command()
def monitor(
    vectors: Annotated[list[Path], typer.Option(help="A run's folder, or a vectors file; repeat for several.")],
    chats: Annotated[Path | None, typer.Argument(help="Chats: .jsonl, .json or .parquet with messages.")] = None,
    layer: Annotated[int | None, typer.Option(help="Counted from 0; by default the one that was selected.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Every token, in --output and --json.")] = False,
    window: Annotated[int | None, typer.Option(min=2, help="Read at most so many tokens, the newest messages.")] = None,
    after: Annotated[str | None, typer.Option(help="Average a response only after this, such as </think>.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write a .jsonl or .parquet file; of --experiment, a folder.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the turns as .html; with --tokens, the first chat's.")
    ] = None,
    fail_above: Annotated[float | None, typer.Option(help="Exit with 3 if a projection is greater than this.")] = None,
    calibrate: Annotated[
        float | None, typer.Option(help="The chats are benign: keep this percentile beside the vectors as a threshold.")
    ] = None,
    experiment: Annotated[
        Experiment | None, typer.Option(help="Instead of chats: does the prompt's projection predict the trait?")
    ] = None,
    shots: Annotated[list[int] | None, typer.Option(help="Examples of many-shot; repeat. 0, 5, 10, 15, 20.")] = None,
    n_questions: Annotated[int, typer.Option(min=2, help="Questions of an experiment.")] = 20,
    per_question: Annotated[int, typer.Option(min=1, help="Answers to each question of an experiment.")] = 10,
    judge: JudgeOption = "likelihood",
    alias: AliasOption = None,
    seed: SeedOption = 0,
    model: ModelOption = DEFAULT_MODEL,
    model_class: ClassOption = ModelClass.BRIDGE,
    threads: ThreadsOption = None,
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
        counts = (tuple(shots or (0, 5, 10, 15, 20)), n_questions, per_question)
        design = Design(experiment, layer, *counts, judge, seed, tuple(alias or ()))
        if len(vectors) > 1:
            raise typer.BadParameter("an --experiment is about the --vectors of one run")
        run_experiment(design, vectors[0], output, lambda: load(model, model_class, threads), as_json=as_json)
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
    chosen = [_vector(path, layer) for path in vectors]
    found = project(
        load(model, model_class, threads),
        read,
        chosen,
        tokens=tokens,
        window=window,
        after=after,
        output=output,
    )
    if as_json:
        tell_json(found.to_dict())
    else:
        _show(found)
    if calibrate is not None:
        _calibrate(found, chosen, vectors, calibrate, chats)
    if picture is not None:
        _draw(found, picture, tokens=tokens)
    if read.rejected:
        say(f"{chats}: {read.in_words} Rows that could not be read are left out; --json and --output list them.")
    passed = None if fail_above is None else _first_above(found, fail_above)
    if passed is not None:
        say(f"persona-lens: {passed}")
        raise typer.Exit(PASSED)


def _calibrate(
    found: "Monitoring", chosen: "Sequence[PersonaVector]", paths: list[Path], percentile: float, chats: Path
) -> None:
    """Keep the percentile of the benign chats' response means as each vector's threshold, beside the vector."""
    from persona_lens.monitoring.thresholds import calibrate_threshold, save_thresholds

    for place, (vector, path) in enumerate(zip(chosen, paths, strict=True)):
        rows = [(chat.name, turn.response[place]) for chat in found.chats for turn in chat.turns if turn.response]
        threshold = calibrate_threshold(
            [value for _, value in rows],
            vector=vector,
            percentile=percentile,
            chats=[name for name, _ in rows],
            source=chats.name,
        )
        say(f"{vector.trait}@{vector.layer}: threshold {threshold.value:.3f} in {save_thresholds(path, [threshold])}.")


def _draw(found: "Monitoring", path: Path, *, tokens: bool) -> None:
    from persona_lens.pages.tokens import monitoring_html
    from persona_lens.plots.monitoring import plot_turns
    from persona_lens.storage.files import write_whole

    page = monitoring_html(found) if tokens else plot_turns(found, vector=None).to_html(include_plotlyjs=True)
    write_whole(path, page.encode())
    say(f"The picture is in {path}.")


def _vector(path: Path, layer: int | None) -> "PersonaVector":
    given = load_vectors(path)
    return given.at(selected_layer(path, given) if layer is None else layer)


def _show(found: "Monitoring") -> None:
    """Print a row a turn; what was dropped and what could not be averaged is said below."""
    shown = found.table().drop(columns=["message", "n_tokens", "dropped_messages"])
    rows = [[_cell(value) for value in row] for row in shown.itertuples(index=False)]
    print_table(list(shown.columns), rows)
    shortened = [turn for chat in found.chats for turn in chat.turns if turn.dropped_messages]
    if shortened:
        most = max(turn.dropped_messages for turn in shortened)
        tell(f"{len(shortened)} turns were read without their oldest messages, up to {most} of them (--window).")
    if found.unclosed:
        tell(f"{found.unclosed} responses never say {found.after!r}, and so have no response projection.")


def _cell(value: str | int | float) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3f}"


def _first_above(found: "Monitoring", threshold: float) -> str | None:
    """One sentence about the first turn whose projection is above a threshold; None where there is none."""
    for chat in found.chats:
        for number, turn in enumerate(chat.turns, start=1):
            for when, values in (("prompt", turn.prompt), ("response", turn.response or ())):
                for vector, value in zip(found.vectors, values, strict=False):
                    if value > threshold:
                        return (
                            f"{chat.name}, turn {number}: the {when} projection on {vector.name} is {value:.3f}, "
                            f"above the threshold of {threshold:g}."
                        )
    return None
