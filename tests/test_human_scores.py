"""Scores by people are read from CSV files as spreadsheets write them, joined to rollouts, and checked row by row."""

from dataclasses import replace

import pandas
import pytest

from persona_lens.judges.agreement import judge_agreement, read_human_scores
from tests.agreement_cases import scored

TEXT = "It is raining.\nBut it will\tend, she said: “wait”, ..."


@pytest.fixture
def rollouts():
    rows = [row.rollout for row in scored([None] * 3, text=TEXT)]
    return [replace(row, response=f"{row.response} {index}") for index, row in enumerate(rows)]


@pytest.fixture
def write(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "people.csv"
        path.write_bytes(text.encode(encoding))
        return path

    return write


def test_scores_are_joined_by_key_in_the_order_of_the_rollouts(rollouts, tmp_path):
    rows = [{"note": "", "people": score, "key": row.key} for row, score in zip(rollouts, [5, 99.5, 0], strict=True)]
    pandas.DataFrame(rows[::-1]).to_csv(tmp_path / "people.csv", index=False)
    assert read_human_scores(tmp_path / "people.csv", rollouts, "people") == [5.0, 99.5, 0.0]


def test_scores_are_joined_by_question_and_response(rollouts, tmp_path):
    rows = [{"question": row.question, "response": row.response, "ann": index} for index, row in enumerate(rollouts)]
    pandas.DataFrame(rows[::-1]).to_csv(tmp_path / "people.csv", index=False)
    assert read_human_scores(str(tmp_path / "people.csv"), rollouts, "ann") == [0.0, 1.0, 2.0]


def test_what_a_spreadsheet_does_to_text_does_not_matter(rollouts, write):
    cells = [f'"{row.question} ","  {row.response}",{index}' for index, row in enumerate(rollouts)]
    text = "\n".join(["question,response,ann", *cells]).replace("\n", "\r\n")
    assert read_human_scores(write(text, "utf-8-sig"), rollouts, "ann") == [0.0, 1.0, 2.0]


def test_an_empty_cell_and_an_absent_row_are_missing_scores(rollouts, write):
    path = write(f"key,ann\n{rollouts[0].key},\n\n{rollouts[2].key},70\n\n")
    assert read_human_scores(path, rollouts, "ann") == [None, None, 70.0]


def test_a_row_of_text_scores_every_rollout_that_has_it(rollouts, write):
    same = [rollouts[0], replace(rollouts[0], sample=7)]
    path = write(f'question,response,ann\n{rollouts[0].question},"{rollouts[0].response}",30\n')
    assert read_human_scores(path, same, "ann") == [30.0, 30.0]


@pytest.mark.parametrize(("cell", "score"), [("100.00000000000001", 100.0), ("-1e-14", 0.0), ("99.5", 99.5)])
def test_a_score_that_rounding_moved_off_the_scale_is_its_end(rollouts, write, cell, score):
    path = write(f"key,ann\n{rollouts[0].key},{cell}\n")
    assert read_human_scores(path, rollouts[:1], "ann") == [score]
    found = judge_agreement(scored([score]), [float(cell)])
    assert found.pairs[0].second == score


@pytest.mark.parametrize("cell", ["fifty", "100.5", "-1", "nan", "inf", "50 %", '"7,5"'])
def test_a_cell_that_is_no_score_is_refused_with_its_row(cell, rollouts, write):
    path = write(f"key,ann\n{rollouts[0].key},70\n\n{rollouts[1].key},{cell}\n")
    with pytest.raises(ValueError, match="row 4, column 'ann': expected a score from 0 to 100 or nothing"):
        read_human_scores(path, rollouts, "ann")


def test_a_missing_column_is_named_with_those_that_are_there(rollouts, write):
    with pytest.raises(ValueError, match=r"has no column 'bob', only \['key', 'ann'\]"):
        read_human_scores(write("key,ann\n"), rollouts, "bob")
    with pytest.raises(ValueError, match=r"neither a column 'key' nor both .* only \['question', 'ann'\]"):
        read_human_scores(write("question,ann\n"), rollouts, "ann")


def test_rows_that_match_no_rollout_are_refused_with_the_first_of_them(rollouts, write):
    path = write(f"key,ann\n{rollouts[0].key},70\nsomething else,3\nanother,\n")
    with pytest.raises(ValueError, match="2 rows match none of the 3 rollouts by key, the first of them row 3"):
        read_human_scores(path, rollouts, "ann")


def test_two_rows_may_score_one_rollout_only_alike(rollouts, write):
    key = rollouts[0].key
    assert read_human_scores(write(f"key,ann\n{key},70\n{key},70.0\n"), rollouts, "ann")[0] == 70.0
    with pytest.raises(ValueError, match="rows 2 and 3 give one text different scores: keep one of them"):
        read_human_scores(write(f"key,ann\n{key},70\n{key},\n"), rollouts, "ann")


@pytest.mark.parametrize("text", ["", "key,ann\na,1,2\n", "key,ann\na,1\nb,1,2\n", 'key,ann\n"a,1\n'])
def test_a_file_that_is_no_table_is_refused(text, rollouts, write):
    with pytest.raises(ValueError, match=r"people\.csv is not a CSV file that can be read"):
        read_human_scores(write(text), rollouts, "ann")


def test_a_file_in_another_encoding_is_refused(rollouts, write):
    with pytest.raises(ValueError, match="is not a CSV file that can be read"):
        read_human_scores(write("key,ann\nmüde,1\n", "latin-1"), rollouts, "ann")
