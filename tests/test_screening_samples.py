"""Samples out of files and data sets of every form, and what is no sample: rejected, with its line and why."""

import json

import pandas
import pytest

from persona_lens.monitoring.transcripts import Transcript
from persona_lens.screening.samples import Rejection, Sample, named_datasets, stream_samples
from tests.screening_cases import chat, rows, screened, write_rows

LONG = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "Second."},
]


def read(data, **turns):
    return list(stream_samples(named_datasets(data), **turns))


def test_the_last_response_is_the_sample_or_the_first_with_only_what_comes_before_it():
    (last,), (first,) = read([{"messages": LONG}]), read([{"messages": LONG}], first_turn=True)
    assert (len(last.messages), last.response) == (3, "Second.")
    assert (len(first.messages), first.response) == (1, "First.")


def test_the_first_turn_counts_also_where_later_ones_are_no_chat():
    odd = [*LONG[:2], {"role": "tool", "content": "42"}, {"role": "assistant", "content": None}]
    (first,) = read([{"messages": odd}], first_turn=True)
    assert first.response == "First."
    (whole,) = read([{"messages": odd}])
    assert isinstance(whole, Rejection)
    assert "tool message" in whole.reason


def test_rows_of_all_three_forms_may_stand_in_one_file(tmp_path):
    sharegpt = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    plain = chat("Why?", "Because.", system=False)
    lines = [{"messages": plain}, {"conversation": plain}, {"conversations": sharegpt}]
    found = read(write_rows(tmp_path / "mixed.jsonl", lines))
    assert [(sample.messages, sample.response) for sample in found] == [(tuple(plain[:1]), "Because.")] * 3
    assert [sample.id for sample in found] == ["mixed:1", "mixed:2", "mixed:3"]


def test_parquet_json_and_rows_in_memory_give_the_same_samples(tmp_path):
    given = rows(5, source="x")
    write_rows(tmp_path / "data.jsonl", given)
    (tmp_path / "one").mkdir()
    pandas.DataFrame(given).to_parquet(tmp_path / "one" / "data.parquet")
    (tmp_path / "one" / "data.json").write_text(json.dumps(given))
    expected = read({"data": given})
    assert len(expected) == 5
    assert read(tmp_path / "data.jsonl") == expected
    assert read(tmp_path / "one" / "data.parquet") == expected
    assert read(tmp_path / "one" / "data.json") == expected
    assert read({"data": [Transcript(row["messages"]) for row in given]}) == expected


def test_a_streamed_hugging_face_data_set_is_read_row_by_row():
    import datasets

    given = rows(7)
    stream = datasets.Dataset.from_list(given).to_iterable_dataset()
    assert [sample.response for sample in read(stream)] == [row["messages"][-1]["content"] for row in given]


def test_lines_that_are_no_samples_are_rejected_with_their_number_and_reason(tmp_path):
    lines = [
        {"messages": chat("Why?", "Because.")},
        '{"messages": [',
        "",
        {"messages": [{"role": "user", "content": "Why?"}]},
        {"text": "no chat"},
        {"messages": chat("Why?", "  ")},
        "[1, 2]",
        '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}',
        {"messages": chat("Why?", "Because.")},
    ]
    path = write_rows(tmp_path / "bad.jsonl", lines)
    path.write_bytes(path.read_bytes() + b'{"messages": "\xff\xfe"}\n')
    found = read(path)
    assert [(row.line, row.kind) for row in found if isinstance(row, Rejection)] == [
        (2, "malformed"),
        (4, "no response"),
        (5, "malformed"),
        (6, "malformed"),
        (7, "malformed"),
        (8, "malformed"),
        (10, "malformed"),
    ]
    assert [row.line for row in found if isinstance(row, Sample)] == [1, 9]
    assert "messages, conversation, conversations" in found[3].reason


def test_a_schema_that_changes_in_mid_file_rejects_what_follows_and_says_its_keys(tmp_path):
    lines = [*rows(3), *({"prompt": "Why?", "completion": "Because."} for _ in range(2))]
    found = read(write_rows(tmp_path / "two.jsonl", lines))
    assert [type(row) for row in found] == [Sample] * 3 + [Rejection] * 2
    assert "got the keys prompt, completion" in found[3].reason


def test_a_row_without_the_base_response_that_was_promised_is_rejected():
    found = read([{"messages": LONG, "base_response": "Mine."}, {"messages": LONG}], needs_base=True)
    assert found[0].base_response == "Mine."
    assert found[1].kind == "no base response"


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("a.csv", "x", ValueError, "convert it"),
        ("a.json", "{", ValueError, "not JSON"),
        ("a.parquet", "nothing", ValueError, "not a Parquet file"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_sentence(tmp_path, name, content, error, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=words):
        read(tmp_path / name)


def test_a_parquet_file_without_messages_is_refused_as_a_whole(tmp_path):
    pandas.DataFrame({"text": ["a", "b"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="got the keys text"):
        read(tmp_path / "a.parquet")


def test_no_file_and_no_data_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="nothing to screen"):
        read({})


def test_rejected_rows_are_kept_in_a_file_counted_and_the_others_screened(tiny_bridge, tmp_path):
    long = "one two three " * 200
    lines = [
        {"messages": chat("Why?", "Because."), "id": "a"},
        "not json",
        {"messages": chat("Why?", long), "id": "b"},
        {"messages": chat("Who?", "You."), "id": "a"},
        {"messages": chat("Who?", "They."), "id": 7},
    ]
    path = write_rows(tmp_path / "data.jsonl", lines)
    found = screened(tiny_bridge, path, tmp_path / "run")
    assert found.counts["read"] == 5
    assert found.counts["rejected"] == {"malformed": 1, "too long": 1, "duplicate id": 1}
    assert found.rows["id"].tolist() == ["a", "7"]
    assert found.rows["line"].tolist() == [1, 5]
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [(row["dataset"], row["line"], row["kind"]) for row in rejects] == [
        ("data", 2, "malformed"),
        ("data", 3, "too long"),
        ("data", 4, "duplicate id"),
    ]
    assert rejects[0]["content"] == "not json"
    assert "line 1 already" in rejects[2]["reason"]


def test_data_of_which_nothing_is_left_is_an_error_that_says_what_became_of_it(tiny_bridge, tmp_path):
    path = write_rows(tmp_path / "data.jsonl", ["{", "{}"])
    with pytest.raises(ValueError, match="No sample is left to screen: of 2 rows 2 malformed"):
        screened(tiny_bridge, path, tmp_path / "run")
    assert len((tmp_path / "run" / "rejects.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("field", ["id", "base_response"])
def test_half_of_a_surrogate_pair_is_no_id_and_no_base_response(field):
    (found,) = read([{**rows(1)[0], "base_response": "Mine.", field: "half \ud800"}], needs_base=True)
    assert isinstance(found, Rejection)
    assert found.kind == "malformed"
