"""Chats in, texts out: the same tokens as the decode loop, under the same interventions."""

import pytest

import persona_lens as pl
from persona_lens.chat.batches import tokenize_chat
from tests.intervention_cases import some_vectors

ASKED = "What should I do today?"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED}]


def by_hand(model, messages, **options):
    tokenizer = model.tokenizer
    prompts = [tokenize_chat(tokenizer, each).prompt for each in messages]
    return [tokenizer.decode(each.tokens, skip_special_tokens=True) for each in pl.generate(model, prompts, **options)]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 4}, {"top_p": 0.5, "seed": 1}])
def test_texts_are_those_of_the_decode_loop(tiny_model, options):
    found = pl.generate_text(tiny_model, [ASKED, CHAT], max_new_tokens=8, **options)
    assert found == by_hand(tiny_model, [CHAT[1:], CHAT], max_new_tokens=8, **options)
    assert len(set(found)) == 2


def test_attached_interventions_act(tiny_model):
    vector = some_vectors(tiny_model).at(1)
    plain = pl.generate_text(tiny_model, [ASKED], max_new_tokens=8, temperature=0.0)
    with pl.steer(tiny_model, vector, 50.0):
        steered = pl.generate_text(tiny_model, [ASKED], max_new_tokens=8, temperature=0.0)
    assert steered != plain == pl.generate_text(tiny_model, [ASKED], max_new_tokens=8, temperature=0.0)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("chat", [ASKED, CHAT], ids=["text", "messages"])
def test_one_chat_instead_of_a_list_is_refused_before_it_is_read_in_pieces(tiny_model, chat):
    with pytest.raises(ValueError, match=r"Expected a list of chats, got a single one: put it into brackets"):
        pl.generate_text(tiny_model, chat)


def test_no_chats_have_no_replies(tiny_model):
    assert pl.generate_text(tiny_model, []) == []


@pytest.mark.embedded
def test_the_embedded_model_answers_in_words(embedded_model):
    (found,) = pl.generate_text(embedded_model, ["What is the capital of France?"], max_new_tokens=24, temperature=0.0)
    assert "Paris" in found
    assert "<|" not in found
