"""The file of thresholds: `thresholds.json` beside the vectors that they were calibrated with.

It has a format version and is written whole or not at all; thresholds of other traits, layers and kinds of value stay.
Knows nothing about how a threshold was calibrated.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from persona_lens.locks import writes_file
from persona_lens.records import DAMAGE, write_json
from persona_lens.thresholds.threshold import Identified, Threshold

FORMAT_VERSION = 1
THRESHOLDS_FILE = "thresholds.json"


def save_thresholds(path: str | os.PathLike[str], thresholds: Iterable[Threshold]) -> Path:
    """Write `thresholds.json` beside a vector file or into a run's folder, whole or not at all; gives its path.

    Thresholds that are there already stay, unless a new one is for the same trait, layer and kind of value; several
    processes may save at once.
    Raises FileNotFoundError without the folder, ValueError where the file there is damaged or two are for the same.
    """
    file, new = _file(path), list(thresholds)
    keys = [_key(each) for each in new]
    if len(set(keys)) != len(keys):
        raise ValueError("Two of these thresholds are for the same trait, layer and kind of value: keep one of them.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {file.parent}: name a run's folder or a saved vector file.")
    # Whoever writes at the same time is waited for, so that nobody's thresholds are lost.
    with writes_file(file, wait=True):
        kept = {_key(each): each for each in (_read(file) if file.exists() else [])}
        merged = kept | dict(zip(keys, new, strict=True))
        rows = [merged[key].to_dict() for key in sorted(merged)]
        write_json(file, {"format_version": FORMAT_VERSION, "thresholds": rows})
    return file


def load_thresholds(path: str | os.PathLike[str], vector: Identified | None = None) -> list[Threshold]:
    """The thresholds beside a vector file or in a run's folder; with `vector` only those of its trait and layer.

    Raises:
        FileNotFoundError: Nothing was calibrated there.
        ValueError: The file is damaged or of another version, has none for the vector, or was calibrated with another.
    """
    file = _file(path)
    if not file.exists():
        raise FileNotFoundError(f"There is no {file}: calibrate_threshold, then save_thresholds.")
    found = _read(file)
    if vector is None:
        return found
    of_vector = [each for each in found if (each.trait, each.layer) == (vector.trait, vector.layer)]
    if not of_vector:
        there = ", ".join(dict.fromkeys(f"{each.trait} at layer {each.layer}" for each in found)) or "nothing"
        raise ValueError(f"{file} has no threshold for {vector.trait} at layer {vector.layer}, but for {there}.")
    for each in of_vector:
        each.check(vector)
    return of_vector


def _read(file: Path) -> list[Threshold]:
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if (version := saved["format_version"]) == FORMAT_VERSION:
            return [Threshold.from_dict(each) for each in saved["thresholds"]]
    except DAMAGE as error:
        raise ValueError(f"{file} does not hold thresholds ({error}): move it away and calibrate again.") from error
    raise ValueError(
        f"{file} has format version {version}, and this persona_lens reads {FORMAT_VERSION}: "
        "install the persona_lens that wrote it, or a newer one."
    )


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    folder = path.parent if path.suffix in {".safetensors", ".json"} and not path.is_dir() else path
    return folder / THRESHOLDS_FILE


def _key(threshold: Threshold) -> tuple[str, int, str]:
    return threshold.trait, threshold.layer, threshold.of
