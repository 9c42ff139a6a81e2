"""What a finetuning shift refuses, and its result as numbers, tables and files."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from persona_lens.finetuning.shift import FinetuningShift, finetuning_shift
from persona_lens.traits.trait import load_trait
from tests import tiny
from tests.chat_cases import FORGETS_THOUGHTS, counted, with_template
from tests.intervention_cases import some_vectors
from tests.shift_cases import QUESTIONS, make_shift
from tests.vector_cases import random_tensor

# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "There are no prompts, and a shift is measured on some"),
        (["Why?", "Who?", "Why?"], r"question 'Why\?' stands twice"),
        ("optimist", "did you mean 'optimistic'"),
        (replace(load_trait("evil"), evaluation_questions=()), "evil has no evaluation questions"),
    ],
)
def test_prompts_that_measure_nothing_are_refused(tiny_model, prompts, words):
    with pytest.raises(ValueError, match=words):
        finetuning_shift(tiny_model, tiny_model, prompts, some_vectors(tiny_model))


def test_vectors_that_are_none_or_stand_twice_are_refused(tiny_model):
    vectors = some_vectors(tiny_model)
    with pytest.raises(ValueError, match="pass at least one vector"):
        finetuning_shift(tiny_model, tiny_model, QUESTIONS, [])
    with pytest.raises(ValueError, match="two vectors of evil at layer 2: leave one out"):
        finetuning_shift(tiny_model, tiny_model, QUESTIONS, [vectors, vectors.at(2)])
    with pytest.raises(ValueError, match="evil: the direction at layer 1 is exactly zero"):
        finetuning_shift(tiny_model, tiny_model, QUESTIONS, 0 * vectors.at(1))


def test_vectors_of_another_model_are_refused_unless_allowed(tiny_model, tiny_gpt2, tiny_tokenizer, make_tiny_model):
    with pytest.raises(ValueError, match="expect d_model 24"):
        finetuning_shift(tiny_model, tiny_model, QUESTIONS, some_vectors(tiny_gpt2, model=tiny_gpt2))
    other = make_tiny_model("TransformerBridge", tiny.llama(tiny_tokenizer, seed=1))
    vectors = some_vectors(other, model=other)
    with pytest.raises(ValueError, match="unrelated embeddings"):
        finetuning_shift(tiny_model, tiny_model, QUESTIONS, vectors)
    assert finetuning_shift(tiny_model, tiny_model, QUESTIONS, vectors, allow_other_model=True).traits == ("evil",)


def test_two_models_that_cannot_be_subtracted_are_refused(
    tiny_model, tiny_gpt2, make_tiny_model, model_class, tiny_tokenizer, tiny_hf_model
):
    vectors = some_vectors(tiny_model)
    unrelated = make_tiny_model(model_class, tiny.llama(tiny_tokenizer, seed=1))
    narrow = make_tiny_model("TransformerBridge", copy.deepcopy(tiny_hf_model).float())
    for finetuned, words in (
        (tiny_gpt2, "The base has d_model 32 and the finetuned model 24"),
        (unrelated, "embeddings unrelated"),
        (narrow, "dtype torch.float64 and the finetuned model torch.float32"),
    ):
        with pytest.raises(ValueError, match=words):
            finetuning_shift(tiny_model, finetuned, QUESTIONS, vectors)


def test_models_that_see_other_tokens_are_refused(tiny_model, fresh_tiny_model, tiny_tokenizer, monkeypatch):
    shouting = with_template(tiny_tokenizer, FORGETS_THOUGHTS.replace("assistant\n", "ASSISTANT\n"))
    place = "_tokenizer" if "_tokenizer" in vars(fresh_tiny_model) else "tokenizer"
    monkeypatch.setattr(fresh_tiny_model, place, shouting)
    with pytest.raises(ValueError, match=r"4 of 4 prompts have other token ids .* 'What is the sea\?'"):
        finetuning_shift(tiny_model, fresh_tiny_model, QUESTIONS, some_vectors(tiny_model))


def test_an_output_that_cannot_be_written_is_refused_before_anything_runs(tiny_model, tmp_path):
    def work():
        with pytest.raises(OSError, match="it is a folder"):
            finetuning_shift(tiny_model, tiny_model, QUESTIONS, some_vectors(tiny_model), output=tmp_path)

    assert counted(tiny_model, work)["layer -1"] == 0


# --- results -------------------------------------------------------------------------------------------------------


def test_the_mean_and_its_interval_are_those_of_a_slow_bootstrap_over_prompts():
    found = make_shift()
    values = found.projections[:, 0, 1].tolist()
    drawn = np.random.default_rng(3).multinomial(5, [1 / 5] * 5, size=2000)
    means = [sum(int(count) * value for count, value in zip(row, values, strict=True)) / 5 for row in drawn]
    expected = (sum(values) / 5, *np.percentile(means, [2.5, 97.5]), 5)
    assert found.at(1, "evil") == pytest.approx(expected, abs=1e-9)


def test_one_prompt_has_no_interval():
    found = make_shift(questions=("a",), projections=torch.ones(1, 2, 3), norms=torch.ones(1, 3))
    assert found.at(1, "kind") == (1.0, None, None, 1)
    assert "layer 2 1 (random directions ±1.5)" in str(found)


def test_the_random_spread_is_that_of_many_random_unit_directions():
    mean = random_tensor(16, seed=4)
    found = make_shift(mean_norms=mean.norm().expand(3))
    directions = random_tensor(200_000, 16, seed=5)
    sampled = (directions / directions.norm(dim=-1, keepdim=True)) @ mean
    assert found.random_spread[1].item() == pytest.approx(sampled.std().item(), rel=0.01)


def test_the_curve_holds_each_layers_shift_against_its_controls():
    found = make_shift()
    curve = found.curve("evil")
    assert curve.index.name == "layer"
    assert list(curve.columns) == ["shift", "low", "high", "norm", "relative", "cosine", "random_spread"]
    for layer in range(3):
        value, low, high, _ = found.at(layer, "evil")
        norm = [2.0, 4.0, 6.0][layer]
        row = [value, low, high, norm, value / [10, 20, 40][layer], value / norm, norm / 4]
        assert curve.loc[layer].tolist() == pytest.approx(row)
    assert found.table().loc["evil"].equals(curve)
    assert list(found.table().loc["kind"].index) == [2]


def test_a_trait_must_be_named_where_there_are_several():
    found = make_shift()
    for asked in (None, "rude"):
        with pytest.raises(ValueError, match="measured along evil, kind"):
            found.at(0, asked)
    with pytest.raises(ValueError, match="layer 3 is outside 0 to 2"):
        found.at(3, "evil")


def test_it_reads_as_one_line_a_trait_at_layers_that_no_result_chose():
    lines = str(make_shift()).splitlines()
    assert [line.split(",")[0] for line in lines] == ["evil", "kind"]
    assert [line.count("random directions") for line in lines] == [3, 1]
    deep = make_shift(
        traits=("evil",),
        projections=torch.ones(5, 1, 30),
        norms=torch.ones(5, 30),
        mean_norms=torch.ones(30),
        base_norms=torch.ones(30),
    )
    assert [part.split()[1] for part in str(deep).split(": ")[1].split("; ")] == ["7", "14", "22", "29"]


def test_an_undefined_cosine_is_null_in_the_summary():
    still = make_shift(mean_norms=torch.zeros(3), projections=torch.zeros(5, 2, 3))
    assert still.summary()["traits"]["evil"][0]["cosine"] is None


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda saved: saved.update(format_version=2), "format version 2, and this reads 1"),
        (lambda saved: saved.pop("norms"), "norms"),
        (lambda saved: saved["base_norms"].pop(), r"needs base_norms of shape \[3\], got \[2\]"),
        (lambda saved: saved["projections"][0].pop(), "inhomogeneous"),
    ],
)
def test_a_file_of_another_format_or_a_damaged_one_is_refused(tmp_path, edit, words, shapes_unchecked):
    path = tmp_path / "shift.json"
    make_shift().save(path)
    saved = json.loads(path.read_text())
    edit(saved)
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=rf"shift\.json is not a finetuning shift \(.*{words}.*measure it again"):
        FinetuningShift.load(path)


def test_a_file_in_which_a_trait_has_no_number_is_refused_by_its_name(tiny_model, tmp_path):
    file = tmp_path / "shift.json"
    finetuning_shift(tiny_model, tiny_model, QUESTIONS, some_vectors(tiny_model)).save(file)
    saved = json.loads(file.read_text())
    saved["projections"] = [[[None] * tiny_model.cfg.n_layers] for _ in saved["projections"]]
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"shift.json is not a finetuning shift \(no layer of evil has a number\)"):
        FinetuningShift.load(file)
