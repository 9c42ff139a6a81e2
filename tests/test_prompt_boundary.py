"""Where the prompt ends in a cache that was filled before, in pieces, or with guessed tokens: known, or refused.

The oracle steers plain Hugging Face layers at the tokens that `at` names, one text at a time, without a cache.
"""

import pytest
import torch
from transformers import DynamicCache

from persona_lens.interventions.hooks import steer
from persona_lens.models.forward import forward
from persona_lens.models.loading import bridge_from_transformers
from tests import naive, tiny
from tests.intervention_cases import IDS, TOKENS, some_vectors

PROMPT = [5, 17, 100, 33, 8, 250, 61, 40, 41]
STEPS = 4
NAMED = pytest.mark.parametrize("at", ["response", "prompt"])
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # which PEFT asks for
UNKNOWN = "cannot tell the prompt from the response"


def hf_generate(model, ids, **options):
    """The greedy tokens of one row after the last of `ids`, and the logits of each step."""
    options = {"attention_mask": torch.ones(1, options.pop("width", len(ids))).long(), "do_sample": False} | options
    done = model.generate(
        torch.tensor([ids]),
        max_new_tokens=STEPS,
        eos_token_id=-1,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return done.sequences[0, len(ids) :].tolist(), torch.stack(done.logits)[:, 0]


def slow(hf_model, prompt, vectors, at, unsteered=0):
    """The same where the first tokens were cached before anything steered."""
    additions = {layer: 1.5 * vector for layer, vector in enumerate(vectors.directions.double())}
    place = {"response": slice(len(prompt) - 1, None), "prompt": slice(unsteered, len(prompt))}[at]
    with naive.added_at(hf_model, additions, place):
        said = naive.greedy(hf_model, prompt, STEPS, set())
        logits = naive.logits(hf_model, [*prompt, *said])[len(prompt) - 1 : -1]
    return said, logits


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert naive.relative_error(found[1], expected[1]) < 1e-5


def cached(model, ids):
    cache = DynamicCache(config=model.original_model.config)
    with torch.no_grad():
        model.original_model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return cache


# --- Hugging Face's generate says how long its prompt is ------------------------------------------------------------


@NAMED
@pytest.mark.parametrize("n_cached", [1, 5, len(PROMPT) - 1])
@pytest.mark.parametrize("passed", ["all tokens", "new tokens"])
def test_a_prefix_that_is_cached_already_is_still_the_prompt(tiny_bridge, tiny_hf_model, at, n_cached, passed):
    vectors, cache = some_vectors(tiny_bridge), cached(tiny_bridge, PROMPT[:n_cached])
    ids = PROMPT if passed == "all tokens" else PROMPT[n_cached:]
    with steer(tiny_bridge, vectors, 1.5, at=at):
        found = hf_generate(tiny_bridge.original_model, ids, past_key_values=cache, width=len(PROMPT))
    assert_same(found, slow(tiny_hf_model, PROMPT, vectors, at, n_cached))


@NAMED
@pytest.mark.parametrize("size", [1, 4, len(PROMPT) - 1, len(PROMPT)])
def test_a_prompt_that_is_run_in_pieces_ends_with_its_last_piece(tiny_bridge, tiny_hf_model, at, size):
    vectors = some_vectors(tiny_bridge)
    with steer(tiny_bridge, vectors, 1.5, at=at):
        found = hf_generate(tiny_bridge.original_model, PROMPT, prefill_chunk_size=size)
    assert_same(found, slow(tiny_hf_model, PROMPT, vectors, at))


@NAMED
def test_a_second_turn_in_one_cache_has_a_prompt_of_its_own(tiny_bridge, tiny_hf_model, at):
    vectors, hf_model = some_vectors(tiny_bridge), tiny_bridge.original_model
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    first = hf_model.generate(TOKENS[:1], return_dict_in_generate=True, **options)
    both = [*first.sequences[0].tolist(), 9, 9, 40]
    n_cached = first.past_key_values.get_seq_length()
    with steer(tiny_bridge, vectors, 1.5, at=at):
        found = hf_generate(hf_model, both, past_key_values=first.past_key_values)
    assert_same(found, slow(tiny_hf_model, both, vectors, at, n_cached))


@OLD_NAME
@NAMED
def test_a_peft_model_around_the_weights_says_it_too(make_tiny_model, tiny_hf_model, at):
    from peft import LoraConfig, get_peft_model

    bridge = make_tiny_model("TransformerBridge")
    vectors = some_vectors(bridge)
    # A new LoRA adds nothing, so the oracle is the model without it.
    tuned = get_peft_model(
        bridge.original_model, LoraConfig(target_modules=r".*q_proj\._original_component", task_type="CAUSAL_LM")
    )
    with steer(bridge, vectors, 1.5, at=at):
        found = hf_generate(tuned, PROMPT, prefill_chunk_size=4)
    assert_same(found, slow(tiny_hf_model, PROMPT, vectors, at))


@OLD_NAME
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@NAMED
def test_virtual_tokens_before_the_prompt_are_refused(make_tiny_model, at):
    from peft import PromptTuningConfig, get_peft_model

    bridge = make_tiny_model("TransformerBridge")
    bridge.original_model.config.vocab_size = 320
    tuned = get_peft_model(bridge.original_model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    tuned = tuned.double()
    with pytest.raises(ValueError, match="virtual tokens"), steer(bridge, some_vectors(bridge), at=at):
        tuned.generate(input_ids=TOKENS[:1], attention_mask=torch.ones_like(TOKENS[:1]), max_new_tokens=2)


# --- guessed tokens -------------------------------------------------------------------------------------------------


REPEATING = [5, 17, 100, 33, 8, 5, 17]
"""Its end occurred before, so that prompt lookup guesses what follows."""


@NAMED
def test_guessed_tokens_in_the_prompts_pass_are_refused_and_with_prompt_lengths_steered_as_the_response(
    tiny_bridge, tiny_hf_model, at
):
    vectors, hf_model = some_vectors(tiny_bridge), tiny_bridge.original_model
    refused = pytest.raises(ValueError, match=rf"{UNKNOWN}: `generate` was given a prompt of 7 .*prompt_lengths=")
    with refused, steer(tiny_bridge, vectors, 1.5, at=at):
        hf_generate(hf_model, REPEATING, prompt_lookup_num_tokens=3)
    with steer(tiny_bridge, vectors, 1.5, at=at, prompt_lengths=[len(REPEATING)]):
        found = hf_generate(hf_model, REPEATING, prompt_lookup_num_tokens=3)
    assert found[0] == slow(tiny_hf_model, REPEATING, vectors, at)[0]


@NAMED
def test_an_assistant_does_not_take_what_was_said_for_its_prompt(tiny_bridge, tiny_tokenizer, at):
    speaker = tiny.llama(tiny_tokenizer, seed=7)
    refused = pytest.raises(ValueError, match="inside another `generate`")
    with refused, steer(tiny_bridge, some_vectors(tiny_bridge), 1.5, at=at):
        hf_generate(speaker, PROMPT, assistant_model=tiny_bridge.original_model)


# --- without a generate that says it --------------------------------------------------------------------------------


def onto(model, first, second):
    """The logits of `second` run onto the cache of `first`, by the model's own forward."""
    ids, rest = torch.tensor([first]), torch.tensor([second])
    with torch.no_grad():
        if hasattr(model, "original_model"):
            cache = DynamicCache(config=model.original_model.config)
            model.original_model(ids, past_key_values=cache, use_cache=True)
            return model.original_model(rest, past_key_values=cache, use_cache=True).logits[0]
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 1)
        model(ids, past_kv_cache=cache)
        return model(rest, past_kv_cache=cache)[0]


@NAMED
def test_several_tokens_onto_a_filled_cache_are_refused_also_in_our_own_pass(tiny_model, at):
    words = rf"{UNKNOWN} where 4 tokens at once follow 5.*prompt_lengths="
    with pytest.raises(ValueError, match=words), steer(tiny_model, some_vectors(tiny_model), 1.5, at=at):
        onto(tiny_model, PROMPT[:5], PROMPT[5:])
    mask = torch.ones_like(TOKENS).bool()
    _, past = forward(tiny_model, TOKENS[:, :4], mask[:, :4], keep_past=True)
    with pytest.raises(ValueError, match=UNKNOWN), steer(tiny_model, some_vectors(tiny_model), 1.5, at=at):
        forward(tiny_model, TOKENS[:, 4:], mask[:, 4:], past=past)


@NAMED
@pytest.mark.parametrize(("n_cached", "length"), [(5, 7), (7, 7), (len(PROMPT) - 1, None)])
def test_with_prompt_lengths_they_are_told_apart_and_one_token_is_of_the_response(
    tiny_model, tiny_hf_model, at, n_cached, length
):
    vectors = some_vectors(tiny_model)
    with steer(tiny_model, vectors, 1.5, at=at, prompt_lengths=None if length is None else [length]):
        found = onto(tiny_model, PROMPT[:n_cached], PROMPT[n_cached:])
    length = n_cached if length is None else length
    additions = {layer: 1.5 * vector for layer, vector in enumerate(vectors.directions.double())}
    place = {"response": slice(length - 1, None), "prompt": slice(length)}[at]
    with naive.added_at(tiny_hf_model, additions, place):
        expected = naive.logits(tiny_hf_model, PROMPT)[n_cached:]
    assert naive.relative_error(found, expected) < 1e-5


# --- padding --------------------------------------------------------------------------------------------------------


def four_dimensional(padding):
    """Which token attends to which, with some padding at the left."""
    allowed = torch.ones(len(IDS[0]), len(IDS[0])).tril().bool()
    return (allowed & (torch.arange(len(IDS[0])) >= padding))[None, None]


@pytest.mark.parametrize("lengths", [None, [3]], ids=["from the cache", "by length"])
def test_padding_in_a_mask_of_pairs_is_not_guessed(tiny_tokenizer, lengths):
    bridge = bridge_from_transformers(tiny.llama(tiny_tokenizer).float(), tiny_tokenizer)
    refused = pytest.raises(ValueError, match="cannot tell padding from this pass's attention mask")
    with refused, torch.no_grad(), steer(bridge, some_vectors(bridge), at="response", prompt_lengths=lengths):
        bridge.original_model(TOKENS[:1], attention_mask=four_dimensional(2), use_cache=True)


def test_a_mask_of_the_new_tokens_alone_is_refused(tiny_bridge):
    hf_model, cache = tiny_bridge.original_model, cached(tiny_bridge, PROMPT[:5])
    refused = pytest.raises(ValueError, match="the attention mask covers 4 tokens, and cached and new ones are 9")
    with refused, torch.no_grad(), steer(tiny_bridge, some_vectors(tiny_bridge), at="response", prompt_lengths=[7]):
        hf_model(torch.tensor([PROMPT[5:]]), past_key_values=cache, attention_mask=torch.ones(1, 4).long())


@NAMED
def test_a_cache_of_fixed_size_changes_nothing(tiny_tokenizer, at):
    """There `generate` hands on a mask of pairs; prompts are padded at the left."""
    hf_model = tiny.llama(tiny_tokenizer).float()
    bridge = bridge_from_transformers(hf_model, tiny_tokenizer)
    ids, mask = torch.tensor([IDS[0], [0, 0, *IDS[1][:5]]]), torch.ones(2, 7).long()
    mask[1, :2] = 0
    said = []
    for kind in ("dynamic", "static"):
        with steer(bridge, some_vectors(bridge), 1.5, at=at):
            options = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0, "cache_implementation": kind}
            said.append(bridge.original_model.generate(ids, attention_mask=mask, max_new_tokens=STEPS, **options))
    assert torch.equal(said[0], said[1])
