"""The `.pt` files of the paper's reference code: one tensor [n_layers + 1, d_model] for a trait and a position.

Its rows are differences of Hugging Face's `hidden_states`: row 0 where the stream enters block 0, row i + 1 the output
of block i, our layer i (the paper's layer i + 1). But the last row is taken after the model's final norm, which is not
the residual stream of our last layer: that layer is marked as missing here, and the row is NaN in what we write.
Knows nothing about the reference's CSV files, which `read_reference_csv` reads.
"""

from math import nan
from pathlib import Path

import torch
from einops import pack

from persona_lens.interop.tensor_files import (
    PathLike,
    checked_layers,
    checked_tensor,
    made_vectors,
    read_torch_file,
    write_torch_file,
)
from persona_lens.models import Model
from persona_lens.vectors import PersonaVectors, Position

FINAL_NORM = "the file's last row is taken after the final norm, and so is not of the residual stream"
# What the reference code appends to a trait's name.
_ENDINGS: dict[str, Position] = {
    "_response_avg_diff": "response_mean",
    "_prompt_avg_diff": "prompt_mean",
    "_prompt_last_diff": "prompt_last",
}


def read_reference_vectors(
    path: PathLike,
    *,
    trait: str | None = None,
    position: Position | None = None,
    model: Model | None = None,
    n_layers: int | None = None,
) -> PersonaVectors:
    """Persona vectors from a `.pt` file of the paper's reference code.

    The rows are checked against the number of layers, which `model` or `n_layers` gives; with `model` the vectors
    remember whose they are. Trait and position default to what the file's name says (`evil_response_avg_diff.pt`). The
    last layer is missing (see above): steer and project at any other, or extract it on the model. Row 0 becomes the
    embedding row, or None where it is NaN.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no whole file of one tensor, its rows do not fit the model, or it holds NaN elsewhere.
    """
    tensor = checked_tensor(read_torch_file(path), ["n_layers + 1", "d_model"], str(path))
    layers = checked_layers(model, n_layers, str(path))
    if tensor.shape[0] != layers + 1:
        remedy = "read_block_rows reads one row a block" if tensor.shape[0] == layers else "pass the model it is from"
        raise ValueError(
            f"{path}: a model of {layers} layers has {layers + 1} rows in the reference's form, the first of them the "
            f"embeddings, and the file has {tensor.shape[0]}: {remedy}."
        )
    named, where = _from_name(Path(path).stem)
    return made_vectors(
        tensor[1:],
        trait=trait or named,
        source=str(path),
        form="reference .pt",
        model=model,
        position=position or where,
        embedding=None if tensor[0].isnan().all() else tensor[0],
        missing={layers - 1: FINAL_NORM},
    )


def write_reference_vectors(vectors: PersonaVectors, path: PathLike) -> None:
    """Write the `.pt` file that the reference code loads, float32 [n_layers + 1, d_model].

    Row l + 1 is our layer l. The last row is NaN, since the reference takes its own after the final norm, which cannot
    be had from ours; so is row 0 where the vectors have no embedding row. Reading it gives back every other row to the
    bit. Statistics, norms and provenance stay behind.

    Raises:
        ValueError: The vectors are increments, lack a layer before the last, or the name does not end in `.pt`.
        OSError: The folder is missing or cannot be written to.
    """
    lacking = [layer for layer in vectors.missing if layer < vectors.n_layers - 1]
    if lacking or vectors.increments:
        fact = f"layers {lacking} are missing" if lacking else "these are increments from layer to layer"
        raise ValueError(
            f"{vectors.trait}: the reference's form has a direction in every row, and {fact}: write_layer_dict writes "
            "the layers that there are."
        )
    unknown = torch.full((vectors.d_model,), nan, dtype=torch.float32)
    first = unknown if vectors.embedding is None else vectors.embedding
    rows, _ = pack([first, vectors.directions[:-1], unknown], "* d_model")
    write_torch_file(path, rows)


def _from_name(stem: str) -> tuple[str, Position]:
    for ending, position in _ENDINGS.items():
        if stem.endswith(ending):
            return stem.removesuffix(ending), position
    return stem, "response_mean"
