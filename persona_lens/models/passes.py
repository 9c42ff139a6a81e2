"""What a hook cannot see of the forward pass that runs it: which tokens are cached, which rows and positions these are.

Two sources: the pass itself, whose key-value cache and mask are read as it begins, alike on both model classes; and its
caller, a loop that knows its rows and prompts and announces them.
Knows nothing about traits, vectors or interventions.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

from jaxtyping import Bool, Int
from torch import Tensor, nn

from persona_lens.models.hf_generate import GivenToGenerate, given_to_generate
from persona_lens.models.scopes import Hook, hooked
from persona_lens.models.structure import Model, is_bridge


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
