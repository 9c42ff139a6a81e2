"""What this package hangs on a user's model: in whose forward passes it acts, and how it surely comes off again.

Everything we put on a model (hooks, adapters, and the gates that silence other people's hooks) belongs to a `Scope`,
which is one opening of one of our contexts. Two promises rest on it.

*A scope acts in its own passes only.* A forward pass is its own where it runs in the thread (and asyncio task) that
opened the scope, or in a context copied from there, as `asyncio.to_thread` makes one. Any other pass goes through as
if nothing hung there: another thread may run the same model meanwhile.

*A scope comes off.* Ctrl-C can strike between any two instructions, also inside the code that takes things off. So what
is to be undone is recorded before anything is changed; undoing looks at the model for what is still there and may run
any number of times; a scope whose frames are gone, or whose closing was interrupted, acts no more and is undone as its
frames are freed or by whoever uses the model next. Contexts built on this one are nested `with` statements: an
`ExitStack` that an interrupt crosses keeps its frames until the next garbage collection.
"""

import asyncio
import copy
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

_entered: ContextVar[frozenset["Scope"]] = ContextVar("persona_lens_scopes", default=frozenset())
"""The scopes that were opened in this context, or in the one that it was copied from."""

_ledgers: "weakref.WeakKeyDictionary[nn.Module, list[Scope]]" = weakref.WeakKeyDictionary()
"""The scopes of each model that are not yet known to be undone, in the order in which they were opened."""

_locks: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()


class _Guard:
    """Lives in the frame of an open context alone: once it is freed, nobody is left who could close the scope."""


class Scope:
    """One opening of a context that hangs something on a model.

    Attributes:
        foreign_passes: How often one of its hooks was passed in a pass of a thread that began while it was open.
    """

    def __init__(self, undo: Callable[["Scope"], None], guard: _Guard):
        self.foreign_passes = 0
        self._undo = undo
        self._guard = weakref.ref(guard)
        # The thread itself and not its number, which is given to another one when it has ended.
        self._thread = weakref.ref(threading.current_thread())
        self._threads_before = weakref.WeakSet(threading.enumerate())
        task = _current_task()
        self._task = None if task is None else weakref.ref(task)
        self._closing = self._closed = False

    @property
    def is_open(self) -> bool:
        """Whether it acts in its own passes."""
        return not self._closing and self._guard() is not None

    @property
    def is_stale(self) -> bool:
        """Whether it should have been undone already, and an interrupt prevented it."""
        return not self._closed and (self._closing or self._guard() is None)

    def acts(self) -> bool:
        """Whether it is open, and the code that asks runs in one of its own passes."""
        return self.is_open and (self in _entered.get() or self._was_opened_here())

    def _was_opened_here(self) -> bool:
        if threading.current_thread() is not self._thread():
            # Activation checkpointing runs forward passes again in autograd's own threads, which have no context.
            return _is_recomputing()
        opener = None if self._task is None else self._task()
        # A task that has ended cannot be waiting inside the context: a notebook runs each cell in a task of its own.
        return opener is None or opener.done() or opener is _current_task()

    def note_foreign_pass(self) -> None:
        """Count a pass that is not its own, unless its thread was there before and so has work of its own."""
        self.foreign_passes += threading.current_thread() not in self._threads_before

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scope":
        return self

    def close(self) -> None:
        """Undo what it did to the model. May be called again, also after a call that was interrupted."""
        if not self._closed:
            self._closing = True
            try:
                self._undo(self)
            except BaseException:
                # What an interrupt cut short is done now, before the interrupt goes on.
                self._undo(self)
                raise
            self._closed = True
        _entered.set(_entered.get() - {self})


def _current_task() -> "asyncio.Task[Any] | None":
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None


def _is_recomputing() -> bool:
    """Whether this is a backward pass in a thread of autograd's, which Python did not start."""
    in_backward = getattr(torch._C, "_current_graph_task_id", lambda: -1)() != -1
    return in_backward and type(threading.current_thread()).__name__ == "_DummyThread"


def model_lock(model: Any) -> Any:
    """The lock of a model, which is held for each forward pass of this package and while PEFT changes its modules."""
    return _locks.setdefault(model, threading.RLock())


def repair(model: Any) -> None:
    """Undo what an interrupt left on the model, the newest first."""
    ledger = _ledgers.get(model, [])
    for scope in ledger[::-1]:
        if scope.is_stale:
            scope.close()
        if scope._closed:
            # Each change of the list is one step that no other thread can come between: no lock to be left locked.
            with suppress(ValueError):
                ledger.remove(scope)


@contextmanager
def scope_on(model: Any, undo: Callable[[Scope], None]) -> Iterator[Scope]:
    """A new scope, under which the caller may change the model; `undo` is what takes the changes off on leaving.

    `undo(scope)` must leave alone what is not there (yet, or any more), and must not refer to the caller's frame.
    """
    repair(model)
    guard = _Guard()
    scope = Scope(undo, guard)
    _ledgers.setdefault(model, []).append(scope)
    # Where the lines below are cut off by an interrupt, this closes the scope as soon as their frames are freed.
    finalizer = weakref.finalize(guard, scope.close)
    finalizer.atexit = False
    try:
        _entered.set(_entered.get() | {scope})
        yield scope
    finally:
        scope.close()
        finalizer.detach()  # an interrupt that it met would be lost: Python drops exceptions there
        repair(model)


@contextmanager
def global_randomness_kept(model: Any) -> Iterator[None]:
    """The global generators of Python, numpy and torch are on leaving as they were; others' code draws from them."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def put_back(_: Scope) -> None:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
        if on_devices is not None:
            torch.cuda.set_rng_state_all(on_devices)

    with scope_on(model, put_back):
        yield


class Hook(NamedTuple):
    """A forward hook to be attached: `function(module, inputs, output)`.

    With `before`, a hook that sees what a module is given: `function(module, inputs, named_inputs)`.
    """

    module: nn.Module
    function: Callable[..., Any]
    before: bool = False


class ScopedHook:
    """A hook of ours as it stands in a module: silent outside of its scope's passes."""

    __slots__ = ("function", "scope")

    def __init__(self, scope: Scope, function: Callable[..., Any]):
        self.scope, self.function = scope, function

    def __call__(self, *given: Any) -> Any:
        """What torch calls; None leaves the module's output as it is."""
        if self.scope.acts():
            return self.function(*given)
        self.scope.note_foreign_pass()
        return None

    def acts(self) -> bool:
        """Whether it would do anything in a pass that runs now."""
        return self.scope.acts()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScopedHook":
        return self  # a copy of the model has the hook for as long as the model itself


@contextmanager
def hooked(model: Any, hooks: Sequence[Hook]) -> Iterator[Scope]:
    """Attach hooks, in their order, while the context is open; see the module for where they act."""
    modules = list(dict.fromkeys(hook.module for hook in hooks))
    with scope_on(model, partial(_unhook, modules)) as scope:
        for hook in hooks:
            scoped = ScopedHook(scope, hook.function)
            if hook.before:
                hook.module.register_forward_pre_hook(scoped, with_kwargs=True)
            else:
                hook.module.register_forward_hook(scoped)
        yield scope


def _unhook(modules: Sequence[nn.Module], scope: Scope) -> None:
    # Not by handles: the one of a hook that was attached just before an interrupt was never seen.
    for module in modules:
        for hooks, others in _hook_tables(module):
            for key in [key for key, hook in list(hooks.items()) if getattr(hook, "scope", None) is scope]:
                hooks.pop(key, None)
                for other in others:
                    other.pop(key, None)


def _hook_tables(module: nn.Module) -> list[tuple[dict[int, Any], list[dict[int, bool]]]]:
    """The forward hooks of a module and those before it, each with what torch notes of them by the same keys."""
    return [
        (module._forward_hooks, [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]),
        (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
    ]


def would_act(hook: Any) -> bool:
    """Whether a hook that stands in a module does anything in a pass that runs now; other people's always do."""
    return hook.acts() if isinstance(hook, ScopedHook | _Gate) else True


class _Gate:
    """Stands where a hook stood, and lets it act in all passes but those of a suspension."""

    __slots__ = ("behind", "suspension")

    def __init__(self, behind: Any, suspension: Scope):
        self.behind, self.suspension = behind, suspension

    @property
    def scope(self) -> Scope | None:
        """The scope of the hook behind it."""
        return getattr(self.behind, "scope", None)

    def acts(self) -> bool:
        """Whether the hook behind it would do anything in a pass that runs now."""
        return not self.suspension.acts() and would_act(self.behind)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return None if self.suspension.acts() else self.behind(*given, **named)


class ForwardGate:
    """A module's `forward` that another function takes the place of in some passes.

    Attributes:
        scope: Decides by whether it acts which of the two runs.
        inside: What runs in the scope's own passes; None for the module's own forward.
        outside: What runs in all others; None for the module's own forward.
        behind: The `forward` that the module carried itself before, if it did.
    """

    def __init__(
        self,
        module: nn.Module,
        scope: Scope,
        *,
        inside: Callable[..., Any] | None = None,
        outside: Callable[..., Any] | None = None,
    ):
        self._module = weakref.ref(module)
        self.scope, self.inside, self.outside = scope, inside, outside
        self.behind: Any = vars(module).get("forward")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """For a copy of the module, which no context of ours holds: its own forward."""
        module = self._module()
        if self.behind is not None or module is None or id(module) not in memo:
            return copy.deepcopy(self.behind, memo)
        return partial(type(module).forward, memo[id(module)])

    def __call__(self, *given: Any, **named: Any) -> Any:
        """What torch calls in place of the module's forward."""
        instead = self.inside if self.scope.acts() else self.outside
        if instead is not None:
            return instead(*given, **named)
        if self.behind is not None:
            return self.behind(*given, **named)
        module = self._module()
        return type(module).forward(module, *given, **named)  # type: ignore[union-attr]


def gate_hooks(modules: Sequence[nn.Module], suspension: Scope, silenced: Callable[[nn.Module, Any], bool]) -> None:
    """Silence those hooks of modules that `silenced(module, hook)` chooses, in the passes of a suspension."""
    for module in modules:
        for hooks, _ in _hook_tables(module):
            for key, hook in list(hooks.items()):
                if silenced(module, hook):
                    hooks[key] = _Gate(hook, suspension)


def gate_forward(module: nn.Module, gate: ForwardGate) -> None:
    """Put a gate in the place of a module's forward."""
    vars(module)["forward"] = gate


def open_gates(modules: Sequence[nn.Module], scope: Scope) -> None:
    """Take off every gate of a scope, also from behind a gate that another scope has put before it."""
    for module in modules:
        for hooks, _ in _hook_tables(module):
            for key, hook in list(hooks.items()):
                if key in hooks and isinstance(hook, _Gate):
                    hooks[key] = _without(hook, lambda gate: isinstance(gate, _Gate) and gate.suspension is scope)
        own = vars(module)
        if isinstance(own.get("forward"), ForwardGate):
            left = _without(own["forward"], lambda gate: isinstance(gate, ForwardGate) and gate.scope is scope)
            if left is None:
                own.pop("forward", None)
            else:
                own["forward"] = left


def _without(gate: Any, is_ours: Callable[[Any], bool]) -> Any:
    """A chain of gates without ours."""
    while is_ours(gate):
        gate = gate.behind
    inner = gate
    while isinstance(inner, _Gate | ForwardGate):
        while is_ours(inner.behind):
            inner.behind = inner.behind.behind
        inner = inner.behind
    return gate
