"""`.pt` files with one row a block, [n_layers, d_model], alone or as a folder with a `manifest.json`.

Row i is the output of block i, our layer i, as `hidden_states[1:]` has it; then the last row is taken after the model's
final norm, and that layer is marked as missing. The manifest is that of the PyPI package hidden-directions: a `model`,
and `directions` with a `name` (the file's) and a `shape` each.
"""

import json
from pathlib import Path
from typing import Any, Literal

from persona_lens.interop.reference_rows import FINAL_NORM
from persona_lens.interop.tensor_files import PathLike, checked_layers, checked_tensor, made_vectors, read_torch_file
from persona_lens.models import Model
from persona_lens.records import DAMAGE
from persona_lens.vectors import PersonaVectors, Position

LastRow = Literal["final_norm", "residual"]
MANIFEST = "manifest.json"


def read_block_rows(
    path: PathLike,
    *,
    trait: str | None = None,
    position: Position = "response_mean",
    last_row: LastRow = "final_norm",
    model: Model | None = None,
    n_layers: int | None = None,
) -> PersonaVectors:
    """Persona vectors from a `.pt` file whose row l is the output of block l, and which has no embedding row.

    `last_row` says where the last one was read: after the final norm, as in `hidden_states` (the layer is then
    missing), or in the residual stream, as by a hook. The rows are checked against `model` or `n_layers`; the trait
    defaults to the file's name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no whole file of one tensor, its rows do not fit the model, or it holds NaN.
    """
    tensor = checked_tensor(read_torch_file(path), ["n_layers", "d_model"], str(path))
    layers = checked_layers(model, n_layers, str(path))
    if tensor.shape[0] != layers:
        remedy = "read_reference_vectors reads those" if tensor.shape[0] == layers + 1 else "pass the model it is from"
        raise ValueError(
            f"{path}: one row a block is {layers} rows for a model of {layers} layers, and the file has "
            f"{tensor.shape[0]} (with an embedding row it would be {layers + 1}): {remedy}."
        )
    return made_vectors(
        tensor,
        trait=trait or Path(path).stem,
        source=str(path),
        form="one row a block .pt",
        model=model,
        position=position,
        missing={layers - 1: FINAL_NORM} if last_row == "final_norm" else {},
    )


def read_vector_folder(
    folder: PathLike,
    *,
    position: Position = "prompt_last",
    last_row: LastRow = "final_norm",
    model: Model | None = None,
    n_layers: int | None = None,
) -> dict[str, PersonaVectors]:
    """The vectors of a folder with a manifest, by their names there, in its order.

    Position and last row default to how hidden-directions makes its own. The manifest's shapes say how many layers the
    model has; `model` or `n_layers` checks that.

    Raises:
        FileNotFoundError: There is no manifest, or a file that it names is not there.
        ValueError: The manifest is damaged, a file differs from it or is not whole, or the model has other layers.
    """
    folder = Path(folder)
    found: dict[str, PersonaVectors] = {}
    for name, shape in _manifest(folder / MANIFEST):
        path = folder / f"{name}.pt"
        by_manifest = shape[0] if model is None and n_layers is None else n_layers
        vectors = read_block_rows(
            path, trait=name, position=position, last_row=last_row, model=model, n_layers=by_manifest
        )
        if [vectors.n_layers, vectors.d_model] != shape:
            raise ValueError(
                f"{path} has the shape {[vectors.n_layers, vectors.d_model]}, and its manifest says {shape}: "
                "get the folder again."
            )
        found[name] = vectors
    return found


def _manifest(path: Path) -> list[tuple[str, list[int]]]:
    """Names and shapes; a name that is no plain file name could lead out of the folder, and is refused."""
    try:
        listed: Any = json.loads(path.read_bytes())["directions"]
        entries = [(each["name"], list(map(int, each["shape"]))) for each in listed]
        fit = all(isinstance(name, str) and Path(name).name == name and len(shape) == 2 for name, shape in entries)
    except DAMAGE as error:
        raise ValueError(
            f"{path} is no manifest of vectors ({error!r}): expected directions, each with a name."
        ) from error
    if not entries or not fit or len({name for name, _ in entries}) < len(entries):
        raise ValueError(f"{path}: expected directions with a file's plain name and a shape [layer, d_model] each.")
    return entries
