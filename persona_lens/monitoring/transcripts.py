"""Chats of many turns: from files to token ids, with the place of every turn's last prompt token and response.

A turn is what the model saw and said at one of its messages, tokenised as a chat of its own. Where the next turn's
prompt begins with the whole of this one, token for token, one pass serves both. A chat template that rewrites earlier
turns (one that drops old reasoning, say) breaks this, and each turn is then a pass of its own.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """The messages of one chat, reduced to `role` and `content`.

    Raises ValueError, naming the message, for a chat without a user turn, an empty turn, an unknown role, tool messages
    and content that is not text.
    """

    messages: Sequence[Message]
    name: str = ""

    def __post_init__(self) -> None:
        refuse_half_characters(self.name, "The id of a chat")
        messages = tuple(_checked(index, message) for index, message in enumerate(self.messages))
        object.__setattr__(self, "messages", messages)
        if not any(message["role"] == "user" for message in messages):
            raise ValueError(f"A chat needs a user turn, got {len(messages)} messages without one.")
        if messages[0]["role"] == "assistant":
            raise ValueError("messages[0] is the assistant's, and nothing prompts it: drop it.")

    @property
    def turns(self) -> list[int]:
        """The index of each assistant message, and of the next one where the chat ends before the model speaks."""
        spoken = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        return spoken if self.messages[-1]["role"] == "assistant" else [*spoken, len(self.messages)]


def _checked(index: int, message: Any) -> dict[str, str]:
    place = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} is {type(message).__name__}, expected an object with 'role' and 'content'.")
    message = plain_message(message)
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str) and role in TOOL_ROLES:
        raise ValueError(f"{place} is a tool message: drop such messages, or fold them into the text of others.")
    for key in BESIDE_THE_TEXT:
        extra = message.get(key)
        # Tables fill an absent list with an empty one, which Parquet gives as an array.
        if extra is not None and not (hasattr(extra, "__len__") and len(extra) == 0):
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
    """A row that is no chat: its number in the file or table, counted from 1, and the reason."""

    row: int
    reason: str


@dataclass(frozen=True)
class ReadChats:
    """The chats of a file or a table, and the rows that could not be read."""

    chats: tuple[Transcript, ...]
    rejected: tuple[RejectedChat, ...] = ()

    @property
    def in_words(self) -> str:
        """How many rows could not be read, and the first of them; empty where all could."""
        if not self.rejected:
            return ""
        first, n_rows = self.rejected[0], len(self.chats) + len(self.rejected)
        where = f"the first of them row {first.row}: {first.reason}"
        return f"{len(self.rejected)} of {n_rows} rows could not be read, {where}"


def read_transcripts(path: str | Path) -> list[Transcript]:
    """Read chats from JSON-lines, a .json file with one chat or a list of them, or Parquet.

    A row has `messages` or `conversation` (`role`, `content`), or ShareGPT's `conversations` (`from`, `value`): the
    first of these that has a value. It is named by its `conversation_id`, `id` or `name`, or else by file and row.
    Raises ValueError, naming the file, the row and the message, for a row that is no chat; `read_chats` counts these.
    """
    contents = read_chats(path)
    if contents.rejected:
        raise ValueError(f"{path}, row {contents.rejected[0].row}: {contents.rejected[0].reason}")
    return list(contents.chats)


def read_chats(rows: str | os.PathLike[str] | Table | Iterable[Any]) -> ReadChats:
    """Read the chats of a file, a pandas DataFrame or a `datasets.Dataset`; rows that are no chats are listed.

    Raises ValueError where no row is a chat, and for a file that cannot be read as a whole.
    """
    of_file = isinstance(rows, str | os.PathLike)
    if of_file and not Path(rows).exists():
        raise FileNotFoundError(f"No file {rows}.")
    chats: list[Transcript] = []
    rejected: list[RejectedChat] = []
    prefix = f"{Path(rows).stem}:" if of_file else "chat "
    for number, row in chat_rows(rows):
        try:
            if not isinstance(row, Transcript):
                row = Transcript(messages_of(row), name_of(row, NAME_KEYS) or f"{prefix}{number}")
            chats.append(row)
        except ValueError as error:
            rejected.append(RejectedChat(number, str(error)))
    if not chats:
        place = str(rows) if of_file else "The table"
        if not rejected:
            raise ValueError(f"{place} has no chats.")
        none = f" (none of its {len(rejected)} rows is a chat)" if len(rejected) > 1 else ""
        raise ValueError(f"{place}, row {rejected[0].row}: {rejected[0].reason}{none}")
    if of_file and len(chats) == 1 and not rejected and chats[0].name.startswith(prefix):
        chats = [Transcript(chats[0].messages, Path(rows).stem)]
    return ReadChats(tuple(chats), tuple(rejected))


class Turn(NamedTuple):
    """A turn's places in the tokens of its segment.

    Attributes:
        message: The index of its message, or the index that the message would have.
        unread: The first token that no earlier turn has read.
        last_prompt: The last token of its prompt.
        start: The first token of the response; equal to `stop` where there is none.
        averaged: The first token of the response that is averaged: it follows `after`.
        stop: One past the last token of the response.
        dropped: How many messages the window had no room for.
        unclosed: Whether the response never says `after`, so that nothing of it is averaged.
    """

    message: int
    unread: int
    last_prompt: int
    start: int
    averaged: int
    stop: int
    dropped: int
    unclosed: bool


class Segment(NamedTuple):
    """Tokens for one forward pass, and the turns that are read from it."""

    tokens: tuple[int, ...]
    turns: tuple[Turn, ...]


class _TurnTokens(NamedTuple):
    tokens: ChatTokens
    unclosed: bool

    @property
    def whole(self) -> tuple[int, ...]:
        return self.tokens.prompt + self.tokens.response


def chat_segments(
    tokenizer: Any,
    transcript: Transcript,
    limit: int,
    window: int | None = None,
    *,
    after: str | None = None,
    shared: bool = True,
) -> list[Segment]:
    """A chat as token ids, in as few passes as is exact; each turn comes once.

    `limit` is the model's context. `window` runs a turn on the newest messages that fit so many tokens: where a turn
    does not fit, the oldest messages are dropped down to half the window at once, but system turns at the front stay
    and what follows them begins with a user turn. `shared=False` gives each turn a pass of its own.

    Raises ValueError for a chat that does not fit `limit` without a window, and for a turn that does not fit alone.
    """
    if window is not None and not 2 <= window <= limit:
        raise ValueError(f"window is from 2 tokens to the model's context of {limit}, got {window}.")
    messages = transcript.messages
    system = list(takewhile(lambda message: message["role"] == "system", messages))

    def tokenize(first: int, message: int) -> _TurnTokens:
        """The turn at `message`, on the system turns and the messages from `first` on."""
        prompt = [*system, *messages[first:message]]
        said = messages[message]["content"] if message < len(messages) else ""
        try:
            return _TurnTokens(tokenize_chat(tokenizer, prompt, said, after=after), unclosed=False)
        except UnclosedBlock:
            return _TurnTokens(tokenize_chat(tokenizer, prompt, said), unclosed=True)

    segments: list[Segment] = []
    first, previous = len(system), None  # the first message after the system turns that is not dropped; the last turn
    said: tuple[int, ...] = ()  # all tokens of the previous turn
    for message in transcript.turns:
        row, moved = tokenize(first, message), False
        if window is None and len(row.tokens) > limit:
            longest = max(len(tokenize(first, turn).tokens) for turn in transcript.turns[-2:])
            raise ValueError(
                f"The chat has {longest} tokens and the model's context holds {limit}: pass window={limit} or less, "
                "which leaves out the oldest messages (--window on the command line), or shorten the chat."
            )
        if window is not None and len(row.tokens) > window:
            first, row = _within(window, tokenize, transcript, message, first)
            moved = True
            # What the previous turn would have been from here on is what this pass has read of it.
            if previous is not None and previous > first:
                said = tokenize(first, previous).whole
        n_read = _n_common(said, row.tokens.prompt)
        turn = _turn(message, n_read, first - len(system), row)
        if shared and not moved and 0 < len(said) == n_read:
            segments[-1] = Segment(row.whole, (*segments[-1].turns, turn))
        else:
            segments.append(Segment(row.whole, (turn,)))
        previous, said = message, row.whole
    return segments


def _turn(message: int, n_read: int, dropped: int, row: _TurnTokens) -> Turn:
    start, stop = len(row.tokens.prompt), len(row.tokens)
    averaged = stop if row.unclosed else start + row.tokens.skip
    # A turn always reads its own last prompt token, even where another turn's prompt begins with the same tokens.
    return Turn(message, min(n_read, start - 1), start - 1, start, averaged, stop, dropped, row.unclosed)


def _within(
    window: int, tokenize: Callable[[int, int], _TurnTokens], transcript: Transcript, message: int, first: int
) -> tuple[int, _TurnTokens]:
    """The earliest user turn from which a turn fits half of the window, or else all of it."""
    fitting: tuple[int, _TurnTokens] | None = None
    starts = [place for place in range(first, message) if transcript.messages[place]["role"] == "user"]
    for start in starts:
        if start == first:
            continue  # from here it did not fit
        row = tokenize(start, message)
        if fitting is None and len(row.tokens) <= window:
            fitting = start, row
        if len(row.tokens) <= window // 2:
            return start, row
    if fitting is None:
        alone = len(tokenize(starts[-1] if starts else first, message).tokens)
        raise ValueError(
            f"messages[{message}]: this turn alone has {alone} tokens and the window is {window}: raise the window, or "
            "shorten the turn."
        )
    return fitting


def _n_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts share from the start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def text_pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token; they join to the whole text, and a token that ends within a character has none."""
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
