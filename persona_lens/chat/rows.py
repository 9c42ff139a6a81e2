"""Rows of chats out of files, tables and data sets: one reader for everything that reads chats.

A row is whatever stands there, with its number; a line that is no JSON comes out as `Unreadable`, so whoever reads may
count it or refuse it. Rows come one at a time, and a file may be larger than the memory.
Knows the forms in which chats are kept; knows nothing about what is done with them.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

SUFFIXES = (".jsonl", ".json", ".parquet")
KEYS = ("messages", "conversation", "conversations")

_SAME_ROLE = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "model", "bot", "ai"),
}
_ROLES = {name: role for role, names in _SAME_ROLE.items() for name in names}


@runtime_checkable
class Table(Protocol):
    """A pandas DataFrame, known by its methods so that pandas is not imported for it."""

    def itertuples(self, *args: Any, **kwargs: Any) -> Any:
        """Its rows; what has no such method is not taken for a table."""

    def to_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Its rows as objects, for `"records"`."""


class Unreadable(NamedTuple):
    """A line that holds no row."""

    reason: str
    text: str


def chat_rows(rows: str | os.PathLike[str] | Table | Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Every row with its number, counted from 1: of JSON-lines, where blank lines are none, the line's.

    `rows` is a .jsonl, .json or .parquet file, a pandas DataFrame, or any rows in memory, such as a `datasets.Dataset`.
    Raises ValueError for a file that cannot be read as a whole, such as a Parquet file without messages.
    """
    if not isinstance(rows, str | os.PathLike):
        return enumerate(rows.to_dict("records") if isinstance(rows, Table) else rows, start=1)
    path = Path(rows)
    readers = {".jsonl": json_lines, ".json": _json, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ValueError(
            f"Chats are read from .jsonl, .json or .parquet files, got {path}: convert it to one of these."
        )
    return readers[path.suffix](path)


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The lines of a file that are not blank, read as JSON, with their numbers."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                text = line.decode("utf-8", errors="replace").rstrip("\n")
                yield number, Unreadable(f"not JSON that can be read: {error}", text)


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read: {error}.") from error
    return enumerate(found if isinstance(found, list) else [found], start=1)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: `pip install pyarrow`, or convert them to .jsonl.") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file that can be read: {error}.") from error
    # Checked before any row is rejected for it: in a table every row lacks what one lacks.
    messages_of({name: [] for name in file.schema_arrow.names})
    number = 0
    for batch in file.iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def messages_of(row: Any) -> list[Any]:
    """The messages of a row under the first of `KEYS` that has a value, with `role` and `content` each.

    What each message holds is not checked: `Transcript` does that. Raises ValueError for a row without messages.
    """
    if isinstance(row, Unreadable):
        raise ValueError(row.reason)
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with one of {', '.join(KEYS)}, got {type(row).__name__}.")
    present = [key for key in KEYS if key in row]
    if not present:
        raise ValueError(f"expected one of {', '.join(KEYS)}, got the keys {', '.join(map(str, row))}.")
    key = next((key for key in present if _has_value(row[key])), present[0])
    given = _listed(row[key])
    if not isinstance(given, list | tuple):
        raise ValueError(f"{key} is {type(given).__name__}, expected a list of messages.")
    return [plain_message(message) for message in given]


def _has_value(value: Any) -> bool:
    """Whether a cell holds anything: tables fill the columns that a row lacks with None, NaN or empty lists."""
    if value is None or (isinstance(value, float) and isnan(value)):
        return False
    return not isinstance(value, Sized) or len(value) > 0


def _listed(value: Any) -> Any:
    """A list of messages as Parquet (an array) and `datasets` (an object of lists) may give it."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping) and value and all(isinstance(each, list | tuple) for each in value.values()):
        columns = list(value.values())
        if len({len(column) for column in columns}) == 1:
            return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return value


def plain_message(message: Any) -> Any:
    """A message with `role` and `content`, its role in our word, as ShareGPT's `from` and `value` have them too."""
    if not isinstance(message, Mapping):
        return message
    found = dict(message)
    for ours, theirs in (("role", "from"), ("content", "value")):
        if found.get(ours) is None and found.get(theirs) is not None:
            found[ours] = found[theirs]
    if isinstance(role := found.get("role"), str):
        found["role"] = _ROLES.get(role.strip().lower(), role)
    return found


def name_of(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """What a row calls itself under the first of the keys that has a text or a number; None where none has."""
    names = (row.get(key) for key in keys)
    return next((str(name) for name in names if isinstance(name, (str, int)) and name != ""), None)
