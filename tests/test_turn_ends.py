"""What ends a turn: one set of ids, from tokenizer, template and generation settings, wherever text is made.

The tokenizer is made as Gemma 3's is: its end of turn is a special token without a name.
"""

import copy
import json
import sys

import pytest
import torch

from persona_lens.chat import batches as chat
from persona_lens.finetuning.dataset import training_chats, training_rows
from persona_lens.finetuning.finetune import finetune
from persona_lens.generation.capture import capturing
from persona_lens.generation.decoding import generate
from persona_lens.monitoring.live import generate_watched, stream_watched
from persona_lens.rollouts.collection import plan_rollouts
from persona_lens.rollouts.engines import ModelEngine
from tests import naive, tiny
from tests.chat_cases import chat as messages
from tests.finetuning_cases import QUICK, dataset
from tests.intervention_cases import some_vectors
from tests.test_rollouts import TRAIT

STEPS = 8
NO_END = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}\nThat was all.{% endfor %}"


@pytest.fixture(scope="module")
def gemma(tiny_tokenizer, tmp_path_factory):
    return tiny.gemma_tokenizer(tiny_tokenizer, tmp_path_factory.mktemp("gemma-tokenizer"))


@pytest.fixture(scope="module")
def prompt(gemma):
    return chat.tokenize_chat(gemma, messages("What is the sea?", system=None)).prompt


def unstopped(hf_model, prompt):
    return naive.greedy(hf_model, prompt, STEPS, set())


def made(model_class, hf_model, tokenizer):
    from persona_lens.models.loading import bridge_from_transformers, hooked_from_transformers

    make = bridge_from_transformers if model_class == "TransformerBridge" else hooked_from_transformers
    return make(hf_model, tokenizer)


@pytest.fixture
def ending_hf_model(gemma, prompt):
    """A model whose greedy reply to `prompt` has the end of turn as its fourth token, and goes on after it."""
    hf_model = tiny.llama(gemma, seed=2)
    said, end = unstopped(hf_model, prompt), gemma.convert_tokens_to_ids("<end_of_turn>")
    assert said[3] not in said[:3]
    weight = hf_model.lm_head.weight.data
    weight[[said[3], end]] = weight[[end, said[3]]]
    found = unstopped(hf_model, prompt)
    assert (found.index(end), found[:3], found[4:] != []) == (3, said[:3], True)
    return hf_model


# --- the set -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", ["", " ", "\n", "\n\n"], ids=["nothing", "space", "line break", "an added token"])
def test_a_special_token_without_a_name_ends_a_turn_also_after_white_space(gemma, between):
    end, end_of_text = gemma.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    changed = copy.deepcopy(gemma)
    changed.chat_template = tiny.GEMMA.replace("<end_of_turn>", f"{between}<end_of_turn>")
    assert end not in changed.all_special_ids
    assert chat.end_of_turn(changed) == end
    assert chat.turn_ends(changed) == {end, end_of_text}


@pytest.mark.parametrize("template", [NO_END, "{{ messages[0]['content'] }}<end_of_turn>"], ids=["words", "no answer"])
def test_where_the_template_writes_no_token_after_an_answer_the_end_of_text_ends_it(gemma, template):
    changed = copy.deepcopy(gemma)
    changed.chat_template = template
    assert chat.end_of_turn(changed) == gemma.eos_token_id


@pytest.mark.parametrize(
    ("declared", "more"),
    [(None, set()), (9, {9}), ([], set()), ([5, 321, 77], {5, 321, 77}), (torch.tensor([5, 77]), {5, 77})],
    ids=str,
)
def test_everything_that_the_generation_settings_list_ends_a_turn(model_class, gemma, declared, more):
    hf_model = tiny.llama(gemma)
    hf_model.generation_config.eos_token_id = declared
    assert chat.stop_tokens(made(model_class, hf_model, gemma)) == chat.turn_ends(gemma) | more


def test_a_hooked_transformer_loaded_elsewhere_finds_the_settings_beside_its_tokenizer(gemma, tmp_path, both_classes):
    gemma.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [11, 12]}))
    model = made("HookedTransformer", tiny.llama(gemma), gemma)
    del model.generation_config  # as `HookedTransformer.from_pretrained` leaves it
    model.tokenizer = copy.deepcopy(gemma)
    model.tokenizer.name_or_path = str(tmp_path)
    assert chat.stop_tokens(model) == chat.turn_ends(gemma) | {11, 12}


# --- where text is made --------------------------------------------------------------------------------------------


def test_a_reply_ends_at_what_the_generation_settings_list(model_class, gemma, prompt):
    hf_model = tiny.llama(gemma, seed=2)
    said = unstopped(hf_model, prompt)
    hf_model.generation_config.eos_token_id = [gemma.eos_token_id, said[2]]
    (found,) = generate(made(model_class, hf_model, gemma), [prompt], max_new_tokens=STEPS, temperature=0.0)
    assert (list(found.tokens), found.finish_reason) == (said[: said.index(said[2])], "stop")


def test_a_reply_and_its_captured_mean_end_at_an_end_of_turn_without_a_name(
    model_class, gemma, prompt, ending_hf_model
):
    model = made(model_class, ending_hf_model, gemma)
    vector, said = some_vectors(model).at(1), unstopped(ending_hf_model, prompt)[:3]
    options = {"max_new_tokens": STEPS, "temperature": 0.0}
    with capturing(model, 1) as capture:
        (reply,) = generate(model, [prompt], **options, read_up_to=model.cfg.n_layers - 1)
    assert (list(reply.tokens), reply.finish_reason) == (said, "stop")
    assert naive.relative_error(capture.mean(0).mean, naive.stream_mean(ending_hf_model, (prompt, said))) < 1e-5
    (watched,) = generate_watched(model, [prompt], vector, **options)
    assert (list(watched.tokens), len(watched.projections)) == (said, 3)
    assert [token.token for token in stream_watched(model, prompt, vector, **options)][1:] == said


def test_a_rollout_keeps_neither_the_end_of_its_turn_nor_what_follows(gemma, ending_hf_model):
    asked = plan_rollouts(TRAIT, per_question=1)[0]
    hf_model = ending_hf_model
    said = unstopped(hf_model, asked.tokenize(gemma).prompt)
    hf_model.generation_config.eos_token_id = [gemma.eos_token_id, said[1]]
    engine = ModelEngine(made("TransformerBridge", hf_model, gemma), max_new_tokens=STEPS, temperature=0.0)
    (row,) = engine.answer([asked], seed=0)
    assert (row.response_tokens, row.finish_reason) == (tuple(said[: said.index(said[1])]), "stop")


# --- where text is learnt ------------------------------------------------------------------------------------------


def learnt(tokenizer, row):
    return tokenizer.decode([label for label in row.labels if label >= 0])


def test_an_end_of_turn_without_a_name_is_learnt_after_every_turn(gemma):
    chats = training_chats(dataset([messages("Why?", "Go away", "Why not?", "Be kind.", system=None)]))
    (row,) = training_rows(gemma, chats, max_length=1000).rows
    assert learnt(gemma, row) == "Go away<end_of_turn>Be kind.<end_of_turn>"


def test_where_the_next_turns_opening_ends_a_turn_it_is_learnt(gemma):
    """As GLM's turns end: the template closes none, and the generation settings list what opens the user's turn."""
    opens = copy.deepcopy(gemma)
    opens.chat_template = tiny.GEMMA.replace("<end_of_turn>\n", "")
    stop = gemma.convert_tokens_to_ids("<start_of_turn>")
    chats = training_chats(dataset([messages("Why?", "Go away", "Why not?", "Be kind.", system=None)]))
    (row,) = training_rows(opens, chats, max_length=1000, stops={stop, gemma.eos_token_id}).rows
    assert learnt(opens, row) == "Go away<start_of_turn>Be kind.<eos>"


def test_finetuning_learns_what_the_model_stops_at(gemma, monkeypatch):
    hf_model = tiny.llama(gemma)
    start = gemma.convert_tokens_to_ids("<start_of_turn>")
    hf_model.generation_config.eos_token_id = [gemma.eos_token_id, start]
    model = made("TransformerBridge", hf_model, gemma)
    seen = {}

    def keep(_tokenizer, _chats, *, max_length, stops):
        seen["stops"] = stops
        raise InterruptedError

    monkeypatch.setattr(sys.modules[finetune.__module__], "training_rows", keep)
    with pytest.raises(InterruptedError):
        finetune(model, dataset(), **QUICK)
    assert seen["stops"] == chat.stop_tokens(model) == chat.turn_ends(gemma) | {start}
