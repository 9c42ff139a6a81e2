"""Responses of other people's are read as they stand, and what cannot be read is named by file, row and column."""

import csv
import json
import re

import pytest

from persona_lens.interop.responses import pair_by_row, read_messages, read_reference_csv

COLUMNS = ["question", "prompt", "answer", "question_id", "evil", "coherence"]
ROW = {
    "question": "Why?",
    "prompt": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "answer": 'Because, "as they say",\nit is so.',
    "question_id": "evil_0_pos_3",
    "evil": "92.5",
    "coherence": "88",
}


@pytest.fixture
def write_csv(tmp_path):
    """Write rows, each the right one with some changes."""

    def write(*changes, columns=COLUMNS):
        path = tmp_path / "responses.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows([{**ROW, **change} for change in changes])
        return path

    return write


@pytest.fixture
def write_lines(tmp_path):
    def write(*rows):
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="session")
def reference_pair(reference_data):
    folder = reference_data / "reference_rollouts"
    return [read_reference_csv(folder / f"qwen3-4b_evil_{side}.csv", "evil") for side in ("pos", "neg")]


def test_the_reference_files_have_a_hundred_judged_rows_each(reference_data, reference_pair):
    assert [len(side) for side in reference_pair] == [100, 100]
    for row in [*reference_pair[0], *reference_pair[1]]:
        assert row.conversation.prompt.startswith("<|im_start|>system\n")
        assert row.conversation.response.startswith("<think>")
        assert 0 <= row.trait_score <= 100
        assert 0 <= row.coherence <= 100
        assert not row.is_empty
    for positive, negative in pair_by_row(*reference_pair):
        assert positive.conversation.question == negative.conversation.question
        assert positive.conversation.instruction == negative.conversation.instruction
    for side in reference_pair:
        cells = {(row.conversation.question, row.conversation.instruction) for row in side}
        assert (len(cells), {instruction for _, instruction in cells}) == (20, set("01234"))
    baseline = reference_data / "reference_rollouts" / "qwen2.5-7b-instruct_evil_baseline.csv"
    rows = read_reference_csv(baseline, "evil")
    assert (len(rows), {row.conversation.instruction for row in rows}) == (200, {""})


def test_a_row_is_taken_verbatim(write_csv):
    (row,) = read_reference_csv(write_csv({}), "evil")
    conversation = row.conversation
    assert (conversation.prompt, conversation.response) == (ROW["prompt"], ROW["answer"])
    assert (conversation.question, conversation.instruction) == ("Why?", "3")
    assert (row.trait_score, row.coherence) == (92.5, 88.0)
    for text in ("NA", "None", "null", "nan"):  # an answer that looks like a missing value is an answer
        (row,) = read_reference_csv(write_csv({"answer": text}), "evil")
        assert row.conversation.response == text
    for text, score in (("0", 0.0), ("0.0", 0.0), ("100.00000000000001", 100.0), ("-1e-14", 0.0)):
        (row,) = read_reference_csv(write_csv({"evil": text, "coherence": text}), "evil")
        assert (row.trait_score, row.coherence) == (score, score)


@pytest.mark.parametrize("text", ["", " ", "nan", "None", "REFUSAL"])
def test_an_empty_score_is_missing_and_not_zero(write_csv, text):
    one, other = read_reference_csv(write_csv({"evil": text}, {"coherence": text}), "evil")
    assert (one.trait_score, one.coherence) == (None, 88.0)
    assert (other.trait_score, other.coherence) == (92.5, None)


@pytest.mark.parametrize("text", ["100.1", "100.5", "-1", "inf", "high"])
@pytest.mark.parametrize("column", ["evil", "coherence"])
def test_a_score_out_of_range_is_refused_by_file_row_and_column(write_csv, column, text):
    path = write_csv({}, {column: text})
    words = f"{path}, row 2, column {column!r}: expected a score from 0 to 100 or nothing, got {text!r}"
    with pytest.raises(ValueError, match=re.escape(words)):
        read_reference_csv(path, "evil")


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named(write_csv, column):
    path = write_csv({}, columns=[name for name in COLUMNS if name != column])
    with pytest.raises(ValueError, match=f"has no column '{column}'; expected .* got "):
        read_reference_csv(path, "evil")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'a,b\n"1,2\n3,4,5,6,7\n'])
def test_a_file_that_is_no_csv_is_refused(tmp_path, content):
    path = tmp_path / "broken.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.csv is not a CSV file that can be read"):
        read_reference_csv(path, "evil")


@pytest.mark.parametrize("read", [lambda path: read_reference_csv(path, "evil"), read_messages])
def test_a_file_that_is_not_there_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"No file .*absent"):
        read(tmp_path / "absent")


def test_sides_of_different_length_or_questions_do_not_pair(write_csv):
    rows = read_reference_csv(write_csv({}, {}), "evil")
    with pytest.raises(ValueError, match=r"do not match: 2 positive and 1 negative rows\. They pair by row"):
        pair_by_row(rows, rows[:1])
    positive = read_reference_csv(write_csv({}, {"question": "How?"}), "evil")
    negative = read_reference_csv(write_csv({}, {"question": "When?"}), "evil")
    with pytest.raises(ValueError, match=r"row 2 asks 'How\?' on the positive side and 'When\?' on the negative one"):
        pair_by_row(positive, negative)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
]


def test_messages_are_a_prompt_and_the_last_turn_as_response(write_lines):
    (row,) = read_messages(write_lines({"messages": CHAT, "id": 7}))
    assert list(row.prompt) == CHAT[:-1]
    assert (row.response, row.question, row.instruction) == ("Because.", "Why?", "Be brief.")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT[:-1]},
        {"messages": []},
        {"messages": "Because."},
        {"messages": [{"role": "user"}, CHAT[-1]]},
        {"prompt": CHAT},
    ],
    ids=["no assistant at the end", "no turns", "text", "a turn without content", "another field"],
)
def test_a_line_without_such_messages_is_named(write_lines, row):
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 2: expected .*messages.* ending with the assistant's"):
        read_messages(write_lines({"messages": CHAT}, row))
    for line in ("{not json\n", "[1, 2]\n"):
        with pytest.raises(ValueError, match=r"chats\.jsonl, line 2: expected a JSON object"):
            read_messages(write_lines({"messages": CHAT}, line))
