"""Interventions as JSON and back, so that a run records what was done to the model, directions included.

Tensors are base64 of little-endian float32, exactly the numbers that a vector holds.
Knows nothing about what an intervention does.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona_lens.vectors.persona_vector import PersonaVector
from persona_lens.vectors.provenance import Provenance

RECORD_VERSION = 1


def encode_value(value: Any) -> Any:
    """A number, None or a tensor as JSON."""
    if not isinstance(value, Tensor):
        return value
    array = np.ascontiguousarray(value.detach().cpu().numpy().astype("<f4"))
    return {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode("ascii")}


def decode_value(value: Any) -> Any:
    """What `encode_value` encoded."""
    if not isinstance(value, Mapping):
        return value
    array = np.frombuffer(base64.b64decode(value["float32"], validate=True), dtype="<f4")
    return torch.from_numpy(array.copy()).reshape(value["shape"])


def encode_vectors(vectors: Sequence[PersonaVector]) -> dict[str, Any]:
    """Vectors as JSON; a provenance that several share is written once."""
    sources: list[Provenance | None] = []
    rows: list[dict[str, Any]] = []
    for vector in vectors:
        if not any(vector.provenance is source for source in sources):
            sources.append(vector.provenance)
        rows.append(
            {
                "trait": vector.trait,
                "layer": vector.layer,
                "position": vector.position,
                "residual_norm": vector.residual_norm,
                "provenance": next(i for i, source in enumerate(sources) if source is vector.provenance),
            }
        )
    return {
        "directions": encode_value(torch.stack([vector.direction for vector in vectors])),
        "vectors": rows,
        "provenances": [source and source.header() for source in sources],
    }


def decode_vectors(record: Mapping[str, Any]) -> tuple[PersonaVector, ...]:
    """What `encode_vectors` encoded."""
    sources = [source and Provenance.from_header(source) for source in record["provenances"]]
    directions = decode_value(record["directions"])
    return tuple(
        PersonaVector(**{**row, "direction": direction, "provenance": sources[row["provenance"]]})
        for row, direction in zip(record["vectors"], directions, strict=True)
    )
