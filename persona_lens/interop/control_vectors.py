"""Control vectors for llama.cpp and repeng: a GGUF file with a tensor `direction.N` [d_model] for some blocks N.

llama.cpp adds `direction.N` to the output of block N counted from 0 (measured against it), so N is our layer; it knows
no `direction.0`, and adds every direction in the file, at the scale it is given. repeng numbers them likewise.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_lens.interop.tensor_files import PathLike, checked_layers, made_vectors, rows_by_layer
from persona_lens.models.structure import Model
from persona_lens.storage.files import write_whole
from persona_lens.storage.text import missing_package, shown_name
from persona_lens.vectors.persona_vector import Position
from persona_lens.vectors.persona_vectors import PersonaVectors

ARCHITECTURE = "controlvector"
_PREFIX = "direction."


def write_control_vector(
    vectors: PersonaVectors, path: PathLike, *, layers: Sequence[int], model_hint: str | None = None
) -> None:
    """Write the directions of `layers` to a GGUF file, float32, for `llama-server --control-vector-scaled FILE SCALE`.

    All of them act together when the file is used: name the one layer to steer at, or several of
    `vectors.incremental()`. `model_hint` is the model's type in its Hugging Face config (`qwen2`), by which repeng
    tells vectors apart; it defaults to the name in the provenance. `controlvector.layer_count` is how many directions
    there are, as repeng writes it, and the trait is the file's `general.name`.

    Raises:
        ImportError: The package gguf is not installed.
        ValueError: `layers` is empty or has block 0, a missing layer or one twice, or the name does not end in `.gguf`.
        OSError: The folder is missing or cannot be written to.
    """
    path = Path(path)
    if path.suffix != ".gguf":
        raise ValueError(f"Control vectors are saved as .gguf, got {path.name!r}: change the ending of the name.")
    if 0 in layers:
        raise ValueError(
            f"{vectors.trait}: a control vector cannot steer at block 0, for which the form has no direction: "
            f"leave layer 0 out, as in layers=range(1, {vectors.n_layers})."
        )
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"{vectors.trait}: name each layer to write once, and at least one, got {list(layers)}.")
    directions = {layer: vectors.at(layer).direction.numpy() for layer in sorted(layers)}
    name = vectors.provenance.model.name if vectors.provenance else "unknown"
    gguf = _gguf()
    with tempfile.TemporaryDirectory(prefix="persona_lens-") as scratch:
        unfinished = Path(scratch) / path.name
        writer = gguf.GGUFWriter(unfinished, ARCHITECTURE)
        writer.add_string("general.name", vectors.trait)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint or shown_name(name))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        for layer, direction in directions.items():
            writer.add_tensor(f"{_PREFIX}{layer}", direction)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_whole(path, unfinished.read_bytes())


def read_control_vector(
    path: PathLike,
    *,
    trait: str | None = None,
    position: Position = "response_mean",
    model: Model | None = None,
    n_layers: int | None = None,
) -> PersonaVectors:
    """Persona vectors from a GGUF control vector; layers that it has no direction for are missing.

    `model` or `n_layers` says how many layers there are: the file's own count is that of its directions. The trait
    defaults to the file's `general.name`, or its own name.

    Raises:
        ImportError: The package gguf is not installed.
        FileNotFoundError: There is no such file.
        ValueError: It is no whole control vector, or a direction is outside the model, not of floats, or NaN.
    """
    path = Path(path)
    gguf = _gguf()
    path.open("rb").close()  # what fails from here on is the contents' fault
    try:
        reader = gguf.GGUFReader(path)
        kind, name = (_text(reader, field) for field in ("general.architecture", "general.name"))
        named = [(str(each.name), each.tensor_type.name, each.data) for each in reader.tensors]
    except Exception as error:  # bytes that someone else chose can make the reader fail in any way
        raise ValueError(f"{path} is not a whole GGUF file ({type(error).__name__}): copy it again.") from error
    if kind != ARCHITECTURE:
        raise ValueError(
            f"{path} is a GGUF file of architecture {kind!r}, and a control vector has {ARCHITECTURE!r}: "
            "pass the file of the vector, not of a model."
        )
    found = _by_layer(named, path)
    rows, missing = rows_by_layer(found, checked_layers(model, n_layers, str(path)), str(path))
    return made_vectors(
        rows,
        trait=trait or name or path.stem,
        source=str(path),
        form="GGUF control vector",
        model=model,
        position=position,
        missing=missing,
    )


def _by_layer(named: Sequence[tuple[str, str, Any]], path: Path) -> dict[int, Tensor]:
    """Directions by layer from the name, type and data of each tensor."""
    found: dict[int, Tensor] = {}
    for name, numbers, data in named:
        layer = name.removeprefix(_PREFIX)
        if not name.startswith(_PREFIX) or not layer.isascii() or not layer.isdigit() or int(layer) in (0, *found):
            raise ValueError(f"{path}: expected tensors direction.1 and so on, each once, got {name[:40]!r}.")
        if numbers not in ("F32", "F16"):
            raise ValueError(f"{path}: {name} is of {numbers}, and a direction is of F32 or F16.")
        found[int(layer)] = torch.from_numpy(data.copy())
    return found


def _text(reader: Any, name: str) -> str | None:
    field = reader.get_field(name)
    return None if field is None else str(field.contents())


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise missing_package("A control vector", "gguf", extra="interop") from error
    return gguf
