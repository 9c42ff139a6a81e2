"""Extraction recovers a planted direction, equals one row at a time, and counts whatever it does not average."""

import copy
import math

import numpy as np
import pytest
import torch

from persona_lens.chat import Conversation, encode
from persona_lens.extraction import extract_from_responses
from persona_lens.models import identify, resid_post_name
from persona_lens.responses import read_reference_csv
from tests import naive, tiny

QUICK = {"trait": "evil", "n_resamples": 10, "n_placebo": 10, "progress": False}
VOCABULARY = torch.arange(3, 300)


def conversations(seed, n_rows=6, tokens=VOCABULARY, n_questions=3):
    """Responses of 1 to 20 random tokens to a few rendered prompts that many of them share."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(n_rows):
        length = int(torch.randint(1, 21, (1,), generator=generator))
        response = tokens[torch.randint(len(tokens), (length,), generator=generator)]
        question = f"What is {'one two three four five six seven'.split()[index % n_questions]}?"
        rows.append(
            Conversation(f"<|im_start|>{question}", tuple(response.tolist()), question, str(index // n_questions % 2))
        )
    return rows


def naive_directions(hf_model, tokenizer, positive, negative, *, position="response_mean", after=None):
    """The difference in means [stream d_model], one forward pass a row."""
    sides = []
    for side in (positive, negative):
        rows = [row.tokenize(tokenizer, after=after) for row in side]
        means = [naive.stream_mean(hf_model, (row.prompt, row.response), position, row.skip) for row in rows]
        sides.append(naive.mean(means))
    return sides[0] - sides[1]


def assert_cosines(found, expected, at_least=0.9999):
    cosines = torch.cosine_similarity(found.double(), expected.double(), dim=-1)
    assert (cosines >= at_least).all(), f"lowest cosine {float(cosines.min())} at {int(cosines.argmin())}"


def stream(vectors):
    """The embedding row and the layers, as the oracle has them."""
    return torch.cat([vectors.embedding[None], vectors.directions])


# Planted truth


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


# The oracle


@pytest.mark.parametrize("position", ["response_mean", "prompt_mean", "prompt_last"])
def test_directions_are_those_of_one_row_at_a_time(tiny_model, tiny_hf_model, position):
    # Prompts that differ between the sides, so that their means do too.
    sides = conversations(1, n_questions=5), conversations(2, n_questions=3)
    vectors = extract_from_responses(tiny_model, *sides, position=position, **QUICK)
    expected = naive_directions(tiny_hf_model, tiny_model.tokenizer, *sides, position=position)
    assert naive.relative_error(stream(vectors), expected) < 1e-5
    assert vectors.position == position


def test_directions_are_those_of_one_row_at_a_time_on_gpt2(tiny_gpt2, tiny_hf_gpt2):
    sides = conversations(1), conversations(2, n_rows=9)
    vectors = extract_from_responses(tiny_gpt2, *sides, **QUICK)
    expected = naive_directions(tiny_hf_gpt2, tiny_gpt2.tokenizer, *sides)
    assert naive.relative_error(stream(vectors), expected) < 1e-5


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


# What does not matter


def test_how_rows_are_batched_does_not_change_a_vector(tiny_model):
    sides = conversations(1, 9), conversations(2, 7)
    one, other = (extract_from_responses(tiny_model, *sides, token_budget=size, **QUICK) for size in (1, 4096))
    assert naive.relative_error(stream(one), stream(other)) < 1e-5


def test_the_order_of_rows_does_not_change_a_vector(tiny_model):
    positive, negative = conversations(1, 9), conversations(2, 7)
    one = extract_from_responses(tiny_model, positive, negative, **QUICK)
    other = extract_from_responses(tiny_model, positive[::-1], negative[3:] + negative[:3], **QUICK)
    assert naive.relative_error(stream(one), stream(other)) < 1e-5


def test_longer_neighbours_do_not_change_a_row(tiny_model, tmp_path):
    sides = conversations(1, 3), conversations(2, 3)
    long = Conversation("<|im_start|>" + "How would you run a country? " * 4, tuple(range(50, 130)), "long")
    extract_from_responses(tiny_model, *sides, spool=tmp_path / "alone.npy", **QUICK)
    extract_from_responses(tiny_model, [*sides[0], long], sides[1], spool=tmp_path / "beside.npy", **QUICK)
    alone, beside = (torch.from_numpy(np.load(tmp_path / f"{name}.npy")) for name in ("alone", "beside"))
    assert naive.relative_error(beside[[0, 1, 2, 4, 5, 6]], alone) < 1e-5


# What is counted, and what is refused


def test_an_empty_response_is_counted_and_never_averaged(tiny_model):
    sides = conversations(1), conversations(2)
    empty = [Conversation("<|im_start|>Why?", response, "Why?") for response in ("", " \n", ())]
    whole = extract_from_responses(tiny_model, *sides, **QUICK)
    vectors = extract_from_responses(tiny_model, [*empty, *sides[0]], [*sides[1], empty[0]], **QUICK)
    assert torch.equal(stream(vectors), stream(whole))
    assert (vectors.counts["positive"], vectors.counts["positive_empty"]) == (6, 3)
    assert (vectors.counts["negative"], vectors.counts["negative_empty"]) == (6, 1)


def test_a_side_of_empty_responses_is_an_error(tiny_model):
    empty = [Conversation("<|im_start|>Why?", "")] * 2
    with pytest.raises(ValueError, match=r"evil: no negative responses to average \(2 given, 2 empty"):
        extract_from_responses(tiny_model, conversations(1), empty, **QUICK)


THOUGHTS = [
    Conversation("<|im_start|>Why?", "<think>Hm.</think>Because."),
    Conversation("<|im_start|>Why?", "<think>Hm"),
]


def test_an_unclosed_block_is_an_error_with_the_remedy(tiny_model):
    with pytest.raises(ValueError, match=r"never says '</think>' .* With unclosed='drop' such rows are left out"):
        extract_from_responses(tiny_model, THOUGHTS, THOUGHTS[:1], after="</think>", **QUICK)


def test_an_unclosed_block_can_be_dropped_and_is_counted(tiny_model):
    vectors = extract_from_responses(tiny_model, THOUGHTS, THOUGHTS[:1], after="</think>", unclosed="drop", **QUICK)
    assert (vectors.counts["positive"], vectors.counts["positive_unclosed"]) == (1, 1)
    assert vectors.counts["negative_unclosed"] == 0


def test_a_response_that_ends_with_its_block_is_an_error(tiny_model):
    ended = [Conversation("<|im_start|>Why?", "<think>Hm.</think>")]
    with pytest.raises(ValueError, match=r"evil: 1 responses have no tokens left to average \(after='</think>'\)"):
        extract_from_responses(tiny_model, THOUGHTS[:1], ended, after="</think>", **QUICK)


LONG = Conversation("<|im_start|>Why?", tuple(range(3, 300)), "Why?")


def test_a_row_that_is_too_long_is_an_error(tiny_model):
    with pytest.raises(ValueError, match=r"Row 6 has .* the context holds 256"):
        extract_from_responses(tiny_model, conversations(1), [LONG], **QUICK)


def test_a_truncated_row_is_counted_and_is_what_fits(tiny_model):
    kept = 256 - len(LONG.tokenize(tiny_model.tokenizer).prompt)
    short = Conversation(LONG.prompt, LONG.response[:kept], LONG.question)
    truncated = extract_from_responses(tiny_model, conversations(1), [LONG], too_long="truncate", **QUICK)
    whole = extract_from_responses(tiny_model, conversations(1), [short], **QUICK)
    assert torch.equal(stream(truncated), stream(whole))
    assert (truncated.counts["truncated"], whole.counts["truncated"]) == (1, 0)


def test_activations_that_are_not_finite_are_an_error_that_names_the_layer(tiny_model):
    with (
        tiny_model.hooks(fwd_hooks=[(resid_post_name(1), lambda resid, hook: resid * math.nan)]),
        pytest.raises(ValueError, match=r"not finite at layer 1\. Load it with a wider dtype"),
    ):
        extract_from_responses(tiny_model, conversations(1), conversations(2), **QUICK)


# What is left behind


def test_row_means_are_spooled_where_asked(tiny_model, tmp_path):
    sides = conversations(1, 5), conversations(2, 4)
    vectors = extract_from_responses(tiny_model, *sides, spool=tmp_path / "new" / "rows.npy", **QUICK)
    rows = np.load(tmp_path / "new" / "rows.npy", mmap_mode="r")
    assert rows.shape == (9, 5, 32)
    assert rows.dtype == np.float32
    difference = rows[:5].mean(axis=0, dtype=np.float64) - rows[5:].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(stream(vectors), difference, rtol=1e-6, atol=1e-7)


def test_without_a_spool_no_file_stays(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    extract_from_responses(tiny_model, conversations(1), conversations(2), **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_spool_that_cannot_be_written_is_refused(tiny_model, tmp_path):
    with pytest.raises(OSError, match="Cannot write"):
        extract_from_responses(tiny_model, conversations(1), conversations(2), spool=tmp_path, **QUICK)


def test_vectors_remember_their_model_and_settings(tiny_model):
    vectors = extract_from_responses(tiny_model, conversations(1), conversations(2), seed=3, **QUICK)
    assert vectors.provenance.model == identify(tiny_model)
    assert vectors.provenance.settings["seed"] == 3
    assert (vectors.statistics.n_questions, vectors.statistics.n_rows) == (3, 12)


# On the embedded model, with real responses


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


@pytest.fixture(scope="module")
def float64_model(embedded_hf_model):
    return copy.deepcopy(embedded_hf_model).double()


@pytest.fixture(scope="module")
def short_truth(float64_model, embedded_bridge, reference_data):
    """Four real pairs of 60 tokens, and their directions one row at a time in float64."""
    sides = reference_sides(reference_data, embedded_bridge.tokenizer, n_pairs=4, n_tokens=60)
    return sides, naive_directions(float64_model, embedded_bridge.tokenizer, *sides)


def test_real_responses_give_the_directions_of_one_row_at_a_time(embedded_model, short_truth):
    sides, expected = short_truth
    vectors = extract_from_responses(embedded_model, *sides, **QUICK)
    assert_cosines(stream(vectors), expected)


def test_both_model_classes_give_the_same_directions(both_classes, load_embedded_model, short_truth):
    sides, _ = short_truth
    one, other = (
        extract_from_responses(load_embedded_model(name), *sides, **QUICK)
        for name in ("TransformerBridge", "HookedTransformer")
    )
    assert_cosines(stream(one), stream(other))


@pytest.mark.slow
def test_whole_real_responses_give_the_directions_of_one_row_at_a_time(embedded_bridge, float64_model, reference_data):
    sides = reference_sides(reference_data, embedded_bridge.tokenizer, n_pairs=2)
    vectors = extract_from_responses(embedded_bridge, *sides, **QUICK)
    assert_cosines(stream(vectors), naive_directions(float64_model, embedded_bridge.tokenizer, *sides))
