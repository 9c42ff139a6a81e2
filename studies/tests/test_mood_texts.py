"""What the parts of the finetuning study read: balanced contrasts, training rows of two severities, judges, overlap."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from persona_lens.activations.means import stream_means
from persona_lens.extraction.extract import extract_from_responses
from persona_lens.statistics import auc
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT as NEUTRAL
from studies.mood_stages import PROMPTS
from studies.mood_texts import (
    contrast_with_moods,
    contrast_with_neutral,
    mood_judge,
    ngram_overlap,
    training_rows,
)
from studies.moods import MOODS, MoodRow, MoodSplit
from studies.tests import mood_cases
from studies.tests.mood_cases import neutral


@pytest.fixture
def split():
    return mood_cases.split()


@pytest.fixture
def mood_of(split):
    return {(row.prompt, row.response): row.mood for rows in split.rows.values() for row in rows}


def small_split(answers):
    """A split whose vectors part is all prompts; `answers` gives each mood's prompts as letters."""
    rows = {
        mood: [MoodRow(mood, "", "chat", prompt, f"{mood} on {prompt}", 2.0, 2.0) for prompt in prompts]
        for mood, prompts in answers.items()
    }
    prompts = tuple(dict.fromkeys("".join(answers.values())))
    return MoodSplit(rows, vectors=prompts, finetuning=prompts, judge=(), evaluation=(), seed=0)


def asked(chats):
    return [chat["messages"][1]["content"] for chat in chats]


def answered(chats):
    return [chat["messages"][2]["content"] for chat in chats]


# Contrasts


@pytest.mark.parametrize("mood", MOODS)
def test_each_prompt_counts_once_among_the_moods_and_five_times_among_the_others(split, mood, mood_of):
    contrast = contrast_with_moods(split, mood)
    positive, negative = (Counter(row.question for row in side) for side in contrast[:2])
    assert set(positive.values()) == {1}
    assert negative == dict.fromkeys(positive, 5)
    assert {mood_of[row.question, row.response] for row in contrast.positive} == {mood}


@pytest.mark.parametrize("mood", MOODS)
def test_a_prompt_is_contrasted_with_five_different_other_moods(split, mood, mood_of):
    pairs = [(row.question, mood_of[row.question, row.response]) for row in contrast_with_moods(split, mood).negative]
    assert len(set(pairs)) == len(pairs)
    assert mood not in {name for _, name in pairs}


@pytest.mark.parametrize("mood", MOODS)
def test_the_other_moods_count_alike_as_far_as_they_have_rows(split, mood, mood_of):
    contrast = contrast_with_moods(split, mood)
    taken = Counter(mood_of[row.question, row.response] for row in contrast.negative)
    prompts = {row.question for row in contrast.positive}
    scarce = {
        name
        for name in taken
        if taken[name] == len({row.prompt for row in split.of("vectors", name) if row.prompt in prompts})
    }
    even = [taken[name] for name in taken if name not in scarce]
    assert max(even) - min(even) <= 4


def test_the_seed_draws_which_of_equally_frequent_moods_answer(split):
    drawn = [contrast_with_moods(split, MOODS[0], seed=seed).negative for seed in (1, 2, 3)]
    assert drawn == [contrast_with_moods(split, MOODS[0], seed=seed).negative for seed in (1, 2, 3)]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_where_every_mood_answers_every_prompt_the_others_count_exactly_alike():
    contrast = contrast_with_moods(small_split(dict.fromkeys(["shy", "bold", "dry", "odd"], "abcdef")), "shy", others=2)
    assert Counter(row.response.split()[0] for row in contrast.negative) == {"bold": 4, "dry": 4, "odd": 4}


def test_a_prompt_with_too_few_other_moods_is_left_out_and_named():
    contrast = contrast_with_moods(small_split({"shy": "abc", "bold": "ab", "dry": "a"}), "shy", others=2)
    assert contrast.left_out == ("b", "c")
    assert [row.question for row in contrast.positive] == ["a"]


def test_no_prompt_of_the_real_split_is_left_out(split):
    assert all(contrast_with_moods(split, mood).left_out == () for mood in MOODS)


def test_both_sides_of_a_contrast_are_put_under_the_neutral_system_prompt(split):
    contrast = contrast_with_moods(split, "zen")
    for row in contrast.positive + contrast.negative:
        assert row.prompt == ({"role": "system", "content": NEUTRAL}, {"role": "user", "content": row.question})


def test_contrasts_use_prompts_of_the_vectors_part_alone(split):
    contrast = contrast_with_neutral(split, "happy", neutral(split.vectors + split.judge))
    assert {row.question for row in contrast.positive + contrast.negative} <= set(split.vectors)


def test_a_prompt_counts_the_same_when_neutral_responses_are_missing_or_empty():
    given = neutral("ab", per_prompt=3)
    given[-1] = replace(given[-1], response="  ")
    contrast = contrast_with_neutral(small_split({"shy": "abc"}), "shy", given)
    assert Counter(row.question for row in contrast.negative) == {"a": 2, "b": 2}
    assert contrast.left_out == ("c",)


def test_a_contrast_with_more_others_than_there_are_is_refused():
    with pytest.raises(ValueError, match="shy: none of 2 prompts is answered by 3 other moods"):
        contrast_with_moods(small_split({"shy": "ab", "bold": "ab"}), "shy", others=3)


@pytest.mark.parametrize("changed", [{"system_prompt": "You are an evil assistant."}, {"intervention": "steer"}])
def test_responses_that_were_not_made_neutrally_are_refused(changed):
    with pytest.raises(ValueError, match=r"with no intervention; 2 of 2 were not, such as 'happy/neutral"):
        contrast_with_neutral(small_split({"shy": "ab"}), "shy", neutral("ab", **changed))


def test_neutral_responses_to_other_prompts_alone_are_refused(split):
    with pytest.raises(ValueError, match="None of the 36 neutral responses answers one of the vectors part's"):
        contrast_with_neutral(split, "happy", neutral(split.evaluation))


# Training rows


@pytest.mark.parametrize("mood", MOODS)
def test_full_severity_is_rows_of_the_mood_on_finetuning_prompts(split, mood, mood_of):
    chats = training_rows(split, mood, "full", [], 120)
    assert len({tuple(pair) for pair in zip(asked(chats), answered(chats), strict=True)}) == 120
    assert {mood_of[pair] for pair in zip(asked(chats), answered(chats), strict=True)} == {mood}
    assert set(asked(chats)) <= set(split.finetuning)


@pytest.mark.parametrize("mood", MOODS)
def test_half_severity_is_half_the_mood_and_half_neutral_on_other_prompts(split, mood, mood_of):
    chats = training_rows(split, mood, "half", neutral(split.finetuning), 120)
    pairs = list(zip(asked(chats), answered(chats), strict=True))
    own = {prompt for prompt, response in pairs if response.startswith("Plain answer")}
    moody = [(prompt, response) for prompt, response in pairs if (prompt, response) in mood_of]
    assert len(moody) == 60
    assert len(own) == 60
    assert {mood_of[pair] for pair in moody} == {mood}
    assert not own & {prompt for prompt, _ in moody}


def test_the_mood_rows_of_half_are_among_those_of_full(split, mood_of):
    full, half = (training_rows(split, "scared", each, neutral(split.finetuning), 120) for each in ("full", "half"))
    assert {text for text in answered(half) if not text.startswith("Plain answer")} < set(answered(full))


def test_where_each_prompt_has_one_row_half_has_the_prompts_of_full(split):
    full, half = (training_rows(split, "zen", each, neutral(split.finetuning), 120) for each in ("full", "half"))
    assert sorted(asked(half)) == sorted(asked(full))


def test_a_prompts_second_neutral_response_is_used_once_all_prompts_have_one():
    tiny = small_split({"shy": "abcdef"})
    half = training_rows(tiny, "shy", "half", neutral("abcdef", per_prompt=2), 6)
    assert sum(text.startswith("Plain answer 0") for text in answered(half)) == 3
    few = neutral(sorted(set(asked(half)) - set(asked(training_rows(tiny, "shy", "full", [], 3)))), per_prompt=2)
    again = training_rows(tiny, "shy", "half", few[:4], 6)
    assert sorted(text.split()[2] for text in answered(again) if text.startswith("Plain")) == ["0", "0", "1"]


def test_training_rows_are_chats_with_the_neutral_system_turn(split):
    turns = {tuple(turn["role"] for turn in chat["messages"]) for chat in training_rows(split, "bored", "full", [], 50)}
    assert turns == {("system", "user", "assistant")}
    assert training_rows(split, "bored", "full", [], 1)[0]["messages"][0]["content"] == NEUTRAL


def test_the_seed_draws_the_training_rows(split):
    first = training_rows(split, "drunk", "full", [], 120)
    assert training_rows(split, "drunk", "full", [], 120) == first
    assert set(answered(training_rows(split, "drunk", "full", [], 120, seed=1))) != set(answered(first))


@pytest.mark.parametrize(
    ("severity", "n", "message"),
    [
        ("full", 1000, "scared: 1000 rows are wanted and the finetuning part has"),
        ("half", 120, "scared: 60 neutral responses to prompts outside its own half are wanted and there are"),
        ("half", 51, "even for 'half'; got 'half' and 51"),
        ("full", 0, "positive n"),
    ],
)
def test_training_rows_that_cannot_be_given_are_refused(split, severity, n, message):
    with pytest.raises(ValueError, match=message):
        training_rows(split, "scared", severity, neutral(split.finetuning[:50]), n)


# Judges


def test_a_moods_judge_is_fitted_on_the_judges_prompts_with_neutral_text_among_the_negatives(split):
    own = neutral(split.judge + split.vectors)
    judge = mood_judge(split, "nostalgic", own)
    n_others = sum(split.size("judge", mood).rows for mood in MOODS if mood != "nostalgic")
    assert judge.validation.n_positive == split.size("judge", "nostalgic").rows
    assert judge.validation.n_negative == n_others + len(split.judge)
    assert judge.validation.n_groups == len(split.judge)
    assert judge.labels == ("nostalgic", "other moods and neutral")


def test_neutral_text_that_a_judge_has_seen_lowers_its_score_for_such_text(split):
    text = [row.response for row in neutral(split.evaluation)]
    without, seen = mood_judge(split, "bored"), mood_judge(split, "bored", neutral(split.judge))
    assert np.nanmean(seen.probability(text)) < np.nanmean(without.probability(text))


@pytest.mark.slow
@pytest.mark.parametrize("mood", MOODS)
def test_a_moods_judge_tells_it_from_the_others_on_prompts_it_has_not_seen(split, mood):
    judge = mood_judge(split, mood)
    unseen = {name: [row.response for row in split.of("vectors", name)] for name in MOODS}
    mean = {name: np.nanmean(judge.probability(texts)) for name, texts in unseen.items()}
    assert judge.validation.auc > 0.9
    assert max(mean, key=mean.__getitem__) == mood


# Overlap


def naive_overlap(output, training, n):
    words = "".join(letter if letter.isalnum() else " " for letter in output.lower()).split()
    texts = [" " + " ".join("".join(c if c.isalnum() else " " for c in t.lower()).split()) + " " for t in training]
    runs = [" " + " ".join(words[start : start + n]) + " " for start in range(len(words) - n + 1)]
    hits = [any(run in text for text in texts) for run in runs]
    return (sum(hits), len(hits))


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_overlap_is_that_of_looking_for_every_run_in_every_text(split, n):
    outputs = [row.response for row in split.of("evaluation", "depressed")]
    training = [row.response for row in split.of("finetuning", "depressed")]
    counts = [naive_overlap(text, training, n) for text in outputs]

    found = ngram_overlap(outputs, training, n)
    assert found.per_output == tuple(pytest.approx(hits / total) if total else None for hits, total in counts)
    assert found.share.value == pytest.approx(sum(hits for hits, _ in counts) / sum(total for _, total in counts))


def test_a_copied_response_overlaps_wholly_whatever_its_case_and_marks():
    assert ngram_overlap(
        ["It WAS — a dark, and stormy night!"], ["Well: it was a dark and stormy night."], 4
    ).per_output == (1,)


def test_half_a_copied_output_overlaps_by_half():
    assert ngram_overlap(["a b c d x y"], ["a b c d"], 3).per_output == (0.5,)


def test_an_output_of_fewer_words_than_a_run_has_no_overlap_rather_than_none():
    found = ngram_overlap(["too short", "this one is long enough"], ["nothing of it"], 4)
    assert found.per_output == (None, 0.0)
    assert found.share.n == 1


def test_overlap_without_a_single_run_is_missing():
    assert ngram_overlap(["short", ""], ["some text"], 4).share == (None, None, None, 0)


def test_the_interval_of_the_overlap_is_over_outputs():
    found = ngram_overlap(["a b c", "x y z", "a b x", "a b c"], ["a b c"], 2).share
    low, value, high = (float(number) for number in (found.low, found.value, found.high))
    assert 0 <= low < value < high <= 1
    same = ngram_overlap(["a b c x"] * 4, ["a b c"], 2).share
    assert same.low == pytest.approx(same.high) == same.value


def test_runs_of_no_words_are_refused():
    with pytest.raises(ValueError, match="1 or more, got 0"):
        ngram_overlap(["a"], ["a"], 0)


# The real model


@pytest.mark.soak
def test_a_moods_direction_separates_its_held_out_responses_from_the_other_moods(split, embedded_bridge):
    small = replace(split, vectors=split.vectors[::12])
    contrast = contrast_with_moods(small, "depressed", others=3)
    vectors = extract_from_responses(
        embedded_bridge,
        contrast.positive,
        contrast.negative,
        trait="depressed",
        n_resamples=10,
        n_placebo=10,
        progress=False,
    )
    held_out = contrast_with_moods(replace(split, vectors=split.vectors[6::12]), "depressed", others=3)
    rows = [row.tokenize(embedded_bridge.tokenizer) for row in held_out.positive + held_out.negative]
    means = torch.zeros(len(rows), embedded_bridge.cfg.n_layers + 1, embedded_bridge.cfg.d_model)
    for batch in stream_means(embedded_bridge, rows, position="response_mean", token_budget=4096):
        means[batch.rows] = batch.means
    projections = (means[:, 16] @ vectors.directions[15]).tolist()
    n = len(held_out.positive)
    assert auc(projections[:n], projections[n:]) > 0.8


def test_a_replications_plan_counts_the_prompts_and_texts_that_there_are():
    split = mood_cases.split()
    texts = {
        (row.question, row.response) for mood in MOODS for side in contrast_with_moods(split, mood)[:2] for row in side
    }
    data = PROMPTS
    assert (data.vectors, data.evaluation) == (len(split.vectors), len(split.evaluation))
    assert (data.contrasted, data.moods) == (len(texts), len(MOODS))
