"""What a direction does at each dose: its slope on made-up scores, and whole runs on tiny models in both classes."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from persona_lens.evaluation.dose_response import DoseResponse, dose_response, random_directions
from persona_lens.evaluation.evaluate import evaluate
from persona_lens.interventions.values import Steer
from persona_lens.rollouts.engines import ModelEngine
from persona_lens.statistics import Estimate
from tests.evaluation_cases import (
    SHORT,
    TRAIT,
    FittedLetterJudge,
    LetterJudge,
    cut,
    judged,
    make_evaluation,
    naive_resamples,
    planted_vectors,
    strict_json,
)
from tests.intervention_cases import some_vectors
from tests.vector_cases import make_vectors


def make_response(cells, random=(), coefficients=(-2.0, 0.0, 1.0, 3.0)):
    """`cells` are scores, or (scores, coherence), one a coefficient; `random` several such lists."""

    def evaluations(row):
        return tuple(
            make_evaluation(cell[0], coherence=cell[1]) if isinstance(cell, tuple) else make_evaluation(cell)
            for cell in row
        )

    doses = tuple(None for _ in coefficients)
    series = tuple(evaluations(row) for row in random)
    return DoseResponse("grumpy", 3, "made up", coefficients, doses, evaluations(cells), series)


CELLS = [[10.0, 0.0, 20.0], [12.0, 9.0, None], [30.0, 25.0, 21.0], [66.0, 50.0, 80.0]]


def test_the_slope_is_that_of_polyfit_with_the_interval_of_a_naive_bootstrap():
    found = make_response(CELLS)
    x = np.array(found.coefficients)
    means = [cell.trait_score.value for cell in found.evaluations]
    resamples = np.stack([naive_resamples(cell) for cell in found.evaluations], axis=1)
    whole = resamples[~np.isnan(resamples).any(axis=1)]
    assert len(whole) < len(resamples)  # a resample of nothing but the missing answer has no mean
    low, high = np.percentile([np.polyfit(x, row, 1)[0] for row in whole], [2.5, 97.5])
    assert found.slope() == pytest.approx((np.polyfit(x, means, 1)[0], low, high, 11))


def test_slope_and_spearman_are_over_the_coherent_doses_alone():
    cells = [CELLS[0], CELLS[1], CELLS[2], ([0.0, 0.0, 0.0], 49.9)]
    found = make_response(cells)
    means = [cell.trait_score.value for cell in found.evaluations][:3]
    assert found.slope().value == pytest.approx(np.polyfit([-2.0, 0.0, 1.0], means, 1)[0])
    assert found.slope().n == 8
    assert found.spearman() == pytest.approx(stats.spearmanr([-2.0, 0.0, 1.0], means).statistic)
    everything = found.slope(min_coherence=40.0)
    means.append(0.0)
    assert everything.value == pytest.approx(np.polyfit(found.coefficients, means, 1)[0])
    assert found.spearman(min_coherence=40.0) == pytest.approx(stats.spearmanr(found.coefficients, means).statistic)


def test_doses_without_a_score_or_coherence_take_no_part():
    response = make_response([CELLS[0], CELLS[1], [None] * 3, CELLS[3]])
    means = [cell.trait_score.value for cell in response.evaluations]
    assert response.slope().value == pytest.approx(np.polyfit([-2.0, 0.0, 3.0], means[:2] + means[3:], 1)[0])
    response = make_response([(CELLS[0], 10.0), CELLS[1], (CELLS[2], 10.0), (CELLS[3], 10.0)])
    assert (response.slope(), response.spearman()) == (Estimate(None, None, None, 2), None)
    assert "- points for each 1.0 of the coefficient, Spearman undefined" in str(make_response([[None]] * 4))


def test_the_slope_over_one_question_has_no_interval():
    cells = [make_evaluation([score, score], questions=["why", "why"]) for score in (1.0, 5.0)]
    found = DoseResponse("grumpy", 3, "made up", (0.0, 1.0), (None, None), tuple(cells))
    assert found.slope() == Estimate(4.0, None, None, 4)


def test_random_directions_have_their_own_slopes_over_their_own_coherent_doses():
    found = make_response(CELLS, [CELLS[::-1], [*CELLS[:3], ([90.0, 90.0, 90.0], 1.0)]])
    falling, alike = found.random_slopes()
    assert falling == make_response(CELLS[::-1]).slope()
    assert alike.value == make_response([*CELLS[:3], ([90.0] * 3, 1.0)]).slope().value


def test_the_table_has_a_row_for_each_dose_and_the_range_of_the_random_directions():
    empty = [[None] * 3] * 4
    table = make_response(CELLS, [CELLS[::-1], CELLS, empty]).table()
    assert list(table.index) == [-2.0, 0.0, 1.0, 3.0]
    means = [np.mean([value for value in row if value is not None]) for row in CELLS]
    np.testing.assert_allclose(table.trait_score, means)
    np.testing.assert_allclose(table.random_mean, (np.array(means) + means[::-1]) / 2)
    np.testing.assert_allclose(table.random_low, np.minimum(means, means[::-1]))
    assert table.missing.tolist() == [0, 1, 0, 0]
    assert make_response(CELLS, [empty]).table().random_mean.isna().all()


def test_random_directions_have_the_vectors_norm_and_layer():
    vector = make_vectors().at(2)
    for each in random_directions(vector, 5, seed=1):
        assert math.isclose(each.norm, vector.norm, rel_tol=1e-6)
        assert (each.layer, each.residual_norm, each.d_model) == (2, vector.residual_norm, vector.d_model)
    one, again, other = (random_directions(vector, 4, seed=seed) for seed in (1, 1, 2))
    assert [each.fingerprint for each in one] == [each.fingerprint for each in again]
    assert len({each.fingerprint for each in [*one, *other]}) == 8


@pytest.fixture
def respond(tiny_model):
    """A small dose-response of a random direction; what changes from call to call is given."""

    def run(*, judge=None, coefficients=(2.0, -1.0), random=2, vector=None, **changes):
        vector = some_vectors(tiny_model).at(1) if vector is None else vector
        settings = {"batch_size": 8, **SHORT, **changes}
        judge = LetterJudge(model=tiny_model) if judge is None else judge
        return dose_response(
            tiny_model, vector, TRAIT, judge=judge, coefficients=coefficients, random=random, **settings
        )

    return run


def test_every_dose_is_an_evaluation_under_that_direction(tiny_model, respond):
    found = respond()
    vector = some_vectors(tiny_model).at(1)
    for direction, cells in zip(
        [vector, *random_directions(vector, 2)], [found.evaluations, *found.random], strict=True
    ):
        for amount, cell in zip((-1.0, 0.0, 2.0), cells, strict=True):
            alone = evaluate(tiny_model, TRAIT, judge=LetterJudge(), interventions=[Steer(direction, amount)], **SHORT)
            assert judged(cell) == judged(alone)


def test_coefficient_0_is_sampled_once_and_shared_by_all_directions(respond):
    judge = LetterJudge()
    found = respond(judge=judge, coefficients=(1.0, 0.0, 1.0))
    assert found.coefficients == (0.0, 1.0)
    assert all(cells[0] is found.evaluations[0] for cells in found.random)
    assert len(judge.judged) == len(set(judge.judged)) == 2 * (1 + 3)


def test_a_run_that_was_cut_goes_on_to_the_same_result_and_a_finished_one_samples_nothing(
    tiny_model, respond, tmp_path, monkeypatch
):
    vector = replace(some_vectors(tiny_model).at(1), residual_norm=4.0)
    respond(output_dir=tmp_path, vector=vector, questions=[*TRAIT.evaluation_questions, "Why?"])
    whole = respond(output_dir=tmp_path, vector=vector)  # the folder holds rows of another question too
    assert whole.doses == pytest.approx((-vector.norm / 4, 0.0, 2 * vector.norm / 4))
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {"dose_rollouts.jsonl", "dose_scores.jsonl", "dose_response.json"}
    cut(tmp_path / "dose_rollouts.jsonl", 0.4)
    cut(tmp_path / "dose_scores.jsonl", 0.3)
    assert respond(output_dir=tmp_path, vector=vector) == whole == respond(vector=vector) != respond(seed=2)
    monkeypatch.setattr(ModelEngine, "answer", lambda *_, **__: pytest.fail("sampled again"))
    assert respond(output_dir=tmp_path, vector=vector) == whole == DoseResponse.load(tmp_path)
    record = strict_json(tmp_path / "dose_response.json")
    assert record["slope"] == whole.slope()._asdict()
    assert record["random_slopes"] == [slope.value for slope in whole.random_slopes()]
    assert [row["coefficient"] for row in record["rows"]] == [-1.0, 0.0, 2.0]
    assert [row["dose"] for row in record["rows"]] == pytest.approx(whole.doses)


def test_what_cannot_be_measured_or_read_is_refused(tiny_gpt2, respond, tmp_path):
    with pytest.raises(FileNotFoundError, match="No dose-response at "):
        DoseResponse.load(tmp_path)
    respond(output_dir=tmp_path)
    file = tmp_path / "dose_response.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match="format version 2, and this persona_lens reads 1"):
        DoseResponse.load(tmp_path)
    with pytest.raises(ValueError, match="the judge was calibrated on all 2 questions"):
        respond(judge=FittedLetterJudge(TRAIT.evaluation_questions))
    with pytest.raises(ValueError, match=r"the vectors expect d_model 24, and .* has 32"):
        respond(vector=some_vectors(tiny_gpt2).at(1))


def test_another_judge_replaces_the_scores_and_keeps_the_coherence(respond):
    found = respond(judge=LetterJudge(coherence=70.0))
    again = found.rejudged(TRAIT, judge=LetterJudge("a"), progress=False)
    assert again.judge == "share of a"
    for before, after in zip([found.evaluations, *found.random], [again.evaluations, *again.random], strict=True):
        for old, new in zip(before, after, strict=True):
            assert [row.rollout for row in new.scored] == [row.rollout for row in old.scored]
            assert [row.coherence for row in new.scored] == [row.coherence for row in old.scored]
            counts = [LetterJudge("a")._score(row.rollout.response).trait_score for row in new.scored]
            assert [row.trait_score for row in new.scored] == counts


def test_a_direction_that_makes_the_model_say_a_letter_has_the_steepest_slope(tiny_model, tiny_hf_model):
    vector = planted_vectors(tiny_model, tiny_hf_model).at(3)
    found = dose_response(
        tiny_model,
        vector,
        TRAIT,
        judge=LetterJudge("z", model=tiny_model),
        coefficients=(-1.0, 1.0, 2.0),
        random=5,
        per_question=4,
        **SHORT,
    )
    own = found.slope()
    assert own.low > 0
    assert own.value > max(each.value for each in found.random_slopes())
    assert "it exceeds 5 of 5 random directions" in str(found)


def test_a_result_without_any_score_is_strict_json_too(respond, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_lens.generation.decoding.stop_tokens", lambda _tokenizer: frozenset(range(320)))
    respond(output_dir=tmp_path)
    record = strict_json(tmp_path / "dose_response.json")
    assert (record["slope"]["value"], record["spearman"]) == (None, None)
    assert [row["trait_score"] for row in record["rows"]] == [None] * 3
