"""Files that survive: JSON-lines that only grow and resume by key, files written whole or not at all, and locks.

A line that a killed process left unfinished is cut off on the next opening, so every line that is read was whole.
Knows nothing about what the rows mean.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


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
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}, line {number}: expected a JSON object, got {line[:60]!r}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, line {number}: expected a JSON object, got {type(row).__name__}.")
        return row

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows and put them on the disk before returning."""
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file whole or not at all: an older one of that name stays until the new one is on the disk.

    Raises OSError in one sentence where the folder is missing or cannot be written to.
    """
    # Beside the target, so that the move stays on one file system; not by tempfile, whose files only their owner reads.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(contents)
        os.replace(unfinished, path)
    except OSError as error:
        remedy = "name a file in an existing folder that you may write to"
        raise OSError(f"Cannot write {path} ({error.strerror}): {remedy}.") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def ensure_writable(path: Path) -> None:
    """Raise OSError in one sentence, before any long work, where `path` could not be written."""
    folder = next(parent for parent in [path.parent, *path.parent.parents] if parent.exists())
    if path.is_dir():
        raise OSError(f"Cannot write {path}: it is a folder, and a file is expected.")
    if path.exists() and not os.access(path, os.W_OK):
        raise OSError(f"Cannot write {path}: the file is read-only.")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OSError(f"Cannot write {path}: {folder} is not a folder that can be written to.")


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock, and hold it."""
    import fcntl  # not on every system, and nothing else here needs it

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Whether the lock was free; the system frees it when its process ends, however it does."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
