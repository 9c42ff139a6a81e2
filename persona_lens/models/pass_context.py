"""What a running Hugging Face `generate` was given: how long its prompt is, and whether it runs it in pieces.

Inside a forward pass nothing tells a piece of a prompt from a whole one, or a prompt from a prompt with guessed tokens
behind it (`prefill_chunk_size`, a prefix that is cached already, assisted decoding). `generate` knows, and its call is
on the stack of the hook that asks. Only its parameters are read there. Nothing is wrapped or replaced, so nothing can
be left behind, and passes in other threads, which have stacks of their own, are not confused with it.

What a hook cannot see of the forward pass that runs it: which tokens are cached, which rows and positions these are.

Two sources: the pass itself, whose key-value cache and mask are read as it begins, alike on both model classes; and its
caller, a loop that knows its rows and prompts and announces them.
Knows nothing about traits, vectors or interventions.
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


@dataclass(frozen=True)
class KnownPass:
    """What the caller of a forward pass knows of it.

    Attributes:
        rows: Which row of the whole plan each row of the batch is; None where one row of the batch serves several.
        prompt: True on the tokens of prompts; None where the caller does not know.
        response: True on the last token of a prompt and on the tokens of its response, which are what the last prompt
            token and all later ones predict; None where the caller does not know.
    """

    rows: Int[Tensor, " batch"] | None = None
    prompt: Bool[Tensor, "batch pos"] | None = None
    response: Bool[Tensor, "batch pos"] | None = None


class _Announcement:
    """What is known of a pass, for as long as the frame that runs it lives.

    The context variable refers to it weakly, so that an interrupt leaves no announcement to a later pass.
    """

    def __init__(self, known: KnownPass | None, attended: Tensor | None):
        self.known, self.attended = known, attended


_announced: ContextVar["weakref.ref[_Announcement] | None"] = ContextVar("persona_lens_announced", default=None)


@contextmanager
def announce(known: KnownPass | None, attended: Bool[Tensor, "batch seen"] | None = None) -> Iterator[None]:
    """Say what is known of the forward pass inside, and which tokens, cached and new, are not padding."""
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
        cached: Tokens that its key-value cache held as it began; None where it has no cache.
        mask: Which tokens it attends to, cached and new ones [batch, seen]; None where it was given no such mask.
        number: Counts what was read, so that another number is another pass.
        given: What the Hugging Face `generate` that runs it was given; None where none runs it.
        shows_padding: Whether `mask` is the whole truth about padding: not where the pass was given a mask of another
            form, such as one of which token may attend to which.
    """

    cached: int | None = None
    mask: Tensor | None = None
    number: int = 0
    given: GivenToGenerate | None = None
    shows_padding: bool = True


@contextmanager
def watch_passes(model: Model, layers: Sequence[int]) -> Iterator[CurrentPass]:
    """While open, the yielded value describes the forward pass that runs one of `layers`."""
    current = CurrentPass()
    hooks = []
    for module, read in _readers(model, layers):

        def before(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            read: Callable[..., CurrentPass] = read,
        ) -> None:
            seen = read(module, args, kwargs)
            current.cached, current.mask, current.number = seen.cached, seen.mask, current.number + 1
            current.given, current.shows_padding = seen.given, seen.shows_padding

        hooks.append(Hook(module, before, before=True))
    with hooked(model, hooks):
        yield current


def _readers(model: Model, layers: Sequence[int]) -> list[tuple[nn.Module, Callable[..., CurrentPass]]]:
    if not layers:
        return []
    if is_bridge(model):
        # Everything that runs a bridge goes through the decoder: its own generate, Hugging Face's, and PEFT around it.
        return [(cast(Any, model).original_model.get_decoder(), _read_decoder)]
    # HookedTransformer.generate calls `forward` directly, past any hook on the model itself.
    return [(model.blocks[layer], _read_hooked_block) for layer in layers]


def _read_decoder(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CurrentPass:
    given = signature(decoder.forward).bind_partial(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    cache = given.get("past_key_values")
    # Asked for a cache and given none yet, the pass makes one, which is empty.
    fresh = 0 if given.get("use_cache") is True else None
    mask = _plain_mask(given.get("attention_mask"))
    return CurrentPass(
        fresh if cache is None else int(cache.get_seq_length()),
        mask,
        given=given_to_generate(decoder),
        shows_padding=mask is not None or given.get("attention_mask") is None,
    )


def _read_hooked_block(_block: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> CurrentPass:
    entry = kwargs.get("past_kv_cache_entry")
    return CurrentPass(None if entry is None else entry.past_keys.shape[1], _plain_mask(kwargs.get("attention_mask")))


def _plain_mask(mask: Any) -> Tensor | None:
    """Which tokens are no padding: as announced, or from a mask that says this and not which may attend to which."""
    announcement = _announcement()
    if announcement is not None and announcement.attended is not None:
        return announcement.attended
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
