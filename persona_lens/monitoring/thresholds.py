"""Thresholds of a monitor: a high percentile of the projections of benign chats, which sets the false-alarm rate.

The values of one chat depend on each other, so the interval resamples whole chats (projections: arXiv:2507.21509,
section 3.3). Thresholds are kept in `thresholds.json`, beside the vectors that they were calibrated with.
"""

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil, isfinite
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_lens.monitoring.result import MonitoredVector
from persona_lens.statistics import N_RESAMPLES, Estimate, question_resamples
from persona_lens.storage.files import DAMAGE, read_result, write_json
from persona_lens.storage.locks import writes_file
from persona_lens.vectors.persona_vector import PersonaVector

Projected = Literal["prompt", "response", "token", "difference", "proxy"]
Projections = Sequence[float] | Float[np.ndarray, " value"] | Float[Tensor, " value"]


AnyVector = PersonaVector | MonitoredVector
FORMAT_VERSION = 1
THRESHOLDS_FILE = "thresholds.json"


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The projection that only a given share of benign values exceeds.

    Attributes:
        trait: The vector's trait.
        layer: The vector's layer, counted from 0.
        fingerprint: The vector's fingerprint: another vector's projections are on another scale.
        of: What is projected: the last prompt token, the mean over a response, or every token; for training data also
            the difference to the base model's response, or to the last prompt token (`proxy`).
        value: Projections above it are reported.
        percentile: The percentile of the benign values, 0 to 100.
        interval: 95 % bootstrap interval of the value over chats; None for a single chat.
        n: Number of benign values.
        n_chats: Number of chats that they came from.
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
        """Whether each projection is above the threshold, in the input's shape; ValueError for NaN."""
        numbers = numbers_of(projections)
        if np.isnan(numbers).any():
            raise ValueError(
                f"{self.trait}: {missing_in_words(numbers)}, and a missing value is not below the threshold: drop it."
            )
        return np.asarray(numbers > self.value)

    def check(self, vector: AnyVector) -> None:
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
        """The threshold of a `to_dict`; raises ValueError where it is damaged."""
        try:
            interval = saved["interval"]
            interval = None if interval is None else (float(interval[0]), float(interval[1]))
            numbers = {name: float(saved[name]) for name in ("value", "percentile")}
            return cls(**{**saved, **numbers, "interval": interval})
        except DAMAGE as error:
            names = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"A threshold has {names}, and one of these is damaged ({error!r}).") from error


def calibrate_threshold(
    projections: Projections,
    *,
    vector: AnyVector,
    percentile: float = 95.0,
    of: Projected = "response",
    chats: Sequence[Hashable] | None = None,
    source: str = "",
    seed: int = 0,
) -> Threshold:
    """The percentile of the projections of benign chats, with its interval over chats.

    It is the smallest projection that at most 100 - `percentile` per cent of them exceed. `chats` names the chat of
    each value for the bootstrap; without it every value counts as a chat of its own, which tokens never are. The
    interval is about other chats of the same kind; calibrate anew for chats of another kind.

    Raises ValueError where a projection is NaN or infinite, there are too few for the percentile (20 for the 95th, 100
    for the 99th), or tokens come without their chats.
    """
    values = numbers_of(projections)
    _refuse_uncalibratable(vector.trait, values, percentile)
    if of == "token" and chats is None:
        raise ValueError(
            f"{vector.trait}: tokens of one chat depend on each other: pass `chats`, the chat of each token."
        )
    groups, n_chats = number_groups(range(len(values)) if chats is None else chats, len(values))
    resamples = _resampled_percentiles(values, groups, n_chats, percentile, seed)
    value = float(np.percentile(values, percentile, method="inverted_cdf"))
    _, low, high, n = Estimate.of(value, resamples, len(values))
    return Threshold(
        trait=vector.trait,
        layer=vector.layer,
        fingerprint=vector.fingerprint,
        of=of,
        value=value,
        percentile=float(percentile),
        interval=None if low is None or high is None else (low, high),
        n=n,
        n_chats=n_chats,
        source=source,
    )


def _refuse_uncalibratable(trait: str, values: np.ndarray, percentile: float) -> None:
    """Refuse an impossible percentile, values that are not finite, and too few values."""
    if not 0 < percentile < 100:
        raise ValueError(f"{trait}: a percentile is between 0 and 100, got {percentile:g}.")
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(
            f"{trait}: expected one finite projection for each value, got shape {list(values.shape)}, "
            f"{missing_in_words(values)}: drop it."
        )
    # Rounded before ceil: 100 / (100 - 99.9) is a little above 1000.
    needed = ceil(round(100 / min(percentile, 100 - percentile), 6))
    if len(values) < needed:
        raise ValueError(
            f"{trait}: the {percentile:g}th percentile needs {needed} benign projections at least, got {len(values)}: "
            "project more benign chats, or choose a percentile nearer to 50."
        )


def _resampled_percentiles(
    values: Float[np.ndarray, " value"],
    groups: Int[np.ndarray, " value"],
    n_chats: int,
    percentile: float,
    seed: int,
) -> Float[np.ndarray, " resample"]:
    """The percentile in every resample of chats; NaN, hence no interval, for a single chat."""
    if n_chats < 2:
        return np.full(1, np.nan)
    order = np.argsort(values)
    percentiles = []
    for counts in question_resamples(n_chats, N_RESAMPLES, seed):
        # The values are sorted once; a resample then needs only the running count of its draws.
        up_to = counts[groups[order]].cumsum()
        percentiles.append(values[order[np.searchsorted(up_to, percentile / 100 * up_to[-1])]])
    return np.array(percentiles)


def number_groups(names: Iterable[Hashable], n_values: int) -> tuple[Int[np.ndarray, " value"], int]:
    """The number of each value's group, from 0 in order of appearance, and how many groups there are."""
    listed = list(names)
    if len(listed) != n_values:
        raise ValueError(f"Every value needs its chat: expected {n_values}, got {len(listed)}.")
    number = {name: index for index, name in enumerate(dict.fromkeys(listed))}
    return np.array([number[name] for name in listed], dtype=int), len(number)


def numbers_of(projections: Any) -> np.ndarray:
    """Array-like projections in float64."""
    if isinstance(projections, Tensor):
        projections = projections.detach().cpu().double().numpy()
    return np.asarray(projections, dtype=float)


def missing_in_words(numbers: np.ndarray) -> str:
    """How many are NaN or infinite."""
    return f"{int((~np.isfinite(numbers)).sum())} of {numbers.size} projections are not a finite number"


def save_thresholds(path: str | os.PathLike[str], thresholds: Iterable[Threshold]) -> Path:
    """Write `thresholds.json` beside a vector file or into a run's folder, and give its path.

    Thresholds that are there already stay, unless a new one has the same trait, layer and kind of value; several
    processes may save at once. Raises FileNotFoundError without the folder, ValueError where the file is damaged or two
    thresholds are for the same.
    """
    file = _file(path)
    thresholds = list(thresholds)
    new = {_key(threshold): threshold for threshold in thresholds}
    if len(new) != len(thresholds):
        raise ValueError("Two of these thresholds are for the same trait, layer and kind of value: keep one of them.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {file.parent}: name a run's folder or a saved vector file.")
    # Read and write under one lock: a process that saves at the same time waits, so no threshold is lost.
    with writes_file(file, wait=True):
        merged = {_key(threshold): threshold for threshold in (_read(file) if file.exists() else [])} | new
        rows = [merged[key].to_dict() for key in sorted(merged)]
        write_json(file, {"format_version": FORMAT_VERSION, "thresholds": rows})
    return file


def load_thresholds(path: str | os.PathLike[str], vector: AnyVector | None = None) -> list[Threshold]:
    """The thresholds beside a vector file or in a run's folder; with `vector` only those of its trait and layer.

    Raises FileNotFoundError where nothing was calibrated, ValueError where the file is damaged or of another version,
    has none for the vector, or was calibrated with another vector.
    """
    file = _file(path)
    if not file.exists():
        raise FileNotFoundError(f"There is no {file}: calibrate_threshold, then save_thresholds.")
    thresholds = _read(file)
    if vector is None:
        return thresholds
    of_vector = [row for row in thresholds if (row.trait, row.layer) == (vector.trait, vector.layer)]
    if not of_vector:
        there = ", ".join(dict.fromkeys(f"{row.trait} at layer {row.layer}" for row in thresholds)) or "nothing"
        raise ValueError(f"{file} has no threshold for {vector.trait} at layer {vector.layer}, but for {there}.")
    for threshold in of_vector:
        threshold.check(vector)
    return of_vector


def _read(file: Path) -> list[Threshold]:
    def parse(record: Mapping[str, Any]) -> list[Threshold]:
        return [Threshold.from_dict(row) for row in record["thresholds"]]

    return read_result(file, FORMAT_VERSION, parse, "file of thresholds", "save_thresholds")


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    folder = path.parent if path.suffix in {".safetensors", ".json"} and not path.is_dir() else path
    return folder / THRESHOLDS_FILE


def _key(threshold: Threshold) -> tuple[str, int, str]:
    return threshold.trait, threshold.layer, threshold.of
