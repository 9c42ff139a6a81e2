"""Prompts that are run once with all their continuations, as if every row had been run whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import naive, tiny

IDS = st.lists(st.integers(3, 40), min_size=1, max_size=7).map(tuple)
PROMPTS = st.lists(IDS, min_size=1, max_size=4, unique=True)


@st.composite
def some_rows(draw):
    """Rows of random ids, some sharing a prompt, some without a response."""
    prompt = st.sampled_from(draw(PROMPTS))
    response = st.one_of(IDS, st.just(()))
    return draw(st.lists(st.tuples(prompt, response), min_size=1, max_size=8))


@pytest.fixture(scope="module")
def prefix():
    """The module under test, imported late so that the jaxtyping hook instruments it."""
    import persona_lens.activations.prefixes

    return persona_lens.activations.prefixes


@pytest.fixture(scope="module")
def rows(tiny_tokenizer):
    from persona_lens.chat.batches import ChatTokens

    texts = tiny.chat_rows(tiny_tokenizer)
    return [ChatTokens(prompt, response) for prompt, response in [*texts, (texts[0][0], ())]]


def response_logits(prefix, model, rows, **budgets):
    """The logits at every response token, by row; each row's first comes from its prompt's batch."""
    found, after_prompt = {}, {}
    for batch in prefix.prefix_batches(model, rows, **budgets):
        logits = batch.run(last_logits=1 if batch.is_prompt else None)
        for place, row in enumerate(batch.rows):
            if batch.is_prompt:
                after_prompt[prefix.unique_prompts(rows)[row]] = logits[place]
            else:
                assert row not in found
                assert batch.tokens[place, batch.mask[place]].tolist() == list(rows[row].response)
                found[row] = logits[place, batch.mask[place]]
    return {row: torch.cat([after_prompt[rows[row].prompt], kept]) for row, kept in found.items()}


def test_shared_prompts_give_the_logits_of_whole_rows(prefix, tiny_model, tiny_hf_model, rows):
    found = response_logits(prefix, tiny_model, rows)
    for index, kept in found.items():
        row = rows[index]
        whole = naive.logits(tiny_hf_model, [*row.prompt, *row.response])[len(row.prompt) - 1 :]
        torch.testing.assert_close(kept, whole, rtol=1e-5, atol=1e-5)


def test_shared_prompts_give_the_naive_log_likelihood(prefix, tiny_model, tiny_hf_model, rows):
    found = response_logits(prefix, tiny_model, rows)
    for index, kept in found.items():
        row = rows[index]
        scores = kept[:-1].log_softmax(dim=-1).gather(1, torch.tensor(row.response)[:, None]).sum()
        assert float(scores) == pytest.approx(naive.log_likelihood(tiny_hf_model, (row.prompt, row.response)), rel=1e-5)


@settings(max_examples=20)
@given(rows=some_rows(), token_budget=st.integers(1, 60), cache_tokens=st.integers(1, 60))
def test_budgets_change_no_logits(prefix, tiny_model, rows, token_budget, cache_tokens):
    from persona_lens.chat.batches import ChatTokens

    rows = [ChatTokens(*row) for row in rows]
    roomy = response_logits(prefix, tiny_model, rows)
    tight = response_logits(prefix, tiny_model, rows, token_budget=token_budget, cache_tokens=cache_tokens)
    assert set(roomy) == set(tight) == {index for index, row in enumerate(rows) if row.response}
    for index, kept in tight.items():
        torch.testing.assert_close(kept, roomy[index], rtol=1e-5, atol=1e-5)


@given(rows=some_rows(), token_budget=st.integers(1, 60), cache_tokens=st.integers(1, 60))
def test_batches_stay_within_their_budgets_or_hold_one_row(prefix, rows, token_budget, cache_tokens):
    from persona_lens.chat.batches import ChatTokens

    rows = [ChatTokens(*row) for row in rows]
    for batch, copied in planned(prefix, rows, token_budget, cache_tokens):
        n_rows = batch.tokens.shape[0]
        kept = batch.tokens.numel() if batch.is_prompt else copied
        assert n_rows == 1 or (batch.tokens.numel() <= token_budget and kept <= cache_tokens)


class NoModel:
    """Stands where a model would be while batches are planned and never run."""

    cfg = tokenizer = blocks = None

    def __call__(self):
        raise AssertionError("planning runs nothing")

    def parameters(self):
        return iter(())


class NoCache:
    layers = ()

    def batch_select_indices(self, _rows):
        pass


def planned(prefix, rows, token_budget, cache_tokens):
    """The batches, run by no model: each with how many padded prompt tokens it copies."""
    from persona_lens.models.forward import Past

    for batch in prefix.prefix_batches(NoModel(), rows, token_budget=token_budget, cache_tokens=cache_tokens):
        if batch.is_prompt:
            batch.grown = Past(NoCache(), batch.mask)
        yield batch, 0 if batch.past is None else batch.past.mask.numel()


@given(rows=some_rows(), token_budget=st.integers(1, 60))
def test_every_prompt_and_every_response_runs_once(prefix, rows, token_budget):
    from persona_lens.chat.batches import ChatTokens

    rows = [ChatTokens(*row) for row in rows]
    batches = [batch for batch, _ in planned(prefix, rows, token_budget, 60)]
    prompts = [row for batch in batches if batch.is_prompt for row in batch.rows]
    followers = [row for batch in batches if not batch.is_prompt for row in batch.rows]
    assert sorted(prompts) == list(range(len(prefix.unique_prompts(rows))))
    assert sorted(followers) == [index for index, row in enumerate(rows) if row.response]
    ran = sum(int(batch.mask.sum()) for batch in batches)
    assert ran == prefix.count_tokens(rows).shared


def test_tokens_are_counted_with_and_without_sharing(prefix):
    from persona_lens.chat.batches import ChatTokens

    rows = [ChatTokens((1, 2, 3), (4,)), ChatTokens((1, 2, 3), (5, 6)), ChatTokens((1,))]
    assert prefix.count_tokens(rows) == (3 + 1 + 1 + 2, 3 + 1 + 3 + 2 + 1)


def test_continuations_before_their_prompt_has_run_are_refused(prefix, tiny_model, rows):
    batches = prefix.prefix_batches(tiny_model, rows)
    next(batches)
    with pytest.raises(RuntimeError, match="must be run before its continuations"):
        next(batches)


def test_no_rows_make_no_batches(prefix, tiny_model):
    assert list(prefix.prefix_batches(tiny_model, [])) == []
