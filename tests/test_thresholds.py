"""A threshold is the percentile it says, its interval resamples chats, and no other vector's is taken for it."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.monitoring.detection import detection
from persona_lens.monitoring.thresholds import Threshold, calibrate_threshold, load_thresholds, save_thresholds
from persona_lens.statistics import N_RESAMPLES, question_resamples
from tests.monitoring_cases import drawn
from tests.vector_cases import make_vectors

NUMBERS = st.floats(-50, 50, allow_subnormal=False)


def vector(trait="evil", layer=1, **parts):
    return make_vectors(trait, **parts).at(layer)


def naive_percentile(values, percentile):
    """The smallest value that at most the rest of the hundred exceed, counted with whole numbers."""
    ordered, tenths = sorted(values), round(10 * percentile)
    return next(
        value for value in ordered if 1000 * sum(each > value for each in ordered) <= (1000 - tenths) * len(ordered)
    )


def interval_of(resamples):
    """The central 95 %, linear between neighbours."""
    ordered = sorted(resamples)
    ranks = [share * (len(ordered) - 1) for share in (0.025, 0.975)]
    lows = [math.floor(rank) for rank in ranks]
    return tuple(
        ordered[low] + (rank - low) * (ordered[low + 1] - ordered[low]) for rank, low in zip(ranks, lows, strict=True)
    )


def threshold(**parts):
    return replace(calibrate_threshold(drawn(40), vector=vector()), **parts)


@settings(max_examples=40)
@given(st.lists(NUMBERS, min_size=20, max_size=60), st.sampled_from([5.0, 50.0, 90.0, 95.0]))
def test_the_value_is_the_percentile_of_the_benign_projections(values, percentile):
    found = calibrate_threshold(values, vector=vector(), percentile=percentile)
    assert found.value == pytest.approx(naive_percentile(values, percentile))
    assert found.n == len(values)
    assert found.exceeded(values).mean() <= 1 - percentile / 100 + 1e-12


def test_the_interval_resamples_whole_chats():
    values, chats = drawn(60), [f"chat {place % 12}" for place in range(60)]
    found = calibrate_threshold(values, vector=vector(), percentile=90.0, chats=chats, seed=3)
    resamples = []
    for counts in question_resamples(12, N_RESAMPLES, 3):
        pool = [values[place] for place in range(60) for _ in range(counts[place % 12])]
        resamples.append(naive_percentile(pool, 90.0))
    assert found.interval == pytest.approx(interval_of(resamples))
    assert found.n_chats == 12


def test_lists_arrays_and_tensors_calibrate_alike_and_one_chat_has_no_interval():
    values = drawn(30)
    one = calibrate_threshold(values, vector=vector(), chats=["one"] * 30)
    assert (one.interval, one.value) == (None, pytest.approx(naive_percentile(values, 95.0)))
    expected = calibrate_threshold(values, vector=vector())
    assert calibrate_threshold(np.array(values), vector=vector()) == expected
    assert calibrate_threshold(torch.tensor(values, dtype=torch.float64), vector=vector()) == expected


@pytest.mark.parametrize(
    ("values", "changes", "words"),
    [
        ([*drawn(30), math.nan], {}, r"evil: .* 1 of 31 projections are not a finite number"),
        ([*drawn(30), math.inf], {}, r"evil: .* 1 of 31 projections are not a finite number"),
        (drawn(30), {"of": "token"}, "pass `chats`"),
        (drawn(30), {"chats": ["a"] * 29}, "expected 30, got 29"),
        *((drawn(30), {"percentile": wrong}, "between 0 and 100") for wrong in (0.0, 100.0, -5.0, math.nan)),
    ],
)
def test_what_cannot_be_calibrated_is_refused(values, changes, words):
    with pytest.raises(ValueError, match=words):
        calibrate_threshold(values, vector=vector(), **changes)


def test_exceeding_means_above_in_the_inputs_shape_and_a_missing_value_is_refused():
    found = threshold(value=1.0)
    assert found.exceeded([0.0, 1.0, 1.5]).tolist() == [False, False, True]
    assert found.exceeded(torch.tensor([[2.0], [0.0]])).tolist() == [[True], [False]]
    assert bool(found.exceeded(1.1))
    with pytest.raises(ValueError, match="1 of 2 projections are not a finite number"):
        found.exceeded([math.nan, 1.0])


def test_values_that_repeat_within_a_chat_do_not_narrow_the_interval():
    once = drawn(40)
    found = calibrate_threshold(once * 25, vector=vector(), chats=list(range(40)) * 25)
    apart = calibrate_threshold(once * 25, vector=vector())
    assert found.interval[1] - found.interval[0] > 2 * (apart.interval[1] - apart.interval[0])


@pytest.mark.parametrize(("percentile", "needed"), [(95.0, 20), (99.0, 100), (99.9, 1000), (5.0, 20), (50.0, 2)])
def test_too_few_benign_projections_for_the_percentile_are_refused(percentile, needed):
    with pytest.raises(ValueError, match=rf"needs {needed} benign .* got {needed - 1}: project more benign chats"):
        calibrate_threshold(drawn(needed - 1), vector=vector(), percentile=percentile)
    calibrate_threshold(drawn(needed), vector=vector(), percentile=percentile)


@pytest.mark.parametrize("damage", [{"value": None}, {"interval": [1]}, {"surprise": 1}, {"of": "word"}])
def test_a_damaged_threshold_is_refused(damage):
    with pytest.raises(ValueError, match=r"damaged|one of"):
        Threshold.from_dict({**threshold().to_dict(), **damage})


def test_saved_thresholds_lie_beside_the_vectors_and_load_again(tmp_path):
    made = [threshold(), threshold(of="prompt", interval=None)]
    file = save_thresholds(tmp_path / "vectors.safetensors", made)
    assert file == tmp_path / "thresholds.json"
    assert json.loads(file.read_text())["format_version"] == 1
    assert sorted(load_thresholds(tmp_path), key=str) == sorted(made, key=str)
    assert load_thresholds(tmp_path / "vectors.safetensors", vector()) == load_thresholds(tmp_path)
    save_thresholds(tmp_path, [threshold(value=2.0, layer=2)])
    save_thresholds(tmp_path, [threshold(value=9.0)])
    assert {(row.layer, row.of) for row in load_thresholds(tmp_path)} == {
        (1, "response"),
        (1, "prompt"),
        (2, "response"),
    }
    assert 9.0 in [row.value for row in load_thresholds(tmp_path)]
    with pytest.raises(ValueError, match=r"was calibrated with vector .*: calibrate_threshold anew"):
        load_thresholds(tmp_path, vector(seed=5))
    with pytest.raises(ValueError, match="no threshold for evil at layer 3, but for evil at layer 1"):
        load_thresholds(tmp_path, vector(layer=3))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"format_version": 1, "thresholds": [{}]}', "not a whole file of thresholds"),
        ('{"format_version": 2, "thresholds": []}', "format version 2"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_and_kept(tmp_path, content, words):
    (tmp_path / "thresholds.json").write_text(content)
    for work in (lambda: save_thresholds(tmp_path, [threshold()]), lambda: load_thresholds(tmp_path)):
        with pytest.raises(ValueError, match=words):
            work()
    assert (tmp_path / "thresholds.json").read_text() == content


def test_nothing_is_written_for_two_of_the_same_or_without_the_folder(tmp_path):
    with pytest.raises(ValueError, match="keep one of them"):
        save_thresholds(tmp_path, [threshold(value=1.0), threshold(value=2.0)])
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_thresholds(tmp_path / "absent", [threshold()])
    with pytest.raises(FileNotFoundError, match="calibrate_threshold"):
        load_thresholds(tmp_path)
    assert list(tmp_path.iterdir()) == []


SAVE = """
import json, sys
from dataclasses import replace
from persona_lens.monitoring.thresholds import Threshold, save_thresholds
made = Threshold.from_dict(json.loads(sys.argv[2]))
print(flush=True)
sys.stdin.readline()
for number in range(10):
    save_thresholds(sys.argv[1], [replace(made, layer=int(sys.argv[3]) + number)])
"""


def test_processes_that_save_at_once_lose_no_threshold(tmp_path):
    made = json.dumps(threshold().to_dict())
    command = [sys.executable, "-c", SAVE, tmp_path, made]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen([*command, str(10 * number)], **pipes) for number in range(4)]
    for process in processes:
        process.stdout.readline()  # everything is imported
    for process in processes:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(each.layer for each in load_thresholds(tmp_path)) == list(range(40))
    assert [path.name for path in tmp_path.iterdir()] == ["thresholds.json"]


def naive_rates(positive, negative, above):
    share = lambda values: sum(value > above for value in values) / len(values)  # noqa: E731
    return share(negative), share(positive)


@settings(max_examples=40)
@given(st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=15), st.lists(NUMBERS, min_size=1, max_size=15))
def test_every_point_of_the_curve_is_what_its_threshold_does(positive, negative):
    found = detection(positive, negative)
    for point in found.points:
        assert (point.fpr, point.tpr) == pytest.approx(naive_rates(positive, negative, point.threshold))
    assert found.points[0][:2] == (0.0, 0.0)
    assert found.points[-1][:2] == (1.0, 1.0)


@settings(max_examples=40)
@given(st.lists(NUMBERS, min_size=1, max_size=12), st.lists(NUMBERS, min_size=1, max_size=12))
def test_no_threshold_has_a_higher_youden_than_the_best(positive, negative):
    best = detection(positive, negative).best
    assert detection([3.0, 4.0], [0.0, 1.0]).best == (0.0, 1.0, 2.0)  # midway between the sides
    for above in [-math.inf, *positive, *negative]:
        fpr, tpr = naive_rates(positive, negative, above)
        assert best.tpr - best.fpr >= tpr - fpr - 1e-12


def test_the_area_and_its_interval_resample_groups():
    positive, negative = drawn(24, 1, 1.0), drawn(24, 2)
    ids = [place % 6 for place in range(24)]
    found = detection(positive, negative, groups=(ids, ids), seed=4)
    areas = []
    for counts in question_resamples(6, N_RESAMPLES, 4):
        high, low = (
            [v for v, i in zip(side, ids, strict=True) for _ in range(counts[i])] for side in (positive, negative)
        )
        areas.append(np.mean([(a > b) + (a == b) / 2 for a in high for b in low]))
    assert found.auc.value == pytest.approx(np.mean([[a > b for a in positive] for b in negative]))
    assert found.auc[1:3] == pytest.approx(interval_of(areas))
    assert found.n_groups == 6


def test_rates_count_what_exceeds_the_threshold_with_intervals_over_groups():
    positive, negative = drawn(60, 1, 1.0), drawn(60, 2)
    ids = [place // 6 for place in range(60)]
    found = detection(positive, negative, groups=(ids, ids))
    rates = found.rates(threshold(value=0.5))
    assert (rates.fpr.value, rates.tpr.value) == pytest.approx(naive_rates(positive, negative, 0.5))
    value, low, high, _ = rates.tpr
    assert None not in rates.tpr
    assert sorted({low, value, high}) == [low, value, high]
    assert rates == found.rates(0.5)
    rates = detection([1.0, 2.0], [1.0, 0.0]).rates(1.0)  # a value at the threshold does not exceed it
    assert (rates.tpr.value, rates.fpr.value) == (0.5, 0.0)


def test_a_rate_of_none_is_not_surer_than_its_groups_allow():
    ids = [place // 5 for place in range(50)]
    found = detection(drawn(50, 1, 9.0), drawn(50, 2), groups=(ids, ids)).rates(100.0)
    # The share under which ten groups of ten without a hit have a chance of 2.5 %.
    assert found.fpr == (0.0, 0.0, pytest.approx(1 - 0.025 ** (1 / 10)), 50)


@pytest.mark.parametrize("sides", [([], [1.0]), ([1.0], []), ([1.0, math.nan], [1.0])])
def test_a_side_without_numbers_is_refused(sides):
    with pytest.raises(ValueError, match=r"Expected finite (positive|negative) projections"):
        detection(*sides)
    with pytest.raises(ValueError, match="expected 2 and 1, got 1 and 1"):
        detection([1.0, 2.0], [0.0], groups=(["a"], ["b"]))
