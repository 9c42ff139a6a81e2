"""Which rows run together in a forward pass, and prompts that several rows share, each of which runs once.

Rollouts of one question, and one rollout judged under many system prompts, repeat their prompts; here a prompt runs
once and each of its continuations goes on from a copy of its keys and values, as exactly as if it had been run whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_lens.chat.batches import ChatTokens
from persona_lens.models.forward import Past, forward
from persona_lens.models.pass_context import KnownPass
from persona_lens.models.structure import Model

PASS_SHARE = 16
"""What a forward pass costs beside its tokens: as much as this part of the budget.

On a CPU, whose budget is 512, some 27 tokens were measured; for accelerators it is a guess.
"""


def length_sorted_batches(lengths: Sequence[int], token_budget: int = 4096) -> Iterator[list[int]]:
    """Indices of rows, longest first, in batches of at most `token_budget` padded tokens (one row at the least).

    The sorted rows are cut where padding and passes together cost the least, a pass being counted as
    `token_budget / PASS_SHARE` tokens (dynamic programming over the end of each batch).
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    widths = [max(1, lengths[index]) for index in order]
    # cost[n]: the least cost of running the first n rows; begin[n]: where the last of their batches begins.
    cost, begin = np.full(len(order) + 1, np.inf), np.zeros(len(order) + 1, dtype=int)
    cost[0] = 0.0
    for start, width in enumerate(widths):
        most = min(max(1, token_budget // width), len(order) - start)
        costs = cost[start] + token_budget / PASS_SHARE + width * np.arange(1, most + 1)
        ends = slice(start + 1, start + most + 1)
        better = costs <= cost[ends]  # of equal cuts the one with the largest batches first
        cost[ends][better], begin[ends][better] = costs[better], start
    edges = [len(order)]
    while edges[-1] > 0:
        edges.append(int(begin[edges[-1]]))
    for start, stop in pairwise(reversed(edges)):
        yield order[start:stop]


class TokenCount(NamedTuple):
    """Tokens that a plan runs, and that it would run without sharing; padding not counted."""

    shared: int
    unshared: int


@dataclass
class PrefixBatch:
    """A batch of prompts, or of continuations of prompts that ran before it; `run` it before asking for the next.

    `rows` are indices into the rows passed to `prefix_batches` (continuations), or into `unique_prompts` (prompts).
    """

    model: Model
    rows: list[int]
    is_prompt: bool
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    past: Past | None = None
    grown: Past | None = field(default=None, repr=False)

    def run(self, last_logits: int | None = 0) -> Float[Tensor, "batch kept d_vocab"] | None:
        """Run the batch; logits of the last `last_logits` positions (None: of all, 0: none)."""
        logits, grown = forward(
            self.model,
            self.tokens,
            self.mask,
            past=self.past,
            keep_past=self.is_prompt,
            last_logits=last_logits,
            known=self._known(),
        )
        # Nothing follows a continuation: its keys and values must not live on while the next ones are copied.
        self.past, self.grown = None, grown if self.is_prompt else None
        return logits

    def _known(self) -> KnownPass:
        """A prompt serves several rows, and its last token, which stands last, predicts their first one."""
        if not self.is_prompt:
            nowhere = torch.zeros_like(self.mask)
            return KnownPass(rows=torch.tensor(self.rows), prompt=nowhere, response=self.mask)
        last = torch.zeros_like(self.mask)
        last[:, -1] = True
        return KnownPass(prompt=self.mask, response=last)


def unique_prompts(rows: Sequence[ChatTokens]) -> list[tuple[int, ...]]:
    """The distinct prompts of the rows, in the order of their first use."""
    return list(dict.fromkeys(row.prompt for row in rows))


def count_tokens(rows: Sequence[ChatTokens]) -> TokenCount:
    """What running the rows costs, with and without sharing their prompts."""
    responses = sum(len(row.response) for row in rows)
    return TokenCount(
        shared=sum(map(len, unique_prompts(rows))) + responses,
        unshared=sum(len(row.prompt) for row in rows) + responses,
    )


def prefix_batches(
    model: Model, rows: Sequence[ChatTokens], *, token_budget: int = 4096, cache_tokens: int = 8192
) -> Iterator[PrefixBatch]:
    """Batches that run every prompt once, each followed by the continuations that go on from it.

    Prompts are padded on the left, so that their last token stands last; continuations are sorted by length across the
    prompts of a group and padded on the right. At most `cache_tokens` padded prompt tokens are kept at a time, and the
    copies of a continuation batch stay within as many. Rows without a response appear in no continuation batch.
    """
    prompts = unique_prompts(rows)
    place = {prompt: index for index, prompt in enumerate(prompts)}
    followers: list[list[int]] = [[] for _ in prompts]
    for index, row in enumerate(rows):
        if row.response:
            followers[place[row.prompt]].append(index)

    for group in length_sorted_batches([len(prompt) for prompt in prompts], min(token_budget, cache_tokens)):
        batch = prompt_batch(model, [prompts[index] for index in group], group)
        yield batch
        if batch.grown is None:
            raise RuntimeError("A batch of prompts must be run before its continuations can be asked for.")
        position = {prompt: index for index, prompt in enumerate(group)}
        members = [index for prompt in group for index in followers[prompt]]
        # A continuation's row costs its own tokens in compute and its prompt's in copied keys and values.
        width = batch.tokens.shape[1]
        copies = max(1, cache_tokens // width)
        for chunk in length_sorted_batches([len(rows[index].response) for index in members], token_budget):
            for start in range(0, len(chunk), copies):
                chunk_rows = [members[index] for index in chunk[start : start + copies]]
                origins = torch.tensor([position[place[rows[index].prompt]] for index in chunk_rows])
                tokens, mask = pad([rows[index].response for index in chunk_rows], left=False)
                yield PrefixBatch(model, chunk_rows, False, tokens, mask, past=batch.grown.select(origins))


def prompt_batch(model: Model, prompts: Sequence[tuple[int, ...]], indices: list[int]) -> PrefixBatch:
    """A batch of prompts, padded on the left so that the last token of each stands last."""
    tokens, mask = pad(prompts, left=True)
    return PrefixBatch(model, indices, True, tokens, mask)


def pad(
    sequences: Sequence[tuple[int, ...]], *, left: bool
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Sequences padded to one length, and the mask that is False on the padding."""
    width = max(len(sequence) for sequence in sequences)
    tokens = torch.zeros((len(sequences), width), dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for index, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        tokens[index, place] = torch.tensor(sequence)
        mask[index, place] = True
    return tokens, mask
