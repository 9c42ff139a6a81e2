"""Presets: every setting of a replication, in a TOML file that a person can read and change.

`embedded`, `qwen2.5-7b` and `llama-3.1-8b` ship with the package; a path is read the same way. Where a comment in the
shipped files names a section, the value is that of arXiv:2507.21509; otherwise it is ours. A wrong file is one sentence
that names file, key, what was expected and what came.
"""

import difflib
import json
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from persona_lens.traits.trait import Trait, load_trait

_SHIPPED = files("persona_lens.replication") / "presets"
_NOT_SETTINGS = {"traits", "trait_files", "cost", "full", "description", "limits", "bring"}
"""What may change without making another replication: more traits are added to what is there."""
Count = Annotated[int, Field(ge=1)]
Score = Annotated[float, Field(ge=0, le=100)]
Positive = Annotated[float, Field(gt=0)]


class Table(BaseModel):
    """A table of the file: unknown keys and other types are refused, and it never changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelTable(Table):
    """The model; `paper` is the model whose numbers in the paper it is compared with, empty for none."""

    name: str
    paper: Literal["", "Qwen2.5-7B-Instruct", "Llama-3.1-8B-Instruct"] = ""
    n_layers: Count
    dtype: Literal["float32", "bfloat16"] = "float32"


class JudgeTable(Table):
    """The judge: the model itself by likelihood ratio, or a model on an OpenAI-compatible server."""

    kind: Literal["likelihood", "openai"]
    model: str = ""
    url: str = ""
    aliases: tuple[str, ...] | None = None
    concurrency: Count = 20
    calibration_questions: Annotated[int, Field(ge=2)] = 10
    neutral_samples: Count = 4
    contrast_pairs: Count | None = None

    @model_validator(mode="after")
    def _names_its_model(self) -> "JudgeTable":
        if self.kind == "openai" and not self.model:
            raise ValueError("a judge of kind openai needs model, its name on the server")
        return self


class SamplingTable(Table):
    """How answers are sampled."""

    questions: Count
    per_question: Count
    max_new_tokens: Count

    def keywords(self, *names: str) -> dict[str, Any]:
        """Samples a question and their length limit, and further settings, as arguments of the library's functions."""
        return {name: getattr(self, name) for name in ("per_question", "max_new_tokens", *names)}


class ExtractionTable(SamplingTable):
    """Rollouts of both polarities, and the rule by which pairs are kept."""

    threshold: Score = 50.0
    min_coherence: Score = 50.0
    min_pairs: Count = 10


class LayersTable(SamplingTable):
    """Every layer of `layers` (empty for all) is steered at every coefficient."""

    layers: tuple[int, ...] = ()
    coefficients: Annotated[tuple[float, ...], Field(min_length=1)]
    min_coherence: Score = 75.0


class DoseTable(SamplingTable):
    """The trait's direction, and `random` random ones of its norm, at every coefficient and at 0."""

    coefficients: Annotated[tuple[float, ...], Field(min_length=1)]
    random: Annotated[int, Field(ge=0)]


class MonitoringTable(SamplingTable):
    """The trait's eight system prompts, and `shots` examples in context."""

    shots: Annotated[tuple[int, ...], Field(min_length=1)]


class CosinesTable(Table):
    """The layer, counted from 0, at which the traits' directions are compared."""

    layer: Annotated[int, Field(ge=0)]


class FinetuningTable(SamplingTable):
    """rs-LoRA on every set, and the answers afterwards.

    `source` says whose sets: the user's (`datasets`), or moods, which only the studies of a checkout train on.
    """

    source: Literal["moods", "datasets"]
    epochs: Count
    learning_rate: Positive
    batch_rows: Count
    accumulation: Count
    max_length: Count
    rank: Count = 32
    alpha: Positive = 64.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    gradient_checkpointing: bool = False
    rows: Count
    questions: Count = 20


class ProjectionTable(Table):
    """How many rows of each set are screened, and the length limit of the base model's greedy responses."""

    rows: Count
    base_tokens: Count


class MitigationTable(Table):
    """Doses of each way to hold a trait down; `traits` are those whose worst set is trained on."""

    traits: tuple[str, ...] = ()
    post_hoc: Annotated[tuple[Positive, ...], Field(min_length=1)]
    preventative: Annotated[tuple[Positive, ...], Field(min_length=1)]
    all_layers: tuple[Positive, ...] = ()
    caft: bool = True
    capability_questions: Count


class UserDataTable(Table):
    """Data that the user brings: where it is looked for, and in which form."""

    path: str
    section: str
    form: str
    names: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    traits: dict[str, str] = Field(default_factory=dict)
    """The trait that a set is made for, by the set's name."""

    @property
    def set_parts(self) -> dict[str, tuple[str, str]]:
        """Name and version of each set, by `{name}_{version}`."""
        return {f"{name}_{version}": (name, version) for name in self.names for version in self.versions}


class BringTables(Table):
    """The paper's data, which does not ship; a table that is left out is not asked for."""

    finetuning: UserDataTable | None = None
    new_facts: UserDataTable | None = None
    narrow: UserDataTable | None = None
    chats: UserDataTable | None = None
    benchmarks: UserDataTable | None = None


class ChatsTable(Table):
    """How many real chats are screened, and how many are trained on."""

    trait: str
    sample: Count
    max_prompt_tokens: Count
    chosen: Count


class MeasuredRates(Table):
    """Measured tokens a second, and how they were measured."""

    decoding: Positive
    reading: Positive
    training: Positive
    how: str


class AssumedRates(Table):
    """Assumptions that tokens a second are derived from where nothing was measured."""

    parameters: Positive
    gpu: str
    teraflops: Positive
    reading_utilisation: Annotated[float, Field(gt=0, le=1)]
    training_utilisation: Annotated[float, Field(gt=0, le=1)]
    decoding_milliseconds: Positive
    decoding_rows: Count
    how: str


class CostTable(Table):
    """Prices and lengths for the estimate; exactly one of `measured` and `assumed`."""

    prompt_tokens: Positive
    training_row_tokens: Positive
    response_share: Annotated[float, Field(gt=0, le=1)]
    gpu_dollars_per_hour: Annotated[float, Field(ge=0)] = 0.0
    judge_dollars_per_call: Annotated[float, Field(ge=0)] = 0.0
    prices: str = ""
    measured: MeasuredRates | None = None
    assumed: AssumedRates | None = None

    @model_validator(mode="after")
    def _has_one_kind_of_rates(self) -> "CostTable":
        if (self.measured is None) == (self.assumed is None):
            raise ValueError("give one of the tables cost.measured and cost.assumed")
        return self


class FullTable(Table):
    """Traits, moods and description that `--full` takes instead."""

    description: str = ""
    traits: tuple[str, ...] = ()
    moods: tuple[str, ...] = ()


class Preset(Table):
    """Every setting of a replication. `moods` is read by the studies of a checkout alone."""

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
    moods: dict[str, Any] | None = None
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
        if (sets := self.bring.finetuning) is not None:
            named = [f"{name}_{version}" for name in sets.names for version in sets.versions]
            # Files are named so: two that are named alike would share one folder.
            for names in (named, [f"{name}_{trait}" for name in named for trait in self.traits]):
                if twice := next((name for name in names if names.count(name) > 1), None):
                    raise ValueError(f"bring.finetuning: two pieces would both be called {twice}: rename a set")
        if self.bring.chats is not None and self.real_chats is None:
            raise ValueError("bring.chats needs the table real-chats")
        for key, names in {"traits": self.traits, "full.traits": self.full.traits}.items():
            if len({name.casefold() for name in names}) < len(names):
                raise ValueError(f"{key}: a name is there twice (upper and lower case count as one): each has a folder")
        for layer in (*self.layers.layers, self.cosines.layer):
            if not 0 <= layer < self.model.n_layers:
                raise ValueError(f"layer {layer} is none of the model's {self.model.n_layers}, counted from 0")
        return self

    def trait(self, name: str) -> Trait:
        """One of the traits: from the file that `trait-files` names for it, else the bundled one."""
        trait = load_trait(self.trait_files.get(name, name))
        if trait.name != name:
            raise ValueError(f"trait-files.{name}: the file holds the trait {trait.name!r}: name it so.")
        return trait

    def in_full(self) -> "Preset":
        """The preset with the traits, moods and description of its table `full`."""
        moods = self.moods
        if moods is not None and self.full.moods:
            moods = {**moods, "moods": list(self.full.moods)}
        changes = {"traits": self.full.traits or self.traits, "moods": moods}
        return self.model_copy(update={**changes, "description": self.full.description or self.description})

    def settings(self) -> dict[str, Any]:
        """What a folder is made with and may not change: all but traits, moods, prices and words."""
        settings = self.model_dump(mode="json", exclude=_NOT_SETTINGS)
        if settings["moods"]:
            del settings["moods"]["moods"]
        return settings


def shipped_presets() -> tuple[str, ...]:
    """The names of the presets that ship with the package."""
    return tuple(sorted(path.name.removesuffix(".toml") for path in _SHIPPED.iterdir() if path.name.endswith(".toml")))


def load_preset(name_or_path: str | Path) -> Preset:
    """A shipped preset by its name, or one from a file.

    Raises FileNotFoundError where there is none, ValueError that names file, key, what was expected and what came.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name in shipped_presets():
        return _read(_SHIPPED.joinpath(f"{name}.toml").read_text(encoding="utf-8"), f"preset {name}")
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
        raise ValueError(_sentence(error, source)) from error


def _sentence(error: ValidationError, source: str) -> str:
    # A misspelt key is also a missing one: its own sentence says more.
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    place = [str(part) for part in first["loc"]]
    key = ".".join(place) or "the whole"
    if first["type"] == "extra_forbidden":
        keys = _keys_at(place[:-1])
        close = difflib.get_close_matches(place[-1], keys, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{source}, key {key}: expected one of {', '.join(keys)}, got the unknown key {place[-1]!r}{hint}."
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
        table = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return [field.alias or name for name, field in table.model_fields.items()]
