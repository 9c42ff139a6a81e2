"""Extraction recovers a planted direction, and gives what one forward pass a row gives."""

import copy
import functools
import math

import pytest
import torch

from persona_lens.chat.batches import Conversation, encode
from persona_lens.extraction.extract import extract_from_responses
from persona_lens.interop.responses import read_reference_csv
from tests import naive, tiny
from tests.extraction_cases import QUICK, VOCABULARY, assert_cosines, conversations, naive_directions, stream


@pytest.fixture(scope="module")
def planted(tiny_tokenizer):
    """A model that knows one trait, and what it knows: the Hugging Face model, its tokens and its two directions.

    The embeddings of the trait's tokens point along `lexical`, those of other tokens against it; a neuron of block 2
    reads that and writes `written`. Everything else is noise.
    """
    hf_model = tiny.llama(tiny_tokenizer)
    generator = torch.Generator().manual_seed(7)
    lexical, written = torch.linalg.qr(torch.randn(32, 2, generator=generator).double()).Q.T
    trait_tokens, others = VOCABULARY[::2], VOCABULARY[1::2]
    with torch.no_grad():
        for layer in hf_model.model.layers:
            layer.self_attn.o_proj.weight *= 0.02
            layer.mlp.down_proj.weight *= 0.02
        hf_model.model.embed_tokens.weight[trait_tokens] += 6 * lexical
        hf_model.model.embed_tokens.weight[others] -= 6 * lexical
        neuron = hf_model.model.layers[2].mlp
        neuron.gate_proj.weight[0] = 4 * lexical
        neuron.up_proj.weight[0] = 4 * lexical
        neuron.down_proj.weight[:, 0] = written
    return hf_model, (trait_tokens, others), (lexical, written)


@pytest.fixture(scope="module")
def planted_vectors(planted, make_tiny_model, model_class):
    hf_model, (trait_tokens, others), _ = planted
    model = make_tiny_model(model_class, hf_model)
    sides = conversations(1, 42, trait_tokens, 7), conversations(2, 42, others, 7)
    return extract_from_responses(model, *sides, **QUICK | {"n_resamples": 100, "n_placebo": 100})


def test_a_direction_in_the_embeddings_is_recovered_below_the_block_that_acts_on_it(planted, planted_vectors):
    lexical, _ = planted[2]
    assert_cosines(stream(planted_vectors)[:3], lexical.expand(3, -1), at_least=0.99)


def test_a_direction_that_a_block_writes_is_recovered_where_it_is_written(planted, planted_vectors):
    _, written = planted[2]
    increment = planted_vectors.directions[2] - planted_vectors.directions[1]
    assert_cosines(increment, written, at_least=0.99)


def test_a_planted_direction_points_from_negative_to_positive(planted, planted_vectors):
    lexical, written = planted[2]
    assert (planted_vectors.directions.double() @ lexical > 0).all()
    assert (planted_vectors.directions[2:].double() @ written > 0).all()


def test_a_planted_direction_is_seen_by_its_statistics(planted_vectors):
    statistics = planted_vectors.statistics
    assert (statistics.held_out_auc > 0.99).all()
    assert (statistics.held_out_auc > statistics.placebo_auc_95).all()
    assert (statistics.split_half > 0.95).all()
    assert statistics.embedding["held_out_auc"] > 0.99


def test_responses_without_a_difference_do_not_beat_the_placebo(tiny_model):
    sides = conversations(3, 28, n_questions=7), conversations(4, 28, n_questions=7)
    statistics = extract_from_responses(tiny_model, *sides, **QUICK | {"n_placebo": 100}).statistics
    assert (statistics.held_out_auc < statistics.placebo_auc_95).all()


@pytest.mark.parametrize("position", ["response_mean", "prompt_mean", "prompt_last"])
def test_directions_are_those_of_one_row_at_a_time(tiny_model, tiny_hf_model, tiny_gpt2, tiny_hf_gpt2, position):
    # The sides ask different questions, so that their prompts differ too.
    sides = conversations(1, n_questions=5), conversations(2, n_questions=3)
    vectors = extract_from_responses(tiny_model, *sides, position=position, **QUICK)
    expected = naive_directions(tiny_hf_model, tiny_model.tokenizer, *sides, position=position)
    assert naive.relative_error(vectors.directions, expected[1:]) < 1e-5
    assert vectors.position == position
    of_gpt2 = extract_from_responses(tiny_gpt2, *sides, position=position, **QUICK)
    expected = naive_directions(tiny_hf_gpt2, tiny_gpt2.tokenizer, *sides, position=position)
    assert naive.relative_error(stream(of_gpt2)[1:], expected[1:]) < 1e-5


def test_the_last_prompt_token_is_the_same_word_everywhere_and_says_nothing_before_block_0(tiny_model):
    vectors = extract_from_responses(
        tiny_model, conversations(1), conversations(2, n_questions=5), position="prompt_last", **QUICK
    )
    assert vectors.embedding.count_nonzero() == 0
    assert all(map(math.isnan, vectors.statistics.embedding.values()))


def test_the_residual_norm_is_the_mean_norm_of_all_response_tokens(tiny_model, tiny_hf_model):
    sides = conversations(1, 4), conversations(2, 3)
    vectors = extract_from_responses(tiny_model, *sides, **QUICK)
    rows = [row.tokenize(tiny_model.tokenizer) for side in sides for row in side]
    norms = torch.tensor([naive.mean_norm(tiny_hf_model, (row.prompt, row.response)) for row in rows])
    torch.testing.assert_close(vectors.residual_norm, norms.mean(dim=0)[1:].float(), rtol=1e-5, atol=0)


def test_with_after_only_what_follows_is_averaged(tiny_model, tiny_hf_model):
    prompt = "<|im_start|>What should I do?"
    thought = ["<think>Be kind.</think>listen first", "<think>I would not.</think>make them pay for it"]
    sides = [[Conversation(prompt, text)] for text in thought]
    vectors = extract_from_responses(tiny_model, *sides, after="</think>", **QUICK)
    rows = [
        (prompt + before + mark, answer) for before, mark, answer in (text.partition("</think>") for text in thought)
    ]
    means = [
        naive.stream_mean(tiny_hf_model, tuple(encode(tiny_model.tokenizer, part) for part in (before, answer)))
        for before, answer in rows
    ]
    assert naive.relative_error(stream(vectors), means[0] - means[1]) < 1e-5


def reference_sides(reference_data, tokenizer, n_pairs, n_tokens=None):
    """Pairs of the reference's judged files, spread over its questions, responses cut to their first tokens."""
    sides = []
    for name in ("pos", "neg"):
        rows = read_reference_csv(reference_data / "reference_rollouts" / f"qwen3-4b_evil_{name}.csv", "evil")
        chosen = [row.conversation for row in rows[:: len(rows) // n_pairs]]
        sides.append(
            [
                Conversation(row.prompt, encode(tokenizer, row.response)[:n_tokens], row.question, row.instruction)
                for row in chosen
            ]
        )
    return sides


# Of the session, since pytest leaves a module and comes back to it for the second model class.
@pytest.fixture(scope="session")
def short_truth(embedded_hf_model, embedded_bridge, reference_data):
    """Four real pairs of 60 tokens, and their directions one row at a time in float64."""
    sides = reference_sides(reference_data, embedded_bridge.tokenizer, n_pairs=4, n_tokens=60)
    exact = copy.deepcopy(embedded_hf_model).double()
    return sides, naive_directions(exact, embedded_bridge.tokenizer, *sides)


@pytest.fixture(scope="session")
def extracted(load_embedded_model, short_truth):
    """The stream of the four pairs' vectors, by model class; made once."""
    return functools.cache(
        lambda name: stream(extract_from_responses(load_embedded_model(name), *short_truth[0], **QUICK))
    )


def test_real_responses_give_the_directions_of_one_row_at_a_time(
    embedded_directory, model_class, extracted, short_truth
):
    assert_cosines(extracted(model_class), short_truth[1])


def test_both_model_classes_give_the_same_directions(embedded_directory, both_classes, extracted):
    assert_cosines(extracted("TransformerBridge"), extracted("HookedTransformer"))


@pytest.mark.soak
def test_whole_real_responses_give_the_directions_of_one_row_at_a_time(
    embedded_bridge, embedded_hf_model, reference_data
):
    # A float64 forward over thousands of tokens takes minutes, so here the oracle's forward is in float32.
    sides = reference_sides(reference_data, embedded_bridge.tokenizer, n_pairs=2)
    vectors = extract_from_responses(embedded_bridge, *sides, **QUICK)
    assert_cosines(stream(vectors), naive_directions(embedded_hf_model, embedded_bridge.tokenizer, *sides))
