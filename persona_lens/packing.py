"""Which rows run together in a forward pass: a matter of their lengths alone.

Knows nothing about what rows are.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

PASS_SHARE = 16
"""What a forward pass costs beside its tokens: as much as this part of the budget.

On a CPU, whose budget is 512, some 27 tokens were measured; for accelerators it is a guess.
"""


def length_sorted_batches(lengths: Sequence[int], token_budget: int = 4096) -> Iterator[list[int]]:
    """Indices of rows, longest first, in batches of at most `token_budget` padded tokens (one row at the least).

    Neighbours in length share a batch, cut where padding and passes cost the least between them: no other cut of the
    sorted rows runs fewer tokens, a pass counted as `token_budget / PASS_SHARE` of them.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    widths = [max(1, lengths[index]) for index in order]
    # The least cost of running the first so many rows, and where the last of their batches begins.
    cost, begin = np.full(len(order) + 1, np.inf), np.zeros(len(order) + 1, dtype=int)
    cost[0] = 0.0
    for start, width in enumerate(widths):
        most = min(max(1, token_budget // width), len(order) - start)
        found = cost[start] + token_budget / PASS_SHARE + width * np.arange(1, most + 1)
        ends = slice(start + 1, start + most + 1)
        better = found <= cost[ends]  # of equal cuts the one with the largest batches first
        cost[ends][better], begin[ends][better] = found[better], start
    edges = [len(order)]
    while edges[-1] > 0:
        edges.append(int(begin[edges[-1]]))
    for start, stop in pairwise(reversed(edges)):
        yield order[start:stop]
