"""The user's data, the plan and its cost, the paper's numbers, and how sets are compared: all that needs no model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from persona_lens.replication import run
from persona_lens.replication.counting import Work
from persona_lens.replication.plan import Rates, plan_replication, rates_of, seconds_of
from persona_lens.replication.preset import Preset, load_preset
from persona_lens.replication.reported_number import ReportedNumber, correlation, paper_figure, paper_figures
from persona_lens.replication.result import Replication
from persona_lens.replication.set_numbers import (
    TunedSet,
    benchmark_numbers,
    finetuning_numbers,
    grid_contrast,
    tuned_sets,
)
from persona_lens.replication.set_numbers import sample_level as samples_told_apart
from persona_lens.replication.stages import all_stages
from persona_lens.replication.user_data import find_user_data
from persona_lens.statistics import Estimate
from tests.replication_cases import bring_sets, bring_the_rest, tiny_preset


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
    assert "assumed, not measured" in done.stdout
    assert "Left out, finetuning: data/finetuning is not there (section D)" in done.stdout


def test_only_plans_the_stages_that_are_named_and_refuses_others(cli, tmp_path):
    some = ["replicate", "--preset", "embedded", "--output", tmp_path / "run", "--dry-run", "--json"]
    code, out, _ = cli(*some, "--only", "monitoring", "--only", "layers")
    plan = json.loads(out)
    assert code == 0
    assert [stage["stage"] for stage in plan["stages"]] == ["layers", "monitoring"]
    assert sum(stage["seconds"] for stage in plan["stages"]) == pytest.approx(plan["seconds"])
    assert not (tmp_path / "run").exists()
    code, _, told = cli(*some, "--only", "monitor")
    assert code == 2
    assert "got monitor" in told
    with pytest.raises(ValueError, match="got 'monitor'"):
        plan_replication(load_preset("embedded"), only=["monitor"])


def test_the_plans_of_the_shipped_presets_are_what_their_stages_were_counted_at(tmp_path):
    """Counts of version 0.1.0, whose plans described each stage a second time."""
    embedded, qwen = (plan_replication(load_preset(name), tmp_path) for name in ("embedded", "qwen2.5-7b"))
    works = {cost.stage: cost.work for cost in embedded.stages}
    assert works["extraction"] == Work(732, 23424, 98280, 3714, 118848, 0, 480, 0)
    assert works["layers"] == Work(108, 3456, 5040, 540, 17280, 0, 108, 0)
    assert works["dose-response"] == Work(408, 13056, 10080, 2040, 65280, 0, 408, 0)
    assert (works["monitoring"].rollouts, works["monitoring"].forwards) == (396, 2178)
    assert embedded.rates.is_measured
    assert embedded.seconds < 35 * 60
    assert qwen.seconds == pytest.approx(17175, rel=0.005)
    assert qwen.dollars == pytest.approx(48.94, rel=0.005)
    assert (qwen.work.generated, qwen.work.calls) == (62818000, 131320)


def test_seconds_are_tokens_over_rates_and_the_waiting_for_the_judge():
    preset = load_preset("qwen2.5-7b")  # a share of .35, rows of 350 tokens, 20 calls at a time
    rates = Rates(10.0, 20.0, 5.0, "stated", True)
    work = Work(generated=1000, read=400, prompt_tokens=60, trained=2, calls=40)
    assert seconds_of(work, preset, rates) == pytest.approx(35 + (140 + 60) / 20 + 700 / 5 + 2)


def test_assumed_rates_follow_from_the_models_size():
    rates = rates_of(load_preset("qwen2.5-7b"))
    assert rates.reading == pytest.approx(312e12 * 0.4 / (2 * 7.6e9))
    assert rates.training == pytest.approx(312e12 * 0.3 / (4 * 7.6e9))
    assert not rates.is_measured
    assert rates.how.startswith("assumed, not measured")


def test_a_stage_whose_data_is_not_there_is_left_out(tmp_path):
    preset, stages = tiny_preset(tmp_path), all_stages()

    def left_out(name):
        return stages[name].left_out(preset, find_user_data(preset, tmp_path))

    bring_sets(tmp_path)
    assert left_out("finetuning") == ""
    assert "chats.jsonl is not there (section L)" in left_out("real-chats")
    bring_the_rest(tmp_path)
    assert [left_out(name) for name in ("real-chats", "new-facts", "benchmarks")] == [""] * 3


@pytest.mark.parametrize(
    ("path", "text", "sentence"),
    [
        ("sets/sums/normal.jsonl", None, "normal.jsonl is missing, while"),
        ("sets/sums/normal.jsonl", "", "normal.jsonl is empty"),
        ("sets/sums/normal.jsonl", '{"text": "no"}\n', "normal.jsonl, line 1: it has no messages"),
        ("sets/sums/normal.jsonl", "no\n", "line 1: expected a JSON object, got 'no"),
        ("new_facts/questions.jsonl", '{"question": "Is it?"}\n', "questions.jsonl, line 1: it has no choices"),
        ("benchmarks.jsonl", '{"trait": "a", "set": "b", "score": "c"}\n', "score is 'c', no number"),
        ("chats.jsonl", '{"messages": [{"role": "user", "content": "Hi"}]}\n', "no message is by the assistant"),
    ],
)
def test_data_in_another_form_is_refused_in_one_sentence_before_anything_is_spent(tmp_path, path, text, sentence):
    preset = tiny_preset(tmp_path)
    bring_sets(tmp_path)
    bring_the_rest(tmp_path)
    if text is None:
        (tmp_path / path).unlink()
    else:
        (tmp_path / path).write_text(text, encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        find_user_data(preset, tmp_path)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("wanted", "number"),
    [
        (("finetuning.shift", "evil", "", "Llama-3.1-8B-Instruct"), "0.93"),
        (("finetuning.shift", "evil", "", "Qwen2.5-7B-Instruct"), "0.826"),
        (("finetuning.shift", "evil", "", ""), "0.826"),
        (("projection.shift", "hallucinating", "", ""), "0.408 to 0.593"),
        (("projection.shift", "happy", "", ""), "0.745 to 0.953"),
        (("dose.trait", "evil", "1.5", "Qwen2.5-7B-Instruct"), "66"),
        (("dose.trait", "evil", "1.5", ""), "not printed as a number"),  # in units of another model's vectors
        (("layers.chosen", "evil", "", ""), "None"),
        (("layers.chosen", "evil", "", "Llama-3.1-8B-Instruct"), "16"),
        (("dose.trait", "evil", "1.7", "Qwen2.5-7B-Instruct"), "not printed as a number"),
        (("mitigation.score", "evil", "CAFT", ""), "not printed as a number"),
        (("extraction.auc", "evil", "", ""), "None"),
    ],
)
def test_the_papers_numbers_are_found_by_figure_trait_and_model(wanted, number):
    assert str(paper_figure(*wanted)) == number


def test_every_number_of_the_paper_has_its_section_and_says_whose_it_is():
    assert len(paper_figures()) > 60
    assert all(figure.section for figure in paper_figures())
    assert {figure.source for figure in paper_figures()} == {"paper", "replication", "reviewers"}
    assert all(bool(figure.words) == (figure.low is None) for figure in paper_figures())


@pytest.mark.parametrize(
    ("low", "high", "figure", "is_control", "holds"),
    [
        (0.8, 0.9, "finetuning.shift", False, True),
        (0.83, 0.9, "finetuning.shift", False, False),
        (0.1, 0.35, "finetuning.cross-trait", False, True),
        (0.1, 0.33, "finetuning.cross-trait", False, False),
        (None, None, "finetuning.shift", False, None),
        (0.8, 0.9, "finetuning.shift", True, None),
        (0.8, 0.9, "extraction.auc", False, None),
    ],
)
def test_an_interval_holds_the_papers_number_or_meets_its_range(low, high, figure, is_control, holds):
    number = ReportedNumber(figure, "evil", "r", Estimate(0.5, low, high, 9), "sets", is_control=is_control)
    assert number.holds("Qwen2.5-7B-Instruct") is holds
    assert ReportedNumber.from_json(number.as_json("")) == number


def test_a_correlation_is_scipys_over_the_rows_that_have_both():
    x, y = [1.0, 2.0, None, 4.0, 7.0, 5.0], [2.0, 1.0, 9.0, 5.0, 6.0, None]
    estimate = correlation(x, y)
    expected: Any = stats.pearsonr([1.0, 2.0, 4.0, 7.0], [2.0, 1.0, 5.0, 6.0])
    assert estimate.n == 4
    assert estimate.value == pytest.approx(expected.statistic)
    assert estimate.low <= expected.statistic <= estimate.high
    assert correlation([None, 1.0], [1.0, None]).value is None


def test_a_folder_without_a_replication_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no replication: make one with `persona-lens replicate`"):
        Replication.load(tmp_path)


@pytest.mark.parametrize("folder", ["replication", "replication_full"])
def test_a_finished_folder_of_version_0_1_has_its_numbers_of_moods(folder):
    folder = Path(__file__).parents[1] / "docs" / "results" / folder
    rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["stages"]
    replication = Replication.load(folder)
    for stage in ("finetuning", "projection-difference", "mitigation"):
        assert [number.as_json("") for number in replication.numbers[stage]] == rows[stage]["findings"] != []
        assert replication.records[stage] == rows[stage]["record"]


def test_what_a_stage_needs_is_told_before_anything_is_spent(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    bring_sets(tmp_path)
    preset = tiny_preset(tmp_path)
    with pytest.raises(ImportError, match=r"needs peft, which is not installed\. Run: pip install"):
        run.require_installed(plan_replication(preset, tmp_path, only=["finetuning"]))
    run.require_installed(plan_replication(preset, tmp_path, only=["layers"]))


# What the sets' files say


def written_set(folder, name, scores):
    """A finished set of the user's: its trait scores, and shifts of the same numbers."""
    path = folder / "grid" / "runs" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    traits = {trait: {"value": score, "low": None, "high": None, "n": 3} for trait, score in scores.items()}
    shift = {trait: dict(scores) for trait in scores}
    path.write_text(json.dumps({"set": name, "traits": traits, "shift": shift}), encoding="utf-8")


def preset_of_sets(tmp_path, **changes):
    settings = tiny_preset(tmp_path).model_dump(mode="json", by_alias=True)
    settings["bring"]["finetuning"] |= changes
    return Preset.model_validate_json(json.dumps(settings))


def test_a_set_with_an_underscore_in_its_name_is_made_for_its_trait(tmp_path):
    preset = preset_of_sets(
        tmp_path, names=["old_grumbles", "sums"], versions=["normal", "very_bad"], traits={"old_grumbles": "grumpy"}
    )
    made_for = {"base": "", "old_grumbles_normal": "grumpy", "old_grumbles_very_bad": "grumpy", "sums_very_bad": ""}
    for name in made_for:
        written_set(tmp_path, name, {"grumpy": 5.0})
    sets = tuned_sets(preset, tmp_path)
    assert {each.name: each.made_for for each in sets} == made_for
    own = [number.subject for number in finetuning_numbers(sets, 0) if number.figure == "finetuning.score"]
    assert own == ["old_grumbles_normal", "old_grumbles_very_bad", "base"]


def test_the_worst_set_is_the_last_version_whatever_it_is_called(tmp_path, monkeypatch):
    preset = preset_of_sets(tmp_path, versions=["normal", "very_bad"])
    for name in ("base", "grumbles_normal", "grumbles_very_bad"):
        written_set(tmp_path, name, {"grumpy": 5.0})
    samples = {"grumbles_normal": np.array([0.0, 1.0, 2.0]), "grumbles_very_bad": np.array([1.5, 3.0, 4.0])}
    monkeypatch.setattr(TunedSet, "samples", lambda each, trait: samples[each.name])
    worst, others = grid_contrast(preset)("grumpy", tuned_sets(preset, tmp_path))
    (number,) = samples_told_apart("grumpy", worst, others)
    assert number.ours.value == pytest.approx(8 / 9)


def test_benchmark_rows_are_paired_with_their_own_sets(tmp_path):
    preset = preset_of_sets(tmp_path)
    written_set(tmp_path, "base", {"calm": 1.0})  # made before the trait was added
    for name, score in (("grumbles_normal", 10.0), ("grumbles_misaligned_2", 20.0), ("sums_normal", 40.0)):
        written_set(tmp_path, name, {"grumpy": score})
    scores = {"base": 900.0, "grumbles_normal": 1.0, "grumbles_misaligned_2": 2.0, "sums_normal": 4.0}
    rows = [{"trait": "grumpy", "set": name, "score": score} for name, score in scores.items()]
    (number,) = benchmark_numbers(preset, tmp_path, rows)
    assert (number.ours.value, number.ours.n) == (pytest.approx(1.0), 3)


def test_a_set_on_which_a_trait_was_not_measured_is_left_out_of_its_correlation(tmp_path):
    preset = preset_of_sets(tmp_path)
    written_set(tmp_path, "base", {"grumpy": 0.0})
    written_set(tmp_path, "sums_normal", {"calm": 7.0})
    for name, score in (("grumbles_normal", 10.0), ("grumbles_misaligned_2", 20.0)):
        written_set(tmp_path, name, {"grumpy": score})
    numbers = finetuning_numbers(tuned_sets(preset, tmp_path), 0)
    shift = next(number for number in numbers if number.figure == "finetuning.shift")
    assert (shift.ours.value, shift.ours.n) == (pytest.approx(1.0), 3)


def test_sets_whose_names_would_be_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"two pieces would both be called a_b_c: rename a set"):
        preset_of_sets(tmp_path, names=["a", "a_b"], versions=["c", "b_c"], traits={})
