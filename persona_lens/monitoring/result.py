"""Results of monitoring: the projection of every turn of every chat on some persona vectors, as values and files.

A turn has the last prompt token's projection, which is known before the model speaks, and the mean over the response
(arXiv:2507.21509, section 3.3). What was not measured is None, never 0.
"""

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.monitoring.transcripts import RejectedChat
from persona_lens.storage.files import DAMAGE, JsonLines, checked, ensure_writable, write_whole

if TYPE_CHECKING:
    import pandas

FORMAT, FORMAT_VERSION = "persona_lens monitoring", 1
SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class MonitoredVector:
    """A vector that was projected on."""

    trait: str
    layer: int
    fingerprint: str

    @property
    def name(self) -> str:
        """Its name in columns: `evil@14`."""
        return f"{self.trait}@{self.layer}"


@dataclass(frozen=True, eq=False)
class TokenProjections:
    """The tokens of a turn that no earlier turn has read: the new ones of its prompt, then its response.

    Attributes:
        pieces: The text of each token; they join to the turn's text. A token that ends within a character has "".
        n_prompt: How many of them belong to the prompt; `TurnProjections.prompt` is the last of these.
        values: Scalar projections on the unit vectors.
    """

    pieces: tuple[str, ...]
    n_prompt: int
    values: Float[Tensor, "token vector"]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenProjections):
            return NotImplemented
        same = (self.pieces, self.n_prompt) == (other.pieces, other.n_prompt)
        return same and torch.equal(self.values, other.values)


@dataclass(frozen=True)
class TurnProjections:
    """One turn of the model.

    Attributes:
        message: The index of its message in the chat, counted from 0; for a chat that ends before the model speaks, the
            index that the answer would have.
        prompt: The last prompt token's scalar projection on each vector.
        response: The mean over the response's tokens, for each vector; None where there is nothing to average: no
            response yet, or one that never says `after`, or ends with it.
        n_tokens: How many response tokens were averaged.
        dropped_messages: How many of the oldest messages the window had no room for.
        unclosed: Whether the response never says `after`.
        tokens: Every token's projection, with `monitor(tokens=True)`.
    """

    message: int
    prompt: tuple[float, ...]
    response: tuple[float, ...] | None
    n_tokens: int = 0
    dropped_messages: int = 0
    unclosed: bool = False
    tokens: TokenProjections | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.response is None) != (self.n_tokens == 0):
            raise ValueError(f"A turn has a response projection where it has response tokens, got {self}.")


@dataclass(frozen=True)
class ChatProjections:
    """One chat, turn by turn."""

    name: str
    turns: tuple[TurnProjections, ...]


@dataclass(frozen=True)
class Monitoring:
    """The projections of chats on persona vectors. Drawn by `pl.plots.turns`; a page by `pl.pages.monitoring_html`.

    Attributes:
        vectors: The vectors, in the order of every turn's numbers.
        chats: In the order of the input.
        after: The text after which a response was averaged; None for the whole response.
        window: Tokens that were read at once at most; None for whole chats.
        interventions: What acted on the model, in words; empty for nothing.
        template_date: The day that the chat template was told, in ISO form; empty where it reads no clock.
        rejected: Rows of the file or table that are no chats, with their numbers and reasons.
    """

    vectors: tuple[MonitoredVector, ...]
    chats: tuple[ChatProjections, ...] = field(repr=False)
    after: str | None = None
    window: int | None = None
    interventions: tuple[str, ...] = ()
    template_date: str = ""
    rejected: tuple[RejectedChat, ...] = ()

    @property
    def unclosed(self) -> int:
        """Responses that never say `after`, which therefore have no response projection."""
        return sum(turn.unclosed for chat in self.chats for turn in chat.turns)

    def table(self) -> "pandas.DataFrame":
        """One row a turn: `chat`, `turn` (counted from 1), `message` (from 0), `n_tokens`, `dropped_messages`.

        And for each vector `{trait}@{layer} prompt` and `{trait}@{layer} response`, which is NaN where there is none.
        """
        import pandas as pd

        rows = [self._row(chat, number) for chat in self.chats for number in range(len(chat.turns))]
        projections = [name for vector in self.vectors for name in _columns(vector)]
        columns = ["chat", "turn", "message", "n_tokens", "dropped_messages", *projections]
        return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(projections, float))

    def save(self, path: str | Path) -> None:
        """Write a .jsonl or .parquet file, whole or not at all.

        A row a turn, as in `table`; the first line of JSON-lines, or Parquet's own metadata, says what was measured.
        """
        path = _writable(path)
        record = self.to_dict()
        rows = record.pop("turns")
        head = json.dumps({**record, "n_turns": len(rows)}, ensure_ascii=False)
        if path.suffix == ".jsonl":
            lines = [head, *(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)]
            contents = ("\n".join(lines) + "\n").encode()
        else:
            contents = _parquet(rows, head)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, contents)

    @classmethod
    def load(cls, path: str | Path) -> "Monitoring":
        """What `save` wrote. Raises ValueError for a file that it did not write."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"No file {path}.")
        if path.suffix == ".parquet":
            arrow = _pyarrow()
            try:
                table = arrow.parquet.read_table(path)
            except arrow.ArrowInvalid as error:
                raise ValueError(f"{path} is not a Parquet file that can be read: {error}.") from error
            head, rows = json.loads((table.schema.metadata or {}).get(FORMAT.encode(), b"{}")), table.to_pylist()
        else:
            head, *rows = JsonLines(path).read() or [{}]
        if head.get("format") != FORMAT or head.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} is not a monitoring file of version {FORMAT_VERSION}: pass one that Monitoring.save, "
                "monitor(output_file=) or `persona-lens monitor --output` wrote."
            )
        try:
            return _from_records(head, rows)
        except DAMAGE as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__} {error}.") from error

    def _row(self, chat: ChatProjections, number: int) -> dict[str, Any]:
        turn = chat.turns[number]
        row = {
            "chat": chat.name,
            "turn": number + 1,
            "message": turn.message,
            "n_tokens": turn.n_tokens,
            "dropped_messages": turn.dropped_messages,
            "unclosed": turn.unclosed,
        }
        responses = turn.response or (None,) * len(self.vectors)
        for vector, prompt, response in zip(self.vectors, turn.prompt, responses, strict=True):
            row |= dict(zip(_columns(vector), (prompt, response), strict=True))
        return row

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON: what was measured, and under `turns` a row a turn."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "vectors": [asdict(vector) for vector in self.vectors],
            "chats": [chat.name for chat in self.chats],
            "after": self.after,
            "window": self.window,
            "interventions": list(self.interventions),
            **({"template_date": self.template_date} if self.template_date else {}),
            "rejected": [asdict(row) for row in self.rejected],
            "turns": [
                {"chat_index": index, **self._row(chat, number), **_token_columns(chat.turns[number])}
                for index, chat in enumerate(self.chats)
                for number in range(len(chat.turns))
            ],
        }

    def __str__(self) -> str:
        turns = sum(len(chat.turns) for chat in self.chats)
        unclosed = f", {self.unclosed} of which never say {self.after!r}" if self.unclosed else ""
        names = ", ".join(vector.name for vector in self.vectors)
        rejected = f" ({len(self.rejected)} rows could not be read)" if self.rejected else ""
        return f"{turns} turns of {len(self.chats)} chats{rejected}{unclosed}, projected on {names}"


def checked_output(path: str | Path) -> Path:
    """The path, after a check that results can be written there and replace only other results of monitoring.

    Raises ValueError for another kind of file or a file that holds something else, OSError in one sentence where it
    cannot be written.
    """
    path = _writable(path)
    if path.exists() and path.stat().st_size and not _is_monitoring(path):
        raise ValueError(
            f"{path} holds something else: expected results of monitoring, which would be replaced. Choose another "
            "output, or move that file away."
        )
    return path


def _writable(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"Monitoring is kept in .jsonl or .parquet files, got {path.name!r}: name one of these.")
    ensure_writable(path)
    if path.suffix == ".parquet":
        _pyarrow()
    return path


def _is_monitoring(path: Path) -> bool:
    """Whether a file's first line, or Parquet's own metadata, says that it holds results of monitoring."""
    if path.suffix == ".parquet":
        arrow = _pyarrow()
        try:
            return FORMAT.encode() in (arrow.parquet.read_schema(path).metadata or {})
        except arrow.ArrowException:
            return False
    with path.open("rb") as file, suppress(*DAMAGE):
        return json.loads(file.readline())["format"] == FORMAT
    return False


def _columns(vector: MonitoredVector) -> tuple[str, str]:
    return f"{vector.name} prompt", f"{vector.name} response"


def _token_columns(turn: TurnProjections) -> dict[str, Any]:
    if turn.tokens is None:
        return {}
    pieces, values = list(turn.tokens.pieces), turn.tokens.values.tolist()
    return {"pieces": pieces, "n_prompt": turn.tokens.n_prompt, "token_projections": values}


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: `pip install pyarrow`, or name a .jsonl file.") from error
    return pyarrow


def _parquet(rows: Sequence[Mapping[str, Any]], head: str) -> bytes:
    arrow = _pyarrow()
    kinds = {str: arrow.string(), bool: arrow.bool_(), int: arrow.int64()}
    lists = {"pieces": arrow.list_(arrow.string()), "token_projections": arrow.list_(arrow.list_(arrow.float32()))}
    # The types are given: a column that is None throughout has none that could be inferred.
    fields = [(name, lists.get(name) or kinds.get(type(value), arrow.float64())) for name, value in rows[0].items()]
    table = arrow.Table.from_pylist(list(rows), schema=arrow.schema(fields, metadata={FORMAT: head}))
    buffer = io.BytesIO()
    arrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def _from_records(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Monitoring:
    vectors = tuple(MonitoredVector(**vector) for vector in head["vectors"])
    turns: list[list[TurnProjections]] = [[] for _ in head["chats"]]
    if not vectors:
        raise ValueError("it names no vector")
    if (written := head.get("n_turns", len(rows))) != len(rows):
        raise ValueError(f"it has {len(rows)} of {written} turns")
    for row in rows:
        if row["turn"] != len(turns[row["chat_index"]]) + 1:
            raise ValueError(f"turn {row['turn']} of chat {row['chat_index']} is not where it belongs")
        prompt, response = zip(
            *([checked(row[name], float, NoneType) for name in _columns(vector)] for vector in vectors), strict=True
        )
        if None in prompt:
            raise ValueError("a prompt has no projection")
        tokens = None
        if row.get("pieces") is not None:
            values = torch.tensor(row["token_projections"], dtype=torch.float32).reshape(-1, len(vectors))
            tokens = TokenProjections(tuple(row["pieces"]), row["n_prompt"], values)
        response = None if response[0] is None else response
        counts = {name: row[name] for name in ("message", "n_tokens", "dropped_messages", "unclosed")}
        turns[row["chat_index"]].append(TurnProjections(prompt=prompt, response=response, tokens=tokens, **counts))
    if not all(turns):
        raise ValueError(f"chat {turns.index([])} has no turns")
    chats = tuple(ChatProjections(name, tuple(of_chat)) for name, of_chat in zip(head["chats"], turns, strict=True))
    day = checked(head.get("template_date", ""), str)
    rejected = tuple(RejectedChat(**row) for row in head.get("rejected", ()))
    return Monitoring(vectors, chats, head["after"], head["window"], tuple(head["interventions"]), day, rejected)
