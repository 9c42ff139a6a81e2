"""Files of directions by layer, {layer: tensor [d_model]}, as `.pt` or `.safetensors`.

That is the `layer_activations` of steering-vectors' `SteeringVector`, whose layers are blocks counted from 0 to whose
outputs it adds, as here; `.safetensors` has the numbers as names. vLLM itself has no file of steering vectors: servers
built on it read control vectors (`write_control_vector`) or a dict like this one.
Knows nothing about embedding rows, which the form does not have.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

from persona_lens.interop.tensor_files import (
    PathLike,
    checked_layers,
    made_vectors,
    read_safetensors,
    read_torch_file,
    rows_by_layer,
    write_torch_file,
)
from persona_lens.models import Model
from persona_lens.records import write_whole
from persona_lens.vectors import PersonaVectors, Position

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
