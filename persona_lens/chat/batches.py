"""Chats to token ids, with a known boundary between prompt and response.

The boundary comes from token ids: prompt and response are tokenised apart and joined, so no token straddles it. The
response is the ids of its text alone, without the end-of-turn token or whatever the template appends. A response given
as text is tokenised as the template writes it in an assistant's turn (`templates.written_turn`). A control token that
a message spells out is plain text (`encoding`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from persona_lens.chat.encoding import (
    encode,
    encode_content,
    encode_marked,
    mark_contents,
    n_common,
    refuse_half_characters,
)
from persona_lens.chat.templates import dated_template, fixed_date, written_turn
from persona_lens.models.structure import declared_ends

Message = Mapping[str, str]


class UnclosedBlock(ValueError):
    """A response never contains the text `after` which averaging should start."""


class RenderedPrompt(NamedTuple):
    """A prompt as the model sees it, up to where it would speak; used verbatim, without the chat template."""

    text: str
    system_folded: bool = False
    """Whether the template has no system turn, so that its text stands before the first user turn instead."""


@dataclass(frozen=True)
class ChatTokens:
    """One chat as token ids. The first `skip` tokens of the response are not averaged.

    Skipped is what comes before `after`, and what the chat template writes into the turn before the response's text.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...] = ()
    skip: int = 0

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("A chat row needs at least one prompt token, got none: check the template or prompt.")

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def n_averaged(self) -> int:
        """The number of response tokens that are averaged."""
        return max(0, len(self.response) - self.skip)


@dataclass(frozen=True)
class ChatBatch:
    """Rows padded to one length. `attention_mask` is False on padding, `response_mask` True on averaged tokens.

    Masks cannot be read off the ids: in many chat models the padding token also ends every turn. Without `prompt_mask`
    the prompt is everything attended before the first averaged token.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    response_mask: Bool[Tensor, "batch pos"]
    prompt_mask: Bool[Tensor, "batch pos"] | None = None

    def __post_init__(self) -> None:
        shapes = {tuple(t.shape) for t in (self.tokens, self.attention_mask, self.response_mask)}
        if len(shapes) != 1:
            raise ValueError(f"tokens and both masks must have one shape [batch pos], got {sorted(shapes)}.")
        if bool((self.response_mask & ~self.attention_mask).any()):
            raise ValueError("response_mask marks padding: every response token must also be in attention_mask.")


@dataclass(frozen=True)
class Conversation:
    """A prompt (messages, or rendered text that is used verbatim) with its response (text, or token ids).

    Rows with one `question` are not independent, so statistics resample questions. `date` is the date given to chat
    templates that read the clock (`Rollout.date`); if empty, the run's date or today.
    """

    prompt: str | tuple[Message, ...]
    response: str | tuple[int, ...]
    question: str = ""
    instruction: str = ""
    date: str = ""

    @classmethod
    def from_messages(cls, messages: Sequence[Message]) -> "Conversation":
        """Messages that end with the assistant's; question and instruction are its last user and system turns."""
        if not messages or messages[-1].get("role") != "assistant":
            raise ValueError("Messages must end with the assistant's response (role 'assistant').")
        if not all(isinstance(turn.get("content"), str) for turn in messages):
            raise ValueError("Every message needs its content as one string.")
        prompt = tuple(messages[:-1])
        questions = [turn["content"] for turn in prompt if turn["role"] == "user"]
        instructions = [turn["content"] for turn in prompt if turn["role"] == "system"]
        return cls(prompt, messages[-1]["content"], (questions or [""])[-1], (instructions or [""])[0])

    @property
    def is_empty(self) -> bool:
        """Whether the response is empty or white space, so that there is nothing to average over."""
        return not self.response if not isinstance(self.response, str) else not self.response.strip()

    def tokenize(self, tokenizer: Any, *, after: str | None = None) -> ChatTokens:
        """The row as token ids; see `tokenize_chat`."""
        with fixed_date(self.date):
            return tokenize_chat(tokenizer, self.prompt, self.response, after=after)


Chat = str | Sequence[Message] | RenderedPrompt | Conversation
"""A user message, a list of messages, a prompt that is rendered already, or a prompt with its response."""
AnyChat = TypeVar("AnyChat", bound="Chat | Sequence[int]")


def as_conversation(chat: Chat) -> Conversation:
    """A chat as a prompt and a response, which messages have if the last one is the assistant's.

    Raises TypeError for anything else than a chat.
    """
    if isinstance(chat, Conversation):
        return chat
    prompt = _prompt_of(chat)
    if isinstance(prompt, tuple) and prompt and prompt[-1].get("role") == "assistant":
        return Conversation.from_messages(prompt)
    return Conversation(prompt, "")


def prompt_tokens(tokenizer: Any, chat: Chat | Sequence[int]) -> tuple[int, ...]:
    """The token ids of a chat up to where the model would speak; token ids are returned as they are.

    All of a list of messages is the prompt, and of a `Conversation` what comes before its response. Raises TypeError
    for anything else than a chat, and ValueError as `tokenize_chat` does.
    """
    if not isinstance(chat, str | RenderedPrompt | Conversation) and all(isinstance(token, int) for token in chat):
        return tuple(int(cast(int, token)) for token in chat)
    prompt, day = (chat.prompt, chat.date) if isinstance(chat, Conversation) else (_prompt_of(chat), "")
    with fixed_date(day):
        return tokenize_chat(tokenizer, prompt).prompt


def list_of_chats(chats: Sequence[AnyChat]) -> list[AnyChat]:
    """The chats, or prompts of token ids, as a list; raises ValueError for a single chat."""
    single = isinstance(chats, str | RenderedPrompt | Conversation)
    if single or any(isinstance(chat, Mapping) for chat in chats):
        raise ValueError("Expected a list of chats, got a single one: put it into brackets, [chat].")
    return list(chats)


def _prompt_of(chat: Any) -> str | tuple[Message, ...]:
    if isinstance(chat, RenderedPrompt):
        return chat.text
    if isinstance(chat, str):
        return ({"role": "user", "content": chat},)
    if isinstance(chat, Sequence) and all(isinstance(message, Mapping) for message in chat):
        return tuple(chat)
    raise TypeError(
        "Expected a chat: a string (a user message), a list of messages with role and content, a Conversation or a "
        f"RenderedPrompt, got {chat!r:.60}."
    )


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> RenderedPrompt:
    """Render messages with the tokenizer's own chat template, ending where the assistant would speak.

    If the template refuses or drops the system turn, its text goes before the first user turn, and the result says so.
    In the text a control token that a message spells out looks like the template's own: tokenise untrusted messages
    with `tokenize_chat` instead. Raises ValueError if the tokenizer has no chat template.
    """
    return _render(tokenizer, messages)[0]


def _render(tokenizer: Any, messages: Sequence[Message]) -> tuple[RenderedPrompt, list[dict[str, str]]]:
    """The rendered prompt, and the messages as the template takes them."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "The tokenizer has no chat template, so messages cannot be rendered. "
            "Use an instruction-tuned model, set tokenizer.chat_template, or pass rendered text."
        )
    plain = [dict(message) for message in messages]
    system = next((message["content"] for message in plain if message["role"] == "system"), None)
    try:
        text = _apply_template(tokenizer, plain)
        refused = system is not None and system.strip() not in text
    except ValueError:
        # A template refuses a role by raising inside Jinja. Without a system turn it refuses something else.
        if system is None:
            raise
        text, refused = "", True
    if not refused:
        return RenderedPrompt(text, system_folded=False), plain
    folded = _fold_system(plain)
    return RenderedPrompt(_apply_template(tokenizer, folded), system_folded=True), folded


def _apply_template(tokenizer: Any, messages: list[dict[str, str]], *, speaks: bool = True) -> str:
    dated = dated_template(tokenizer)
    template = {} if dated is None else {"chat_template": dated}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=speaks, **template)
    except Exception as error:
        raise ValueError(f"The chat template refuses these messages: {error}") from error


def _fold_system(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages with the text of every system turn put before the first user turn."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    rest = [dict(message) for message in messages if message["role"] != "system"]
    if not rest or rest[0]["role"] != "user":
        raise ValueError("The template has no system turn and the messages no first user turn to put its text before.")
    rest[0]["content"] = f"{system}\n\n{rest[0]['content']}"
    return rest


def chat_messages(system: str | None, question: str, examples: Sequence[tuple[str, str]] = ()) -> list[dict[str, str]]:
    """The messages of a question under a system prompt, after examples of questions with answers."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    for example, answer in examples:
        turns += [{"role": "user", "content": example}, {"role": "assistant", "content": answer}]
    return [*turns, {"role": "user", "content": question}]


def tokenize_chat(
    tokenizer: Any,
    prompt: str | Sequence[Message],
    response: str | Sequence[int] = "",
    *,
    after: str | None = None,
) -> ChatTokens:
    """A prompt (messages, or rendered text that is used verbatim) and its response as token ids.

    After messages, a response given as text is tokenised as the template writes it into an assistant's turn. Whatever
    the template writes there between the generation prompt and the text, such as an empty `<think>` block, belongs to
    the response and is not averaged. If the template writes the opening of a finished turn differently from its
    generation prompt, the prompt ends where the two begin to differ. A response given as ids is what a model sampled
    after the prompt, and is used as it is. A control token that a message or a response spells out is plain text; in
    rendered text it is that token.

    With `after` (such as `"</think>"`) only what follows that text is averaged; a response without it raises
    `UnclosedBlock`. Raises ValueError, naming the message, for invalid text, and for a template that writes the
    messages or the response in other words.
    """
    text, sampled = (response, ()) if isinstance(response, str) else ("", tuple(response))
    refuse_half_characters(text, "The response")
    if isinstance(prompt, str):
        refuse_half_characters(prompt, "The prompt")
        ids = encode_content(tokenizer, text) if text else sampled
        return ChatTokens(encode(tokenizer, prompt), ids, averaged_from(tokenizer, ids, after))
    for index, message in enumerate(prompt):
        if isinstance(content := message.get("content"), str):
            refuse_half_characters(content, f"messages[{index}], of role {message.get('role')},")

    (*contents, text), marks = mark_contents(tokenizer, [*prompt, text])
    rendered, messages = _render(tokenizer, contents)
    prompt_ids = encode_marked(tokenizer, rendered.text, marks)
    if not text.strip():
        ids = encode(tokenizer, text) if text else sampled
        return ChatTokens(prompt_ids, ids, averaged_from(tokenizer, ids, after))

    def render(answer: str | None) -> str:
        turns = messages if answer is None else [*messages, {"role": "assistant", "content": answer}]
        return _apply_template(tokenizer, turns, speaks=False)

    turn = written_turn(text, rendered.text, render, marks)
    ids, skip = encode_marked(tokenizer, turn.response, marks), 0
    if turn.before != turn.prompt:
        opening = encode_marked(tokenizer, turn.before, marks)
        row = opening + ids
        # The prompt is what this row and the generation prompt share; at least one token is left for the response.
        start = n_common(prompt_ids, row[:-1])
        prompt_ids, ids, skip = row[:start], row[start:], max(0, len(opening) - start)
    return ChatTokens(prompt_ids, ids, max(skip, averaged_from(tokenizer, ids, after)))


def averaged_from(tokenizer: Any, ids: Sequence[int], after: str | None) -> int:
    """The number of leading response tokens until their text contains `after`: these are not averaged.

    Raises `UnclosedBlock` if the response never contains it.
    """
    if after is None or not ids:
        return 0
    if after not in tokenizer.decode(ids):
        raise UnclosedBlock(f"A response never says {after!r} (an unclosed block): drop it, or leave out `after`.")
    low, high = 0, len(ids)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if after in tokenizer.decode(ids[:middle]) else (middle, high)
    return high


def collate(
    rows: Sequence[ChatTokens], *, pad_side: Literal["left", "right"] = "right", pad_token: int = 0
) -> ChatBatch:
    """Pad rows to one length. The value of the padding token does not matter, since the masks say what is padding."""
    if not rows:
        raise ValueError("A batch needs at least one row, got none.")
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad_token, dtype=torch.long)
    attention, prompt, response = (torch.zeros_like(tokens, dtype=torch.bool) for _ in range(3))
    for index, row in enumerate(rows):
        start = 0 if pad_side == "right" else width - len(row)
        stop = start + len(row)
        tokens[index, start:stop] = torch.tensor(row.prompt + row.response)
        attention[index, start:stop] = True
        prompt[index, start : start + len(row.prompt)] = True
        response[index, start + len(row.prompt) + row.skip : stop] = True
    return ChatBatch(tokens, attention, response, prompt)


def chat_batch(tokenizer: Any, chats: Sequence[Chat], *, after: str | None = None) -> ChatBatch:
    """Chats as one padded batch with their masks, ready for `mean_activations`; see `tokenize_chat`."""
    return collate([as_conversation(chat).tokenize(tokenizer, after=after) for chat in list_of_chats(chats)])


def fit_context(
    rows: Sequence[ChatTokens], limit: int, *, too_long: Literal["error", "truncate"] = "error"
) -> tuple[list[ChatTokens], int]:
    """Rows that fit a context of `limit` tokens, and the number of responses that were cut to make them fit.

    By default a row that is too long is an error; `too_long="truncate"` cuts responses, never prompts.
    """
    fitting: list[ChatTokens] = []
    for index, row in enumerate(rows):
        if len(row) <= limit:
            fitting.append(row)
        elif too_long == "error" or len(row.prompt) >= limit:
            what = "prompt alone" if len(row.prompt) >= limit else "prompt and response"
            raise ValueError(
                f"Row {index} has {len(row)} tokens ({what}), the context holds {limit}. "
                "Shorten it, or pass too_long='truncate' to cut responses (the cut is counted)."
            )
        else:
            fitting.append(ChatTokens(row.prompt, row.response[: limit - len(row.prompt)], row.skip))
    return fitting, sum(len(new) < len(old) for new, old in zip(fitting, rows, strict=True))


_KNOWN_ANSWER = "blue whales sing"
"""An assistant turn that is rendered to see what the template writes after it; no template contains these words."""


def end_of_turn(tokenizer: Any) -> int | None:
    """The token with which the chat template ends an assistant turn, or else the tokenizer's end of text.

    A turn with known text is rendered; the first token after that text, white space aside, ends the turn if it is a
    special or an added one. Gemma 3's `<end_of_turn>` is an added token that is not among `all_special_ids`.
    """
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.eos_token_id
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _KNOWN_ANSWER}]
    _, answer, after = _apply_template(tokenizer, turns, speaks=False).rpartition(_KNOWN_ANSWER)
    # A template that rewrites the answer does not show what ends it.
    for token in encode(tokenizer, after) if answer else ():
        if token in _special_ids(tokenizer):
            return token
        if tokenizer.decode([token]).strip():
            break
    return tokenizer.eos_token_id


def _special_ids(tokenizer: Any) -> set[int]:
    """Special tokens and added ones, except those that are white space (Gemma adds such)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {token for token, value in added.items() if str(value).strip()}


def turn_ends(tokenizer: Any) -> frozenset[int]:
    """The ids that end a turn according to the tokenizer: its end of text, and what its template writes after one."""
    return frozenset({tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None})


def stop_tokens(model: Any) -> frozenset[int]:
    """Every id that ends the model's turn, wherever text is sampled or trained on.

    The tokenizer's end of text, the token with which the chat template ends an assistant turn, and everything in the
    model's `generation_config.eos_token_id`.
    """
    return turn_ends(model.tokenizer) | declared_ends(model)


def template_hash(tokenizer: Any) -> str:
    """A short hash of the chat template, by which a vector records the template it was made with."""
    return hashlib.sha256(str(getattr(tokenizer, "chat_template", None)).encode()).hexdigest()[:16]


def show_tokens(tokenizer: Any, chat: ChatBatch | Chat, row: int = 0) -> str:
    r"""Text of a chat or a batch's row, with bars around averaged tokens: `<|im_start|>assistant\n|Sure|,| here|`."""
    batch = chat if isinstance(chat, ChatBatch) else chat_batch(tokenizer, [chat])
    pieces: list[str] = []
    inside = False
    for token, attended, averaged in zip(
        batch.tokens[row].tolist(), batch.attention_mask[row].tolist(), batch.response_mask[row].tolist(), strict=True
    ):
        if attended:
            text = tokenizer.decode([token])
            pieces.append(f"|{text}" if averaged else f"|{text}" if inside else text)
            inside = averaged
    return "".join(pieces) + ("|" if inside else "")
