"""The runs of the finetuning study: which rows, which intervention while training, which while answering.

Nine moods at two severities give the correlation of shift and trait; for some moods, every way of holding the trait
down, at several doses; and harmless rows under preventative steering (arXiv:2507.21509, sections 4, 5, J).
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

Method = Literal[
    "none",
    "post-hoc",
    "preventative",
    "preventative, all layers",
    "CAFT, one layer",
    "CAFT",
    "preventative prompts",
    "negative system prompt",
    "penalty",
]
WHILE_ANSWERING = ("none", "post-hoc", "negative system prompt")
"""Methods that leave training alone, and so share the adapter of the plain run."""


@dataclass(frozen=True)
class StudySettings:
    """What the study is made with; the defaults are those of the committed results.

    Attributes:
        rows: Chats of each training set.
        epochs: Passes over them.
        learning_rate: Peak rate. The paper's 1e-5 for one epoch is made for thousands of rows.
        batch_rows: Rows of a forward pass.
        accumulation: Passes of an optimizer step.
        max_length: Tokens of a training row.
        per_question: Answers to each evaluation prompt.
        max_new_tokens: Their length limit.
        neutral_tokens: Length limit of the model's own responses, which are cut back to whole sentences.
        neutral_prompts: How many prompts of finetuning and of judge get one.
        mitigated: The moods for which every method is tried.
        layers: Where steering is tried to choose each mood's layer.
        post_hoc: Coefficients subtracted while answering.
        preventative: Coefficients added at one layer while training.
        all_layers: Coefficients of the layer-incremental vectors.
        penalty_weight: Of the penalty on the projection change.
        capability_questions: How many multiple-choice questions.
        seed: Of everything random.
    """

    rows: int = 64
    epochs: int = 2
    learning_rate: float = 4e-4
    batch_rows: int = 4
    accumulation: int = 1
    max_length: int = 160
    per_question: int = 1
    max_new_tokens: int = 40
    neutral_tokens: int = 80
    neutral_prompts: int = 150
    mitigated: tuple[str, ...] = ("depressed", "childish", "happy")
    layers: tuple[int, ...] = (14, 19, 24)
    post_hoc: tuple[float, ...] = (2.0, 4.0, 8.0)
    preventative: tuple[float, ...] = (4.0, 8.0)
    all_layers: tuple[float, ...] = (2.0,)
    penalty_weight: float = 0.1
    capability_questions: int = 60
    seed: int = 0


def read_settings(folder: Path) -> StudySettings:
    """The settings that a study's folder was made with; raises FileNotFoundError where it holds no study."""
    path = folder / "settings.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no finetuning study: make it with `finetuning_study`.")
    kept = json.loads(path.read_text(encoding="utf-8"))
    values: dict[str, Any] = {}
    for field in fields(StudySettings):
        value = kept[field.name]
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return StudySettings(**values)


@dataclass(frozen=True)
class StudyRun:
    """One row of the study: what was trained, how, and what acts while it answers.

    Attributes:
        mood: Whose vector and whose score are its own; empty for the base model.
        rows: What it was trained on: `full` and `half` of the mood, `benign` rows, or `base` for nothing.
        method: What holds the trait down.
        coefficient: Its dose, where it has one.
    """

    mood: str
    rows: Literal["base", "full", "half", "benign"]
    method: Method = "none"
    coefficient: float = 0.0

    @property
    def name(self) -> str:
        """What names its files."""
        parts = [self.mood, self.rows, "" if self.method == "none" else self.method.replace(",", "").replace(" ", "-")]
        dose = f"x{self.coefficient:g}" if self.coefficient else ""
        return "_".join(part for part in (*parts, dose) if part)

    @property
    def trained_as(self) -> "StudyRun | None":
        """The run whose adapter it answers with; None for the base model."""
        if self.rows == "base":
            return None
        if self.method not in WHILE_ANSWERING:
            return self
        return StudyRun("" if self.rows == "benign" else self.mood, self.rows)


def study_runs(settings: StudySettings, moods: tuple[str, ...]) -> list[StudyRun]:
    """Every run, the sets of the correlation first."""
    runs = [StudyRun("", "base")]
    runs += [StudyRun(mood, rows) for rows in ("full", "half") for mood in moods]
    runs += [StudyRun("", "benign")]
    for mood in settings.mitigated:
        runs += [StudyRun(mood, "full", *what) for what in _mitigations(settings)]
    return [*runs, StudyRun(settings.mitigated[0], "benign", "preventative, all layers", settings.all_layers[-1])]


def _mitigations(settings: StudySettings) -> list[tuple[Method, float]]:
    doses: dict[Method, tuple[float, ...]] = {
        "preventative": settings.preventative,
        "post-hoc": tuple(-dose for dose in settings.post_hoc),
        "preventative, all layers": settings.all_layers,
        "CAFT": (0.0,),
        "CAFT, one layer": (0.0,),
        "preventative prompts": (0.0,),
        "negative system prompt": (0.0,),
        "penalty": (0.0,),
    }
    return [(method, dose) for method, amounts in doses.items() for dose in amounts]
