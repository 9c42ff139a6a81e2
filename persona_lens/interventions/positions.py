"""Which tokens of a forward pass an intervention acts on.

`all`; `prompt`, the prompt's tokens; `response`, the last token of the prompt and every token after it, as in the
paper's reference code (arXiv:2507.21509, section 3.2): those from which the response is predicted.

Where the prompt ends is known from one of these, in this order; anything else is an error, never a guess:
1. what the caller of the pass announced (our own loops);
2. `prompt_lengths`, where the caller passed them;
3. the prompt of a running Hugging Face `generate`: the pass that reaches its last token ends it;
4. the key-value cache: a pass onto an empty one is the prompt's, and a single token onto a filled one belongs to the
   response. Several tokens onto a filled one may be either.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Int
from torch import Tensor

from persona_lens.models.pass_context import CurrentPass, KnownPass

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
    announced = None if known is None else getattr(known, at)
    if announced is not None:
        return _fitting(announced, shape)
    if prompt_lengths is not None:
        return _by_length(at, shape, current, prompt_lengths)
    if current.cached is None:
        raise ValueError(
            f"at={at!r} cannot tell the prompt from the response in a forward pass without a key-value cache: "
            "pass prompt_lengths= (tokens of each prompt) or a mask, or generate with the cache on."
        )
    if _is_response(at, shape[1], current, current.cached):
        return None if at == "response" else torch.zeros(shape, dtype=torch.bool)
    if at == "prompt":
        return None
    if current.given is not None:
        # `generate` predicts from the last column, wherever padding is.
        ends = current.cached + shape[1] == current.given.prompt_width
        return _last_column(shape) if ends else torch.zeros(shape, dtype=torch.bool)
    return _last_attended(shape, _padding(at, shape, current))


def _is_response(at: NamedPositions, n_new: int, current: CurrentPass, cached: int) -> bool:
    """Whether a pass with a cache is of the response rather than of the prompt, perhaps its last token.

    Raises ValueError where it may hold tokens of both, or cannot be told.
    """
    given = current.given
    if given is None:
        if cached > 0 and n_new > 1:
            raise ValueError(
                f"at={at!r} cannot tell the prompt from the response where {n_new} tokens at once follow {cached} in a "
                f"key-value cache. {_REMEDY}"
            )
        return cached > 0
    width = given.prompt_width
    if width is None:
        raise ValueError(
            f"at={at!r} cannot tell how long the prompt of this `generate` is (one inside another `generate`, or "
            f"without a mask of its whole prompt). {_REMEDY}"
        )
    if (cached + n_new < width and given.in_pieces) or cached + n_new == width:
        return False
    if n_new == 1 and cached >= width:
        return True
    raise ValueError(
        f"at={at!r} cannot tell the prompt from the response: `generate` was given a prompt of {width} tokens, and "
        f"this pass runs {n_new} at once after {cached} cached ones (guessed tokens of assisted decoding, virtual "
        f"tokens of an adapter, or a second prompt). {_REMEDY}"
    )


_REMEDY = (
    "Pass prompt_lengths= (all tokens of each row up to where its response begins, cached ones too, padding not), or a "
    "mask of positions."
)


def _fitting(mask: Bool[Tensor, "batch pos"], shape: tuple[int, int]) -> Bool[Tensor, "batch pos"]:
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"The mask of positions is {list(mask.shape)} and the forward pass {list(shape)} in [batch, pos]: "
            "pass a mask for this pass, or at='response', which follows generation token by token."
        )
    return mask


def _last_column(shape: tuple[int, int]) -> Bool[Tensor, "batch pos"]:
    return (torch.arange(shape[1]) == shape[1] - 1).expand(shape)


def _last_attended(shape: tuple[int, int], seen: Bool[Tensor, "batch seen"] | None) -> Bool[Tensor, "batch pos"]:
    if seen is None:
        return _last_column(shape)
    order = torch.arange(shape[1])
    last = reduce(torch.where(seen[:, -shape[1] :], order, -1), "batch pos -> batch 1", "max")
    return order == last


def _padding(at: NamedPositions, shape: tuple[int, int], current: CurrentPass) -> Bool[Tensor, "batch seen"] | None:
    """False on padding, cached and new; None where there is none. Raises ValueError where it cannot be known."""
    if not current.shows_padding:
        raise ValueError(
            f"at={at!r} cannot tell padding from this pass's attention mask, which says which token attends to which: "
            "give the pass a mask [batch, pos], or pass a mask of positions as at=."
        )
    if current.mask is None:
        return None
    width = (current.cached or 0) + shape[1]
    if current.mask.shape[1] != width:
        raise ValueError(
            f"at={at!r} cannot tell padding: the attention mask covers {current.mask.shape[1]} tokens, and cached and "
            f"new ones are {width}. Pass a mask of them all."
        )
    return current.mask.cpu()


def _by_length(
    at: NamedPositions, shape: tuple[int, int], current: CurrentPass, prompt_lengths: Sequence[int]
) -> Bool[Tensor, "batch pos"]:
    """By counting attended tokens from the start of each row, cached ones included."""
    if len(prompt_lengths) != shape[0]:
        raise ValueError(f"{len(prompt_lengths)} prompt_lengths meet a batch of {shape[0]}: pass one for each row.")
    lengths: Int[Tensor, "batch 1"] = rearrange(torch.tensor(list(prompt_lengths)), "batch -> batch 1")
    seen = _padding(at, shape, current)
    if seen is None:
        index = ((current.cached or 0) + torch.arange(shape[1])).expand(shape)
        attended = torch.ones(shape, dtype=torch.bool)
    else:
        index = (seen.long().cumsum(dim=1) - 1)[:, -shape[1] :]
        attended = seen[:, -shape[1] :]
    return attended & (index < lengths if at == "prompt" else index >= lengths - 1)
