"""The ways to run rows: bare forwards, the reference code's loop, and persona_lens with parts switched off.

Knows models and batches; knows nothing about time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.texts import Workload
from benchmarks.timing import Contestant
from persona_lens.activations.means import mean_activations, pool_weights, pooled_residuals, stream_means
from persona_lens.chat.batches import ChatBatch, collate
from persona_lens.models.forward import forward
from persona_lens.models.structure import Model, is_bridge

Batches = list[tuple[list[int], ChatBatch]]


def batches_of(workload: Workload, size: int, *, sort: bool = True) -> Batches:
    """Padded batches of `size` rows with the rows' indices, longest rows first unless `sort` is off."""
    order = list(range(len(workload.rows)))
    if sort:
        order.sort(key=lambda index: -len(workload.rows[index]))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    return [(chunk, collate([workload.rows[index] for index in chunk])) for chunk in chunks]


def bare_hugging_face(hf_model: Any, workload: Workload, size: int) -> Contestant:
    """The Hugging Face decoder alone: no LM head, no autograd, no cache, nothing read."""
    decoder, batches = hf_model.get_decoder(), batches_of(workload, size)

    @torch.no_grad()
    def run() -> None:
        for _, batch in batches:
            decoder(input_ids=batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False)

    return Contestant(f"bare forward, {_rows(size)}", run, hf_model.get_input_embeddings())


def bare_hooked(model: Any, workload: Workload, size: int) -> Contestant:
    """A HookedTransformer's own forward, which stops before the unembedding; nothing read."""
    batches = batches_of(workload, size)

    @torch.no_grad()
    def run() -> None:
        for _, batch in batches:
            model(batch.tokens, attention_mask=batch.attention_mask.long(), stop_at_layer=model.cfg.n_layers)

    return Contestant(f"its own forward, {_rows(size)}", run, model.embed)


def reference_loop(hf_model: Any, workload: Workload) -> Contestant:
    """As the paper's reference code does it: a row at a time, all hidden states, LM head and autograd on.

    Its token means of the prompt are left out, which is to its advantage.
    """

    def run() -> Float[Tensor, "row layer d_model"]:
        means: list[list[Tensor]] = []
        for row in workload.rows:
            outputs = hf_model(input_ids=torch.tensor([row.prompt + row.response]), output_hidden_states=True)
            n_prompt = len(row.prompt)
            means.append([state[:, n_prompt:].mean(dim=1).detach().cpu() for state in outputs.hidden_states])
            del outputs
        # The first is the embedding, the last is behind the final norm: neither is a block's output.
        return torch.stack([torch.cat(states[1:-1]) for states in means])

    return Contestant(f"reference loop, {_rows(1)}", run, hf_model.get_input_embeddings())


def with_stream_means(model: Model, workload: Workload) -> Contestant:
    """`persona_lens.activations.means.stream_means`, which chooses its batches itself."""

    def run() -> Float[Tensor, "row layer d_model"]:
        return _in_order([(batch.rows, batch.means[:, 1:]) for batch in stream_means(model, workload.rows)])

    return Contestant("stream_means", run, _embedding(model))


def with_mean_activations(model: Model, workload: Workload, size: int, *, sort: bool = True) -> Contestant:
    """`persona_lens.mean_activations` on the same padded batches that the bare forward runs."""
    batches = batches_of(workload, size, sort=sort)

    def run() -> Float[Tensor, "row layer d_model"]:
        return _in_order([(rows, mean_activations(model, batch)) for rows, batch in batches])

    return Contestant(f"mean_activations, {_rows(size)}{'' if sort else ', unsorted'}", run, _embedding(model))


def with_head(model: Model, workload: Workload, size: int) -> Contestant:
    """What `mean_activations` does, with the logits of every position computed as well."""
    batches = batches_of(workload, size)

    def run() -> Float[Tensor, "row layer d_model"]:
        found: list[tuple[list[int], Tensor]] = []
        for rows, batch in batches:
            with pooled_residuals(model, pool_weights(batch, ["response_mean"])) as sums:
                forward(model, batch.tokens, batch.attention_mask, last_logits=None)
            found.append((rows, torch.stack([total[0] for total, _ in sums[1:]], dim=1)))
        return _in_order(found)

    return Contestant(f"mean_activations, {_rows(size)}, with head", run, _embedding(model))


def _in_order(found: Sequence[tuple[list[int], Tensor]]) -> Float[Tensor, "row layer d_model"]:
    """Batches of row means put back into the order of the rows."""
    order = torch.tensor([row for rows, _ in found for row in rows])
    return torch.cat([means for _, means in found])[order.argsort()]


def _rows(size: int) -> str:
    return f"{size} row{'s' if size > 1 else ''}"


def _embedding(model: Any) -> torch.nn.Module:
    return model.original_model.get_input_embeddings() if is_bridge(model) else model.embed
