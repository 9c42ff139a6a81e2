"""Messages, or text that is rendered already, to token ids with a known boundary between prompt and response.

The boundary comes from token ids: prompt and response are tokenised apart and joined, so no token straddles it, and the
response is the ids of its text alone, without the end-of-turn token or what the template appends. A response that is
given as text is tokenised as the template writes it in an assistant's turn (`assistant_turns`). A control token that a
content spells is plain text (`encoding`).
Knows tokenizers and chat templates; knows nothing about traits or vectors.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from persona_lens.chat.encoding import encode, encode_content, encode_marked, mark_contents, refuse_half_characters
from persona_lens.chat.templates import dated_template, fixed_date, written_turn
from persona_lens.models.structure import declared_ends

Message = Mapping[str, str]


class UnclosedBlock(ValueError):
    """A response that never closes the block whose end averaging was to start `after`."""


class RenderedPrompt(NamedTuple):
    """A prompt as the model sees it, up to where it would speak."""

    text: str
    system_folded: bool
    """Whether the template has no system turn, so that its text stands before the first user turn instead."""


@dataclass(frozen=True)
class ChatTokens:
    """One chat row as token ids; the first `skip` tokens of the response are not averaged.

    These are what comes before `after`, and what the chat template writes into the turn before what is said.
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
        """How many response tokens are averaged."""
        return max(0, len(self.response) - self.skip)


@dataclass(frozen=True)
class ChatBatch:
    """Rows of equal padded length. `attention_mask` is False on padding, `response_mask` True on averaged tokens.

    Masks are never guessed from the ids: in many chat models the padding token also ends every turn. `prompt_mask`
    defaults to what is attended before the first averaged token.
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
    """A prompt with its response, as given: messages, or text that is rendered already and used verbatim.

    `question` and `instruction` say which rows are not independent of each other: statistics resample questions.
    `date` is the day that a chat template which reads the clock is told (`Rollout.date`); if empty, the run's or today.
    """

    prompt: str | tuple[Message, ...]
    response: str | tuple[int, ...]
    question: str = ""
    instruction: str = ""
    date: str = ""

    @classmethod
    def from_messages(cls, messages: Sequence[Message]) -> "Conversation":
        """Messages ending with the assistant's; the question is the last user turn, the instruction the system turn."""
        if not messages or messages[-1].get("role") != "assistant":
            raise ValueError("Messages must end with the assistant's response (role 'assistant').")
        if not all(isinstance(turn.get("content"), str) for turn in messages):
            raise ValueError("Every message needs its content as one string.")
        turns = tuple(messages[:-1])
        asked = [turn["content"] for turn in turns if turn["role"] == "user"]
        ordered = [turn["content"] for turn in turns if turn["role"] == "system"]
        return cls(turns, messages[-1]["content"], (asked or [""])[-1], (ordered or [""])[0])

    @property
    def is_empty(self) -> bool:
        """Whether there is no response to average over."""
        return not self.response if not isinstance(self.response, str) else not self.response.strip()

    def tokenize(self, tokenizer: Any, *, after: str | None = None) -> ChatTokens:
        """The row as token ids; see `tokenize_chat`."""
        with fixed_date(self.date):
            return tokenize_chat(tokenizer, self.prompt, self.response, after=after)


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> RenderedPrompt:
    """Render messages with the tokenizer's own chat template, ending where the assistant would speak.

    A template that refuses or drops the system turn gets its text before the first user turn, and the result says so.
    In the text, a control token that a message spells looks like the template's own: tokenise messages, not this text,
    where a message may be anybody's. Raises ValueError where the tokenizer has no chat template.
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
        # Templates refuse a role by raising from inside jinja; without a system turn the fault is the caller's.
        if system is None:
            raise
        text, refused = "", True
    if not refused:
        return RenderedPrompt(text, system_folded=False), plain
    folded = _fold_system(plain)
    return RenderedPrompt(_apply_template(tokenizer, folded), system_folded=True), folded


def _apply_template(tokenizer: Any, messages: list[dict[str, str]], *, speaks: bool = True) -> str:
    dated = dated_template(tokenizer)
    given = {} if dated is None else {"chat_template": dated}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=speaks, **given)
    except Exception as error:
        raise ValueError(f"The chat template refuses these messages: {error}") from error


def _fold_system(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The text of every system turn put before the first user turn."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    rest = [dict(message) for message in messages if message["role"] != "system"]
    if not rest or rest[0]["role"] != "user":
        raise ValueError("The template has no system turn and the messages no first user turn to put its text before.")
    rest[0]["content"] = f"{system}\n\n{rest[0]['content']}"
    return rest


def chat_messages(system: str | None, question: str, examples: Sequence[tuple[str, str]] = ()) -> list[dict[str, str]]:
    """The messages of one question under a system prompt, after examples of questions with their answers."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered in examples:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*turns, {"role": "user", "content": question}]


def tokenize_chat(
    tokenizer: Any,
    prompt: str | Sequence[Message],
    response: str | Sequence[int] = "",
    *,
    after: str | None = None,
) -> ChatTokens:
    """A prompt (messages, or text that is rendered already and used verbatim) and its response as token ids.

    After messages, a response given as text is tokenised as the template writes it into an assistant's turn. What the
    template writes before it beyond the prompt for generation, such as an empty `<think>` block, belongs to the
    response and is not averaged; where the template finishes a turn otherwise than it prompts for one, the prompt is as
    far as both agree. A response given as ids is what a model said after the prompt, and is taken as it is. A control
    token that a message or a response spells is plain text, and one in rendered text is that token.

    With `after` (such as `"</think>"`) only what follows that text is averaged; a response without it raises
    `UnclosedBlock`. Raises ValueError, naming the message, for what is no text, and for a template that does not write
    the messages or the response as they are given.
    """
    if isinstance(prompt, str):
        refuse_half_characters(prompt, "The prompt")
    else:
        for index, message in enumerate(prompt):
            if isinstance(content := message.get("content"), str):
                refuse_half_characters(content, f"messages[{index}], of role {message.get('role')},")
    if isinstance(response, str):
        refuse_half_characters(response, "The response")
    before, ids, skip = _prompt_and_response(tokenizer, prompt, response)
    return ChatTokens(before, ids, max(skip, averaged_from(tokenizer, ids, after)))


def _prompt_and_response(
    tokenizer: Any, prompt: str | Sequence[Message], response: str | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The ids of both, and how many of the response's first ones the template writes before what is said."""
    said = response if isinstance(response, str) else ""
    sampled: tuple[int, ...] = () if isinstance(response, str) else tuple(response)
    if isinstance(prompt, str):
        return encode(tokenizer, prompt), encode_content(tokenizer, said) if said else sampled, 0
    (*contents, said), marks = mark_contents(tokenizer, [*prompt, said])
    rendered, messages = _render(tokenizer, contents)
    prompt_ids = encode_marked(tokenizer, rendered.text, marks)
    if not said.strip():
        return prompt_ids, encode(tokenizer, said) if said else sampled, 0

    def render(answer: str | None) -> str:
        turns = messages if answer is None else [*messages, {"role": "assistant", "content": answer}]
        return _apply_template(tokenizer, turns, speaks=False)

    turn = written_turn(said, rendered.text, render, marks)
    said_ids = encode_marked(tokenizer, turn.response, marks)
    if turn.before == turn.prompt:
        return prompt_ids, said_ids, 0
    before = encode_marked(tokenizer, turn.before, marks)
    ids = before + said_ids
    # The prompt is as far as the model would be prompted with these tokens, and a response has one token at least.
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, ids[:-1], strict=False)))
    return ids[:start], ids[start:], max(0, len(before) - start)


def averaged_from(tokenizer: Any, ids: Sequence[int], after: str | None) -> int:
    """How many of a response's first tokens are not averaged; raises `UnclosedBlock` where it never says `after`."""
    return 0 if after is None or not ids else _tokens_up_to(tokenizer, ids, after)


def _tokens_up_to(tokenizer: Any, ids: Sequence[int], marker: str) -> int:
    """How many leading tokens it takes until their text holds `marker`."""
    if marker not in tokenizer.decode(ids):
        raise UnclosedBlock(f"A response never says {marker!r} (an unclosed block): drop it, or leave out `after`.")
    low, high = 0, len(ids)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if marker in tokenizer.decode(ids[:middle]) else (middle, high)
    return high


def collate(
    rows: Sequence[ChatTokens], *, pad_side: Literal["left", "right"] = "right", pad_token: int = 0
) -> ChatBatch:
    """Pad rows to one length. The padding token's value does not matter: masks carry the truth."""
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


def chat_batch(tokenizer: Any, conversations: Sequence[Conversation], *, after: str | None = None) -> ChatBatch:
    """Conversations as one padded batch with their masks, ready for `mean_activations`; see `tokenize_chat`."""
    return collate([conversation.tokenize(tokenizer, after=after) for conversation in conversations])


def fit_context(
    rows: Sequence[ChatTokens], limit: int, *, too_long: Literal["error", "truncate"] = "error"
) -> tuple[list[ChatTokens], int]:
    """Rows that fit a context of `limit` tokens, and how many responses were cut short to make them fit.

    By default a row that is too long is an error; `too_long="truncate"` cuts responses, never prompts.
    """
    cut: list[ChatTokens] = []
    for index, row in enumerate(rows):
        if len(row) <= limit:
            cut.append(row)
        elif too_long == "error" or len(row.prompt) >= limit:
            what = "prompt alone" if len(row.prompt) >= limit else "prompt and response"
            raise ValueError(
                f"Row {index} has {len(row)} tokens ({what}), the context holds {limit}. "
                "Shorten it, or pass too_long='truncate' to cut responses (the cut is counted)."
            )
        else:
            cut.append(ChatTokens(row.prompt, row.response[: limit - len(row.prompt)], row.skip))
    return cut, sum(len(new) < len(old) for new, old in zip(cut, rows, strict=True))


_KNOWN_ANSWER = "blue whales sing"
"""Rendered as an assistant turn to see what the template writes after one; no template has these words of its own."""


def end_of_turn(tokenizer: Any) -> int | None:
    """The token with which the chat template ends an assistant turn; else the tokenizer's end of text.

    The template renders a turn whose text is known. What ends the turn is the first token after that text, white space
    aside, if it is a special or an added one. It need not have a name in the tokenizer: Gemma 3's `<end_of_turn>` is
    not among `all_special_ids`.
    """
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.eos_token_id
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _KNOWN_ANSWER}]
    _, answer, after = _apply_template(tokenizer, turns, speaks=False).rpartition(_KNOWN_ANSWER)
    # A template that rewrites the answer does not show what it writes after one.
    for token in encode(tokenizer, after) if answer else ():
        if token in _special_ids(tokenizer):
            return token
        if tokenizer.decode([token]).strip():
            break
    return tokenizer.eos_token_id


def _special_ids(tokenizer: Any) -> set[int]:
    """Special tokens with and without a name, and added ones, except those that are white space (Gemma adds such)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {token for token, value in added.items() if str(value).strip()}


def turn_ends(tokenizer: Any) -> frozenset[int]:
    """The ids that end a turn by the tokenizer alone: its end of text, and what its template writes after an answer."""
    return frozenset({tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None})


def stop_tokens(model: Any) -> frozenset[int]:
    """Every id that ends the model's turn, wherever text is sampled or trained on.

    The tokenizer's end of text, the token with which the chat template ends an assistant turn, and everything in the
    model's `generation_config.eos_token_id`.
    """
    return turn_ends(model.tokenizer) | declared_ends(model)


def template_hash(tokenizer: Any) -> str:
    """A short hash of the chat template, to tell whether a vector was made with this one."""
    return hashlib.sha256(str(getattr(tokenizer, "chat_template", None)).encode()).hexdigest()[:16]


def show_tokens(tokenizer: Any, batch: ChatBatch, row: int = 0) -> str:
    r"""The row's text with every averaged token between bars: `<|im_start|>assistant\n|Sure|,| here|`."""
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
