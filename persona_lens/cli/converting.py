"""The command that converts vectors between the formats of other tools and ours."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from persona_lens.cli.inputs import ModelClass, checked_position, load
from persona_lens.cli.options import ClassOption, app
from persona_lens.cli.output import say


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


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="File, run's folder, or folder with a manifest.json.")
    ],
    output: Annotated[Path, typer.Option(help="File to write: .safetensors (ours), .pt or .gguf.")],
    format: Annotated[OutputFormat | None, typer.Option(help="By default, that of the output's ending.")] = None,
    n_layers: Annotated[int | None, typer.Option(min=1, help="How many layers the model has.")] = None,
    model: Annotated[str | None, typer.Option(help="The model instead; the vectors then remember it.")] = None,
    trait: Annotated[str | None, typer.Option(help="The trait's name, or which one of a folder's.")] = None,
    layer: Annotated[list[int] | None, typer.Option(min=0, help="Repeatable: only these, from 0.")] = None,
    position: Annotated[str | None, typer.Option(help="response_mean, prompt_mean or prompt_last.")] = None,
    last_row: Annotated[LastRow, typer.Option(help="Where a .pt's last row was read.")] = LastRow.FINAL_NORM,
    model_class: ClassOption = ModelClass.BRIDGE,
) -> None:
    """Convert vectors: the reference's .pt, one row a block, a dict by layer, GGUF control vectors, and our own.

    Example: persona-lens convert runs/demo --layer 15 --output optimistic.gguf
    """
    from persona_lens.interop.conversion import read_vectors, write_vectors
    from persona_lens.storage.files import ensure_writable

    ensure_writable(output)
    vectors = read_vectors(
        source,
        trait=trait,
        position=None if position is None else checked_position(position),
        last_row=cast(Any, last_row.value),
        model=None if model is None else load(model, model_class, threads=None),
        n_layers=n_layers,
    )
    write_vectors(vectors, output, format=cast(Any, format and format.value), layers=layer)
    say(f"{vectors!r} is in {output}.")
    if len(vectors.missing) <= 3:  # of a control vector it would be nearly all
        for number, reason in vectors.missing.items():
            say(f"Layer {number} is missing: {reason}.")
