"""How this package attaches something to a user's model: in which forward passes it acts, and how it is removed.

Everything that is attached (hooks, adapters, and the gates that silence other people's hooks) belongs to a `Scope`,
which is one opening of one of our contexts. It keeps two promises.

*It acts in its own passes only.* These are the forward passes in the thread (and asyncio task) that opened the scope,
and in contexts copied from there, as `asyncio.to_thread` does. Every other pass runs as if nothing were attached, so
another thread may run the same model meanwhile. A hook therefore asks `Scope.acts()` whenever it is called.

*It is removed.* Ctrl-C can strike between any two bytecode instructions, also inside the code that removes things. So

1. what undoes a change is recorded on the model's ledger before anything is changed;
2. undoing looks at the model for what is still there, and may run any number of times;
3. a scope whose context's frame is gone, or whose closing was interrupted, acts no more. It is undone when the frame is
   freed (a finalizer on a guard object that only this frame holds), or by the next use of the model (`repair`).

Contexts that build on `scope_on` are nested `with` statements, since an `ExitStack` that an interrupt crosses keeps its
frames alive until the next garbage collection.
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
"""The open scopes of this context, or of the one that it was copied from."""

_ledgers: "weakref.WeakKeyDictionary[nn.Module, list[Scope]]" = weakref.WeakKeyDictionary()
"""The scopes of each model that are not known to be undone, oldest first."""

_locks: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()


class _Guard:
    """Referenced by the frame of an open context alone: once it is freed, nobody is left to close the scope."""


class Scope:
    """One opening of a context that attaches something to a model.

    Attributes:
        foreign_passes: How often one of its hooks stayed silent in a pass of a thread that began while it was open,
            which suggests that the user meant it to act there.
    """

    def __init__(self, undo: Callable[["Scope"], None], guard: _Guard):
        self.foreign_passes = 0
        self._undo = undo
        self._guard = weakref.ref(guard)
        # The thread itself, since its number is reused after it has ended.
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
        """Whether an interrupt prevented it from being undone."""
        return not self._closed and (self._closing or self._guard() is None)

    def acts(self) -> bool:
        """Whether it is open and the caller runs in one of its own passes."""
        return self.is_open and (self in _entered.get() or self._was_opened_here())

    def _was_opened_here(self) -> bool:
        if threading.current_thread() is not self._thread():
            # Activation checkpointing repeats forward passes in threads of autograd, which have no context variables.
            return _is_recomputing()
        opener = None if self._task is None else self._task()
        # If the task has ended, the context outlives it: a notebook runs each cell in a task of its own.
        return opener is None or opener.done() or opener is _current_task()

    def note_foreign_pass(self) -> None:
        """Count a pass that is not its own, unless its thread existed before the scope."""
        self.foreign_passes += threading.current_thread() not in self._threads_before

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scope":
        return self

    def close(self) -> None:
        """Undo what was attached. May be called again, also after an interrupted call."""
        if not self._closed:
            self._closing = True
            try:
                self._undo(self)
            except BaseException:  # an interrupt: finish undoing before it goes on
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
    """Whether this is a backward pass in a thread of autograd, which Python did not start."""
    in_backward = getattr(torch._C, "_current_graph_task_id", lambda: -1)() != -1
    return in_backward and type(threading.current_thread()).__name__ == "_DummyThread"


def model_lock(model: Any) -> Any:
    """The lock of a model, held during forward passes of this package and while PEFT changes its modules."""
    return _locks.setdefault(model, threading.RLock())


def repair(model: Any) -> None:
    """Undo what an interrupt left on the model, newest first."""
    ledger = _ledgers.get(model, [])
    for scope in ledger[::-1]:
        if scope.is_stale:
            scope.close()
        if scope._closed:
            # Changing the list is atomic, so there is no lock that an interrupt could leave locked.
            with suppress(ValueError):
                ledger.remove(scope)


@contextmanager
def scope_on(model: Any, undo: Callable[[Scope], None]) -> Iterator[Scope]:
    """A new scope, in which the caller may change the model; `undo(scope)` reverts the changes on leaving.

    `undo` must tolerate that a change is not there (yet, or any more), and must not refer to the caller's frame, since
    the scope would then keep that frame alive.
    """
    repair(model)
    guard = _Guard()
    scope = Scope(undo, guard)
    _ledgers.setdefault(model, []).append(scope)
    # If an interrupt strikes before the `try`, this closes the scope as soon as the frame is freed.
    finalizer = weakref.finalize(guard, scope.close)
    finalizer.atexit = False
    try:
        _entered.set(_entered.get() | {scope})
        yield scope
    finally:
        scope.close()
        finalizer.detach()  # Python drops exceptions in finalizers, so an interrupt in there would be lost
        repair(model)


@contextmanager
def global_randomness_kept(model: Any) -> Iterator[None]:
    """Restore the global generators of Python, numpy and torch on leaving; other libraries draw from them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def put_back(_: Scope) -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_devices is not None:
            torch.cuda.set_rng_state_all(on_devices)

    with scope_on(model, put_back):
        yield


class Hook(NamedTuple):
    """A forward hook to attach: `function(module, inputs, output)`.

    With `before` it runs before the module: `function(module, inputs, named_inputs)`.
    """

    module: nn.Module
    function: Callable[..., Any]
    before: bool = False


class ScopedHook:
    """A hook as it stands in a module: silent outside its scope's passes."""

    __slots__ = ("function", "scope")

    def __init__(self, scope: Scope, function: Callable[..., Any]):
        self.scope, self.function = scope, function

    def __call__(self, *args: Any) -> Any:
        """Called by torch; None leaves the module's output unchanged."""
        if self.scope.acts():
            return self.function(*args)
        self.scope.note_foreign_pass()
        return None

    def acts(self) -> bool:
        """Whether it would act in a pass that runs now."""
        return self.scope.acts()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScopedHook":
        return self  # a deep copy of the model shares the hook, for as long as its scope is open


@contextmanager
def hooked(model: Any, hooks: Sequence[Hook]) -> Iterator[Scope]:
    """Attach hooks, in their order, while the context is open; the module docstring says where they act."""
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
    # Not by torch's handles: an interrupt right after attaching a hook loses its handle.
    for module in modules:
        for hooks, others in _hook_tables(module):
            for key in [key for key, hook in list(hooks.items()) if getattr(hook, "scope", None) is scope]:
                hooks.pop(key, None)
                for other in others:
                    other.pop(key, None)


def _hook_tables(module: nn.Module) -> list[tuple[dict[int, Any], list[dict[int, bool]]]]:
    """The forward hooks and pre-hooks of a module, each with torch's other tables that have the same keys."""
    return [
        (module._forward_hooks, [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]),
        (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
    ]


def would_act(hook: Any) -> bool:
    """Whether a hook on a module would act in a pass that runs now; other people's always do."""
    return hook.acts() if isinstance(hook, ScopedHook | _Gate) else True


class _Gate:
    """Replaces a hook in its table, and lets it act in all passes but those of a suspension."""

    __slots__ = ("behind", "suspension")

    def __init__(self, behind: Any, suspension: Scope):
        self.behind, self.suspension = behind, suspension

    @property
    def scope(self) -> Scope | None:
        """The scope of the hook behind the gate."""
        return getattr(self.behind, "scope", None)

    def acts(self) -> bool:
        """Whether the hook behind the gate would act in a pass that runs now."""
        return not self.suspension.acts() and would_act(self.behind)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self.suspension.acts() else self.behind(*args, **kwargs)


class ForwardGate:
    """Replaces a module's `forward` by other functions inside or outside the passes of a scope.

    Attributes:
        scope: The scope.
        inside: What runs in its own passes; None for the module's forward.
        outside: What runs in all other passes; None for the module's forward.
        behind: The `forward` that was set on the module object itself before, if any.
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
        """For a deep copy of the module, which has no scope: its own forward."""
        module = self._module()
        if self.behind is not None or module is None or id(module) not in memo:
            return copy.deepcopy(self.behind, memo)
        return partial(type(module).forward, memo[id(module)])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called by torch in place of the module's forward."""
        instead = self.inside if self.scope.acts() else self.outside
        if (forward := self.behind if instead is None else instead) is not None:
            return forward(*args, **kwargs)
        module = self._module()
        return type(module).forward(module, *args, **kwargs)  # type: ignore[union-attr]


def gate_hooks(modules: Sequence[nn.Module], suspension: Scope, silenced: Callable[[nn.Module, Any], bool]) -> None:
    """Silence the hooks for which `silenced(module, hook)` is true, in the passes of a suspension."""
    for module in modules:
        for hooks, _ in _hook_tables(module):
            for key, hook in list(hooks.items()):
                if silenced(module, hook):
                    hooks[key] = _Gate(hook, suspension)


def gate_forward(module: nn.Module, gate: ForwardGate) -> None:
    """Replace a module's forward by a gate."""
    vars(module)["forward"] = gate


def open_gates(modules: Sequence[nn.Module], scope: Scope) -> None:
    """Remove every gate of a scope, also those behind gates of other scopes."""
    for module in modules:
        for hooks, _ in _hook_tables(module):
            for key, hook in list(hooks.items()):
                if key in hooks and isinstance(hook, _Gate):
                    hooks[key] = _without(hook, lambda gate: isinstance(gate, _Gate) and gate.suspension is scope)
        own = vars(module)
        if isinstance(own.get("forward"), ForwardGate):
            remaining = _without(own["forward"], lambda gate: isinstance(gate, ForwardGate) and gate.scope is scope)
            if remaining is None:
                own.pop("forward", None)
            else:
                own["forward"] = remaining


def _without(gate: Any, is_ours: Callable[[Any], bool]) -> Any:
    """A chain of gates without those that are ours."""
    while is_ours(gate):
        gate = gate.behind
    inner = gate
    while isinstance(inner, _Gate | ForwardGate):
        while is_ours(inner.behind):
            inner.behind = inner.behind.behind
        inner = inner.behind
    return gate
