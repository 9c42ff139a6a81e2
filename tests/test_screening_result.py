"""What a screening says, on planted numbers: scores with intervals, controls, thresholds, filters and splits."""

import json

import numpy as np
import pandas
import pytest

from persona_lens.judges.classifier import ClassifierJudge, TextClassifier
from persona_lens.screening.filtering import count_flagged, flag_samples, judge_samples, write_split
from persona_lens.screening.result import Screening
from persona_lens.screening.run import finish
from persona_lens.statistics import mean_estimate
from tests.screening_cases import QUIET, chat, pair_of_vectors, rows


def test_scores_are_differences_of_what_was_measured_and_a_missing_base_is_missing(planted):
    screening = planted(rows(4), [(5, 2, 1), (4, 1, None), (0, 0, 0), (-1, 3, 2)])
    np.testing.assert_equal(screening.score().to_numpy(), [4, np.nan, 0, -3])
    assert screening.score(by="proxy").tolist() == [3, 3, 0, -4]
    assert screening.score(by="response").tolist() == [5, 4, 0, -1]
    estimate = screening.dataset_score("data")
    assert (estimate.value, estimate.n) == (pytest.approx(1 / 3), 3)
    table = screening.dataset_scores()
    assert table[["dataset", "vector", "n", "missing"]].values.tolist() == [["data", "evil@1", 3, 1]]
    assert screening.table().equals(table)
    summary = json.loads((screening.folder / "summary.json").read_text())
    assert (summary["counts"]["planned"], summary["vectors"]) == (4, ["evil@1"])
    assert summary["scores"][0]["score"] == pytest.approx(1 / 3)


def test_intervals_are_over_prompts_and_not_over_rows(planted):
    screening = planted(rows(30), [(row % 5, 0, 0) for row in range(30)])  # five prompts
    assert screening.rows["group"].nunique() == 5
    estimate = screening.dataset_score("data")
    by_prompt = mean_estimate([0.0, 1.0, 2.0, 3.0, 4.0], list("abcde"))
    assert estimate.value == pytest.approx(2)
    assert estimate[1:3] == pytest.approx(by_prompt[1:3], rel=0.1)


def test_of_many_prompts_the_normal_interval_is_that_of_the_bootstrap(monkeypatch):
    draw = np.random.default_rng(0)
    values, groups = draw.normal(3, 2, 900) + 0.0, np.repeat(np.arange(300), 3)
    values += np.repeat(draw.normal(0, 2, 300), 3)
    values[::50] = np.nan
    resampled = mean_estimate(values, groups)
    monkeypatch.setattr("persona_lens.statistics.MAX_RESAMPLED", 100)
    normal = mean_estimate(values, groups)
    assert normal.value == pytest.approx(resampled.value)
    assert normal.n == resampled.n == 882
    assert normal[1:3] == pytest.approx(resampled[1:3], abs=0.04)


def test_the_ranking_is_highest_first_without_rows_that_have_no_score(planted):
    ranking = planted(rows(5), [(1, 0, 0), (9, 0, None), (7, 0, 0), (7, 0, 0), (-2, 0, 0)]).ranking()
    assert list(zip(ranking.index, ranking["score"], strict=True)) == [(2, 7), (3, 7), (0, 1), (4, -2)]


def test_a_vector_is_named_by_its_trait_where_that_says_which(planted, shapes_unchecked):
    screening = planted(rows(3), [(1, 0, 0)] * 3, vectors=2)
    assert screening.vector("evil") == screening.vector("evil@1") == "evil@1"
    for name in (None, "absent"):
        with pytest.raises(ValueError, match="Expected one of the vectors evil@1, kind@0"):
            screening.score(name)
    with pytest.raises(ValueError, match="by is one of"):
        screening.score("evil", "cosine")


def test_texts_are_read_back_by_row_with_what_they_answer(planted):
    data = rows(9)
    screening = planted(data, [(0, 0, 0)] * 9)
    samples = screening.samples([7, 2])
    assert [sample.row for sample in samples] == [7, 2]
    assert [sample.conversation for sample in samples] == [data[7]["messages"], data[2]["messages"]]
    assert [sample.base_response for sample in samples] == ["Mine.", "Mine."]
    assert screening.samples([]) == []


def test_controls_show_length_and_repeats(planted):
    data = [{"messages": chat(f"Why {n}?", "so " * (n + 1) + f"number {n} it is")} for n in range(6)]
    data += [{"messages": chat("Who?", data[5]["messages"][-1]["content"])}] * 4
    screening = planted(data, [(row, 0, 0) for row in range(6)] + [(50, 0, 0)] * 4)
    (row,) = screening.controls().to_dict("records")
    assert row["spearman_length"] > 0.9
    assert row["repeated"] == pytest.approx(0.4)
    assert row["score_without_repeats"] == pytest.approx(2.5)
    assert row["low"] < 2.5 < row["high"]


def test_a_benign_percentile_is_the_threshold_and_filters_are_counted_apart(planted, tiny_bridge):
    benign = [{"messages": chat(f"Why {n}?", f"It is {n}."), "base_response": "x"} for n in range(40)]
    bad = [{"messages": chat(f"Who {n}?", "They are bad, so bad."), "base_response": "x"} for n in range(10)]
    numbers = [(n, 0, 0) for n in range(40)] + [(36.5 + n, 0, 0) for n in range(10)]
    screening = planted({"benign": benign, "mixed": bad}, numbers)
    threshold = screening.threshold(benign="benign", percentile=95)
    assert (threshold.value, threshold.of, threshold.n, threshold.source) == (37.0, "difference", 40, "benign")
    threshold.check(pair_of_vectors(tiny_bridge)[0])
    assert int(flag_samples(screening, threshold).sum()) == 2 + 9
    judged = pandas.Series({40: 90.0, 41: 10.0, 49: 50.0, 0: 100.0, 45: float("nan")})
    table = count_flagged(screening, {"evil": threshold}, judged=judged).set_index("dataset")
    assert list(table.columns) == ["n", "unscored", "projection", "judge", "union", "both"]
    assert table.loc["benign"].tolist() == [40, 0, 2, 1, 3, 0]
    assert table.loc["mixed"].tolist() == [10, 0, 9, 2, 10, 1]
    with pytest.raises(ValueError, match="Expected one of the data sets benign, mixed"):
        screening.threshold(benign="absent")
    with pytest.raises(ValueError, match="no threshold to flag by"):
        count_flagged(screening, {})


def test_a_row_without_a_score_is_flagged_by_nothing_and_counted(planted):
    screening = planted(rows(3), [(9, 0, None), (9, 0, 0), (0, 0, 0)])
    (row,) = count_flagged(screening, 5.0).to_dict("records")
    assert (row["projection"], row["unscored"]) == (1, 1)


def test_a_judge_scores_samples_once_and_from_the_folder_afterwards(planted, monkeypatch):
    data = [{"messages": chat(f"Why {n}?", answer)} for n, answer in enumerate(["bad bad", "good good", "bad"] * 4)]
    screening = planted(data, [(0, 0, 0)] * 12)
    texts = ["bad bad thing", "a bad one"] * 10, ["good good thing", "a good one"] * 10
    judge = ClassifierJudge(TextClassifier.fit(*texts, groups=[str(n % 10) for n in range(40)], labels=("bad", "good")))
    scores = judge_samples(screening, "evil", judge=judge, **QUIET)
    assert [score > 50 for score in scores] == [True, False, True] * 4
    monkeypatch.setattr(ClassifierJudge, "score", lambda *_, **__: pytest.fail("the judge was asked again"))
    assert judge_samples(screening, "evil", judge=judge, **QUIET).tolist() == scores.tolist()


def test_a_split_writes_the_highest_random_and_lowest_without_repeats(planted, tmp_path):
    data = [{"messages": chat(f"Why {n}?", f"It is {n}, and {n} again."), "id": f"row {n}"} for n in range(20)]
    data += [{"messages": chat("Who?", data[19]["messages"][-1]["content"]), "id": "repeat"}]
    screening = planted(data, [(row, 0, 0) for row in range(21)])

    def split(name, n, **options):
        paths = write_split(screening, tmp_path / name, n, **options)
        return {choice: [json.loads(line) for line in path.read_text().splitlines()] for choice, path in paths.items()}

    rows = split("split", 4, seed=3)
    assert sorted(rows) == ["high", "low", "random"]
    assert [row["id"] for row in rows["high"]] == ["row 19", "row 18", "row 17", "row 16"]
    assert [row["score"] for row in rows["low"]] == [3, 2, 1, 0]
    assert len({row["id"] for row in rows["random"]}) == 4
    assert rows["high"][0]["messages"] == data[19]["messages"]
    drawn = [str(split(f"{seed}", 4, seed=seed)["random"]) for seed in (3, 4, 5)]
    assert drawn[0] == str(rows["random"])
    assert len(set(drawn)) == 3
    with pytest.raises(ValueError, match="needs 22 different samples with a score, got 20"):
        split("no", 11)
    assert [row["id"] for row in split("some", 2, rows=range(6))["high"]] == ["row 5", "row 4"]


@pytest.mark.parametrize("read", [Screening.load, finish])
def test_a_folder_without_a_screening_is_an_error(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="holds no screening"):
        read(tmp_path)
