"""The stages on moods: the finetuning study with a smaller plan, and its sets screened before training.

The moods of an installed data package stand in for the paper's datasets; a classifier that shares nothing with the
model scores them. Knows nothing about what the numbers say.
"""

from collections.abc import Sequence
from pathlib import Path

from persona_lens.experiments.finetuning_materials import Materials, make_materials
from persona_lens.experiments.finetuning_plan import StudyRun, StudySettings
from persona_lens.experiments.finetuning_study import finetuning_study
from persona_lens.experiments.mood_texts import Severity, training_rows
from persona_lens.replication.context import Context, NotYet
from persona_lens.replication.mood_work import MoodRun, method_runs, plain_runs
from persona_lens.replication.preset import Preset
from persona_lens.screening.plan import RowChoice
from persona_lens.screening.run import screen


def study_settings(preset: Preset) -> StudySettings:
    """The preset as the study takes it: every mood is mitigated."""
    moods, how = preset.moods, preset.finetuning
    assert moods is not None
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


def study_folder(folder: Path) -> Path:
    """Where the study on moods is."""
    return folder / "moods"


def screen_folder(folder: Path, name: str) -> Path:
    """Where a set's screening is."""
    return study_folder(folder) / "screened" / name


def finetune_moods(run: Context) -> None:
    """Section 4: the base model and every set, trained, answered, scored, and their shifts."""
    _study(run, plain_runs(run.preset))


def mitigate_moods(run: Context) -> None:
    """Section 5: every mood under every way to hold it down."""
    _require_base(run)
    _study(run, method_runs(run.preset))


def _study(run: Context, runs: Sequence[MoodRun]) -> None:
    finetuning_study(
        run.model,
        study_folder(run.folder),
        settings=study_settings(run.preset),
        runs=[StudyRun(*each) for each in runs],
        progress=run.progress,
    )


def _require_base(run: Context) -> None:
    path = study_folder(run.folder) / "runs" / "base.json"
    if not path.exists():
        raise NotYet(f"{path} is not there: run the stage finetuning first.")


def screen_moods(run: Context) -> None:
    """Section 6: every set's rows against the base model's own greedy responses, at every layer that may be chosen."""
    _require_base(run)
    settings, how = study_settings(run.preset), run.preset.projection_difference
    materials: Materials | None = None
    for mood, rows in [(each.mood, each.rows) for each in plain_runs(run.preset)]:
        output = screen_folder(run.folder, f"{mood}_{rows}")
        if rows not in ("full", "half") or (output / "summary.json").exists():
            continue
        materials = materials or make_materials(run.model, settings, study_folder(run.folder), progress=run.progress)
        screen(
            run.model,
            {f"{mood}_{rows}": set_chats(materials, settings, mood, rows)},
            [materials.vectors[name].at(layer) for name in materials.vectors for layer in settings.layers],
            output_dir=output,
            max_new_tokens=how.base_tokens,
            rows=RowChoice(sample=how.rows, seed=run.preset.seed),
            progress=run.progress,
        )


def set_chats(materials: Materials, settings: StudySettings, mood: str, severity: Severity) -> list[dict[str, object]]:
    """A set's rows, as the study trains on them."""
    return training_rows(materials.split, mood, severity, materials.neutral, settings.rows, settings.seed)
