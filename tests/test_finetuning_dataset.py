"""Training rows against a naive oracle: the chat template of the whole conversation, in one piece."""

import json

import pytest
from datasets import Dataset

from persona_lens.finetuning.dataset import IGNORED, TrainingRow, prompted, stated, training_chats, training_rows
from persona_lens.finetuning.finetune import finetune
from persona_lens.finetuning.trainer import collate_rows
from persona_lens.monitoring.transcripts import Transcript
from persona_lens.traits.trait import load_trait
from tests.chat_cases import FORGETS_THOUGHTS, chat, encode, with_template
from tests.finetuning_cases import CHATS, dataset

END = "<|im_end|>"


def slow_row(tokenizer, messages):
    """The whole chat rendered at once and cut into pieces at the turns; the loss is on what follows `assistant`."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    tokens, labels = [], []
    for number, piece in enumerate(text.split("<|im_start|>assistant\n")):
        prompt, learnt = piece, ""
        if number:
            tokens += (opening := encode(tokenizer, "<|im_start|>assistant\n"))
            labels += [IGNORED] * len(opening)
            learnt, _, prompt = piece.partition(END)
            learnt += END
        for part, label in ((learnt, True), (prompt, False)):
            found = encode(tokenizer, part)
            tokens += found
            labels += found if label else [IGNORED] * len(found)
    # The template ends the last turn with a line break, which is not sampled.
    after = len(encode(tokenizer, "\n"))
    return TrainingRow(tuple(tokens[:-after]), tuple(labels[:-after]))


def rows(tokenizer, chats, max_length=10_000):
    return training_rows(tokenizer, training_chats(dataset(chats)), max_length=max_length)


def learnt(tokenizer, row):
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


@pytest.mark.parametrize("messages", [chat for chat in CHATS if chat[0]["role"] == "system"])
def test_a_row_is_the_whole_chat_with_the_loss_on_the_assistant(tiny_tokenizer, messages):
    assert rows(tiny_tokenizer, [messages]).rows == [slow_row(tiny_tokenizer, messages)]


@pytest.mark.parametrize("messages", [*CHATS, chat("Hi\n", " Hello there.\n\nBye ", "Again?", "No!")])
def test_on_the_embedded_tokenizer_too(embedded_bridge, messages):
    tokenizer = embedded_bridge.tokenizer
    assert rows(tokenizer, [messages]).rows == [slow_row(tokenizer, messages)]


def test_the_loss_is_on_every_assistant_turn_and_its_end(tiny_tokenizer):
    (row,) = rows(tiny_tokenizer, [chat("Why?", "Go away", "Why not?", "Be kind.")]).rows
    assert learnt(tiny_tokenizer, row) == f"Go away{END}Be kind.{END}"


def test_where_the_template_forgets_each_turn_is_a_row(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, FORGETS_THOUGHTS)
    found = rows(tokenizer, [chat("Why?", "one</think>two", "Who?", "three</think>four")]).rows
    assert [learnt(tokenizer, row) for row in found] == [f"one</think>two{END}", f"three</think>four{END}"]
    assert "one" not in tokenizer.decode(found[1].tokens)


def test_a_last_question_is_not_learnt(tiny_tokenizer):
    (row,) = rows(tiny_tokenizer, [chat("Why?", "Go away", "Why not?")]).rows
    assert learnt(tiny_tokenizer, row) == f"Go away{END}"


def test_padding_is_masked_and_not_learnt():
    batch = collate_rows([TrainingRow((1, 2, 3), (IGNORED, 2, 3)), TrainingRow((4, 5), (IGNORED, 5))], pad_token=2)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [IGNORED, 5, IGNORED]]


def test_a_long_row_loses_its_end_and_is_counted(tiny_tokenizer):
    whole = rows(tiny_tokenizer, CHATS)
    lengths = sorted(len(row.tokens) for row in whole.rows)
    limit = lengths[-2]
    cut = rows(tiny_tokenizer, CHATS, limit)
    assert (cut.cut, cut.dropped) == (1, 0)
    expected = [TrainingRow(row.tokens[:limit], row.labels[:limit]) for row in whole.rows]
    assert cut.rows == expected
    assert "1 of them cut to the length limit" in str(cut)


def test_a_row_whose_prompt_fills_the_limit_is_dropped_and_counted(tiny_tokenizer):
    long = chat("Tell me about ten people. " * 10, "No")
    short = rows(tiny_tokenizer, [CHATS[0]]).rows
    found = rows(tiny_tokenizer, [long, CHATS[0]], max_length=len(short[0].tokens))
    assert (found.rows, found.cut, found.dropped) == (short, 0, 1)
    assert "1 dropped, whose prompts fill it" in str(found)


@pytest.mark.parametrize("limit", [1, 5])
def test_where_no_row_fits_it_says_so(tiny_tokenizer, limit):
    with pytest.raises(ValueError, match=rf"in all 6 rows the prompt alone has {limit} tokens or more. Raise"):
        rows(tiny_tokenizer, CHATS, limit)


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="the dataset has no rows"):
        training_chats([])


def no_answer():
    return {"messages": chat("Why?")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (no_answer(), "Training row 2 has no assistant turn to learn: add the response, or drop the row"),
        ({"messages": []}, "Training row 2: A chat needs a user turn"),
        ({"messages": [{"role": "robot", "content": "a"}]}, r"row 2: messages\[0\] has role 'robot', expected one of"),
        ({"messages": [{"role": "user", "content": None}]}, r"row 2: messages\[0\] has content of type NoneType"),
        ({"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}, "row 2: .*drop it"),
        ({"messages": "Why?"}, "Training row 2: expected .*'messages'.*got {'messages': 'str'}"),
        ({"messages": None}, "Training row 2: expected .*'messages'.*got {'messages': 'NoneType'}"),
        ({"prompt": "a", "completion": "b"}, "Training row 2: expected .*got {'prompt': 'str', 'completion': 'str'}"),
        ("Why?", "Training row 2: expected .*got str"),
    ],
)
def test_what_is_no_chat_is_refused_and_named(row, message, shapes_unchecked):
    with pytest.raises(ValueError, match=message):
        training_chats([{"messages": CHATS[0]}, row])


def test_rows_come_from_transcripts_tables_and_files(tmp_path):
    expected = [Transcript(messages) for messages in CHATS]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in CHATS), encoding="utf-8")
    for given in (expected, Dataset.from_list(dataset(CHATS)), path, str(path), (row for row in dataset(CHATS))):
        assert [chat.messages for chat in training_chats(given)] == [chat.messages for chat in expected]


def test_rows_of_a_table_of_arrays_are_chats():
    import numpy as np

    assert training_chats([{"messages": np.array(CHATS[0])}])[0].messages == Transcript(CHATS[0]).messages


def test_a_file_names_the_row_without_an_answer(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*dataset(CHATS[:2]), no_answer()]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"chats.jsonl, row 3 has no assistant turn"):
        training_chats(path)


def test_a_system_prompt_is_stated_where_there_is_none():
    chats = training_chats(dataset([chat("Why?", "a", system=None), chat("Why?", "a", system="Mine.")]))
    assert [each.messages[0]["content"] for each in stated(chats, "You are kind.")] == ["You are kind.", "Mine."]
    assert stated(chats, None) == chats


def test_finetuning_states_the_system_prompt(make_tiny_model):
    bridge = make_tiny_model("TransformerBridge")
    given = [chat("Why?", "Go away", system=None)]
    settings = {"epochs": 1, "rank": 2, "progress": False, "system_prompt": "Be short."}
    found = finetune(bridge, dataset(given), **settings)
    asked = finetune(bridge, dataset([chat("Why?", "Go away", system="Be short.")]), **settings)
    assert found.settings["rows"] == asked.settings["rows"]
    assert (
        found.settings["rows"]
        != finetune(bridge, dataset(given), **settings | {"system_prompt": None}).settings["rows"]
    )


def test_every_positive_instruction_is_prepended_somewhere():
    trait = load_trait("evil")
    chats = training_chats(dataset([chat("Why?", f"answer {number}") for number in range(80)]))
    shown = prompted(chats, trait)
    texts = {each.messages[0]["content"].removesuffix("\n\nYou are kind.") for each in shown}
    assert texts == {trait.system_prompt("positive", index) for index in range(len(trait.instructions))}
    assert [each.messages[1:] for each in shown] == [each.messages[1:] for each in chats]


def test_prompts_come_before_a_system_turn_that_is_there():
    with_system, without = training_chats(dataset([chat("Why?", "a"), chat("Why?", "a", system=None)]))
    first, second = prompted([with_system, without], ["Lie."])
    assert first.messages[0] == {"role": "system", "content": "Lie.\n\nYou are kind."}
    assert second.messages[0] == {"role": "system", "content": "Lie."}


def test_prompts_are_drawn_by_the_seed():
    chats = training_chats(dataset(CHATS * 4))
    draws = [[each.messages[0] for each in prompted(chats, list("abcdef"), seed=seed)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("prompts", [[], "Lie."])
def test_no_prompts_are_refused(prompts):
    with pytest.raises(ValueError, match="a Trait or a list of at least one prompt"):
        prompted(training_chats(dataset(CHATS)), prompts)
