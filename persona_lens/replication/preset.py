"""Presets: files that a person can read and change, with every setting of a replication.

`embedded`, `qwen2.5-7b` and `llama-3.1-8b` ship with the package; a path is read the same way. A wrong file is one
sentence that names file, key, what was expected and what came.
Knows nothing about models or costs: no torch is needed to read one.
"""

import difflib
import json
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from persona_lens.replication.tables import (
    BringTables,
    ChatsTable,
    CosinesTable,
    CostTable,
    DoseTable,
    ExtractionTable,
    FinetuningTable,
    FullTable,
    JudgeTable,
    LayersTable,
    MitigationTable,
    ModelTable,
    MonitoringTable,
    MoodsTable,
    ProjectionTable,
    Stage,
    Table,
)
from persona_lens.traits.trait import Trait, load_trait

STAGES: tuple[Stage, ...] = get_args(Stage)
"""In the order in which they run."""
_SHIPPED = files("persona_lens.replication") / "presets"
_NOT_SETTINGS = {"traits", "trait_files", "cost", "full", "description", "limits", "bring"}
"""What may change without making another replication: more traits or moods are added to what is there."""


class Preset(Table):
    """Every setting of a replication; the tables are described in `persona_lens.replication.tables`."""

    name: str
    description: str
    limits: str
    seed: int
    traits: tuple[str, ...] = Field(min_length=1)
    trait_files: dict[str, str] = Field(default_factory=dict, alias="trait-files")
    model: ModelTable
    judge: JudgeTable
    extraction: ExtractionTable
    layers: LayersTable
    dose_response: DoseTable = Field(alias="dose-response")
    monitoring: MonitoringTable
    cosines: CosinesTable
    finetuning: FinetuningTable
    moods: MoodsTable | None = None
    projection_difference: ProjectionTable = Field(alias="projection-difference")
    mitigation: MitigationTable
    real_chats: ChatsTable | None = Field(default=None, alias="real-chats")
    bring: BringTables = BringTables()
    cost: CostTable
    full: FullTable = FullTable()

    @model_validator(mode="after")
    def _is_whole(self) -> "Preset":
        if self.finetuning.source == "moods" and self.moods is None:
            raise ValueError("finetuning.source is moods: add the table moods")
        if self.finetuning.source == "datasets" and self.bring.finetuning is None:
            raise ValueError("finetuning.source is datasets: add the table bring.finetuning")
        if (sets := self.bring.finetuning) is not None:
            named = [f"{name}_{version}" for name in sets.names for version in sets.versions]
            # Files are named so: two that are named alike would share one folder.
            for files in (named, [f"{each}_{trait}" for each in named for trait in self.traits]):
                if twice := next((each for each in files if files.count(each) > 1), None):
                    raise ValueError(f"bring.finetuning: two pieces would both be called {twice}: rename a set")
        if self.bring.chats is not None and self.real_chats is None:
            raise ValueError("bring.chats needs the table real-chats")
        for key, names in {"traits": self.traits, "full.traits": self.full.traits}.items():
            if len({name.casefold() for name in names}) < len(names):
                raise ValueError(f"{key}: a name stands there twice, upper and lower case being one: each has a folder")
        for layer in (*self.layers.layers, self.cosines.layer):
            if not 0 <= layer < self.model.n_layers:
                raise ValueError(f"layer {layer} is none of the model's {self.model.n_layers}, counted from 0")
        return self

    def trait(self, name: str) -> Trait:
        """One of the traits: that of `trait-files` where it stands there, else the bundled one."""
        found = load_trait(self.trait_files.get(name, name))
        if found.name != name:
            raise ValueError(f"trait-files.{name}: the file holds the trait {found.name!r}: name it so.")
        return found

    def in_full(self) -> "Preset":
        """The preset with the traits, moods and description of its table `full`."""
        moods, own = self.moods, {"traits": self.traits, "description": self.description}
        if moods is not None and self.full.moods:
            moods = moods.model_copy(update={"moods": self.full.moods})
        taken = {name: getattr(self.full, name) or value for name, value in own.items()}
        return self.model_copy(update={**taken, "moods": moods})

    def settings(self) -> dict[str, Any]:
        """What a folder is made with and may not change: all but traits, moods, prices and words."""
        found = self.model_dump(mode="json", exclude=_NOT_SETTINGS)
        if found["moods"]:
            del found["moods"]["moods"]
        return found


def shipped_presets() -> tuple[str, ...]:
    """The names of the presets that ship with the package."""
    return tuple(sorted(each.name.removesuffix(".toml") for each in _SHIPPED.iterdir() if each.name.endswith(".toml")))


def load_preset(name_or_path: str | Path) -> Preset:
    """A shipped preset by its name, or one from a file.

    Raises FileNotFoundError where there is none, ValueError that names file, key, what was expected and what came.
    """
    name = str(name_or_path)
    if name in shipped_presets():
        return _read(_SHIPPED.joinpath(f"{name}.toml").read_text(encoding="utf-8"), f"preset {name}")
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"No preset {name!r}: give one of {', '.join(shipped_presets())}, or the path of a preset's TOML file."
        )
    try:
        return _read(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: give the path of a preset's TOML file.") from error


def _read(text: str, source: str) -> Preset:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{source} is not TOML: {str(error).rstrip('.')}.") from error
    try:
        # As JSON, in whose strict mode a list may become a tuple, and a number never a text.
        return Preset.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ValueError(_sentence(error, values, source)) from error


def _sentence(error: ValidationError, values: dict[str, Any], source: str) -> str:
    # A misspelt key is also a missing one: its own sentence says more.
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    place = [str(part) for part in first["loc"]]
    key = ".".join(place) or "the whole"
    if first["type"] == "extra_forbidden":
        known = _keys_at(place[:-1])
        close = difflib.get_close_matches(place[-1], known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{source}, key {key}: expected one of {', '.join(known)}, got the unknown key {place[-1]!r}{hint}."
    if first["type"] == "missing":
        return f"{source}, key {key}: expected a value, got none."
    if first["type"] == "value_error":
        return f"{source}, {key}: {first.get('ctx', {}).get('error', first['msg'])}."
    expected = first["msg"].removeprefix("Input should be ")
    return f"{source}, key {key}: expected {expected}, got {first['input']!r}."


def _keys_at(place: list[str]) -> list[str]:
    """The keys of the table at a place of the file."""
    table: Any = Preset
    for part in place:
        fields = {field.alias or name: field for name, field in table.model_fields.items()}
        annotation = fields[part].annotation
        options = [annotation, *get_args(annotation)]
        table = next(each for each in options if isinstance(each, type) and issubclass(each, BaseModel))
    return [field.alias or name for name, field in table.model_fields.items()]
