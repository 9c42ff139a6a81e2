"""The keep rule drops a pair for one reason, counts it once, and never takes a missing score for zero."""

from dataclasses import dataclass

import pytest

from persona_lens.judges.keep import KeepReport, keep_pairs, pair_rollouts
from persona_lens.judges.scores import ScoredRollout
from persona_lens.rollouts.rows import Rollout


@dataclass(frozen=True)
class Side:
    """As much of a judged response as the rule looks at."""

    trait_score: float | None
    coherence: float | None = 90.0
    is_empty: bool = False


GOOD_POSITIVE, GOOD_NEGATIVE = Side(80.0), Side(10.0)
DROPPED = {
    "a positive side that is missing": ("unpaired", None, GOOD_NEGATIVE),
    "a negative side that is missing": ("unpaired", GOOD_POSITIVE, None),
    "an empty positive response": ("empty response", Side(80.0, is_empty=True), GOOD_NEGATIVE),
    "an empty negative response": ("empty response", GOOD_POSITIVE, Side(None, None, is_empty=True)),
    "no coherence of the positive side": ("no coherence score", Side(80.0, None), GOOD_NEGATIVE),
    "no coherence of the negative side": ("no coherence score", GOOD_POSITIVE, Side(10.0, None)),
    "incoherence of the positive side": ("incoherent", Side(80.0, 49.9), GOOD_NEGATIVE),
    "incoherence of the negative side": ("incoherent", GOOD_POSITIVE, Side(10.0, 0.0)),
    "no trait score of the positive side": ("no trait score", Side(None), GOOD_NEGATIVE),
    "no trait score of the negative side": ("no trait score", GOOD_POSITIVE, Side(None)),
    "a positive side without the trait": ("positive side below the threshold", Side(49.9), GOOD_NEGATIVE),
    "a negative side with the trait": ("negative side at or above the threshold", GOOD_POSITIVE, Side(50.0)),
    "two faults at once": ("empty response", Side(None, None, is_empty=True), Side(90.0, 10.0)),
}


@pytest.mark.parametrize(("reason", "positive", "negative"), DROPPED.values(), ids=DROPPED)
def test_a_pair_is_dropped_for_one_reason_and_counted_once(reason, positive, negative):
    pairs = [(GOOD_POSITIVE, GOOD_NEGATIVE), (positive, negative)]
    kept, report = keep_pairs(pairs, trait="evil")
    assert kept == [(GOOD_POSITIVE, GOOD_NEGATIVE)]
    assert report == KeepReport(pairs=2, kept=1, dropped={reason: 1})


def test_kept_and_dropped_add_up_to_all_pairs():
    pairs = [(GOOD_POSITIVE, GOOD_NEGATIVE), *((one, other) for _, one, other in DROPPED.values())]
    _, report = keep_pairs(pairs, trait="evil")
    assert report.kept + sum(report.dropped.values()) == report.pairs == len(pairs)


def test_the_thresholds_can_be_moved():
    pair = (Side(40.0, 30.0), Side(35.0, 30.0))
    kept, _ = keep_pairs([pair], trait="evil", threshold=38.0, min_coherence=25.0)
    assert kept == [pair]


def test_scores_on_the_thresholds_are_kept():
    kept, _ = keep_pairs([(Side(50.0, 50.0), Side(49.9, 50.0))], trait="evil")
    assert len(kept) == 1


def test_a_missing_negative_score_is_not_a_score_of_zero():
    # As a zero it would be the best negative response there is.
    kept, report = keep_pairs([(GOOD_POSITIVE, Side(None)), (GOOD_POSITIVE, Side(0.0))], trait="evil")
    assert kept == [(GOOD_POSITIVE, Side(0.0))]
    assert report.dropped == {"no trait score": 1}


@pytest.mark.parametrize("threshold", [30.0, 50.0, 70.0])
def test_the_references_rule_keeps_negatives_below_100_minus_the_threshold(threshold):
    scores = [0.0, 29.9, 30.0, 30.1, 49.9, 50.0, 69.9, 70.0, 100.0]
    pairs = [(Side(one), Side(other)) for one in scores for other in scores]
    kept, report = keep_pairs(pairs, trait="evil", threshold=threshold, negative_below=100 - threshold)
    wanted = [pair for pair in pairs if pair[0].trait_score >= threshold and pair[1].trait_score < 100 - threshold]
    assert kept == wanted
    assert report.negative_below == 100 - threshold
    assert report.kept + sum(report.dropped.values()) == len(pairs)
    if threshold == 50:
        assert kept == keep_pairs(pairs, trait="evil")[0]
    else:
        assert kept != keep_pairs(pairs, trait="evil", threshold=threshold)[0]


@pytest.mark.parametrize("name", ["threshold", "negative_below", "min_coherence"])
@pytest.mark.parametrize("limit", [-0.1, 100.1, float("nan")])
def test_a_limit_off_the_scale_is_refused(name, limit):
    with pytest.raises(ValueError, match=f"{name} is a score from 0 to 100"):
        keep_pairs([(GOOD_POSITIVE, GOOD_NEGATIVE)], trait="evil", **{name: limit})


def test_too_few_pairs_are_an_error_with_reasons_and_remedy():
    pairs = [(Side(10.0), GOOD_NEGATIVE)] * 3 + [(None, GOOD_NEGATIVE), (GOOD_POSITIVE, GOOD_NEGATIVE)]
    with pytest.raises(ValueError, match="evil: 1 of 5 pairs kept") as error:
        keep_pairs(pairs, trait="evil", min_pairs=2)
    assert "3 positive side below the threshold, 1 unpaired" in str(error.value)
    assert "at least 2 needed" in str(error.value)
    assert "Sample more rollouts" in str(error.value)


def scored(polarity, question="Why?", instruction=0, sample=0):
    rollout = Rollout("evil", polarity, instruction, "S", question, sample, "Because.", None, "stop", "engine", 0)
    return ScoredRollout(rollout, 50.0, 90.0)


def test_rollouts_pair_by_question_instruction_and_sample():
    # Every place differs from every other in one of the three only.
    places = [("Why?", 0, 0), ("Why?", 0, 1), ("Why?", 1, 0), ("How?", 0, 0)]
    rows = [scored(polarity, *place) for polarity in ("positive", "negative") for place in places]
    pairs = pair_rollouts([*rows[:4], *reversed(rows[4:])])
    assert len(pairs) == 4
    for positive, negative in pairs:
        assert positive is not None
        assert negative is not None
        assert (positive.rollout.polarity, negative.rollout.polarity) == ("positive", "negative")
        one, other = positive.rollout, negative.rollout
        assert (one.question, one.instruction, one.sample) == (other.question, other.instruction, other.sample)


def test_a_rollout_without_its_counterpart_stays_as_an_unpaired_one():
    assert pair_rollouts([scored("positive", sample=1)]) == [(scored("positive", sample=1), None)]


def test_neutral_rollouts_take_no_part_in_pairs():
    assert pair_rollouts([scored("neutral", instruction=None)]) == []
