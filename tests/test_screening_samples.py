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
    odd = [*LONG[:2], {"role": "tool", "content": "42"}, {"role": "assistant", "content": None}]
    (last,), (first,) = read([{"messages": LONG}]), read([{"messages": LONG}], first_turn=True)
    assert (len(last.messages), last.response) == (3, "Second.")
    assert (len(first.messages), first.response) == (1, "First.")
    assert read([{"messages": odd}], first_turn=True)[0].response == "First."  # later turns need be no chat
    assert "tool message" in read([{"messages": odd}])[0].reason


def test_rows_of_all_three_forms_may_stand_in_one_file(tmp_path):
    sharegpt = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    plain = chat("Why?", "Because.", system=False)
    samples = read(
        write_rows(
            tmp_path / "mixed.jsonl", [{"messages": plain}, {"conversation": plain}, {"conversations": sharegpt}]
        )
    )
    assert [(sample.messages, sample.response) for sample in samples] == [(tuple(plain[:1]), "Because.")] * 3
    assert [sample.id for sample in samples] == ["mixed:1", "mixed:2", "mixed:3"]


def test_files_and_rows_in_memory_and_streamed_data_sets_give_the_same_samples(tmp_path):
    import datasets

    data, one = rows(5, source="x"), tmp_path / "one"
    one.mkdir()
    write_rows(tmp_path / "data.jsonl", data)
    pandas.DataFrame(data).to_parquet(one / "data.parquet")
    (one / "data.json").write_text(json.dumps(data))
    streamed = datasets.Dataset.from_list(data).to_iterable_dataset()
    expected = read({"data": data})
    assert len(expected) == 5
    for same in (tmp_path / "data.jsonl", one / "data.parquet", one / "data.json", streamed):
        assert read(same) == expected
    assert read({"data": [Transcript(row["messages"]) for row in data]}) == expected


def test_lines_that_are_no_samples_are_rejected_with_their_number_and_reason(tmp_path):
    lines = [
        {"messages": chat("Why?", "Because.")},
        '{"messages": [',
        "",
        {"messages": [{"role": "user", "content": "Why?"}]},
        {"prompt": "Why?", "completion": "Because."},
        {"messages": chat("Why?", "  ")},
        "[1, 2]",
        '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}',
        {"messages": chat("Why?", "Because.")},
    ]
    path = write_rows(tmp_path / "bad.jsonl", lines)
    path.write_bytes(path.read_bytes() + b'{"messages": "\xff\xfe"}\n')
    found = read(path)
    kinds = {row.line: row.kind for row in found if isinstance(row, Rejection)}
    assert kinds == {line: "no response" if line == 4 else "malformed" for line in (2, 4, 5, 6, 7, 8, 10)}
    assert [row.line for row in found if isinstance(row, Sample)] == [1, 9]
    assert "messages, conversation, conversations, got the keys prompt, completion" in found[3].reason


def test_a_base_response_that_was_promised_is_read_and_a_row_without_it_or_with_half_a_character_rejected():
    data = [{"messages": LONG, "base_response": "Mine."}, {"messages": LONG}]
    data += [{"messages": LONG, "base_response": "Mine.", field: "half \ud800"} for field in ("id", "base_response")]
    sample, *rejected = read(data, needs_base=True)
    assert sample.base_response == "Mine."
    assert [row.kind for row in rejected] == ["no base response", "malformed", "malformed"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("a.csv", "x", "convert it"), ("a.json", "{", "not JSON"), ("a.parquet", "nothing", "not a Parquet file")],
)
def test_a_file_of_another_kind_is_refused_in_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        read(tmp_path / name)


def test_no_file_no_data_and_a_parquet_file_without_messages_are_refused_as_a_whole(tmp_path):
    pandas.DataFrame({"text": ["a", "b"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="got the keys text"):
        read(tmp_path / "a.parquet")
    with pytest.raises(FileNotFoundError, match="No file"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="nothing to screen"):
        read({})


def test_rejected_rows_are_kept_in_a_file_counted_and_the_others_screened(tiny_bridge, tmp_path):
    lines = [
        {"messages": chat("Why?", "Because."), "id": "a"},
        "not json",
        {"messages": chat("Why?", "one two three " * 200), "id": "b"},
        {"messages": chat("Who?", "You."), "id": "a"},
        {"messages": chat("Who?", "They."), "id": 7},
    ]
    screening = screened(tiny_bridge, write_rows(tmp_path / "data.jsonl", lines), tmp_path / "run")
    assert screening.counts["read"] == 5
    assert screening.counts["rejected"] == {"malformed": 1, "too long": 1, "duplicate id": 1}
    assert list(zip(screening.rows["id"], screening.rows["line"], strict=True)) == [("a", 1), ("7", 5)]
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    kinds = [(2, "malformed"), (3, "too long"), (4, "duplicate id")]
    assert [(row["dataset"], row["line"], row["kind"]) for row in rejects] == [("data", *kind) for kind in kinds]
    assert rejects[0]["content"] == "not json"
    assert "line 1 already" in rejects[2]["reason"]


def test_data_of_which_nothing_is_left_is_an_error_that_says_what_became_of_it(tiny_bridge, tmp_path):
    path = write_rows(tmp_path / "data.jsonl", ["{", "{}"])
    with pytest.raises(ValueError, match="No sample is left to screen: of 2 rows 2 malformed"):
        screened(tiny_bridge, path, tmp_path / "run")
    assert len((tmp_path / "run" / "rejects.jsonl").read_text().splitlines()) == 2
