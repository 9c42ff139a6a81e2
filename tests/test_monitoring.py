"""Monitoring against the obvious way: every turn by itself, one row, on the plain Hugging Face model."""

import json
import math

import pytest
import torch

from persona_lens.interventions.hooks import ablate, intervene, steer
from persona_lens.interventions.values import Steer
from persona_lens.monitoring.projection import monitor
from persona_lens.monitoring.result import Monitoring
from persona_lens.monitoring.transcripts import Transcript, read_transcripts
from tests import naive, tiny
from tests.chat_cases import (
    CHATS,
    FORGETS_THOUGHTS,
    TRIMS,
    chat,
    counted,
    encode,
    rendered,
    several,
    slow_turn,
    with_template,
)
from tests.intervention_cases import some_vectors

CLOSE = 5e-5  # projections are float32
QUIET = {"progress": False}


@pytest.fixture(params=["llama", "gpt2"])
def pair(request, tiny_model, tiny_gpt2, tiny_hf_model, tiny_hf_gpt2):
    """A tiny model and the plain Hugging Face model of equal weights, for each architecture."""
    return (tiny_model, tiny_hf_model) if request.param == "llama" else (tiny_gpt2, tiny_hf_gpt2)


def speaks(messages):
    return Transcript(messages).turns


def assert_as_slow(found, hf_model, tokenizer, chats, vectors):
    for got, messages in zip(found.chats, chats, strict=True):
        assert [turn.message for turn in got.turns] == speaks(messages)
        for turn in got.turns:
            for place, vector in enumerate(vectors):
                prompt, response = slow_turn(hf_model, tokenizer, messages, turn.message, vector)
                assert turn.prompt[place] == pytest.approx(prompt, abs=CLOSE)
                said = None if turn.response is None else turn.response[place]
                assert said == (response if response is None else pytest.approx(response, abs=CLOSE))


@pytest.mark.parametrize("token_budget", [1, 300, 4096])
def test_chats_of_ragged_length_are_projected_as_each_turn_by_itself(pair, tiny_tokenizer, token_budget):
    model, hf_model = pair
    chats = CHATS[:4] if model.cfg.n_ctx < 200 else CHATS
    found = monitor(model, chats, several(model), token_budget=token_budget, **QUIET)
    assert_as_slow(found, hf_model, tiny_tokenizer, chats, several(model))


@pytest.mark.parametrize("template", [FORGETS_THOUGHTS, TRIMS])
def test_a_template_that_rewrites_earlier_turns_changes_no_turn(
    tiny_model, tiny_hf_model, tiny_tokenizer, monkeypatch, template
):
    tokenizer = with_template(tiny_tokenizer, template)
    # A bridge that is assigned a tokenizer loads it again from its folder, and so has the old template.
    monkeypatch.setattr(tiny_model, "_tokenizer" if "_tokenizer" in vars(tiny_model) else "tokenizer", tokenizer)
    chats = [chat("Why?", " <think>One.</think>Two. ", "How?", "<think>Three.</think>Four.", "Who?"), CHATS[0]]
    found = monitor(tiny_model, chats, several(tiny_model), **QUIET)
    assert_as_slow(found, tiny_hf_model, tokenizer, chats, several(tiny_model))


def test_a_prompts_projection_is_that_of_the_chat_cut_before_the_model_speaks(tiny_model):
    vector = some_vectors(tiny_model).at(1)
    whole = monitor(tiny_model, [CHATS[0]], vector, **QUIET).chats[0].turns[1]
    cut = monitor(tiny_model, [CHATS[0][: whole.message]], vector, **QUIET).chats[0].turns[-1]
    assert cut.prompt == pytest.approx(whole.prompt, abs=CLOSE)
    assert (cut.message, cut.response, cut.n_tokens) == (whole.message, None, 0)
    assert whole.response is not None


def test_only_what_follows_after_is_averaged_and_unclosed_responses_are_counted(
    tiny_model, tiny_hf_model, tiny_tokenizer
):
    vector, marker = some_vectors(tiny_model).at(1), "</think>"
    messages = chat("Why?", f"<think>One.{marker} Two three.", "How?", "<think>Three", "Who?", f"Four.{marker}")
    found = monitor(tiny_model, [messages], vector, after=marker, **QUIET)
    first, second, third = found.chats[0].turns
    skip = len(encode(tiny_tokenizer, f"<think>One.{marker}"))
    _, response = slow_turn(tiny_hf_model, tiny_tokenizer, messages, 2, vector, skip)
    assert first.response == pytest.approx((response,), abs=CLOSE)
    assert first.n_tokens == len(encode(tiny_tokenizer, messages[2]["content"])) - skip
    assert [(turn.response, turn.n_tokens, turn.unclosed) for turn in (second, third)] == [
        (None, 0, True),
        (None, 0, False),
    ]
    assert found.unclosed == 1
    assert "1 of which never say '</think>'" in str(found)


def test_every_token_is_kept_with_its_text(tiny_model, tiny_hf_model, tiny_tokenizer):
    vector = some_vectors(tiny_model).at(2)
    found = monitor(tiny_model, CHATS, vector, tokens=True, **QUIET)
    for messages, got in zip(CHATS, found.chats, strict=True):
        said = tiny_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert said.startswith("".join("".join(turn.tokens.pieces) for turn in got.turns))
        values = torch.cat([turn.tokens.values[:, 0] for turn in got.turns])
        stream = naive.residual_stream(tiny_hf_model, encode(tiny_tokenizer, said))[3, : len(values)]
        expected = stream @ (vector.direction.double() / vector.direction.double().norm())
        torch.testing.assert_close(values.double(), expected, rtol=0, atol=CLOSE)
        for turn in got.turns:
            assert float(turn.tokens.values[turn.tokens.n_prompt - 1]) == pytest.approx(turn.prompt[0], rel=1e-6)
            assert len(turn.tokens.pieces) - turn.tokens.n_prompt == turn.n_tokens
    assert monitor(tiny_model, CHATS[:1], vector, **QUIET).chats[0].turns[0].tokens is None


def test_a_window_measures_each_turn_on_the_messages_that_it_kept(tiny_model, tiny_hf_model, tiny_tokenizer):
    vector = some_vectors(tiny_model).at(1)
    messages = chat(*(f"{word} one two three?" for word in "abcdefghij"))
    found = monitor(tiny_model, [messages], vector, window=120, **QUIET)
    turns = found.chats[0].turns
    assert turns[0].dropped_messages == 0 < turns[-1].dropped_messages
    for turn in turns:
        kept = [messages[0], *messages[1 + turn.dropped_messages :]]
        prompt, response = slow_turn(tiny_hf_model, tiny_tokenizer, kept, turn.message - turn.dropped_messages, vector)
        assert turn.prompt == pytest.approx((prompt,), abs=CLOSE)
        assert turn.response == pytest.approx((response,), abs=CLOSE)
    assert found.table()["dropped_messages"].tolist() == [turn.dropped_messages for turn in turns]


def test_blocks_above_the_highest_vector_and_the_unembedding_do_not_run(tiny_model):
    ran = counted(tiny_model, lambda: monitor(tiny_model, CHATS[:1], several(tiny_model)[1:2], **QUIET))
    assert ran == {"layer -1": 1, "layer 0": 1, "layer 1": 0, "layer 2": 0, "layer 3": 0, "unembed": 0}


@pytest.mark.parametrize(("chats", "passes"), [(CHATS[:1] * 3, 1), (CHATS, 2)], ids=["one length", "long and short"])
def test_all_vectors_and_turns_of_many_chats_share_their_passes(tiny_model, chats, passes):
    ran = counted(tiny_model, lambda: monitor(tiny_model, chats, several(tiny_model), **QUIET))
    assert (ran["layer 2"], ran["layer 3"]) == (passes, 0)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_intervention_at_or_below_the_vectors_is_seen(tiny_model, tiny_hf_model, tiny_tokenizer, layer):
    vectors = some_vectors(tiny_model)
    with steer(tiny_model, vectors.at(layer), 2.0):
        found = monitor(tiny_model, CHATS, vectors.at(1), **QUIET)
    with naive.added(tiny_hf_model, layer, 2.0 * vectors.directions[layer].double()):
        assert_as_slow(found, tiny_hf_model, tiny_tokenizer, CHATS, [vectors.at(1)])
    assert "steer evil" in found.interventions[0]


@pytest.mark.parametrize("at", ["response", "prompt"])
def test_steering_a_part_treats_each_turn_as_if_the_model_said_it(tiny_model, tiny_hf_model, tiny_tokenizer, at):
    vectors, messages = some_vectors(tiny_model), CHATS[4]
    with steer(tiny_model, vectors.at(0), 2.0, at=at):
        found = monitor(tiny_model, [messages], vectors.at(1), **QUIET)
    for turn in found.chats[0].turns:
        boundary = len(rendered(tiny_tokenizer, messages[: turn.message]))
        places = slice(boundary - 1, None) if at == "response" else slice(boundary)
        with naive.added_at(tiny_hf_model, {0: 2.0 * vectors.directions[0].double()}, places):
            prompt, response = slow_turn(tiny_hf_model, tiny_tokenizer, messages, turn.message, vectors.at(1))
        assert turn.prompt == pytest.approx((prompt,), abs=CLOSE)
        assert turn.response == pytest.approx((response,), abs=CLOSE)


def test_rows_of_a_coefficient_matrix_are_chats(tiny_model):
    vectors, amounts = some_vectors(tiny_model), torch.arange(5.0)
    with intervene(tiny_model, Steer(vectors.at(0), amounts)):
        together = monitor(tiny_model, CHATS, vectors.at(1), token_budget=200, **QUIET)
        with pytest.raises(ValueError, match="coefficients for 5 rows, and there are 2 chats"):
            monitor(tiny_model, CHATS[:2], vectors.at(1), **QUIET)
    for chat_index, amount in enumerate(amounts.tolist()):
        with steer(tiny_model, vectors.at(0), amount):
            (alone,) = monitor(tiny_model, [CHATS[chat_index]], vectors.at(1), **QUIET).chats
        for one, other in zip(together.chats[chat_index].turns, alone.turns, strict=True):
            assert one.prompt == pytest.approx(other.prompt, abs=CLOSE)


def test_a_suspended_intervention_is_not_seen_and_no_hook_stays(tiny_model):
    from persona_lens import suspended

    vectors, before = some_vectors(tiny_model), tiny.hook_counts(tiny_model)
    plain = monitor(tiny_model, CHATS, vectors.at(1), **QUIET)
    assert tiny.hook_counts(tiny_model) == before
    with ablate(tiny_model, vectors.at(1)):
        seen = monitor(tiny_model, CHATS, vectors.at(1), **QUIET)
        with suspended(tiny_model):
            assert monitor(tiny_model, CHATS, vectors.at(1), **QUIET) == plain
    assert all(abs(turn.prompt[0]) < CLOSE for each in seen.chats for turn in each.turns)


def test_activations_that_are_not_finite_are_an_error(fresh_tiny_model):
    vectors = some_vectors(fresh_tiny_model)
    with torch.no_grad():
        next(iter(fresh_tiny_model.blocks[1].parameters())).fill_(math.nan)
    with pytest.raises(ValueError, match="not finite at layer 1, in row 0"):
        monitor(fresh_tiny_model, CHATS, [vectors.at(0), vectors.at(1)], **QUIET)


def test_the_reference_transcripts_are_monitored_turn_by_turn(embedded_bridge, reference_data):
    chats = [
        Transcript(read.messages[:4], read.name)
        for name in ("coding", "therapy")
        for read in read_transcripts(reference_data / "transcripts" / f"{name}.json")
    ]
    table = monitor(embedded_bridge, chats, some_vectors(embedded_bridge).at(2), **QUIET).table()
    assert table["turn"].tolist() == [1, 2] * 2
    assert table.notna().all().all()


@pytest.mark.slow
def test_a_long_reference_transcript_asks_for_a_window_and_runs_with_one(embedded_bridge, reference_data):
    path, vector = reference_data / "transcripts" / "therapy.json", some_vectors(embedded_bridge).at(2)
    with pytest.raises(ValueError, match=r"tokens and the model's context holds \d+: pass window="):
        monitor(embedded_bridge, path, vector, **QUIET)
    table = monitor(embedded_bridge, path, vector, window=2048, **QUIET).table()
    assert len(table) == 15
    assert table["dropped_messages"].iloc[0] == 0 < table["dropped_messages"].iloc[-1]


def test_a_row_that_is_no_chat_is_left_out_counted_and_kept_with_the_result(tiny_model, tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": CHATS[0]}, {"messages": [*CHATS[1], {"role": "user", "content": ""}]}, {"messages": CHATS[2]}]
    rows += [{"messages": chat("hi \ud83d", system=None)}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n", encoding="utf-8")
    for suffix in (".jsonl", ".parquet"):
        output = tmp_path / f"found{suffix}"
        found = monitor(tiny_model, path, several(tiny_model), output_file=output, **QUIET)
        assert [each.name for each in found.chats] == ["chats:1", "chats:3"]
        assert [(each.row, each.reason[:11]) for each in found.rejected] == [(2, "messages[2]"), (4, "messages[0]")]
        assert "(2 rows could not be read)" in str(found)
        assert Monitoring.load(output) == found
    whole = monitor(tiny_model, [CHATS[0], CHATS[2]], several(tiny_model), **QUIET)
    assert [each.turns for each in found.chats] == [each.turns for each in whole.chats]
