"""The vector file: one safetensors file, whose tensors are the vectors' and whose metadata is a JSON header.

The header has a format version and all that is no tensor; a file is written whole or not at all, and never pickled.
Knows nothing about the algebra of vectors: their parts go in and come out by field name.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from persona_lens.storage.files import DAMAGE, ensure_writable, write_whole
from persona_lens.vectors.direction_statistics import LayerStatistics
from persona_lens.vectors.provenance import Provenance

FORMAT_VERSION = 1
_HEADER = "persona_lens"
_STATISTIC = "statistics."


def write_vector_file(path: str | os.PathLike[str], parts: Mapping[str, Any]) -> None:
    """Write one `.safetensors` file; an older file of that name stays until the new one is whole.

    Raises:
        ValueError: The name does not end in `.safetensors`.
        OSError: The folder is missing or cannot be written to.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"Vectors are saved as .safetensors, got {path.name!r}: change the ending of the name.")
    tensors, header = _disassemble(parts)
    contents = safetensors.torch.save(tensors, metadata={_HEADER: json.dumps(header, allow_nan=False)})
    write_whole(path, contents)


def read_vector_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parts that `write_vector_file` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is cut short, foreign, or of another format version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it cannot be iterated over)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy it or save it again.") from error
    if _HEADER not in metadata:
        raise ValueError(
            f"{path} was not saved by persona_lens: read its tensors with safetensors "
            "and hand them to PersonaVectors.from_directions."
        )
    try:
        header = json.loads(metadata[_HEADER])
        found = header.pop("format_version")
        if found == FORMAT_VERSION:
            return _assemble(tensors, header)
    except DAMAGE as error:
        raise ValueError(f"{path} has a damaged header ({error!r}): copy it or save it again.") from error
    raise ValueError(
        f"{path} has format version {found}, and this persona_lens reads {FORMAT_VERSION}: "
        "install the persona_lens that wrote it, or a newer one."
    )


def refuse_other_vectors(path: Path) -> None:
    """Raise ValueError, having changed nothing, where a file is there, is not empty and was not saved by persona_lens.

    Raises OSError in one sentence where it could not be written.
    """
    ensure_writable(path)
    if not path.exists() or not path.stat().st_size:
        return
    try:
        with safe_open(path, framework="pt") as file:
            is_ours = _HEADER in (file.metadata() or {})
    except SafetensorError:
        is_ours = False
    if not is_ours:
        raise ValueError(
            f"{path} holds something else: expected vectors that persona_lens saved, which would be replaced. Choose "
            "another output, or move that file away."
        )


def _disassemble(parts: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    header = {"format_version": FORMAT_VERSION} | {name: part for name, part in parts.items() if name not in tensors}
    if (provenance := parts["provenance"]) is not None:
        header["provenance"] = provenance.header()
    if (statistics := parts["statistics"]) is not None:
        header["statistics"] = statistics.header()
        tensors |= {_STATISTIC + name: values for name, values in statistics.by_layer.items()}
    return tensors, header


def _assemble(tensors: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Any]:
    by_layer = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_STATISTIC)}
    if header["provenance"] is not None:
        header["provenance"] = Provenance.from_header(header["provenance"])
    if header["statistics"] is not None:
        by_layer = {name.removeprefix(_STATISTIC): values for name, values in by_layer.items()}
        header["statistics"] = LayerStatistics.from_header(header["statistics"], by_layer)
    # A file without the field is older than it.
    header["missing"] = {int(layer): why for layer, why in header.get("missing", {}).items()}  # JSON's keys are strings
    return header | tensors
