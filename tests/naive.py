"""Slow obvious oracles: one row at a time, a whole forward pass of the plain Hugging Face model, means in plain Python.

Nothing here imports persona_lens or TransformerLens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Row = tuple[Sequence[int], Sequence[int]]
"""The token ids of a prompt and of its response."""


def blocks(hf_model: Any) -> Any:
    """The decoder layers of a Hugging Face model."""
    decoder = hf_model.get_decoder()
    return decoder.layers if hasattr(decoder, "layers") else decoder.h


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def residual_stream(hf_model: Any, ids: Sequence[int]) -> Tensor:
    """`[stream, pos, d_model]` in float64: what enters the first block, then the output of every block."""
    stream: list[Tensor] = []
    handles = [
        blocks(hf_model)[0].register_forward_pre_hook(
            lambda _module, args, kwargs: stream.append(args[0][0] if args else kwargs["hidden_states"][0]),
            with_kwargs=True,
        ),
        # Not `output_hidden_states`, which puts the final norm on the last one and misses a change by another hook.
        *(
            block.register_forward_hook(lambda _module, _inputs, output: stream.append(_first(output)[0]))
            for block in blocks(hf_model)
        ),
    ]
    try:
        hf_model(torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(stream).double()


@torch.no_grad()
def logits(hf_model: Any, ids: Sequence[int]) -> Tensor:
    """`[pos, d_vocab]` in float64."""
    return hf_model(torch.tensor([list(ids)]), use_cache=False).logits[0].double()


def mean(vectors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    for vector in vectors:
        total = total + vector
    return total / len(vectors)


def stream_mean(hf_model: Any, row: Row, position: str = "response_mean", skip: int = 0) -> Tensor:
    """`[stream, d_model]`: a row's mean over its response (after `skip` tokens) or prompt, or its last prompt token."""
    prompt, response = row
    stream = residual_stream(hf_model, [*prompt, *response])
    first = len(prompt)
    positions = {
        "response_mean": range(first + skip, first + len(response)),
        "prompt_mean": range(first),
        "prompt_last": range(first - 1, first),
    }[position]
    return torch.stack([mean([layer[place] for place in positions]) for layer in stream])


def mean_norm(hf_model: Any, row: Row) -> list[float]:
    """The mean Euclidean norm of the response tokens, at every row of the stream."""
    prompt, response = row
    stream = residual_stream(hf_model, [*prompt, *response])
    places = range(len(prompt), len(prompt) + len(response))
    return [sum(math.sqrt(sum(x * x for x in layer[p].tolist())) for p in places) / len(places) for layer in stream]


def greedy(hf_model: Any, prompt: Sequence[int], steps: int, stops: set[int]) -> list[int]:
    """Greedy decoding without a cache: every step runs the whole text again."""
    said: list[int] = []
    for _ in range(steps):
        token = int(logits(hf_model, [*prompt, *said])[-1].argmax())
        if token in stops:
            break
        said.append(token)
    return said


def top_two_gaps(hf_model: Any, prompt: Sequence[int], said: Sequence[int]) -> list[float]:
    """How far the best logit was ahead of the second where each token of a text was chosen."""
    best = logits(hf_model, [*prompt, *said])[len(prompt) - 1 :].topk(2, dim=-1).values
    return [float(first - second) for first, second in best]


def log_likelihood(hf_model: Any, row: Row) -> float:
    """Sum over the response of log p(token | everything before it)."""
    prompt, response = row
    every = logits(hf_model, [*prompt, *response])
    total = 0.0
    for place, token in enumerate(response, start=len(prompt)):
        scores = every[place - 1]
        total += float(scores[token] - scores.logsumexp(dim=-1))
    return total


@contextmanager
def added(hf_model: Any, layer: int, vector: Tensor) -> Iterator[None]:
    """While open, every token's residual at the output of block `layer` has `vector` added to it."""

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        changed = _first(output) + vector.to(_first(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = blocks(hf_model)[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def edited(hf_model: Any, edits: dict[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While open, the `[batch, pos, d_model]` residual at the output of each given block becomes its edit's result."""

    def hook(edit: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def change(_module: Any, _inputs: Any, output: Any) -> Any:
            changed = edit(_first(output))
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return change

    handles = [blocks(hf_model)[layer].register_forward_hook(hook(edit)) for layer, edit in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def added_at(hf_model: Any, additions: dict[int, Tensor], places: slice) -> Iterator[None]:
    """While open, each layer's vector is added to the residual of the tokens in `places`, counted in the whole text."""

    def adding(vector: Tensor) -> Callable[[Tensor], Tensor]:
        def add(resid: Tensor) -> Tensor:
            changed = resid.clone()
            changed[:, places] += vector.to(resid)
            return changed

        return add

    with edited(hf_model, {layer: adding(vector) for layer, vector in additions.items()}):
        yield


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest distance between two `[..., stream, d_model]`, relative to the mean norm in that row of it."""
    expected = expected.double()
    scale = expected.norm(dim=-1).reshape(-1, expected.shape[-2]).mean(dim=0)
    return float(((found.double() - expected).norm(dim=-1) / scale).max())
