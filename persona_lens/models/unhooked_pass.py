"""A bridge's Hugging Face model without the hook points that carry no hook, as a view that changes nothing.

A `TransformerBridge` has dozens of hook points in every block, and computes its attention in steps so that they can
fire. The view is a second tree of modules over the same weights: where a wrapper carries a hook that would act, the
view has the wrapper, and elsewhere the module inside it. The entry and exit of a block fire where something listens.

The tree is made for one pass. Only the modules above a wrapper have a second object in it, which shares the `__dict__`
of the first, and so its weights, buffers, hooks and whatever it notes of itself, and has other children; everything
else is the bridge's own. So the bridge itself is never touched: an interrupt has nothing to leave behind, other threads
run it as it is, and what was changed on the model meanwhile (an adapter, an attribute, a hook) is in the next view.
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from persona_lens.models.scopes import would_act
from persona_lens.models.structure import refuse_foreign_blocks

_INNER = "_original_component"
"""The name under which a wrapper has the module that it wraps."""


@dataclass(frozen=True, eq=False)
class _Part:
    """What is unwrapped together, or not at all: a block's attention, say, with the projections inside it.

    Attributes:
        silent: Every module whose hooks would not fire any more.
        wiring: Ids of the hooks by which the bridge feeds its own points: they are no user's.
        is_attention: Whether it is told which attention to compute.
        entry: For a block, the point before it, which goes on firing.
        exit: For a block, the point behind it.
    """

    silent: tuple[nn.Module, ...]
    wiring: frozenset[int] = frozenset()
    is_attention: bool = False
    entry: nn.Module | None = None
    exit: nn.Module | None = None

    @property
    def is_block(self) -> bool:
        """Whether it is a whole block."""
        return self.entry is not None

    @property
    def is_heard(self) -> bool:
        """Whether a hook of a user's would be missed. Asked of a thousand modules before each pass, hence so plain."""
        for module in self.silent:
            own = module.__dict__
            # A forward of the module's own, as a library sets it, is heard too.
            if own["_backward_hooks"] or own["_backward_pre_hooks"] or "forward" in own:
                return True
            if own["_forward_hooks"] and any(map(would_act, list(own["_forward_hooks"].values()))):
                return True
            if (before := own["_forward_pre_hooks"]) and any(
                key not in self.wiring and would_act(hook) for key, hook in list(before.items())
            ):
                return True
        return False


@dataclass(eq=False)
class _Node:
    """A module that has wrappers below it, or that is one, and so may be copied into a view.

    Attributes:
        part: For a wrapper that may be left out, what it is left out with.
        branches: Those of its children that are nodes, by name; of a wrapper the module inside it, node or not.
    """

    module: nn.Module
    part: _Part | None = None
    branches: dict[str, "_Node"] = field(default_factory=dict)

    def edges(self) -> Iterator[tuple[dict[str, nn.Module | None], str, nn.Module]]:
        """The children that it and the nodes below it were found to have, and where they stand."""
        for name, node in self.branches.items():
            # What has no nodes below it is looked up for each view: an adapter may have been put around it.
            if name != _INNER or node.branches:
                yield self.module._modules, name, node.module
            yield from node.edges()


@dataclass(frozen=True)
class _Survey:
    root: _Node
    edges: tuple[tuple[dict[str, nn.Module | None], str, nn.Module], ...]
    parts: tuple[_Part, ...]
    n_attention: int
    """Attention wrappers in all blocks, those too that are never left out."""
    n_wiring: int

    def is_current(self, bridge: Any) -> bool:
        """Whether the model's tree still is as it was found."""
        if self.n_wiring != len(_wiring(bridge)):
            return False
        return all(children.get(name) is module for children, name, module in self.edges)


_surveys: WeakKeyDictionary[nn.Module, _Survey] = WeakKeyDictionary()


def unhooked(bridge: Any) -> Any:
    """The bridge's Hugging Face model for one pass without autograd, past every wrapper whose hooks nobody misses.

    Where every attention is unwrapped it is the fused one that Hugging Face takes by default. A bridge in compatibility
    mode, whose wrappers compute with weights of their own, is given as it is.
    """
    hf_model = bridge.original_model
    if getattr(bridge, "compatibility_mode", False) or _has_any_global_hook():
        return hf_model
    survey = _surveys.get(bridge)
    if survey is None or not survey.is_current(bridge):
        survey = _surveys[bridge] = _survey(bridge)
    left_out = {part for part in survey.parts if not part.is_heard}
    fused = sum(part.is_attention for part in left_out) == survey.n_attention and _can_fuse(hf_model)
    configs: dict[int, Any] = {}
    if fused:
        # The memo of a deep copy holds the copy of every config within it, by the id of its original.
        copied = copy.deepcopy(hf_model.config, configs)
        copied._attn_implementation = "sdpa"
    return _view(survey.root, left_out, configs)


_OF_MODULES = ("_modules", "config")
"""What a view may have instead of what its module has."""
_OF_BLOCKS = (*_OF_MODULES, "_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


def _view(
    node: _Node, left_out: set[_Part], configs: dict[int, Any], replaced: tuple[str, ...] = _OF_MODULES
) -> nn.Module:
    """The module of a node, with the children that the view has in place of its own."""
    children = node.module._modules.copy()
    for name, child in node.branches.items():
        inside = child.branches.get(_INNER)
        if child.part in left_out and inside is not None:
            # Read anew where it may have been replaced, by an adapter around it.
            bare = child.module._modules[_INNER]
            if child.part.is_block:
                bare = _heard_at_its_ends(_view(inside, left_out, configs, _OF_BLOCKS), child.part)
            elif inside.branches:
                bare = _view(inside, left_out, configs)
            children[name] = bare
        elif inside is None or inside.branches:
            children[name] = _view(child, left_out, configs)
    return _with_children(node.module, children, configs, replaced)


def _with_children(
    module: nn.Module, children: dict[str, nn.Module | None], configs: dict[int, Any], replaced: tuple[str, ...]
) -> nn.Module:
    """A second object for a module, with other children, and with the copy of its config where there is one."""
    own = module.__dict__
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        # It has nothing but its children, and slicing makes another of its class.
        view: Any = object.__new__(type(module))
        view.__dict__.update(own, _modules=children)
        return view
    view = object.__new__(_view_class(type(module), replaced))
    object.__setattr__(view, "__dict__", own)
    object.__setattr__(view, "_view", {"_modules": children})
    if (config := configs.get(id(own.get("config")))) is not None:
        view._view["config"] = config
    return view


@cache
def _view_class(kind: type[nn.Module], replaced: tuple[str, ...]) -> Any:
    """A subclass for views: it shares a module's `__dict__`, and finds in a slot of its own what the view replaces."""

    def member(name: str) -> property:
        def get(self: Any) -> Any:
            try:
                return self._view[name] if name in self._view else self.__dict__[name]
            except KeyError:
                raise AttributeError(name) from None  # so that `__getattr__` is asked, as without a property

        return property(get, lambda self, value: self.__dict__.__setitem__(name, value))

    def get_child(self: Any, name: str) -> Any:
        children = self._view["_modules"]
        return children[name] if name in children else kind.__getattr__(self, name)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    members = {"__slots__": ("_view",), "__getattr__": get_child, **{name: member(name) for name in replaced}}
    make: Any = type(kind)
    return make(kind.__name__, (kind,), names | members)


def _heard_at_its_ends(view: Any, part: _Part | None) -> nn.Module:
    """A view of a block with the points before and behind its wrapper, where anything is hooked to them."""
    if part is None:
        return view
    if part.entry is not None and _has_hooks(part.entry):
        entry = part.entry

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (entry(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": entry(kwargs["hidden_states"])}

        _add_hook(view, "_forward_pre_hooks", enter)
        view._view["_forward_pre_hooks_with_kwargs"] = {**view._forward_pre_hooks_with_kwargs, _OF_VIEW: True}
    if part.exit is not None and _has_hooks(part.exit):
        leave = part.exit

        def pass_on(_module: nn.Module, _args: Any, output: Any) -> Any:
            return leave(output) if isinstance(output, Tensor) else (leave(output[0]), *output[1:])

        _add_hook(view, "_forward_hooks", pass_on)
    return view


def _add_hook(view: Any, hooks: str, hook: Callable[..., Any]) -> None:
    """Add a hook to a view alone, after those of its module."""
    view._view[hooks] = OrderedDict(getattr(view, hooks))
    view._view[hooks][_OF_VIEW] = hook


_OF_VIEW = -1
"""The key of a view's own hook; torch counts keys from 0."""


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


def _survey(bridge: Any) -> _Survey:
    """The wrappers that may be left out, whose hooks to look at before, and the modules above them."""
    refuse_foreign_blocks(bridge)
    parts: dict[nn.Module, _Part] = {}
    """What each wrapper is left out with."""
    n_attention, wiring = 0, _wiring(bridge)
    blocks = {id(block) for block in bridge.blocks}
    for block in (module for module in bridge.original_model.modules() if id(module) in blocks):
        original = cast(nn.Module, block._modules[_INNER])
        # Points of the block itself, past its entry and exit, fire from inside it.
        points = [child for name, child in block._modules.items() if _is_point(child) and name[5:] not in ("in", "out")]
        if _passes_through(block, original):
            parts[block] = _Part((block, *points), entry=block.hook_in, exit=block.hook_out)
        for child in original._modules.values():
            if child is None or not _is_wrapper(child):
                continue
            attention = "Attention" in type(child).__name__
            n_attention += attention
            if _computes_the_same(child):
                silent = [module for module in child.modules() if _is_wrapper(module) or _is_point(module)]
                part = _Part((*silent, *points), wiring, attention)
                parts.update({wrapper: part for wrapper in _wrappers(child)})
    root = _node(bridge.original_model, parts)
    return _Survey(root, tuple(root.edges()), tuple(dict.fromkeys(parts.values())), n_attention, len(wiring))


def _node(module: nn.Module, parts: dict[nn.Module, _Part]) -> _Node:
    """A module with those of its children that are, or have below them, wrappers that may be left out."""
    node = _Node(module, parts.get(module))
    for name, child in module._modules.items():
        # A wrapper has parts of the module in it under names of its own as well, which a pass does not go by.
        if child is None or (_is_wrapper(module) and name != _INNER):
            continue
        below = _node(child, parts)
        if below.part is not None or below.branches or (node.part is not None and name == _INNER):
            node.branches[name] = below
    return node


def _is_point(module: nn.Module | None) -> bool:
    return type(module).__name__ == "HookPoint"


def _is_wrapper(module: nn.Module | None) -> bool:
    return module is not None and isinstance(module._modules.get(_INNER), nn.Module)


def _passes_through(block: nn.Module, original: nn.Module) -> bool:
    """Whether the block hands on whatever it is given; some kinds change arguments or results on the way."""
    takes = inspect.signature(original.forward).parameters.values()
    return type(block).__name__ == "BlockBridge" and any(each.kind is each.VAR_KEYWORD for each in takes)


def _computes_the_same(wrapper: nn.Module) -> bool:
    """Whether all its weights are the original's; some wrappers split joint weights and compute with the copies."""
    original = cast(nn.Module, wrapper._modules[_INNER])
    return {id(weight) for weight in wrapper.parameters()} == {id(weight) for weight in original.parameters()}


def _wrappers(wrapper: nn.Module) -> Iterator[nn.Module]:
    """The wrapper, and those that the original module in it calls."""
    yield wrapper
    yield from (module for module in cast(nn.Module, wrapper._modules[_INNER]).modules() if _is_wrapper(module))
