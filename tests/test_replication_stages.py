"""Every stage on a tiny model: what it does is what was planned, and what it leaves is a whole report."""

import shutil

import pytest

from persona_lens.replication.page import write_replication_report
from persona_lens.replication.plan import Rates, measure_rates, plan_replication
from persona_lens.replication.run import replicate
from persona_lens.replication.stages import STAGES, Stage
from persona_lens.storage.files import JsonLines
from tests.replication_cases import bring_sets, bring_the_rest, cut, exact, make_tiny, report, run_stages, tiny_preset

NAMES = tuple(stage.name for stage in STAGES)


@pytest.fixture(scope="module")
def finished(tiny_bridge, tmp_path_factory):
    """A finished replication: its preset, the folder of the user's data, and the work of each of its stages."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("replication")
    with pytest.MonkeyPatch.context() as patch:
        make_tiny(patch)
        preset = tiny_preset(folder)
        bring_sets(folder)
        bring_the_rest(folder)
        yield preset, folder, run_stages(preset, folder, tiny_bridge, NAMES)


@pytest.mark.parametrize("stage", NAMES)
def test_a_stage_does_what_its_plan_says(finished, stage):
    preset, folder, counts = finished
    (cost,) = plan_replication(preset, folder, only=[stage]).stages
    assert counts[stage] == exact(cost.work)


def test_a_run_that_was_interrupted_in_every_stage_goes_on_to_an_equal_report(finished, tiny_bridge, tmp_path):
    preset, data, _ = finished
    folder = tmp_path / "run"
    shutil.copytree(data / "run", folder)
    trait, grid = folder / "traits" / "grumpy", folder / "grid"
    for name in ("summary.json", "layer_sweep.json", "dose_response.json", "row_means.npy"):
        (trait / name).unlink()
    for path in trait.glob("*.jsonl"):
        cut(path)
    for path in (folder / "monitoring").glob("*"):
        (path / "experiment.json").unlink()
        cut(path / "rollouts.jsonl")
    (grid / "runs" / "sums_normal.json").unlink()
    shutil.rmtree(grid / "adapters" / "sums_normal")
    cut(grid / "answers" / "sums_normal_grumpy" / "rollouts.jsonl")
    next((grid / "mitigation").glob("*CAFT*")).unlink()
    (grid / "screened" / "sums_normal" / "summary.json").unlink()
    shutil.rmtree(folder / "stages")
    cut(folder / "times.jsonl")
    replicate(preset, folder, model=tiny_bridge, data=data, progress=False)
    assert report(folder) == report(data / "run")
    assert {row["stage"] for row in JsonLines(folder / "times.jsonl").read()} >= {"extraction", "mitigation"}


def test_the_report_says_what_every_stage_was_made_with(finished):
    stages = report(finished[1] / "run")["stages"]
    assert all(stages[name]["findings"] for name in NAMES)
    assert all(stages[name]["record"]["seed"] == 0 for name in NAMES)
    assert stages["extraction"]["record"]["judges"]["grumpy"].startswith("likelihood ratio by")
    assert set(stages["extraction"]["record"]["versions"]) >= {"python", "torch", "transformer-lens"}


def test_another_preset_is_refused_in_the_same_folder(finished, tiny_bridge, tmp_path):
    other = tiny_preset(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"another seed \(0, now 1\): choose another folder"):
        replicate(other, finished[1] / "run", model=tiny_bridge, progress=False)


def test_a_stage_whose_need_is_not_met_fails_alone_and_says_what_to_run(tiny_bridge, tmp_path):
    settings = {"model": tiny_bridge, "only": ["layers"], "data": tmp_path, "progress": False}
    failures = replicate(tiny_preset(tmp_path), tmp_path / "run", **settings).failures
    assert list(failures) == ["layers, grumpy"]
    assert "run the stage extraction first" in failures["layers, grumpy"]


def test_an_extra_stage_runs_after_the_others_and_stands_in_the_report(tiny_bridge, tmp_path):
    from persona_lens.replication.reported_number import ReportedNumber, without_interval

    def leave(run):
        run.once(run.folder / "count.json", lambda: {"count": 3})

    stage = Stage(
        "counting",
        "Counted",
        lambda run: {"all": lambda: leave(run)},
        numbers=lambda _, folder: [ReportedNumber("count", "all", "a count", without_interval(3.0))],
        count=lambda counting: counting.engine.read(7),
    )
    preset, settings = tiny_preset(tmp_path), {"only": ["counting"], "data": tmp_path}
    assert plan_replication(preset, tmp_path, only=["counting"], extra=[stage]).work.forwards == 7
    found = replicate(preset, tmp_path / "run", model=tiny_bridge, extra_stages=[stage], progress=False, **settings)
    assert (tmp_path / "run" / "count.json").exists()
    assert [number.what for number in found.all_numbers] == ["a count"]
    assert list(report(tmp_path / "run")["stages"]) == [*NAMES, "counting"]


def test_a_model_of_another_depth_is_refused(tiny_bridge, tmp_path):
    preset = tiny_preset(tmp_path, model={"name": "tiny", "n_layers": 5})
    with pytest.raises(ValueError, match=r"key model\.n_layers: expected the 4 layers of"):
        replicate(preset, tmp_path / "run", model=tiny_bridge, data=tmp_path, progress=False)


def test_the_page_and_the_markdown_have_the_numbers_of_the_report(finished):
    pytest.importorskip("plotly")
    from html import escape

    folder = finished[1] / "run"
    page = write_replication_report(folder).read_text(encoding="utf-8")
    text = (folder / "report.md").read_text(encoding="utf-8")
    for stage in STAGES:
        assert stage.heading in text
        assert escape(report(folder)["stages"][stage.name]["findings"][0]["what"]) in page
    assert "https://" not in page.split("<body", 1)[1].split("<script", 1)[0].replace("https://arxiv.org", "")
    assert page.count("Plotly.newPlot") >= 9


def test_rates_of_a_machine_are_positive_and_training_scales_with_reading(tiny_bridge):
    rates = measure_rates(tiny_bridge, Rates(10.0, 20.0, 5.0, "stated", True))
    assert rates.decoding > 0
    assert rates.training == pytest.approx(rates.reading / 4)
