"""Which tokens of a forward pass an intervention acts on.

`all`; `prompt`, the prompt's tokens; `response`, the last token of the prompt and every token after it, as in the
paper's reference code (arXiv:2507.21509, section 3.2): those from which the response is predicted. The boundary comes
from who runs the pass, from given prompt lengths, or from the key-value cache: an empty one is the prompt's pass, and
with anything in it every new token is of the response. It is never guessed from shapes.
Knows nothing about what an intervention does there.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Int
from torch import Tensor

from persona_lens.models import CurrentPass, KnownPass

NamedPositions = Literal["all", "response", "prompt"]
At = NamedPositions | Bool[Tensor, "batch pos"]


def check_positions(at: At, prompt_lengths: Sequence[int] | None) -> None:
    """Raise ValueError for positions that do not exist or contradict each other."""
    if isinstance(at, str):
        if at not in get_args(NamedPositions):
            raise ValueError(f"at is one of {', '.join(get_args(NamedPositions))}, or a mask [batch, pos]; got {at!r}.")
    elif not isinstance(at, Tensor) or at.dtype != torch.bool or at.ndim != 2:
        shape = f"{at.dtype} {list(at.shape)}" if isinstance(at, Tensor) else type(at).__name__
        raise ValueError(f"A mask of positions is a bool tensor [batch, pos], got {shape}.")
    if prompt_lengths is not None:
        if not isinstance(at, str) or at == "all":
            raise ValueError("prompt_lengths goes with at='response' or at='prompt', which need to know the boundary.")
        if any(length < 1 for length in prompt_lengths):
            raise ValueError(f"Every prompt has at least one token, got prompt_lengths of {list(prompt_lengths)}.")


def positions_of(
    at: At,
    shape: tuple[int, int],
    *,
    current: CurrentPass,
    known: KnownPass | None,
    prompt_lengths: Sequence[int] | None = None,
) -> Bool[Tensor, "batch pos"] | None:
    """The positions of a pass over `shape` (batch, pos) tokens; None for all of them.

    Raises ValueError where they cannot be known or do not fit the pass.
    """
    if isinstance(at, Tensor):
        return _fitting(at, shape)
    if at == "all":
        return None
    told = None if known is None else getattr(known, at)
    if told is not None:
        return _fitting(told, shape)
    if prompt_lengths is not None:
        return _by_length(at, shape, current, prompt_lengths)
    if current.cached is None:
        raise ValueError(
            f"at={at!r} cannot tell the prompt from the response in a forward pass without a key-value cache: "
            "pass prompt_lengths= (tokens of each prompt) or a mask, or generate with the cache on."
        )
    if current.cached > 0:
        return None if at == "response" else torch.zeros(shape, dtype=torch.bool)
    if at == "prompt":
        return None
    return _last_attended(shape, current.mask)


def _fitting(mask: Bool[Tensor, "batch pos"], shape: tuple[int, int]) -> Bool[Tensor, "batch pos"]:
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"The mask of positions is {list(mask.shape)} and the forward pass {list(shape)} in [batch, pos]: "
            "pass a mask for this pass, or at='response', which follows generation token by token."
        )
    return mask


def _last_attended(shape: tuple[int, int], mask: Tensor | None) -> Bool[Tensor, "batch pos"]:
    order = torch.arange(shape[1])
    if mask is None:
        return (order == shape[1] - 1).expand(shape)
    last = reduce(torch.where(mask.cpu()[:, -shape[1] :], order, -1), "batch pos -> batch 1", "max")
    return order == last


def _by_length(
    at: NamedPositions, shape: tuple[int, int], current: CurrentPass, prompt_lengths: Sequence[int]
) -> Bool[Tensor, "batch pos"]:
    """By counting attended tokens from the start of each row, cached ones included."""
    if len(prompt_lengths) != shape[0]:
        raise ValueError(f"{len(prompt_lengths)} prompt_lengths meet a batch of {shape[0]}: pass one for each row.")
    lengths: Int[Tensor, "batch 1"] = rearrange(torch.tensor(list(prompt_lengths)), "batch -> batch 1")
    if current.mask is None:
        index = ((current.cached or 0) + torch.arange(shape[1])).expand(shape)
        attended = torch.ones(shape, dtype=torch.bool)
    else:
        seen = current.mask.cpu()
        index = (seen.long().cumsum(dim=1) - 1)[:, -shape[1] :]
        attended = seen[:, -shape[1] :]
    return attended & (index < lengths if at == "prompt" else index >= lengths - 1)
