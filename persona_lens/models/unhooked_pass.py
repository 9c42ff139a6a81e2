"""Runs a bridge at the speed of its Hugging Face model, by leaving out the hook points that nobody listens to.

A `TransformerBridge` nests every module of a Hugging Face model in a wrapper. A block has dozens of hook points, and
its attention is computed step by step so that they can fire, which costs time in every pass. `unhooked` returns a
*view* for one pass: a second tree of modules over the same weights. Where a wrapper has a hook that would act now, the
view has the wrapper; elsewhere it has the Hugging Face module inside. The input and output of a block still fire if
anything is hooked there.

How it goes:

1. `_survey`, cached for as long as the tree of modules stays the same, finds the wrappers that may be left out without
   changing the result (`_passes_through`, `_computes_the_same`) and which modules' hooks would be missed (`_Part`).
2. Before each pass, every part without a hook that acts is left out (`_Part.is_heard`).
3. `_view` builds the tree. Only modules above a left-out wrapper need a second object. It shares the `__dict__` of the
   original, and so its weights, buffers, hooks and attributes, but has other children; everything else in the tree is
   the bridge's own object.
4. If every attention is unwrapped, the view's config asks for the fused attention (`sdpa`), as Hugging Face would.

The bridge itself is never changed. So an interrupt leaves nothing behind, other threads run the bridge as it is, and a
change of the model (an adapter, an attribute, a hook) is in the next view.
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
"""The name under which a wrapper holds the module that it wraps."""


@dataclass(frozen=True, eq=False)
class _Part:
    """Wrappers that are left out together or not at all, such as a block's attention and the projections inside it.

    Attributes:
        silent: Every module whose hooks would no longer fire.
        wiring: Ids of the hooks by which the bridge feeds its own hook points, which do not count as hooks.
        is_attention: Whether it computes attention.
        entry: For a block, its input hook point, which still fires.
        exit: For a block, its output hook point, which still fires.
    """

    silent: tuple[nn.Module, ...]
    wiring: frozenset[int] = frozenset()
    is_attention: bool = False
    entry: nn.Module | None = None
    exit: nn.Module | None = None

    @property
    def is_block(self) -> bool:
        """Whether it wraps a whole block."""
        return self.entry is not None

    @property
    def is_heard(self) -> bool:
        """Whether a hook that acts now would be missed."""
        # A thousand modules are asked before each pass, so this reads their `__dict__` and makes few calls.
        for module in self.silent:
            own = module.__dict__
            # A library may also have replaced the module's forward.
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
    """A module that is a wrapper or has wrappers below it, and so may need a second object in a view.

    Attributes:
        part: For a wrapper that may be left out, the part that it belongs to.
        branches: The children that are nodes themselves, by name; of a wrapper always the module inside.
    """

    module: nn.Module
    part: _Part | None = None
    branches: dict[str, "_Node"] = field(default_factory=dict)

    def edges(self) -> Iterator[tuple[dict[str, nn.Module | None], str, nn.Module]]:
        """Every edge of the tree of nodes: the table of children, the name in it, and the child that was found."""
        for name, node in self.branches.items():
            # A wrapped module without nodes below is looked up anew for each view, since an adapter may wrap it.
            if name != _INNER or node.branches:
                yield self.module._modules, name, node.module
            yield from node.edges()


@dataclass(frozen=True)
class _Survey:
    root: _Node
    edges: tuple[tuple[dict[str, nn.Module | None], str, nn.Module], ...]
    parts: tuple[_Part, ...]
    n_attention: int
    """The number of attention wrappers in all blocks, with those that are never left out."""
    n_wiring: int

    def is_current(self, bridge: Any) -> bool:
        """Whether the model's tree is still the one that was surveyed."""
        if self.n_wiring != len(_wiring(bridge)):
            return False
        return all(children.get(name) is module for children, name, module in self.edges)


_surveys: WeakKeyDictionary[nn.Module, _Survey] = WeakKeyDictionary()


def unhooked(bridge: Any) -> Any:
    """The bridge's Hugging Face model for one pass without autograd, without the wrappers whose hooks do not act.

    A bridge in compatibility mode, whose wrappers compute with weights of their own, is returned as it is.
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
        # The memo of the deep copy maps the id of every config inside to its copy: parts of a model have their own.
        copied = copy.deepcopy(hf_model.config, configs)
        copied._attn_implementation = "sdpa"
    return _view(survey.root, left_out, configs)


_OF_MODULES = ("_modules", "config")
"""The attributes in which a view may differ from its module."""
_OF_BLOCKS = (*_OF_MODULES, "_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


def _view(
    node: _Node, left_out: set[_Part], configs: dict[int, Any], replaced: tuple[str, ...] = _OF_MODULES
) -> nn.Module:
    """A second object for a node's module, with the view's children in place of its own."""
    children = node.module._modules.copy()
    for name, child in node.branches.items():
        inside = child.branches.get(_INNER)
        if child.part in left_out and inside is not None:  # leave the wrapper out
            # Read from the model, not from the survey: an adapter may have been put around it meanwhile.
            bare = child.module._modules[_INNER]
            if child.part.is_block:
                bare = _heard_at_its_ends(_view(inside, left_out, configs, _OF_BLOCKS), child.part)
            elif inside.branches:
                bare = _view(inside, left_out, configs)
            children[name] = bare
        elif inside is None or inside.branches:  # keep it; something below it is left out
            children[name] = _view(child, left_out, configs)
    return _with_children(node.module, children, configs, replaced)


def _with_children(
    module: nn.Module, children: dict[str, nn.Module | None], configs: dict[int, Any], replaced: tuple[str, ...]
) -> nn.Module:
    """A second object for a module, with other children, and with the copy of its config if there is one."""
    own = module.__dict__
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        # A container has nothing but its children, and must keep its class: slicing it creates another one.
        view: Any = object.__new__(type(module))
        view.__dict__.update(own, _modules=children)
        return view
    # `__new__` and `object.__setattr__`, since nn.Module's own would register the shared attributes again.
    view = object.__new__(_view_class(type(module), replaced))
    object.__setattr__(view, "__dict__", own)
    object.__setattr__(view, "_view", {"_modules": children})
    if (config := configs.get(id(own.get("config")))) is not None:
        view._view["config"] = config
    return view


@cache
def _view_class(kind: type[nn.Module], replaced: tuple[str, ...]) -> Any:
    """A subclass whose instances share a module's `__dict__`, except for what is in their own slot `_view`."""

    def member(name: str) -> property:
        def get(self: Any) -> Any:
            try:
                return self._view[name] if name in self._view else self.__dict__[name]
            except KeyError:
                raise AttributeError(name) from None  # Python then asks `__getattr__`, as it does without a property

        return property(get, lambda self, value: self.__dict__.__setitem__(name, value))

    def get_child(self: Any, name: str) -> Any:
        children = self._view["_modules"]
        return children[name] if name in children else kind.__getattr__(self, name)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    members = {"__slots__": ("_view",), "__getattr__": get_child, **{name: member(name) for name in replaced}}
    make: Any = type(kind)
    return make(kind.__name__, (kind,), names | members)


def _heard_at_its_ends(view: Any, part: _Part) -> nn.Module:
    """A view of a block that calls the hook points at its input and output, if anything is hooked there."""
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
    """Add a hook to a view alone, after the hooks of its module."""
    view._view[hooks] = OrderedDict(getattr(view, hooks))
    view._view[hooks][_OF_VIEW] = hook


_OF_VIEW = -1
"""The key of a view's own hook; torch's keys count from 0."""


def _has_hooks(module: nn.Module) -> bool:
    return any(hooks for name, hooks in module.__dict__.items() if name.endswith("_hooks"))


def _can_fuse(hf_model: Any) -> bool:
    """Whether fused attention computes the same as the eager attention, which a bridge needs for its hook points.

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
    """Find the wrappers that may be left out, the modules whose hooks must be silent for it, and the modules above."""
    refuse_foreign_blocks(bridge)
    parts: dict[nn.Module, _Part] = {}
    """The part that each wrapper belongs to."""
    n_attention, wiring = 0, _wiring(bridge)
    blocks = {id(block) for block in bridge.blocks}
    for block in (module for module in bridge.original_model.modules() if id(module) in blocks):
        original = cast(nn.Module, block._modules[_INNER])
        # Points of the block other than its input and output are fed from inside the block.
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
    """A module with those of its children that are wrappers which may be left out, or have such below them."""
    node = _Node(module, parts.get(module))
    for name, child in module._modules.items():
        # A wrapper also holds parts of the module inside under names of its own, which a pass does not use.
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
    """Whether the block's wrapper passes arguments and results on unchanged, which some kinds do not."""
    parameters = inspect.signature(original.forward).parameters.values()
    return type(block).__name__ == "BlockBridge" and any(one.kind is one.VAR_KEYWORD for one in parameters)


def _computes_the_same(wrapper: nn.Module) -> bool:
    """Whether all its weights are the original's: some wrappers split joint weights and compute with the copies."""
    original = cast(nn.Module, wrapper._modules[_INNER])
    return {id(weight) for weight in wrapper.parameters()} == {id(weight) for weight in original.parameters()}


def _wrappers(wrapper: nn.Module) -> Iterator[nn.Module]:
    """The wrapper, and the wrappers inside the module that it wraps."""
    yield wrapper
    yield from (module for module in cast(nn.Module, wrapper._modules[_INNER]).modules() if _is_wrapper(module))
