"""What the formats share: files of bare tensors, checked shapes, and the vectors that are made of them.

A `.pt` file is read with `weights_only=True`, so that no code in it runs; whatever cannot be read becomes one sentence.
Knows nothing about what the rows of a format mean.
"""

import io
import os
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from persona_lens.models import Model
from persona_lens.records import write_whole
from persona_lens.vectors import PersonaVectors, Position, Provenance

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
