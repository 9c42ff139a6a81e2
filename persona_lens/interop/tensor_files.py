"""Files of bare tensors by layer: the paper's reference code, dicts by layer, and one row a block.

A `.pt` file is read with `weights_only=True`, so that no code in it runs.

*The paper's reference code* saves one tensor [n_layers + 1, d_model] for a trait and a position. Its rows are
differences of Hugging Face's `hidden_states`: row 0 is the input of block 0, row i + 1 the output of block i, our layer
i (the paper's layer i + 1). But the last row is taken after the model's final norm, which is not the residual stream of
our last layer: that layer is marked as missing here, and the row is NaN in what we write.

*Dicts by layer*, {layer: tensor [d_model]}, are the `layer_activations` of steering-vectors' `SteeringVector`: blocks
counted from 0 to whose outputs it adds, as here. In `.safetensors` the numbers are names. They have no embedding row.
vLLM has no file of steering vectors: servers built on it read control vectors (`write_control_vector`) or such a dict.

*One row a block*, [n_layers, d_model], alone or as a folder with a `manifest.json` as the PyPI package
hidden-directions has it: a `model`, and `directions` with a `name` (the file's) and a `shape` each. Row i is the output
of block i, our layer i; if the last row is taken after the final norm, that layer is marked as missing.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from einops import pack
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from persona_lens.models.structure import Model
from persona_lens.storage.files import DAMAGE, write_whole
from persona_lens.vectors.persona_vector import Position
from persona_lens.vectors.persona_vectors import PersonaVectors
from persona_lens.vectors.provenance import Provenance

PathLike = str | os.PathLike[str]


def read_torch_file(path: PathLike) -> Any:
    """The tensors of a `.pt` file, alone, in a list or in a dict.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It is cut short, is no torch file, or holds objects of other classes.
    """
    contents = io.BytesIO(Path(path).read_bytes())  # what fails from here on is the contents' fault
    try:
        return torch.load(contents, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that someone else chose can make the reader fail in any way
        raise ValueError(
            f"{path} is not a whole .pt file of plain tensors ({type(error).__name__}): copy it again, or save "
            "a tensor or a dict of tensors by layer with torch.save; objects of other classes could run code."
        ) from error


def write_torch_file(path: PathLike, value: Any) -> None:
    """Write a `.pt` file whole or not at all. Raises ValueError where the name has another ending."""
    path = Path(path)
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"This format is saved as .pt, got {path.name!r}: change the ending of the name.")
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_whole(path, buffer.getvalue())


def read_safetensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a `.safetensors` file; raises ValueError where it is cut short or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy it or save it again.") from error


def checked_tensor(value: Any, axes: Sequence[str], source: str) -> Tensor:
    """A floating-point tensor with so many axes, as float32 on the CPU, or a ValueError that begins with `source`."""
    shape = ", ".join(axes)
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
        got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__}"
        raise ValueError(f"{source}: expected a floating-point tensor [{shape}], got {got}.")
    if value.ndim != len(axes) or value.numel() == 0:
        raise ValueError(f"{source}: expected a tensor [{shape}], got the shape {list(value.shape)}.")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        # A few bytes that claim to be a terabyte would fill the memory as they are copied.
        raise ValueError(f"{source}: the tensor {list(value.shape)} repeats its numbers: save it with .contiguous().")
    return value.detach().float()


def checked_layers(model: Model | None, n_layers: int | None, source: str) -> int:
    """How many blocks the model has, from whichever is given; raises ValueError where neither is, or they differ."""
    if model is None and n_layers is None:
        raise ValueError(f"{source} does not say how many layers its model has: pass n_layers or model.")
    found = int(model.cfg.n_layers) if model is not None else n_layers
    if n_layers not in (None, found) or not found or found < 1:
        raise ValueError(
            f"{source}: n_layers is {n_layers}, and the model has {found} layers: leave one of the two out."
        )
    return found


def made_vectors(
    directions: Float[Tensor, "layer d_model"],
    *,
    trait: str,
    source: str,
    form: str,
    model: Model | None,
    position: Position = "response_mean",
    embedding: Float[Tensor, " d_model"] | None = None,
    missing: Mapping[int, str] | None = None,
) -> PersonaVectors:
    """Persona vectors that remember the model, where one is given, and the file that they are from."""
    if model is not None and directions.shape[1] != int(model.cfg.d_model):
        raise ValueError(
            f"{source}: the directions are {directions.shape[1]} wide and the model is {int(model.cfg.d_model)}: "
            "pass the model that they came from."
        )
    settings = {"source": form, "file": Path(source).name}
    try:
        return PersonaVectors(
            trait,
            directions,
            torch.full(directions.shape[:1], nan, dtype=torch.float32),
            position=position,
            embedding=embedding,
            provenance=None if model is None else Provenance.of(model, settings=settings),
            missing=missing or {},
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def rows_by_layer(
    found: Mapping[int, Any], n_layers: int, source: str
) -> tuple[Float[Tensor, "layer d_model"], dict[int, str]]:
    """All directions that a file names by layer, and why the other layers have none.

    Raises:
        ValueError: There is none, one is no direction or belongs to no layer, or their widths differ.
    """
    if not found:
        raise ValueError(f"{source} holds no direction: expected one tensor [d_model] for each of some layers.")
    rows: Tensor | None = None
    for layer, value in found.items():
        if not 0 <= layer < n_layers:
            raise ValueError(
                f"{source} has a direction for layer {layer}, and the model has layers 0 to {n_layers - 1}: "
                "pass the n_layers of the model that it was made for."
            )
        row = checked_tensor(value, ["d_model"], f"{source}, layer {layer}")
        rows = torch.zeros(n_layers, len(row), dtype=torch.float32) if rows is None else rows
        if len(row) != rows.shape[1]:
            raise ValueError(f"{source}: directions of {rows.shape[1]} and {len(row)} numbers are of no one model.")
        rows[layer] = row
    assert rows is not None  # there is at least one
    absent = [layer for layer in range(n_layers) if layer not in found]
    return rows, dict.fromkeys(absent, "the file has none for it")


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


BLOCK_OUTPUT = "decoder_block"


def read_layer_dict(
    path: PathLike,
    *,
    trait: str | None = None,
    position: Position = "response_mean",
    model: Model | None = None,
    n_layers: int | None = None,
) -> PersonaVectors:
    """Persona vectors from a dict of directions by layer; layers that it does not have are missing.

    A `.pt` file holds the dict alone, or a `SteeringVector` as a dict (`dataclasses.asdict`). `model` or `n_layers`
    says how many layers there are; the trait defaults to what the file says, or its name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no whole file of tensors by layer, or one of them is outside the model, damaged or NaN.
    """
    path = Path(path)
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        content, metadata = read_safetensors(path)
    else:
        content = read_torch_file(path)
    by_layer = _by_layer(content, metadata.get("layer_type"), path)
    rows, missing = rows_by_layer(by_layer, checked_layers(model, n_layers, str(path)), str(path))
    return made_vectors(
        rows,
        trait=trait or metadata.get("trait") or path.stem,
        source=str(path),
        form="directions by layer",
        model=model,
        position=position,
        missing=missing,
    )


def write_layer_dict(vectors: PersonaVectors, path: PathLike, *, layers: Sequence[int] | None = None) -> None:
    """Write directions by layer, of all layers that there are or of `layers`, for steering-vectors and others.

    `SteeringVector(layer_activations=torch.load(path), layer_type="decoder_block")` takes the `.pt` file.
    Embedding row, norms, statistics and provenance stay behind.

    Raises:
        ValueError: A layer is missing or outside the model, or the name ends in neither `.pt` nor `.safetensors`.
        OSError: The folder is missing or cannot be written to.
    """
    path = Path(path)
    found = {layer: vectors.at(layer).direction for layer in (vectors.known_layers if layers is None else layers)}
    if not found:
        raise ValueError(f"{vectors.trait}: there is no layer to write: name at least one.")
    if path.suffix != ".safetensors":
        write_torch_file(path, found)
        return
    metadata = {"trait": vectors.trait, "layer_type": BLOCK_OUTPUT}
    tensors = {str(layer): direction for layer, direction in found.items()}
    write_whole(path, safetensors.torch.save(tensors, metadata=metadata))


def _by_layer(content: Any, kind: str | None, path: Path) -> dict[int, Any]:
    if isinstance(content, dict) and "layer_activations" in content:
        content, kind = content["layer_activations"], content.get("layer_type", BLOCK_OUTPUT)
    if kind not in (None, BLOCK_OUTPUT):
        raise ValueError(
            f"{path} has directions for {kind!r}, and persona vectors belong to the output of a block: "
            f"read one of layer type {BLOCK_OUTPUT!r}."
        )
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors by layer, got {type(content).__name__}.")
    found: dict[int, Any] = {}
    for key, value in content.items():
        number = key if isinstance(key, int) and not isinstance(key, bool) else None
        if isinstance(key, str) and key.isascii() and key.isdigit():
            number = int(key)
        if number is None or number in found:
            raise ValueError(f"{path}: expected a number of a layer as each key, once, got {str(key)[:40]!r}.")
        found[number] = value
    return found


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
