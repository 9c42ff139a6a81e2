"""What the user brings, the plan and its cost, and the paper's numbers: all that needs no model."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from scipy import stats

from persona_lens.replication import set_findings
from persona_lens.replication.preset import Preset
from persona_lens.replication.set_findings import benchmark_findings, finetuning_findings, measured_sets
from tests.replication_cases import bring_the_rest, datasets_preset


def test_dry_run_needs_no_torch_and_prints_every_stage():
    program = (
        "import sys\n"
        "from persona_lens.cli import main\n"
        "sys.argv = ['persona-lens', 'replicate', '--preset', 'qwen2.5-7b', '--output', 'nowhere', '--dry-run']\n"
        "try:\n    main()\nexcept SystemExit as stopped:\n    assert not stopped.code, stopped.code\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch', 'transformers', 'transformer_lens', 'numpy', 'pandas'}, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "extraction" in done.stdout
    assert "assumed, not measured" in done.stdout
    assert "Left out, finetuning: data/finetuning is not there (section D)" in done.stdout


def test_dry_run_as_json_is_the_plan(cli, tmp_path):
    code, out, _ = cli("replicate", "--preset", "embedded", "--output", tmp_path / "run", "--dry-run", "--json")
    assert code == 0
    plan = json.loads(out)
    assert sum(each["seconds"] for each in plan["stages"]) == pytest.approx(plan["seconds"])
    assert not (tmp_path / "run").exists()


def test_only_plans_the_stages_that_are_named_and_refuses_others(cli, tmp_path):
    some = ["replicate", "--preset", "embedded", "--output", tmp_path / "run", "--dry-run", "--json"]
    _, out, _ = cli(*some, "--only", "monitoring", "--only", "layers")
    assert [each["stage"] for each in json.loads(out)["stages"]] == ["layers", "monitoring"]
    code, _, told = cli(*some, "--only", "monitor")
    assert code == 2
    assert "got monitor" in told


def test_the_embedded_preset_fits_in_ninety_minutes_by_measured_rates():
    from persona_lens.replication.cost import plan_replication
    from persona_lens.replication.preset import load_preset

    plan = plan_replication(load_preset("embedded"), {})
    assert plan.rates.is_measured
    assert plan.seconds < 90 * 60
    in_full = load_preset("embedded").in_full()
    assert plan_replication(in_full, {}).seconds > 2 * plan.seconds
    assert (len(in_full.traits), len(in_full.moods.moods)) == (7, 9)
    assert in_full.description.startswith("Seven traits and nine moods")


def test_seconds_are_tokens_over_rates_and_the_waiting_for_the_judge(tmp_path):
    from persona_lens.replication.cost import Rates, seconds_of
    from persona_lens.replication.preset import load_preset
    from persona_lens.replication.units import Work

    preset = load_preset("qwen2.5-7b")  # a share of .35, rows of 350 tokens, 20 calls at a time
    rates = Rates(10.0, 20.0, 5.0, "stated", True)
    work = Work(generated=1000, read=400, prompt_tokens=60, trained=2, calls=40)
    assert seconds_of(work, preset, rates) == pytest.approx(35 + (140 + 60) / 20 + 700 / 5 + 2)


def test_assumed_rates_follow_from_the_models_size():
    from persona_lens.replication.cost import rates_of
    from persona_lens.replication.preset import load_preset

    found = rates_of(load_preset("qwen2.5-7b"))
    assert found.reading == pytest.approx(312e12 * 0.4 / (2 * 7.6e9))
    assert found.training == pytest.approx(312e12 * 0.3 / (4 * 7.6e9))
    assert not found.is_measured
    assert found.how.startswith("assumed, not measured")


def test_what_is_brought_is_found_and_what_is_not_is_left_out(tmp_path):
    from persona_lens.replication.brought import brought, missing_for

    preset = datasets_preset(tmp_path)
    there = brought(preset, tmp_path)
    assert there["finetuning"].is_there
    assert missing_for("finetuning", there, preset) == ""
    assert "chats.jsonl is not there (section L)" in missing_for("real-chats", there, preset)
    bring_the_rest(tmp_path)
    again = brought(preset, tmp_path)
    assert all(missing_for(stage, again, preset) == "" for stage in ("real-chats", "new-facts", "benchmarks"))


@pytest.mark.parametrize(
    ("path", "text", "sentence"),
    [
        ("sets/sums/normal.jsonl", None, "normal.jsonl is missing, while"),
        ("sets/sums/normal.jsonl", "", "normal.jsonl is empty"),
        ("sets/sums/normal.jsonl", '{"text": "no"}\n', "normal.jsonl, line 1: it has no messages"),
        ("sets/sums/normal.jsonl", "no\n", "line 1: expected a JSON object, got 'no"),
        ("new_facts/questions.jsonl", '{"question": "Is it?"}\n', "questions.jsonl, line 1: it has no choices"),
        ("benchmarks.jsonl", '{"trait": "a", "set": "b", "score": "c"}\n', "score is 'c', no number"),
        (
            "chats.jsonl",
            '{"messages": [{"role": "user", "content": "Hi"}]}\n',
            "no message is by the assistant (roles ['user'])",
        ),
    ],
)
def test_what_is_brought_wrong_is_one_sentence_before_anything_is_spent(tmp_path, path, text, sentence):
    from persona_lens.replication.brought import brought

    preset = datasets_preset(tmp_path)
    bring_the_rest(tmp_path)
    if text is None:
        (tmp_path / path).unlink()
    else:
        (tmp_path / path).write_text(text, encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        brought(preset, tmp_path)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_papers_numbers_are_found_by_figure_trait_and_model():
    from persona_lens.replication.paper import paper_figure

    def number(*what):
        return str(paper_figure(*what))

    assert number("finetuning.shift", "evil", "", "Llama-3.1-8B-Instruct") == "0.93"
    assert number("finetuning.shift", "evil", "", "Qwen2.5-7B-Instruct") == "0.826"
    assert number("finetuning.shift", "evil", "", "") == "0.826"
    assert number("projection.shift", "hallucinating", "", "") == "0.408 to 0.593"
    assert number("projection.shift", "happy", "", "") == "0.745 to 0.953"
    assert number("dose.trait", "evil", "1.5", "Qwen2.5-7B-Instruct") == "66"
    assert number("dose.trait", "evil", "1.5", "") == "not printed as a number"  # in units of another model's vectors
    assert paper_figure("layers.chosen", "evil", "", "") is None
    assert number("layers.chosen", "evil", "", "Llama-3.1-8B-Instruct") == "16"
    assert number("dose.trait", "evil", "1.7", "Qwen2.5-7B-Instruct") == "not printed as a number"
    assert number("mitigation.score", "evil", "CAFT", "") == "not printed as a number"
    assert paper_figure("extraction.auc", "evil", "", "") is None


def test_every_number_of_the_paper_has_its_section_and_says_whose_it_is():
    from persona_lens.replication.paper import paper_figures

    assert len(paper_figures()) > 60
    assert all(each.section for each in paper_figures())
    assert {each.source for each in paper_figures()} == {"paper", "replication", "reviewers"}
    assert all(bool(each.words) == (each.low is None) for each in paper_figures())


def test_an_interval_holds_the_papers_number_or_meets_its_range():
    from persona_lens.replication.finding import Finding
    from persona_lens.statistics import Estimate

    def holds(low, high, figure="finetuning.shift", subject="evil", **more):
        found = Finding(figure, subject, "r", Estimate(0.5, low, high, 9), "sets", **more)
        return found.holds("Qwen2.5-7B-Instruct")

    assert holds(0.8, 0.9) is True
    assert holds(0.83, 0.9) is False
    assert holds(0.1, 0.35, "finetuning.cross-trait") is True
    assert holds(0.1, 0.33, "finetuning.cross-trait") is False
    assert holds(None, None) is None
    assert holds(0.8, 0.9, is_control=True) is None
    assert holds(0.8, 0.9, "extraction.auc") is None


def test_a_correlation_is_scipys_over_the_rows_that_have_both():
    from persona_lens.replication.finding import correlation

    x, y = [1.0, 2.0, None, 4.0, 7.0, 5.0], [2.0, 1.0, 9.0, 5.0, 6.0, None]
    found = correlation(x, y)
    expected: Any = stats.pearsonr([1.0, 2.0, 4.0, 7.0], [2.0, 1.0, 5.0, 6.0])
    assert found.n == 4
    assert found.value == pytest.approx(expected.statistic)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= expected.statistic <= found.high
    assert correlation([None, 1.0], [1.0, None]).value is None


def test_a_folder_without_a_replication_says_so(tmp_path):
    from persona_lens.replication.result import read_replication

    with pytest.raises(FileNotFoundError, match="holds no replication: make one with `persona-lens replicate`"):
        read_replication(tmp_path)


def test_what_a_stage_needs_is_told_before_anything_is_spent(monkeypatch):
    from persona_lens.replication import run
    from persona_lens.replication.cost import plan_replication
    from persona_lens.replication.preset import load_preset

    preset = load_preset("embedded")
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    plan = plan_replication(preset, {}, only=["finetuning"])
    with pytest.raises(ImportError, match=r"needs peft, which is not installed\. Run: pip install"):
        run.require_installed(preset, plan)
    run.require_installed(preset, plan_replication(preset, {}, only=["layers"]))


def test_the_best_steered_cell_is_a_coherent_one_that_has_a_score():
    from studies.finetuning_materials import best_cell

    cells = [{"trait": None, "coherence": 99.0}, {"trait": 9.0, "coherence": 10.0}, {"trait": 5.0, "coherence": 80.0}]
    assert best_cell("happy", cells) == cells[2]
    assert best_cell("happy", cells[:2]) == cells[1]
    with pytest.raises(ValueError, match="no answer of 1 steered cells has a score"):
        best_cell("happy", cells[:1])


def test_lists_that_may_grow_are_added_to_and_nothing_else_is(tmp_path):
    from persona_lens.models.structure import ModelIdentity
    from persona_lens.replication.context import refuse_other_settings

    model = ModelIdentity("tiny", "TransformerBridge", 2, 8, "raw", "0", (0.0,))
    path = tmp_path / "settings.json"
    for moods in (["calm"], ["grim", "calm"], ["keen"]):
        refuse_other_settings(path, {"rows": 1, "moods": moods}, model, growing=["moods"])
    assert json.loads(path.read_text())["moods"] == ["calm", "grim", "keen"]
    with pytest.raises(ValueError, match="another rows"):
        refuse_other_settings(path, {"rows": 2, "moods": ["calm"]}, model, growing=["moods"])


def test_a_judge_that_is_fitted_to_each_trait_is_told_by_what_all_have_in_common():
    from persona_lens.replication.wording import _judges

    judges = {"evil": "ratio by a model, slope 1", "impolite": "ratio by a model, slope 2", "humorous": None}
    assert _judges({"judges": judges}, "layers") == "ratio by a model, fitted to each trait as stages/layers.json says"
    assert _judges({"judges": {"evil": "gpt", "impolite": "gpt"}}, "layers") == "gpt"
    assert _judges({"judges": {"evil": "one", "impolite": "other"}}, "layers").startswith("2 judges, ")


# What the sets' files say


def written_set(folder, name, scores):
    """A finished set of the user's: its trait scores, and shifts of the same numbers."""
    path = folder / "grid" / "runs" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    traits = {trait: {"value": score, "low": None, "high": None, "n": 3} for trait, score in scores.items()}
    shift = {trait: dict(scores) for trait in scores}
    path.write_text(json.dumps({"set": name, "traits": traits, "shift": shift}), encoding="utf-8")


def preset_of_sets(tmp_path, **changes):
    found = datasets_preset(tmp_path).model_dump(mode="json", by_alias=True)
    found["bring"]["finetuning"] |= changes
    return Preset.model_validate_json(json.dumps(found))


def test_a_set_with_an_underscore_in_its_name_is_made_for_its_trait(tmp_path):
    preset = preset_of_sets(
        tmp_path, names=["old_grumbles", "sums"], versions=["normal", "very_bad"], traits={"old_grumbles": "grumpy"}
    )
    for name in ("base", "old_grumbles_normal", "old_grumbles_very_bad", "sums_very_bad"):
        written_set(tmp_path, name, {"grumpy": 5.0})
    found = {each.name: each for each in measured_sets(preset, tmp_path)}
    assert {name: each.made_for for name, each in found.items()} == {
        "base": "",
        "old_grumbles_normal": "grumpy",
        "old_grumbles_very_bad": "grumpy",
        "sums_very_bad": "",
    }
    own = [each.subject for each in finetuning_findings(preset, tmp_path) if each.figure == "finetuning.score"]
    assert own == ["old_grumbles_normal", "old_grumbles_very_bad", "base"]


def test_the_worst_set_is_the_last_version_whatever_it_is_called(tmp_path, monkeypatch):
    preset = preset_of_sets(tmp_path, versions=["normal", "very_bad"])
    for name in ("base", "grumbles_normal", "grumbles_very_bad"):
        written_set(tmp_path, name, {"grumpy": 5.0})
    samples = {"grumbles_normal": np.array([0.0, 1.0, 2.0]), "grumbles_very_bad": np.array([1.5, 3.0, 4.0])}
    monkeypatch.setattr(set_findings, "_samples", lambda _preset, _folder, each, _trait: samples[each.name])
    sets = measured_sets(preset, tmp_path)
    (found,) = set_findings._sample_level(preset, tmp_path, sets, "grumpy")
    assert found.ours.value == pytest.approx(8 / 9)


def test_benchmark_rows_are_paired_with_their_own_sets(tmp_path):
    preset = preset_of_sets(tmp_path)
    written_set(tmp_path, "base", {"calm": 1.0})  # made before the trait was added
    for name, score in (("grumbles_normal", 10.0), ("grumbles_misaligned_2", 20.0), ("sums_normal", 40.0)):
        written_set(tmp_path, name, {"grumpy": score})
    scores = {"base": 900.0, "grumbles_normal": 1.0, "grumbles_misaligned_2": 2.0, "sums_normal": 4.0}
    rows = [{"trait": "grumpy", "set": name, "score": score} for name, score in scores.items()]
    (found,) = benchmark_findings(preset, tmp_path, rows)
    assert found.ours.value == pytest.approx(1.0)
    assert found.ours.n == 3


def test_a_set_on_which_a_trait_was_not_measured_is_left_out_of_its_correlation(tmp_path):
    preset = preset_of_sets(tmp_path)
    written_set(tmp_path, "base", {"grumpy": 0.0})
    written_set(tmp_path, "sums_normal", {"calm": 7.0})
    for name, score in (("grumbles_normal", 10.0), ("grumbles_misaligned_2", 20.0)):
        written_set(tmp_path, name, {"grumpy": score})
    found = next(each for each in finetuning_findings(preset, tmp_path) if each.figure == "finetuning.shift")
    assert (found.ours.value, found.ours.n) == (pytest.approx(1.0), 3)


def test_sets_whose_names_would_be_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"two pieces would both be called a_b_c: rename a set"):
        preset_of_sets(tmp_path, names=["a", "a_b"], versions=["c", "b_c"], traits={})
