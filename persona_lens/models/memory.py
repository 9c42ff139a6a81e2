"""How many tokens a forward pass takes at a time, and what to do where that was too many.

Knows nothing about what is run.
"""

import torch

from persona_lens.models.structure import Model, model_device


def default_token_budget(model: Model) -> int:
    """Padded tokens of a batch that are worth running together, before memory has its say.

    On a CPU nothing was won beyond 512 (benchmarks/README.md); for accelerators 16,384 is a guess, measured on none.
    """
    return 512 if model_device(model).type == "cpu" else 16384


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on an accelerator or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release_memory(model: Model) -> None:
    """Give cached blocks back, so that smaller ones can be cut from them."""
    if model_device(model).type == "cuda":
        torch.cuda.empty_cache()
