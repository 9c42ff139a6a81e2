"""The commands that finetune: an adapter trained with what holds a trait down, and how far it moved the model."""

import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from persona_lens.cli.inputs import ModelClass, load, load_run, load_vectors, selected_layer
from persona_lens.cli.options import (
    DEFAULT_MODEL,
    ClassOption,
    JsonOption,
    ModelOption,
    SeedOption,
    ThreadsOption,
    app,
)
from persona_lens.cli.output import print_table, records, say, tell, tell_json

if TYPE_CHECKING:
    from persona_lens.finetuning.result import Finetuning
    from persona_lens.finetuning.shift import FinetuningShift
    from persona_lens.finetuning.trainer import ProjectionPenalty
    from persona_lens.interventions.values import Intervention
    from persona_lens.traits.trait import Trait


class Held(NamedTuple):
    """What holds a trait down in training; the paths are runs' folders or vectors files."""

    steer: Path | None
    coefficient: float | None
    layer: int | None
    all_layers: bool
    ablate: Path | None
    penalty: Path | None
    weight: float | None

    @property
    def vectors(self) -> Path | None:
        """The vectors of the first of them that is there."""
        return self.steer or self.ablate or self.penalty


@app.command()
def finetune(
    data: Annotated[Path, typer.Argument(help="Chats to learn: .jsonl, .json or .parquet with messages.")],
    output: Annotated[Path, typer.Option(help="Folder of the adapter; a second call resumes it, or reads it.")],
    steer: Annotated[Path | None, typer.Option(help="Preventative steering by a run's vectors, or a file's.")] = None,
    coefficient: Annotated[float | None, typer.Option(help="What --steer multiplies them by; 1 by default.")] = None,
    layer: Annotated[
        int | None,
        typer.Option(help="Counted from 0. --steer: the selected one by default; --ablate, --penalty: all."),
    ] = None,
    all_layers: Annotated[bool, typer.Option("--all-layers", help="--steer at all layers, by increments.")] = False,
    ablate: Annotated[Path | None, typer.Option(help="CAFT: ablate a run's vectors, or a file's.")] = None,
    preventative_prompts: Annotated[
        str | None, typer.Option(help="Trait whose positive instructions are put before rows, at random.")
    ] = None,
    penalty: Annotated[Path | None, typer.Option(help="Penalise change along a run's vectors, or a file's.")] = None,
    weight: Annotated[float | None, typer.Option(help="Of --penalty, in the loss.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Chats whose loss is taken after each epoch.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt of rows without one.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 32,
    target: Annotated[list[str] | None, typer.Option(help="Modules to train; repeat, or all-linear.")] = None,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Peak; a few hundred rows need about 2e-4.")] = 1e-5,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Optimizer steps up to the peak.")] = 5,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the rows.")] = 1.0,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch-rows", min=1, help="Rows of a forward pass.")] = 2,
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes of an optimizer step.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row; longer ones are cut, and counted.")] = 2048,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Spend time instead of memory.")
    ] = False,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps; after each epoch by default.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    model_class: ClassOption = ModelClass.BRIDGE,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA adapter on chats; --steer, --ablate, --preventative-prompts and --penalty act in training alone.

    Example: persona-lens finetune chats.jsonl --output runs/ft --steer runs/demo --layer 19 --learning-rate 2e-4
    """
    from persona_lens.finetuning.dataset import training_chats
    from persona_lens.finetuning.finetune import TARGETS
    from persona_lens.finetuning.finetune import finetune as train
    from persona_lens.storage.files import ensure_writable
    from persona_lens.traits.trait import load_trait

    held = Held(steer, coefficient, layer, all_layers, ablate, penalty, weight)
    _refuse_meaningless(held)
    refuse_without_adapters(model_class)
    chats = training_chats(data)
    asked = None if evaluation is None else training_chats(evaluation)
    during, penalised = _during(held), _penalty(held)
    prompts = None if preventative_prompts is None else load_trait(preventative_prompts)
    ensure_writable(output / "finetuning.json")
    found = train(
        load(model, model_class, threads),
        chats,
        during=during,
        preventative_prompts=prompts,
        penalty=penalised,
        system_prompt=system,
        evaluation=asked,
        output=output,
        rank=rank,
        targets="all-linear" if target == ["all-linear"] else target or TARGETS,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulation,
        max_length=max_length,
        gradient_checkpointing=gradient_checkpointing,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    _show_finetuning(found, output, as_json=as_json)
    if (steps := max(row["step"] for row in found.losses)) <= warmup_steps:
        say(
            f"The learning rate never reached its peak: of {warmup_steps} warm-up steps there were {steps:.0f}, the "
            "first of them at 0. Lower --warmup-steps or --accumulation, or raise --epochs."
        )
    _draw_losses(found, output)
    _say_next(output, held.vectors, model)


def refuse_without_adapters(model_class: ModelClass) -> None:
    """Refuse, before a model is loaded, what no adapter can be put on or trained with."""
    from persona_lens.models.adapters import INSTALL_COMMAND

    if model_class is not ModelClass.BRIDGE:
        raise ValueError(
            f"An adapter needs a TransformerBridge, got --model-class {model_class.value}: leave that option out."
        )
    if find_spec("peft") is None:
        raise ImportError(f"Adapters need the package peft. Run: {INSTALL_COMMAND}")


def _refuse_meaningless(held: Held) -> None:
    """Bad usage where an option is given without the one that it is about, or with one that it contradicts."""
    for given, needs, what in (
        (held.coefficient is not None, held.steer, "--coefficient goes with --steer"),
        (held.all_layers, held.steer, "--all-layers goes with --steer; --ablate and --penalty take all without it"),
        (held.weight is not None, held.penalty, "--weight goes with --penalty"),
        (held.layer is not None, held.vectors, "--layer goes with --steer, --ablate or --penalty"),
        (held.penalty, held.weight is not None, "--penalty needs a --weight"),
    ):
        if given and not needs:
            raise typer.BadParameter(what)
    if sum(each is not None for each in (held.steer, held.ablate, held.penalty)) > 1:
        raise typer.BadParameter("give one of --steer, --ablate and --penalty")
    if held.all_layers and held.layer is not None:
        raise typer.BadParameter("give --layer or --all-layers, not both")


def _during(held: Held) -> "list[Intervention]":
    from persona_lens.interventions.values import Ablate, Steer

    if held.ablate is not None:
        vectors = load_vectors(held.ablate)
        return [Ablate(vectors if held.layer is None else vectors.at(held.layer))]
    if held.steer is None:
        return []
    vectors = load_vectors(held.steer)
    amount = 1.0 if held.coefficient is None else held.coefficient
    if held.all_layers:
        return [Steer(vectors.incremental(), amount)]
    return [Steer(vectors.at(selected_layer(held.steer, vectors) if held.layer is None else held.layer), amount)]


def _penalty(held: Held) -> "ProjectionPenalty | None":
    from persona_lens.finetuning.trainer import ProjectionPenalty

    if held.penalty is None or held.weight is None:
        return None
    vectors = load_vectors(held.penalty)
    return ProjectionPenalty(vectors if held.layer is None else vectors.at(held.layer), held.weight)


def _show_finetuning(found: "Finetuning", output: Path, *, as_json: bool) -> None:
    asked = [row["eval_loss"] for row in found.losses if "eval_loss" in row]
    if as_json:
        shown = {
            "adapter": str(output),
            "rows": found.rows,
            "loss": found.loss,
            "evaluation_loss": asked[-1] if asked else None,
            "losses": list(found.losses),
            "settings": found.settings,
            "seconds": found.seconds,
        }
        tell_json(shown)
        return
    penalised = f", {found.settings['penalty'][0]}" if found.settings["penalty"] else ""
    tell(f"{found}{penalised}.")
    cut, dropped = found.rows["cut"], found.rows["dropped"]
    tell(f"{cut} rows were cut to the length limit, {dropped} dropped, whose prompts fill it.")
    if asked:
        tell(f"Evaluation loss after each epoch: {', '.join(f'{loss:.2f}' for loss in asked)}.")


def _draw_losses(found: "Finetuning", output: Path) -> None:
    from persona_lens.plots.finetuning import LossCurves, plot_losses
    from persona_lens.storage.files import write_whole

    train, asked = (
        {int(row["step"]): row[name] for row in found.losses if name in row} for name in ("loss", "eval_loss")
    )
    try:
        page = plot_losses([LossCurves(output.name, train, asked or None)]).to_html(include_plotlyjs=True)
    except ImportError as error:
        say(f"No picture: {error}")
        return
    write_whole(output / "loss.html", page.encode())


def _say_next(output: Path, vectors: Path | None, model: str) -> None:
    run = "RUN" if vectors is None else str(vectors)
    same = [] if model == DEFAULT_MODEL else ["--model", model]
    line = shlex.join(["persona-lens", "shift", str(output), "--vectors", run, *same])
    say(f"The adapter is in {output}. What it moved: {line}")


@app.command()
def shift(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, of `finetune` or of PEFT.")],
    vectors: Annotated[list[Path], typer.Option(help="A run's folder, or a vectors file; repeat for several.")],
    trait: Annotated[
        str | None, typer.Option(help="Bundled trait or JSON whose evaluation questions are asked; the run's own.")
    ] = None,
    questions: Annotated[Path | None, typer.Option(help="Ask these instead: a text file, one a line.")] = None,
    layer: Annotated[int | None, typer.Option(help="Counted from 0; all by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write everything, as .json.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    model_class: ClassOption = ModelClass.BRIDGE,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """How far finetuning moved the last prompt token along persona vectors, by layer.

    Example: persona-lens shift runs/ft --vectors runs/demo --output runs/ft/shift.json
    """
    from persona_lens.finetuning.shift import finetuning_shift
    from persona_lens.models.adapters import Adapter
    from persona_lens.storage.files import ensure_writable

    if trait is not None and questions is not None:
        raise typer.BadParameter("give --trait or --questions, not both")
    refuse_without_adapters(model_class)
    Adapter.load(adapter)
    given = [load_vectors(path) for path in vectors]
    chosen = given if layer is None else [each.at(layer) for each in given]
    prompts = _prompts(vectors[0], trait, questions)
    if output is not None:
        if output.suffix != ".json":
            raise typer.BadParameter(f"--output must end in .json, got {output}")
        ensure_writable(output)
    ready = load(model, model_class, threads)
    found = finetuning_shift(ready, adapter, prompts, chosen, output=output, seed=seed)
    if as_json:
        tell_json(found.summary())
    else:
        _show_shift(found)


def _prompts(run: Path, trait: str | None, questions: Path | None) -> "Trait | list[str]":
    """The questions of a file, of a trait, or of the run's own trait."""
    if questions is None:
        return load_run(run, trait, None).trait
    lines = [line.strip() for line in questions.read_text(encoding="utf-8").splitlines()]
    asked = [line for line in lines if line]
    if not asked:
        raise ValueError(f"{questions} has no questions: write one a line.")
    return asked


def _show_shift(found: "FinetuningShift") -> None:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    rows = []
    for row in records(found.table()):
        interval = "" if row["low"] is None else f" [{number(row['low'])}, {number(row['high'])}]"
        cells = (number(row[name]) for name in ("relative", "random_spread"))
        rows.append([row["trait"], str(row["layer"]), f"{number(row['shift'])}{interval}", *cells])
    print_table(["trait", "layer", "shift [95 %]", "shift / residual norm", "along random directions, ±"], rows)
    tell(
        f"Mean over {len(found.questions)} prompts; a random direction's shift has mean 0 and the spread on the right."
    )
