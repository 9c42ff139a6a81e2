"""What a hook cannot see of the forward pass that runs it: the cached tokens, the rows, and where the prompt ends.

There are three sources.

- The pass itself: its key-value cache and attention mask are read as it begins (`watch_passes`).
- Its caller: our own loops know their rows and prompts, and announce them (`announce`).
- A Hugging Face `generate` that runs the pass. From inside a pass, a piece of a prompt (`prefill_chunk_size`, a cached
  prefix) looks like a whole one, and a prompt with guessed tokens behind it (assisted decoding) like a prompt.
  `generate` knows, and its call is on the stack of the hook that asks, so its parameters are read there. Nothing is
  wrapped or replaced, so nothing can be left behind, and other threads have stacks of their own.
"""

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from inspect import signature
from types import CodeType
from typing import Any, NamedTuple, cast

from jaxtyping import Bool, Int
from torch import Tensor, nn

from persona_lens.models.scopes import Hook, hooked
from persona_lens.models.structure import Model, is_bridge


class GivenToGenerate(NamedTuple):
    """What a call of `generate` says about its prompt."""

    prompt_width: int | None
    """Its length, with padding and cached tokens; None if the call does not say, or is inside another `generate`."""
    in_pieces: bool
    """Whether the prompt is run in pieces (`prefill_chunk_size`)."""


def given_to_generate(decoder: nn.Module) -> GivenToGenerate | None:
    """What the `generate` that runs this pass of a decoder was given; None if none runs it."""
    calls = _running_calls()
    if not calls or not _holds(calls[0]["self"], decoder):
        return None
    # Inside another `generate`, as an assistant's is, the prompt may end with tokens that the outer one generated.
    if len(calls) > 1:
        return GivenToGenerate(None, False)
    call = calls[0]
    options = call["kwargs"]
    settings = call["generation_config"] or call["self"].generation_config
    in_pieces = options.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None)
    return GivenToGenerate(_prompt_width(call["inputs"], options), bool(in_pieces))


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
    """The prompt's length: the mask's, if there is one, since ids may be only those that are not cached yet."""
    ids = inputs if inputs is not None else options.get("input_ids")
    embeddings = options.get("inputs_embeds")
    if isinstance(mask := options.get("attention_mask"), Tensor):
        return mask.shape[1] if mask.ndim == 2 else None
    if embeddings is not None:
        return embeddings.shape[1] if ids is None else None
    return 1 if ids is None else ids.shape[1]  # without a prompt `generate` begins with one token of its own


@dataclass(frozen=True)
class KnownPass:
    """What the caller of a forward pass knows about it; None is unknown.

    Attributes:
        rows: The index of each row of the batch among all rows of the call; None if one row stands for several.
        prompt: True on the tokens of prompts.
        response: True on the last token of a prompt and on the response: where the response is predicted.
    """

    rows: Int[Tensor, " batch"] | None = None
    prompt: Bool[Tensor, "batch pos"] | None = None
    response: Bool[Tensor, "batch pos"] | None = None


class _Announcement:
    """What is known of a pass, alive as long as the frame of `announce`.

    The context variable holds only a weak reference, so after an interrupt no later pass reads a stale announcement.
    """

    def __init__(self, known: KnownPass | None, attended: Tensor | None):
        self.known, self.attended = known, attended


_announced: ContextVar["weakref.ref[_Announcement] | None"] = ContextVar("persona_lens_announced", default=None)


@contextmanager
def announce(known: KnownPass | None, attended: Bool[Tensor, "batch seen"] | None = None) -> Iterator[None]:
    """Tell hooks what is known of the forward pass inside, and which tokens, cached and new, are not padding."""
    announcement, before = _Announcement(known, attended), _announced.get()
    try:
        _announced.set(weakref.ref(announcement))
        yield
    finally:
        announcement.known = announcement.attended = None
        _announced.set(before)


def announced() -> KnownPass | None:
    """What the caller of the running forward pass announced."""
    announcement = _announcement()
    return None if announcement is None else announcement.known


def _announcement() -> _Announcement | None:
    reference = _announced.get()
    return None if reference is None else reference()


@dataclass
class CurrentPass:
    """The forward pass that runs now.

    Attributes:
        cached: The number of tokens in its key-value cache as it began; None without a cache.
        mask: True on tokens that are no padding, cached and new ones [batch, seen]; None if it was not given.
        number: Counts passes: a new number is a new pass.
        given: What the Hugging Face `generate` that runs it was given; None if none runs it.
        shows_padding: Whether `mask` tells what is padding: not if the pass got a mask of another form, such as one
            that says which token may attend to which.
    """

    cached: int | None = None
    mask: Tensor | None = None
    number: int = 0
    given: GivenToGenerate | None = None
    shows_padding: bool = True


@contextmanager
def watch_passes(model: Model, layers: Sequence[int]) -> Iterator[CurrentPass]:
    """While open, the yielded value describes the current forward pass through any of `layers`."""
    current = CurrentPass()
    hooks = []
    for module, read in _readers(model, layers):

        def before(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            read: Callable[..., CurrentPass] = read,
        ) -> None:
            number = current.number + 1
            vars(current).update(vars(read(module, args, kwargs)), number=number)

        hooks.append(Hook(module, before, before=True))
    with hooked(model, hooks):
        yield current


def _readers(model: Model, layers: Sequence[int]) -> list[tuple[nn.Module, Callable[..., CurrentPass]]]:
    if not layers:
        return []
    if is_bridge(model):
        # Whatever runs a bridge goes through the decoder: its own generate, Hugging Face's, and PEFT's.
        return [(cast(Any, model).original_model.get_decoder(), _read_decoder)]
    # HookedTransformer.generate calls `forward` directly, which skips hooks on the model itself.
    return [(model.blocks[layer], _read_hooked_block) for layer in layers]


def _read_decoder(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CurrentPass:
    arguments = signature(decoder.forward).bind_partial(*args, **kwargs).arguments
    arguments |= arguments.pop("kwargs", {})
    cache = arguments.get("past_key_values")
    # With `use_cache` and no cache yet, the pass makes an empty one.
    without_cache = 0 if arguments.get("use_cache") is True else None
    mask = _plain_mask(arguments.get("attention_mask"))
    return CurrentPass(
        without_cache if cache is None else int(cache.get_seq_length()),
        mask,
        given=given_to_generate(decoder),
        shows_padding=mask is not None or arguments.get("attention_mask") is None,
    )


def _read_hooked_block(_block: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> CurrentPass:
    entry = kwargs.get("past_kv_cache_entry")
    return CurrentPass(None if entry is None else entry.past_keys.shape[1], _plain_mask(kwargs.get("attention_mask")))


def _plain_mask(mask: Any) -> Tensor | None:
    """The padding mask: the announced one, or the pass's own if it has the form [batch, seen]."""
    announcement = _announcement()
    if announcement is not None and announcement.attended is not None:
        return announcement.attended
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
