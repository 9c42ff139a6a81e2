"""Every stage on a tiny model: what it does is what was planned, and what it leaves is a whole report."""

import json
import shutil

import pytest

from persona_lens.storage.files import JsonLines
from tests.replication_cases import (
    Counted,
    bring_the_rest,
    datasets_preset,
    exact,
    made_up_moods,
    make_tiny,
    tiny_preset,
)

ON_MOODS = (
    "extraction",
    "layers",
    "dose-response",
    "monitoring",
    "cosines",
    "finetuning",
    "projection-difference",
    "mitigation",
)
ON_SETS = ("finetuning", "projection-difference", "mitigation", "new-facts", "real-chats", "benchmarks")


@pytest.fixture(scope="module")
def babble():
    """Every response has its full length, as a plan counts it; what a random model says passes for coherent.

    The moods are made up, and so are the multiple-choice questions: real ones exceed the tiny context.
    """
    pytest.importorskip("peft")
    with pytest.MonkeyPatch.context() as patch:
        make_tiny(patch)
        yield


def run_stages(preset, folder, model, stages):
    """The work that each stage really did, after it was run by itself."""
    from persona_lens.replication.run import replicate

    counts = {}
    for stage in stages:
        with pytest.MonkeyPatch.context() as patch:
            counted = Counted(patch)
            found = replicate(preset, folder / "run", model=model, only=[stage], data=folder, progress=False)
            assert found.failures == {}
            counts[stage] = exact(counted.work)
    return counts


@pytest.fixture(scope="module")
def on_moods(babble, tiny_bridge, tmp_path_factory):
    """A finished replication on moods: its preset, folder, and the work of each of its stages."""
    folder = tmp_path_factory.mktemp("moods")
    preset = tiny_preset(folder)
    return preset, folder / "run", run_stages(preset, folder, tiny_bridge, ON_MOODS)


@pytest.fixture(scope="module")
def on_sets(on_moods, tiny_bridge, tmp_path_factory):
    """One on the user's own sets, whose trait was measured already."""
    folder = tmp_path_factory.mktemp("sets")
    preset = datasets_preset(folder)
    bring_the_rest(folder)
    shutil.copytree(on_moods[1] / "traits", folder / "run" / "traits")
    return preset, folder / "run", run_stages(preset, folder, tiny_bridge, ON_SETS)


@pytest.mark.parametrize("stage", ON_MOODS)
def test_a_stage_does_what_its_plan_says(on_moods, stage, monkeypatch):
    from persona_lens.experiments.mood_texts import contrast_with_moods
    from persona_lens.experiments.moods import MOODS, split_prompts
    from persona_lens.replication import mood_work, work

    preset, _, counts = on_moods
    split = split_prompts(made_up_moods(), 0)
    texts = {row.response for mood in MOODS for side in contrast_with_moods(split, mood)[:2] for row in side}
    data = mood_work.MoodPrompts(len(split.vectors), len(split.evaluation), len(texts), multiple_choice=4)
    for name in ("mood_finetuning", "mood_mitigation", "mood_projection"):
        planned = getattr(work, name)
        monkeypatch.setattr(work, name, lambda preset, planned=planned: planned(preset, data))
    assert counts[stage] == exact(work.stage_work(preset, stage, {}))


@pytest.mark.soak
@pytest.mark.parametrize("stage", ON_SETS)
def test_a_stage_on_the_users_sets_does_what_its_plan_says(on_sets, stage):
    from persona_lens.replication.brought import brought
    from persona_lens.replication.work import stage_work

    preset, folder, counts = on_sets
    assert counts[stage] == exact(stage_work(preset, stage, brought(preset, folder.parent)))


def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def cut(path, share=0.6):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


def test_a_run_that_was_interrupted_in_every_stage_goes_on_to_an_equal_report(on_moods, tiny_bridge, tmp_path):
    from persona_lens.replication.run import replicate

    preset, finished, _ = on_moods
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    trait, moods = folder / "traits" / "grumpy", folder / "moods"
    for name in ("summary.json", "layer_sweep.json", "dose_response.json", "row_means.npy"):
        (trait / name).unlink()
    for path in trait.glob("*.jsonl"):
        cut(path)
    for path in (folder / "monitoring").glob("*"):
        (path / "experiment.json").unlink()
        cut(path / "rollouts.jsonl")
    for name in ("happy_half.json", "happy_full_CAFT.json"):
        (moods / "runs" / name).unlink()
    shutil.rmtree(moods / "adapters" / "happy_half")
    cut(moods / "answers" / "happy_half.jsonl")
    (moods / "layers.json").unlink()
    for path in (moods / "screened" / "happy_full").glob("*.parquet"):
        path.unlink()
    (moods / "screened" / "happy_full" / "summary.json").unlink()
    shutil.rmtree(folder / "stages")
    cut(folder / "times.jsonl")
    replicate(preset, folder, model=tiny_bridge, progress=False)
    assert report(folder) == report(finished)
    assert {row["stage"] for row in JsonLines(folder / "times.jsonl").read()} >= {"extraction", "mitigation"}


def test_the_report_has_every_stage_and_says_what_was_left_out(on_moods):
    found = report(on_moods[1])["stages"]
    assert [stage for stage, each in found.items() if each["findings"]] == list(ON_MOODS)
    assert {stage for stage, each in found.items() if each["left_out"]} == {"new-facts", "real-chats", "benchmarks"}
    assert all(found[stage]["record"]["seed"] == 0 for stage in ON_MOODS)
    assert found["extraction"]["record"]["judges"]["grumpy"].startswith("likelihood ratio by")
    assert set(found["extraction"]["record"]["versions"]) >= {"python", "torch", "transformer-lens"}


@pytest.mark.soak
def test_more_moods_are_added_to_what_is_there(on_moods, tiny_bridge, tmp_path):
    from persona_lens.replication.run import replicate

    preset, finished, _ = on_moods
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path.name: path.read_bytes() for path in (folder / "moods" / "runs").glob("*.json")}
    assert preset.full.moods == ("happy", "bored")
    found = replicate(preset, folder, model=tiny_bridge, full=True, only=["finetuning"], progress=False)
    assert found.failures == {}
    after = {path.name: path.read_bytes() for path in (folder / "moods" / "runs").glob("*.json")}
    assert before.items() <= after.items()
    assert set(after) - set(before) == {"bored_full.json", "bored_half.json"}


def test_another_preset_is_refused_in_the_same_folder(on_moods, tiny_bridge, tmp_path):
    from persona_lens.replication.run import replicate

    _, finished, _ = on_moods
    other = tiny_preset(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"another seed \(0, now 1\): choose another folder"):
        replicate(other, finished, model=tiny_bridge, progress=False)


def test_a_stage_whose_need_is_not_met_fails_alone_and_says_what_to_run(tiny_bridge, tmp_path):
    from persona_lens.replication.run import replicate

    found = replicate(tiny_preset(tmp_path), tmp_path / "run", model=tiny_bridge, only=["layers"], progress=False)
    assert list(found.failures) == ["layers, grumpy"]
    assert "run the stage extraction first" in found.failures["layers, grumpy"]


def test_a_model_of_another_depth_is_refused(tiny_bridge, tmp_path):
    from persona_lens.replication.run import replicate

    preset = tiny_preset(tmp_path, model={"name": "tiny", "n_layers": 5})
    with pytest.raises(ValueError, match=r"key model\.n_layers: expected the 4 layers of"):
        replicate(preset, tmp_path / "run", model=tiny_bridge, progress=False)


@pytest.mark.parametrize("kind", ["on_moods", pytest.param("on_sets", marks=pytest.mark.soak)])
def test_the_page_and_the_markdown_have_the_numbers_of_the_report(kind, request):
    pytest.importorskip("plotly")
    from html import escape as escaped

    from persona_lens.replication import wording
    from persona_lens.replication.page import write_replication_report

    _, folder, _ = request.getfixturevalue(kind)
    page = write_replication_report(folder).read_text(encoding="utf-8")
    told = (folder / "report.md").read_text(encoding="utf-8")
    for stage, each in report(folder)["stages"].items():
        assert wording.HEADINGS[stage] in told
        assert not each["findings"] or escaped(each["findings"][0]["what"]) in page
    assert "https://" not in page.split("<body", 1)[1].split("<script", 1)[0].replace("https://arxiv.org", "")
    assert page.count("Plotly.newPlot") >= 5


def test_rates_of_a_machine_are_positive_and_training_scales_with_reading(tiny_bridge):
    from persona_lens.replication.cost import Rates
    from persona_lens.replication.rates import measure_rates

    expected = Rates(10.0, 20.0, 5.0, "stated", True)
    found = measure_rates(tiny_bridge, expected)
    assert found.decoding > 0
    assert found.training == pytest.approx(found.reading / 4)
