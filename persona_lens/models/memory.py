"""How many tokens a forward pass takes at a time, and what to do where that was too many.

Knows nothing about what is run.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from persona_lens.models.structure import Model, model_device

Found = TypeVar("Found")

# As torch says it of a CPU, of accelerators, and of the libraries behind them.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "cublas_status_alloc_failed")


class DoesNotFit(MemoryError):
    """A row for which memory does not suffice by itself: nothing smaller is left to try."""


def default_token_budget(model: Model) -> int:
    """Padded tokens of a batch that are worth running together, before memory has its say.

    On a CPU nothing was won beyond 512 (benchmarks/README.md); for accelerators 16,384 is a guess, measured on none.
    """
    return 512 if model_device(model).type == "cpu" else 16384


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on an accelerator or on the CPU, and less may do."""
    if isinstance(error, DoesNotFit):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def does_not_fit(model: Model, n_tokens: int) -> DoesNotFit:
    """The error, in one sentence, of a row that does not fit by itself."""
    return DoesNotFit(
        f"A row of {n_tokens} tokens does not fit into the memory of {model_device(model)} by itself: shorten it, load "
        "the model with a narrower dtype (bfloat16), or free memory."
    )


def backing_off(
    model: Model,
    waiting: set[int],
    lengths: Sequence[int],
    token_budget: int,
    attempt: Callable[[list[int], int], Iterator[Found]],
) -> Iterator[Found]:
    """What `attempt(rows, budget)` yields; where memory does not suffice, the rows still waiting run with half of it.

    An attempt takes a row out of `waiting` once it is done. Raises DoesNotFit where a row fails alone.
    """
    budget = token_budget
    while waiting:
        try:
            yield from attempt(sorted(waiting), budget)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if budget <= 1:  # then a batch is one row
                raise does_not_fit(model, max(lengths[row] for row in waiting)) from error
            budget //= 2
        else:
            return
        release_memory(model)


def release_memory(model: Model) -> None:
    """Give cached blocks back, so that smaller ones can be cut from them."""
    if model_device(model).type == "cuda":
        torch.cuda.empty_cache()
