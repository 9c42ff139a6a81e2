"""Samples: one response each with the prompt that it answers, streamed from files and data sets of chats.

A row that is no sample comes out as a rejection that says where it stood and why, so that nothing is lost silently.
Rows come one at a time, and a file may be larger than the memory.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from persona_lens.chat.batches import Message
from persona_lens.chat.rows import SUFFIXES, Table, Unreadable, chat_rows, messages_of, name_of
from persona_lens.monitoring.transcripts import Transcript

ID_KEYS = ("id", "conversation_id")
BASE_KEY = "base_response"

Kind = Literal["malformed", "no response", "no base response", "too long", "duplicate id", "no token to average"]
Rows = str | os.PathLike[str] | Table | Iterable[Mapping[str, Any] | Transcript]
"""A file of chats, a pandas DataFrame, or rows with `messages` such as a `datasets.Dataset`, streamed or not."""
Data = Rows | Mapping[str, Rows]


@dataclass(frozen=True)
class Sample:
    """One response of a data set.

    Attributes:
        row: Its number over all data sets, counted from 0: what names it in a run.
        dataset: The data set's name.
        id: Its own id, or else the data set and the line.
        line: Where it stands in its data set, counted from 1.
        messages: The prompt: what the response answers.
        response: The text that is screened.
        base_response: The base model's own response, where there is one.
    """

    row: int
    dataset: str
    id: str
    line: int
    messages: tuple[Message, ...] = field(repr=False)
    response: str = field(repr=False)
    base_response: str | None = field(default=None, repr=False)

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages with the response: a row of training data."""
        return [*map(dict, self.messages), {"role": "assistant", "content": self.response}]


@dataclass(frozen=True)
class Rejection:
    """A row that could not be screened, and why; `content` is the row as it was read."""

    dataset: str
    line: int
    kind: Kind
    reason: str
    content: Any


def named_datasets(data: Data) -> dict[str, Rows]:
    """The data sets by name: a file's is its stem, rows without a name are `data`.

    Raises ValueError for no data and for a file of another kind, FileNotFoundError for one that is not there.
    """
    if isinstance(data, Mapping):
        named = dict(cast(Mapping[str, Rows], data))
    else:
        named = {Path(data).stem if isinstance(data, str | os.PathLike) else "data": data}
    if not named:
        raise ValueError("There is nothing to screen: pass at least one data set.")
    for path in [Path(rows) for rows in named.values() if isinstance(rows, str | os.PathLike)]:
        if not path.is_file():
            raise FileNotFoundError(f"No file {path}.")
        if path.suffix not in SUFFIXES:
            raise ValueError(f"Data is read from {', '.join(SUFFIXES)} files, got {path}: convert it to one.")
    return named


def fingerprint(rows: Rows) -> str:
    """What tells a data set from another: of a file its size and both ends, of rows in memory their own fingerprint.

    A streamed data set that has no fingerprint of its own is known by its name alone.
    """
    if not isinstance(rows, str | os.PathLike):
        return str(getattr(rows, "_fingerprint", ""))
    size, edge = os.path.getsize(rows), 1 << 20
    digest = hashlib.sha256(str(size).encode())
    with open(rows, "rb") as file:
        digest.update(file.read(edge))
        file.seek(max(0, size - edge))
        digest.update(file.read(edge))
    return digest.hexdigest()[:16]


def stream_samples(
    datasets: Mapping[str, Rows], *, first_turn: bool = False, needs_base: bool = False
) -> Iterator[Sample | Rejection]:
    """Every row of every data set in its order, as a sample or a rejection.

    A chat's sample is its last response, or with `first_turn` its first, as for logs of real chats (arXiv:2507.21509,
    section L). With `needs_base` a row without a base response is rejected.
    Raises ValueError for a file that cannot be read as a whole, such as a Parquet file without messages.
    """
    row = 0
    for dataset, rows in datasets.items():
        for line, content in chat_rows(rows):
            yield _sample(row, dataset, line, content, first_turn, needs_base)
            row += 1


def _sample(row: int, dataset: str, line: int, content: Any, first_turn: bool, needs_base: bool) -> Sample | Rejection:
    if isinstance(content, Unreadable):
        return Rejection(dataset, line, "malformed", content.reason, content.text)
    try:
        turns = list(content.messages) if isinstance(content, Transcript) else messages_of(content)
        spoken = [
            place
            for place, message in enumerate(turns)
            if isinstance(message, Mapping) and message.get("role") == "assistant"
        ]
        if not spoken:
            return Rejection(dataset, line, "no response", "no turn of the assistant to screen", content)
        # Only what comes up to the response is checked: what follows may be no chat.
        chat = Transcript(turns[: spoken[0 if first_turn else -1] + 1]).messages
        fields = content if isinstance(content, Mapping) else {}
        name = name_of(fields, ID_KEYS) or f"{dataset}:{line}"
        base = fields.get(BASE_KEY) if needs_base else None
        # Half of a surrogate pair is a string, but it cannot be written.
        "\n".join([name, base if isinstance(base, str) else ""]).encode()
    except ValueError as error:
        return Rejection(dataset, line, "malformed", str(error), content)
    if needs_base and not (isinstance(base, str) and base.strip()):
        return Rejection(dataset, line, "no base response", f"{BASE_KEY} is {type(base).__name__} or empty", content)
    return Sample(row, dataset, name, line, tuple(chat[:-1]), chat[-1]["content"], base)
