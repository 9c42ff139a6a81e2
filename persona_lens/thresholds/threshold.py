"""A threshold for a monitor: a high percentile of what benign chats project, so the share of false alarms is chosen.

Values of one chat are not independent, so the interval resamples whole chats.
Knows nothing about models or chats: projections (arXiv:2507.21509, section 3.3) come in, numbers go out.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil, isfinite
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_lens.records import DAMAGE
from persona_lens.statistics import N_RESAMPLES, Estimate, question_resamples

Projected = Literal["prompt", "response", "token", "difference", "proxy"]
Projections = Sequence[float] | Float[np.ndarray, " value"] | Float[Tensor, " value"]


@runtime_checkable
class Identified(Protocol):
    """What tells vectors apart: a `PersonaVector`, or a monitoring's `MonitoredVector`."""

    @property
    def trait(self) -> str:
        """The trait it points to."""
        ...

    @property
    def layer(self) -> int:
        """The block, counted from 0."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of layer and direction."""
        ...


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The projection that only a chosen share of benign values exceeds.

    Attributes:
        trait: The vector's.
        layer: The vector's, counted from 0.
        fingerprint: The vector's: another vector's projections are on another scale.
        of: What was projected: the last prompt token, the mean over a response, or every token; of training data also
            the difference to the base model's response, or to the last prompt token (`proxy`).
        value: Projections above it are reported.
        percentile: Of the benign values, 0 to 100.
        interval: 95 % bootstrap interval of the value over chats; None where there is a single chat.
        n: Benign values.
        n_chats: Chats that they came from.
        source: Where the benign chats are from, in words.
    """

    trait: str
    layer: int
    fingerprint: str
    of: Projected
    value: float
    percentile: float
    interval: tuple[float, float] | None
    n: int
    n_chats: int
    source: str = ""

    def __post_init__(self) -> None:
        if self.of not in get_args(Projected):
            raise ValueError(f"{self.trait}: a threshold is of one of {get_args(Projected)}, got {self.of!r}.")
        if not isfinite(self.value):
            raise ValueError(f"{self.trait}: a threshold is a finite number, got {self.value}.")

    def __str__(self) -> str:
        interval = "" if self.interval is None else " [{:.2f}, {:.2f}]".format(*self.interval)
        return (
            f"{self.trait} at layer {self.layer}, {self.of}: {self.value:.2f}{interval}, "
            f"percentile {self.percentile:g} of {self.n} values from {self.n_chats} benign chats"
        )

    def exceeded(self, projections: Projections | float | np.ndarray | Tensor) -> Bool[np.ndarray, "..."]:
        """Whether each projection is above the threshold, in the shape that it came in.

        Raises ValueError for NaN: what was not measured is not below.
        """
        numbers = numbers_of(projections)
        if np.isnan(numbers).any():
            raise ValueError(
                f"{self.trait}: {missing_in_words(numbers)}, and what was not measured is not below: drop it."
            )
        return np.asarray(numbers > self.value)

    def check(self, vector: Identified) -> None:
        """Raise a ValueError unless the threshold was calibrated with this vector."""
        if self.fingerprint != vector.fingerprint:
            raise ValueError(
                f"{self.trait}: the threshold at layer {self.layer} was calibrated with vector {self.fingerprint}, and "
                f"this one ({vector.trait}, layer {vector.layer}) is {vector.fingerprint}: calibrate_threshold anew."
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Threshold":
        """The threshold that `to_dict` gave; raises ValueError where it is not whole."""
        try:
            interval = saved["interval"]
            parts = {**saved, "interval": None if interval is None else (float(interval[0]), float(interval[1]))}
            numbers = {name: float(parts[name]) for name in ("value", "percentile")}
            return cls(**{**parts, **numbers})
        except DAMAGE as error:
            names = ", ".join(each.name for each in fields(cls))
            raise ValueError(f"A threshold has {names}, and one of these is damaged ({error!r}).") from error


def calibrate_threshold(
    projections: Projections,
    *,
    vector: Identified,
    percentile: float = 95.0,
    of: Projected = "response",
    chats: Sequence[Hashable] | None = None,
    source: str = "",
    seed: int = 0,
) -> Threshold:
    """The percentile of projections on benign chats, with its interval over chats.

    It is the smallest of them that at most the rest of the hundred exceed: with the 95th, at most 5 %.

    `chats` names the chat of each value, and the bootstrap resamples chats; without it every value counts as a chat of
    its own, which tokens never are. The interval says how far the value would move with other chats of the same kind;
    chats of another kind need a calibration of their own.

    Raises:
        ValueError: A projection is NaN or infinite, there are too few for the percentile (20 for the 95th, 100 for the
            99th), or tokens came without their chats.
    """
    values = numbers_of(projections)
    _refuse_uncalibratable(vector.trait, values, percentile)
    if of == "token" and chats is None:
        raise ValueError(
            f"{vector.trait}: tokens of one chat depend on each other: pass `chats`, the chat of each token."
        )
    groups = places(range(len(values)) if chats is None else chats, len(values))
    resamples = _resampled_percentiles(values, groups.place, groups.n, percentile, seed)
    value = float(np.percentile(values, percentile, method="inverted_cdf"))
    estimate = Estimate.of(value, resamples, len(values))
    return Threshold(
        trait=vector.trait,
        layer=vector.layer,
        fingerprint=vector.fingerprint,
        of=of,
        value=value,
        percentile=float(percentile),
        interval=None if estimate.low is None or estimate.high is None else (estimate.low, estimate.high),
        n=len(values),
        n_chats=groups.n,
        source=source,
    )


def _refuse_uncalibratable(trait: str, values: np.ndarray, percentile: float) -> None:
    """Refuse a percentile that is none, values that are no numbers, and too few of them."""
    if not 0 < percentile < 100:
        raise ValueError(f"{trait}: a percentile is between 0 and 100, got {percentile:g}.")
    if values.ndim != 1 or not np.isfinite(values).all():
        expected = "one finite projection for each value"
        raise ValueError(
            f"{trait}: expected {expected}, got shape {list(values.shape)}, {missing_in_words(values)}: drop it."
        )
    # Rounded first: 100 / (100 - 99.9) is a hair above 1000.
    needed = ceil(round(100 / min(percentile, 100 - percentile), 6))
    if len(values) < needed:
        raise ValueError(
            f"{trait}: the {percentile:g}th percentile needs {needed} benign projections at least, got {len(values)}: "
            "project more benign chats, or choose a percentile nearer to 50."
        )


def _resampled_percentiles(
    values: Float[np.ndarray, " value"],
    place: Int[np.ndarray, " value"],
    n_chats: int,
    percentile: float,
    seed: int,
) -> Float[np.ndarray, " resample"]:
    """The percentile of the values of every resample of chats; NaN, hence no interval, for a single chat."""
    if n_chats < 2:
        return np.full(1, np.nan)
    order = np.argsort(values)
    found = []
    for drawn in question_resamples(n_chats, N_RESAMPLES, seed):
        # How many drawn values are at most as great as each; sorting every resample would take far longer.
        upto = drawn[place[order]].cumsum()
        found.append(values[order[np.searchsorted(upto, percentile / 100 * upto[-1])]])
    return np.array(found)


class Places(NamedTuple):
    """The number of each value's group, and how many groups there are."""

    place: Int[np.ndarray, " value"]
    n: int


def places(names: Iterable[Hashable], n_values: int) -> Places:
    """The number of each value's group, and how many groups there are."""
    listed = list(names)
    if len(listed) != n_values:
        raise ValueError(f"Every value needs its chat: expected {n_values}, got {len(listed)}.")
    place = {name: index for index, name in enumerate(dict.fromkeys(listed))}
    return Places(np.array([place[name] for name in listed], dtype=int), len(place))


def numbers_of(projections: Any) -> np.ndarray:
    """Array-like projections in float64."""
    if isinstance(projections, Tensor):
        projections = projections.detach().cpu().double().numpy()
    return np.asarray(projections, dtype=float)


def missing_in_words(numbers: np.ndarray) -> str:
    """How many are NaN or infinite."""
    return f"{int((~np.isfinite(numbers)).sum())} of {numbers.size} projections are not a finite number"
