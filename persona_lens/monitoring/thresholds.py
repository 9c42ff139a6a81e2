"""A threshold for a monitor: a high percentile of what benign chats project, so the share of false alarms is chosen.

Values of one chat are not independent, so the interval resamples whole chats.
Knows nothing about models or chats: projections (arXiv:2507.21509, section 3.3) come in, numbers go out.

The file of thresholds: `thresholds.json` beside the vectors that they were calibrated with.

It has a format version and is written whole or not at all; thresholds of other traits, layers and kinds of value stay.
Knows nothing about how a threshold was calibrated.
"""

import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil, isfinite
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_lens.statistics import N_RESAMPLES, Estimate, question_resamples
from persona_lens.storage.files import DAMAGE, write_json
from persona_lens.storage.locks import writes_file

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


FORMAT_VERSION = 1
THRESHOLDS_FILE = "thresholds.json"


def save_thresholds(path: str | os.PathLike[str], thresholds: Iterable[Threshold]) -> Path:
    """Write `thresholds.json` beside a vector file or into a run's folder, whole or not at all; gives its path.

    Thresholds that are there already stay, unless a new one is for the same trait, layer and kind of value; several
    processes may save at once.
    Raises FileNotFoundError without the folder, ValueError where the file there is damaged or two are for the same.
    """
    file, new = _file(path), list(thresholds)
    keys = [_key(each) for each in new]
    if len(set(keys)) != len(keys):
        raise ValueError("Two of these thresholds are for the same trait, layer and kind of value: keep one of them.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {file.parent}: name a run's folder or a saved vector file.")
    # Whoever writes at the same time is waited for, so that nobody's thresholds are lost.
    with writes_file(file, wait=True):
        kept = {_key(each): each for each in (_read(file) if file.exists() else [])}
        merged = kept | dict(zip(keys, new, strict=True))
        rows = [merged[key].to_dict() for key in sorted(merged)]
        write_json(file, {"format_version": FORMAT_VERSION, "thresholds": rows})
    return file


def load_thresholds(path: str | os.PathLike[str], vector: Identified | None = None) -> list[Threshold]:
    """The thresholds beside a vector file or in a run's folder; with `vector` only those of its trait and layer.

    Raises:
        FileNotFoundError: Nothing was calibrated there.
        ValueError: The file is damaged or of another version, has none for the vector, or was calibrated with another.
    """
    file = _file(path)
    if not file.exists():
        raise FileNotFoundError(f"There is no {file}: calibrate_threshold, then save_thresholds.")
    found = _read(file)
    if vector is None:
        return found
    of_vector = [each for each in found if (each.trait, each.layer) == (vector.trait, vector.layer)]
    if not of_vector:
        there = ", ".join(dict.fromkeys(f"{each.trait} at layer {each.layer}" for each in found)) or "nothing"
        raise ValueError(f"{file} has no threshold for {vector.trait} at layer {vector.layer}, but for {there}.")
    for each in of_vector:
        each.check(vector)
    return of_vector


def _read(file: Path) -> list[Threshold]:
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if (version := saved["format_version"]) == FORMAT_VERSION:
            return [Threshold.from_dict(each) for each in saved["thresholds"]]
    except DAMAGE as error:
        raise ValueError(f"{file} does not hold thresholds ({error}): move it away and calibrate again.") from error
    raise ValueError(
        f"{file} has format version {version}, and this persona_lens reads {FORMAT_VERSION}: "
        "install the persona_lens that wrote it, or a newer one."
    )


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    folder = path.parent if path.suffix in {".safetensors", ".json"} and not path.is_dir() else path
    return folder / THRESHOLDS_FILE


def _key(threshold: Threshold) -> tuple[str, int, str]:
    return threshold.trait, threshold.layer, threshold.of
