"""What a safeguard is, and the record of each time that one raised an alert.

Knows nothing about models that run: a projection comes in, whether it is past the threshold goes out.

The hooks that read a reply's tokens as the decode loop runs them, and that act where a safeguard fired.

At each layer three things happen in order: the tokens are projected, safeguards on that layer are asked, and the
interventions of those that fired act; so what is read is what everything attached before has left there.
Knows nothing about sampling: the loop announces whose tokens a pass runs (`ReplyPass`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor, nn

from persona_lens.generation.decoding import ReplyPass
from persona_lens.interventions.values import Cap, Intervention, Steer, Vectors, layer_vectors, refuse_conflicting_caps
from persona_lens.models.pass_context import announced
from persona_lens.models.scopes import Hook, hooked
from persona_lens.models.structure import Model, identify, residual_points
from persona_lens.storage.files import JsonLines, ensure_writable
from persona_lens.vectors.persona_vector import PersonaVector, units_of
from persona_lens.vectors.persona_vectors import PersonaVectors

Direction = Literal["above", "below"]


@dataclass(frozen=True, eq=False)
class Safeguard:
    """Raise an alert the first time that a token of a reply projects past a threshold, and then intervene.

    The last token of the prompt, from which the reply's first one is predicted, counts as a token of the reply. A
    safeguard fires once a reply, and for that reply alone. Its intervention stays on until the reply ends, and it acts
    on the very next token: the pass that runs the token which set it off predicts the next one too, so at the watched
    layer and above the intervention acts in that same pass already, on that token, after the projection was read; at
    the layers below the watched one it acts from the next pass on.

    Attributes:
        vector: The direction that is watched, at its layer.
        threshold: In the units of `vector.project`.
        intervention: What is switched on, at the layers of its own vectors; None only raises the alert.
        direction: Which side of the threshold is past it.
    """

    vector: PersonaVector
    threshold: float
    intervention: Intervention | None = None
    direction: Direction = "above"

    def __post_init__(self) -> None:
        trait = self.vector.trait
        units_of([self.vector])  # a direction of zeros is refused now, not in the middle of a reply
        if not isfinite(self.threshold):
            raise ValueError(f"{trait}: a safeguard's threshold is a finite number, got {self.threshold}.")
        if self.direction not in get_args(Direction):
            raise ValueError(f"{trait}: direction is one of {', '.join(get_args(Direction))}, got {self.direction!r}.")
        if self.intervention is None:
            return
        if not isinstance(self.intervention, Intervention):
            got = type(self.intervention).__name__
            raise TypeError(f"{trait}: a safeguard switches on a Steer, Ablate or Cap, got {got}.")
        if self.intervention.n_rows is not None:
            raise ValueError(
                f"{trait}: a safeguard treats every reply that sets it off alike: "
                "pass one coefficient, not one for each row."
            )

    def passed(self, projections: Float[Tensor, " row"]) -> Bool[Tensor, " row"]:
        """Which projections are past the threshold."""
        return projections > self.threshold if self.direction == "above" else projections < self.threshold

    @property
    def action(self) -> str:
        """What it does beside raising the alert, in words; `alert` where that is all."""
        return "alert" if self.intervention is None else str(self.intervention)


@dataclass(frozen=True)
class Alert:
    """That a safeguard fired, and on what.

    Attributes:
        time: UTC, in ISO 8601.
        key: The key of the reply's row.
        token_index: Of the reply's tokens, counted from 0; -1 is the last token of the prompt.
        token: The id of that token.
        token_text: The text of that token alone.
        trait: The trait of the watched vector.
        layer: The layer of the watched vector.
        projection: What the token projected to.
        threshold: The safeguard's threshold.
        direction: The side of the threshold that is past it.
        action: `alert`, or in words the intervention that was switched on.
        intervention: The fingerprint of that intervention; None where there is none.
    """

    time: str
    key: str
    token_index: int
    token: int
    token_text: str
    trait: str
    layer: int
    projection: float
    threshold: float
    direction: Direction
    action: str
    intervention: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return asdict(self)


def spell(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of a reply, spaces as its tokens have them, so that more tokens never change what was spelt before."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def watched_vectors(vectors: Vectors, safeguards: Sequence[Safeguard]) -> tuple[PersonaVector, ...]:
    """The vectors in order, after them those of safeguards that are not among them. Raises ValueError for none."""
    given = [vectors] if isinstance(vectors, PersonaVector | PersonaVectors) else list(vectors)
    chosen = list(layer_vectors(given)) if given else []
    for safeguard in safeguards:
        if safeguard.vector.fingerprint not in {vector.fingerprint for vector in chosen}:
            chosen.append(safeguard.vector)
    if not chosen:
        raise ValueError("There is nothing to watch: pass at least one vector or safeguard.")
    units_of(chosen)  # a direction of zeros is refused now, not in the middle of a reply
    return tuple(chosen)


@dataclass
class WatchedRow:
    """What is known of one reply so far. `counted` has an entry for the last prompt token, then one a token."""

    key: str
    counting: bool
    tokens: list[int] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)


class Watch:
    """The projections, and the safeguards, of the replies to some prompts."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[str],
        vectors: Vectors,
        *,
        safeguards: Sequence[Safeguard],
        after: str | None,
        audit: str | Path | None,
        allow_other_model: bool,
    ):
        self.model, self.vectors, self.safeguards = model, watched_vectors(vectors, safeguards), tuple(safeguards)
        if after == "":
            raise ValueError("`after` is the text that ends a block, such as '</think>'; got an empty one.")
        self._check(vectors, allow_other_model)
        self.after, self.audit = after, _audit_file(audit)
        self.rows = [WatchedRow(key, self._starts_counting(ids)) for key, ids in zip(keys, prompts, strict=True)]
        self.layers = sorted({vector.layer for vector in self.vectors})
        self._columns = {
            layer: [index for index, vector in enumerate(self.vectors) if vector.layer == layer]
            for layer in self.layers
        }
        self._asked = [self._column_of(each.vector) for each in self.safeguards]
        ran = [column for layer in self.layers for column in self._columns[layer]]
        self._order = sorted(range(len(ran)), key=ran.__getitem__)
        self._units: dict[Any, Tensor] = {}
        self._fired: list[set[int]] = [set() for _ in self.safeguards]
        self._current: ReplyPass | None = None
        self._masks: dict[int, Tensor | None] = {}
        self._here: dict[int, Float[Tensor, "spoken here"]] = {}
        self._read: list[tuple[tuple[int, ...], Float[Tensor, "spoken vector"]]] = []

    @property
    def top(self) -> int:
        """The highest layer that is read."""
        return self.layers[-1]

    def projections(self) -> list[Float[Tensor, "token vector"]]:
        """Of the last prompt token and every token of each row, on the CPU."""
        if not self._read:
            return []
        table = torch.cat([values.cpu() for _, values in self._read])[:, self._order]
        places: list[list[int]] = [[] for _ in self.rows]
        for place, row in enumerate(row for rows, _ in self._read for row in rows):
            places[row].append(place)
        return [table[chosen] for chosen in places]

    def latest(self) -> Float[Tensor, " vector"]:
        """The projections that were read last, of a single row."""
        return self._read[-1][1][0].cpu()[self._order]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While open, passes of the decode loop are read, after whatever was attached to the model before."""
        acting = {layer for each in self.safeguards if each.intervention for layer in each.intervention.acting_layers}
        points = residual_points(self.model)
        hooks = []
        for layer in sorted({*self.layers, *acting}):

            def follow(_module: nn.Module, _inputs: Any, resid: Tensor, layer: int = layer) -> Tensor | None:
                return self._follow(resid, layer)

            hooks.append(Hook(points[layer + 1], follow))
        with hooked(self.model, hooks):
            yield

    def _check(self, vectors: Vectors, allow_other_model: bool) -> None:
        """Refuse vectors and interventions of another model, and safeguards that would undo each other."""
        found = identify(self.model)
        given = [vectors] if isinstance(vectors, PersonaVector | PersonaVectors) else list(vectors)
        interventions = [each.intervention for each in self.safeguards if each.intervention is not None]
        # The rules are those of interventions along the same vectors.
        for each in [Steer([*given, *(safe.vector for safe in self.safeguards)]), *interventions]:
            each.check(found, allow_other_model=allow_other_model)
        caps = [each for each in interventions if isinstance(each, Cap) and each.when is None]
        # Several safeguards may switch on the same one.
        refuse_conflicting_caps(list({each.fingerprint: each for each in caps}.values()))

    def _column_of(self, vector: PersonaVector) -> int:
        """Which of the vectors at its layer a safeguard's is."""
        names = [self.vectors[column].fingerprint for column in self._columns[vector.layer]]
        return names.index(vector.fingerprint)

    def _starts_counting(self, prompt: Sequence[int]) -> bool:
        """Whether no block is to be waited for; some templates close an empty one at the end of the prompt."""
        return self.after is None or self._tail(prompt).rstrip().endswith(self.after)

    def _tail(self, tokens: Sequence[int]) -> str:
        """The text of the last few tokens, enough of them for the marker, however it was cut into tokens."""
        assert self.after is not None
        return self.model.tokenizer.decode(list(tokens[-len(self.after.encode()) - 4 :]))

    def _follow(self, resid: Float[Tensor, "batch pos d_model"], layer: int) -> Tensor | None:
        known = announced()
        if not isinstance(known, ReplyPass):
            return None
        if known is not self._current:
            self._begin(known)
        if layer in self._columns:
            self._project(known, resid[:, -1], layer)
        return self._intervene(known, resid, layer)

    def _begin(self, known: ReplyPass) -> None:
        self._current = known
        self._masks.clear()
        for row, token in zip(known.speaking, known.fed, strict=True):
            state = self.rows[row]
            if state.counted:
                state.tokens.append(token)
            state.counted.append(state.counting)
            if not state.counting and state.tokens:
                assert self.after is not None
                state.counting = self.after in self._tail(state.tokens)

    def _project(self, known: ReplyPass, resid: Float[Tensor, "batch d_model"], layer: int) -> None:
        """Projections in float32, or in float64 where the model is."""
        resid = resid if resid.dtype == torch.float64 else resid.float()
        key = (layer, resid.device, resid.dtype)
        if key not in self._units:
            units = units_of([self.vectors[column] for column in self._columns[layer]])
            self._units[key] = units.to(resid.dtype).to(resid.device)
        values = einsum(resid, self._units[key], "batch d_model, vector d_model -> batch vector")
        if known.places != tuple(range(len(resid))):
            values = values[list(known.places)]
        self._here[layer] = values
        self._ask(known, values, layer)
        if layer == self.top:
            read = torch.cat([self._here[each].to(values.device) for each in self.layers], dim=-1)
            self._read.append((known.speaking, read))

    def _ask(self, known: ReplyPass, values: Float[Tensor, "spoken here"], layer: int) -> None:
        """Raise the alerts of a layer, and put them on record before anything else happens."""
        alerts: list[Alert] = []
        for index, safeguard in enumerate(self.safeguards):
            if safeguard.vector.layer != layer:
                continue
            column = values[:, self._asked[index]]
            for place in safeguard.passed(column).nonzero()[:, 0].tolist():
                row = known.speaking[place]
                if row in self._fired[index] or not self.rows[row].counted[-1]:
                    continue
                self._fired[index].add(row)
                self._masks.pop(index, None)
                alerts.append(self._alert(safeguard, self.rows[row], known.fed[place], float(column[place])))
                self.rows[row].alerts.append(alerts[-1])
        if alerts and self.audit is not None:
            self.audit.append(alert.to_dict() for alert in alerts)

    def _alert(self, safeguard: Safeguard, row: WatchedRow, token: int, projection: float) -> Alert:
        return Alert(
            time=datetime.now(UTC).isoformat(),
            key=row.key,
            token_index=len(row.tokens) - 1,
            token=token,
            token_text=self.model.tokenizer.decode([token]),
            trait=safeguard.vector.trait,
            layer=safeguard.vector.layer,
            projection=projection,
            threshold=float(safeguard.threshold),
            direction=safeguard.direction,
            action=safeguard.action,
            intervention=safeguard.intervention and safeguard.intervention.fingerprint,
        )

    def _intervene(
        self, known: ReplyPass, resid: Float[Tensor, "batch pos d_model"], layer: int
    ) -> Float[Tensor, "batch pos d_model"] | None:
        """The residual stream after the safeguards that fired, in their order; None where nothing changes."""
        changed = None
        for index, safeguard in enumerate(self.safeguards):
            each = safeguard.intervention
            if each is None or layer not in each.acting_layers or not self._fired[index]:
                continue
            if index not in self._masks:
                self._masks[index] = self._positions(known, self._fired[index], resid)
            positions = self._masks[index]
            if positions is not None:
                changed = each.apply(resid if changed is None else changed, positions, layer=layer)
        return changed

    def _positions(self, known: ReplyPass, fired: set[int], resid: Tensor) -> Tensor | None:
        """The tokens, in the last column, of the replies that set a safeguard off; None for none."""
        places = [place for row, place in zip(known.speaking, known.places, strict=True) if row in fired]
        if not places:
            return None
        positions = torch.zeros(resid.shape[:2], dtype=torch.bool)
        positions[places, -1] = True
        return positions.to(resid.device)


def _audit_file(path: str | Path | None) -> JsonLines | None:
    if path is None:
        return None
    ensure_writable(Path(path))
    file = JsonLines(path)
    file.mend([each.name for each in fields(Alert)])  # what a killed process left, before anything is added after it
    return file
