"""Files that survive: JSON-lines that only grow and resume by key, and files written whole or not at all.

A file is appended to only after its first line is known to be ours. A line that a killed process left unfinished is
moved to a file beside it on the next opening, so every line that is read was whole; a write that fails leaves the file
as it was.
Knows nothing about what the rows mean.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from persona_lens.storage.locks import unfinished_file

if TYPE_CHECKING:
    import numpy as np

Result = TypeVar("Result")

DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What may go wrong in taking a file apart that someone else has written: a reader makes one sentence of it."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JsonLines:
    """A file of JSON rows that only grows. A symbolic link is followed where it leads to a file with rows of ours."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def resume(self, fields: Sequence[str]) -> list[dict[str, Any]]:
        """All rows of a file that will be appended to; its last line is whole afterwards, see `mend`.

        Raises ValueError where it is no file of ours, and names the line where one is not a JSON object; then the file
        is as it was.
        """
        self.refuse_other_file(fields)
        rows = self.whole()
        self.mend(fields)
        return rows

    def mend(self, fields: Sequence[str]) -> None:
        """Make the last line whole that a killed process left unfinished, so that rows can be appended.

        A last row that only lacks its end of line gets it. Any other unfinished line is moved to a new file beside this
        one, `NAME.damaged` (or `NAME.damaged-2` and so on where there is one already).

        Args:
            fields: What every row of the file has, beginning with the field that is written first. The file is touched
                only where its first row has them.

        Raises:
            ValueError: The first row has not these fields, so that the file is not ours.
            OSError: The file, or the one beside it, cannot be written.
        """
        self.refuse_other_file(fields)
        if not self.path.exists():
            return
        try:
            with self.path.open("rb+") as file:
                whole, tail = _last_line(file)
                if not tail:
                    return
                if _is_row(tail):
                    file.write(b"\n")
                else:
                    self._keep_aside(tail)
                    file.truncate(whole)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error, "see that the folder can be written to, and run again") from error

    def refuse_other_file(self, fields: Sequence[str]) -> None:
        """Raise ValueError, having changed nothing, where the first line is no row with these fields.

        Raises OSError for a pipe or a device, and for a link that leads to no row.
        """
        refuse_no_file(self.path)
        refuse_link_to_nothing(self.path)
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            line = file.readline()
        # Cut short by a killed process; after a row that it had written whole, only the first line is looked at. What a
        # link leads to is known by a whole row alone.
        begins = line.startswith(f'{{"{fields[0]}": '.encode()) and not self.path.is_symlink()
        is_begun = begins and not line.endswith(b"\n")
        row = _parsed(line)
        if line and not (is_begun if row is None else all(name in row for name in fields)):
            raise ValueError(
                f"{self.path} holds something else: expected rows with {', '.join(fields)}, got {line[:60]!r}. "
                "Choose another output, or move that file away."
            )

    def _keep_aside(self, tail: bytes) -> None:
        """Put an unfinished line into a new file beside this one."""
        aside, number = self.path.with_name(f"{self.path.name}.damaged"), 1
        while aside.exists() or aside.is_symlink():
            number += 1
            aside = self.path.with_name(f"{self.path.name}.damaged-{number}")
        with aside.open("xb") as file:  # which follows no link
            file.write(tail + b"\n")
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(self.path.parent)

    def stream(self) -> Iterator[dict[str, Any]]:
        """The whole rows one by one, changing nothing; none where there is no file."""
        refuse_no_file(self.path)
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n") or _is_row(line):
                    yield self._row(line, number)

    def read(self) -> list[dict[str, Any]]:
        """All rows, changing nothing; none where there is no file.

        Raises ValueError that names the line where one is not a JSON object.
        """
        return self._rows(self.path.read_bytes()) if self.path.exists() else []

    def whole(self) -> list[dict[str, Any]]:
        """The rows that `resume` would give, changing nothing."""
        refuse_no_file(self.path)
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        return self._rows(content if _is_row(content[whole:]) else content[:whole])

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

        Raises OSError in one sentence where it cannot be written to, or is no file, or a link that leads to no row.
        """
        refuse_no_file(self.path)
        refuse_link_to_nothing(self.path)
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            # Unbuffered: what a buffer could not write it would try to write again on closing.
            with self.path.open("ab", buffering=0) as file:
                before, left = file.tell(), memoryview(text)
                try:
                    while left:
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
                except BaseException:  # also an interrupt
                    with suppress(OSError):
                        # Unless another process has added rows meanwhile.
                        if os.fstat(file.fileno()).st_size == before + len(text) - len(left):
                            file.truncate(before)
                    raise
            if is_new:
                _sync_folder(self.path.parent)
        except OSError as error:
            raise _unwritable(self.path, error, "see that the folder can be written to, and run again") from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line holds; None where it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _is_row(tail: bytes) -> bool:
    """Whether what follows the last end of line is a whole row: an object that was cut short does not parse."""
    return bool(tail) and _parsed(tail) is not None


def _last_line(file: BinaryIO) -> tuple[int, bytes]:
    """Where the last whole line ends, and what follows it."""
    whole = file.seek(0, os.SEEK_END)
    # Backwards in blocks, since a file may be larger than the memory.
    while whole > 0:
        start = max(0, whole - 65536)
        file.seek(start)
        newline = file.read(whole - start).rfind(b"\n")
        whole = start if newline < 0 else start + newline + 1
        if newline >= 0:
            break
    file.seek(whole)
    return whole, file.read()


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises ValueError that names the file where it is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON that can be read ({error}): take it from a copy, or move it away."
        ) from error


def read_result(path: Path, version: int, parse: Callable[[dict[str, Any]], Result], what: str, made_by: str) -> Result:
    """What `parse` makes of a JSON file with a `format_version`; `made_by` names what writes such files.

    Raises FileNotFoundError where there is no file, ValueError where it is damaged or of another version.
    """
    if not path.exists():
        raise FileNotFoundError(f"No {what} at {path}: make one with {made_by}.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format_version"] == version:
            return parse(record)
    except DAMAGE as error:
        raise ValueError(f"{path} is not a whole {what} ({error}): make it again with {made_by}.") from error
    raise ValueError(
        f"{path} has format version {record['format_version']}, and this persona_lens reads {version}: install the "
        "persona_lens that wrote it, or a newer one."
    )


LARGEST = 3.4028234663852886e38
"""The largest float32: what is measured is no larger, and a sum of squares of such numbers is still one in float64."""


def checked(value: Any, *kinds: type, low: float = -math.inf, high: float = math.inf) -> Any:
    """A value out of a file, where it is of one of the kinds (a float may be whole) and no number out of its range."""
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"expected {' or '.join(kind.__name__ for kind in kinds)}, got {value!r:.60}")
    if isinstance(value, int | float) and not low <= value <= high:
        raise ValueError(f"expected a number from {low:g} to {high:g}, got {value!r:.60}")
    if isinstance(value, int | float) and math.isfinite(value) and abs(value) > LARGEST:
        raise ValueError(f"expected a number that float32 has, got {value!r:.60}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file whole or not at all: an older one of that name stays until the new one is on the disk.

    A symbolic link of that name is replaced by the file; what it points to stays as it is.
    Raises OSError in one sentence where the folder is missing or cannot be written to.
    """
    with whole_file(path, "name a file in an existing folder that you may write to") as unfinished:
        unfinished.write_bytes(contents)


def zeros_on_disk(path: Path, dtype: Any, shape: tuple[int, ...], *, first: Any = None) -> "np.memmap":
    """A `.npy` file of zeros, mapped into memory, that is there whole or not at all and has its room on the disk.

    `first` are its first rows, where they are not zeros.
    Raises OSError in one sentence where it has no room: a mapped file that finds none later ends the process.
    """
    import numpy as np  # not above: a plan and the command line's help need none

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, "name another output") as unfinished:
        rows = np.lib.format.open_memmap(unfinished, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with unfinished.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, unfinished.stat().st_size))
        if first is not None:
            rows[: len(first)] = first
            rows.flush()
        del rows  # Windows moves no file that is mapped
    return np.lib.format.open_memmap(path, mode="r+")


@contextmanager
def whole_file(path: Path, remedy: str) -> Iterator[Path]:
    """A new file beside `path` to write into, which takes its place once the block has ended and it is on the disk.

    Where the block raises, `path` stays as it was. Raises OSError in one sentence, which ends in the remedy, where it
    cannot be written. A pipe or a device is not replaced.
    """
    refuse_no_file(path)
    try:
        with unfinished_file(path) as unfinished:
            yield unfinished
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            _sync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error, remedy) from error


def _sync_folder(folder: Path) -> None:
    """Put a folder's new names on the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def empty_folder(path: Path) -> Path:
    """A new, empty folder for scratch files, in the place of one of that name that a killed process left.

    Raises OSError where a symbolic link or a file has the name.
    """
    if path.is_symlink() or path.is_file():
        raise OSError(f"Cannot write {path}: a link or a file has its name: see what it is, and move it away.")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


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
    refuse_no_file(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise OSError(f"Cannot write {path}: the file is read-only.")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OSError(f"Cannot write {path}: {folder} is not a folder that can be written to.")


def refuse_no_file(path: Path) -> None:
    """Raise OSError where a pipe, a device or a socket has the name, which a file would replace or wait for."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(f"Cannot write {path}: expected a file, got a pipe, a device or a socket: name another output.")


def refuse_link_to_nothing(path: Path) -> None:
    """Raise OSError where a symbolic link leads to no file or to an empty one, which writing would make or fill."""
    if path.is_symlink() and not (path.exists() and path.stat().st_size):
        found = "an empty file" if path.exists() else "no file"
        raise OSError(
            f"Cannot write {path}: expected a file, or a link to one that persona_lens wrote, got a link to {found}: "
            "remove the link, or name another output."
        )


def refuse_other_json(path: Path, keys: Collection[str]) -> None:
    """Raise ValueError, having changed nothing, where a file is no JSON object with these keys.

    Where there is no file, or an empty one, there is nothing to lose.
    """
    ensure_writable(path)
    if path.exists() and path.stat().st_size:
        found = read_json(path)
        if not isinstance(found, dict) or not found.keys() >= set(keys):
            raise ValueError(
                f"{path} holds something else: expected a result with {', '.join(keys)}, got {found!r:.60}. "
                "Choose another output, or move that file away."
            )
