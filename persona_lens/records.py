"""Files that survive: JSON-lines that only grow and resume by key, and files written whole or not at all.

A line that a killed process left unfinished is cut off on the next opening, so every line that is read was whole; a
write that fails leaves the file as it was.
Knows nothing about what the rows mean.
"""

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What may go wrong in taking a file apart that someone else has written: a reader makes one sentence of it."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JsonLines:
    """A file of JSON rows that only grows."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def resume(self) -> list[dict[str, Any]]:
        """All whole rows of a file that will be appended to; cuts off a last line that was left unfinished."""
        self.mend()
        return self.read()

    def mend(self) -> None:
        """Cut off a last line that was left unfinished."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            whole = end
            # Backwards in blocks, since a file may be larger than the memory.
            while whole > 0:
                start = max(0, whole - 65536)
                file.seek(start)
                newline = file.read(whole - start).rfind(b"\n")
                whole = start if newline < 0 else start + newline + 1
                if newline >= 0:
                    break
            if whole < end:
                file.truncate(whole)

    def stream(self) -> Iterator[dict[str, Any]]:
        """The whole rows one by one, changing nothing; none where there is no file."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield self._row(line, number)

    def read(self) -> list[dict[str, Any]]:
        """All rows, changing nothing; none where there is no file.

        Raises ValueError that names the line where one is not a JSON object.
        """
        return self._rows(self.path.read_bytes()) if self.path.exists() else []

    def whole(self) -> list[dict[str, Any]]:
        """The rows that `resume` would give, changing nothing."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        return self._rows(content[: content.rfind(b"\n") + 1])

    def _rows(self, content: bytes) -> list[dict[str, Any]]:
        return [self._row(line, number) for number, line in enumerate(content.splitlines(), start=1)]

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}, line {number}: expected a JSON object, got {line[:60]!r}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, line {number}: expected a JSON object, got {type(row).__name__}.")
        return row

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows and put them on the disk before returning; where that fails, the file is as it was.

        Raises OSError in one sentence where it cannot be written to.
        """
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what a buffer could not write it would try to write again on closing.
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    left = memoryview(text.encode())
                    while left:
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
                except BaseException:  # also an interrupt
                    with suppress(OSError):
                        file.truncate(before)
                    raise
        except OSError as error:
            raise _unwritable(self.path, error, "see that the folder can be written to, and run again") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises ValueError that names the file where it is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON that can be read ({error}): take it from a copy, or move it away."
        ) from error


def checked(value: Any, *kinds: type, low: float = -math.inf, high: float = math.inf) -> Any:
    """A value out of a file, where it is of one of the kinds (a float may be whole) and no number out of its range."""
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"expected {' or '.join(kind.__name__ for kind in kinds)}, got {value!r:.60}")
    if isinstance(value, int | float) and not low <= value <= high:
        raise ValueError(f"expected a number from {low:g} to {high:g}, got {value!r:.60}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file whole or not at all: an older one of that name stays until the new one is on the disk.

    Raises OSError in one sentence where the folder is missing or cannot be written to.
    """
    with _finished(path, "name a file in an existing folder that you may write to") as unfinished:
        unfinished.write_bytes(contents)


def zeros_on_disk(path: Path, dtype: Any, shape: tuple[int, ...]) -> "np.memmap":
    """A `.npy` file of zeros, mapped into memory, that is there whole or not at all and has its room on the disk.

    Raises OSError in one sentence where it has not: a mapped file that finds no room later ends the process.
    """
    import numpy as np  # not above: a plan and the command line's help need none

    with _finished(path, "name another output") as unfinished:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(unfinished, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with unfinished.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, unfinished.stat().st_size))
    return np.lib.format.open_memmap(path, mode="r+")


@contextmanager
def _finished(path: Path, remedy: str) -> Iterator[Path]:
    """A file to write, which takes the place of `path` once all of it is written."""
    # Beside the target, so that the move stays on one file system; not by tempfile, whose files only their owner reads.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        raise _unwritable(path, error, remedy) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Around a library's writing: raises OSError in one sentence where the disk is full; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise _unwritable(path, error, "") from error


def _unwritable(path: Path, error: OSError, remedy: str) -> OSError:
    reason = error.strerror or error
    if error.errno in _NO_ROOM:
        # Not the error's own words: a library may have put its own there.
        reason, remedy = os.strerror(error.errno), "free disk space and run again, which goes on from what is there"
    return OSError(f"Cannot write {path} ({reason}): {remedy}.")


def ensure_writable(path: Path) -> None:
    """Raise OSError in one sentence, before any long work, where `path` could not be written."""
    folder = next(parent for parent in [path.parent, *path.parent.parents] if parent.exists())
    if path.is_dir():
        raise OSError(f"Cannot write {path}: it is a folder, and a file is expected.")
    if path.exists() and not os.access(path, os.W_OK):
        raise OSError(f"Cannot write {path}: the file is read-only.")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OSError(f"Cannot write {path}: {folder} is not a folder that can be written to.")
