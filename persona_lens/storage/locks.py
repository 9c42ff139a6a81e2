"""Locks: one process at a time writes a run's folder or a file, and another one is told who does.

The locks are filelock's: the system frees them when their process ends, however it ends, so a lock file that a killed
process left behind locks nothing. Reading takes none. Where a file system has no locks, one warning says so and the
work goes on.
"""

import errno
import json
import os
import re
import secrets
import socket
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from filelock import BaseFileLock

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What the system says on a file system without locks."""
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NOTE = b'{"process"'
"""How the note in a lock begins that says who holds it."""

_held: dict[Path, tuple[int, threading.Thread, int]] = {}
"""The process and thread that hold each lock, and how often; an entry of another process was copied by a fork."""
_changed = threading.Condition()
_warned: set[Path] = set()


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


@contextmanager
def writes_file(path: Path | None, *, wait: bool = False) -> Iterator[None]:
    """As `writes_folder`, for one file, whatever links lead to it.

    With `wait`, whoever comes second waits instead of being refused.
    """
    if path is None:
        yield
        return
    # A link that leads to no file is not gone after: whoever writes refuses or replaces it.
    file = Path(os.path.realpath(path)) if path.is_file() else path
    with _holding(file.with_name(f".{file.name}.lock"), path, wait=wait):
        yield


def writes_output(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that holds the folder `output=` of its call, where it is given one, while it runs."""
    given = signature(function)

    @wraps(function)
    def held(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        arguments = given.bind_partial(*args, **kwargs).arguments
        output: Any = arguments.get("output_dir", arguments.get("output"))
        with writes_folder(None if output is None else Path(output)):
            return function(*args, **kwargs)

    return held


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock, and hold it. The lock file stays."""
    lock = _take(path, path.parent, wait=True)
    try:
        yield
    finally:
        _release(lock)


@contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Whether the lock was free, for work that another process may do instead. The lock file stays."""
    from filelock import Timeout

    try:
        lock = _take(path, path.parent, wait=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        _release(lock)


# Unfinished files: what `records.whole_file` writes into until all of it is there.

_UNFINISHED = re.compile(r"(\..+\.(?:[0-9a-f]{16}|[0-9]+)\.unfinished)(?:\.lock)?", re.DOTALL)
"""Name of an unfinished file or of its lock; earlier versions had the process's number where a random one stands."""


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`, under a name that nobody else has; on leaving it is removed if it is there.

    As long as it is written its lock is held, which keeps `sweep_up` of any process from removing it.
    """
    # A file's name has at most 255 bytes.
    unfinished = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.unfinished")
    lock = _lock_of(unfinished)
    # Here, since filelock would make the folder.
    if not stat.S_ISDIR(path.parent.stat().st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    # Whoever sweeps up holds it for a moment.
    held = _acquire(lock, timeout=60)
    try:
        unfinished.open("xb").close()  # which follows no link
        yield unfinished
    finally:
        # Where these cannot be removed, the next sweep does it.
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        with suppress(OSError):
            lock.unlink()
        _release(held)


def sweep_up(folder: Path) -> None:
    """Remove the unfinished files of a folder that nobody writes any more: those of processes that were killed."""
    names = {match[1] for path in folder.glob(".*.unfinished*") if (match := _UNFINISHED.fullmatch(path.name))}
    for unfinished in (folder / name for name in names):
        lock = _lock_of(unfinished)
        # Whoever holds the lock is still writing, and without locks nobody can tell.
        with suppress(OSError):
            held = _acquire(lock, timeout=0)
            try:
                if held is not None:
                    unfinished.unlink(missing_ok=True)
                lock.unlink()
            finally:
                _release(held)


def _lock_of(unfinished: Path) -> Path:
    return unfinished.with_name(unfinished.name + ".lock")


@contextmanager
def _holding(lock: Path, what: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock against other processes and other threads of this one; the outermost leaving removes its file."""
    from filelock import Timeout

    # One folder may be named in several ways.
    lock = Path(os.path.realpath(lock.parent), lock.name)
    with _changed:
        # The thread itself: its number is given to another one as soon as it has ended.
        me = os.getpid(), threading.current_thread()
        while (holder := _held.get(lock)) is not None and holder[:2] != me and holder[0] == me[0]:
            if not wait:
                raise OSError(f"{what} is being written by another thread of this process: wait for it.")
            _changed.wait()
        times = holder[2] if holder is not None and holder[:2] == me else 0
        _held[lock] = (*me, times + 1)
    try:
        if times:
            yield
            return
        try:
            held = _take(lock, what, wait=wait)
        except Timeout:
            raise OSError(
                f"{what} is being written by {_holder(lock)}: wait until it ends, or name another output."
            ) from None
        try:
            _sign(lock)
            yield
        finally:
            # Before it is free, so that nobody's new lock is taken away; a forked child leaves its parent's alone.
            if os.getpid() == me[0]:
                with suppress(OSError):
                    lock.unlink()
                _release(held)
    finally:
        with _changed:
            if times:
                _held[lock] = (*me, times)
            else:
                _held.pop(lock, None)
            _changed.notify_all()


def _take(lock: Path, what: Path, *, wait: bool) -> "BaseFileLock | None":
    """The lock, held; None, with a warning, where the file system has none.

    Raises filelock's Timeout where somebody else holds it, another OSError in one sentence where nobody can.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        _refuse_other_file(lock, what)
        held = _acquire(lock, timeout=-1 if wait else 0)
    except OSError as error:
        if error.errno is None:
            raise
        reason = "a symbolic link stands there" if error.errno == errno.ELOOP else error.strerror
        raise OSError(f"Cannot write to {what} ({reason}): name an output that you may write to.") from error
    if held is None and lock.parent not in _warned:
        _warned.add(lock.parent)
        warnings.warn(
            f"{lock.parent} is on a file system without locks: let no other process write there.", stacklevel=2
        )
    return held


def _acquire(lock: Path, *, timeout: float) -> "BaseFileLock | None":
    """The lock, held; None where the file system has none. Raises filelock's Timeout where somebody else holds it."""
    from filelock import FileLock  # not above: it takes longer to import than the command line's help to print

    held = FileLock(lock, timeout=timeout, thread_local=False, fallback_to_soft=False)
    try:
        held.acquire()
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return held


def _release(held: "BaseFileLock | None") -> None:
    if held is not None:
        held.release()


def _refuse_other_file(lock: Path, what: Path) -> None:
    """Raise OSError where something else than a lock has the lock's name, such as a link or a file of the user's."""
    try:
        status = lock.lstat()
    except OSError:  # not there, as a rule
        return
    if stat.S_ISLNK(status.st_mode):
        found = "a symbolic link"
    elif not stat.S_ISREG(status.st_mode):
        found = "no file"
    elif status.st_size and not (_note(lock) or _NOTE).startswith(_NOTE):
        found = "a file with other contents"
    else:
        return
    raise OSError(
        f"Cannot lock {what}: expected a lock of persona_lens at {lock}, got {found}: see what it is and move it away, "
        "or name another output."
    )


def _sign(lock: Path) -> None:
    """Write down who holds the lock. A note that cannot be written is missed by nobody but who asks."""
    note = json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode()
    with suppress(OSError):
        descriptor = os.open(lock, os.O_WRONLY | _NO_FOLLOW)
        try:
            # After the first byte, which Windows lets only the lock's own handle touch.
            os.lseek(descriptor, 1, os.SEEK_SET)
            os.write(descriptor, note)
            os.ftruncate(descriptor, 1 + len(note))
        finally:
            os.close(descriptor)


def _note(lock: Path) -> bytes | None:
    """What `_sign` wrote, or an earlier version, which began at the first byte; None where it cannot be read."""
    try:
        with lock.open("rb", buffering=0) as file:
            file.seek(1)
            return b"{" + file.read(1000).removeprefix(b"{")
    except OSError:
        return None


def _holder(lock: Path) -> str:
    try:
        note = json.loads(_note(lock) or b"")
        here = note["host"] == socket.gethostname()
        return f"process {note['process']}" + f" on {note['host']}" * (not here)
    except (ValueError, RecursionError, KeyError, TypeError):
        return "another process"
