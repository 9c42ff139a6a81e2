"""The stages on moods on a tiny model: they do what was planned, resume, and leave a whole report."""

import shutil

import pytest

from persona_lens.replication.page import write_replication_report
from persona_lens.replication.plan import plan_replication
from persona_lens.replication.preset import load_preset
from persona_lens.replication.result import Replication
from persona_lens.replication.run import replicate
from persona_lens.storage.files import JsonLines
from studies import mood_stages
from studies.finetuning_materials import best_cell
from studies.mood_stages import MOOD_STAGES, PRESET, MoodPrompts, moods_table
from studies.mood_texts import contrast_with_moods
from studies.moods import MOODS, split_prompts
from studies.tests.mood_replication_cases import made_up_moods, make_tiny_moods, mood_preset
from tests.replication_cases import cut, exact, report, run_stages

BEFORE = ("extraction", "layers", "dose-response", "monitoring", "cosines")
ON_MOODS = tuple(stage.name for stage in MOOD_STAGES)


@pytest.fixture(scope="module")
def on_moods(tiny_bridge, tmp_path_factory):
    """A finished replication on moods: its preset, folder, and the work of each of its stages."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("moods")
    with pytest.MonkeyPatch.context() as patch:
        make_tiny_moods(patch)
        preset = mood_preset(folder)
        counts = run_stages(preset, folder, tiny_bridge, (*BEFORE, *ON_MOODS), extra_stages=MOOD_STAGES)
        yield preset, folder / "run", counts


@pytest.mark.parametrize("stage", ON_MOODS)
def test_a_stage_does_what_its_plan_says(on_moods, stage, monkeypatch):
    preset, _, counts = on_moods
    split = split_prompts(made_up_moods(), 0)
    texts = {row.response for mood in MOODS for side in contrast_with_moods(split, mood)[:2] for row in side}
    data = MoodPrompts(len(split.vectors), len(split.evaluation), len(texts), multiple_choice=4)
    monkeypatch.setattr(mood_stages, "PROMPTS", data)
    (cost,) = plan_replication(preset, only=[stage], extra=MOOD_STAGES).stages
    assert counts[stage] == exact(cost.work)


def test_a_run_that_was_interrupted_in_every_stage_goes_on_to_an_equal_report(on_moods, tiny_bridge, tmp_path):
    preset, finished, _ = on_moods
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    moods = folder / "moods"
    for name in ("happy_half.json", "happy_full_CAFT.json"):
        (moods / "runs" / name).unlink()
    shutil.rmtree(moods / "adapters" / "happy_half")
    cut(moods / "answers" / "happy_half.jsonl")
    (moods / "layers.json").unlink()
    for path in (moods / "screened" / "happy_full").glob("*.parquet"):
        path.unlink()
    (moods / "screened" / "happy_full" / "summary.json").unlink()
    shutil.rmtree(folder / "stages")
    replicate(preset, folder, model=tiny_bridge, extra_stages=MOOD_STAGES, progress=False)
    assert report(folder) == report(finished)
    assert {row["stage"] for row in JsonLines(folder / "times.jsonl").read()} >= {"extraction", "mitigation"}


def test_the_report_has_every_stage_on_moods_and_their_pictures(on_moods):
    pytest.importorskip("plotly")
    _, folder, _ = on_moods
    page = write_replication_report(folder, extra_stages=MOOD_STAGES).read_text(encoding="utf-8")
    stages = report(folder)["stages"]
    assert [stage for stage, each in stages.items() if each["findings"]] == [*BEFORE, *ON_MOODS]
    assert all(stages[stage]["record"]["seed"] == 0 for stage in ON_MOODS)
    assert page.count("Plotly.newPlot") >= 8
    assert "a text classifier of each mood" in (folder / "report.md").read_text(encoding="utf-8")


def test_the_package_alone_reads_a_finished_folders_numbers_of_moods_from_its_report(on_moods):
    _, folder, _ = on_moods
    ours, alone = Replication.load(folder, extra_stages=MOOD_STAGES), Replication.load(folder)
    assert alone.all_numbers == ours.all_numbers
    assert alone.as_json() == ours.as_json()


def test_the_package_alone_leaves_the_stages_on_moods_out_and_says_what_runs_them():
    plan = plan_replication(load_preset(PRESET), only=ON_MOODS)
    assert all("python -m studies.replicate" in cost.left_out for cost in plan.stages)


def test_the_studies_preset_fits_in_ninety_minutes_and_in_full_takes_seven_traits_and_nine_moods():
    preset = load_preset(PRESET)
    in_full = preset.in_full()
    assert plan_replication(preset, extra=MOOD_STAGES).seconds < 90 * 60
    assert plan_replication(in_full, extra=MOOD_STAGES).seconds > 2 * 85 * 60
    assert (len(in_full.traits), len(moods_table(in_full).moods)) == (7, 9)


def test_moods_that_are_trained_otherwise_than_the_study_does_are_refused(tmp_path):
    changed = tmp_path / "mine.toml"
    changed.write_text(PRESET.read_text(encoding="utf-8").replace("batch_rows = 4", "batch_rows = 4\nrank = 8", 1))
    with pytest.raises(ValueError, match="always trained with rank = 32"):
        moods_table(load_preset(changed))


@pytest.mark.soak
def test_more_moods_are_added_to_what_is_there(on_moods, tiny_bridge, tmp_path):
    preset, finished, _ = on_moods
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    runs = folder / "moods" / "runs"
    before = {path.name: path.read_bytes() for path in runs.glob("*.json")}
    how = {"full": True, "only": ["finetuning"], "extra_stages": MOOD_STAGES, "progress": False}
    assert replicate(preset, folder, model=tiny_bridge, **how).failures == {}
    after = {path.name: path.read_bytes() for path in runs.glob("*.json")}
    assert before.items() <= after.items()
    assert set(after) - set(before) == {"bored_full.json", "bored_half.json"}


def test_the_best_steered_cell_is_a_coherent_one_that_has_a_score():
    cells = [{"trait": None, "coherence": 99.0}, {"trait": 9.0, "coherence": 10.0}, {"trait": 5.0, "coherence": 80.0}]
    assert best_cell("happy", cells) == cells[2]
    assert best_cell("happy", cells[:2]) == cells[1]
    with pytest.raises(ValueError, match="no answer of 1 steered cells has a score"):
        best_cell("happy", cells[:1])
