"""Chats of many turns: reading them, refusing what is no chat, and finding every turn in the tokens of one pass."""

import json

import pandas
import pytest

from persona_lens.chat.batches import tokenize_chat
from persona_lens.finetuning.dataset import training_chats
from persona_lens.interop.responses import read_messages
from persona_lens.monitoring.transcripts import Transcript, chat_segments, read_chats, read_transcripts, text_pieces
from persona_lens.screening.samples import named_datasets, stream_samples
from tests.chat_cases import CHATS, FORGETS_THOUGHTS, TRIMS, chat, rendered, with_template

HELLO = chat("Hello.", "Hi.")
LIMIT = 1000


def write(path, value):
    text = "".join(json.dumps(row) + "\n" for row in value) if path.suffix == ".jsonl" else json.dumps(value)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["coding", "therapy"])
def test_the_reference_transcripts_are_read(reference_data, name):
    path = reference_data / "transcripts" / f"{name}.json"
    (found,) = read_transcripts(path)
    given = json.loads(path.read_text(encoding="utf-8"))
    assert list(found.messages) == given["conversation"]
    assert found.name == given["conversation_id"]
    assert found.turns == list(range(1, 30, 2))


def test_json_lines_and_json_lists_and_single_objects_give_the_same_chats(tmp_path):
    rows = [{"messages": each} for each in CHATS]
    lines, listed = write(tmp_path / "a.jsonl", rows), write(tmp_path / "a.json", rows)
    assert read_transcripts(lines) == read_transcripts(listed)
    assert [list(each.messages) for each in read_transcripts(lines)] == CHATS
    assert [each.name for each in read_transcripts(lines)[:2]] == ["a:1", "a:2"]
    (single,) = read_transcripts(write(tmp_path / "b.json", rows[0]))
    assert (list(single.messages), single.name) == (CHATS[0], "b")
    said = [
        {"from": who, "value": each["content"]} for who, each in zip(["system", "human", "gpt"], HELLO, strict=True)
    ]
    (foreign,) = read_transcripts(write(tmp_path / "c.jsonl", [{"id": 7, "conversations": said}]))
    assert (foreign.name, list(foreign.messages)) == ("7", HELLO)
    columns = {key: [each[key] for each in HELLO] for key in ("role", "content")}  # as data sets may keep them
    assert list(read_chats([{"messages": columns}]).chats[0].messages) == HELLO
    pytest.importorskip("pyarrow")
    plain = [{**message, "tool_calls": None} for message in HELLO]
    pandas.DataFrame({"id": ["x", "y"], "messages": [plain, CHATS[0]]}).to_parquet(tmp_path / "d.parquet")
    found = read_transcripts(tmp_path / "d.parquet")
    assert [(each.name, list(each.messages)) for each in found] == [("x", HELLO), ("y", CHATS[0])]


@pytest.mark.parametrize("empty", [None, [], float("nan")])
def test_the_first_key_with_a_value_holds_the_messages(empty):
    said = [{"from": "system", "value": "You are kind."}, {"from": "human", "value": "Hello."}]
    row = {"messages": empty, "conversation": empty, "conversations": [*said, {"from": "gpt", "value": "Hi."}]}
    (found,) = read_chats([row]).chats
    assert list(found.messages) == HELLO
    (trained,) = training_chats([row])
    assert list(trained.messages) == HELLO


@pytest.mark.parametrize("assistant", ["chatgpt", "ChatGPT", "bard", "bing", "gpt", "GPT", "model", "Assistant"])
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_roles_of_other_names_and_cases_are_ours(assistant, keys):
    who = zip(("System", "Human", assistant), (each["content"] for each in HELLO), strict=True)
    given = [dict(zip(keys, each, strict=True)) for each in who]
    (found,) = read_chats([{"conversations": given}]).chats
    assert list(found.messages) == HELLO
    assert list(Transcript(given).messages) == HELLO
    (sample,) = stream_samples(named_datasets([{"conversations": given}]))
    assert sample.response == "Hi."


def test_rows_that_are_no_chats_are_counted_by_their_line_and_the_others_read(tmp_path):
    path = tmp_path / "chats.jsonl"
    good, bad = json.dumps({"messages": HELLO}), json.dumps({"messages": [*HELLO, {"role": "user", "content": " "}]})
    path.write_text(f"{good}\n\n{bad}\nnot json\n{good}\n\n", encoding="utf-8")
    found = read_chats(path)
    assert [each.name for each in found.chats] == ["chats:1", "chats:5"]
    assert [each.row for each in found.rejected] == [3, 4]
    assert found.in_words.startswith(
        "2 of 4 rows could not be read, the first of them row 3: messages[3], of role user"
    )
    with pytest.raises(ValueError, match=r"chats\.jsonl, row 3: messages\[3\], of role user, is empty"):
        read_transcripts(path)
    path.write_text(f"{good}\n\n")
    assert [list(each.messages) for each in read_transcripts(path)] == [HELLO]
    assert [row.response for row in read_messages(path)] == ["Hi."]
    path.write_text('{"id": "\\ud83d", "messages": [{"role": "user", "content": "hi"}]}\n' + good)
    found = read_chats(path)
    assert (len(found.chats), [each.row for each in found.rejected]) == (1, [1])
    assert "half of a surrogate pair" in found.rejected[0].reason


@pytest.mark.parametrize("table", ["pandas", "datasets"])
def test_a_table_of_chats_is_read_wherever_chats_are(table):
    rows = [{"id": "a", "messages": HELLO}, {"id": "b", "messages": CHATS[0][:3]}]
    module = pytest.importorskip(table)
    given = module.DataFrame(rows) if table == "pandas" else module.Dataset.from_list(rows)
    assert [(each.name, list(each.messages)) for each in read_chats(given).chats] == [
        ("a", HELLO),
        ("b", CHATS[0][:3]),
    ]
    assert [list(each.messages) for each in training_chats(given)] == [HELLO, CHATS[0][:3]]
    assert [each.id for each in stream_samples(named_datasets(given))] == ["a", "b"]


TOOL = {"role": "tool", "content": "42"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
THOUGHT = {"role": "assistant", "content": "Hi", "reasoning_content": "Hm."}
IMAGE = {"role": "user", "content": [{"type": "image"}]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [HELLO[0]]}, "row 2: A chat needs a user turn, got 1 messages without one"),
        ({"messages": []}, "row 2: A chat needs a user turn, got 0"),
        ({"messages": [*HELLO, {"role": "user", "content": " \n"}]}, r"row 2: messages\[3\], of role user, is empty"),
        ({"messages": [*HELLO, {"role": "critic", "content": "Hm"}]}, r"messages\[3\] has role 'critic', expected one"),
        ({"messages": [*HELLO, {"content": "Hm"}]}, r"messages\[3\] has role None"),
        ({"messages": [*HELLO, TOOL]}, r"messages\[3\] is a tool message: drop such messages, or fold them into"),
        ({"messages": [*HELLO, CALL]}, r"messages\[3\] has tool_calls, which .*: drop it, or fold it into the text"),
        ({"messages": [*HELLO, THOUGHT]}, r"messages\[3\] has reasoning_content"),
        ({"messages": [IMAGE]}, r"messages\[0\] has content of type list, expected one string"),
        ({"messages": ["Hello"]}, r"messages\[0\] is str, expected an object"),
        ({"messages": HELLO[2:] + HELLO}, r"messages\[0\] is the assistant's, and nothing prompts it"),
        ({"messages": "Hello"}, "row 2: messages is str, expected a list"),
        ({"prompt": "Hello", "text": "Hi"}, "row 2: expected one of messages, .*, got the keys prompt, text"),
        ({"conversations": [{"from": "critic", "value": "Hi"}]}, r"row 2: messages\[0\] has role 'critic'"),
        ({"messages": None}, "row 2: messages is NoneType, expected a list"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_file_row_and_message(tmp_path, shapes_unchecked, row, words):
    with pytest.raises(ValueError, match=rf"chats\.jsonl, .*{words}"):
        read_transcripts(write(tmp_path / "chats.jsonl", [{"messages": HELLO}, row]))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file"):
        read_transcripts(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"Chats are read from \.jsonl, \.json or \.parquet"):
        read_transcripts(write(tmp_path / "a.csv", []))
    with pytest.raises(ValueError, match="has no chats"):
        read_transcripts(write(tmp_path / "a.jsonl", []))
    with pytest.raises(ValueError, match="row 1: expected an object"):
        read_transcripts(write(tmp_path / "b.json", ["Hello"]))
    (tmp_path / "c.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not JSON that can be read"):
        read_transcripts(tmp_path / "c.json")
    (tmp_path / "c.parquet").write_text("{", encoding="utf-8")
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="is not a Parquet file that can be read"):
        read_transcripts(tmp_path / "c.parquet")


def assert_turns_are_those_of_fresh_chats(tokenizer, messages, segments):
    """Every turn is, token for token, what `tokenize_chat` gives for it alone (with the messages that were kept)."""
    system = [each for each in messages[:1] if each["role"] == "system"]
    found = [(segment, turn) for segment in segments for turn in segment.turns]
    assert [turn.message for _, turn in found] == Transcript(messages).turns
    for segment, turn in found:
        kept = [*system, *messages[len(system) + turn.dropped : turn.message]]
        said = messages[turn.message]["content"] if turn.message < len(messages) else ""
        alone = tokenize_chat(tokenizer, kept, said)
        assert segment.tokens[: turn.start] == alone.prompt
        assert segment.tokens[turn.start : turn.stop] == alone.response
        assert turn.last_prompt == turn.start - 1


@pytest.mark.parametrize("messages", CHATS)
def test_a_whole_chat_is_one_pass_that_holds_every_turn(tiny_tokenizer, messages):
    segments = chat_segments(tiny_tokenizer, Transcript(messages), LIMIT)
    assert len(segments) == 1
    assert_turns_are_those_of_fresh_chats(tiny_tokenizer, messages, segments)
    apart = chat_segments(tiny_tokenizer, Transcript(messages), LIMIT, shared=False)
    assert len(apart) == len(Transcript(messages).turns)
    assert_turns_are_those_of_fresh_chats(tiny_tokenizer, messages, apart)


def test_every_token_is_read_once_but_for_the_end_of_turn_and_an_unanswered_chat_has_a_turn(tiny_tokenizer):
    (segment,) = chat_segments(tiny_tokenizer, Transcript(CHATS[0]), LIMIT)
    first, last = segment.turns[0], segment.turns[-1]
    assert tiny_tokenizer.decode(segment.tokens[first.start : first.stop]) == "It is deep."
    assert segment.tokens[first.stop] == tiny_tokenizer.eos_token_id
    assert (last.message, last.start, last.stop) == (6, len(segment.tokens), len(segment.tokens))
    assert list(segment.tokens) == rendered(tiny_tokenizer, CHATS[0])
    (segment,) = chat_segments(tiny_tokenizer, Transcript(CHATS[4]), LIMIT)
    edges = [(turn.unread, turn.stop) for turn in segment.turns]
    assert [edges[0][0], *(stop for _, stop in edges)] == [*(start for start, _ in edges), len(segment.tokens)]


THINKING = chat("Why?", "<think>One.</think>Two.", "How?", "<think>Three.</think>Four.", "Who?", "Five.", "Where?")


@pytest.mark.parametrize(
    ("template", "messages", "n_segments"),
    [
        (FORGETS_THOUGHTS, THINKING, 3),  # the last two turns have no thought to forget between them
        (TRIMS, chat("Why?", " One. ", "How?", "Two.", "Who?", "Three.\n"), 1),  # and what it writes is what is read
        (TRIMS, CHATS[0], 1),
    ],
)
def test_a_template_that_rewrites_earlier_turns_gets_a_pass_for_each_turn_that_it_rewrites(
    tiny_tokenizer, template, messages, n_segments
):
    tokenizer = with_template(tiny_tokenizer, template)
    segments = chat_segments(tokenizer, Transcript(messages), LIMIT)
    assert len(segments) == n_segments
    assert_turns_are_those_of_fresh_chats(tokenizer, messages, segments)


def test_a_response_that_never_says_after_is_marked_and_others_are_averaged_behind_it(tiny_tokenizer):
    (one, *_, last) = chat_segments(
        with_template(tiny_tokenizer, FORGETS_THOUGHTS), Transcript(THINKING[:-1]), LIMIT, after="</think>"
    )
    (first,), (*_, unclosed) = one.turns, last.turns
    assert tiny_tokenizer.decode(one.tokens[first.averaged : first.stop]) == "Two."
    assert not first.unclosed
    assert (unclosed.unclosed, unclosed.averaged) == (True, unclosed.stop)


LONG = chat(*(f"{word} one two three?" if n % 2 == 0 else f"{word}." for n, word in enumerate("abcdefghijklmnop")))


@pytest.mark.parametrize("system", [None, "You are kind."])
def test_a_window_keeps_the_system_turn_and_the_newest_messages_and_counts_the_rest(tiny_tokenizer, system):
    messages = chat(*(each["content"] for each in LONG[1:]), system=system)
    head = len(messages) - len(LONG) + 1
    segments = chat_segments(tiny_tokenizer, Transcript(messages), LIMIT, window=120)
    assert_turns_are_those_of_fresh_chats(tiny_tokenizer, messages, segments)
    dropped = [turn.dropped for segment in segments for turn in segment.turns]
    assert dropped == sorted(dropped)
    assert dropped[0] == 0 < dropped[-1]
    assert all(messages[head + count]["role"] == "user" for count in dropped)
    assert all(len(segment.tokens) <= 120 for segment in segments)


def test_beyond_the_window_half_of_it_is_freed_at_once(tiny_tokenizer):
    segments = chat_segments(tiny_tokenizer, Transcript(LONG), LIMIT, window=160)
    firsts = [segment.turns[0].stop for segment in segments[1:]]
    assert firsts
    assert all(stop <= 80 for stop in firsts)
    assert all(len(segment.turns) > 1 for segment in segments[:-1])
    whole = chat_segments(tiny_tokenizer, Transcript(LONG), LIMIT)
    assert chat_segments(tiny_tokenizer, Transcript(LONG), LIMIT, window=len(whole[0].tokens)) == whole


def test_what_does_not_fit_the_context_or_its_window_is_refused(tiny_tokenizer):
    length = len(rendered(tiny_tokenizer, LONG[:-1])) + len(tiny_tokenizer(LONG[-1]["content"]).input_ids)
    with pytest.raises(ValueError, match=rf"has {length} tokens .* holds 100: pass window=100 or less"):
        chat_segments(tiny_tokenizer, Transcript(LONG), 100)
    messages = chat("Why?", "Two.", "One two three four five six seven eight nine ten. " * 4, "Yes.")
    with pytest.raises(ValueError, match=r"messages\[4\]: this turn alone has \d+ tokens and the window is 60: raise"):
        chat_segments(tiny_tokenizer, Transcript(messages), LIMIT, window=60)
    with pytest.raises(ValueError, match="window is from 2 tokens to the model's context of 50, got 60"):
        chat_segments(tiny_tokenizer, Transcript(messages), 50, window=60)


def test_the_pieces_of_tokens_join_to_their_text_also_within_characters(tiny_tokenizer):
    text = "How are you? é 😀 <|im_end|> ten\ufffd."
    tokens = tiny_tokenizer(text, add_special_tokens=False).input_ids
    pieces = text_pieces(tiny_tokenizer, tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text
    assert "😀" in pieces
