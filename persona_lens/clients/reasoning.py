"""Models that reason before they answer: how an answer that holds nothing but reasoning is told, and what to do then.

Such a server returns `content: null`, its reasoning in a field of its own, and often `finish_reason: "length"`: every
call is paid for and no text comes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

TEXTLESS_LIMIT = 5
"""So many answers of reasoning alone, without one answer that has text before them, are an error."""

_EXTRA_BODY = '{"chat_template_kwargs": {"enable_thinking": false}}'

Item = TypeVar("Item")


def only_reasoning(who: str, option: str) -> str:
    """The sentence that refuses a model which reasons where a text is wanted; `option` is the command line's."""
    return (
        f"{who} reasons before it answers, and its answer ends before there is text: turn reasoning off with "
        f"OpenAIClient(..., extra_body={_EXTRA_BODY.replace('false', 'False')}), or {option} '{_EXTRA_BODY}' on the "
        'command line (for OpenAI\'s own models {"reasoning_effort": "minimal"}), or name a model that does not reason.'
    )


def stop_if_textless(items: Iterable[Item], is_textless: Callable[[Item], bool], sentence: str) -> Iterator[Item]:
    """The items; an error where the first `TEXTLESS_LIMIT` of them are all without text.

    Textless items before the first one with text are held back, so that nothing of a run that is stopped is written.
    After it, and where there are fewer, they pass: one long chain of thought must not stop a run for good.

    Raises:
        ValueError: With `sentence`.
    """
    held: list[Item] = []
    seen_text = False
    for item in items:
        if not seen_text and is_textless(item):
            held.append(item)
            if len(held) == TEXTLESS_LIMIT:
                raise ValueError(sentence)
            continue
        seen_text = True
        yield from held
        held.clear()
        yield item
    yield from held
