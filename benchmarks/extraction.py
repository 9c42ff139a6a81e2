"""Extraction throughput on SmolLM2-135M-Instruct: response means at all layers.

Against forwards of the same weights that read nothing, and against the loop of the paper's reference code. Each
function here is a benchmark that `python -m benchmarks` runs by its name.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.comparison import Claim, Comparison, compare
from benchmarks.contestants import (
    bare_hooked,
    bare_hugging_face,
    reference_loop,
    with_head,
    with_mean_activations,
    with_stream_means,
)
from benchmarks.oracle import minimum_cosine, oracle_means
from benchmarks.texts import Workload, shared_prompts, short_texts
from persona_lens import load_model
from persona_lens.chat.batches import ChatTokens
from persona_lens.models.loading import HUB_NAME, embedded_model_directory
from persona_lens.models.structure import Model

THROUGHPUT_GOAL = 0.97
REFERENCE_GOAL = 1.8

BATCH_SIZE = 4
"""Rows a batch where whole rows are padded: near the fastest of the bare forward's, which from 3 to 8 hardly differ."""


def extraction_texts(repeats: int) -> list[Comparison]:
    """A bridge against the bare Hugging Face forward and the reference code's loop, and what each part is worth."""
    model, hf_model = bridge(), _hugging_face()
    workload = short_texts(model.tokenizer, 32)
    comparison = compare(
        "Texts on a TransformerBridge",
        workload,
        {
            "bare": [bare_hugging_face(hf_model, workload, size) for size in (32, 8, 4, 1)],
            "stream_means": [with_stream_means(model, workload)],
            "mean_activations": [with_mean_activations(model, workload, BATCH_SIZE)],
            "reference": [reference_loop(hf_model, workload)],
            "unsorted": [with_mean_activations(model, workload, BATCH_SIZE, sort=False)],
            "with head": [with_head(model, workload, BATCH_SIZE)],
        },
        [
            Claim("stream_means", "bare", THROUGHPUT_GOAL),
            Claim("mean_activations", "bare", THROUGHPUT_GOAL),
            Claim("stream_means", "reference", REFERENCE_GOAL),
            Claim("mean_activations", "reference", REFERENCE_GOAL),
            Claim("mean_activations", "unsorted"),
            Claim("mean_activations", "with head"),
        ],
        agreement=_cosine(workload),
        repeats=repeats,
    )
    return [comparison]


def extraction_hooked(repeats: int) -> list[Comparison]:
    """A HookedTransformer against its own forward that stops before the unembedding; nothing on transformer-lens 4."""
    if int(version("transformer-lens").partition(".")[0]) > 3:
        return []
    model = _hooked()
    workload = short_texts(model.tokenizer, 16)
    comparison = compare(
        "Texts on a HookedTransformer",
        workload,
        {
            "bare": [bare_hooked(model, workload, size) for size in (8, 4)],
            "stream_means": [with_stream_means(model, workload)],
            "mean_activations": [with_mean_activations(model, workload, BATCH_SIZE)],
        },
        [Claim("stream_means", "bare", THROUGHPUT_GOAL), Claim("mean_activations", "bare", THROUGHPUT_GOAL)],
        agreement=_cosine(workload),
        repeats=repeats,
    )
    return [comparison]


def extraction_shared_prompts(repeats: int) -> list[Comparison]:
    """Ten rollouts a prompt, which runs once, against the bare forward over every prompt and response."""
    ragged = [16, 80, 37, 101, 59, 27, 91, 48, 112, 69]
    return [
        _shared("64 + 64 tokens", 1, 64, [64] * 10, 1.6, repeats),
        _shared("100 + 64 tokens", 1, 100, [64] * 10, 1.85, repeats),
        # Two prompts: responses are sorted by length across prompts, so one alone would not show what sorting can do.
        _shared("64 + 16 to 112 tokens", 2, 64, ragged, 1.6, repeats),
    ]


def _shared(
    shape: str, n_prompts: int, n_prompt_tokens: int, lengths: Sequence[int], goal: float, repeats: int
) -> Comparison:
    workload = shared_prompts(
        bridge().tokenizer,
        f"{n_prompts} x {len(lengths)} rollouts",
        n_prompts=n_prompts,
        n_prompt_tokens=n_prompt_tokens,
        response_lengths=lengths,
    )
    return compare(
        f"Shared prompts, {shape}",
        workload,
        {
            # From 3 to 10 rows hardly differ where lengths are equal; where they are not, more rows only pad more.
            "bare": [bare_hugging_face(_hugging_face(), workload, 5)],
            "stream_means": [with_stream_means(bridge(), workload)],
        },
        [Claim("stream_means", "bare", goal)],
        agreement=_cosine(workload),
        repeats=repeats,
    )


@cache
def bridge() -> Model:
    return _resident(load_model())


@cache
def _hooked() -> Model:
    return _resident(load_model(model_class="HookedTransformer"))


@cache
def _hugging_face() -> Any:
    """The plain model of the same weights, with the attention that transformers takes by default."""
    from transformers import AutoModelForCausalLM

    folder = embedded_model_directory() or HUB_NAME
    return _resident(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def _resident(model: Any) -> Any:
    """The model with weights of its own: pages mapped from a file come and go, and would count as a run's memory."""
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


@cache
def _oracle(row: ChatTokens) -> Float[Tensor, "layer d_model"]:
    return oracle_means(_double(), row)


@cache
def _double() -> Any:
    return copy.deepcopy(_hugging_face()).double()


def _cosine(workload: Workload) -> Callable[[Tensor], float]:
    expected = torch.stack([_oracle(row) for row in workload.rows])
    return lambda means: minimum_cosine(means, expected, workload.positive)
