"""Contestants in one race: each is inspected once, unhurried, and then all take turns, A B A B.

Neighbours on a shared machine slow down everyone for a while, so what counts is the ratio of two turns of one round.
Knows nothing about what is computed.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Contestant:
    """One way to do the work. `run` gives its result, such as row means or texts, or None where nothing is read."""

    name: str
    run: Callable[[], Any]
    embedding: nn.Module | None = None
    """The token embedding of the model that `run` runs, if any: its calls are the forwards, its inputs the tokens."""


@dataclass
class Result:
    """What one contestant did; the lists have an entry for each round."""

    name: str
    forwards: int
    padded_tokens: int
    peak_extra_mib: float | None
    """Peak resident memory above what was resident before, of the first run; None where it cannot be measured."""
    agreement: float | None
    """With what it should be: a cosine, or a share of equal rows; None for a contestant that only runs the model."""
    first_cpu: float
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def inspect(contestant: Contestant, agreement: Callable[[Any], float]) -> Result:
    """The first run, which also warms up: what it computes, how many forwards and tokens, how much memory."""
    shapes: list[int] = []
    # A contestant that runs no model has a hook on a module that nobody calls.
    counting = (contestant.embedding or nn.Identity()).register_forward_hook(
        lambda _module, inputs, _out: shapes.append(inputs[0].numel())
    )
    started = time.process_time()
    try:
        with peak_extra_mib() as peak:
            found = contestant.run()
    finally:
        counting.remove()
    return Result(
        name=contestant.name,
        forwards=len(shapes),
        padded_tokens=sum(shapes),
        peak_extra_mib=peak[0] if peak else None,
        agreement=None if found is None else agreement(found),
        first_cpu=time.process_time() - started,
    )


def race(contestants: Sequence[tuple[Contestant, Result]], repeats: int) -> None:
    """Rounds in which every contestant runs once, in turn; times are appended to its result."""
    for _ in range(repeats):
        gc.collect()
        for contestant, result in contestants:
            wall, cpu = time.perf_counter(), time.process_time()
            contestant.run()
            result.cpu.append(time.process_time() - cpu)
            result.wall.append(time.perf_counter() - wall)


@contextmanager
def peak_extra_mib() -> Iterator[list[float]]:
    """Leaves in the list the peak of resident memory while open, above that on entry; nothing outside Linux."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    extra: list[float] = []
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but not returned would hide what is taken next
        reset.write_text("5")  # sets the peak back to what is resident now
        before = _kib(status, "VmRSS")
    except (OSError, AttributeError):
        yield extra
        return
    yield extra
    extra.append((_kib(status, "VmHWM") - before) / 1024)


def _kib(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
