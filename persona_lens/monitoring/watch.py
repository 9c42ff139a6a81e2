"""Safeguards, and the hooks that read a reply's tokens as the decode loop runs them.

At each watched layer three things happen in this order: the tokens are projected, the safeguards on that layer are
checked, and the interventions of those that fired act. So a projection is what all hooks that were attached before have
left there. Which reply each row of a batch speaks for is announced by the decode loop with every pass (`ReplyPass`).
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
from persona_lens.interventions.directions import Vectors, each_vector
from persona_lens.interventions.intervention import Intervention
from persona_lens.interventions.values import Cap, Steer, refuse_conflicting_caps
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

    A safeguard fires at most once in a reply, and acts on that reply alone, until it ends. The prompt's last token,
    which predicts the reply's first one, counts as a token of the reply. The intervention affects the very next token:
    the pass that runs the offending token also predicts the next one, so at the watched layer and above the
    intervention acts in that same pass, after the projection was read; below the watched layer from the next pass on.

    Attributes:
        vector: The direction that is watched, at its layer.
        threshold: In the units of `vector.project`.
        intervention: What is switched on, at the layers of its own vectors; None only raises the alert.
        direction: The side of the threshold that raises the alert.
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
                f"{trait}: a safeguard treats all replies alike: pass one coefficient, not one for each row."
            )

    def passed(self, projections: Float[Tensor, " row"]) -> Bool[Tensor, " row"]:
        """Which projections are past the threshold."""
        return projections > self.threshold if self.direction == "above" else projections < self.threshold

    @property
    def action(self) -> str:
        """Its intervention in words; `alert` where it has none."""
        return "alert" if self.intervention is None else str(self.intervention)


@dataclass(frozen=True)
class Alert:
    """A safeguard fired.

    Attributes:
        time: UTC, in ISO 8601.
        key: The key of the reply's row.
        token_index: The token's index in the reply, from 0; -1 is the last token of the prompt.
        token: The id of that token.
        token_text: The text of that token alone.
        trait: The trait of the watched vector.
        layer: The layer of the watched vector.
        projection: The token's projection.
        threshold: The safeguard's threshold.
        direction: The side of the threshold that raises the alert.
        action: `alert`, or the intervention that was switched on, in words.
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
    """The text of a reply, spaces left as they are: more tokens never change the text of those before."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


@dataclass
class WatchedRow:
    """One reply so far. `counted` has an entry for the last prompt token, followed by one for each token."""

    key: str
    counting: bool
    tokens: list[int] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)


class ReplyWatch:
    """Projects the replies to some prompts and runs their safeguards, while `attached` is open."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[str],
        vectors: Vectors,
        safeguards: Sequence[Safeguard],
        after: str | None,
        audit_file: str | Path | None,
        allow_other_model: bool,
    ):
        if after == "":
            raise ValueError("`after` is the text that ends a block, such as '</think>'; got an empty one.")
        self.model, self.safeguards, self.after = model, tuple(safeguards), after
        self.vectors = self._check(vectors, allow_other_model)
        self.audit = _audit(audit_file)
        self.rows = [WatchedRow(key, self._starts_counting(ids)) for key, ids in zip(keys, prompts, strict=True)]
        self.layers = sorted({vector.layer for vector in self.vectors})
        # The columns of each layer, and of each safeguard within its layer.
        self._columns = {
            layer: [index for index, vector in enumerate(self.vectors) if vector.layer == layer]
            for layer in self.layers
        }
        self._safeguard_columns = [self._column_of(safeguard.vector) for safeguard in self.safeguards]
        # Values are read layer by layer; this order puts them back into the order of the vectors.
        by_layer = [column for layer in self.layers for column in self._columns[layer]]
        self._order = sorted(range(len(by_layer)), key=by_layer.__getitem__)
        self._units: dict[Any, Tensor] = {}
        self._fired: list[set[int]] = [set() for _ in self.safeguards]
        # Of the pass that is running: its rows, the tokens at which each safeguard acts, the values read so far.
        self._current: ReplyPass | None = None
        self._masks: dict[int, Tensor | None] = {}
        self._values: dict[int, Float[Tensor, "spoken here"]] = {}
        # Of all passes: the rows that spoke, and their values.
        self._read: list[tuple[tuple[int, ...], Float[Tensor, "spoken vector"]]] = []

    @property
    def top(self) -> int:
        """The highest layer that is read."""
        return self.layers[-1]

    def projections(self) -> list[Float[Tensor, "token vector"]]:
        """For each row, the last prompt token's and every token's, on the CPU."""
        if not self._read:
            return []
        table = torch.cat([values.cpu() for _, values in self._read])[:, self._order]
        places: list[list[int]] = [[] for _ in self.rows]
        for place, row in enumerate(row for rows, _ in self._read for row in rows):
            places[row].append(place)
        return [table[of_row] for of_row in places]

    def latest(self) -> Float[Tensor, " vector"]:
        """The projections that were read last, for a watch of a single row."""
        return self._read[-1][1][0].cpu()[self._order]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While open, passes of the decode loop are read, after whatever was attached to the model before."""
        points = residual_points(self.model)
        interventions = [safeguard.intervention for safeguard in self.safeguards if safeguard.intervention]
        acting = {layer for intervention in interventions for layer in intervention.acting_layers}
        hooks = []
        for layer in sorted({*self.layers, *acting}):

            def follow(_module: nn.Module, _inputs: Any, resid: Tensor, layer: int = layer) -> Tensor | None:
                return self._follow(resid, layer)

            hooks.append(Hook(points[layer + 1], follow))
        with hooked(self.model, hooks):
            yield

    def _check(self, vectors: Vectors, allow_other_model: bool) -> tuple[PersonaVector, ...]:
        """The vectors in order, followed by those of safeguards that are not among them.

        Raises ValueError for none, for vectors or interventions of another model, and for safeguards that would undo
        each other.
        """
        given = [vectors] if isinstance(vectors, PersonaVector | PersonaVectors) else list(vectors)
        columns = list(each_vector(given)) if given else []
        for safeguard in self.safeguards:
            if safeguard.vector.fingerprint not in {vector.fingerprint for vector in columns}:
                columns.append(safeguard.vector)
        if not columns:
            raise ValueError("There is nothing to watch: pass at least one vector or safeguard.")
        units_of(columns)  # a direction of zeros is refused now, not in the middle of a reply
        identity = identify(self.model)
        interventions = [safeguard.intervention for safeguard in self.safeguards if safeguard.intervention is not None]
        # Watching has the rules of steering along the same vectors.
        watching = Steer([*given, *(safeguard.vector for safeguard in self.safeguards)])
        for intervention in [watching, *interventions]:
            intervention.check_identity(identity, allow_other_model=allow_other_model)
        caps = [
            intervention for intervention in interventions if isinstance(intervention, Cap) and not intervention.when
        ]
        # Several safeguards may switch on the same one.
        refuse_conflicting_caps(list({cap.fingerprint: cap for cap in caps}.values()))
        return tuple(columns)

    def _column_of(self, vector: PersonaVector) -> int:
        """The column of a safeguard's vector among those of its layer."""
        return [self.vectors[column].fingerprint for column in self._columns[vector.layer]].index(vector.fingerprint)

    def _starts_counting(self, prompt: Sequence[int]) -> bool:
        """Whether tokens count from the start; some templates close an empty block at the end of the prompt."""
        return self.after is None or self._tail(prompt).rstrip().endswith(self.after)

    def _tail(self, tokens: Sequence[int]) -> str:
        """The text of the last few tokens, enough for the text `after`, however it was cut into tokens."""
        assert self.after is not None
        return self.model.tokenizer.decode(list(tokens[-len(self.after.encode()) - 4 :]))

    def _follow(self, resid: Float[Tensor, "batch pos d_model"], layer: int) -> Tensor | None:
        """The hook at a layer: read, check, act. None leaves the stream as it is."""
        reply_pass = announced()
        if not isinstance(reply_pass, ReplyPass):
            return None
        if reply_pass is not self._current:
            self._begin(reply_pass)
        if layer in self._columns:
            self._project(reply_pass, resid[:, -1], layer)
        return self._intervene(reply_pass, resid, layer)

    def _begin(self, reply_pass: ReplyPass) -> None:
        """Book the tokens that a new pass runs, and whether they count."""
        self._current = reply_pass
        self._masks.clear()
        for row, token in zip(reply_pass.speaking, reply_pass.fed, strict=True):
            state = self.rows[row]
            if state.counted:  # the first token of a row is the prompt's last
                state.tokens.append(token)
            state.counted.append(state.counting)
            if not state.counting and state.tokens:
                assert self.after is not None
                state.counting = self.after in self._tail(state.tokens)

    def _project(self, reply_pass: ReplyPass, resid: Float[Tensor, "batch d_model"], layer: int) -> None:
        """Projections in float32, or in float64 where the model is."""
        resid = resid if resid.dtype == torch.float64 else resid.float()
        key = (layer, resid.device, resid.dtype)
        if key not in self._units:
            units = units_of([self.vectors[column] for column in self._columns[layer]])
            self._units[key] = units.to(resid.dtype).to(resid.device)
        values = einsum(resid, self._units[key], "batch d_model, vector d_model -> batch vector")
        if reply_pass.places != tuple(range(len(resid))):
            values = values[list(reply_pass.places)]
        self._values[layer] = values
        self._raise_alerts(reply_pass, values, layer)
        if layer == self.top:
            by_layer = [self._values[layer].to(values.device) for layer in self.layers]
            self._read.append((reply_pass.speaking, torch.cat(by_layer, dim=-1)))

    def _raise_alerts(self, reply_pass: ReplyPass, values: Float[Tensor, "spoken here"], layer: int) -> None:
        """Raise the alerts of a layer, on record before anything else happens."""
        alerts: list[Alert] = []
        for index, safeguard in enumerate(self.safeguards):
            if safeguard.vector.layer != layer:
                continue
            projections = values[:, self._safeguard_columns[index]]
            for place in safeguard.passed(projections).nonzero()[:, 0].tolist():
                row = reply_pass.speaking[place]
                if row in self._fired[index] or not self.rows[row].counted[-1]:
                    continue
                self._fired[index].add(row)
                self._masks.pop(index, None)
                alert = self._alert(safeguard, self.rows[row], reply_pass.fed[place], float(projections[place]))
                alerts.append(alert)
                self.rows[row].alerts.append(alert)
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
        self, reply_pass: ReplyPass, resid: Float[Tensor, "batch pos d_model"], layer: int
    ) -> Float[Tensor, "batch pos d_model"] | None:
        """The residual stream after the safeguards that fired, in their order; None where nothing changes."""
        changed = None
        for index, safeguard in enumerate(self.safeguards):
            intervention = safeguard.intervention
            if intervention is None or layer not in intervention.acting_layers or not self._fired[index]:
                continue
            if index not in self._masks:
                self._masks[index] = self._positions(reply_pass, self._fired[index], resid)
            positions = self._masks[index]
            if positions is not None:
                changed = intervention.apply(resid if changed is None else changed, positions, layer=layer)
        return changed

    def _positions(self, reply_pass: ReplyPass, fired: set[int], resid: Tensor) -> Tensor | None:
        """The last column's tokens of the replies in which a safeguard fired; None for none."""
        places = [place for row, place in zip(reply_pass.speaking, reply_pass.places, strict=True) if row in fired]
        if not places:
            return None
        positions = torch.zeros(resid.shape[:2], dtype=torch.bool)
        positions[places, -1] = True
        return positions.to(resid.device)


def _audit(path: str | Path | None) -> JsonLines | None:
    """The file of alerts, whole to its last line, so that a line can be appended in the middle of a pass."""
    if path is None:
        return None
    ensure_writable(Path(path))
    file = JsonLines(path)
    file.mend([column.name for column in fields(Alert)])
    return file
