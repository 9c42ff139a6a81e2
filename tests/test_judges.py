"""Coherence, log-likelihoods and files of scores: what every judge of a response rests on."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_lens.chat.batches import ChatTokens
from persona_lens.judges.likelihood_ratio import (
    CoherenceScale,
    distinct_four_grams,
    loop_words,
    mean_log_likelihoods,
    shuffle_words,
)
from persona_lens.judges.scores import CombinedJudge, Score, read_scores, scorable_questions, score_rollouts
from persona_lens.models.forward import forward
from persona_lens.models.structure import resid_post_name
from persona_lens.rollouts.rows import Rollout
from persona_lens.traits.trait import load_trait
from tests import naive

# Coherence

NLLS = st.lists(st.floats(0.0, 8.0), min_size=1, max_size=9)
SCALE = CoherenceScale(centre=4.0, width=0.5, distinct_floor=0.9)


@given(clean=NLLS, extra=NLLS)
def test_the_median_responses_of_the_fit_score_90_and_10(clean, extra):
    shuffled = [max(clean) + 0.1 + value for value in extra]
    scale = CoherenceScale.fit(clean, shuffled, [1.0])
    assert scale.score(float(np.median(clean)), 1.0) == pytest.approx(90)
    assert scale.score(float(np.median(shuffled)), 1.0) == pytest.approx(10)


def test_the_floor_of_distinct_four_grams_is_their_5th_percentile():
    distinct = np.linspace(0.5, 1.0, 101).tolist()
    assert CoherenceScale.fit([1.0], [2.0], distinct).distinct_floor == pytest.approx(0.525)


def test_coherence_falls_with_unlikely_and_with_repeated_text_and_stays_on_the_scale():
    scores = [SCALE.score(nll, 1.0) for nll in (0.0, 1.0, 3.0, 4.0, 5.0, 9.0, 1e3, 1e9)]
    assert scores == sorted(scores, reverse=True)
    assert scores[3] == pytest.approx(50)
    assert 0 <= scores[-1] <= scores[0] <= 100
    assert SCALE.score(2.0, 0.09) == pytest.approx(SCALE.score(2.0, 0.9) / 10)
    assert SCALE.score(2.0, 1.0) == SCALE.score(2.0, 0.9)


@pytest.mark.parametrize("shuffled", [[2.0, 2.0], [1.0, 1.5], [math.nan, math.nan]])
def test_a_model_that_finds_shuffled_text_as_likely_cannot_judge(shuffled):
    with pytest.raises(ValueError, match=r"Shuffled text is as likely as clean text .* cannot judge coherence"):
        CoherenceScale.fit([2.0, 2.0], shuffled, [1.0])


@pytest.mark.parametrize(
    ("tokens", "share"),
    [((1, 2, 3, 4, 5), 1.0), ((7,) * 13, 0.1), ((1, 2, 3), 1.0), ((), 1.0), ((1, 2) * 5, 2 / 7)],
)
def test_the_share_of_distinct_four_grams(tokens, share):
    assert distinct_four_grams(tokens) == pytest.approx(share)


@given(words=st.lists(st.sampled_from(["one", "two", "three", "four"]), max_size=20), seed=st.integers(0, 99))
def test_shuffled_text_has_the_words_of_its_original(words, seed):
    assert sorted(shuffle_words(" ".join(words), seed).split()) == sorted(words)
    assert shuffle_words(" ".join(words), seed) == shuffle_words(" ".join(words), seed)


def test_another_seed_shuffles_otherwise():
    text = "the quick brown fox jumps over the lazy dog"
    assert shuffle_words(text, 1) != shuffle_words(text, 2)


@given(words=st.lists(st.sampled_from(["one", "two", "three", "four"]), max_size=20))
def test_looping_text_has_the_length_and_the_first_words_of_its_original(words):
    looped = loop_words(" ".join(words)).split()
    assert len(looped) == len(words)
    assert looped[:6] == words[:6]
    assert all(word == looped[place % 6] for place, word in enumerate(looped))


# Log-likelihoods


def mixed_rows():
    """Two prompts that are shared and one that is not, responses of many lengths, some of one token or none."""
    generator = torch.Generator().manual_seed(0)
    prompts = [random_ids(generator, length) for length in (9, 4, 6)]
    shapes = [(0, 12), (1, 3), (0, 1), (1, 0), (2, 7), (1, 1), (0, 5), (1, 12)]
    return [ChatTokens(prompts[prompt], random_ids(generator, length)) for prompt, length in shapes]


def random_ids(generator, length):
    return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())


def naive_means(hf_model, rows):
    sums = [naive.log_likelihood(hf_model, (row.prompt, row.response)) for row in rows]
    return [total / len(row.response) if row.response else math.nan for total, row in zip(sums, rows, strict=True)]


def test_mean_log_likelihoods_are_those_of_one_row_at_a_time(tiny_model, tiny_hf_model, tiny_gpt2, tiny_hf_gpt2):
    for model, plain in ((tiny_model, tiny_hf_model), (tiny_gpt2, tiny_hf_gpt2)):
        np.testing.assert_allclose(
            mean_log_likelihoods(model, mixed_rows()), naive_means(plain, mixed_rows()), rtol=2e-6
        )


def test_mean_log_likelihoods_of_real_text_are_those_of_one_row_at_a_time(embedded_model, embedded_hf_model):
    encode = embedded_model.tokenizer.encode
    prompts = [tuple(encode(text)) for text in ("The capital of France is", "Two and two")]
    texts = [" Paris, a city of lights.", " Paris", " are four.", ""]
    rows = [ChatTokens(prompt, tuple(encode(text))) for prompt in prompts for text in texts]
    found = mean_log_likelihoods(embedded_model, rows)
    np.testing.assert_allclose(found, naive_means(embedded_hf_model, rows), atol=1e-3)


def test_the_likelihood_of_one_token_comes_from_the_end_of_the_prompt(tiny_model, tiny_hf_model):
    (found,) = mean_log_likelihoods(tiny_model, [ChatTokens((5, 6, 7), (8,))])
    expected = naive.logits(tiny_hf_model, [5, 6, 7])[-1].log_softmax(dim=-1)[8]
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_how_many_logits_are_held_at_a_time_does_not_change_a_likelihood(tiny_model, monkeypatch):
    whole = mean_log_likelihoods(tiny_model, mixed_rows())
    monkeypatch.setattr("persona_lens.judges.likelihood_ratio.LOGIT_VALUES", 1)
    np.testing.assert_allclose(mean_log_likelihoods(tiny_model, mixed_rows()), whole, rtol=1e-6)


def test_likelihoods_do_not_see_a_steering_hook(tiny_model):
    plain = mean_log_likelihoods(tiny_model, mixed_rows())
    with tiny_model.hooks(fwd_hooks=[(resid_post_name(1), lambda resid, hook: resid + 50)]):
        steered = mean_log_likelihoods(tiny_model, mixed_rows())
        logits, _ = forward(tiny_model, torch.tensor([[5, 6]]), torch.ones(1, 2).bool(), last_logits=1)
    unsteered, _ = forward(tiny_model, torch.tensor([[5, 6]]), torch.ones(1, 2).bool(), last_logits=1)
    assert not torch.allclose(logits, unsteered), "the hook did nothing"
    assert steered.numpy().tobytes() == plain.numpy().tobytes()


# Scores in a file


class LengthJudge:
    """Scores by the length of the response; empty ones get no score. It writes down what it was asked."""

    def __init__(self, name="length", batch_size=3, fail_after=None):
        self.called, self.batch_size, self.fail_after = name, batch_size, fail_after
        self.asked = []

    def name(self, trait):
        return f"{self.called} of {trait.name}"

    def score(self, trait, rollouts, *, progress=False):
        if len(self.asked) == self.fail_after:
            raise RuntimeError("the power went out")
        self.asked.append([row.sample for row in rollouts])
        return [
            Score(None, None) if row.is_empty else Score(length, 90.0, {"length": length})
            for row in rollouts
            for length in [float(len(row.response))]
        ]


@pytest.fixture(scope="module")
def trait():
    return load_trait("evil")


ROLLOUTS = [
    Rollout("evil", "positive", 0, "S", "Why?", sample, "x" * sample, None, "stop", "engine", 0) for sample in range(8)
]


def score(judge, trait, output, rollouts=ROLLOUTS):
    return score_rollouts(rollouts, trait, judge=judge, output_file=output, progress=False)


def test_the_scores_in_the_file_are_those_returned(trait, tmp_path):
    scored = score(LengthJudge(), trait, tmp_path / "scores.jsonl")
    assert read_scores(tmp_path / "scores.jsonl", ROLLOUTS) == scored
    assert [row.rollout for row in scored] == ROLLOUTS
    assert [row.trait_score for row in scored] == [None, *map(float, range(1, 8))]
    first = json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[0])
    assert (first["trait_score"], first["coherence"]) == (None, None)


def test_an_interrupted_judge_goes_on_to_the_same_scores_and_scores_none_twice(trait, tmp_path):
    whole = score(LengthJudge(), trait, tmp_path / "whole.jsonl")
    with pytest.raises(RuntimeError, match="the power went out"):
        score(LengthJudge(fail_after=2), trait, tmp_path / "scores.jsonl")
    resumed = LengthJudge()
    assert score(resumed, trait, tmp_path / "scores.jsonl") == whole
    assert resumed.asked == [[5, 6, 7]]
    assert (tmp_path / "scores.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@given(cut=st.just(0) | st.integers(10, 1100))  # the file has 1000 bytes or so; fewer than 10 do not say whose they are
def test_a_file_of_scores_cut_anywhere_resumes_to_the_same_file(trait, tmp_path_factory, cut):
    output = tmp_path_factory.mktemp("cut") / "scores.jsonl"
    scored = score(LengthJudge(), trait, output)
    whole = output.read_bytes()
    output.write_bytes(whole[:cut])
    assert score(LengthJudge(), trait, output) == scored
    assert output.read_bytes() == whole


@pytest.mark.parametrize("content", ['{"key": "of the house"}', "my scores", '{"key": 1}\n{"key"'])
def test_a_file_that_holds_no_scores_is_left_as_it_was(trait, tmp_path, content):
    judge = LengthJudge()
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(ValueError, match=r"scores.json holds something else: expected rows with key, trait_score"):
        score(judge, trait, tmp_path / "scores.json")
    assert judge.asked == []
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"scores.json": content}


def test_an_output_that_cannot_be_written_is_refused_before_any_scoring(trait, tmp_path):
    judge = LengthJudge()
    with pytest.raises(OSError, match="Cannot write"):
        score(judge, trait, tmp_path)
    assert judge.asked == []


def test_scores_of_another_judge_in_the_file_are_refused(trait, tmp_path):
    score(LengthJudge(), trait, tmp_path / "scores.jsonl")
    before = (tmp_path / "scores.jsonl").read_bytes()
    words = r"scores\.jsonl, line 1, was scored by another judge \('length of evil', now 'other of evil'\)"
    with pytest.raises(ValueError, match=words):
        score(LengthJudge("other"), trait, tmp_path / "scores.jsonl")
    assert (tmp_path / "scores.jsonl").read_bytes() == before


def test_scores_of_other_rollouts_stay_in_the_file(trait, tmp_path):
    score(LengthJudge("other"), trait, tmp_path / "scores.jsonl", ROLLOUTS[:3])
    score(LengthJudge(), trait, tmp_path / "scores.jsonl", ROLLOUTS[3:])
    assert [row.trait_score for row in read_scores(tmp_path / "scores.jsonl", ROLLOUTS[1:4])] == [1.0, 2.0, 3.0]


def test_a_rollout_without_a_line_is_named(trait, tmp_path):
    score(LengthJudge(), trait, tmp_path / "scores.jsonl", ROLLOUTS[:6])
    with pytest.raises(ValueError, match=r"no line for 2 of 8 rollouts, such as 'evil/positive/0/6/Why\?'"):
        read_scores(tmp_path / "scores.jsonl", ROLLOUTS)


@pytest.mark.parametrize("change", [{"trait_score": 101.0}, {"coherence": -1.0}, {"coherence": "high"}])
def test_a_line_that_is_no_score_is_named(trait, tmp_path, change):
    score(LengthJudge(), trait, tmp_path / "scores.jsonl")
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | change)
    (tmp_path / "scores.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"scores\.jsonl, line 5: not a score"):
        read_scores(tmp_path / "scores.jsonl", ROLLOUTS)


def test_a_score_that_rounding_moved_off_the_scale_is_its_end():
    assert Score(100.00000000000001, -1e-14) == Score(100.0, 0.0)
    for value in (100.5, 100.0001, -0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="from 0 to 100"):
            Score(value, None)


# Two judges as one


class Fixed:
    """A judge that always gives one score."""

    batch_size = 10

    def __init__(self, score, questions=None):
        self.given = score
        if questions is not None:
            self.used_questions = lambda trait: questions

    def name(self, trait):
        return f"always {self.given.trait_score}"

    def score(self, trait, rollouts, *, progress=False):
        return [self.given for _ in rollouts]


def test_a_combined_judge_takes_the_trait_from_the_first_and_coherence_from_the_second(trait):
    first, second = Score(80.0, None, {"terms": 3.0}), Score(10.0, 95.0, {"nll": 2.0})
    judge = CombinedJudge(Fixed(first, ("a", "b")), Fixed(second, ("b", "c")))
    assert judge.score(trait, ROLLOUTS[:1]) == [Score(80.0, 95.0, {"terms": 3.0, "nll": 2.0})]
    assert judge.name(trait) == "trait by always 80.0; coherence by always 10.0"
    assert scorable_questions(judge, trait, ["a", "b", "c", "d"]) == ["d"]
    assert CombinedJudge(Fixed(first), Fixed(second)).used_questions(trait) == ()


def test_the_judge_before_the_rollouts_is_refused_with_the_new_order(trait, shapes_unchecked):
    with pytest.raises(TypeError, match="the judge came first"):
        score_rollouts(Fixed(Score(1.0, 1.0)), trait, judge=ROLLOUTS)
