"""Locks: one process at a time writes a run's folder, or a file, and another one is told who does.

The system frees a lock when its process ends, however it does; what it leaves behind locks nothing. Reading takes none.
Knows nothing about what is written. Windows has no such locks: there nothing is held.
"""

import json
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from persona_lens.records import ensure_writable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_held: dict[Path, tuple[int, int]] = {}
"""The thread that holds each lock of this process, and how often it has taken it."""
_guard = threading.Lock()


@contextmanager
def writes_folder(folder: Path | None) -> Iterator[None]:
    """Hold a run's folder against other processes and threads while it is written; None is nothing to hold.

    The thread that holds it may take it again. Raises OSError, saying who holds it, where somebody else does.
    """
    if folder is None:
        yield
        return
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        with _holding(folder / ".lock", folder):
            sweep_up(folder)
            yield
    finally:
        # A run that was refused before it wrote anything leaves no empty folder.
        with suppress(OSError):
            for each in made:
                each.rmdir()


def sweep_up(folder: Path) -> None:
    """Remove what a process that was killed while it wrote a file whole left there; the folder's lock is held."""
    for left in folder.glob(".*.*.unfinished"):
        left.unlink(missing_ok=True)


@contextmanager
def writes_file(path: Path | None) -> Iterator[None]:
    """As `writes_folder`, for one file."""
    if path is None:
        yield
        return
    with _holding(path.with_name(f".{path.name}.lock"), path):
        yield


def writes_output(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that holds the folder `output=` of its call, where it is given one, while it runs."""
    given = signature(function)

    @wraps(function)
    def held(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        output: Any = given.bind_partial(*args, **kwargs).arguments.get("output")
        with writes_folder(None if output is None else Path(output)):
            return function(*args, **kwargs)

    return held


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock, and hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Whether the lock was free, for work that another process may do instead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def _holding(lock: Path, what: Path) -> Iterator[None]:
    lock, me = lock.absolute(), threading.get_ident()
    with _guard:
        owner, times = _held.get(lock, (me, 0))
        if owner != me:
            raise OSError(f"{what} is being written by another thread of this process: wait for it.")
        descriptor = _take(lock, what) if times == 0 else None
        _held[lock] = me, times + 1
    try:
        yield
    finally:
        with _guard:
            _held[lock] = me, times
            if times == 0:
                del _held[lock]
            if descriptor is not None:
                # Before it is free, so that nobody's new lock is taken away.
                with suppress(OSError):
                    lock.unlink()
                os.close(descriptor)


def _take(lock: Path, what: Path) -> int | None:
    """The open and locked file; None where the system has no locks."""
    if fcntl is None:
        return None
    ensure_writable(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            if not _locked(descriptor, lock, what):
                return descriptor
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                    break
            os.close(descriptor)  # its holder has just removed it
        note = json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode()
        os.ftruncate(descriptor, 0)
        # A note that finds no room is missed by nobody but who asks.
        with suppress(OSError):
            os.pwrite(descriptor, note, 0)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"Cannot write to {what} ({error.strerror}): name an output that you may write to.") from error
    return descriptor


def _locked(descriptor: int, lock: Path, what: Path) -> bool:
    """Lock the file; False where its file system knows no locks. Raises OSError where somebody else holds it."""
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise OSError(f"{what} is being written by {holder}: wait until it ends, or name another output.") from None
    except OSError as error:  # some network file systems
        warnings.warn(f"{lock} cannot be locked ({error.strerror}): let no other process write there.", stacklevel=2)
        return False
    return True


def _holder(descriptor: int) -> str:
    try:
        note = json.loads(os.pread(descriptor, 1000, 0))
        here = note["host"] == socket.gethostname()
        return f"process {note['process']}" + f" on {note['host']}" * (not here)
    except (ValueError, KeyError, TypeError):
        return "another process"
