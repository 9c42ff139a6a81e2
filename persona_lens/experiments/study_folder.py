"""A study's folder belongs to one model and its settings, and its records stay small.

Knows nothing about what is studied.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from persona_lens.models.structure import ModelIdentity
from persona_lens.storage.files import read_json, write_json


def refuse_other_settings(
    path: Path, settings: Mapping[str, Any], model: ModelIdentity, *, growing: Collection[str] = ()
) -> None:
    """Write the settings down, or raise ValueError where the folder was made with others or by another model.

    Lists that may be `growing` differ without harm: what they hold now is added to what they held.
    """
    wanted = json.loads(json.dumps({"model": model.name, "weights_hash": model.weights_hash, **settings}))
    if not path.exists():
        write_json(path, wanted)
        return
    kept = read_json(path)
    for name in growing:
        wanted[name] = [*kept[name], *(each for each in wanted[name] if each not in kept[name])]
    grown = {name: wanted[name] for name in growing if wanted[name] != kept[name]}
    for name, value in wanted.items():
        if name not in growing and kept.get(name) != value:
            raise ValueError(
                f"{path.parent} holds a study with another {name} ({kept.get(name)}, now {value}): "
                "choose another folder."
            )
    if grown:
        write_json(path, kept | grown)


def rounded(value: Any) -> Any:
    """Floats to six significant digits, so that records stay small and hold no more than they mean."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
