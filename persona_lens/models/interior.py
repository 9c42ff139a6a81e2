"""A bridge's blocks without the hook points that carry no hook, for as long as one forward pass.

A `TransformerBridge` has dozens of hook points in every block, and computes its attention in steps so that they can
fire. Here, for the length of one pass, whatever would be called through a wrapper without hooks is called directly, and
the entry and exit of a block fire only where something listens. Wrappers that carry a hook inside stay.
Knows nothing about what a pass computes. Not thread-safe: a hook set in one thread while another is in a pass waits for
the next pass.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Wrapped:
    """A module in its wrapper, as its owner calls it."""

    owner: nn.Module
    name: str
    wrapper: nn.Module

    @property
    def original(self) -> nn.Module:
        # Read anew each time: an adapter may have been put around the module inside the wrapper.
        return cast(nn.Module, self.wrapper._modules["_original_component"])


@dataclass(frozen=True)
class _Part:
    """What is unwrapped together, or not at all: a block's attention, say, with the projections inside it.

    Attributes:
        wrapped: Outermost first.
        silent: Every module whose hooks would not fire any more.
        wiring: Ids of the hooks by which the bridge feeds its own points: they are no user's.
        is_attention: Whether it is told which attention to compute.
        entry: For a block, the point before it, which goes on firing.
        exit: For a block, the point behind it.
    """

    wrapped: tuple[_Wrapped, ...]
    silent: tuple[nn.Module, ...]
    wiring: frozenset[int] = frozenset()
    is_attention: bool = False
    entry: nn.Module | None = None
    exit: nn.Module | None = None

    @property
    def is_heard(self) -> bool:
        """Whether a hook of a user's would be missed. Asked of a thousand modules before each pass, hence so plain."""
        for module in self.silent:
            held = module.__dict__
            if held["_forward_hooks"] or held["_backward_hooks"] or held["_backward_pre_hooks"]:
                return True
            if (before := held["_forward_pre_hooks"]) and not self.wiring.issuperset(before):
                return True
        return False


@dataclass(frozen=True)
class _Interior:
    parts: tuple[_Part, ...]
    n_attention: int
    """Attention wrappers in all blocks, those too that are never taken off."""
    n_wiring: int

    def is_current(self, bridge: Any) -> bool:
        return self.n_wiring == len(_wiring(bridge)) and all(
            each.owner._modules.get(each.name) is each.wrapper for part in self.parts for each in part.wrapped
        )


_interiors: WeakKeyDictionary[nn.Module, _Interior] = WeakKeyDictionary()


@contextmanager
def bare_interior(bridge: Any) -> Iterator[None]:
    """While open, passes without autograd go around wrappers wherever no hook would be missed; then all is as it was.

    Where every attention is unwrapped it is the fused one that Hugging Face takes by default. A bridge in compatibility
    mode, whose wrappers compute with weights of their own, stays as it is.
    """
    if getattr(bridge, "compatibility_mode", False):
        yield
        return
    interior = _interiors.get(bridge)
    if interior is None or not interior.is_current(bridge):
        interior = _interiors[bridge] = _survey(bridge)
    chosen = [part for part in interior.parts if not part.is_heard]
    config = bridge.original_model.config
    fused = sum(part.is_attention for part in chosen) == interior.n_attention and _can_fuse(bridge.original_model)
    with ExitStack() as stack:
        stack.callback(_wrap_again, chosen)
        for part in chosen:
            _listen(part, stack)
            for each in part.wrapped:
                each.owner._modules[each.name] = each.original
        if fused:
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = "sdpa"
        yield


def _wrap_again(parts: list[_Part]) -> None:
    for part in parts:
        for each in part.wrapped:
            each.owner._modules[each.name] = each.wrapper


def _listen(part: _Part, stack: ExitStack) -> None:
    """Let the points before and behind an unwrapped block fire, where anything is hooked to them."""
    block = part.wrapped[0].original
    if part.entry is not None and _has_hooks(part.entry):
        entry = part.entry

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (entry(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": entry(kwargs["hidden_states"])}

        stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
    if part.exit is not None and _has_hooks(part.exit):
        leave = part.exit

        def pass_on(_module: nn.Module, _args: Any, output: Any) -> Any:
            return leave(output) if isinstance(output, Tensor) else (leave(output[0]), *output[1:])

        stack.callback(block.register_forward_hook(pass_on).remove)


def _has_hooks(module: nn.Module) -> bool:
    return any(hooks for name, hooks in module.__dict__.items() if name.endswith("_hooks"))


def _can_fuse(hf_model: Any) -> bool:
    """Whether eager attention was chosen for its hook points alone: then the fused one computes the same.

    In float64 it does not: eager attention takes its softmax in float32 whatever the model's dtype.
    """
    config = hf_model.config
    return (
        hf_model.dtype != torch.float64
        and config._attn_implementation == "eager"
        and bool(getattr(hf_model, "_supports_sdpa", False))
        and not getattr(config, "attn_logit_softcapping", None)
    )


def _wiring(bridge: Any) -> frozenset[int]:
    return frozenset(handle.id for block in bridge.blocks for handle in getattr(block, "_capture_hook_handles", ()))


def _survey(bridge: Any) -> _Interior:
    """The wrappers that may be taken off, and whose hooks to look at before."""
    parts: list[_Part] = []
    n_attention, wiring = 0, _wiring(bridge)
    blocks = {id(block) for block in bridge.blocks}
    owners = [
        (module, name, child)
        for module in bridge.original_model.modules()
        for name, child in module._modules.items()
        if id(child) in blocks
    ]
    for owner, place, block in owners:
        original = cast(nn.Module, block._modules["_original_component"])
        # Points of the block itself, past its entry and exit, fire from inside it.
        points = [child for name, child in block._modules.items() if _is_point(child) and name[5:] not in ("in", "out")]
        if _passes_through(block, original):
            wrapped = (_Wrapped(owner, place, block),)
            parts.append(_Part(wrapped, (block, *points), entry=block.hook_in, exit=block.hook_out))
        for name, child in original._modules.items():
            if child is None or not _is_wrapper(child):
                continue
            attention = "Attention" in type(child).__name__
            n_attention += attention
            if _computes_the_same(child):
                silent = [module for module in child.modules() if _is_wrapper(module) or _is_point(module)]
                wrapped = tuple(_wrappers(original, name, child))
                parts.append(_Part(wrapped, (*silent, *points), wiring, attention))
    return _Interior(tuple(parts), n_attention, len(wiring))


def _is_point(module: nn.Module | None) -> bool:
    return type(module).__name__ == "HookPoint"


def _is_wrapper(module: nn.Module | None) -> bool:
    return module is not None and isinstance(module._modules.get("_original_component"), nn.Module)


def _passes_through(block: nn.Module, original: nn.Module) -> bool:
    """Whether the block hands on whatever it is given; some kinds change arguments or results on the way."""
    takes = inspect.signature(original.forward).parameters.values()
    return type(block).__name__ == "BlockBridge" and any(each.kind is each.VAR_KEYWORD for each in takes)


def _computes_the_same(wrapper: nn.Module) -> bool:
    """Whether all its weights are the original's; some wrappers split joint weights and compute with the copies."""
    original = cast(nn.Module, wrapper._modules["_original_component"])
    return {id(weight) for weight in wrapper.parameters()} == {id(weight) for weight in original.parameters()}


def _wrappers(owner: nn.Module, name: str, wrapper: nn.Module) -> Iterator[_Wrapped]:
    """The wrapper, and those that the original module in it calls, outermost first."""
    outermost = _Wrapped(owner, name, wrapper)
    yield outermost
    for module in outermost.original.modules():
        for inner, child in module._modules.items():
            if _is_wrapper(child):
                yield _Wrapped(module, inner, cast(nn.Module, child))
