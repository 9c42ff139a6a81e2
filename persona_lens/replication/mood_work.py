"""What the stages on moods come to: the finetuning study with a smaller plan, and its sets screened.

Knows nothing about how the study is run; how many prompts its parts have is the data's, and checked against it.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from persona_lens.replication.preset import Preset
from persona_lens.replication.units import Work, sampling, total


@dataclass(frozen=True)
class MoodPrompts:
    """How many prompts and texts the parts of the mood data have."""

    vectors: int = 109
    evaluation: int = 36
    contrasted: int = 735
    moods: int = 9
    layer_questions: int = 12
    multiple_choice: int = 273

    def asked(self, wanted: int) -> int:
        """How many multiple-choice questions the study asks: every so manyth."""
        return -(-self.multiple_choice // (self.multiple_choice // wanted))


MOODS = MoodPrompts()


MoodMethod = Literal["none", "post-hoc", "preventative", "preventative, all layers", "CAFT"]


class MoodRun(NamedTuple):
    """One run of the study, as `StudyRun` takes it."""

    mood: str
    rows: Literal["base", "full", "half"]
    method: MoodMethod = "none"
    coefficient: float = 0.0

    @property
    def is_trained(self) -> bool:
        """Whether it has an adapter of its own."""
        return self.rows != "base" and self.method != "post-hoc"


def plain_runs(preset: Preset) -> list[MoodRun]:
    """The base model, and every mood at both severities."""
    return [MoodRun("", "base"), *(MoodRun(mood, rows) for rows in ("full", "half") for mood in _moods(preset))]


def method_runs(preset: Preset) -> list[MoodRun]:
    """Every mood under every way to hold it down."""
    how = preset.mitigation
    methods: list[tuple[MoodMethod, float]] = [
        *(("preventative", dose) for dose in how.preventative),
        *(("post-hoc", -dose) for dose in how.post_hoc),
        *(("preventative, all layers", dose) for dose in how.all_layers),
        *([("CAFT", 0.0)] if how.caft else []),
    ]
    return [MoodRun(mood, "full", *each) for mood in _moods(preset) for each in methods]


def mood_finetuning(preset: Preset, data: MoodPrompts = MOODS) -> Work:
    """What all runs share, and the plain runs: trained, answered, scored, their shifts and what they still can."""
    runs = plain_runs(preset)
    shifts = Work(forwards=2 * data.evaluation) + _prompts(preset, 2 * data.evaluation)
    return total([_materials(preset, data), *(_run(preset, run, data) for run in runs), shifts * len(runs)])


def mood_mitigation(preset: Preset, data: MoodPrompts = MOODS) -> Work:
    """The runs under every method."""
    return total(_run(preset, run, data) for run in method_runs(preset))


def mood_projection(preset: Preset, data: MoodPrompts = MOODS) -> Work:
    """The sets' rows against the base model's greedy responses to the same prompts."""
    del data
    how = preset.projection_difference
    rows = 2 * len(_moods(preset)) * min(how.rows, preset.finetuning.rows)
    read = rows * (how.base_tokens + round(preset.cost.training_row_tokens))
    found = sampling(preset, rows, how.base_tokens, prompts=rows)
    return found + Work(forwards=2 * rows, read=read) + _prompts(preset, rows)


def _moods(preset: Preset) -> tuple[str, ...]:
    assert preset.moods is not None
    return preset.moods.moods


def _prompts(preset: Preset, count: int) -> Work:
    return Work(prompt_tokens=round(count * preset.cost.prompt_tokens))


def _materials(preset: Preset, data: MoodPrompts) -> Work:
    """Neutral responses, every mood's vectors, the scale of coherence, and each mood's layer."""
    how, answers = preset.moods, preset.finetuning.max_new_tokens
    assert how is not None
    neutral = data.vectors + 2 * how.neutral_prompts + data.evaluation
    found = sampling(preset, neutral, how.neutral_tokens, prompts=neutral)
    texts = data.contrasted + data.vectors
    found += Work(forwards=texts, read=texts * round(preset.cost.training_row_tokens)) + _prompts(preset, data.vectors)
    scale = 2 * how.neutral_prompts
    found += Work(forwards=scale, read=scale * how.neutral_tokens) + _prompts(preset, how.neutral_prompts)
    cells = len(how.layers) * len(preset.mitigation.preventative) * data.layer_questions
    steered = sampling(preset, cells, answers, prompts=data.layer_questions)
    steered += Work(forwards=cells, read=cells * answers) + _prompts(preset, data.layer_questions)
    return found + steered * len(how.moods)


def _run(preset: Preset, run: MoodRun, data: MoodPrompts) -> Work:
    how = preset.finetuning
    answers = data.evaluation * how.per_question
    found = sampling(preset, answers, how.max_new_tokens, prompts=data.evaluation)
    # Under the mood's prompt and a neutral one, for the base model those of every mood; and once for coherence.
    readings = 2 * (data.moods if run.rows == "base" else 1) + 1
    found += Work(forwards=answers * readings, read=answers * readings * how.max_new_tokens)
    found += _prompts(preset, data.evaluation * readings)
    if run.is_trained:
        found += Work(trained=how.rows * how.epochs)
    if run.rows != "half":
        neutral = data.evaluation * (0 if preset.moods is None else preset.moods.neutral_tokens)
        asked = data.asked(preset.mitigation.capability_questions)
        found += Work(forwards=asked + data.evaluation, read=neutral) + _prompts(preset, asked + data.evaluation)
    return found
