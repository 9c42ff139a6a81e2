"""What a fixed workload makes the model compute, counted: this guards speed without a clock.

Forwards and tokens, padded ones too, do not depend on the machine; a change that runs more of them shows here.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest

from persona_lens.activations.means import stream_means
from persona_lens.chat.batches import ChatTokens
from persona_lens.generation.capture import CapturedMeans
from persona_lens.generation.decoding import generate
from persona_lens.rollouts.collection import plan_rollouts, sample_rollouts
from persona_lens.rollouts.engines import Cell, CellEngine, ModelEngine
from tests.intervention_cases import some_vectors
from tests.test_rollouts import TRAIT


class Work(NamedTuple):
    """How often the embedding and the unembedding ran, and over how many tokens, padding included."""

    forwards: int
    tokens: int
    unembeddings: int
    unembedded: int


def work(model, run) -> Work:
    calls = {"embed": [], "unembed": []}
    handles = [
        getattr(model, name).register_forward_hook(
            lambda _module, inputs, _out, name=name: calls[name].append(inputs[0].shape[0] * inputs[0].shape[1])
        )
        for name in calls
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return Work(len(calls["embed"]), sum(calls["embed"]), len(calls["unembed"]), sum(calls["unembed"]))


def rows(n_prompts, per_prompt, prompt=24, response=12):
    return [
        ChatTokens((number + 1, *range(20, 19 + prompt)), tuple(range(30 + sample, 30 + sample + response)))
        for number in range(n_prompts)
        for sample in range(per_prompt)
    ]


def test_shared_prompts_run_once_and_their_responses_in_batches_of_the_budget(tiny_model):
    # Two prompts of 24 tokens in one pass; twenty responses of 12, twelve to a budget of 144.
    found = work(tiny_model, lambda: list(stream_means(tiny_model, rows(2, 10), token_budget=144)))
    assert found == Work(forwards=3, tokens=2 * 24 + 20 * 12, unembeddings=0, unembedded=0)


def test_texts_that_share_no_prompt_run_whole(tiny_model):
    found = work(tiny_model, lambda: list(stream_means(tiny_model, rows(8, 1), token_budget=144)))
    assert found == Work(forwards=2, tokens=8 * 36, unembeddings=0, unembedded=0)


def test_ragged_responses_are_padded_to_their_neighbours_in_length(tiny_model):
    ragged = [ChatTokens((7, 8, 9), tuple(range(20, 20 + n))) for n in (4, 16, 5, 15, 6, 14)]
    found = work(tiny_model, lambda: list(stream_means(tiny_model, ragged, token_budget=48)))
    assert found == Work(forwards=3, tokens=3 + 3 * 16 + 3 * 6, unembeddings=0, unembedded=0)


def test_texts_of_two_lengths_run_in_two_passes_where_padding_would_cost_more(tiny_model):
    two = [ChatTokens((number + 1, 8, 9), tuple(range(20, 20 + n))) for number, n in enumerate((61, 5, 61, 5, 61, 5))]
    found = work(tiny_model, lambda: list(stream_means(tiny_model, two)))
    assert found == Work(forwards=2, tokens=3 * 64 + 3 * 8, unembeddings=0, unembedded=0)


def test_generation_runs_each_prompt_once_and_one_token_a_row_and_step(tiny_model, monkeypatch):
    monkeypatch.setattr("persona_lens.generation.decoding.stop_tokens", lambda _: frozenset())
    prompts = [row.prompt for row in rows(2, 5)]
    found = work(tiny_model, lambda: generate(tiny_model, prompts, max_new_tokens=6, temperature=0.0))
    # The sixth token is sampled from the fifth one's logits: five passes of ten rows after the prompts.
    assert found == Work(forwards=6, tokens=2 * 24 + 5 * 10, unembeddings=6, unembedded=2 + 5 * 10)


def test_capturing_means_costs_one_pass_of_the_last_tokens_without_the_unembedding(tiny_model, monkeypatch):
    monkeypatch.setattr("persona_lens.generation.decoding.stop_tokens", lambda _: frozenset())

    def sampled(captured=None):
        sample_rollouts(tiny_model, TRAIT, per_question=1, max_new_tokens=6, captured=captured, progress=False)

    plain = work(tiny_model, sampled)
    found = work(tiny_model, lambda: sampled(CapturedMeans(None, tiny_model, 8)))
    assert found == plain._replace(forwards=plain.forwards + 1, tokens=plain.tokens + 8)


def test_a_sweeps_cells_share_the_prompt_of_their_question(tiny_model, monkeypatch):
    """Rows that are steered from the last prompt token on have all before it in common."""
    monkeypatch.setattr("persona_lens.generation.decoding.stop_tokens", lambda _: frozenset())
    vectors = some_vectors(tiny_model)
    cells = [Cell(vectors.at(layer), 1.0) for layer in range(4)]
    (prompt,) = plan_rollouts(TRAIT, polarities=["neutral"], questions=["Why?"], per_question=1)
    length = len(prompt.tokenize(tiny_model.tokenizer).prompt)
    engine = CellEngine(ModelEngine(tiny_model, 6, temperature=0.0), {cell.name: cell for cell in cells})
    planned = [replace(prompt, intervention=cell.name) for cell in cells]
    found = work(tiny_model, lambda: engine.answer(planned, seed=0))
    assert found == Work(forwards=7, tokens=length - 1 + 6 * 4, unembeddings=6, unembedded=6 * 4)


@pytest.mark.embedded
def test_extraction_on_the_embedded_model_never_unembeds(embedded_model):
    found = work(embedded_model, lambda: list(stream_means(embedded_model, rows(1, 4))))
    assert found == Work(forwards=2, tokens=24 + 4 * 12, unembeddings=0, unembedded=0)
