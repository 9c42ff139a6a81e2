"""Mean residuals over chosen tokens: equal to the naive oracle, whatever the batch, the order and the padding."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.models.memory import DoesNotFit
from tests import naive, tiny

POSITIONS = ["response_mean", "prompt_mean", "prompt_last"]
RELATIVE = 1e-5  # the pools are float32


@pytest.fixture(scope="module")
def activations():
    """The module under test, imported late so that the jaxtyping hook instruments it."""
    import persona_lens.activations.means

    return persona_lens.activations.means


@pytest.fixture(scope="module")
def texts(tiny_tokenizer):
    return tiny.chat_rows(tiny_tokenizer)


@pytest.fixture(scope="module")
def oracle(tiny_hf_model, texts):
    """The naive `[batch, stream, d_model]` means of the texts, for each position."""
    return {
        position: torch.stack([naive.stream_mean(tiny_hf_model, row, position) for row in texts])
        for position in POSITIONS
    }


def as_rows(texts, skip=0):
    from persona_lens.chat.batches import ChatTokens

    return [ChatTokens(tuple(prompt), tuple(response), skip) for prompt, response in texts]


def gathered(activations, model, rows, **options):
    """`stream_means` put in the order of the rows: means, norms; every row that came out came out once."""
    means, norms = {}, {}
    for batch in activations.stream_means(model, rows, **options):
        for row, mean, norm in zip(batch.rows, batch.means, batch.norms, strict=True):
            assert row not in means
            means[row], norms[row] = mean, norm
    return means, norms


def stacked(means, n_rows):
    assert set(means) == set(range(n_rows))
    return torch.stack([means[row] for row in range(n_rows)])


# --- equal to the oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
def test_stream_means_equal_the_naive_ones(activations, tiny_model, texts, oracle, position):
    means, _ = gathered(activations, tiny_model, as_rows(texts), position=position)
    assert naive.relative_error(stacked(means, len(texts)), oracle[position]) < RELATIVE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", POSITIONS)
def test_mean_activations_equal_the_naive_ones_on_either_padding_side(
    activations, tiny_model, texts, oracle, position, side
):
    from persona_lens.chat.batches import collate

    batch = collate(as_rows(texts), pad_side=side, pad_token=2)
    found = activations.mean_activations(tiny_model, batch, position=position)
    assert naive.relative_error(found, oracle[position][:, 1:]) < RELATIVE
    assert (found.dtype, found.device.type) == (torch.float32, "cpu")


def test_means_of_a_model_with_learned_positions_equal_the_naive_ones(activations, tiny_gpt2, tiny_hf_gpt2, texts):
    means, _ = gathered(activations, tiny_gpt2, as_rows(texts))
    expected = torch.stack([naive.stream_mean(tiny_hf_gpt2, row) for row in texts])
    assert naive.relative_error(stacked(means, len(texts)), expected) < RELATIVE


def test_norms_are_the_mean_norm_of_the_averaged_tokens(activations, tiny_model, tiny_hf_model, texts):
    _, norms = gathered(activations, tiny_model, as_rows(texts[:2]))
    for index, row in enumerate(texts[:2]):
        assert norms[index].tolist() == pytest.approx(naive.mean_norm(tiny_hf_model, row), rel=1e-5)


def test_skipped_tokens_are_not_averaged(activations, tiny_model, tiny_hf_model, texts):
    from persona_lens.chat.batches import collate

    rows = as_rows(texts, skip=2)
    expected = torch.stack([naive.stream_mean(tiny_hf_model, row, skip=2) for row in texts])
    means, _ = gathered(activations, tiny_model, rows)
    assert naive.relative_error(stacked(means, len(texts)), expected) < RELATIVE
    found = activations.mean_activations(tiny_model, collate(rows))
    assert naive.relative_error(found, expected[:, 1:]) < RELATIVE


def test_a_prompt_mean_stops_before_what_is_skipped_when_the_batch_says_so(activations, tiny_model, texts, oracle):
    from persona_lens.chat.batches import collate

    found = activations.mean_activations(tiny_model, collate(as_rows(texts, skip=2)), position="prompt_mean")
    assert naive.relative_error(found, oracle["prompt_mean"][:, 1:]) < RELATIVE


def test_without_a_prompt_mask_the_prompt_is_what_is_attended_before_the_response(activations, tiny_model, texts):
    from persona_lens.chat.batches import ChatBatch, collate

    batch = collate(as_rows(texts), pad_side="left")
    guessed = ChatBatch(batch.tokens, batch.attention_mask, batch.response_mask)
    for position in POSITIONS:
        given_mask = activations.mean_activations(tiny_model, batch, position=position)
        torch.testing.assert_close(
            activations.mean_activations(tiny_model, guessed, position=position), given_mask, rtol=0, atol=0
        )


def test_embedded_means_equal_the_naive_ones(activations, embedded_model, embedded_hf_model):
    from persona_lens.chat.batches import chat_messages, tokenize_chat

    asked = [("You are kind.", "What is the sea?"), ("You are a cruel assistant who insults.", "How are you today?")]
    answers = ["It is deep, and it is cold.", "Water."]
    rows = [
        tokenize_chat(embedded_model.tokenizer, chat_messages(*question), answer)
        for question in asked
        for answer in answers
    ]
    means, _ = gathered(activations, embedded_model, rows)
    expected = torch.stack([naive.stream_mean(embedded_hf_model, (row.prompt, row.response)) for row in rows])
    assert naive.relative_error(stacked(means, len(rows)), expected) < RELATIVE


# --- invariances ---------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(data=st.data(), token_budget=st.integers(1, 200), position=st.sampled_from(POSITIONS))
def test_means_depend_neither_on_order_nor_on_company_nor_on_the_budget(
    activations, tiny_model, texts, oracle, data, token_budget, position
):
    chosen = data.draw(st.lists(st.sampled_from(range(len(texts))), min_size=1, max_size=8))
    rows = as_rows([texts[index] for index in chosen])
    means, _ = gathered(activations, tiny_model, rows, position=position, token_budget=token_budget)
    assert naive.relative_error(stacked(means, len(chosen)), oracle[position][chosen]) < RELATIVE


def test_where_memory_fails_the_rows_that_are_left_run_in_smaller_batches(
    activations, tiny_model, texts, oracle, monkeypatch
):
    """The first batch fits, then memory is for two rows at a time; what came out before is not run again."""
    import persona_lens.activations.prefixes

    sizes, forward = [], activations.forward

    def small_memory(model, tokens, mask, **options):
        if sizes and len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(len(tokens))
        return forward(model, tokens, mask, **options)

    monkeypatch.setattr(activations, "forward", small_memory)
    monkeypatch.setattr(persona_lens.activations.prefixes, "forward", small_memory)
    rows = as_rows(texts * 2)
    means, _ = gathered(activations, tiny_model, rows, token_budget=4096)
    assert sizes[0] > 2 >= max(sizes[1:])
    assert naive.relative_error(stacked(means, len(rows))[: len(texts)], oracle["response_mean"]) < RELATIVE


def test_memory_that_fails_for_a_single_row_is_an_error(activations, tiny_model, texts, monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(activations, "forward", no_memory)
    with pytest.raises(DoesNotFit, match="does not fit into the memory of cpu by itself"):
        gathered(activations, tiny_model, as_rows(texts[:1]))


def test_an_error_that_is_not_memorys_is_not_tried_again(activations, tiny_model, texts, monkeypatch):
    calls = []

    def broken(*_, **__):
        calls.append(1)
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(activations, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        gathered(activations, tiny_model, as_rows(texts[:2]))
    assert calls == [1]


def test_every_prompt_runs_once(activations, tiny_model, texts):
    seen = Counter()

    def count(tokens):
        seen.update(tokens)

    rows = as_rows(texts * 3)
    embed = tiny_model.embed
    handle = embed.register_forward_hook(lambda _module, inputs, _out: count(inputs[0].flatten().tolist()))
    try:
        gathered(activations, tiny_model, rows, token_budget=64)
    finally:
        handle.remove()
    expected = Counter(token for prompt in {row.prompt for row in rows} for token in prompt)
    expected.update(token for row in rows for token in row.response)
    del seen[0], expected[0]  # padding
    assert seen == expected


@pytest.mark.parametrize(("response", "skip"), [((), 0), ((60, 61), 2), ((60,), 5)])
def test_a_row_without_averaged_tokens_never_comes_out(activations, tiny_model, texts, response, skip):
    from persona_lens.chat.batches import ChatTokens

    rows = as_rows(texts[:2])
    means, _ = gathered(activations, tiny_model, [rows[0], ChatTokens(rows[1].prompt, response, skip), rows[1]])
    assert set(means) == {0, 2}


def test_a_row_without_response_still_has_a_prompt(activations, tiny_model, texts, oracle):
    rows = as_rows([(prompt, ()) for prompt, _ in texts])
    means, _ = gathered(activations, tiny_model, rows, position="prompt_last")
    assert naive.relative_error(stacked(means, len(rows)), oracle["prompt_last"]) < RELATIVE


@pytest.mark.parametrize("position", ["response_mean", "prompt_last"])
def test_a_hook_that_the_user_attached_is_seen(activations, tiny_model, tiny_hf_model, texts, position):
    vector = torch.linspace(-2, 2, 32, dtype=torch.float64)
    with naive.added(tiny_hf_model, 1, vector):
        expected = torch.stack([naive.stream_mean(tiny_hf_model, row, position) for row in texts[:3]])
    hook = ("blocks.1.hook_resid_post", lambda resid, hook: resid + vector)
    with tiny_model.hooks(fwd_hooks=[hook]):
        means, _ = gathered(activations, tiny_model, as_rows(texts[:3]), position=position)
    assert naive.relative_error(stacked(means, 3), expected) < RELATIVE


def test_pooling_leaves_gradients_of_the_users_own_forward_alone(activations, tiny_model):
    tokens = torch.tensor([[5, 6, 7]])
    with activations.pooled_residuals(tiny_model, torch.ones(1, 1, 3) / 3) as sums:
        tiny_model(tokens).sum().backward()
    assert len(sums) == tiny_model.cfg.n_layers + 1
    assert any(parameter.grad is not None for parameter in tiny_model.parameters())
    tiny_model.zero_grad(set_to_none=True)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "where"), [(0, "layer 0"), (2, "layer 2")])
def test_activations_that_are_not_finite_name_the_layer(activations, fresh_tiny_model, texts, layer, where):
    from persona_lens.chat.batches import collate

    with torch.no_grad():
        next(p for p in fresh_tiny_model.blocks[layer].mlp.parameters() if p.ndim > 1).fill_(float("nan"))
    with pytest.raises(ValueError, match=f"not finite at {where}, in row 0. Load it with a wider dtype"):
        activations.mean_activations(fresh_tiny_model, collate(as_rows(texts)))
    with pytest.raises(ValueError, match=f"not finite at {where}"):
        gathered(activations, fresh_tiny_model, as_rows(texts))


def test_an_embedding_that_is_not_finite_is_named(activations, fresh_tiny_model, model_class, texts):
    from persona_lens.chat.batches import collate

    with torch.no_grad():
        next(iter(fresh_tiny_model.embed.parameters())).fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite at the embedding"):
        activations.mean_activations(fresh_tiny_model, collate(as_rows(texts)))


@pytest.mark.parametrize("position", POSITIONS)
def test_a_row_without_tokens_is_refused_by_number(activations, tiny_model, texts, position):
    from persona_lens.chat.batches import collate

    batch = collate(as_rows(texts[:3]))
    assert batch.prompt_mask is not None
    batch.response_mask[1], batch.prompt_mask[1] = False, False
    with pytest.raises(ValueError, match=f"Row 1 has no tokens for {position}"):
        activations.mean_activations(tiny_model, batch, position=position)


def test_an_unknown_position_is_refused(activations, tiny_model, texts, shapes_unchecked):
    from persona_lens.chat.batches import collate

    with pytest.raises(ValueError, match=r"position is one of .*'prompt_last'.*, got 'last'"):
        activations.mean_activations(tiny_model, collate(as_rows(texts)), position="last")


def test_a_row_that_is_longer_than_the_context_is_refused(activations, tiny_model):
    with pytest.raises(ValueError, match=r"Row 0 has 257 tokens .* the context holds 256"):
        gathered(activations, tiny_model, as_rows([((5,) * 200, (6,) * 57)]))


def test_means_of_a_float64_model_are_summed_in_float64(activations, tiny_model):
    """Against the residual stream that each hook point itself gives: float32 sums are off by 1e-7 of it."""
    from persona_lens.chat.batches import ChatTokens, collate
    from persona_lens.models.forward import forward
    from persona_lens.models.structure import residual_points

    batch = collate([ChatTokens((5, 6, 7), (8, 9, 11))])  # a third is no float32 number
    seen = []
    handles = [
        point.register_forward_hook(lambda _, __, resid: seen.append(resid[0, 3:].clone()))
        for point in residual_points(tiny_model)
    ]
    with activations.pooled_residuals(tiny_model, activations.pool_weights(batch, ["response_mean"])) as sums:
        forward(tiny_model, batch.tokens, batch.attention_mask, last_logits=0)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(sums) == 5
    for stream, (total, norm) in zip(seen, sums, strict=True):
        assert stream.dtype == torch.float64
        torch.testing.assert_close(total[0, 0], stream.mean(dim=0), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(norm[0, 0], stream.norm(dim=-1).mean(), rtol=1e-12, atol=1e-13)
