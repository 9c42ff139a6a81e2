"""The contexts that attach interventions to a model: at its hook points, for as long as they are open, and no longer.

Interventions act in the order in which they are given, those of an inner context after those of an outer one; one that
did not act although the model ran is an error.
Knows nothing about what an intervention does.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor, nn

from persona_lens.interventions.directions import Vectors, as_given, layers_text
from persona_lens.interventions.intervention import Intervention, Number, When, rows_in_flight
from persona_lens.interventions.positions import At, check_positions, positions_of
from persona_lens.interventions.values import Ablate, Cap, Steer, refuse_conflicting_caps
from persona_lens.models import CurrentPass, Model, announced, residual_points, watch_passes
from persona_lens.vectors import Relation


@dataclass(eq=False)
class Attachment:
    """Interventions while they are attached.

    Attributes:
        interventions: In the order in which they act.
        at: The positions at which they act.
        relations: How the model relates to the one that each vector came from.
        ran: The layers at which they have acted.
        passes: Forward passes of the model that were seen.
    """

    interventions: tuple[Intervention, ...]
    at: At
    relations: tuple[Relation, ...]
    prompt_lengths: tuple[int, ...] | None = None
    ran: set[int] = field(default_factory=set)
    passes: int = 0
    _current: CurrentPass = field(default_factory=CurrentPass, repr=False)

    @property
    def layers(self) -> list[int]:
        """The layers at which one of them is not the identity, ascending."""
        return sorted({layer for each in self.interventions for layer in each.acting_layers})

    @property
    def row_wise(self) -> bool:
        """Whether one of them treats the rows of a batch differently."""
        return any(each.row_wise for each in self.interventions)

    def act(self, resid: Tensor, layer: int) -> Tensor:
        """The residual stream of a layer after all of them."""
        self.ran.add(layer)
        known = announced()
        shape = (resid.shape[0], resid.shape[1])
        positions = positions_of(self.at, shape, current=self._current, known=known, prompt_lengths=self.prompt_lengths)
        if positions is not None and not bool(positions.any()):
            return resid
        for each in self.interventions:
            if layer in each.acting_layers:
                resid = each.apply(resid, positions, layer=layer, rows=rows_in_flight(each, known))
        return resid

    def refuse_absent(self) -> None:
        """Raise RuntimeError where the model ran and a layer did not."""
        absent = [layer for layer in self.layers if layer not in self.ran]
        if self.passes and absent:
            raise RuntimeError(
                f"{self.interventions[0]}: the model ran {self.passes} times and never reached {layers_text(absent)}, "
                "so the intervention did not act there: raise stop_at_layer, or attach it to layers that run."
            )


_attached: WeakKeyDictionary[nn.Module, list[Attachment]] = WeakKeyDictionary()


def attachments(model: Model) -> tuple[Attachment, ...]:
    """The interventions that are attached to a model now, outermost first."""
    return tuple(_attached.get(_module(model), ()))


@contextmanager
def intervene(
    model: Model,
    *interventions: Intervention,
    at: At = "all",
    prompt_lengths: Sequence[int] | None = None,
    allow_other_model: bool = False,
) -> Iterator[Attachment]:
    """Attach interventions to the model while the context is open.

    They act on every forward pass, whoever runs it: `model(...)`, either `generate`, `run_with_cache`, a PEFT model or
    a trainer around the same weights; gradients flow through them. Judges run with them suspended. `at` says on which
    tokens: `all`; `response`, the last prompt token and all later ones; `prompt`, the prompt's; or a mask [batch, pos]
    of one forward pass. Generation knows where the prompt ends by its key-value cache; a forward pass without one needs
    `prompt_lengths`, how many tokens (padding not counted) the prompt of each row has.

    Nested contexts act in entry order, the inner last. `Ablate`s that follow each other remove their directions
    together; `Cap`s at one layer must be orthogonal.

    Raises:
        ValueError: A vector does not belong to the model, its layer is out of range, positions or caps contradict each
            other; while the model runs, also where the positions cannot be known or coefficients do not fit the batch.
        RuntimeError: On leaving without another exception, where the model ran and a layer never did.
    """
    chosen = _together(interventions)
    check_positions(at, prompt_lengths)
    relations = [each.check(model, allow_other_model=allow_other_model) for each in chosen]
    attachment = Attachment(
        chosen,
        at,
        tuple(relation for found in relations for relation in found),
        None if prompt_lengths is None else tuple(prompt_lengths),
    )
    with ExitStack() as stack:
        _hook(model, attachment, stack)
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


def _hook(model: Model, attachment: Attachment, stack: ExitStack) -> None:
    """Attach the hooks; leaving the stack removes every one of them, also those of an entry that failed half way."""
    points = residual_points(model)

    def count(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        attachment.passes += 1

    def count_late(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        # A pass that starts above the first block has not been counted there.
        attachment.passes = max(attachment.passes, 1)

    for point, counter in ((points[0], count), (points[-1], count_late)):
        stack.callback(point.register_forward_hook(counter).remove)
    if attachment.layers and isinstance(attachment.at, str) and attachment.at != "all":
        attachment._current = stack.enter_context(watch_passes(model, attachment.layers))
    for layer in attachment.layers:

        def act(_module: nn.Module, _inputs: Any, resid: Tensor, layer: int = layer) -> Tensor:
            return attachment.act(resid, layer)

        stack.callback(points[layer + 1].register_forward_hook(act).remove)
    held = _attached.setdefault(_module(model), [])
    held.append(attachment)
    stack.callback(held.remove, attachment)


def _module(model: Model) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def steer(
    model: Model,
    vectors: Vectors,
    coefficient: Number | Float[Tensor, "row vector"] | Float[Tensor, " row"] = 1.0,
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
    maximum: Number | Float[Tensor, " vector"] | None = None,
    minimum: Number | Float[Tensor, " vector"] | None = None,
    at: At = "all",
    when: When | None = None,
    prompt_lengths: Sequence[int] | None = None,
    allow_other_model: bool = False,
) -> AbstractContextManager[Attachment]:
    """`intervene` with one `Cap`: hold the projection on the vectors within bounds. Source: arXiv:2601.10387."""
    value = Cap(vectors, maximum, minimum, when=when)
    return intervene(model, value, at=at, prompt_lengths=prompt_lengths, allow_other_model=allow_other_model)
