"""The stages of a replication on moods: the finetuning study with a smaller plan, and its sets screened beforehand.

The moods of an installed data package stand in for the paper's datasets; a classifier that shares nothing with the
model scores them. `MOOD_STAGES` takes the place of the package's stages on the user's sets:
`replicate(preset, folder, extra_stages=MOOD_STAGES)`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from persona_lens.replication.context import Context, NotYet
from persona_lens.replication.counting import Counting, Work
from persona_lens.replication.pictures import (
    StagePicture,
    difference_pictures,
    mitigation_pictures,
    shift_pictures,
)
from persona_lens.replication.preset import Count, Preset, Table
from persona_lens.replication.reported_number import ReportedNumber
from persona_lens.replication.result import Replication
from persona_lens.replication.set_numbers import (
    TunedSet,
    finetuning_numbers,
    method_name,
    method_numbers,
    projection_numbers,
    screening_in,
)
from persona_lens.replication.stages import STAGES, Stage, whole
from persona_lens.screening.plan import RowChoice
from persona_lens.screening.run import screen
from studies.finetuning_materials import Materials, make_materials
from studies.finetuning_plan import WHILE_ANSWERING, Method, StudyRun, StudySettings
from studies.finetuning_result import FinetuningStudy, read_study
from studies.finetuning_study import finetuning_study
from studies.mood_texts import training_rows

PRESET = Path(__file__).parent / "presets" / "embedded.toml"
"""Three traits and three moods on the embedded model."""
TRAINED_BY_DEFAULT = {"rank": 32, "alpha": 64.0, "dropout": 0.0, "warmup_steps": 5, "weight_decay": 0.01}


class MoodsTable(Table):
    """The table `moods` of a preset: those that stand in for the paper's datasets; all of them are also mitigated."""

    moods: Annotated[tuple[str, ...], Field(min_length=1)]
    neutral_tokens: Count
    neutral_prompts: Count
    layers: Annotated[tuple[int, ...], Field(min_length=1)]


def moods_table(preset: Preset) -> MoodsTable:
    """The preset's moods, checked.

    Raises ValueError where it has none, or trains them otherwise than the study does.
    """
    if preset.finetuning.source != "moods":
        raise ValueError(f"preset {preset.name}: expected finetuning.source moods, got {preset.finetuning.source}.")
    for name, value in TRAINED_BY_DEFAULT.items():
        if getattr(preset.finetuning, name) != value:
            raise ValueError(f"the moods are always trained with {name} = {value}, leave it out")
    return MoodsTable.model_validate({name: _as_tuple(value) for name, value in (preset.moods or {}).items()})


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def study_settings(preset: Preset) -> StudySettings:
    """The preset as the study takes it: every mood is mitigated."""
    moods, how = moods_table(preset), preset.finetuning
    return StudySettings(
        rows=how.rows,
        epochs=how.epochs,
        learning_rate=how.learning_rate,
        batch_rows=how.batch_rows,
        accumulation=how.accumulation,
        max_length=how.max_length,
        per_question=how.per_question,
        max_new_tokens=how.max_new_tokens,
        neutral_tokens=moods.neutral_tokens,
        neutral_prompts=moods.neutral_prompts,
        mitigated=moods.moods,
        layers=moods.layers,
        post_hoc=preset.mitigation.post_hoc,
        preventative=preset.mitigation.preventative,
        all_layers=preset.mitigation.all_layers,
        capability_questions=preset.mitigation.capability_questions,
        seed=preset.seed,
    )


def plain_runs(preset: Preset) -> list[StudyRun]:
    """The base model, and every mood at both severities."""
    moods = moods_table(preset).moods
    return [StudyRun("", "base"), *(StudyRun(mood, rows) for rows in ("full", "half") for mood in moods)]


def method_runs(preset: Preset) -> list[StudyRun]:
    """Every mood under every way to hold it down."""
    how = preset.mitigation
    methods: list[tuple[Method, float]] = [
        *(("preventative", dose) for dose in how.preventative),
        *(("post-hoc", -dose) for dose in how.post_hoc),
        *(("preventative, all layers", dose) for dose in how.all_layers),
        *([("CAFT", 0.0)] if how.caft else []),
    ]
    return [StudyRun(mood, "full", *method) for mood in moods_table(preset).moods for method in methods]


def study_folder(folder: Path) -> Path:
    """Where the study on moods is."""
    return folder / "moods"


# What the stages do


def finetune_moods(run: Context) -> None:
    """Section 4: the base model and every set, trained, answered, scored, and their shifts."""
    _study(run, plain_runs(run.preset))


def mitigate_moods(run: Context) -> None:
    """Section 5: every mood under every way to hold it down."""
    _require_base(run)
    _study(run, method_runs(run.preset))


def _study(run: Context, runs: Sequence[StudyRun]) -> None:
    settings = study_settings(run.preset)
    finetuning_study(run.model, study_folder(run.folder), settings=settings, runs=runs, progress=run.progress)


def _require_base(run: Context) -> None:
    path = study_folder(run.folder) / "runs" / "base.json"
    if not path.exists():
        raise NotYet(f"{path} is not there: run the stage finetuning first.")


def screen_moods(run: Context) -> None:
    """Section 6: every set's rows against the base model's own greedy responses, at every layer that may be chosen."""
    _require_base(run)
    settings, how = study_settings(run.preset), run.preset.projection_difference
    materials: Materials | None = None
    for run_plan in plain_runs(run.preset):
        rows, output = run_plan.rows, study_folder(run.folder) / "screened" / run_plan.name
        if rows not in ("full", "half") or (output / "summary.json").exists():
            continue
        materials = materials or make_materials(run.model, settings, study_folder(run.folder), progress=run.progress)
        chats = training_rows(materials.split, run_plan.mood, rows, materials.neutral, settings.rows, settings.seed)
        screen(
            run.model,
            {run_plan.name: chats},
            [materials.vectors[name].at(layer) for name in materials.vectors for layer in settings.layers],
            output_dir=output,
            max_new_tokens=how.base_tokens,
            rows=RowChoice(sample=how.rows, seed=run.preset.seed),
            progress=run.progress,
        )


# What they cost: the study takes a model and not an engine, so that its parts are counted here


@dataclass(frozen=True)
class MoodPrompts:
    """How many prompts and texts the parts of the mood data have."""

    vectors: int = 109
    evaluation: int = 36
    contrasted: int = 735
    moods: int = 9
    layer_questions: int = 12
    multiple_choice: int = 273


PROMPTS = MoodPrompts()


def count_finetuning(counting: Counting) -> None:
    """What all runs share, and the plain runs: trained, answered, scored, their shifts and what they still can."""
    _count_materials(counting, PROMPTS)
    for run in plain_runs(counting.preset):
        _count_run(counting, run, PROMPTS)
        counting.engine.read(2 * PROMPTS.evaluation, prompts=2 * PROMPTS.evaluation)


def count_mitigation(counting: Counting) -> None:
    """The runs under every method."""
    for run in method_runs(counting.preset):
        _count_run(counting, run, PROMPTS)


def count_projection(counting: Counting) -> None:
    """The sets' rows against the base model's greedy responses to the same prompts."""
    preset, engine = counting.preset, counting.engine
    how = preset.projection_difference
    rows = 2 * len(moods_table(preset).moods) * min(how.rows, preset.finetuning.rows)
    engine.answer(rows, how.base_tokens, prompts=rows)
    engine.read(rows, how.base_tokens, prompts=rows)
    engine.read(rows, round(preset.cost.training_row_tokens))


def _count_materials(counting: Counting, data: MoodPrompts) -> None:
    """Neutral responses, every mood's vectors, the scale of coherence, and each mood's layer."""
    preset, engine = counting.preset, counting.engine
    how, limit = moods_table(preset), preset.finetuning.max_new_tokens
    neutral = data.vectors + 2 * how.neutral_prompts + data.evaluation
    engine.answer(neutral, how.neutral_tokens, prompts=neutral)
    texts = data.contrasted + data.vectors
    engine.read(texts, round(preset.cost.training_row_tokens), prompts=data.vectors)
    engine.read(2 * how.neutral_prompts, how.neutral_tokens, prompts=how.neutral_prompts)
    cells = len(how.layers) * len(preset.mitigation.preventative) * data.layer_questions
    for _ in how.moods:
        engine.answer(cells, limit, prompts=data.layer_questions)
        engine.read(cells, limit, prompts=data.layer_questions)


def _count_run(counting: Counting, run: StudyRun, data: MoodPrompts) -> None:
    preset, engine = counting.preset, counting.engine
    how, wanted = preset.finetuning, preset.mitigation.capability_questions
    answers = data.evaluation * how.per_question
    engine.answer(answers, how.max_new_tokens, prompts=data.evaluation)
    # Under the mood's prompt and a neutral one, for the base model those of every mood; and once for coherence.
    readings = 2 * (data.moods if run.rows == "base" else 1) + 1
    engine.read(answers * readings, how.max_new_tokens, prompts=data.evaluation * readings)
    if run.rows != "base" and (run.method == "none" or run.method not in WHILE_ANSWERING):
        engine.work += Work(trained=how.rows * how.epochs)
    if run.rows != "half":
        # Every so manyth of the multiple-choice questions, and the model's own neutral answers.
        questions = -(-data.multiple_choice // (data.multiple_choice // wanted))
        engine.read(questions, prompts=questions)
        engine.read(data.evaluation, moods_table(preset).neutral_tokens, prompts=data.evaluation)


# What the numbers say


def mood_study(folder: Path) -> FinetuningStudy | None:
    """The moods' study as far as it has come; None where it has not begun."""
    has_begun = (study_folder(folder) / "runs" / "base.json").exists()
    return read_study(study_folder(folder)) if has_begun else None


def mood_sets(preset: Preset, folder: Path) -> list[TunedSet]:
    """Every finished set, the base model first."""
    study = mood_study(folder)
    if study is None:
        return []
    moods = moods_table(preset).moods
    sets: list[TunedSet] = []
    for tuned in sorted(study.sets, key=lambda tuned: (tuned.run.rows != "base", tuned.run.name)):
        shifts = {vector: tuned.shift(vector, study.layer) for vector in moods}
        scores = {mood: tuned.score(mood) for mood in moods}
        rows = screening_in(study_folder(folder) / "screened" / tuned.run.name)
        version = "" if tuned.run.rows == "base" else tuned.run.rows
        by_mood = dict.fromkeys(moods, shifts)
        sets.append(TunedSet(tuned.run.name, tuned.run.mood, version, scores, by_mood, rows, study.layer))
    return sets


def other_moods(mood: str, sets: Sequence[TunedSet]) -> tuple[TunedSet | None, list[TunedSet]]:
    """A mood's full set against those of the other moods."""
    full = [tuned for tuned in sets if tuned.version == "full"]
    worst = next((tuned for tuned in full if tuned.made_for == mood), None)
    return worst, [tuned for tuned in full if tuned.made_for != mood]


def mood_mitigation(preset: Preset, folder: Path) -> Iterator[ReportedNumber]:
    """The score under every method, with coherence, capability, and the paired difference from no method."""
    study = mood_study(folder)
    if study is None:
        return
    for mood in moods_table(preset).moods:
        plain = study.runs.get(f"{mood}_full")
        own = [run for run in study.runs.values() if run.run.mood == mood and run.run.rows == "full"]
        if plain is None or len(own) < 2:
            continue
        for run in own:
            method = method_name(run.run.method, run.run.coefficient)
            yield from method_numbers(mood, method, run.own, run.coherence, run.accuracy)
            if run is not plain:
                what, difference = f"{method}: score minus that without it", study.difference(run, plain)
                yield ReportedNumber("mitigation.difference", mood, what, difference, "questions", method)


def _shift_pictures(replication: Replication) -> Iterator[StagePicture]:
    return shift_pictures(replication, mood_sets(replication.preset, replication.folder))


def _difference_pictures(replication: Replication) -> Iterator[StagePicture]:
    return difference_pictures(replication, mood_sets(replication.preset, replication.folder))


_HEADINGS = {stage.name: stage.heading for stage in STAGES}
_MOODS = {"moodswapper": "pip install --no-deps moodswapper==26.9.21"}
_TRAINING = {
    "peft": 'pip install "persona-lens[finetune]"',
    "lm_eval": "pip install --no-deps lm-eval==0.4.13",
    **_MOODS,
}
_mood_stage = partial(Stage, judged_by="a text classifier of each mood")

MOOD_STAGES: tuple[Stage, ...] = (
    _mood_stage(
        "finetuning",
        _HEADINGS["finetuning"],
        whole(finetune_moods),
        packages=_TRAINING,
        numbers=lambda preset, folder: finetuning_numbers(mood_sets(preset, folder), preset.seed),
        pictures=_shift_pictures,
        count=count_finetuning,
    ),
    _mood_stage(
        "projection-difference",
        _HEADINGS["projection-difference"],
        whole(screen_moods),
        packages=_MOODS,
        numbers=lambda preset, folder: projection_numbers(mood_sets(preset, folder), preset.seed, other_moods),
        pictures=_difference_pictures,
        count=count_projection,
    ),
    _mood_stage(
        "mitigation",
        _HEADINGS["mitigation"],
        whole(mitigate_moods),
        packages=_TRAINING,
        numbers=mood_mitigation,
        pictures=mitigation_pictures,
        count=count_mitigation,
    ),
)
