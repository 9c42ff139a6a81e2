"""The commands that finetune: an adapter trained with what suppresses a trait, and how far it moved the model."""

import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from persona_lens.cli.inputs import load_run, load_vectors, selected_layer
from persona_lens.cli.options import (
    DEFAULT_MODEL,
    JsonOption,
    ModelClass,
    ModelOptions,
    SeedOption,
    VectorsOption,
    command,
)
from persona_lens.cli.output import interval, number, print_table, records, say, tell, tell_json, write_page

if TYPE_CHECKING:
    from persona_lens.finetuning.result import Finetuning
    from persona_lens.finetuning.trainer import ProjectionPenalty
    from persona_lens.interventions.values import Intervention
    from persona_lens.traits.trait import Trait


class Prevention(NamedTuple):
    """What suppresses a trait in training; the paths are runs' folders or vectors files."""

    steer: Path | None
    coefficient: float | None
    layer: int | None
    all_layers: bool
    ablate: Path | None
    penalty: Path | None
    weight: float | None

    @property
    def vectors(self) -> Path | None:
        """The vectors that it uses."""
        return self.steer or self.ablate or self.penalty

    def check(self) -> None:
        """Bad usage where an option is given without the one it is about, or with one that it contradicts."""
        for is_given, needs, message in (
            (self.coefficient is not None, self.steer, "--coefficient goes with --steer"),
            (self.all_layers, self.steer, "--all-layers goes with --steer; --ablate and --penalty take all without it"),
            (self.weight is not None, self.penalty, "--weight goes with --penalty"),
            (self.layer is not None, self.vectors, "--layer goes with --steer, --ablate or --penalty"),
            (self.penalty, self.weight is not None, "--penalty needs a --weight"),
        ):
            if is_given and not needs:
                raise typer.BadParameter(message)
        if sum(path is not None for path in (self.steer, self.ablate, self.penalty)) > 1:
            raise typer.BadParameter("give one of --steer, --ablate and --penalty")
        if self.all_layers and self.layer is not None:
            raise typer.BadParameter("give --layer or --all-layers, not both")

    def interventions(self) -> "list[Intervention]":
        """The interventions that act in the training forwards."""
        from persona_lens.interventions.values import Ablate, Steer

        if self.ablate is not None:
            vectors = load_vectors(self.ablate)
            return [Ablate(vectors if self.layer is None else vectors.at(self.layer))]
        if self.steer is None:
            return []
        vectors = load_vectors(self.steer)
        amount = 1.0 if self.coefficient is None else self.coefficient
        if self.all_layers:
            return [Steer(vectors.incremental(), amount)]
        layer = selected_layer(self.steer, vectors) if self.layer is None else self.layer
        return [Steer(vectors.at(layer), amount)]

    def projection_penalty(self) -> "ProjectionPenalty | None":
        """The penalty on the loss."""
        from persona_lens.finetuning.trainer import ProjectionPenalty

        if self.penalty is None or self.weight is None:
            return None
        vectors = load_vectors(self.penalty)
        return ProjectionPenalty(vectors if self.layer is None else vectors.at(self.layer), self.weight)


@command
def finetune(
    data: Annotated[Path, typer.Argument(help="Chats to learn: .jsonl, .json or .parquet with messages.")],
    output: Annotated[Path, typer.Option(help="Folder of the adapter; a second call resumes it, or reads it.")],
    models: ModelOptions,
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
    weight: Annotated[float | None, typer.Option(help="Weight of --penalty in the loss.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Chats whose loss is taken after each epoch.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt of rows without one.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 32,
    target: Annotated[list[str] | None, typer.Option(help="Modules to train; repeat, or all-linear.")] = None,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Peak; a few hundred rows need about 2e-4.")] = 1e-5,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Optimizer steps up to the peak.")] = 5,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the rows.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a forward pass.")] = 2,
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes of an optimizer step.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row; longer ones are cut, and counted.")] = 2048,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps; after each epoch by default.")] = None,
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

    prevention = Prevention(steer, coefficient, layer, all_layers, ablate, penalty, weight)
    prevention.check()
    refuse_without_adapters(models.model_class)
    chats = training_chats(data)
    evaluation_chats = None if evaluation is None else training_chats(evaluation)
    during, projection_penalty = prevention.interventions(), prevention.projection_penalty()
    prompts = None if preventative_prompts is None else load_trait(preventative_prompts)
    ensure_writable(output / "finetuning.json")
    result = train(
        models.load(),
        chats,
        during=during,
        preventative_prompts=prompts,
        penalty=projection_penalty,
        system_prompt=system,
        evaluation=evaluation_chats,
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
    _show_finetuning(result, output, as_json=as_json)
    if (steps := max(row["step"] for row in result.losses)) <= warmup_steps:
        say(
            f"The learning rate never reached its peak: of {warmup_steps} warm-up steps there were {steps:.0f}, the "
            "first of them at 0. Lower --warmup-steps or --accumulation, or raise --epochs."
        )
    _draw_losses(result, output)
    run = "RUN" if prevention.vectors is None else str(prevention.vectors)
    same_model = [] if models.model == DEFAULT_MODEL else ["--model", models.model]
    next_command = shlex.join(["persona-lens", "shift", str(output), "--vectors", run, *same_model])
    say(f"The adapter is in {output}. How far it moved the model: {next_command}")


def refuse_without_adapters(model_class: ModelClass) -> None:
    """Refuse, before a model is loaded, a model class or an environment without adapters."""
    if model_class is not ModelClass.BRIDGE:
        raise ValueError(f"An adapter needs a TransformerBridge, got --model-class {model_class.value}: omit it.")
    if find_spec("peft") is None:
        from persona_lens.storage.text import missing_package

        raise missing_package("An adapter", "peft", extra="finetune")


def _show_finetuning(result: "Finetuning", output: Path, *, as_json: bool) -> None:
    evaluation_losses = [row["eval_loss"] for row in result.losses if "eval_loss" in row]
    if as_json:
        shown = {
            "adapter": str(output),
            "rows": result.rows,
            "loss": result.loss,
            "evaluation_loss": evaluation_losses[-1] if evaluation_losses else None,
            "losses": list(result.losses),
            "settings": result.settings,
            "seconds": result.seconds,
        }
        tell_json(shown)
        return
    penalty = f", {result.settings['penalty'][0]}" if result.settings["penalty"] else ""
    tell(f"{result}{penalty}.")
    cut, dropped = result.rows["cut"], result.rows["dropped"]
    tell(f"{cut} rows were cut to the length limit; {dropped} were dropped, because their prompts fill it.")
    if evaluation_losses:
        tell(f"Evaluation loss after each epoch: {', '.join(f'{loss:.2f}' for loss in evaluation_losses)}.")


def _draw_losses(result: "Finetuning", output: Path) -> None:
    from persona_lens.plots.finetuning import LossCurves, plot_losses

    train, evaluation = (
        {int(row["step"]): row[name] for row in result.losses if name in row} for name in ("loss", "eval_loss")
    )
    try:
        write_page(output / "loss.html", plot_losses([LossCurves(output.name, train, evaluation or None)]))
    except ImportError as error:
        say(f"No picture: {error}")


@command
def shift(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, of `finetune` or of PEFT.")],
    vectors: VectorsOption,
    models: ModelOptions,
    trait: Annotated[
        str | None, typer.Option(help="Bundled trait or JSON whose evaluation questions are asked; the run's own.")
    ] = None,
    questions: Annotated[Path | None, typer.Option(help="Ask these instead: a text file, one a line.")] = None,
    layer: Annotated[int | None, typer.Option(help="Counted from 0; all by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write everything, as .json.")] = None,
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
    refuse_without_adapters(models.model_class)
    Adapter.load(adapter)
    loaded = [load_vectors(path) for path in vectors]
    directions = loaded if layer is None else [one.at(layer) for one in loaded]
    prompts = _prompts(vectors[0], trait, questions)
    if output is not None:
        if output.suffix != ".json":
            raise typer.BadParameter(f"--output must end in .json, got {output}")
        ensure_writable(output)
    result = finetuning_shift(models.load(), adapter, prompts, directions, output=output, seed=seed)
    if as_json:
        tell_json(result.summary())
        return
    rows = [
        [
            row["trait"],
            str(row["layer"]),
            interval(row["shift"], row["low"], row["high"], ".3g"),
            number(row["relative"], ".3g"),
            number(row["random_spread"], ".3g"),
        ]
        for row in records(result.table())
    ]
    print_table(["trait", "layer", "shift [95 %]", "shift / residual norm", "along random directions, ±"], rows)
    tell(f"Mean over {len(result.questions)} prompts; along random directions the mean is 0, with the spread shown.")


def _prompts(run: Path, trait: str | None, questions: Path | None) -> "Trait | list[str]":
    """The questions of a file, of a trait, or of the run's own trait."""
    if questions is None:
        return load_run(run, trait, None).trait
    lines = [line.strip() for line in questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{questions} has no questions: write one a line.")
    return lines
