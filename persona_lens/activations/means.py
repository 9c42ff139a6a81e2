"""Mean residual-stream activations, and token projections, read in hooks at every layer.

Each hook reduces its layer to one `[batch, d_model]` mean per pool as the forward pass runs, so memory does not grow
with sequence length; nothing is unembedded and no gradient is kept (arXiv:2507.21509, section 2.2).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from persona_lens.activations.prefixes import length_sorted_batches, prefix_batches
from persona_lens.chat.batches import ChatBatch, ChatTokens, collate, fit_context
from persona_lens.models.forward import forward
from persona_lens.models.memory import backing_off, default_token_budget
from persona_lens.models.pass_context import KnownPass
from persona_lens.models.scopes import Hook, hooked
from persona_lens.models.structure import Model, residual_points
from persona_lens.vectors.persona_vector import PersonaVector, Position, units_of


@dataclass(frozen=True)
class PooledResiduals:
    """Means of the residual stream over pools of tokens. Row 0 of `stream` is the embedding, row l + 1 is layer l."""

    means: Float[Tensor, "pool batch stream d_model"]
    norms: Float[Tensor, "pool batch stream"]
    """Mean Euclidean norm of the pooled tokens' residual vectors."""


@contextmanager
def pooled_residuals(
    model: Model, weights: Float[Tensor, "pool batch pos"]
) -> Iterator[list[tuple[Float[Tensor, "pool batch d_model"], Float[Tensor, "pool batch"]]]]:
    """While open, each forward pass leaves the weighted sum of every stream row's tokens in the yielded list.

    A pool whose weights sum to 1 gives a mean. Sums are float32, or float64 where the model is: bfloat16 sums of more
    than 256 tokens lose the low bits that a difference in means lives on.
    """
    sums: list[tuple[Tensor, Tensor]] = []

    def pool(_module: object, _inputs: object, resid: Tensor) -> None:
        resid = resid.to(torch.promote_types(resid.dtype, torch.float32))
        # First in its dtype, then to its device: some accelerators have no float64.
        weight = weights.to(resid.dtype).to(resid.device)
        total = einsum(resid, weight, "batch pos d_model, pool batch pos -> pool batch d_model")
        norm = einsum(resid.norm(dim=-1), weight, "batch pos, pool batch pos -> pool batch")
        sums.append((total, norm))

    with hooked(model, [Hook(point, pool) for point in residual_points(model)]):
        yield sums


@dataclass
class Projections:
    """What the last forward pass projected on some vectors, layer by layer as it ran."""

    vectors: tuple[PersonaVector, ...]
    by_layer: dict[int, Float[Tensor, "batch pos vector"]] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """The layers that are read, ascending; what lies above the last of them need not run."""
        return sorted({vector.layer for vector in self.vectors})

    def read(self) -> Float[Tensor, "batch pos vector"]:
        """Scalar projections on the unit vectors, in their order, on the CPU, float32 or the model's wider dtype."""
        columns: dict[int, Iterator[Tensor]] = {
            layer: iter(self.by_layer[layer].cpu().unbind(dim=-1)) for layer in self.layers
        }
        return torch.stack([next(columns[vector.layer]) for vector in self.vectors], dim=-1)


@contextmanager
def projected_residuals(
    model: Model, vectors: Sequence[PersonaVector], *, allow_other_model: bool = False
) -> Iterator[Projections]:
    """While open, each forward pass leaves every token's projection on the vectors in the yielded value.

    Interventions that are attached already are seen. Source: arXiv:2507.21509, section 3.3.
    Raises ValueError where a vector does not belong to the model.
    """
    check_vectors(model, vectors, allow_other_model=allow_other_model)
    with attached_projections(model, vectors) as projections:
        yield projections


def check_vectors(model: Model, vectors: Sequence[PersonaVector], *, allow_other_model: bool = False) -> None:
    """Raise a ValueError where there are no vectors, or one does not belong to the model."""
    if not vectors:
        raise ValueError("There is nothing to project on: pass at least one vector.")
    for vector in vectors:
        vector.check(model, allow_other_model=allow_other_model)


@contextmanager
def attached_projections(model: Model, vectors: Sequence[PersonaVector]) -> Iterator[Projections]:
    """`projected_residuals` of vectors that were checked before: the check reads every weight, once is enough."""
    projections = Projections(tuple(vectors))
    points = residual_points(model)
    hooks = []
    for layer in projections.layers:
        # Moved in the dtype of the activations, as the first pass shows it: some accelerators have no float64.
        units = units_of([vector for vector in vectors if vector.layer == layer])
        placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

        def project(
            _: object, __: object, resid: Tensor, layer: int = layer, units: Tensor = units, placed: Any = placed
        ) -> None:
            wide = resid.to(torch.promote_types(resid.dtype, torch.float32))
            key = (wide.device, wide.dtype)
            if key not in placed:
                placed[key] = units.to(wide.dtype).to(wide.device)
            pattern = "batch pos d_model, vector d_model -> batch pos vector"
            projections.by_layer[layer] = einsum(wide, placed[key], pattern)

        hooks.append(Hook(points[layer + 1], project))
    with hooked(model, hooks):
        yield projections


class NotFinite(ValueError):
    """Activations that hold NaN or infinity, by the row among those passed and the layer (-1: the embedding)."""

    def __init__(self, row: int, layer: int):
        where = "the embedding" if layer < 0 else f"layer {layer}"
        remedy = "Load it with a wider dtype (float32), or check its weights."
        super().__init__(f"The model's activations are not finite at {where}, in row {row}. {remedy}")
        self.row, self.layer = row, layer


def refuse_not_finite(means: Float[Tensor, "batch stream d_model"], rows: Sequence[int]) -> None:
    """Raise `NotFinite`, by the names `rows`, for the lowest layer that is not finite: those above inherit it."""
    finite = reduce(means.isfinite(), "batch stream d_model -> stream batch", "all")
    if not bool(finite.all()):
        stream = int((~finite).nonzero()[0, 0])
        raise NotFinite(min(rows[row] for row in (~finite[stream]).nonzero()[:, 0].tolist()), stream - 1)


def _stack(sums: Sequence[tuple[Tensor, Tensor]], rows: Sequence[int]) -> PooledResiduals:
    # Stacked where they are, so that a batch is one copy from an accelerator, and a wait for it, instead of sixty.
    device = sums[-1][0].device
    means = torch.stack([total.to(device) for total, _ in sums]).cpu().float()
    norms = torch.stack([norm.to(device) for _, norm in sums]).cpu().float()
    pooled = PooledResiduals(
        means=rearrange(means, "stream pool batch d_model -> pool batch stream d_model"),
        norms=rearrange(norms, "stream pool batch -> pool batch stream"),
    )
    for means in pooled.means:
        refuse_not_finite(means, rows)
    return pooled


def pool_weights(batch: ChatBatch, positions: Sequence[Position]) -> Float[Tensor, "pool batch pos"]:
    """Averaging weights of each position over a batch: uniform over its tokens, summing to 1 a row.

    `prompt_mean` is over the attended tokens before the response, `prompt_last` on the last of them. Raises ValueError
    for a row without such tokens: an empty response has no mean.
    """
    before = batch.attention_mask & (batch.response_mask.long().cumsum(dim=1) == 0)
    prompt = before if batch.prompt_mask is None else batch.prompt_mask
    order = torch.arange(batch.tokens.shape[1])
    last = prompt & (order == reduce(torch.where(prompt, order, -1), "batch pos -> batch 1", "max"))
    masks = {"response_mean": batch.response_mask, "prompt_mean": prompt, "prompt_last": last}
    pools = torch.stack([masks[position] for position in positions]).double()
    counts = reduce(pools, "pool batch pos -> pool batch 1", "sum")
    if bool((counts == 0).any()):
        pool, row, _ = (counts == 0).nonzero()[0].tolist()
        raise ValueError(
            f"Row {row} has no tokens for {positions[pool]}: leave empty rows out, they are never averaged."
        )
    return pools / counts


def mean_activations(
    model: Model, batch: ChatBatch, *, position: Position = "response_mean"
) -> Float[Tensor, "batch layer d_model"]:
    """Mean residual stream over each row's response (or prompt), at every layer, in one forward pass.

    Row `l` is the output of block `l`; the result is float32 on the CPU. Interventions that are attached to the model
    act and are seen. Raises ValueError for rows without tokens at `position` and for activations that are not finite.
    Source: arXiv:2507.21509, section 2.2.
    """
    if position not in get_args(Position):
        raise ValueError(f"position is one of {get_args(Position)}, got {position!r}.")
    with pooled_residuals(model, pool_weights(batch, [position])) as sums:
        forward(model, batch.tokens, batch.attention_mask, known=_known(batch))
    return _stack(sums, range(len(batch.tokens))).means[0, :, 1:]


def _known(batch: ChatBatch) -> KnownPass | None:
    """The batch's own boundary, where it has one; its averaged tokens alone need not begin where the response does."""
    if batch.prompt_mask is None:
        return None
    order = torch.arange(batch.tokens.shape[1])
    last = reduce(torch.where(batch.prompt_mask, order, -1), "batch pos -> batch 1", "max")
    response = batch.attention_mask & ~batch.prompt_mask | (order == last)
    return KnownPass(rows=torch.arange(len(batch.tokens)), prompt=batch.prompt_mask, response=response)


@dataclass(frozen=True)
class RowMeans:
    """Means of some of the rows passed to `stream_means`; `rows` are their indices, in the order of the batch."""

    rows: list[int]
    means: Float[Tensor, "batch stream d_model"]
    norms: Float[Tensor, "batch stream"]


def stream_means(
    model: Model,
    rows: Sequence[ChatTokens],
    *,
    position: Position = "response_mean",
    token_budget: int | None = None,
) -> Iterator[RowMeans]:
    """Means of any number of rows, batch by batch; a prompt that several rows have is run once.

    Every row comes out exactly once, unless its averaged tokens are none (an empty response), which never comes out.
    `stream` row 0 is the embedding. `token_budget` is how many padded tokens run at a time, by default what suits the
    model's device; where memory does not suffice for it, the rows that are left run with half of it. Rows longer than
    the context are an error (`chat.fit_context` cuts them), and so is one that does not fit the memory alone.
    """
    rows, _ = fit_context(rows, int(model.cfg.n_ctx))
    budget = default_token_budget(model) if token_budget is None else token_budget
    waiting = {index for index, row in enumerate(rows) if position != "response_mean" or row.n_averaged > 0}

    def attempt(left: list[int], budget: int) -> Iterator[RowMeans]:
        for means in _means_of(model, rows, left, position, budget):
            waiting.difference_update(means.rows)
            yield means

    yield from backing_off(model, waiting, [len(row) for row in rows], budget, attempt)


def _means_of(
    model: Model, rows: Sequence[ChatTokens], indices: Sequence[int], position: Position, budget: int
) -> Iterator[RowMeans]:
    """Means of the rows with these indices; a row whose prompt no other row has runs whole, in one pass."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index in indices:
        by_prompt.setdefault(rows[index].prompt, []).append(index)
    if position != "response_mean":
        yield from _whole_means(
            model, [ChatTokens(prompt) for prompt in by_prompt], list(by_prompt.values()), position, budget
        )
        return
    alone = [owners for owners in by_prompt.values() if len(owners) == 1]
    yield from _whole_means(model, [rows[owner] for (owner,) in alone], alone, position, budget)
    shared = [index for owners in by_prompt.values() if len(owners) > 1 for index in owners]
    yield from _continued_means(model, rows, shared, budget)


def _whole_means(
    model: Model, chats: Sequence[ChatTokens], owners: Sequence[Sequence[int]], position: Position, budget: int
) -> Iterator[RowMeans]:
    """Each chat in one pass from its first token to its last; its means are those of all its owners."""
    for chunk in length_sorted_batches([len(chat) for chat in chats], budget):
        batch = collate([chats[index] for index in chunk])
        known = _known(batch)
        assert known is not None
        serves_one = all(len(owners[index]) == 1 for index in chunk)
        known = replace(known, rows=torch.tensor([owners[index][0] for index in chunk]) if serves_one else None)
        with pooled_residuals(model, pool_weights(batch, [position])) as sums:
            forward(model, batch.tokens, batch.attention_mask, known=known)
        pooled = _stack(sums, [owners[index][0] for index in chunk])
        places = torch.tensor([place for place, index in enumerate(chunk) for _ in owners[index]])
        yield RowMeans(
            [row for index in chunk for row in owners[index]], pooled.means[0, places], pooled.norms[0, places]
        )


def _continued_means(
    model: Model, rows: Sequence[ChatTokens], indices: Sequence[int], budget: int
) -> Iterator[RowMeans]:
    """Responses that go on from their prompts, each of which runs once."""
    for batch in prefix_batches(model, [rows[index] for index in indices], token_budget=budget):
        if batch.is_prompt:
            batch.run()
            continue
        batch.rows = [indices[place] for place in batch.rows]
        weights = batch.mask.double()
        for place, row in enumerate(batch.rows):
            weights[place, : rows[row].skip] = 0
        weights = weights / reduce(weights, "batch pos -> batch 1", "sum")
        with pooled_residuals(model, rearrange(weights, "batch pos -> 1 batch pos")) as sums:
            batch.run()
        pooled = _stack(sums, batch.rows)
        yield RowMeans(batch.rows, pooled.means[0], pooled.norms[0])
