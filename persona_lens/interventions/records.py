"""Vectors and numbers as JSON and back, for the records of interventions.

Tensors are base64 of little-endian float32, exactly the numbers that a vector holds.
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
    sources = {id(vector.provenance): vector.provenance for vector in vectors}
    places = {key: place for place, key in enumerate(sources)}
    rows = [
        {
            "trait": vector.trait,
            "layer": vector.layer,
            "position": vector.position,
            "residual_norm": vector.residual_norm,
            "provenance": places[id(vector.provenance)],
        }
        for vector in vectors
    ]
    return {
        "directions": encode_value(torch.stack([vector.direction for vector in vectors])),
        "vectors": rows,
        "provenances": [source and source.header() for source in sources.values()],
    }


def decode_vectors(record: Mapping[str, Any]) -> tuple[PersonaVector, ...]:
    """What `encode_vectors` encoded."""
    sources = [source and Provenance.from_header(source) for source in record["provenances"]]
    directions = decode_value(record["directions"])
    return tuple(
        PersonaVector(**{**row, "direction": direction, "provenance": sources[row["provenance"]]})
        for row, direction in zip(record["vectors"], directions, strict=True)
    )
