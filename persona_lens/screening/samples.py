"""Samples: one response each with the prompt that it answers, streamed out of files and data sets of chats.

What is no sample comes out as a rejection that says where it stood and why, so that nothing is lost silently. Rows come
one at a time, and a file may be larger than the memory.
Knows nothing about tokenizers or models.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

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
        base_response: The base model's own response, where the data has one.
    """

    row: int
    dataset: str
    id: str
    line: int
    messages: tuple[Message, ...]
    response: str
    base_response: str | None = None

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


class Turns(NamedTuple):
    """Which response of a chat of many turns is its sample."""

    first: bool = False
    """The first one, as for logs of real chats (arXiv:2507.21509, section L); else the last."""
    needs_base: bool = False
    """Whether a row without a base response is of no use."""


def named_datasets(data: Data) -> dict[str, Rows]:
    """The data sets by name: a file's is its stem, rows without a name are `data`.

    Raises ValueError for no data and for a file of another kind, FileNotFoundError for one that is not there.
    """
    if isinstance(data, Mapping):
        named: dict[str, Rows] = dict(cast(Mapping[str, Rows], data))
    elif isinstance(data, str | os.PathLike):
        named = {Path(data).stem: data}
    else:
        named = {"data": data}
    if not named:
        raise ValueError("There is nothing to screen: pass at least one data set.")
    for rows in named.values():
        if isinstance(rows, str | os.PathLike):
            path = Path(rows)
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


def stream_samples(datasets: Mapping[str, Rows], turns: Turns) -> Iterator[Sample | Rejection]:
    """Every row of every data set in its order, as a sample or a rejection.

    Raises ValueError for a file that cannot be read as a whole, such as a Parquet file without messages.
    """
    row = 0
    for dataset, rows in datasets.items():
        for line, content in chat_rows(rows):
            yield _sample(row, dataset, line, content, turns)
            row += 1


def _sample(row: int, dataset: str, line: int, content: Any, turns: Turns) -> Sample | Rejection:
    if isinstance(content, Unreadable):
        return Rejection(dataset, line, "malformed", content.reason, content.text)
    try:
        given = list(content.messages) if isinstance(content, Transcript) else messages_of(content)
        spoken = [place for place, message in enumerate(given) if _role(message) == "assistant"]
        if not spoken:
            return Rejection(dataset, line, "no response", "no turn of the assistant to screen", content)
        place = spoken[0 if turns.first else -1]
        chat = Transcript(given[: place + 1]).messages
        fields = content if isinstance(content, Mapping) else {}
        named = name_of(fields, ID_KEYS) or f"{dataset}:{line}"
        base = fields.get(BASE_KEY) if turns.needs_base else None
        # Half of a surrogate pair is a string, and no text.
        "\n".join([named, base if isinstance(base, str) else "", *(each["content"] for each in chat)]).encode()
    except ValueError as error:
        return Rejection(dataset, line, "malformed", str(error), content)
    if turns.needs_base and not (isinstance(base, str) and base.strip()):
        return Rejection(dataset, line, "no base response", f"{BASE_KEY} is {type(base).__name__} or empty", content)
    return Sample(row, dataset, named, line, tuple(chat[:-1]), chat[-1]["content"], base)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None
