"""Chats of many turns: from files to token ids, with every turn's last prompt token and response found in them.

A turn is what the model saw and said at one of its messages, tokenised as a chat of its own. Where the whole of a turn
is how the next one's prompt begins, token for token, one pass serves both; a chat template that rewrites earlier turns
breaks this, and each turn is then a pass of its own.
Knows files, tokenizers and chat templates; knows nothing about models or vectors.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from persona_lens.chat.batches import ChatTokens, Message, UnclosedBlock, tokenize_chat
from persona_lens.chat.encoding import refuse_half_characters
from persona_lens.chat.rows import Table, chat_rows, messages_of, name_of, plain_message

ROLES = ("system", "user", "assistant")
NAME_KEYS = ("conversation_id", "id", "name")
TOOL_ROLES = {"tool", "function", "function_call", "observation", "ipython"}
BESIDE_THE_TEXT = ("tool_calls", "function_call", "reasoning_content")


@dataclass(frozen=True)
class Transcript:
    """The messages of one chat, `role` and `content` each; whatever else a message carries is left out.

    Raises ValueError, naming the message, for a chat without a user turn, an empty turn, an unknown role, tool messages
    and content that is not text.
    """

    messages: Sequence[Message]
    name: str = ""

    def __post_init__(self) -> None:
        refuse_half_characters(self.name, "The id of a chat")
        checked = tuple(_checked(index, message) for index, message in enumerate(self.messages))
        object.__setattr__(self, "messages", checked)
        if not any(message["role"] == "user" for message in checked):
            raise ValueError(f"A chat needs a user turn, got {len(checked)} messages without one.")
        if checked[0]["role"] == "assistant":
            raise ValueError("messages[0] is the assistant's, and nothing prompts it: drop it.")

    @property
    def turns(self) -> list[int]:
        """Where the model speaks: the index of each assistant message, and the next one's if the chat ends before."""
        spoken = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        waits = self.messages[-1]["role"] != "assistant"
        return [*spoken, len(self.messages)] if waits else spoken


def _checked(index: int, message: Any) -> dict[str, str]:
    place = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} is {type(message).__name__}, expected an object with 'role' and 'content'.")
    message = plain_message(message)
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str) and role in TOOL_ROLES:
        raise ValueError(f"{place} is a tool message: drop such messages, or fold them into the text of others.")
    for key in BESIDE_THE_TEXT:
        beside = message.get(key)
        # Parquet's empty lists are arrays.
        if beside is not None and not (hasattr(beside, "__len__") and len(beside) == 0):
            raise ValueError(f"{place} has {key}, which templates treat apart: drop it, or fold it into the text.")
    if role not in ROLES:
        raise ValueError(f"{place} has role {role!r}, expected one of {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise ValueError(f"{place} has content of type {type(content).__name__}, expected one string: keep its text.")
    refuse_half_characters(content, f"{place}, of role {role},")
    if not content.strip():
        raise ValueError(f"{place}, of role {role}, is empty: drop it, or drop the chat.")
    return {"role": role, "content": content}


@dataclass(frozen=True)
class RejectedChat:
    """A row that is no chat, with its number in its file or table, counted from 1, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class ReadChats:
    """What was read of a file or a table: the chats, and the rows that could not be read."""

    chats: tuple[Transcript, ...]
    rejected: tuple[RejectedChat, ...] = ()

    @property
    def in_words(self) -> str:
        """How many rows could not be read, and the first of them; empty where all could."""
        if not self.rejected:
            return ""
        first = self.rejected[0]
        of = len(self.chats) + len(self.rejected)
        return f"{len(self.rejected)} of {of} rows could not be read, the first of them row {first.row}: {first.reason}"


def read_transcripts(path: str | Path) -> list[Transcript]:
    """Chats from JSON-lines, a .json file with one chat or a list of them, or Parquet.

    Each has `messages` or `conversation` (`role`, `content`), or ShareGPT's `conversations` (`from`, `value`): the
    first of these that has a value. It is named by its `conversation_id`, `id` or `name`, or else by file and row.
    Raises ValueError, naming the file, the row and the message, for what is no chat; `read_chats` counts such rows.
    """
    found = read_chats(path)
    if found.rejected:
        raise ValueError(f"{path}, row {found.rejected[0].row}: {found.rejected[0].reason}")
    return list(found.chats)


def read_chats(rows: str | os.PathLike[str] | Table | Iterable[Any]) -> ReadChats:
    """The chats of a file, a pandas DataFrame or a `datasets.Dataset`, and its rows that are no chats, with why.

    Raises ValueError where no row is a chat, and for a file that cannot be read as a whole.
    """
    of_file = isinstance(rows, str | os.PathLike)
    if of_file and not Path(rows).exists():
        raise FileNotFoundError(f"No file {rows}.")
    chats: list[Transcript] = []
    rejected: list[RejectedChat] = []
    named = f"{Path(rows).stem}:" if of_file else "chat "
    for number, row in chat_rows(rows):
        try:
            chats.append(_transcript(row, f"{named}{number}"))
        except ValueError as error:
            rejected.append(RejectedChat(number, str(error)))
    if not chats:
        place = str(rows) if of_file else "The table"
        if not rejected:
            raise ValueError(f"{place} has no chats.")
        none = f" (none of its {len(rejected)} rows is a chat)" if len(rejected) > 1 else ""
        raise ValueError(f"{place}, row {rejected[0].row}: {rejected[0].reason}{none}")
    if of_file and len(chats) == 1 and not rejected and chats[0].name.startswith(named):
        chats = [Transcript(chats[0].messages, Path(rows).stem)]
    return ReadChats(tuple(chats), tuple(rejected))


def _transcript(row: Any, name: str) -> Transcript:
    if isinstance(row, Transcript):
        return row
    messages = messages_of(row)
    return Transcript(messages, name_of(row, NAME_KEYS) or name)


class Turn(NamedTuple):
    """Where a turn stands in the tokens of its segment."""

    message: int
    """The index of its message, or the one that it would have."""
    unread: int
    """The first token that no earlier turn has read."""
    last_prompt: int
    start: int
    """The first token of the response; equal to `stop` where there is none."""
    averaged: int
    """The first token of the response that is averaged: it follows `after`."""
    stop: int
    dropped: int
    """How many messages the window had no room for."""
    unclosed: bool
    """Whether the response never says `after`; nothing of it is averaged then."""


class Segment(NamedTuple):
    """Tokens for one forward pass, and the turns that are read from it."""

    tokens: tuple[int, ...]
    turns: tuple[Turn, ...]


def chat_segments(
    tokenizer: Any,
    transcript: Transcript,
    limit: int,
    window: int | None = None,
    *,
    after: str | None = None,
    shared: bool = True,
) -> list[Segment]:
    """A chat as token ids, all of its turns in one pass where that is exact, else in several; each turn comes once.

    `limit` is the model's context. `window` runs a turn on the newest messages that fit so many tokens: beyond it the
    oldest ones go, down to half of it at once, but system turns at the front stay and what follows them begins with a
    user turn. `shared=False` gives each turn a pass of its own. Raises ValueError for a chat that does not fit `limit`
    without a window, and for a turn that does not fit it by itself.
    """
    if window is not None and not 2 <= window <= limit:
        raise ValueError(f"window is from 2 tokens to the model's context of {limit}, got {window}.")
    segments: list[Segment] = []
    for row in _rows(_tokenized(tokenizer, transcript, after), transcript, limit, window):
        if shared and row.continues:
            segments[-1] = Segment(row.tokens, (*segments[-1].turns, row.turn))
        else:
            segments.append(Segment(row.tokens, (row.turn,)))
    return segments


class _Row(NamedTuple):
    tokens: tuple[int, ...]
    turn: Turn
    continues: bool
    """Whether it begins with the whole of the turn before it."""


class _Tokenized(NamedTuple):
    tokens: ChatTokens
    unclosed: bool

    @property
    def whole(self) -> tuple[int, ...]:
        return self.tokens.prompt + self.tokens.response


def _rows(
    tokenize: Callable[[int, int], _Tokenized], transcript: Transcript, limit: int, window: int | None
) -> Iterator[_Row]:
    head = first = sum(1 for _ in takewhile(lambda message: message["role"] == "system", transcript.messages))
    before: int | None = None
    said: tuple[int, ...] = ()
    for message in transcript.turns:
        found, start = tokenize(first, message), first
        if window is None and len(found.tokens) > limit:
            longest = max(len(tokenize(first, turn).tokens) for turn in transcript.turns[-2:])
            raise ValueError(
                f"The chat has {longest} tokens and the model's context holds {limit}: pass window={limit} or less, "
                "which leaves out the oldest messages (--window on the command line), or shorten the chat."
            )
        if window is not None and len(found.tokens) > window:
            first, found = _within(window, tokenize, transcript, message, first)
            if before is not None and before > first:
                said = tokenize(first, before).whole
        read = _common(said, found.tokens.prompt)
        yield _Row(found.whole, _turn(message, read, first - head, found), first == start and 0 < len(said) == read)
        before, said = message, found.whole


def _turn(message: int, read: int, dropped: int, found: _Tokenized) -> Turn:
    start, stop = len(found.tokens.prompt), len(found.tokens)
    averaged = stop if found.unclosed else start + found.tokens.skip
    # The last prompt token belongs to its turn, even where another one's prompt ends alike.
    return Turn(message, min(read, start - 1), start - 1, start, averaged, stop, dropped, found.unclosed)


def _within(
    window: int, tokenize: Callable[[int, int], _Tokenized], transcript: Transcript, message: int, first: int
) -> tuple[int, _Tokenized]:
    """The earliest user turn from which a turn fits half of the window, or else all of it."""
    fitting: tuple[int, _Tokenized] | None = None
    for start in range(first + 1, min(message, len(transcript.messages))):
        if transcript.messages[start]["role"] != "user":
            continue
        found = tokenize(start, message)
        if fitting is None and len(found.tokens) <= window:
            fitting = start, found
        if len(found.tokens) <= window // 2:
            return start, found
    if fitting is None:
        starts = [place for place in range(first, message) if transcript.messages[place]["role"] == "user"]
        alone = len(tokenize(starts[-1] if starts else first, message).tokens)
        raise ValueError(
            f"messages[{message}]: this turn alone has {alone} tokens and the window is {window}: raise the window, or "
            "shorten the turn."
        )
    return fitting


def _tokenized(tokenizer: Any, transcript: Transcript, after: str | None) -> Callable[[int, int], _Tokenized]:
    """A function of a first message and a turn's: the turn's tokens on the system turns and what begins there."""
    system = list(takewhile(lambda message: message["role"] == "system", transcript.messages))

    def tokenize(first: int, message: int) -> _Tokenized:
        prompt = [*system, *transcript.messages[first:message]]
        said = transcript.messages[message]["content"] if message < len(transcript.messages) else ""
        try:
            return _Tokenized(tokenize_chat(tokenizer, prompt, said, after=after), unclosed=False)
        except UnclosedBlock:
            return _Tokenized(tokenize_chat(tokenizer, prompt, said), unclosed=True)

    return tokenize


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common from the start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def text_pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token, together the text of all; a token that ends within a character has none of its own."""
    pieces: list[str] = []
    start = read = 0
    for stop in range(1, len(tokens) + 1):
        # With the token before it, since some tokenizers drop the space that a text begins with.
        before, text = tokenizer.decode(tokens[start:read]), tokenizer.decode(tokens[start:stop])
        if text.endswith("\ufffd") and stop < len(tokens):
            pieces.append("")
        else:
            pieces.append(text[len(before) :])
            start, read = read, stop
    return pieces
