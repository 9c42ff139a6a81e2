"""What a hook cannot see of the forward pass that runs it: which tokens are cached, which rows and positions these are.

Two sources: the pass itself, whose key-value cache and mask are read as it begins, alike on both model classes; and its
caller, a loop that knows its rows and prompts and announces them.
Knows nothing about traits, vectors or interventions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

from jaxtyping import Bool, Int
from torch import Tensor, nn

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


_announced: ContextVar[KnownPass | None] = ContextVar("persona_lens_known_pass", default=None)


@contextmanager
def announce(known: KnownPass | None) -> Iterator[None]:
    """Say what is known of the forward passes inside."""
    token = _announced.set(known)
    try:
        yield
    finally:
        _announced.reset(token)


def announced() -> KnownPass | None:
    """What the caller of the running forward pass announced."""
    return _announced.get()


@dataclass
class CurrentPass:
    """The forward pass that runs now.

    Attributes:
        cached: Tokens that its key-value cache held as it began; None where it has no cache.
        mask: Which tokens it attends to, cached and new ones [batch, seen]; None where it was given no such mask.
    """

    cached: int | None = None
    mask: Tensor | None = None


@contextmanager
def watch_passes(model: Model, layers: Sequence[int]) -> Iterator[CurrentPass]:
    """While open, the yielded value describes the forward pass that runs one of `layers`."""
    current = CurrentPass()
    with ExitStack() as stack:
        for module, read in _readers(model, layers):

            def before(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                read: Callable[..., CurrentPass] = read,
            ) -> None:
                seen = read(module, args, kwargs)
                current.cached, current.mask = seen.cached, seen.mask

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield current


def _readers(model: Model, layers: Sequence[int]) -> list[tuple[nn.Module, Callable[..., CurrentPass]]]:
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
    return CurrentPass(
        fresh if cache is None else int(cache.get_seq_length()), _plain_mask(given.get("attention_mask"))
    )


def _read_hooked_block(_block: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> CurrentPass:
    entry = kwargs.get("past_kv_cache_entry")
    return CurrentPass(None if entry is None else entry.past_keys.shape[1], _plain_mask(kwargs.get("attention_mask")))


def _plain_mask(mask: Any) -> Tensor | None:
    """The mask where it says which tokens are padding, and not which token may attend to which."""
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
