"""The monitoring experiments: their conditions, their correlations, and a run from end to end."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from persona_lens.monitoring.experiment import (
    MonitoringExperiment,
    judged_examples,
    many_shot,
    monitoring_experiment,
    system_prompts,
)
from persona_lens.rollouts.rows import Rollout
from persona_lens.statistics import N_RESAMPLES, question_resamples
from persona_lens.storage.files import JsonLines
from persona_lens.traits.trait import load_trait
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests.evaluation_cases import TRAIT
from tests.monitoring_cases import LengthJudge, experiment, points

EXAMPLES = [(f"Question {number}?", f"Answer {number}.") for number in range(8)]


@pytest.fixture
def noisy():
    """Three conditions of six questions: levels that rise together, and within them a weaker tie."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(3, 6)), random.normal(size=(3, 6))
    return experiment(
        points(
            ["low", "middle", "high"],
            [f"Question {number}?" for number in range(6)],
            lambda c, q: 10 * c + x[c, q],
            lambda c, q: float(40 + 15 * c + 3 * x[c, q] + 3 * y[c, q]),
        )
    )


def naive_pearson(rows):
    x, y = zip(*rows, strict=True)
    return float(np.corrcoef(x, y)[0, 1])


def test_the_overall_correlation_is_pearsons_over_all_points(noisy):
    rows = [(point.projections[0], point.trait_score) for point in noisy.points]

    found = noisy.overall()
    assert found.value == pytest.approx(naive_pearson(rows))
    assert found.n == 18
    assert found.low < found.value < found.high
    some = experiment(tuple(replace(p, trait_score=None) if i < 2 else p for i, p in enumerate(noisy.points)))
    assert (some.overall().value, some.overall().n) == (pytest.approx(naive_pearson(rows[2:])), 16)
    assert "2 points have no score" in str(some)
    curve = noisy.curve()  # the second layer's projections are twice the first one's
    assert curve.loc[1, "overall"] == pytest.approx(curve.loc[0, "overall"]) == found.value
    assert curve.loc[0, "within_low"] < curve.loc[0, "within"] < curve.loc[0, "within_high"]
    still = experiment(points(["one", "two"], ["a", "b", "c"], lambda c, q: c, lambda c, q: 50.0))
    assert (still.overall().value, still.within().value) == (None, None)
    assert "undefined overall, undefined within 0 conditions" in str(still)


def test_the_correlation_within_is_the_mean_over_conditions(noisy):
    each = [
        naive_pearson([(p.projections[0], p.trait_score) for p in noisy.points if p.condition == name])
        for name in noisy.conditions
    ]
    assert noisy.within().value == pytest.approx(np.mean(each))
    assert noisy.within().value < noisy.overall().value


def test_intervals_resample_questions_and_not_points(noisy):
    drawn = question_resamples(6, N_RESAMPLES, 0)[:200]
    questions = [f"Question {number}?" for number in range(6)]
    naive = []
    for counts in drawn:
        rows = [
            (p.projections[0], p.trait_score) for p in noisy.points for _ in range(counts[questions.index(p.question)])
        ]
        naive.append(naive_pearson(rows))
    low, high = np.percentile(naive, [2.5, 97.5])
    assert noisy.overall().low == pytest.approx(low, abs=0.02)
    assert noisy.overall().high == pytest.approx(high, abs=0.02)


def test_a_condition_whose_scores_hardly_vary_is_left_out_within(noisy):
    flat = tuple(
        replace(point, trait_score=50.0 + 0.1 * len(point.question)) if point.condition == "low" else point
        for point in noisy.points
    )
    rest = experiment(tuple(point for point in noisy.points if point.condition != "low"))
    assert experiment(flat).within().value == pytest.approx(rest.within().value)
    assert experiment(flat).summary()["conditions_within"] == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"points": []}, "it has no points"),
        ({"layer": 2}, "expected a number from 0 to 1, got 2"),
        ({"seed": None}, "got None"),
    ],
)
def test_an_experiment_is_read_back_as_it_was_and_a_damaged_one_refused(noisy, tmp_path, change, words):
    path = tmp_path / "experiment.json"
    noisy.save(path)
    again = MonitoringExperiment.load(path)
    assert (again, again.summary()) == (noisy, noisy.summary())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"experiment.json is not a whole monitoring experiment .*{words}"):
        MonitoringExperiment.load(path)


def test_every_question_is_asked_under_each_of_the_eight_prompts():
    trait = load_trait("optimistic")
    planned = system_prompts(trait, trait.evaluation_questions[:3], per_question=2)
    assert len({prompt.key for prompt in planned}) == len(planned) == 8 * 3 * 2
    assert [p.system_prompt for p in planned if p.question == planned[0].question][::2] == list(
        trait.monitoring_prompts
    )
    with pytest.raises(ValueError, match="has no monitoring prompts"):
        system_prompts(replace(trait, monitoring_prompts=()), trait.evaluation_questions)


def test_a_longer_context_begins_with_the_examples_of_a_shorter_one():
    planned = many_shot(TRAIT, ["Question 0?", "Else?"], EXAMPLES, shots=(0, 3, 6), per_question=1)
    by_count = {prompt.condition: prompt for prompt in planned if prompt.question == "Question 0?"}

    assert len({prompt.key for prompt in planned}) == len(planned) == 6
    assert by_count["0 examples"].examples == ()
    assert by_count["6 examples"].examples[:3] == by_count["3 examples"].examples
    assert "Question 0?" not in [asked for asked, _ in by_count["6 examples"].examples]
    assert len(by_count["6 examples"].messages) == 1 + 2 * 6 + 1


@pytest.mark.parametrize(
    ("shots", "said"), [((0, 20), "20 examples are wanted and 8 are there"), ((5, 0), "ascending"), ((), "ascending")]
)
def test_shots_that_cannot_be_shown_are_refused(shots, said):
    with pytest.raises(ValueError, match=said):
        many_shot(TRAIT, ["Else?"], EXAMPLES, shots=shots)


def test_projections_are_those_of_each_prompts_last_token(tiny_model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(tiny_model.cfg.n_layers, tiny_model.cfg.d_model, generator=generator)
    vectors = PersonaVectors.from_directions(directions, trait="grumpy", model=tiny_model)
    prompts = many_shot(TRAIT, ["Else?", "How?"], EXAMPLES[:3], shots=(0, 2), per_question=3)
    run = {"judge": LengthJudge(), "layer": 1, "max_new_tokens": 8, "output_dir": tmp_path, "progress": False}
    found = monitoring_experiment(tiny_model, vectors, TRAIT, prompts, **run)
    assert [(point.condition, point.question, point.responses) for point in found.points] == [
        ("0 examples", "Else?", 3),
        ("0 examples", "How?", 3),
        ("2 examples", "Else?", 3),
        ("2 examples", "How?", 3),
    ]
    for point, prompt in zip(found.points, prompts[::3], strict=True):
        ids = torch.tensor([prompt.tokenize(tiny_model.tokenizer).prompt])
        _, cache = tiny_model.run_with_cache(ids)
        last = [cache[name][0, -1] for name in vectors.hook_names]
        expected = [float(vectors.at(layer).project(resid)) for layer, resid in enumerate(last)]
        assert point.projections == pytest.approx(expected, rel=1e-5)
    assert MonitoringExperiment.load(tmp_path / "experiment.json") == found
    assert monitoring_experiment(tiny_model, vectors, TRAIT, prompts, **run) == found
    with pytest.raises(ValueError, match="are repeated"):
        monitoring_experiment(
            tiny_model, vectors, TRAIT, [*prompts, *prompts], **run | {"output_dir": tmp_path / "twice"}
        )
    assert not list((tmp_path / "twice").glob("*.json*"))


def test_the_eight_prompts_of_a_real_trait_are_told_apart_on_the_embedded_model(embedded_bridge):
    trait = load_trait("optimistic")
    shape = (embedded_bridge.cfg.n_layers, embedded_bridge.cfg.d_model)
    directions = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    vectors = PersonaVectors.from_directions(directions, trait=trait.name, model=embedded_bridge)
    prompts = system_prompts(trait, trait.evaluation_questions[:2], per_question=1)
    run = {"judge": LengthJudge(), "layer": 22, "max_new_tokens": 8, "progress": False}
    found = monitoring_experiment(embedded_bridge, vectors, trait, prompts, **run)

    at_layer = {round(point.projections[22], 3) for point in found.points}
    assert len(found.points) == len(at_layer) == 16
    assert found.overall().n == 16
    assert set(found.table()["responses"]) == {2}


def test_examples_are_the_highest_judged_positive_response_to_each_question(tmp_path):
    def row(question, sample, polarity="positive"):
        text = f"{question} {sample}"
        return Rollout("grumpy", polarity, 0, "Be so.", question, sample, text, None, "stop", "by hand", 0)

    scores = {
        row("a", 0): 60.0,
        row("a", 1): 90.0,
        row("a", 2): 70.0,
        row("b", 0): 40.0,
        row("c", 0): None,
        row("d", 0, "negative"): 99.0,
        row("e", 0): 50.0,
    }
    JsonLines(tmp_path / "rollouts.jsonl").append(map(asdict, scores))
    JsonLines(tmp_path / "scores.jsonl").append(
        {"key": each.key, "trait_score": score, "coherence": 90.0, "judge": "by hand"} for each, score in scores.items()
    )
    assert sorted(judged_examples(tmp_path)) == [("a", "a 1"), ("e", "e 0")]
    assert judged_examples(tmp_path, threshold=80.0) == [("a", "a 1")]
