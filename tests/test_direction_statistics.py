"""The algebra over cell sums gives what making every direction anew from its rows gives."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from persona_lens.statistics import question_resamples
from persona_lens.vectors.direction_statistics import (
    METRICS,
    Design,
    _placebo,
    cosines,
    direction_metrics,
    held_out_projections,
)
from tests.vector_cases import balanced_design, make_statistics, planted_rows

D_MODEL = 5
SEEDS = st.integers(0, 2**16)


def random_design(seed, n_questions=4, n_instructions=2):
    """Zero to three rows a cell, but at least one row of each side in each question."""
    generator = np.random.default_rng(seed)
    rows = []
    for question in range(n_questions):
        for side in (True, False):
            counts = generator.integers(0, 4, n_instructions)
            counts[generator.integers(n_instructions)] += counts.sum() == 0
            rows += [(f"q{question}", f"i{place}", side) for place, count in enumerate(counts) for _ in range(count)]
    order = generator.permutation(len(rows))
    return Design(*(tuple(rows[place][column] for place in order) for column in range(3)))


def random_rows(design, seed):
    return np.random.default_rng(seed).normal(size=(len(design.positive), D_MODEL))


def sums_of(rows, design):
    """The two tables of products that the algebra works on."""
    sums = design.cell_sums(rows)
    return rows @ sums.T, sums @ sums.T


def slow_direction(rows, design, question_weights, positive=None):
    """The difference in means made from the rows themselves, each counted as often as its question."""
    positive = np.array(design.positive if positive is None else positive)
    sides = []
    for side in (positive, ~positive):
        repeated = [
            row
            for row, question, chosen in zip(rows, design.row_question, side, strict=True)
            for _ in range(int(question_weights[question]) * bool(chosen))
        ]
        sides.append(np.mean(repeated, axis=0) if repeated else np.full(rows.shape[1], np.nan))
    return sides[0] - sides[1]


def slow_held_out(rows, design, positive=None):
    """Each row projected on the unit direction of the questions that are not its own."""
    projections = []
    for row, question in zip(rows, design.row_question, strict=True):
        direction = slow_direction(rows, design, np.arange(design.n_questions) != question, positive)
        projections.append(row @ direction / np.linalg.norm(direction))
    return np.array(projections)


def cosine(one, other):
    return one @ other / (np.linalg.norm(one) * np.linalg.norm(other))


@given(seed=SEEDS)
def test_cell_coefficients_give_the_difference_in_means(seed):
    design = random_design(seed)
    rows, weights = random_rows(design, seed), np.ones(design.n_questions)
    direction = design.coefficients(weights) @ design.cell_sums(rows)
    np.testing.assert_allclose(direction, slow_direction(rows, design, weights), atol=1e-12)


@given(seed=SEEDS)
def test_held_out_projections_are_on_the_direction_of_the_other_questions(seed):
    design = random_design(seed)
    rows = random_rows(design, seed)
    projections = held_out_projections(*sums_of(rows, design), design)
    np.testing.assert_allclose(projections, slow_held_out(rows, design), atol=1e-8)


@given(seed=SEEDS)
def test_a_placebo_direction_is_that_of_swapped_labels(seed):
    design = random_design(seed)
    rows, weights = random_rows(design, seed), np.ones(design.n_questions)
    sign = np.random.default_rng(seed).choice([-1.0, 1.0], design.n_cells // 2)
    swapped = np.array(design.positive) == (sign[design.row_pair] > 0)
    direction = design.coefficients(weights, sign) @ design.cell_sums(rows)
    np.testing.assert_allclose(direction, slow_direction(rows, design, weights, swapped), atol=1e-12)


@given(seed=SEEDS)
def test_placebo_projections_are_held_out_with_swapped_labels(seed):
    design = random_design(seed)
    rows = random_rows(design, seed)
    sign = np.random.default_rng(seed).choice([-1.0, 1.0], design.n_cells // 2)
    swapped = np.array(design.positive) == (sign[design.row_pair] > 0)
    projections = held_out_projections(*sums_of(rows, design), design, sign)
    np.testing.assert_allclose(projections, slow_held_out(rows, design, swapped), atol=1e-8)


@given(seed=SEEDS)
def test_the_cosine_of_split_halves_is_that_of_directions_made_from_each_half(seed):
    design = random_design(seed)
    rows = random_rows(design, seed)
    half = np.array([1, 0, 1, 0])
    fast = cosines(sums_of(rows, design)[1], design.coefficients(1.0 * half), design.coefficients(1.0 - half))
    slow = cosine(slow_direction(rows, design, half), slow_direction(rows, design, 1 - half))
    assert fast == pytest.approx(slow, abs=1e-8)


@given(seed=SEEDS)
def test_a_bootstrap_direction_counts_a_question_as_often_as_it_was_drawn(seed):
    design = random_design(seed)
    rows = random_rows(design, seed)
    weights = question_resamples(design.n_questions, 3, seed)
    full = design.coefficients(np.ones(design.n_questions))
    fast = cosines(sums_of(rows, design)[1], design.coefficients(weights.astype(float)), full)
    whole = slow_direction(rows, design, np.ones(design.n_questions))
    slow = [cosine(slow_direction(rows, design, drawn), whole) for drawn in weights]
    np.testing.assert_allclose(fast, slow, atol=1e-8)


@given(seed=SEEDS)
@settings(max_examples=20)
def test_the_held_out_auc_pools_the_held_out_projections(seed):
    design = random_design(seed)
    rows = random_rows(design, seed)
    expected = roc_auc_score(design.positive, slow_held_out(rows - rows.mean(axis=0), design))
    assert direction_metrics(rows, design, n_resamples=2, n_placebo=2)["held_out_auc"] == pytest.approx(expected)


def test_the_auc_interval_resamples_questions():
    design = balanced_design(n_questions=4, n_instructions=1, n_samples=2)
    rows = planted_rows(design, strength=1.0)
    metrics = direction_metrics(rows, design, n_resamples=50, n_placebo=2, seed=3)
    projections = slow_held_out(rows - rows.mean(axis=0), design)
    positive = np.array(design.positive)
    slow = []
    for drawn in question_resamples(4, 50, seed=3):
        times = drawn[design.row_question]
        slow.append(roc_auc_score(np.repeat(positive, times), np.repeat(projections, times)))
    low, high = np.percentile(slow, [2.5, 97.5])
    assert (metrics["held_out_auc_low"], metrics["held_out_auc_high"]) == pytest.approx((low, high))


def test_a_planted_direction_separates_held_out_questions_and_is_stable():
    design = balanced_design()
    metrics = direction_metrics(planted_rows(design, strength=12.0), design)
    assert metrics["held_out_auc"] > 0.999
    assert metrics["split_half_low"] > 0.95
    assert metrics["bootstrap_cosine_low"] > 0.95
    assert metrics["placebo_norm_95"] < 0.8


def test_pure_noise_does_not_beat_its_placebo():
    # Below 95 % by definition in 95 of 100 cases, so many seeds are looked at together.
    design = balanced_design()
    inside = [
        metrics["held_out_auc"] <= metrics["placebo_auc_95"] and abs(metrics["split_half"]) < 0.5
        for seed in range(10)
        for metrics in [direction_metrics(planted_rows(design, 0.0, seed), design, n_resamples=20, seed=seed)]
    ]
    assert sum(inside) >= 8


def test_shared_offsets_of_questions_do_not_make_a_direction():
    # Rows of one question resemble each other; that alone must not look like a trait.
    design = balanced_design()
    rows = planted_rows(design, strength=0.0)
    offsets = 20 * np.random.default_rng(5).normal(size=(design.n_questions, rows.shape[1]))
    metrics = direction_metrics(rows + offsets[design.row_question], design)
    assert metrics["held_out_auc"] <= metrics["placebo_auc_95"]


def test_a_mean_that_all_rows_share_changes_no_statistic():
    # Left in, its projections on the directions of different questions would drown the trait's.
    design = random_design(4)
    rows = random_rows(design, 4)
    one, other = (direction_metrics(rows + shared, design, n_resamples=20) for shared in (0, np.full(D_MODEL, 1e4)))
    assert one == pytest.approx(other, abs=1e-8)


def test_rows_that_are_all_equal_have_no_direction_and_no_statistics():
    # As at the embedding of the last prompt token, which the template makes the same for every row.
    design = balanced_design(n_questions=3)
    equal = np.tile(np.float32([0.1, -7.3, 1e3]), (len(design.positive), 1))
    assert all(map(math.isnan, direction_metrics(equal, design, n_resamples=20, n_placebo=20).values()))


def test_pairs_with_one_side_only_leave_some_placebos_undefined_and_no_statistic():
    # A swap may leave a side without rows: that placebo does not count.
    design = Design(tuple("aabb"), tuple("0101"), (True, False, True, False))
    metrics = direction_metrics(random_rows(design, 1), design, n_resamples=50, n_placebo=50)
    assert not any(map(math.isnan, metrics.values()))


def test_one_question_leaves_every_statistic_undefined():
    design = balanced_design(n_questions=1)
    metrics = direction_metrics(planted_rows(design, strength=3.0), design)
    assert set(metrics) == set(METRICS)
    assert all(map(math.isnan, metrics.values()))


def test_a_side_that_lives_in_one_question_leaves_the_held_out_auc_undefined():
    design = Design(("a", "a", "b", "b"), ("0",) * 4, (True, False, True, True))
    metrics = direction_metrics(random_rows(design, 0), design, n_resamples=20, n_placebo=20)
    assert math.isnan(metrics["held_out_auc"])
    assert math.isnan(metrics["split_half"])


def test_statistics_repeat_by_seed():
    design = balanced_design(n_questions=4)
    rows = planted_rows(design, strength=0.5)
    one, again, other = (direction_metrics(rows, design, n_resamples=30, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_the_order_of_rows_does_not_change_the_held_out_auc():
    design = random_design(3)
    rows = random_rows(design, 3)
    order = np.random.default_rng(0).permutation(len(rows))
    labels = (design.questions, design.instructions, design.positive)
    shuffled = Design(*(tuple(column[place] for place in order) for column in labels))
    one, other = (direction_metrics(*given, n_resamples=2) for given in ((rows, design), (rows[order], shuffled)))
    assert one["held_out_auc"] == pytest.approx(other["held_out_auc"])


def test_rows_of_one_polarity_are_refused():
    with pytest.raises(ValueError, match="rows of both polarities"):
        Design(("a", "b"), ("0", "0"), (True, True))


def test_labels_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="Every row needs a question, an instruction and a polarity"):
        Design(("a", "b"), ("0",), (True, False))


def test_placebo_numbers_are_those_of_directions_made_anew_from_swapped_labels():
    design = random_design(5, n_questions=5)
    rows = random_rows(design, 5)
    aucs, norms = _placebo(*sums_of(rows, design), design, 12, np.random.default_rng(3))

    draw, ones = np.random.default_rng(3), np.ones(design.n_questions)
    for auc, norm in zip(aucs, norms, strict=True):
        swapped = np.array(design.positive) == (draw.choice([-1.0, 1.0], design.n_cells // 2)[design.row_pair] > 0)
        assert norm == pytest.approx(np.linalg.norm(slow_direction(rows, design, ones, swapped)), abs=1e-9)
        assert auc == pytest.approx(roc_auc_score(swapped, slow_held_out(rows, design, swapped)), abs=1e-9)


def test_a_strong_direction_does_not_lend_its_strength_to_the_placebo():
    design = balanced_design()
    found = direction_metrics(planted_rows(design, 20.0), design, n_resamples=20)
    assert found["held_out_auc"] > 0.99
    assert found["placebo_norm_95"] < 0.9
    assert found["placebo_auc_95"] < found["held_out_auc"]


def test_statistics_need_one_value_a_layer(shapes_unchecked):
    with pytest.raises(ValueError, match=r"split_half has shape \[1\]: every statistic needs one value a layer"):
        replace(make_statistics(), split_half=torch.ones(1))


def test_the_embedding_row_needs_the_statistics_of_the_layers():
    with pytest.raises(ValueError, match=r"missing or unknown: .*'auc'.*'held_out_auc'"):
        replace(make_statistics(), embedding={"auc": 0.5})
