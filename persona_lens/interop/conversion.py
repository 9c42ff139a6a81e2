"""Any of the formats in, any of them out: which one a file is, is told by its ending and its content."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from safetensors import SafetensorError, safe_open

from persona_lens.interop.control_vectors import read_control_vector, write_control_vector
from persona_lens.interop.tensor_files import (
    MANIFEST,
    LastRow,
    PathLike,
    checked_layers,
    read_block_rows,
    read_layer_dict,
    read_reference_vectors,
    read_torch_file,
    read_vector_folder,
    write_layer_dict,
    write_reference_vectors,
)
from persona_lens.models.structure import Model
from persona_lens.vectors.persona_vector import Position
from persona_lens.vectors.persona_vectors import PersonaVectors

Format = Literal["persona_lens", "reference", "layers", "gguf"]
_BY_ENDING: dict[str, Format] = {
    ".safetensors": "persona_lens",
    ".pt": "reference",
    ".pth": "reference",
    ".gguf": "gguf",
}


def read_vectors(
    path: PathLike,
    *,
    trait: str | None = None,
    position: Position | None = None,
    last_row: LastRow = "final_norm",
    model: Model | None = None,
    n_layers: int | None = None,
) -> PersonaVectors:
    """Persona vectors from a file or folder of any format that is read here, and our own.

    A `.pt` file is a dict by layer, or rows, of which the number of layers (`model` or `n_layers`) tells whether the
    first is the embeddings'; in a folder with a manifest `trait` picks one. Our own files know all this: there `trait`
    is a new name, and the model is checked. See the formats' own readers for the rest.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of none of the formats, is damaged, does not fit the model, or leaves open what was not given.
    """
    path = Path(path)
    if path.is_dir():
        if (path / MANIFEST).exists():
            found = read_vector_folder(
                path, position=position or "prompt_last", last_row=last_row, model=model, n_layers=n_layers
            )
            if trait not in found:
                raise ValueError(f"{path} holds {', '.join(found)}: name one of them as the trait, got {trait}.")
            return found[trait]
        path = path / "vectors.safetensors"
    where = position or "response_mean"
    if path.suffix == ".gguf":
        return read_control_vector(path, trait=trait, position=where, model=model, n_layers=n_layers)
    if path.suffix == ".safetensors":
        if _is_ours(path):
            return _own(path, trait, model, n_layers)
        return read_layer_dict(path, trait=trait, position=where, model=model, n_layers=n_layers)
    if path.suffix not in _BY_ENDING:
        raise ValueError(f"{path} ends in none of {', '.join(_BY_ENDING)}: pass vectors of one of these formats.")
    content = read_torch_file(path)
    if isinstance(content, dict):
        return read_layer_dict(path, trait=trait, position=where, model=model, n_layers=n_layers)
    layers = checked_layers(model, n_layers, str(path))
    if getattr(content, "shape", ())[:1] == (layers,):
        return read_block_rows(path, trait=trait, position=where, last_row=last_row, model=model, n_layers=n_layers)
    return read_reference_vectors(path, trait=trait, position=position, model=model, n_layers=n_layers)


def write_vectors(
    vectors: PersonaVectors, path: PathLike, *, format: Format | None = None, layers: Sequence[int] | None = None
) -> None:
    """Write vectors in any format that is written here; without `format` the ending decides.

    `.safetensors` is our own, `.pt` the reference's, `.gguf` a control vector; `layers`, directions by layer, can be
    `.pt` or `.safetensors`. Only directions by layer and control vectors take `layers`, and the latter need it.

    Raises:
        ValueError: The ending is of no format, the format lacks something, or `layers` does not go with it.
        OSError: The folder is missing or cannot be written to.
    """
    path = Path(path)
    chosen = format or _BY_ENDING.get(path.suffix)
    if chosen not in get_args(Format):
        expected = f"one of the formats {', '.join(get_args(Format))}" if format else f"one of {', '.join(_BY_ENDING)}"
        raise ValueError(f"Cannot tell how to write {path.name}: expected {expected}.")
    if chosen == "gguf":
        if layers is None:
            raise ValueError(
                f"{vectors.trait}: all directions of a control vector act together: name the layers to steer at."
            )
        write_control_vector(vectors, path, layers=layers)
    elif chosen == "layers":
        write_layer_dict(vectors, path, layers=layers)
    elif layers is not None:
        raise ValueError(f"{vectors.trait}: the format {chosen} has every layer: leave out the choice of layers.")
    elif chosen == "reference":
        write_reference_vectors(vectors, path)
    else:
        vectors.save(path)


def _own(path: Path, trait: str | None, model: Model | None, n_layers: int | None) -> PersonaVectors:
    vectors = PersonaVectors.load(path)
    if model is not None:
        vectors.check(model)
    if n_layers not in (None, vectors.n_layers):
        raise ValueError(f"{path} has {vectors.n_layers} layers, and n_layers is {n_layers}: leave it out.")
    return vectors if trait is None else replace(vectors, trait=trait)


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return "persona_lens" in (file.metadata() or {})
    except SafetensorError:
        return True  # our own reader says what is wrong with it
