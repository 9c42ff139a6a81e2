"""Which tokens `at` names: against plain Hugging Face layers, however a text is run, padded, cached or generated."""

from functools import partial

import pytest
import torch

from persona_lens.activations.means import mean_activations, stream_means
from persona_lens.chat.batches import ChatBatch, ChatTokens, collate
from persona_lens.generation.decoding import generate
from persona_lens.interventions.hooks import ablate, intervene, steer
from persona_lens.interventions.values import Steer
from persona_lens.models.forward import Past, forward
from persona_lens.models.structure import residual_points
from tests import naive, tiny
from tests.intervention_cases import EXACT, IDS, TOKENS, logits, some_vectors, steered_greedy, stream

STEPS = 6
COEFFICIENTS = [1.5, 1.5, 1.5, 1.5]
LENGTHS = [3, 5]
NAMED = pytest.mark.parametrize("at", ["response", "prompt", "all"])
SIDES = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture(scope="module")
def rows(tiny_tokenizer):
    return [ChatTokens(prompt, response) for prompt, response in tiny.chat_rows(tiny_tokenizer)]


def places(at, prompt_length):
    return {"all": slice(None), "response": slice(prompt_length - 1, None), "prompt": slice(prompt_length)}[at]


def slow_stream(hf_model, row, vectors, at):
    """`[stream, pos, d_model]` of one whole row, steered at the tokens that `at` names."""
    additions = {layer: 1.5 * vector for layer, vector in enumerate(vectors.directions.double())}
    with naive.added_at(hf_model, additions, places(at, len(row.prompt))):
        return naive.residual_stream(hf_model, [*row.prompt, *row.response])


def captured(model, run):
    """`[layer, batch, pos, d_model]` of the one forward pass that `run` makes, read after the interventions."""
    outputs = []
    handles = [
        point.register_forward_hook(lambda _module, _inputs, resid: outputs.append(resid.detach().clone()))
        for point in residual_points(model)[1:]
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(outputs)


# --- one forward pass ----------------------------------------------------------------------------------------------


@NAMED
def test_one_forward_pass_acts_where_the_prompt_lengths_say(tiny_model, tiny_hf_model, at):
    vectors, lengths = some_vectors(tiny_model), None if at == "all" else LENGTHS
    with steer(tiny_model, vectors, 1.5, at=at, prompt_lengths=lengths):
        found = stream(tiny_model)
    for row, (ids, length) in enumerate(zip(IDS, LENGTHS, strict=True)):
        expected = slow_stream(tiny_hf_model, ChatTokens(tuple(ids[:length]), tuple(ids[length:])), vectors, at)
        assert naive.relative_error(found[:, row], expected[1:]) < 1e-5


@SIDES
@pytest.mark.parametrize("at", ["response", "prompt"])
def test_padding_does_not_shift_the_prompt_lengths(tiny_model, tiny_hf_model, rows, at, side):
    vectors, batch = some_vectors(tiny_model), collate(rows, pad_side=side)
    with steer(tiny_model, vectors, 1.5, at=at, prompt_lengths=[len(row.prompt) for row in rows]):
        found = captured(tiny_model, lambda: forward(tiny_model, batch.tokens, batch.attention_mask))
    for index, row in enumerate(rows):
        own = found[:, index, batch.attention_mask[index]]
        assert naive.relative_error(own, slow_stream(tiny_hf_model, row, vectors, at)[1:]) < 1e-5


def test_a_mask_acts_exactly_where_it_is_true(tiny_model):
    mask = torch.tensor([[False, True, True, False, False, True, False], [True, False, False, False, True, True, True]])
    vector, plain = some_vectors(tiny_model).at(1), stream(tiny_model)[1]
    with steer(tiny_model, vector, 2.0, at=mask):
        found = stream(tiny_model)[1]
    assert torch.equal(found[~mask], plain[~mask])
    torch.testing.assert_close(found[mask], plain[mask] + 2 * vector.direction.double(), **EXACT)


def test_a_mask_that_is_true_nowhere_changes_no_bit(tiny_model):
    plain = logits(tiny_model)
    with ablate(tiny_model, some_vectors(tiny_model), at=torch.zeros(2, 7).bool()):
        assert torch.equal(logits(tiny_model), plain)


def test_response_and_prompt_share_only_the_last_prompt_token(tiny_model):
    vector, plain = some_vectors(tiny_model).at(2), stream(tiny_model)[2]
    changed = {}
    for at in ("response", "prompt"):
        with steer(tiny_model, vector, at=at, prompt_lengths=LENGTHS):
            changed[at] = (stream(tiny_model)[2] != plain).any(dim=-1)
    assert bool((changed["response"] | changed["prompt"]).all())
    assert (changed["response"] & changed["prompt"]).nonzero().tolist() == [[0, 2], [1, 4]]


# --- with a cache --------------------------------------------------------------------------------------------------


@SIDES
@pytest.mark.parametrize("at", ["response", "prompt"])
def test_the_cache_tells_the_prompt_from_the_response(tiny_model, tiny_hf_model, rows, at, side):
    vectors, found = some_vectors(tiny_model), []
    prompts = collate([ChatTokens(row.prompt) for row in rows], pad_side=side)
    answers = collate([ChatTokens(row.response) for row in rows])
    with steer(tiny_model, vectors, 1.5, at=at):
        _, past = forward(tiny_model, prompts.tokens, prompts.attention_mask, keep_past=True)
        for place in range(answers.tokens.shape[1]):
            token, mask = answers.tokens[:, place : place + 1], answers.attention_mask[:, place : place + 1]
            found.append(captured(tiny_model, partial(forward, tiny_model, token, mask, past=past)))
            past = Past(past.cache, torch.cat([past.mask, mask], dim=1))
    for index, row in enumerate(rows):
        own = torch.cat(found, dim=2)[:, index, answers.attention_mask[index]]
        expected = slow_stream(tiny_hf_model, row, vectors, at)[1:, len(row.prompt) :]
        assert naive.relative_error(own, expected) < 1e-5


@pytest.mark.parametrize("at", ["response", "prompt"])
def test_prompt_lengths_count_what_is_cached_already(tiny_model, at):
    vectors, everything = some_vectors(tiny_model), torch.ones(2, 7).bool()
    with steer(tiny_model, vectors, 1.5, at=at, prompt_lengths=[3, 5]):
        whole = captured(tiny_model, lambda: forward(tiny_model, TOKENS, everything))
        _, past = forward(tiny_model, TOKENS[:, :4], everything[:, :4], keep_past=True)
        rest = captured(tiny_model, lambda: forward(tiny_model, TOKENS[:, 4:], everything[:, 4:], past=past))
    torch.testing.assert_close(rest, whole[:, :, 4:], rtol=1e-6, atol=1e-6)


# --- generated text ------------------------------------------------------------------------------------------------


def spoken(model, prompt, way):
    """The greedy tokens of one prompt, however they are generated."""
    tokens, end = torch.tensor([prompt]), model.tokenizer.eos_token_id
    if way == "ours":
        return list(generate(model, [prompt], max_new_tokens=STEPS, temperature=0.0)[0].tokens)
    cached = way.endswith("with a cache")
    if way.startswith("Hugging Face"):
        options = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "use_cache": cached}
        said = model.original_model.generate(tokens, max_new_tokens=STEPS, **options)
    else:
        options = {"do_sample": False, "use_past_kv_cache": cached, "verbose": False}
        said = model.generate(tokens, max_new_tokens=STEPS, **options)
    said = said[0, len(prompt) :].tolist()
    return said[: said.index(end)] if end in said else said


@NAMED
@pytest.mark.parametrize(
    "way",
    [
        "ours",
        "TransformerLens with a cache",
        "TransformerLens without",
        "Hugging Face with a cache",
        "Hugging Face without",
    ],
)
def test_generated_text_follows_the_references_rule(tiny_model, tiny_hf_model, rows, model_class, at, way):
    if way.startswith("Hugging Face") and model_class == "HookedTransformer":
        pytest.skip("a HookedTransformer holds no Hugging Face model")
    vectors, stops = some_vectors(tiny_model), {tiny_model.tokenizer.eos_token_id}
    for row in rows[:2]:
        lengths = [len(row.prompt)] if way.endswith("without") and at != "all" else None
        with steer(tiny_model, vectors, 1.5, at=at, prompt_lengths=lengths):
            found = spoken(tiny_model, row.prompt, way)
        assert found == steered_greedy(tiny_hf_model, row.prompt, STEPS, stops, vectors, COEFFICIENTS, at)
        assert found != naive.greedy(tiny_hf_model, row.prompt, STEPS, stops)


@pytest.mark.parametrize("way", ["TransformerLens with a cache", "Hugging Face with a cache"])
def test_a_prompt_of_one_token_is_told_from_the_tokens_after_it(tiny_model, tiny_hf_model, model_class, way):
    """All passes have one shape there, and only the first one is the prompt's."""
    if way.startswith("Hugging Face") and model_class == "HookedTransformer":
        pytest.skip("a HookedTransformer holds no Hugging Face model")
    vectors, stops = some_vectors(tiny_model), {tiny_model.tokenizer.eos_token_id}
    with steer(tiny_model, vectors, 1.5, at="prompt"):
        found = spoken(tiny_model, (9,), way)
    expected = steered_greedy(tiny_hf_model, (9,), STEPS, stops, vectors, COEFFICIENTS, "prompt")
    assert found == expected
    assert len(found) > 1


def test_passes_of_one_shape_have_each_their_own_padding(tiny_model, tiny_hf_model):
    """Two batches of one shape in one context, padded by one token and by three."""
    vectors = some_vectors(tiny_model)
    with steer(tiny_model, vectors, 1.5, at="response", prompt_lengths=[2]):
        for padding in (1, 3):
            ids, mask = [0] * padding + IDS[0][padding:], torch.arange(7)[None] >= padding
            found = captured(tiny_model, lambda ids=ids, mask=mask: forward(tiny_model, torch.tensor([ids]), mask))
            row = ChatTokens(tuple(ids[padding : padding + 2]), tuple(ids[padding + 2 :]))
            expected = slow_stream(tiny_hf_model, row, vectors, "response")[1:]
            assert naive.relative_error(found[:, 0, padding:], expected) < 1e-5


@pytest.mark.parametrize("way", ["ours", "TransformerLens with a cache", "TransformerLens without"])
def test_generated_text_with_learned_positions_follows_the_references_rule(tiny_gpt2, tiny_hf_gpt2, way):
    vectors, stops = some_vectors(tiny_gpt2), {tiny_gpt2.tokenizer.eos_token_id}
    lengths = [len(IDS[0])] if way.endswith("without") else None
    with steer(tiny_gpt2, vectors, 1.5, at="response", prompt_lengths=lengths):
        found = spoken(tiny_gpt2, IDS[0], way)
    assert found == steered_greedy(tiny_hf_gpt2, IDS[0], STEPS, stops, vectors, COEFFICIENTS[:3], "response")


@pytest.mark.parametrize("cached", [True, False], ids=["with a cache", "without"])
@pytest.mark.parametrize("at", ["response", "prompt"])
def test_left_padding_does_not_change_generated_text(
    make_tiny_model, model_class, tiny_tokenizer, tiny_hf_model, at, cached
):
    model = make_tiny_model(model_class, tiny.llama(tiny_tokenizer).float())  # in float64 padding would be NaN
    texts = ["What is the sea? It is", "Why", "Be kind, listen first, and then say what you think."]
    prompts = [tiny_tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    vectors, stops = some_vectors(model), {tiny_tokenizer.eos_token_id}
    with steer(model, vectors, 1.5, at=at, prompt_lengths=None if cached else list(map(len, prompts))):
        found = model.generate(
            texts,
            max_new_tokens=STEPS,
            do_sample=False,
            use_past_kv_cache=cached,
            prepend_bos=False,
            return_type="tokens",
            verbose=False,
        )
    for prompt, said in zip(prompts, found[:, max(map(len, prompts)) :].tolist(), strict=True):
        expected = steered_greedy(tiny_hf_model, prompt, STEPS, stops, vectors, COEFFICIENTS, at)
        assert said[: len(expected)] == expected


@NAMED
def test_our_batches_speak_as_single_rows_do(tiny_model, tiny_hf_model, rows, at):
    vectors, stops = some_vectors(tiny_model), {tiny_model.tokenizer.eos_token_id}
    prompts = [row.prompt for row in rows] + [(9,)]
    with steer(tiny_model, vectors, 1.5, at=at):
        found = generate(tiny_model, prompts, max_new_tokens=STEPS, temperature=0.0, batch_size=3)
    assert [list(row.tokens) for row in found] == [
        steered_greedy(tiny_hf_model, prompt, STEPS, stops, vectors, COEFFICIENTS, at) for prompt in prompts
    ]


def test_prompt_lengths_are_not_needed_and_do_no_harm_where_the_caller_knows(tiny_model, rows):
    prompts = [row.prompt for row in rows]
    texts = []
    for lengths in (None, list(map(len, prompts))):
        with steer(tiny_model, some_vectors(tiny_model), 1.5, at="response", prompt_lengths=lengths):
            texts.append(generate(tiny_model, prompts, max_new_tokens=4, temperature=0.0))
    assert texts[0] == texts[1]


# --- means ---------------------------------------------------------------------------------------------------------


@NAMED
@SIDES
def test_mean_activations_see_what_the_oracle_sees(tiny_model, tiny_hf_model, rows, at, side):
    vectors = some_vectors(tiny_model)
    with steer(tiny_model, vectors, 1.5, at=at):
        found = mean_activations(tiny_model, collate(rows, pad_side=side))
    for index, row in enumerate(rows):
        expected = slow_stream(tiny_hf_model, row, vectors, at)[1:, len(row.prompt) :].mean(dim=1)
        assert naive.relative_error(found[index], expected) < 1e-5


@NAMED
@pytest.mark.parametrize("position", ["response_mean", "prompt_mean", "prompt_last"])
def test_stream_means_see_what_the_oracle_sees(tiny_model, tiny_hf_model, rows, at, position):
    vectors = some_vectors(tiny_model)
    with steer(tiny_model, vectors, 1.5, at=at):
        found = {
            row: means
            for batch in stream_means(tiny_model, rows, position=position, token_budget=60)
            for row, means in zip(batch.rows, batch.means, strict=True)
        }
    for index, row in enumerate(rows):
        whole, first = slow_stream(tiny_hf_model, row, vectors, at), len(row.prompt)
        averaged = {
            "response_mean": slice(first, None),
            "prompt_mean": slice(first),
            "prompt_last": slice(first - 1, first),
        }
        assert naive.relative_error(found[index], whole[:, averaged[position]].mean(dim=1)) < 1e-5


def test_tokens_left_out_of_a_mean_are_steered_all_the_same(tiny_model, tiny_hf_model, rows):
    vectors = some_vectors(tiny_model)
    skipping = [ChatTokens(row.prompt, row.response, skip=1) for row in rows]
    with steer(tiny_model, vectors, 1.5, at="response"):
        found = mean_activations(tiny_model, collate(skipping))
    for index, row in enumerate(rows):
        expected = slow_stream(tiny_hf_model, row, vectors, "response")[1:, len(row.prompt) + 1 :].mean(dim=1)
        assert naive.relative_error(found[index], expected) < 1e-5


def test_a_batch_whose_prompt_is_not_known_is_refused(tiny_model, rows):
    batch = collate(rows)
    unknown, vectors = ChatBatch(batch.tokens, batch.attention_mask, batch.response_mask), some_vectors(tiny_model)
    with pytest.raises(ValueError, match="cannot tell the prompt"), steer(tiny_model, vectors, at="response"):
        mean_activations(tiny_model, unknown)


def test_each_of_several_contexts_has_its_own_positions(tiny_model, tiny_hf_model, rows):
    vectors, stops = some_vectors(tiny_model), {tiny_model.tokenizer.eos_token_id}
    prompt = rows[0].prompt
    with intervene(tiny_model, Steer(vectors.at(0), 3.0), at="prompt"), steer(tiny_model, vectors.at(2), at="response"):
        found = generate(tiny_model, [prompt], max_new_tokens=STEPS, temperature=0.0)
    of_prompt, of_response = (vectors.directions[layer].double() for layer in (0, 2))
    with (
        naive.added_at(tiny_hf_model, {0: 3 * of_prompt}, places("prompt", len(prompt))),
        naive.added_at(tiny_hf_model, {2: of_response}, places("response", len(prompt))),
    ):
        assert list(found[0].tokens) == naive.greedy(tiny_hf_model, prompt, STEPS, stops)
