"""The contexts that attach interventions to a model: at its hook points, for as long as they are open, and no longer.

`steer`, `ablate` and `cap` make one value and hand it to `intervene`, which hangs two kinds of hooks on the model: one
at every point of the residual stream that counts the passes, and one at each layer where something acts. The latter
finds the positions of the pass and calls the value's own `apply`. Interventions act in the order in which they are
passed, those of an inner context after those of an outer one; one that did not act although the model ran is an error.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from persona_lens.interventions.positions import At, check_positions, positions_of
from persona_lens.interventions.values import (
    Ablate,
    Cap,
    Intervention,
    Residual,
    Steer,
    Vectors,
    When,
    as_list,
    layers_text,
    refuse_conflicting_caps,
)
from persona_lens.models.pass_context import CurrentPass, KnownPass, announced, watch_passes
from persona_lens.models.scopes import Hook, Scope, hooked, would_act
from persona_lens.models.structure import Model, identify, resid_post_name, residual_points
from persona_lens.vectors.provenance import Relation

_NOWHERE = torch.zeros(0, dtype=torch.bool)
"""Stands for a pass without any position to act at."""


@dataclass(eq=False)
class Attachment:
    """Interventions while they are attached.

    Attributes:
        interventions: In the order in which they act.
        at: The positions at which they act.
        relations: How the model relates to the one that each vector came from.
        prompt_lengths: Tokens of each row up to its response, where the caller passed them.
        only_in_training: Whether passes of the model in evaluation mode are left alone.
        ran: The layers at which they have acted.
        seen: How often each point of the residual stream was passed, the entry of block 0 being 0.
        scope: In whose passes they act; None before they are attached.
    """

    interventions: tuple[Intervention, ...]
    at: At
    relations: tuple[Relation, ...]
    prompt_lengths: tuple[int, ...] | None = None
    only_in_training: bool = False
    ran: set[int] = field(default_factory=set)
    seen: Counter[int] = field(default_factory=Counter, repr=False)
    scope: Scope | None = field(default=None, repr=False)
    _current: CurrentPass = field(default_factory=CurrentPass, repr=False)
    _last: tuple[KnownPass | None, Any, Tensor | None] = field(default=(None, None, None), repr=False)

    @property
    def layers(self) -> list[int]:
        """The layers at which one of them is not the identity, ascending."""
        return sorted({layer for value in self.interventions for layer in value.acting_layers})

    @property
    def n_rows(self) -> list[int]:
        """The rows of each coefficient matrix; empty where there is none."""
        return [value.n_rows for value in self.interventions if value.n_rows is not None]

    @property
    def passes(self) -> int:
        """Forward passes of the model that were seen."""
        return max(self.seen.values(), default=0)

    def concerns(self, point: nn.Module) -> bool:
        """Whether they act on a pass through this hook point, which is in training mode as its model is."""
        return point.training or not self.only_in_training

    def act(self, resid: Tensor, layer: int) -> Tensor:
        """The residual stream of a layer after all of them."""
        known = announced()
        try:
            positions = self._positions((resid.shape[0], resid.shape[1]), known)
            for value in self.interventions:
                if layer in value.acting_layers and positions is not _NOWHERE:
                    resid = value.apply(resid, positions, layer=layer, rows=_rows(value, known))
        except Exception:
            # The layers above will not run, and whoever catches this knows why: `refuse_absent` must not complain too.
            self.ran.update(self.layers)
            raise
        self.ran.add(layer)
        return resid

    def _positions(self, shape: tuple[int, int], known: KnownPass | None) -> Tensor | None:
        """`positions_of` this pass, computed once for all layers: asking a device whether a mask is empty is slow."""
        if isinstance(self.at, str) and self.at == "all":
            return None
        this_pass = (shape, self._current.number)
        last_known, last_pass, positions = self._last
        if last_known is known and last_pass == this_pass:
            return positions
        positions = positions_of(self.at, shape, current=self._current, known=known, prompt_lengths=self.prompt_lengths)
        if positions is not None:
            positions = None if bool(positions.all()) else positions if bool(positions.any()) else _NOWHERE
        self._last = (known, this_pass, positions)
        return positions

    def refuse_absent(self) -> None:
        """Raise RuntimeError where the model ran and a layer did not, or only threads that began meanwhile ran it."""
        absent = [layer for layer in self.layers if layer not in self.ran]
        if self.passes and absent:
            raise RuntimeError(
                f"{self.interventions[0]}: the model ran {self.passes} times and never reached {layers_text(absent)}, "
                "so the intervention did not act there: raise stop_at_layer, or attach it to layers that run."
            )
        if not self.passes and self.layers and self.scope is not None and self.scope.foreign_passes:
            raise RuntimeError(
                f"{self.interventions[0]}: the model ran only in threads that began meanwhile, and it acts "
                "only in the thread that opened its context: open it in the thread that runs the model, or start that "
                "one by asyncio.to_thread or contextvars.copy_context().run."
            )


def _rows(intervention: Intervention, known: KnownPass | None) -> Int[Tensor, " batch"] | None:
    """Which rows of the plan a pass runs; None where its batch is the plan.

    Raises ValueError where a row of the pass serves several rows that have coefficients of their own.
    """
    if intervention.n_rows is None or known is None:
        return None
    if known.rows is None:
        raise ValueError(
            f"{intervention.traits}: a shared prompt runs once for several rows, which have coefficients of their own: "
            "attach row-wise coefficients with intervene(), around generate, with at='response'."
        )
    return known.rows


_attached: WeakKeyDictionary[Any, list[Attachment]] = WeakKeyDictionary()


def attachments(model: Model) -> tuple[Attachment, ...]:
    """The interventions that act on a model in this thread now, outermost first; none while they are suspended."""
    at_entry = list(residual_points(model)[0]._forward_hooks.values())
    acting = {getattr(hook, "scope", None) for hook in at_entry if would_act(hook)} - {None}
    return tuple(attachment for attachment in list(_attached.get(model, ())) if attachment.scope in acting)


@contextmanager
def intervene(
    model: Model,
    *interventions: Intervention,
    at: At = "all",
    prompt_lengths: Sequence[int] | None = None,
    only_in_training: bool = False,
    allow_other_model: bool = False,
) -> Iterator[Attachment]:
    """Attach interventions to the model while the context is open.

    They act on every forward pass of the thread that opened the context, whoever runs it: `model(...)`, either
    `generate`, `run_with_cache`, a PEFT model or a trainer around the same weights; gradients flow through them. In
    another thread they act where it was handed the context (`asyncio.to_thread`, `contextvars.copy_context().run`), and
    else its passes go through as without them. Judges run with them suspended. `at` says on which
    tokens: `all`; `response`, the last prompt token and all later ones; `prompt`, the prompt's; or a mask [batch, pos]
    of one forward pass. Generation knows where the prompt ends; a forward pass without a cache, several tokens at once
    onto a filled one and assisted decoding do not, and need `prompt_lengths`, how many tokens (cached ones included,
    padding not counted) each row has up to where its response begins. `only_in_training` leaves passes of the model in
    evaluation mode alone, as a trainer's evaluations are (arXiv:2507.21509, section 5).

    Nested contexts act in entry order, the inner last. `Ablate`s that follow each other remove their directions
    together; `Cap`s at one layer must be orthogonal.

    Raises:
        ValueError: A vector does not belong to the model, its layer is out of range, positions or caps contradict each
            other; while the model runs, also where the positions cannot be known or coefficients do not fit the batch.
        RuntimeError: On leaving without another exception, where the model ran and a layer never did, or where it ran
            only in threads that were started inside the context and not handed it.
    """
    values = _with_joined_ablations(interventions)
    check_positions(at, prompt_lengths)
    identity = identify(model)  # which reads every weight: once for all vectors
    relations: list[Relation] = []
    for value in values:
        relations += value.check(identity, allow_other_model=allow_other_model)
    lengths = None if prompt_lengths is None else tuple(prompt_lengths)
    attachment = Attachment(values, at, tuple(relations), lengths, only_in_training)
    needs_boundary = isinstance(at, str) and at != "all"
    with (
        watch_passes(model, attachment.layers if needs_boundary else ()) as attachment._current,
        hooked(model, _hooks(model, attachment)) as attachment.scope,
        _listed(model, attachment),
    ):
        yield attachment
        attachment.refuse_absent()


def _with_joined_ablations(interventions: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """The interventions, checked, with zero ablations that follow each other joined into one, which removes a span."""
    if not interventions:
        raise ValueError("There is nothing to attach: pass at least one of Steer, Ablate and Cap.")
    for value in interventions:
        if not isinstance(value, Intervention):
            raise TypeError(f"Expected Steer, Ablate or Cap, got {type(value).__name__}.")
    refuse_conflicting_caps([value for value in interventions if isinstance(value, Cap) and value.when is None])

    def joins(value: Intervention) -> bool:
        return isinstance(value, Ablate) and value.around is None and value.when is None

    joined: list[Intervention] = []
    for is_zero_ablation, group in groupby(interventions, joins):
        members = list(group)
        if is_zero_ablation and len(members) > 1:
            members = [replace(members[0], vectors=[v for member in members for v in as_list(member.vectors)])]
        joined += members
    return tuple(joined)


def _hooks(model: Model, attachment: Attachment) -> list[Hook]:
    """Hooks that count the passes, at every layer since a pass may start above the first block, and those that act."""
    points = residual_points(model)
    hooks = []
    for index, point in enumerate(points):

        def count(point: nn.Module, _inputs: Any, _output: Any, index: int = index) -> None:
            attachment.seen[index] += attachment.concerns(point)

        hooks.append(Hook(point, count))
    for layer in attachment.layers:

        def act(point: nn.Module, _inputs: Any, resid: Tensor, layer: int = layer) -> Tensor:
            return attachment.act(resid, layer) if attachment.concerns(point) else resid

        hooks.append(Hook(points[layer + 1], act))
    return hooks


@contextmanager
def _listed(model: Model, attachment: Attachment) -> Iterator[None]:
    # The hooks decide what acts, and the list only names it: an entry that an interrupt left behind has a closed scope,
    # so `attachments` skips it and the next call removes it. Other threads change the list too, hence single steps.
    entries = _attached.setdefault(model, [])
    for stale in [other for other in entries if other.scope is None or not other.scope.is_open]:
        with suppress(ValueError):
            entries.remove(stale)
    entries.append(attachment)
    try:
        yield
    finally:
        with suppress(ValueError):
            entries.remove(attachment)


def fwd_hooks(
    model: Model, intervention: Intervention, *, at: At = "all", allow_other_model: bool = False
) -> list[tuple[str, Callable[..., Residual]]]:
    """An intervention as TransformerLens hooks, for `run_with_hooks(fwd_hooks=...)` and `model.hooks(fwd_hooks=...)`.

    `at` is `all`, or a mask [batch, pos] for one forward pass: a hook of this kind cannot see the key-value cache, by
    which `intervene` follows a generation. Raises ValueError for a model that the vectors do not belong to.
    """
    check_positions(at, None)
    if isinstance(at, str) and at != "all":
        raise ValueError(f"TransformerLens hooks cannot know at={at!r}: pass a mask, or use intervene().")
    intervention.check(model, allow_other_model=allow_other_model)

    def act(resid: Residual, hook: Any = None, *, layer: int) -> Residual:
        known = announced()
        positions = positions_of(at, (resid.shape[0], resid.shape[1]), current=CurrentPass(), known=known)
        return intervention.apply(resid, positions, layer=layer, rows=_rows(intervention, known))

    return [(resid_post_name(layer), partial(act, layer=layer)) for layer in intervention.acting_layers]


def steer(
    model: Model,
    vectors: Vectors,
    coefficient: float | Float[Tensor, "row vector"] | Float[Tensor, " row"] = 1.0,
    *,
    at: At = "all",
    when: When | None = None,
    prompt_lengths: Sequence[int] | None = None,
    allow_other_model: bool = False,
) -> AbstractContextManager[Attachment]:
    """`intervene` with one `Steer`: add `coefficient` times each vector at its layer.

    Source: arXiv:2507.21509, section 3.2; `vectors.incremental()` for all layers at once, section J.3.
    """
    value = Steer(vectors, coefficient, when=when)
    return intervene(model, value, at=at, prompt_lengths=prompt_lengths, allow_other_model=allow_other_model)


def ablate(
    model: Model,
    vectors: Vectors,
    *,
    around: Float[Tensor, "layer d_model"] | Float[Tensor, " d_model"] | None = None,
    at: At = "all",
    when: When | None = None,
    prompt_lengths: Sequence[int] | None = None,
    allow_other_model: bool = False,
) -> AbstractContextManager[Attachment]:
    """`intervene` with one `Ablate`: remove the component along the vectors at their layers, or make it `around`'s.

    Source: arXiv:2507.21509, section J.4 (at every layer, as CAFT does: pass `PersonaVectors`).
    """
    value = Ablate(vectors, around, when=when)
    return intervene(model, value, at=at, prompt_lengths=prompt_lengths, allow_other_model=allow_other_model)


def cap(
    model: Model,
    vectors: Vectors,
    *,
    maximum: float | Float[Tensor, " vector"] | None = None,
    minimum: float | Float[Tensor, " vector"] | None = None,
    at: At = "all",
    when: When | None = None,
    prompt_lengths: Sequence[int] | None = None,
    allow_other_model: bool = False,
) -> AbstractContextManager[Attachment]:
    """`intervene` with one `Cap`: hold the projection on the vectors within bounds. Source: arXiv:2601.10387."""
    value = Cap(vectors, maximum, minimum, when=when)
    return intervene(model, value, at=at, prompt_lengths=prompt_lengths, allow_other_model=allow_other_model)
