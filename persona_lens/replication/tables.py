"""The tables of a preset file: every setting of a replication, with its type.

Where a table's comment in the shipped files names a section, the value is that of arXiv:2507.21509; otherwise it is
ours. Knows nothing about files, models or costs.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Stage = Literal[
    "extraction",
    "layers",
    "dose-response",
    "monitoring",
    "cosines",
    "finetuning",
    "projection-difference",
    "mitigation",
    "new-facts",
    "real-chats",
    "benchmarks",
]
Count = Annotated[int, Field(ge=1)]
Score = Annotated[float, Field(ge=0, le=100)]
Positive = Annotated[float, Field(gt=0)]

TRAINED_BY_DEFAULT = {"rank": 32, "alpha": 64.0, "dropout": 0.0, "warmup_steps": 5, "weight_decay": 0.01}


class Table(BaseModel):
    """A table of the file: no key but these, no other types, no change afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelTable(Table):
    """Which model; `paper` is the model whose figures of the paper it is held against, empty for none."""

    name: str
    paper: Literal["", "Qwen2.5-7B-Instruct", "Llama-3.1-8B-Instruct"] = ""
    n_layers: Count
    dtype: Literal["float32", "bfloat16"] = "float32"


class JudgeTable(Table):
    """Who scores: the model itself by likelihood ratio, or a model on an OpenAI-compatible server."""

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
    """How answers are sampled, in every stage that samples some."""

    questions: Count
    per_question: Count
    max_new_tokens: Count


class ExtractionTable(SamplingTable):
    """Rollouts of both polarities, judged, kept or dropped, and averaged."""

    threshold: Score = 50.0
    min_coherence: Score = 50.0
    min_pairs: Count = 10


class LayersTable(SamplingTable):
    """Every layer of `layers` (none given: all) steered at every coefficient."""

    layers: tuple[int, ...] = ()
    coefficients: Annotated[tuple[float, ...], Field(min_length=1)]
    min_coherence: Score = 75.0


class DoseTable(SamplingTable):
    """The chosen direction, and `random` random ones of its norm, at every coefficient and at 0."""

    coefficients: Annotated[tuple[float, ...], Field(min_length=1)]
    random: Annotated[int, Field(ge=0)]


class MonitoringTable(SamplingTable):
    """Eight system prompts, and 0 or more examples in context."""

    shots: Annotated[tuple[int, ...], Field(min_length=1)]


class CosinesTable(Table):
    """The layer, counted from 0, at which traits are compared."""

    layer: Annotated[int, Field(ge=0)]


class FinetuningTable(Table):
    """rs-LoRA on every set, and the answers afterwards; `questions` is for datasets, moods have their own."""

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
    per_question: Count
    max_new_tokens: Count

    @model_validator(mode="after")
    def _moods_are_trained_by_default(self) -> "FinetuningTable":
        for name, value in TRAINED_BY_DEFAULT.items():
            if self.source == "moods" and getattr(self, name) != value:
                raise ValueError(f"the moods are always trained with {name} = {value}, leave it out")
        return self


class MoodsTable(Table):
    """The moods that stand in for the paper's datasets; all of them are also mitigated."""

    moods: Annotated[tuple[str, ...], Field(min_length=1)]
    neutral_tokens: Count
    neutral_prompts: Count
    layers: Annotated[tuple[int, ...], Field(min_length=1)]


class ProjectionTable(Table):
    """Rows of each set that are screened, and the length limit of the base model's greedy responses."""

    rows: Count
    base_tokens: Count


class MitigationTable(Table):
    """Doses of each way to hold a trait down; `traits` is for datasets, of moods all are mitigated."""

    traits: tuple[str, ...] = ()
    post_hoc: Annotated[tuple[Positive, ...], Field(min_length=1)]
    preventative: Annotated[tuple[Positive, ...], Field(min_length=1)]
    all_layers: tuple[Positive, ...] = ()
    caft: bool = True
    capability_questions: Count


class BroughtTable(Table):
    """What the user must bring: where it is looked for, and in which form."""

    path: str
    section: str
    form: str
    names: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    traits: dict[str, str] = Field(default_factory=dict)
    """Which trait a set is made for, by the set's name."""

    @property
    def set_parts(self) -> dict[str, tuple[str, str]]:
        """Name and version of each set, by `{name}_{version}`."""
        return {f"{name}_{version}": (name, version) for name in self.names for version in self.versions}


class BringTables(Table):
    """Everything that is not ours to ship; a table that is left out is not asked for."""

    finetuning: BroughtTable | None = None
    new_facts: BroughtTable | None = None
    narrow: BroughtTable | None = None
    chats: BroughtTable | None = None
    benchmarks: BroughtTable | None = None


class ChatsTable(Table):
    """How real chats are screened and trained on."""

    trait: str
    sample: Count
    max_prompt_tokens: Count
    chosen: Count


class MeasuredRates(Table):
    """Tokens a second that were measured, and how."""

    decoding: Positive
    reading: Positive
    training: Positive
    how: str


class AssumedRates(Table):
    """What throughput is derived from where nothing was measured: an assumption, and shown as one."""

    parameters: Positive
    gpu: str
    teraflops: Positive
    reading_utilisation: Annotated[float, Field(gt=0, le=1)]
    training_utilisation: Annotated[float, Field(gt=0, le=1)]
    decoding_milliseconds: Positive
    decoding_rows: Count
    how: str


class CostTable(Table):
    """Constants of the cost model; exactly one of `measured` and `assumed`."""

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
    """What `--full` takes instead, and says of it."""

    description: str = ""
    traits: tuple[str, ...] = ()
    moods: tuple[str, ...] = ()
