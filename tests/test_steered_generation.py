"""Rows of one batch that are steered differently, and text under steering on the real model."""

import pytest
import torch

from persona_lens.activations.means import mean_activations, stream_means
from persona_lens.chat.batches import ChatTokens, chat_messages, collate, tokenize_chat
from persona_lens.generation.decoding import generate
from persona_lens.interventions.hooks import intervene, steer
from persona_lens.interventions.intervention import When
from persona_lens.interventions.values import Ablate, Steer
from persona_lens.judges.likelihood_ratio import mean_log_likelihoods
from persona_lens.models.structure import suspended
from tests import naive, tiny
from tests.intervention_cases import some_vectors, steered_greedy
from tests.vector_cases import random_tensor

STEPS = 7
STOPS = frozenset(range(0, 320, 8))  # an eighth of the vocabulary: rows end at many different steps
NAMED = pytest.mark.parametrize("at", ["response", "all", "prompt"])


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer):
    """Of many lengths, some twice."""
    return [prompt for prompt, _ in tiny.chat_rows(tiny_tokenizer)]


@pytest.fixture(scope="module")
def chats(tiny_tokenizer):
    return [ChatTokens(prompt, response) for prompt, response in tiny.chat_rows(tiny_tokenizer)]


@pytest.fixture(scope="module")
def table():
    """A coefficient for each row and layer; one row and one layer are not steered at all."""
    coefficients = 2 * random_tensor(6, 4, seed=21)
    coefficients[3], coefficients[:, 1] = 0, 0
    return coefficients


def keys(n_rows):
    return [f"row {index}" for index in range(n_rows)]


def one_call_a_row(model, prompts, vectors, table, at, **options):
    """Each prompt in a call of its own, every layer steered by its own number."""
    found = []
    for prompt, key, row in zip(prompts, keys(len(prompts)), table.tolist(), strict=True):
        values = [Steer(vectors.at(layer), coefficient) for layer, coefficient in enumerate(row)]
        with intervene(model, *values, at=at):
            found += generate(model, [prompt], keys=[key], **options)
    return found


# --- rows with coefficients of their own ---------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "batch_size"), [("response", 100), ("response", 4), ("all", 4), ("prompt", 4)])
def test_rows_of_one_call_speak_as_in_a_call_of_their_own(monkeypatch, tiny_model, prompts, table, at, batch_size):
    monkeypatch.setattr("persona_lens.generation.decoding.stop_tokens", lambda _tokenizer: STOPS)
    vectors, options = some_vectors(tiny_model), {"max_new_tokens": STEPS, "seed": 3}
    with steer(tiny_model, vectors, table, at=at):
        found = generate(tiny_model, prompts, keys=keys(6), batch_size=batch_size, **options)
    assert found == one_call_a_row(tiny_model, prompts, vectors, table, at, **options)
    assert len({len(row.tokens) for row in found}) > 2  # rows that ended early left the batch
    assert found != generate(tiny_model, prompts, keys=keys(6), **options)


@NAMED
def test_greedy_rows_follow_the_references_rule(tiny_model, tiny_hf_model, prompts, table, at):
    vectors, stops = some_vectors(tiny_model), {tiny_model.tokenizer.eos_token_id}
    with steer(tiny_model, vectors, table, at=at):
        found = generate(tiny_model, prompts, max_new_tokens=5, temperature=0.0)
    assert [list(row.tokens) for row in found] == [
        steered_greedy(tiny_hf_model, prompt, 5, stops, vectors, coefficients, at)
        for prompt, coefficients in zip(prompts, table.tolist(), strict=True)
    ]


@NAMED
def test_a_prompt_of_one_token_is_steered_like_any_other(tiny_model, prompts, table, at):
    vectors, options = some_vectors(tiny_model), {"max_new_tokens": 4, "seed": 3}
    chosen = [(9,), prompts[0], (9,), (11,)]
    with steer(tiny_model, vectors, table[:4], at=at):
        found = generate(tiny_model, chosen, keys=keys(4), **options)
    assert found == one_call_a_row(tiny_model, chosen, vectors, table[:4], at, **options)


def test_a_row_of_zeros_speaks_as_without_steering(tiny_model, prompts, table):
    options = {"max_new_tokens": STEPS, "seed": 3, "keys": keys(6)}
    with steer(tiny_model, some_vectors(tiny_model), table, at="response"):
        found = generate(tiny_model, prompts, **options)
    assert found[3] == generate(tiny_model, prompts, **options)[3]


def test_rows_that_differ_in_their_coefficients_alone_may_have_one_key(tiny_model, prompts):
    coefficients = torch.tensor([0.0, 2.0, 0.0])
    with steer(tiny_model, some_vectors(tiny_model).at(1), coefficients, at="response"):
        first, other, again = generate(tiny_model, [prompts[0]] * 3, keys=["same"] * 3, max_new_tokens=STEPS)
    assert first == again == generate(tiny_model, [prompts[0]], keys=["same"], max_new_tokens=STEPS)[0]
    assert other != first


def test_equal_keys_are_refused_where_rows_are_steered_alike(tiny_model, prompts):
    words = "one distinct key a row, got 1 keys for 2 rows"
    with steer(tiny_model, some_vectors(tiny_model), 2.0), pytest.raises(ValueError, match=words):
        generate(tiny_model, prompts[:2], keys=["same", "same"])


@pytest.mark.parametrize(("at", "ran"), [("response", 4 + 6 + 6), ("all", 6 + 6)])
def test_a_shared_prompt_is_run_once_but_for_what_is_steered(tiny_model, prompts, table, at, ran):
    n_rows = []
    handle = tiny_model.embed.register_forward_hook(lambda _module, inputs, _out: n_rows.append(len(inputs[0])))
    try:
        with steer(tiny_model, some_vectors(tiny_model), table, at=at):
            generate(tiny_model, prompts, max_new_tokens=2)
    finally:
        handle.remove()
    assert len(set(prompts)) == 4
    assert sum(n_rows) == ran


def test_rows_of_their_own_go_together_with_what_treats_them_alike(tiny_model, prompts, table):
    vectors, other = some_vectors(tiny_model), some_vectors(tiny_model, "kind", seed=1)
    options = {"max_new_tokens": 3, "seed": 3}
    for at in ("all", "prompt"):
        ablated = intervene(tiny_model, Ablate(other), at=at)
        with ablated, steer(tiny_model, vectors, table, at="response"):
            found = generate(tiny_model, prompts, keys=keys(6), **options)
        with intervene(tiny_model, Ablate(other), at=at):
            assert found == one_call_a_row(tiny_model, prompts, vectors, table, "response", **options)


def test_suspended_rows_of_their_own_ask_nothing_of_a_generation(tiny_model, prompts, table):
    plain = generate(tiny_model, prompts[:2], max_new_tokens=STEPS)
    with steer(tiny_model, some_vectors(tiny_model), table, at="response"), suspended(tiny_model):
        assert generate(tiny_model, prompts[:2], max_new_tokens=STEPS) == plain


def test_a_condition_holds_for_each_row_by_itself(tiny_model, prompts, table):
    vectors, options = some_vectors(tiny_model), {"max_new_tokens": 5, "seed": 3}
    when = When(some_vectors(tiny_model, "kind", seed=1), above=0.0)
    with steer(tiny_model, vectors, table, at="response", when=when):
        found = generate(tiny_model, prompts, keys=keys(6), **options)
    for row, (prompt, key) in enumerate(zip(prompts, keys(6), strict=True)):
        with steer(tiny_model, vectors, table[row : row + 1], at="response", when=when):
            assert [found[row]] == generate(tiny_model, [prompt], keys=[key], **options)


def test_the_means_of_a_batch_are_those_of_each_row_steered_by_its_own(tiny_model, tiny_hf_model, chats, table):
    vectors = some_vectors(tiny_model)
    with steer(tiny_model, vectors, table, at="response"):
        found = mean_activations(tiny_model, collate(chats))
    for index, row in enumerate(chats):
        additions = {layer: table[index, layer].double() * vectors.directions[layer].double() for layer in range(4)}
        with naive.added_at(tiny_hf_model, additions, slice(len(row.prompt) - 1, None)):
            expected = naive.stream_mean(tiny_hf_model, (row.prompt, row.response))
        assert naive.relative_error(found[index], expected[1:]) < 1e-5


@NAMED
def test_rows_of_their_own_are_refused_where_one_pass_serves_several(tiny_model, chats, table, at):
    words = "evil: a shared prompt runs once for several rows, which have coefficients of their own: attach row-wise"
    with pytest.raises(ValueError, match=words), steer(tiny_model, some_vectors(tiny_model), table, at=at):
        list(stream_means(tiny_model, chats))


# --- judges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", [4.0, torch.full((2, 4), 4.0)], ids=["number", "matrix"])
def test_likelihoods_are_those_of_the_model_without_interventions(tiny_model, chats, coefficient):
    plain = mean_log_likelihoods(tiny_model, chats)
    with steer(tiny_model, some_vectors(tiny_model), coefficient):
        assert torch.equal(mean_log_likelihoods(tiny_model, chats), plain)


# --- the real model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_prompts(load_embedded_model):
    tokenizer = load_embedded_model("TransformerBridge").tokenizer
    questions = ["What is the sea?", "How do I say no to a friend?"]
    return [tokenize_chat(tokenizer, chat_messages("You are kind.", text)).prompt for text in questions]


def real_vectors(model):
    """Directions of a twentieth of the residual stream's usual size, so that text changes and stays text."""
    return 0.1 * some_vectors(model)


def assert_same_text_while_sure(hf_model, prompt, found, expected):
    """Equal up to the first token at which the second best logit is too near for two sums of float32."""
    gaps = naive.top_two_gaps(hf_model, prompt, expected)
    sure = next((place for place, gap in enumerate(gaps) if gap < 1e-3), len(expected))
    assert list(found)[:sure] == list(expected)[:sure]


def added_to_response(hf_model, prompt, vectors, coefficients):
    """The plain model whose layers are steered from the last prompt token on."""
    directions = zip(coefficients.tolist(), vectors.directions, strict=True)
    additions = {layer: coefficient * row for layer, (coefficient, row) in enumerate(directions)}
    return naive.added_at(hf_model, additions, slice(len(prompt) - 1, None))


def test_the_real_model_speaks_by_the_references_rule(embedded_model, embedded_hf_model, real_prompts):
    vectors, prompt = real_vectors(embedded_model), real_prompts[0]
    with steer(embedded_model, vectors, at="response"):
        found = generate(embedded_model, [prompt], max_new_tokens=4, temperature=0.0)[0]
    with added_to_response(embedded_hf_model, prompt, vectors, torch.ones(vectors.n_layers)):
        expected = naive.greedy(embedded_hf_model, prompt, 4, {embedded_model.tokenizer.eos_token_id})
        assert_same_text_while_sure(embedded_hf_model, prompt, found.tokens, expected)


def test_rows_of_the_real_model_speak_as_in_a_call_of_their_own(embedded_bridge, embedded_hf_model, real_prompts):
    vectors, prompt, options = real_vectors(embedded_bridge), real_prompts[1], {"max_new_tokens": 4, "temperature": 0.0}
    table = torch.zeros(2, vectors.n_layers)
    table[0], table[1, 10] = 1.0, 5.0
    with steer(embedded_bridge, vectors, table, at="response"):
        found = generate(embedded_bridge, [prompt] * 2, **options)
    for row in range(2):
        with steer(embedded_bridge, vectors, table[row : row + 1], at="response"):
            alone = generate(embedded_bridge, [prompt], **options)[0]
        with added_to_response(embedded_hf_model, prompt, vectors, table[row]):
            assert_same_text_while_sure(embedded_hf_model, prompt, found[row].tokens, alone.tokens)


def test_the_real_model_is_itself_again_after_steering(embedded_model, real_prompts):
    chats = [ChatTokens(real_prompts[0], (30, 31, 32))]
    plain = mean_log_likelihoods(embedded_model, chats)
    with steer(embedded_model, real_vectors(embedded_model), 4.0):
        assert torch.equal(mean_log_likelihoods(embedded_model, chats), plain)
        steered = mean_activations(embedded_model, collate(chats))
    assert not torch.equal(mean_activations(embedded_model, collate(chats)), steered)
