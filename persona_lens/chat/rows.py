"""Reads rows of chats from files, tables and data sets: the one reader for everything that reads chats.

Rows come one at a time, with their numbers, so a file may be larger than the memory. A line that is not JSON becomes an
`Unreadable`, which the caller counts or refuses.
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
    """A pandas DataFrame, recognised by its methods so that pandas need not be imported."""

    def itertuples(self, *args: Any, **kwargs: Any) -> Any:
        """The rows as tuples."""

    def to_dict(self, *args: Any, **kwargs: Any) -> Any:
        """With `"records"`, the rows as objects."""


class Unreadable(NamedTuple):
    """A line that is not JSON."""

    reason: str
    text: str


def chat_rows(rows: str | os.PathLike[str] | Table | Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Every row with its number, counted from 1; in a .jsonl file, whose blank lines are skipped, the line number.

    `rows` is a .jsonl, .json or .parquet file, a pandas DataFrame, or any rows in memory, such as a `datasets.Dataset`.
    Raises ValueError for a file that is unreadable as a whole, such as a Parquet file without messages.
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
    """The lines of a file that are not blank, parsed as JSON, with their numbers."""
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
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read: {error}.") from error
    return enumerate(rows if isinstance(rows, list) else [rows], start=1)


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
    # Checked once for the whole table: if the column is missing, every row would be rejected for it.
    messages_of({name: [] for name in file.schema_arrow.names})
    number = 0
    for batch in file.iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def messages_of(row: Any) -> list[Any]:
    """The messages of a row, from the first of `KEYS` that has a value, with `role` and `content`.

    The messages themselves are not checked (`Transcript` does). Raises ValueError for a row without messages.
    """
    if isinstance(row, Unreadable):
        raise ValueError(row.reason)
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with one of {', '.join(KEYS)}, got {type(row).__name__}.")
    present = [key for key in KEYS if key in row]
    if not present:
        raise ValueError(f"expected one of {', '.join(KEYS)}, got the keys {', '.join(map(str, row))}.")
    key = next((key for key in present if _has_value(row[key])), present[0])
    messages = _listed(row[key])
    if not isinstance(messages, list | tuple):
        raise ValueError(f"{key} is {type(messages).__name__}, expected a list of messages.")
    return [plain_message(message) for message in messages]


def _has_value(value: Any) -> bool:
    """Whether a cell is filled: tables fill columns that a row lacks with None, NaN or empty lists."""
    if value is None or (isinstance(value, float) and isnan(value)):
        return False
    return not isinstance(value, Sized) or len(value) > 0


def _listed(value: Any) -> Any:
    """A list of messages, from an array (Parquet) or an object of lists (`datasets`)."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping) and value and all(isinstance(column, list | tuple) for column in value.values()):
        columns = list(value.values())
        if len({len(column) for column in columns}) == 1:
            return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return value


def plain_message(message: Any) -> Any:
    """A message with `role` and `content`, also from ShareGPT's `from` and `value`; roles get their usual names."""
    if not isinstance(message, Mapping):
        return message
    plain = dict(message)
    for ours, theirs in (("role", "from"), ("content", "value")):
        if plain.get(ours) is None and plain.get(theirs) is not None:
            plain[ours] = plain[theirs]
    if isinstance(role := plain.get("role"), str):
        plain["role"] = _ROLES.get(role.strip().lower(), role)
    return plain


def name_of(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """A row's name: its value under the first of the keys that has a text or a whole number, or None."""
    names = (row.get(key) for key in keys)
    return next((str(name) for name in names if isinstance(name, (str, int)) and name != ""), None)
