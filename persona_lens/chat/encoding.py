"""Text to token ids, such that a message cannot forge control tokens.

A tokenizer turns every spelling of a control token, such as `<|im_end|>`, into that token. In what a chat template
writes this is intended; in a message it would let the message end its own turn and open another. So before the template
runs, such spellings in messages are enclosed in two marks (private-use characters that no message contains), and
afterwards what stands between marks is tokenised as plain text. Texts without such a spelling skip all of this.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from threading import Lock
from typing import Any, NamedTuple

_ONE_AT_A_TIME = Lock()
"""Splitting special tokens is a setting of the tokenizer's backend, shared by all threads."""

_REASONING_TAG = re.compile(r"\W*(think|thinking|thought|reasoning)\W*", re.IGNORECASE)
_PRIVATE_USE = range(0xF0000, 0xF1000)


class Marks(NamedTuple):
    """Two characters that no message contains; the spelling of a control token between them is plain text."""

    opening: str
    closing: str


class _ControlTokens(NamedTuple):
    """The tokens that a text could forge, and what is needed to find their spellings."""

    ids: dict[str, int]
    """Special tokens, and added tokens that the template writes."""
    marked: frozenset[str]
    """Those that messages may not write: all but reasoning tags, which belong in responses."""
    unsplit: frozenset[str]
    """Those that are not special, so that the tokenizer does not split them with the special ones."""
    first_letters: re.Pattern[str]
    lengths: tuple[int, ...]
    takes_space_before: frozenset[str]
    takes_space_after: frozenset[str]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where their spellings stand in a text; of several that begin at one place the longest."""
        spans: list[tuple[int, int]] = []
        stop = 0
        for letter in self.first_letters.finditer(text):
            start = letter.start()
            if start < stop:
                continue
            length = next((length for length in self.lengths if text[start : start + length] in self.ids), None)
            if length is not None:
                stop = start + length
                spans.append((start, stop))
        return spans


def n_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the longest common start of two texts or lists."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of text as it is: spellings of special tokens become those tokens, and none is added.

    Raises ValueError for half of a surrogate pair, which is not valid text.
    """
    refuse_half_characters(text, "The text")
    return _tokenized(tokenizer, text)


def encode_content(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of untrusted text, in which the spelling of a control token is plain text."""
    (marked,), marks = mark_contents(tokenizer, [text])
    return encode_marked(tokenizer, marked, marks)


def refuse_half_characters(text: str, place: str) -> None:
    """Raise ValueError, naming the place, if a text contains half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} should be text, got half of a surrogate pair ({text[error.start]!a}, character {error.start}): "
            "remove it, or replace it, as by text.encode(errors='replace').decode()."
        ) from None


def mark_contents(tokenizer: Any, contents: Sequence[Any]) -> tuple[list[Any], Marks | None]:
    """Messages or texts with marks around whatever spells a control token; marks are None if nothing does."""
    tokens = _control_tokens_of(tokenizer)
    texts = _texts(contents)
    if not any(text[start:stop] in tokens.marked for text in texts for start, stop in tokens.spans(text)):
        return list(contents), None
    taken = set().union(*texts)
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
    marks = Marks(next(free), next(free))
    return [_marked(content, tokens, marks) for content in contents], marks


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [text for part in value for text in _texts(part)] if isinstance(value, list | tuple) else []


def _marked(value: Any, tokens: _ControlTokens, marks: Marks) -> Any:
    if isinstance(value, Mapping):
        return {key: _marked(part, tokens, marks) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(part, tokens, marks) for part in value]
    if not isinstance(value, str):
        return value
    for start, stop in reversed(tokens.spans(value)):
        if (spelling := value[start:stop]) in tokens.marked:
            value = f"{value[:start]}{marks.opening}{spelling}{marks.closing}{value[stop:]}"
    return value


def encode_marked(tokenizer: Any, text: str, marks: Marks | None) -> tuple[int, ...]:
    """Token ids of a text in which what stands between marks is plain text.

    A tokenizer cuts a text at every control token and tokenises the pieces independently. So a piece between two of the
    template's own control tokens can be tokenised by itself, with special tokens split, if it contains marks; all other
    ids are those of the unmarked text. Raises ValueError if the chat template has split up marks, since its own tokens
    then cannot be told from a message's.
    """
    if marks is None or not (marks.opening in text or marks.closing in text):
        return encode(tokenizer, text)
    tokens = _control_tokens_of(tokenizer)
    clean, forged = _without_marks(text, marks)
    own = _outside(tokens, clean, forged)
    ids: tuple[int, ...] = ()
    done = 0
    for start, stop in _plain_stretches(tokens, clean, forged, own):
        ids += _tokenized(tokenizer, clean[done:start]) if start > done else ()
        cuts = [at + 1 for at, end in forged if start <= at < stop and clean[at:end] in tokens.unsplit]
        for left, right in zip([start, *cuts], [*cuts, stop], strict=True):
            ids += _plain(tokenizer, clean[left:right], within=left > 0)
        done = stop
    return ids + (_tokenized(tokenizer, clean[done:]) if done < len(clean) else ())


def _without_marks(text: str, marks: Marks) -> tuple[str, list[tuple[int, int]]]:
    """The text without its marks, and the spans that stood between them."""
    opening, closing = map(re.escape, marks)
    clean, forged = "", []
    for place, piece in enumerate(re.split(f"{opening}([^{opening}{closing}]*){closing}", text)):
        if marks.opening in piece or marks.closing in piece:
            raise ValueError(
                "The chat template takes apart a message that spells a control token, so the message cannot be told "
                "from what the template writes: remove that spelling (such as <|im_end|>) from the messages."
            )
        if place % 2:
            forged.append((len(clean), len(clean) + len(piece)))
        clean += piece
    return clean, forged


def _outside(tokens: _ControlTokens, clean: str, forged: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans of the control tokens that the template wrote."""
    edges = [0, *(edge for span in forged for edge in span), len(clean)]
    return [
        (left + start, left + stop)
        for left, right in zip(edges[::2], edges[1::2], strict=True)
        for start, stop in tokens.spans(clean[left:right])
    ]


def _plain_stretches(
    tokens: _ControlTokens, clean: str, forged: Sequence[tuple[int, int]], own: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The piece around each forged spelling: from the template's token before it to the one after it.

    White space that those tokens swallow (`lstrip`, `rstrip`) is left to them.
    """
    stretches: list[tuple[int, int]] = []
    for at, end in forged:
        before = max((span for span in own if span[1] <= at), default=None)
        after = min((span for span in own if span[0] >= end), default=None)
        start, stop = before[1] if before else 0, after[0] if after else len(clean)
        if before and clean[slice(*before)] in tokens.takes_space_after:
            start += len(clean[start:at]) - len(clean[start:at].lstrip())
        if after and clean[slice(*after)] in tokens.takes_space_before:
            stop -= len(clean[end:stop]) - len(clean[end:stop].rstrip())
        if not stretches or stretches[-1] != (start, stop):
            stretches.append((start, stop))
    return stretches


def _plain(tokenizer: Any, text: str, *, within: bool) -> tuple[int, ...]:
    """Token ids of a piece of text as plain text; `within` says that other text stands before it."""
    if not text:
        return ()
    ids: tuple[int, ...] | None = None
    if within:
        # Some tokenizers put a space before every text, but not after a line break, whose ids are dropped again.
        line_break = _tokenized(tokenizer, "\n", split=True)
        with_break = _tokenized(tokenizer, f"\n{text}", split=True)
        ids = with_break[len(line_break) :] if with_break[: len(line_break)] == line_break else None
    ids = _tokenized(tokenizer, text, split=True) if ids is None else ids
    tokens = _control_tokens_of(tokenizer)
    if forged := set(ids) & {tokens.ids[spelling] for spelling in tokens.marked}:
        names = [spelling for spelling, token in tokens.ids.items() if token in forged]
        raise ValueError(
            f"Text should have no control token, and this tokenizer makes {names[0]!r} of plain text too: remove it "
            "from the messages."
        )
    return ids


def _tokenized(tokenizer: Any, text: str, *, split: bool = False) -> tuple[int, ...]:
    """The ids of a text; with `split`, special tokens are split into plain ones."""
    with _ONE_AT_A_TIME:
        if not split:
            return tuple(tokenizer(text, add_special_tokens=False).input_ids)
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        before = getattr(backend, "encode_special_tokens", None)
        try:
            return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)
        finally:
            if before is not None:
                backend.encode_special_tokens = before


def _control_tokens_of(tokenizer: Any) -> _ControlTokens:
    # The cache key includes the template and the size, since both may change after the tokenizer was first seen.
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    return _control_tokens(tokenizer, str(getattr(tokenizer, "chat_template", None)), size)


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any, _template: str, _size: int) -> _ControlTokens:
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    tokens = {token: place for place, token in added.items() if token.content and not token.content.isspace()}
    others = [token.content for token in tokens if not token.special]
    # DeepSeek's mark of a user turn, for example, is an added token that is not special.
    written = _some_chats(tokenizer) if others else ""
    turns = {spelling for spelling in others if spelling in written and not _REASONING_TAG.fullmatch(spelling)}
    ids = {token.content: place for token, place in tokens.items() if token.special or token.content in turns}
    letters = "".join(re.escape(letter) for letter in sorted({spelling[0] for spelling in ids}))
    return _ControlTokens(
        ids=ids,
        marked=frozenset(spelling for spelling in ids if not _REASONING_TAG.fullmatch(spelling)),
        unsplit=frozenset(turns),
        first_letters=re.compile(f"[{letters}]" if letters else "(?!)"),
        lengths=tuple(sorted({len(spelling) for spelling in ids}, reverse=True)),
        takes_space_before=frozenset(token.content for token in tokens if token.lstrip),
        takes_space_after=frozenset(token.content for token in tokens if token.rstrip),
    )


def _some_chats(tokenizer: Any) -> str:
    """What the chat template writes for chats with every role, except those that it refuses."""
    system, user, answer = ({"role": role, "content": "?"} for role in ("system", "user", "assistant"))
    written = ""
    for chat in ([user], [user, answer, user], [system, user], [system, user, answer]):
        try:
            opened = chat[-1] is user
            written += str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=opened))
        except Exception:  # reported where real messages are rendered
            continue
    return written
