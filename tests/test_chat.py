"""Messages to token ids with a known boundary: templates, masks, padding, batches, what is refused."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.chat_cases import CLOCKED, set_clock

MESSAGES = [{"role": "system", "content": "You are kind."}, {"role": "user", "content": "What is the sea?"}]
TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
START = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
RAISES_ON_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    f"{TURN}{{% endfor %}}{START}"
)
DROPS_SYSTEM = f"{{% for m in messages if m['role'] != 'system' %}}{TURN}{{% endfor %}}{START}"


@pytest.fixture(scope="module")
def chat():
    """The module under test, imported late so that the jaxtyping hook instruments it."""
    import persona_lens.chat.batches

    return persona_lens.chat.batches


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


# --- templates -----------------------------------------------------------------------------------------------------


USER = "<|im_start|>user\nWhat is the sea?<|im_end|>\n<|im_start|>assistant\n"
FOLDED = USER.replace("user\n", "user\nYou are kind.\n\n")
SHORT = {"role": "system", "content": "Be short."}


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (None, MESSAGES, (f"<|im_start|>system\nYou are kind.<|im_end|>\n{USER}", False)),
        (RAISES_ON_SYSTEM, MESSAGES, (FOLDED, True)),
        (DROPS_SYSTEM, MESSAGES, (FOLDED, True)),
        (RAISES_ON_SYSTEM, MESSAGES[1:], (USER, False)),
        (RAISES_ON_SYSTEM, [*MESSAGES, SHORT], (FOLDED.replace("kind.\n\n", "kind.\n\nBe short.\n\n"), True)),
    ],
)
def test_messages_are_rendered_up_to_where_the_model_would_speak_and_system_turns_folded_where_there_are_none(
    chat, tiny_tokenizer, template, messages, expected
):
    tokenizer = tiny_tokenizer if template is None else with_template(tiny_tokenizer, template)
    assert chat.render_prompt(tokenizer, messages) == expected


@pytest.mark.parametrize(
    "template",
    [
        CLOCKED,
        "  \n {% if strftime_now is defined %}\n  {{ strftime_now('%A %-d %B %Y, %H:%M') }}\n{% endif %}\n",
        "\n\n{{ strftime_now('100%% on %%d is %d, %j %U %y') }}",
        "{{ strftime_now('%F %D %e %-y %j %C') }} {{ messages }}",
        "  {% macro day(form) %}{{ strftime_now(form).upper() }}{% endmacro %}{{ day('%a %b') }} {{ messages }}",
    ],
)
def test_a_template_told_a_day_is_rendered_as_transformers_renders_it_on_that_day(
    chat, tiny_tokenizer, monkeypatch, template
):
    from persona_lens.chat.templates import fixed_date

    tokenizer, messages = with_template(tiny_tokenizer, template), MESSAGES[1:]
    set_clock(monkeypatch, "2024-02-05")
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    set_clock(monkeypatch, "2026-11-30")
    with fixed_date("2024-02-05"):
        assert chat.render_prompt(tokenizer, messages).text == expected
    assert chat.render_prompt(tokenizer, messages).text != expected


def test_the_day_does_not_change_while_it_is_fixed(chat, tiny_tokenizer, monkeypatch):
    from persona_lens.chat.templates import date_told, fixed_date

    tokenizer = with_template(tiny_tokenizer, CLOCKED)
    set_clock(monkeypatch, "2026-11-30")
    with fixed_date():
        before = chat.render_prompt(tokenizer, MESSAGES)
        set_clock(monkeypatch, "2026-12-01")
        assert chat.render_prompt(tokenizer, MESSAGES) == before
        with fixed_date():  # of what a run calls
            assert date_told(tokenizer) == "2026-11-30"
    assert date_told(tokenizer) == "2026-12-01"
    assert date_told(tiny_tokenizer) == ""


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        ("{{ raise_exception('Roles must alternate') }}", MESSAGES, "refuses these messages: Roles must alternate"),
        ("{{ raise_exception('Roles must alternate') }}", MESSAGES[1:], "refuses these messages: Roles must alternate"),
        (DROPS_SYSTEM, MESSAGES[:1], "no first user turn to put its text before"),
        (None, MESSAGES, r"no chat template.*set tokenizer\.chat_template, or pass rendered text"),
    ],
)
def test_a_template_that_refuses_the_messages_says_why(chat, tiny_tokenizer, template, messages, words):
    with pytest.raises(ValueError, match=words):
        chat.render_prompt(with_template(tiny_tokenizer, template), messages)


def test_chat_messages_have_a_system_turn_only_where_one_is_given(chat):
    assert chat.chat_messages("You are kind.", "What is the sea?") == MESSAGES
    assert chat.chat_messages(None, "What is the sea?") == MESSAGES[1:]


def test_every_form_of_a_chat_is_the_prompt_that_it_says(chat, tiny_tokenizer):
    user, said = MESSAGES[1:], {"role": "assistant", "content": "Deep."}
    asked, rendered = chat.tokenize_chat(tiny_tokenizer, user).prompt, chat.render_prompt(tiny_tokenizer, user).text
    for form in (
        "What is the sea?",
        user,
        chat.Conversation(tuple(user), "Deep."),
        chat.RenderedPrompt(rendered),
        chat.Conversation(rendered, "Deep."),
        list(asked),
    ):
        assert chat.prompt_tokens(tiny_tokenizer, form) == asked
    for form in ([*user, said], chat.Conversation(tuple(user), "Deep.")):
        batch = chat.chat_batch(tiny_tokenizer, [form, "Hi"])
        assert tiny_tokenizer.decode(batch.tokens[0, batch.response_mask[0]]) == "Deep."
        assert not batch.response_mask[1].any()
        assert chat.show_tokens(tiny_tokenizer, form) == chat.show_tokens(tiny_tokenizer, batch)
    whole = chat.render_prompt(tiny_tokenizer, [*user, said]).text
    assert tiny_tokenizer.decode(chat.prompt_tokens(tiny_tokenizer, [*user, said])) == whole


@pytest.mark.usefixtures("shapes_unchecked")
def test_what_is_no_chat_or_no_list_of_chats_is_refused(chat, tiny_tokenizer):
    for wrong in (3, {"role": "user"}, ["Why?"]):
        with pytest.raises(TypeError):
            chat.prompt_tokens(tiny_tokenizer, wrong)
    for single in ("Why?", MESSAGES, chat.RenderedPrompt("Why?"), chat.Conversation("Why?", "")):
        with pytest.raises(ValueError, match=r"got a single one: put it into brackets, \[chat\]"):
            chat.chat_batch(tiny_tokenizer, single)


def test_a_template_hash_tells_templates_apart(chat, tiny_tokenizer):
    assert chat.template_hash(tiny_tokenizer) == chat.template_hash(copy.deepcopy(tiny_tokenizer))
    assert chat.template_hash(tiny_tokenizer) != chat.template_hash(with_template(tiny_tokenizer, DROPS_SYSTEM))


def test_a_turn_ends_with_the_end_of_text_and_what_the_template_puts_after_an_answer(chat, tiny_tokenizer):
    other_end = with_template(tiny_tokenizer, tiny_tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>"))
    end_of_turn, end_of_text = tiny_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert chat.turn_ends(tiny_tokenizer) == {end_of_turn}
    assert chat.turn_ends(other_end) == {end_of_turn, end_of_text}
    assert chat.turn_ends(with_template(tiny_tokenizer, None)) == {end_of_turn}


# --- the boundary --------------------------------------------------------------------------------------------------


@given(question=st.text(max_size=20), response=st.text(max_size=20))
def test_prompt_and_response_are_tokenised_apart_and_the_response_is_its_text_alone(
    chat, tiny_tokenizer, question, response
):
    messages = [{"role": "user", "content": question}]
    row = chat.tokenize_chat(tiny_tokenizer, messages, response)
    assert row.prompt == chat.encode(tiny_tokenizer, chat.render_prompt(tiny_tokenizer, messages).text)
    assert row.response == tuple(tiny_tokenizer(response, add_special_tokens=False).input_ids)


def test_a_rendered_prompt_is_used_verbatim(chat, tiny_tokenizer):
    text = chat.render_prompt(tiny_tokenizer, MESSAGES).text
    assert chat.tokenize_chat(tiny_tokenizer, text, "No.") == chat.tokenize_chat(tiny_tokenizer, MESSAGES, "No.")


def test_a_response_has_no_end_of_turn_token_and_token_ids_are_taken_as_they_are(chat, tiny_tokenizer):
    row = chat.tokenize_chat(tiny_tokenizer, MESSAGES, "It is deep.")
    assert tiny_tokenizer.eos_token_id in row.prompt
    assert tiny_tokenizer.eos_token_id not in row.response
    assert chat.tokenize_chat(tiny_tokenizer, MESSAGES, [5, 7]).response == (5, 7)
    with pytest.raises(ValueError, match="at least one prompt token"):
        chat.tokenize_chat(tiny_tokenizer, "", "Hello.")


# --- after ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["", "Yes.", " and </think> again"])
def test_only_what_follows_the_marker_is_averaged(chat, tiny_tokenizer, answer):
    response = f"<think> why </think>{answer}"
    row = chat.tokenize_chat(tiny_tokenizer, MESSAGES, response, after="</think>")
    assert tiny_tokenizer.decode(row.response) == response
    assert tiny_tokenizer.decode(row.response[row.skip :]) == answer
    assert row.n_averaged == len(row.response) - row.skip


def test_an_unclosed_block_is_refused_and_an_empty_response_has_none(chat, tiny_tokenizer):
    with pytest.raises(chat.UnclosedBlock, match="never says '</think>'"):
        chat.tokenize_chat(tiny_tokenizer, MESSAGES, "<think> on and on", after="</think>")
    assert chat.tokenize_chat(tiny_tokenizer, MESSAGES, "", after="</think>").skip == 0


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_collated_masks_follow_the_rows_and_not_the_ids(chat, side):
    pad = 5  # the padding token is also in the rows, as in models whose padding token ends every turn
    rows = [chat.ChatTokens((5, 1), (2, 5)), chat.ChatTokens((5,)), chat.ChatTokens((3,), (4, 5, 5), skip=1)]
    batch = chat.collate(rows, pad_side=side, pad_token=pad)
    for index, row in enumerate(rows):
        attended = batch.attention_mask[index]
        assert batch.tokens[index, attended].tolist() == [*row.prompt, *row.response]
        assert batch.tokens[index, batch.response_mask[index]].tolist() == [*row.response[row.skip :]]
        assert batch.tokens[index, batch.prompt_mask[index]].tolist() == [*row.prompt]
        assert attended.tolist() == sorted(attended.tolist(), reverse=side == "right")


def test_a_batch_of_no_rows_of_unequal_shapes_or_with_a_response_on_padding_is_refused(chat, shapes_unchecked):
    mask = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one row"):
        chat.collate([])
    with pytest.raises(ValueError, match=r"one shape \[batch pos\], got \[\(1, 2\), \(1, 3\)\]"):
        chat.ChatBatch(torch.zeros(1, 2, dtype=torch.long), mask, mask)
    with pytest.raises(ValueError, match="response_mask marks padding"):
        chat.ChatBatch(torch.zeros(1, 3, dtype=torch.long), ~mask, mask)


def test_averaged_tokens_are_shown_between_bars(chat, tiny_tokenizer):
    rows = [chat.tokenize_chat(tiny_tokenizer, MESSAGES, response) for response in ("You are", "assistant assistant")]
    assert chat.show_tokens(tiny_tokenizer, chat.collate(rows), row=0).endswith("<|im_start|>assistant\n|You| are|")


def test_shown_tokens_go_on_after_the_averaged_ones(chat):
    class Letters:
        def decode(self, ids):
            return "abcdef"[ids[0]]

    response = torch.tensor([[False, True, True, False, False]])
    attention = torch.tensor([[True, True, True, True, False]])
    batch = chat.ChatBatch(torch.arange(5)[None], attention, response)
    assert chat.show_tokens(Letters(), batch) == "a|b|c|d"


# --- the context ---------------------------------------------------------------------------------------------------


def test_responses_are_cut_only_on_request_and_counted_and_prompts_never(chat):
    rows = [chat.ChatTokens((1, 2), (3, 4, 5), skip=1), chat.ChatTokens((1,), (2,))]
    assert chat.fit_context(rows, 5) == (rows, 0)
    with pytest.raises(ValueError, match=r"Row 0 has 5 tokens \(prompt and response\), the context holds 4"):
        chat.fit_context(rows, 4)
    cut = [chat.ChatTokens((1, 2), (3, 4), skip=1), rows[1]]
    assert chat.fit_context(rows, 4, too_long="truncate") == (cut, 1)
    with pytest.raises(ValueError, match="prompt alone"):
        chat.fit_context(rows, 2, too_long="truncate")


# --- conversations -------------------------------------------------------------------------------------------------


def test_a_conversation_is_read_from_messages_that_end_with_a_response(chat):
    turns = [*MESSAGES, {"role": "assistant", "content": "Water."}, {"role": "user", "content": "Why?"}]
    conversation = chat.Conversation.from_messages([*turns, {"role": "assistant", "content": "It rains."}])
    assert conversation == chat.Conversation(tuple(turns), "It rains.", question="Why?", instruction="You are kind.")
    for messages in ([], MESSAGES):
        with pytest.raises(ValueError, match="must end with the assistant's response"):
            chat.Conversation.from_messages(messages)


@pytest.mark.parametrize(("response", "empty"), [("", True), (" \n", True), ((), True), ("a", False), ((3,), False)])
def test_a_conversation_without_a_response_is_empty(chat, response, empty):
    assert chat.Conversation("prompt", response).is_empty == empty


def test_a_chat_batch_holds_the_conversations_as_they_are_tokenised(chat, tiny_tokenizer):
    conversations = [chat.Conversation(tuple(MESSAGES), text) for text in ("It is deep.", "<t>no</t>Yes")]
    batch = chat.chat_batch(tiny_tokenizer, conversations[1:], after="</t>")
    assert tiny_tokenizer.decode(batch.tokens[0, batch.response_mask[0]]) == "Yes"
    whole = chat.chat_batch(tiny_tokenizer, conversations)
    for index, conversation in enumerate(conversations):
        row = conversation.tokenize(tiny_tokenizer)
        assert whole.tokens[index, whole.attention_mask[index]].tolist() == [*row.prompt, *row.response]
