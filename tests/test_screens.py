"""Cheap screens of layers: what each of them is, and what its agreement with a sweep is worth."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from persona_lens.chat.batches import chat_messages, tokenize_chat
from persona_lens.evaluation.layer_proxies import (
    SCREENS,
    FixedTexts,
    fixed_texts,
    likelihood_ratio_changes,
    screen_layers,
)
from persona_lens.interventions.hooks import intervene
from persona_lens.interventions.values import Steer
from persona_lens.judges.likelihood_ratio import intervened_log_likelihoods, mean_log_likelihoods
from persona_lens.judges.scores import Judge, Score, score_rollouts
from persona_lens.rollouts.collection import collect_rollouts, plan_rollouts
from persona_lens.rollouts.rows import Rollout
from tests.evaluation_cases import TRAIT, LetterJudge, make_sweep, naive_resamples, planted_vectors
from tests.intervention_cases import some_vectors
from tests.vector_cases import make_statistics

NEUTRAL = "You are a helpful assistant."


def written(text, polarity="positive", question="How is the soup?"):
    system = TRAIT.system_prompt(polarity, 0)
    return Rollout(TRAIT.name, polarity, 0, system, question, 0, text, None, "stop", "made up", 0)


TEXTS = FixedTexts(
    [written("Cold, and bad."), written("No.", question="How was the film?")],
    [written("Be kind, listen first.", "negative"), written("x", "negative")],
)


# --- the likelihood screen -----------------------------------------------------------------------------------------


def naive_likelihood(model, rollout, done, at):
    """The mean log-likelihood per token by one plain forward pass of the whole text."""
    row = tokenize_chat(model.tokenizer, chat_messages(NEUTRAL, rollout.question), rollout.response)
    ids = torch.tensor([[*row.prompt, *row.response]])
    lengths = None if at == "all" else [len(row.prompt)]
    with torch.no_grad():
        if done is None:
            logits = model(ids)
        else:
            with intervene(model, done, at=at, prompt_lengths=lengths):
                logits = model(ids)
    scores = logits[0, len(row.prompt) - 1 : -1].double().log_softmax(dim=-1)
    return float(sum(step[token] for step, token in zip(scores, row.response, strict=True))) / len(row.response)


@pytest.mark.parametrize("at", ["response", "all", "prompt"])
def test_the_likelihood_screen_is_the_change_of_the_ratio_under_steering(tiny_model, at):
    vectors = some_vectors(tiny_model)
    found = likelihood_ratio_changes(
        tiny_model, vectors, TRAIT, TEXTS, layers=[0, 2, 3], coefficient=1.5, at=at, progress=False
    )
    for layer, change in zip([0, 2, 3], found, strict=True):
        done = Steer(vectors.at(layer), 1.5)
        raised = [
            [naive_likelihood(tiny_model, row, done, at) - naive_likelihood(tiny_model, row, None, at) for row in side]
            for side in TEXTS
        ]
        assert change == pytest.approx(np.mean(raised[0]) - np.mean(raised[1]), abs=1e-5)


def test_a_direction_towards_the_positive_texts_raises_their_ratio(tiny_model, tiny_hf_model):
    vectors = planted_vectors(tiny_model, tiny_hf_model)
    texts = FixedTexts([written("zzz")], [written("qqq", "negative")])
    up, down = (
        likelihood_ratio_changes(tiny_model, vectors, TRAIT, texts, layers=[3], coefficient=sign, progress=False)[0]
        for sign in (1.0, -1.0)
    )
    assert up > 0.5 > -0.5 > down


def test_a_text_that_is_empty_takes_no_part_in_the_screen(tiny_model):
    settings = {"layers": [1], "coefficient": 1.0, "progress": False}
    more = FixedTexts(TEXTS.positive, [*TEXTS.negative, written("", "negative")])
    one, other = (
        likelihood_ratio_changes(tiny_model, some_vectors(tiny_model), TRAIT, texts, **settings)
        for texts in (TEXTS, more)
    )
    assert other == pytest.approx(one, abs=1e-6)


def test_likelihoods_under_an_intervention_are_not_those_without(tiny_model):
    rows = [row.tokenize(tiny_model.tokenizer) for row in TEXTS.positive]
    plain = intervened_log_likelihoods(tiny_model, rows)
    assert torch.equal(plain, mean_log_likelihoods(tiny_model, rows))
    with intervene(tiny_model, Steer(some_vectors(tiny_model), 1.0)):
        assert not torch.allclose(intervened_log_likelihoods(tiny_model, rows), plain)


# --- all screens ---------------------------------------------------------------------------------------------------


def test_the_other_screens_are_the_vectors_own_statistics(tiny_model):
    norms = torch.tensor([2.0, 4.0, float("nan"), 8.0])
    plain = some_vectors(tiny_model, residual_norm=norms)
    vectors = replace(plain, statistics=make_statistics(embedding=False))
    found = screen_layers(tiny_model, vectors, TRAIT, layers=[1, 2, 3], coefficient=1.0, progress=False)
    statistics = vectors.statistics
    assert list(found) == ["held_out_auc", "relative_norm", "split_half"]
    assert found["held_out_auc"] == pytest.approx(statistics.held_out_auc[1:].tolist())
    assert found["relative_norm"][1] is None
    assert found["relative_norm"][::2] == pytest.approx((float(vectors.norms[1]) / 4, float(vectors.norms[3]) / 8))
    assert found["split_half"][1] is None  # NaN among the statistics is what was not measured
    assert found["split_half"][2] == pytest.approx(float(statistics.split_half[3]))


def test_without_statistics_and_texts_only_the_norm_is_a_screen(tiny_model):
    found = screen_layers(tiny_model, some_vectors(tiny_model), TRAIT, layers=[0, 1], coefficient=1.0, progress=False)
    assert found == {"relative_norm": (None, None)}


def test_screens_stand_in_one_order(tiny_model):
    vectors = replace(some_vectors(tiny_model), statistics=make_statistics(embedding=False))
    found = screen_layers(tiny_model, vectors, TRAIT, layers=[0], coefficient=1.0, texts=TEXTS, progress=False)
    assert tuple(found) == SCREENS


# --- the fixed texts of a run --------------------------------------------------------------------------------------


class PolarJudge(LetterJudge):
    """High on the positive side and low on the negative one, but for the questions that it mistakes."""

    def __init__(self, mistaken=()):
        super().__init__()
        self.mistaken = mistaken

    def score(self, trait, rollouts, *, progress=False):
        right = [(row.polarity == "positive") == (row.question not in self.mistaken) for row in rollouts]
        return [Score(90.0 if each else 10.0, 90.0) for each in right]


class WordsEngine:
    """Answers with the key of the prompt."""

    name, batch_size = "words", 100

    def answer(self, prompts, *, seed, progress=False):
        return [replace(written(prompt.key), **vars(prompt), engine=self.name, seed=seed) for prompt in prompts]


def keep_run(folder, judge: Judge):
    prompts = plan_rollouts(TRAIT, per_question=2) + plan_rollouts(TRAIT, polarities=["neutral"], per_question=1)
    rollouts = collect_rollouts(WordsEngine(), prompts, output_file=folder / "rollouts.jsonl", progress=False)
    score_rollouts(rollouts, TRAIT, judge=judge, output_file=folder / "scores.jsonl", progress=False)


def test_the_fixed_texts_of_a_run_are_its_first_kept_pairs(tmp_path):
    keep_run(tmp_path, PolarJudge(mistaken=TRAIT.extraction_questions[:1]))
    found = fixed_texts(tmp_path, TRAIT, pairs=3)
    assert found is not None
    assert [row.polarity for row in found.positive] == ["positive"] * 3
    assert [row.polarity for row in found.negative] == ["negative"] * 3
    assert {row.question for side in found for row in side} == {TRAIT.extraction_questions[1]}
    places = [[(row.instruction, row.sample) for row in side] for side in found]
    assert places[0] == places[1] == [(0, 0), (0, 1), (1, 0)]


def test_a_folder_without_an_extraction_or_kept_pairs_has_no_fixed_texts(tmp_path):
    assert fixed_texts(tmp_path, TRAIT) is None
    assert fixed_texts(tmp_path / "absent", TRAIT) is None
    keep_run(tmp_path, PolarJudge(mistaken=TRAIT.extraction_questions))
    assert fixed_texts(tmp_path, TRAIT) is None


# --- what the screens are worth ------------------------------------------------------------------------------------

SWEPT = {(layer, 1.0): [10.0 * layer, 30.0 - 5 * layer, 2.0 * layer**2, 50.0] for layer in range(4)}


def test_a_screen_is_worth_its_rank_correlation_with_the_sweep():
    values = (0.2, 0.1, 0.4, 0.3)
    sweep = make_sweep(SWEPT, screens={"split_half": values})
    (row,) = sweep.screen_correlations().to_dict("records")
    swept = [sweep.evaluations[layer, 1.0].trait_score.value for layer in range(4)]
    assert (row["screen"], row["coefficient"], row["layers"]) == ("split_half", 1.0, 4)
    assert row["spearman"] == pytest.approx(stats.spearmanr(values, swept).statistic)


def test_the_interval_of_a_screen_is_that_of_a_loop_over_resamples_of_questions():
    values = (0.2, 0.1, 0.4, 0.3)
    sweep = make_sweep(SWEPT, screens={"split_half": values})
    resamples = np.stack([naive_resamples(cell) for cell in sweep.evaluations.values()], axis=1)[:500]
    drawn = [stats.spearmanr(values, row).statistic for row in resamples if np.ptp(row) > 0]
    (row,) = sweep.screen_correlations().to_dict("records")
    assert [row["low"], row["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist())


def test_a_screen_that_was_not_measured_at_a_layer_is_judged_on_the_others():
    sweep = make_sweep(SWEPT, screens={"held_out_auc": (0.9, None, 0.2, 0.1)})
    (row,) = sweep.screen_correlations().to_dict("records")
    swept = [sweep.evaluations[layer, 1.0].trait_score.value for layer in (0, 2, 3)]
    assert row["layers"] == 3
    assert row["spearman"] == pytest.approx(stats.spearmanr([0.9, 0.2, 0.1], swept).statistic)


@pytest.mark.parametrize("values", [(0.5,) * 4, (None,) * 4, (0.1, 0.2, None, None)])
def test_a_screen_that_cannot_rank_the_layers_has_no_correlation(values):
    table = make_sweep(SWEPT, screens={"relative_norm": values}).screen_correlations()
    assert table[["spearman", "low", "high"]].isna().all(axis=None)


def test_a_coefficient_at_which_no_layer_has_a_score_has_no_correlation():
    incoherent = {(layer, 4.0): ([None] * 4, 10.0) for layer in range(4)}
    table = make_sweep(SWEPT | incoherent, screens={"relative_norm": (0.1, 0.2, 0.3, 0.4)}).screen_correlations()
    assert table.set_index("coefficient").spearman.isna().to_dict() == {1.0: False, 4.0: True}


def test_the_correlation_over_one_question_has_no_interval():
    cells = {(layer, 1.0): [10.0 * layer] for layer in range(4)}
    table = make_sweep(cells, baseline=(1.0,), screens={"split_half": (1.0, 2.0, 3.0, 4.0)}).screen_correlations()
    assert table.spearman.tolist() == [pytest.approx(1)]
    assert table[["low", "high"]].isna().all(axis=None)


def test_a_sweep_without_screens_has_an_empty_table_of_them():
    table = make_sweep(SWEPT).screen_correlations()
    assert table.empty
    assert "spearman" in table.columns
