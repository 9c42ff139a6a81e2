"""The contexts that attach interventions to a model: at its hook points, for as long as they are open, and no longer.

Interventions act in the order in which they are given, those of an inner context after those of an outer one; one that
did not act although the model ran is an error.
Knows nothing about what an intervention does.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_lens.interventions.directions import Vectors, as_given, layers_text
from persona_lens.interventions.intervention import Intervention, When, rows_in_flight
from persona_lens.interventions.positions import At, check_positions, positions_of
from persona_lens.interventions.values import Ablate, Cap, Steer, refuse_conflicting_caps
from persona_lens.models.pass_context import CurrentPass, KnownPass, announced, watch_passes
from persona_lens.models.scopes import Hook, Scope, hooked, would_act
from persona_lens.models.structure import Model, identify, residual_points
from persona_lens.vectors.provenance import Relation

_NOWHERE = torch.zeros(0, dtype=torch.bool)
"""Stands for positions that are none."""


@dataclass(eq=False)
class Attachment:
    """Interventions while they are attached.

    Attributes:
        interventions: In the order in which they act.
        at: The positions at which they act.
        relations: How the model relates to the one that each vector came from.
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
    _held: tuple[KnownPass | None, Any, Tensor | None] = field(default=(None, None, None), repr=False)

    @property
    def layers(self) -> list[int]:
        """The layers at which one of them is not the identity, ascending."""
        return sorted({layer for each in self.interventions for layer in each.acting_layers})

    @property
    def n_rows(self) -> list[int]:
        """How many rows each of them knows that treats rows each in its own way; empty where none does."""
        return [each.n_rows for each in self.interventions if each.n_rows is not None]

    @property
    def passes(self) -> int:
        """Forward passes of the model that were seen."""
        return max(self.seen.values(), default=0)

    def concerns(self, point: nn.Module) -> bool:
        """Whether they act on a pass that comes by this hook point, which is in training as its model is."""
        return point.training or not self.only_in_training

    def act(self, resid: Tensor, layer: int) -> Tensor:
        """The residual stream of a layer after all of them."""
        known = announced()
        try:
            positions = self._positions((resid.shape[0], resid.shape[1]), known)
            for each in self.interventions:
                if layer in each.acting_layers and positions is not _NOWHERE:
                    resid = each.apply(resid, positions, layer=layer, rows=rows_in_flight(each, known))
        except Exception:
            # Whoever catches this was told why the layers above did not run.
            self.ran.update(self.layers)
            raise
        self.ran.add(layer)
        return resid

    def _positions(self, shape: tuple[int, int], known: KnownPass | None) -> Tensor | None:
        """`positions_of` this pass, found once for its layers: asking whether a mask is empty makes a device wait."""
        if isinstance(self.at, str) and self.at == "all":
            return None
        held_known, held_for, positions = self._held
        if held_known is known and held_for == (shape, self._current.number):
            return positions
        positions = positions_of(self.at, shape, current=self._current, known=known, prompt_lengths=self.prompt_lengths)
        if positions is not None:
            positions = None if bool(positions.all()) else positions if bool(positions.any()) else _NOWHERE
        self._held = (known, (shape, self._current.number), positions)
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


_attached: WeakKeyDictionary[nn.Module, list[Attachment]] = WeakKeyDictionary()


def attachments(model: Model) -> tuple[Attachment, ...]:
    """The interventions that act on a model in this thread now, outermost first; none while they are suspended."""
    at_entry = list(residual_points(model)[0]._forward_hooks.values())
    acting = {getattr(hook, "scope", None) for hook in at_entry if would_act(hook)} - {None}
    return tuple(each for each in list(_attached.get(_module(model), ())) if each.scope in acting)


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
    chosen = _together(interventions)
    check_positions(at, prompt_lengths)
    found = identify(model)
    relations = [each.check_identity(found, allow_other_model=allow_other_model) for each in chosen]
    attachment = Attachment(
        chosen,
        at,
        tuple(relation for each in relations for relation in each),
        None if prompt_lengths is None else tuple(prompt_lengths),
        only_in_training,
    )
    follows = bool(attachment.layers) and isinstance(at, str) and at != "all"
    with (
        watch_passes(model, attachment.layers if follows else ()) as attachment._current,
        hooked(model, _hooks(model, attachment)) as attachment.scope,
        _listed(model, attachment),
    ):
        yield attachment
        attachment.refuse_absent()


def _together(interventions: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """The interventions, checked, with zero ablations that follow each other made into one."""
    if not interventions:
        raise ValueError("There is nothing to attach: pass at least one of Steer, Ablate and Cap.")
    for each in interventions:
        if not isinstance(each, Intervention):
            raise TypeError(f"Expected Steer, Ablate or Cap, got {type(each).__name__}.")
    refuse_conflicting_caps([each for each in interventions if isinstance(each, Cap) and each.when is None])

    def joins(each: Intervention) -> bool:
        return isinstance(each, Ablate) and each.around is None and each.when is None

    chosen: list[Intervention] = []
    for joined, group in groupby(interventions, joins):
        members = list(group)
        if joined and len(members) > 1:
            members = [replace(members[0], vectors=[given for each in members for given in as_given(each.vectors)])]
        chosen += members
    return tuple(chosen)


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
    # The list follows the hooks: what an interrupt leaves on it is not among `attachments`, and goes with the next.
    # Each change of the list is one step: other threads change it too.
    listed = _attached.setdefault(_module(model), [])
    for left in [other for other in listed if other.scope is None or not other.scope.is_open]:
        with suppress(ValueError):
            listed.remove(left)
    listed.append(attachment)
    try:
        yield
    finally:
        with suppress(ValueError):
            listed.remove(attachment)


def _module(model: Model) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


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
