"""How many tokens to run at a time, and how to go on after running out of memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from persona_lens.models.structure import Model, model_device

Output = TypeVar("Output")

# Words of torch for the CPU and for accelerators, and of the libraries behind them.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "cublas_status_alloc_failed")


class DoesNotFit(MemoryError):
    """A single row does not fit into memory."""


def default_token_budget(model: Model) -> int:
    """The number of padded tokens in a batch, unless memory runs out.

    On a CPU more than 512 was no faster (benchmarks/README.md); 16,384 for accelerators is a guess.
    """
    return 512 if model_device(model).type == "cpu" else 16384


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, and a smaller batch may fit."""
    if isinstance(error, DoesNotFit):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def does_not_fit(model: Model, n_tokens: int) -> DoesNotFit:
    """The error for a row that does not fit by itself."""
    return DoesNotFit(
        f"A row of {n_tokens} tokens does not fit into the memory of {model_device(model)} by itself: shorten it, load "
        "the model with a narrower dtype (bfloat16), or free memory."
    )


def backing_off(
    model: Model,
    waiting: set[int],
    lengths: Sequence[int],
    token_budget: int,
    attempt: Callable[[list[int], int], Iterator[Output]],
) -> Iterator[Output]:
    """Yield what `attempt(rows, budget)` yields; out of memory, the rows still waiting run with half the budget.

    An attempt removes each finished row from `waiting`. Raises DoesNotFit if a single row does not fit.
    """
    budget = token_budget
    while waiting:
        try:
            yield from attempt(sorted(waiting), budget)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if budget <= 1:  # every batch was a single row already
                raise does_not_fit(model, max(lengths[row] for row in waiting)) from error
            budget //= 2
        else:
            return
        release_memory(model)


def release_memory(model: Model) -> None:
    """Return the allocator's cached blocks, so that smaller ones can be cut from them."""
    if model_device(model).type == "cuda":
        torch.cuda.empty_cache()
