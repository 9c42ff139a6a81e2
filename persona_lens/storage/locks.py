"""Locks: one process or thread at a time writes a run's folder or a file; another one is told who holds it.

The locks are filelock's: the system frees them when their process ends, however it ends, so a lock file that a killed
process left behind locks nothing. Reading needs no lock. On a file system without locks a warning says so, once, and
the work goes on.
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
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from filelock import BaseFileLock

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What the system answers on a file system without locks."""
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NOTE = b'{"process"'
"""The first bytes of the note in a lock file that says who holds it."""


class _OfThread(threading.local):
    """The lock files that this thread holds and may take again, by process number: a forked child holds none."""

    def __init__(self) -> None:
        self.held: dict[int, set[Path]] = {}


_of_thread = _OfThread()
_warned: set[Path] = set()


@contextmanager
def writes_folder(folder: Path | None) -> Iterator[None]:
    """Lock a run's folder against other processes and threads while it is written; None locks nothing.

    The thread that holds it may take it again. Raises OSError, naming the holder, if it is locked.
    """
    if folder is None:
        yield
        return
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _holding(folder / ".lock", folder):
            sweep_up(folder)
            yield
    finally:
        # A run that was refused before it wrote anything leaves no empty folder.
        with suppress(OSError):
            for path in new_folders:
                path.rmdir()


@contextmanager
def writes_file(path: Path | None, *, wait: bool = False) -> Iterator[None]:
    """Lock one file as `writes_folder` locks a folder, whatever links lead to it; with `wait`, wait for the lock."""
    if path is None:
        yield
        return
    # A link that leads to no file is not followed: the writer refuses or replaces it.
    file = Path(os.path.realpath(path)) if path.is_file() else path
    with _holding(file.with_name(f".{file.name}.lock"), path, wait=wait):
        yield


def writes_output(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that locks the folder of its argument `output_dir`, if it is given one, while it runs."""
    parameters = signature(function)

    @wraps(function)
    def locking(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        arguments = parameters.bind_partial(*args, **kwargs).arguments
        output = arguments.get("output_dir", arguments.get("output"))
        with writes_folder(None if output is None else Path(output)):
            return function(*args, **kwargs)

    return locking


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait for a lock file, and hold it; the file stays."""
    with _released(_take(path, path.parent, wait=True)):
        yield


@contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Whether a lock file was free and is held now, for work that another process may do instead; the file stays."""
    from filelock import Timeout

    try:
        lock = _take(path, path.parent, wait=False)
    except Timeout:
        yield False
        return
    with _released(lock):
        yield True


_UNFINISHED = re.compile(r"(\..+\.(?:[0-9a-f]{16}|[0-9]+)\.unfinished)(?:\.lock)?", re.DOTALL)
"""Name of an unfinished file or of its lock; earlier versions had the process's number where a random one stands."""


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path` with a unique name, removed on leaving if it is still there.

    Its lock is held meanwhile, which keeps `sweep_up` of any process from removing it.
    """
    # A file name has at most 255 bytes.
    unfinished = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.unfinished")
    lock = _lock_of(unfinished)
    # Checked here, since filelock would create the folder.
    if not stat.S_ISDIR(path.parent.stat().st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    # The timeout is for another process's `sweep_up`, which holds it for a moment.
    with _released(_acquire(lock, timeout=60)):
        try:
            unfinished.open("xb").close()  # exclusive creation follows no link
            yield unfinished
        finally:
            # What cannot be removed now is removed by the next sweep.
            for left_over in (unfinished, lock):
                with suppress(OSError):
                    left_over.unlink()


def sweep_up(folder: Path) -> None:
    """Remove the unfinished files that killed processes left in a folder."""
    names = {match[1] for path in folder.glob(".*.unfinished*") if (match := _UNFINISHED.fullmatch(path.name))}
    for unfinished in (folder / name for name in names):
        lock = _lock_of(unfinished)
        # A Timeout (an OSError) means that somebody is still writing it.
        with suppress(OSError):
            file_lock = _acquire(lock, timeout=0)
            with _released(file_lock):
                # Without locks nobody can tell whether it is still written, so it stays.
                if file_lock is not None:
                    unfinished.unlink(missing_ok=True)
                lock.unlink()


def _lock_of(unfinished: Path) -> Path:
    return unfinished.with_name(unfinished.name + ".lock")


@contextmanager
def _holding(lock: Path, what: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file against other processes and threads; it is removed when the outermost holder leaves."""
    from filelock import Timeout

    # One folder may be named in several ways.
    lock = Path(os.path.realpath(lock.parent), lock.name)
    process = os.getpid()
    mine = _of_thread.held.setdefault(process, set())
    if lock in mine:
        yield
        return
    try:
        file_lock = _take(lock, what, wait=wait)
    except Timeout:
        raise OSError(
            f"{what} is being written by {_holder(lock)}: wait until it ends, or name another output."
        ) from None
    with _released(file_lock):
        mine.add(lock)
        try:
            _sign(lock)
            yield
        finally:
            mine.discard(lock)
            # Removed before it is released, so that nobody else's new lock is removed; a forked child's exit from here
            # leaves its parent's lock alone.
            if os.getpid() == process:
                with suppress(OSError):
                    lock.unlink()


def _take(lock: Path, what: Path, *, wait: bool) -> "BaseFileLock | None":
    """The acquired lock; None, with a warning, if the file system has none.

    Raises filelock's Timeout if somebody else holds it, and OSError in one sentence if nobody can.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        _refuse_other_file(lock, what)
        file_lock = _acquire(lock, timeout=-1 if wait else 0)
    except OSError as error:
        if error.errno is None:
            raise
        reason = "a symbolic link stands there" if error.errno == errno.ELOOP else error.strerror
        raise OSError(f"Cannot write to {what} ({reason}): name an output that you may write to.") from error
    if file_lock is None and lock.parent not in _warned:
        _warned.add(lock.parent)
        warnings.warn(
            f"{lock.parent} is on a file system without locks: let nothing else write there meanwhile.", stacklevel=2
        )
    return file_lock


def _acquire(lock: Path, *, timeout: float) -> "BaseFileLock | None":
    """The acquired lock; None if the file system has none. Raises filelock's Timeout if somebody else holds it."""
    from filelock import FileLock  # here, since its import takes longer than printing the command line's help

    file_lock = FileLock(lock, timeout=timeout, thread_local=False, fallback_to_soft=False)
    try:
        file_lock.acquire()
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return file_lock


@contextmanager
def _released(file_lock: "BaseFileLock | None") -> Iterator[None]:
    """Release a lock on leaving, but not a parent's in its forked child."""
    process = os.getpid()
    try:
        yield
    finally:
        if file_lock is not None and os.getpid() == process:
            file_lock.release()


def _refuse_other_file(lock: Path, what: Path) -> None:
    """Raise OSError if something other than a lock has the lock's name, such as a link or a file of the user's."""
    try:
        status = lock.lstat()
    except OSError:  # usually it is not there
        return
    if stat.S_ISLNK(status.st_mode):
        obstacle = "a symbolic link"
    elif not stat.S_ISREG(status.st_mode):
        obstacle = "no file"
    elif status.st_size and not (_note(lock) or _NOTE).startswith(_NOTE):
        obstacle = "a file with other contents"
    else:
        return
    raise OSError(
        f"Cannot lock {what}: expected a lock of persona_lens at {lock}, got {obstacle}: see what it is and move it "
        "away, or name another output."
    )


def _sign(lock: Path) -> None:
    """Write into the lock file who holds it, for error messages only, so that a failure does not matter."""
    note = json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode()
    with suppress(OSError):
        descriptor = os.open(lock, os.O_WRONLY | _NO_FOLLOW)
        try:
            # From the second byte: Windows lets only the lock's own handle write the first.
            os.lseek(descriptor, 1, os.SEEK_SET)
            os.write(descriptor, note)
            os.ftruncate(descriptor, 1 + len(note))
        finally:
            os.close(descriptor)


def _note(lock: Path) -> bytes | None:
    """What `_sign` wrote (earlier versions began at the first byte); None if it cannot be read."""
    try:
        with lock.open("rb", buffering=0) as file:
            file.seek(1)
            return b"{" + file.read(1000).removeprefix(b"{")
    except OSError:
        return None


def _holder(lock: Path) -> str:
    try:
        note = json.loads(_note(lock) or b"")
        if note["host"] != socket.gethostname():
            return f"process {note['process']} on {note['host']}"
        return "another thread of this process" if note["process"] == os.getpid() else f"process {note['process']}"
    except (ValueError, RecursionError, KeyError, TypeError):
        return "another process"
