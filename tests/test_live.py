"""Projections read while a reply is generated: those of the finished text, in any batch, and the texts unchanged."""

import pytest
import torch

from persona_lens.chat.batches import RenderedPrompt, chat_messages, render_prompt, tokenize_chat
from persona_lens.generation import decoding as generation
from persona_lens.generation.decoding import generate
from persona_lens.interventions.hooks import intervene, steer
from persona_lens.interventions.values import Ablate, Steer
from persona_lens.monitoring.live import generate_watched, stream_watched
from persona_lens.monitoring.watch import Safeguard
from tests import naive, tiny
from tests.intervention_cases import hooks, some_vectors
from tests.monitoring_cases import read
from tests.vector_cases import random_tensor

STEPS = 7
STOPS = frozenset(range(0, 320, 5))  # a fifth of the vocabulary: rows end at many different steps
KEYS = [f"row {index}" for index in range(6)]
OPTIONS = {"max_new_tokens": STEPS, "seed": 3}


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer):
    """Of many lengths, some twice."""
    return [prompt for prompt, _ in tiny.chat_rows(tiny_tokenizer)]


@pytest.fixture
def eager_to_stop(monkeypatch):
    monkeypatch.setattr(generation, "stop_tokens", lambda _tokenizer: STOPS)


def watched(model):
    """Of several layers, in no order, two of them at one."""
    return [*(some_vectors(model).at(layer) for layer in (2, 0, 1)), some_vectors(model, "kind", seed=1).at(2)]


def taught(hf_model, prompt, tokens, vectors):
    """`[1 + token, vector]`: the last prompt token's and the reply's projections, from one pass over the whole text."""
    stream = naive.residual_stream(hf_model, [*prompt, *tokens])[:, len(prompt) - 1 :]
    units = [vector.direction.double() / vector.direction.double().norm() for vector in vectors]
    return torch.stack([stream[vector.layer + 1] @ unit for vector, unit in zip(vectors, units, strict=True)], dim=-1)


def assert_taught(replies, hf_model, prompts, vectors, model=None):
    # Hugging Face's Llama turns positions in float32 and HookedTransformer in float64: GPT-2 has none to turn.
    exact = 5e-5 if type(model).__name__ == "HookedTransformer" else 1e-10
    for reply, prompt in zip(replies, prompts, strict=True):
        expected = taught(hf_model, prompt, reply.tokens, vectors)
        torch.testing.assert_close(read(reply), expected, rtol=0, atol=exact)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_texts_are_those_of_generate_and_projections_those_of_the_finished_texts(
    tiny_model, tiny_hf_model, prompts, eager_to_stop, batch_size
):
    vectors = watched(tiny_model)
    replies = generate_watched(tiny_model, prompts, vectors, keys=KEYS, batch_size=batch_size, **OPTIONS)
    completions = generate(tiny_model, prompts, keys=KEYS, batch_size=batch_size, **OPTIONS)
    assert [(reply.tokens, reply.finish_reason) for reply in replies] == completions
    assert len({len(reply.tokens) for reply in replies}) > 2  # rows that ended early left the batch
    assert {reply.finish_reason for reply in replies} == {"stop", "length"}
    assert [reply.key for reply in replies] == KEYS
    assert_taught(replies, tiny_hf_model, prompts, vectors, tiny_model)


def test_projections_with_learned_positions_are_those_of_the_finished_texts(tiny_gpt2, tiny_hf_gpt2, prompts):
    short = [prompt[:length] for prompt, length in zip(prompts, [3, 20, 9, 31, 1, 12], strict=True)]
    vectors = watched(tiny_gpt2)
    replies = generate_watched(tiny_gpt2, short, vectors, **OPTIONS)
    assert_taught(replies, tiny_hf_gpt2, short, vectors)


@pytest.mark.parametrize("top", [0, 3])
def test_the_last_token_is_read_whether_the_highest_layer_is_watched_or_not(tiny_model, tiny_hf_model, prompts, top):
    vector = some_vectors(tiny_model).at(top)
    replies = generate_watched(tiny_model, prompts, vector, max_new_tokens=1, temperature=0.0)
    assert_taught(replies, tiny_hf_model, prompts, [vector], tiny_model)


@pytest.mark.parametrize(("steered", "last"), [(0, [0, 1]), (2, [0, 1, 2])])
def test_the_last_token_runs_no_block_above_what_is_watched_or_attached(tiny_model, prompts, steered, last):
    from persona_lens.models.structure import residual_points

    ran = []
    handles = [
        point.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, point in enumerate(residual_points(tiny_model)[1:])
    ]
    try:
        with steer(tiny_model, some_vectors(tiny_model).at(steered)):
            generate_watched(tiny_model, prompts, some_vectors(tiny_model).at(1), max_new_tokens=1)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1, 2, 3, *last]


@pytest.mark.parametrize("at", ["response", "all"])
def test_what_is_steered_row_by_row_is_read_as_it_is_steered(tiny_model, tiny_hf_model, prompts, eager_to_stop, at):
    vectors, directions, table = watched(tiny_model), some_vectors(tiny_model, seed=5), random_tensor(6, 4, seed=21)
    with steer(tiny_model, directions, table, at=at):
        replies = generate_watched(tiny_model, prompts, vectors, keys=KEYS, batch_size=4, **OPTIONS)
        completions = generate(tiny_model, prompts, keys=KEYS, batch_size=4, **OPTIONS)
    assert [(reply.tokens, reply.finish_reason) for reply in replies] == completions
    for row, prompt in enumerate(prompts):
        places = slice(len(prompt) - 1, None) if at == "response" else slice(None)
        additions = {layer: table[row, layer].double() * directions.directions[layer].double() for layer in range(4)}
        with naive.added_at(tiny_hf_model, additions, places):
            assert_taught([replies[row]], tiny_hf_model, [prompt], vectors, tiny_model)


def test_an_ablated_direction_is_read_as_zero_and_an_empty_reply_has_its_prompts_alone(
    tiny_model, prompts, monkeypatch
):
    vectors = some_vectors(tiny_model)
    with intervene(tiny_model, Ablate(vectors)):
        replies = generate_watched(tiny_model, prompts, vectors, **OPTIONS)
    assert max(float(read(reply).abs().max()) for reply in replies) < 1e-10
    assert replies[0].projections.shape == (len(replies[0].tokens), 4)
    monkeypatch.setattr(generation, "stop_tokens", lambda _tokenizer: frozenset(range(320)))
    ended = generate_watched(tiny_model, prompts, vectors, **OPTIONS)
    assert [(reply.tokens, reply.projections.shape, reply.mean_projection) for reply in ended] == [
        ((), (0, 4), None)
    ] * 6


def test_a_reply_that_ended_is_read_no_more_while_it_waits_in_the_batch(tiny_model, prompts, eager_to_stop):
    vector, n_rows = some_vectors(tiny_model).at(1), []
    handle = tiny_model.embed.register_forward_hook(lambda _module, inputs, _out: n_rows.append(len(inputs[0])))
    try:
        guard = Safeguard(vector, 0.0)
        replies = generate_watched(tiny_model, prompts * 2, vector, safeguards=[guard], **OPTIONS)
    finally:
        handle.remove()
    lengths = [len(reply.tokens) for reply in replies]
    assert any(ran > sum(length > step for length in lengths) for step, ran in enumerate(n_rows[1:]))
    assert [len(reply.projections) for reply in replies] == lengths
    assert all(alert.token_index < len(reply.tokens) for reply in replies for alert in reply.alerts)


def test_the_real_models_projections_are_those_of_its_finished_texts(embedded_bridge, embedded_hf_model):
    tokenizer, options = embedded_bridge.tokenizer, {"max_new_tokens": 6, "seed": 1}
    texts = ["What is the sea?", "How do I say no to a friend who asks too much of me?"]
    chats = [tokenize_chat(tokenizer, chat_messages("You are kind.", text)).prompt for text in texts]
    vectors = [some_vectors(embedded_bridge).at(layer) for layer in (25, 3, 14)]
    replies = generate_watched(embedded_bridge, chats, vectors, **options)
    assert [(reply.tokens, reply.finish_reason) for reply in replies] == generate(embedded_bridge, chats, **options)
    for reply, prompt in zip(replies, chats, strict=True):
        stream = naive.residual_stream(embedded_hf_model, [*prompt, *reply.tokens])[:, len(prompt) - 1 :]
        norms = torch.stack([stream[vector.layer + 1].norm(dim=-1).mean() for vector in vectors])
        error = (read(reply) - taught(embedded_hf_model, prompt, reply.tokens, vectors)).abs() / norms
        assert float(error.max()) < 1e-4


def test_tokens_count_from_the_end_of_the_marker_on(tiny_model, prompts):
    tokenizer, vectors = tiny_model.tokenizer, watched(tiny_model)
    plain = generate_watched(tiny_model, prompts, vectors, keys=KEYS, **OPTIONS)
    assert all(bool(reply.counted.all()) for reply in plain)
    marker = tokenizer.decode(plain[4].tokens[3:5])
    assert marker == "!Ho"
    sure = Safeguard(vectors[0], -1e9)
    replies = generate_watched(tiny_model, prompts, vectors, keys=KEYS, after=marker, safeguards=[sure], **OPTIONS)
    for reply in replies:
        closed = [marker in tokenizer.decode(reply.tokens[:end]) for end in range(len(reply.tokens))]
        assert reply.counted.tolist() == closed
        first = closed.index(True) if True in closed else None
        assert [alert.token_index for alert in reply.alerts] == ([] if first is None else [first])
        if first is not None:
            torch.testing.assert_close(reply.mean_projection, reply.projections[first:].mean(dim=0))
    assert any(reply.alerts for reply in replies)
    assert any(not reply.alerts for reply in replies)
    assert all(torch.equal(read(one), read(other)) for one, other in zip(replies, plain, strict=True))


def test_a_block_that_the_prompt_closes_is_not_waited_for(tiny_model, prompts):
    vector = some_vectors(tiny_model).at(1)
    reply = generate_watched(
        tiny_model, prompts[:1], vector, after="assistant", safeguards=[Safeguard(vector, -1e9)], **OPTIONS
    )[0]
    assert bool(reply.counted.all())
    assert reply.alerts[0].token_index == -1
    assert generate_watched(tiny_model, [], vector) == []
    chat = chat_messages("You are kind.", "Why?")
    ids = tokenize_chat(tiny_model.tokenizer, chat).prompt
    text = RenderedPrompt(render_prompt(tiny_model.tokenizer, chat).text, False)
    forms = generate_watched(tiny_model, [chat, ids, text], vector, temperature=0.0, max_new_tokens=3)
    assert len({form.tokens for form in forms}) == 1
    (said, asked) = generate_watched(tiny_model, ["Why?", chat[1:]], vector, temperature=0.0, max_new_tokens=3)
    assert said.tokens == asked.tokens
    with pytest.raises(ValueError, match=r"put it into brackets, \[chat\]"):
        generate_watched(tiny_model, "Why?", vector)


def test_a_stream_is_the_reply_token_by_token(tiny_model, prompts, eager_to_stop):
    vectors = watched(tiny_model)
    for prompt, key in zip(prompts, KEYS, strict=True):
        with intervene(tiny_model, Steer(some_vectors(tiny_model, seed=5), 2.0), at="response"):
            steered = generate_watched(tiny_model, [prompt], vectors, keys=[key], **OPTIONS)[0]
            tokens = list(stream_watched(tiny_model, prompt, vectors, key=key, **OPTIONS))
        assert torch.equal(torch.stack([token.projections for token in tokens]), read(steered))
        reply = generate_watched(tiny_model, [prompt], vectors, keys=[key], **OPTIONS)[0]
        tokens = list(stream_watched(tiny_model, prompt, vectors, key=key, **OPTIONS))
        assert [token.index for token in tokens] == list(range(-1, len(reply.tokens)))
        assert [token.token for token in tokens] == [prompt[-1], *reply.tokens]
        assert "".join(token.text for token in tokens) == reply.text
        assert torch.equal(torch.stack([token.projections for token in tokens]), read(reply))
        assert not torch.equal(read(reply)[:1], read(steered)[:1])


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_character_of_several_tokens_comes_whole(tiny_model, prompts, monkeypatch, cut):
    text = "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve \N{WATER WAVE}, \N{CJK UNIFIED IDEOGRAPH-6D77}!\N{WATER WAVE}"
    ids = tiny_model.tokenizer(text, add_special_tokens=False).input_ids
    script = iter(ids)
    monkeypatch.setattr(generation, "sample", lambda *_, **__: torch.tensor([next(script)]))
    steps = len(ids) - cut
    pieces = [token.text for token in stream_watched(tiny_model, prompts[0], watched(tiny_model), max_new_tokens=steps)]
    assert "".join(pieces) == tiny_model.tokenizer.decode(ids[:steps])
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces[:-1])
    assert ("\N{REPLACEMENT CHARACTER}" in pieces[-1]) == (cut > 0)


def test_an_abandoned_stream_leaves_no_hook(tiny_model, prompts):
    before = hooks(tiny_model)
    stream = stream_watched(tiny_model, prompts[0], watched(tiny_model), **OPTIONS)
    next(stream)
    next(stream)
    assert hooks(tiny_model) == before
    stream.close()
    assert list(stream) == []


def test_two_streams_of_one_model_do_not_read_each_other(tiny_model, prompts):
    vectors = watched(tiny_model)
    alone = [list(stream_watched(tiny_model, prompt, vectors, **OPTIONS)) for prompt in prompts[:2]]
    together = zip(*(stream_watched(tiny_model, prompt, vectors, **OPTIONS) for prompt in prompts[:2]), strict=True)
    for pair, (first, second) in zip(zip(*alone, strict=True), together, strict=True):
        assert torch.equal(first.projections, pair[0].projections)
        assert torch.equal(second.projections, pair[1].projections)


def test_a_stream_inside_a_context_is_steered(tiny_model, prompts):
    vectors, value = watched(tiny_model), Steer(some_vectors(tiny_model, seed=5), 2.0)
    with intervene(tiny_model, value, at="response"):
        reply = generate_watched(tiny_model, prompts[:1], vectors, **OPTIONS)[0]
        tokens = list(stream_watched(tiny_model, prompts[0], vectors, **OPTIONS))
    assert torch.equal(torch.stack([token.projections for token in tokens]), read(reply))
    assert reply.tokens != generate(tiny_model, prompts[:1], **OPTIONS)[0].tokens
