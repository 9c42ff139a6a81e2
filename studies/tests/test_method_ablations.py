"""Ablations of the method on made-up rollouts of a tiny model, in which one direction is planted."""

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest

from persona_lens.rollouts.rows import Rollout
from persona_lens.storage.files import JsonLines
from studies.method_ablations import _at_norm, _means, method_ablations
from studies.method_variants import Variant, chosen_pairs, fitted_direction, judged_pairs
from tests.evaluation_cases import LetterJudge
from tests.fault_cases import another_process
from tests.replication_cases import TRAIT

WORDS = {"positive": "they make you suffer", "negative": "be kind and listen"}


@pytest.fixture(scope="module", autouse=True)
def few_halves():
    """Fifty halves for each variant say no more here than five."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["studies.method_ablations"], "HALVES", 5)
        yield


@pytest.fixture(scope="module")
def run(tiny_bridge, tmp_path_factory):
    """The folder of an extraction whose sides differ in their words; a few pairs were badly judged."""
    from persona_lens import extract_from_responses

    folder = tmp_path_factory.mktemp("extraction")
    rows, scores = [], []
    for number, question in enumerate(TRAIT.extraction_questions * 2):
        for polarity in ("positive", "negative"):
            for instruction in range(2):
                system = TRAIT.system_prompt(polarity, instruction)
                text = f"{WORDS[polarity]} {['one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight'][number]}"
                asked = f"{question} {number}"
                rows.append(
                    Rollout("grumpy", polarity, instruction, system, asked, 0, text, None, "stop", "made up", 0)
                )
                score = {"positive": 90.0, "negative": 10.0}[polarity] if number else 50.0
                scores.append({"key": rows[-1].key, "trait_score": score, "coherence": 90.0, "judge": "made up"})
    JsonLines(folder / "rollouts.jsonl").append(map(asdict, rows))
    JsonLines(folder / "scores.jsonl").append(scores)
    sides = [[row.conversation() for row in rows if row.polarity == side] for side in ("positive", "negative")]
    vectors = extract_from_responses(tiny_bridge, *sides, trait="grumpy", n_resamples=2, n_placebo=2, progress=False)
    vectors.save(folder / "vectors.safetensors")
    return folder


@pytest.fixture(scope="module")
def found(run, tiny_bridge, tmp_path_factory):
    output = tmp_path_factory.mktemp("ablations")
    how = {"judge": LetterJudge(), "layer": 2, "max_new_tokens": 4, "progress": False}
    return method_ablations(tiny_bridge, TRAIT, run, output=output, **how), output


def test_every_choice_of_the_method_is_measured_beside_the_method_as_it_is(found):
    table = found[0].table()
    assert list(table.index[:2]) == ["as it is", "no filter"]
    assert {"keep rule", "instruction pairs", "questions", "tokens", "direction"} <= set(table["choice"])
    assert table.loc["as it is", "cosine"] == pytest.approx(1)
    assert (table["held_out_auc"].between(0, 1)).all()


def test_the_keep_rule_decides_how_many_pairs_there_are(found):
    pairs = found[0].table()["pairs"]
    assert (pairs["no filter"], pairs["as it is"], pairs["1 pair"]) == (16, 14, 7)


def test_directions_that_words_make_plain_hold_out_on_other_questions(found):
    table = found[0].table()
    for name in ("as it is", "logistic regression", "linear discriminant"):
        assert table.loc[name, "held_out_auc"] > 0.95
        assert table.loc[name, "split_half"] > 0.5


def test_the_difference_in_means_is_the_extractions(found, run, tiny_bridge):
    from persona_lens import PersonaVectors

    rows, pairs = judged_pairs(run, TRAIT)
    everything = Variant("no filter", "keep rule", threshold=None)
    means = _means(tiny_bridge, rows, 2, "response_mean")
    direction = fitted_direction(everything, chosen_pairs(everything, pairs), means)
    expected = PersonaVectors.load(run / "vectors.safetensors").directions[2].numpy()
    assert np.allclose(direction, expected, atol=1e-5)


def test_a_variant_is_told_apart_from_the_method_as_it_is_over_the_same_questions(found):
    table = found[0].table()
    for gain, measure in (("auc_gain", "held_out_auc"), ("effect_gain", "effect")):
        own = table.loc["as it is"]
        assert (own[gain], own[f"{gain}_low"], own[f"{gain}_high"]) == (0, 0, 0)
        assert table[gain].to_numpy() == pytest.approx((table[measure] - own[measure]).to_numpy())
    assert (table["auc_gain_low"] <= table["auc_gain"]).all()
    assert (table["effect_gain_low"] < table["effect_gain_high"]).any()


def test_all_variants_are_steered_at_the_norm_of_the_runs_own_direction(run, tiny_bridge):
    from persona_lens import PersonaVectors

    vector = PersonaVectors.load(run / "vectors.safetensors").at(2)
    assert _at_norm(vector, 7 * np.arange(1.0, 33.0)).norm == pytest.approx(vector.norm, rel=1e-5)


def test_a_second_call_takes_the_steered_answers_from_the_folder(found, run, tiny_bridge):
    judge = LetterJudge()
    how = {"judge": judge, "layer": 2, "max_new_tokens": 4, "progress": False}
    again = method_ablations(tiny_bridge, TRAIT, run, output=found[1], **how)
    assert judge.judged == []
    assert again.summary() == found[0].summary() == json.loads((found[1] / "method_ablations.json").read_text())


def test_a_variant_of_too_few_questions_is_told_and_not_measured(run, tiny_bridge, tmp_path):
    def refuse(row):
        return row if row["key"].split("/")[2] == "1" else {**row, "trait_score": None}

    for name in ("rollouts.jsonl", "vectors.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    JsonLines(tmp_path / "scores.jsonl").append(map(refuse, JsonLines(run / "scores.jsonl").read()))
    how = {"judge": LetterJudge(), "layer": 2, "max_new_tokens": 4, "progress": False}
    table = method_ablations(tiny_bridge, TRAIT, tmp_path, output=tmp_path / "out", **how).table()
    assert table.loc["1 pair", "pairs"] == 0
    assert np.isnan(table.loc["1 pair", "held_out_auc"])
    assert not np.isnan(table.loc["as it is", "held_out_auc"])


def test_a_folder_that_another_process_writes_is_refused(run, tiny_bridge, tmp_path):
    with another_process(tmp_path / "out" / ".lock"), pytest.raises(OSError, match="is being written by process"):
        method_ablations(tiny_bridge, TRAIT, run, judge=LetterJudge(), layer=1, output=tmp_path / "out")
