"""What a running Hugging Face `generate` was given: how long its prompt is, and whether it runs it in pieces.

Inside a forward pass nothing tells a piece of a prompt from a whole one, or a prompt from a prompt with guessed tokens
behind it (`prefill_chunk_size`, a prefix that is cached already, assisted decoding). `generate` knows, and its call is
on the stack of the hook that asks. Only its parameters are read there. Nothing is wrapped or replaced, so nothing can
be left behind, and passes in other threads, which have stacks of their own, are not confused with it.
"""

import inspect
import sys
from functools import cache
from types import CodeType
from typing import Any, NamedTuple, cast

from torch import Tensor, nn


class GivenToGenerate(NamedTuple):
    """What a call of `generate` says about its prompt."""

    prompt_width: int | None
    """Its tokens, padding and cached ones included; None where the call does not say, or is inside another."""
    in_pieces: bool
    """Whether the prompt is run in pieces (`prefill_chunk_size`)."""


def given_to_generate(decoder: nn.Module) -> GivenToGenerate | None:
    """What the `generate` that runs this pass of a decoder was given; None where no `generate` of its model runs."""
    calls = _running_calls()
    if not calls or not _holds(calls[0]["self"], decoder):
        return None
    # A `generate` inside another one: its prompt may end with what the outer one has generated, as an assistant's does.
    if len(calls) > 1:
        return GivenToGenerate(None, False)
    given = calls[0]
    options = given["kwargs"]
    settings = given["generation_config"] or given["self"].generation_config
    in_pieces = options.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None)
    return GivenToGenerate(_prompt_width(given["inputs"], options), bool(in_pieces))


def _running_calls() -> list[dict[str, Any]]:
    """The parameters of every `generate` on this thread's stack, innermost first."""
    code = _code_of_generate() if "transformers.generation.utils" in sys.modules else None
    calls: list[dict[str, Any]] = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            values = frame.f_locals
            calls.append({name: values[name] for name in ("self", "inputs", "generation_config", "kwargs")})
        frame = frame.f_back
    return calls


@cache
def _code_of_generate() -> CodeType:
    from transformers import GenerationMixin

    return inspect.unwrap(cast(Any, GenerationMixin).generate).__code__


def _holds(hf_model: Any, decoder: nn.Module) -> bool:
    return hf_model.get_decoder() is decoder or any(module is decoder for module in hf_model.modules())


def _prompt_width(inputs: Tensor | None, options: dict[str, Any]) -> int | None:
    """The attention mask covers the whole prompt, also where only tokens that are not cached yet were passed as ids."""
    ids = inputs if inputs is not None else options.get("input_ids")
    embeddings = options.get("inputs_embeds")
    if isinstance(mask := options.get("attention_mask"), Tensor):
        return mask.shape[1] if mask.ndim == 2 else None
    if embeddings is not None:
        return embeddings.shape[1] if ids is None else None
    return 1 if ids is None else ids.shape[1]  # without any prompt `generate` begins with one token of its own
