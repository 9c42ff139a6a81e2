"""Cheap proxies of a sweep: their values, and how well they rank the layers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from persona_lens.chat.batches import chat_messages, tokenize_chat
from persona_lens.evaluation.layer_proxies import (
    FixedTexts,
    fixed_texts,
    likelihood_ratio_changes,
    stored_proxies,
)
from persona_lens.interventions.hooks import intervene
from persona_lens.interventions.values import Steer
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
def test_the_likelihood_proxy_is_the_change_of_the_ratio_under_steering(tiny_model, at):
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


def test_a_text_that_is_empty_takes_no_part_in_the_proxy(tiny_model):
    settings = {"layers": [1], "coefficient": 1.0, "progress": False}
    more = FixedTexts(TEXTS.positive, [*TEXTS.negative, written("", "negative")])
    one, other = (
        likelihood_ratio_changes(tiny_model, some_vectors(tiny_model), TRAIT, texts, **settings)
        for texts in (TEXTS, more)
    )
    assert other == pytest.approx(one, abs=1e-6)


def test_the_stored_proxies_are_the_vectors_own_statistics(tiny_model):
    norms = torch.tensor([2.0, 4.0, float("nan"), 8.0])
    plain = some_vectors(tiny_model, residual_norm=norms)
    vectors = replace(plain, statistics=make_statistics(embedding=False))
    found = stored_proxies(vectors, [1, 2, 3])
    statistics = vectors.statistics
    assert list(found) == ["held_out_auc", "relative_norm", "split_half"]
    assert found["held_out_auc"] == pytest.approx(statistics.held_out_auc[1:].tolist())
    assert found["relative_norm"][1] is None
    assert found["relative_norm"][::2] == pytest.approx((float(vectors.norms[1]) / 4, float(vectors.norms[3]) / 8))
    assert found["split_half"][1] is None  # NaN among the statistics is what was not measured
    assert found["split_half"][2] == pytest.approx(float(statistics.split_half[3]))
    assert stored_proxies(some_vectors(tiny_model), [0, 1]) == {"relative_norm": (None, None)}


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


SWEPT = {(layer, 1.0): [10.0 * layer, 30.0 - 5 * layer, 2.0 * layer**2, 50.0] for layer in range(4)}


def test_a_proxy_is_worth_its_rank_correlation_with_the_sweep():
    values = (0.2, 0.1, 0.4, 0.3)
    sweep = make_sweep(SWEPT, proxies={"split_half": values})
    (row,) = sweep.proxy_correlations().to_dict("records")
    swept = [sweep.evaluations[layer, 1.0].trait_score.value for layer in range(4)]
    assert (row["proxy"], row["coefficient"], row["layers"]) == ("split_half", 1.0, 4)
    assert row["spearman"] == pytest.approx(stats.spearmanr(values, swept).statistic)
    resamples = np.stack([naive_resamples(cell) for cell in sweep.evaluations.values()], axis=1)[:500]
    drawn = [stats.spearmanr(values, scores).statistic for scores in resamples if np.ptp(scores) > 0]
    assert [row["low"], row["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist())
    (row,) = make_sweep(SWEPT, proxies={"held_out_auc": (0.9, None, 0.2, 0.1)}).proxy_correlations().to_dict("records")
    assert row["layers"] == 3  # a layer where the proxy was not measured is left out
    assert row["spearman"] == pytest.approx(stats.spearmanr([0.9, 0.2, 0.1], [swept[0], *swept[2:]]).statistic)


@pytest.mark.parametrize("values", [(0.5,) * 4, (None,) * 4, (0.1, 0.2, None, None)])
def test_a_proxy_that_cannot_rank_the_layers_has_no_correlation(values):
    table = make_sweep(SWEPT, proxies={"relative_norm": values}).proxy_correlations()
    assert table[["spearman", "low", "high"]].isna().all(axis=None)


def test_correlations_are_missing_without_scores_questions_or_proxies():
    incoherent = {(layer, 4.0): ([None] * 4, 10.0) for layer in range(4)}
    table = make_sweep(SWEPT | incoherent, proxies={"relative_norm": (0.1, 0.2, 0.3, 0.4)}).proxy_correlations()
    assert table.set_index("coefficient").spearman.isna().to_dict() == {1.0: False, 4.0: True}
    cells = {(layer, 1.0): [10.0 * layer] for layer in range(4)}
    table = make_sweep(cells, baseline=(1.0,), proxies={"split_half": (1.0, 2.0, 3.0, 4.0)}).proxy_correlations()
    assert table.spearman.tolist() == [pytest.approx(1)]
    assert table[["low", "high"]].isna().all(axis=None)
    table = make_sweep(SWEPT).proxy_correlations()
    assert table.empty
    assert "spearman" in table.columns
