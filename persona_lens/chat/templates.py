"""Two peculiarities of chat templates: some read the clock, and some write a finished turn unlike they prompt for it.

*Dates.* Llama 3.x, SmolLM3 and gpt-oss write today's date into the prompt by calling `strftime_now`, so a run resumed
tomorrow would mix two prompts. `fixed_date` fixes the date for a whole run, and its results record it.

*Turns.* Qwen3 puts an empty `<think>` block before an answer, DeepSeek-R1 opens such a block in its generation prompt
and drops it from finished turns, Llama 3 trims the response. `written_turn` finds where a given response stands in the
turn that the template writes.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from persona_lens.chat.encoding import Marks, n_common

_fixed: ContextVar[str] = ContextVar("fixed template date", default="")
_DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxXGuV"
"""Format codes that a template may assemble itself; codes that stand in its text are found by `_WRITTEN`."""
_WRITTEN = re.compile("%[-_0^#]?[EO]?[a-zA-Z]")


@contextmanager
def fixed_date(day: str = "") -> Iterator[str]:
    """While open, chat templates that read the clock get midnight of this day (ISO form, such as `2026-11-30`).

    Without a day it is the one that is fixed already, or else today, kept for as long as the context is open. Also a
    decorator, `@fixed_date()`. Raises ValueError for a date that is not in ISO form.
    """
    day = datetime.fromisoformat(day or _today()).date().isoformat()
    token = _fixed.set(day)
    try:
        yield day
    finally:
        _fixed.reset(token)


def date_told(tokenizer: Any) -> str:
    """The date that the tokenizer's chat template would get now, in ISO form; empty if it does not read the clock."""
    return _today() if "strftime_now" in str(getattr(tokenizer, "chat_template", None)) else ""


def dated_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template with the date written into it; None if it does not read the clock."""
    day = date_told(tokenizer)
    return _with_date(tokenizer.get_chat_template(), day) if day else None


def _today() -> str:
    return _fixed.get() or datetime.now().date().isoformat()


@lru_cache(maxsize=64)
def _with_date(template: str, day: str) -> str:
    """The template after a macro that replaces transformers' `strftime_now`.

    transformers passes no functions of ours to a template, so the macro replaces every format code by its value.
    """
    moment = datetime.fromisoformat(day)
    codes = [*(f"%{letter}" for letter in _DIRECTIVES), *sorted(set(_WRITTEN.findall(template)))]
    # "%%" is a per cent sign, also before a letter, and so is set aside until the end.
    changes = [("%%", "\0"), *((code, moment.strftime(code)) for code in dict.fromkeys(codes)), ("\0", "%")]
    filters = "".join(f"|replace({json.dumps(old)}, {json.dumps(new)})" for old, new in changes)
    # transformers trims the line break after a block, so that the template itself begins as it did.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


_TAG = re.compile(r"</?\w+>|\[/?\w+\]")
_OPENED = re.compile(r"(?P<tag><\w+>|\[\w+\])(?P<space>\s*)\Z")


class WrittenTurn(NamedTuple):
    """A response in the rendered chat."""

    prompt: str
    """The messages with the generation prompt."""
    before: str
    """Everything before the response; usually the same text."""
    response: str
    """The response as the template writes it, without what closes the turn."""


def written_turn(
    response: str,
    prompt: str,
    render: Callable[[str | None], str],
    marks: Marks | None = None,
) -> WrittenTurn:
    """The response in the turn that the template writes for it.

    `render` renders the messages followed by an assistant turn with the given content (None for no turn), without a
    generation prompt. A reasoning block that the template drops from finished turns is kept, as the model wrote it
    after its prompt; it is opened once, also if the prompt opens it and the response repeats the opening.

    Raises ValueError if the template writes the response in other words, or writes the prompt in other words once there
    is a response.
    """
    whole = render(response)
    # If the response occurred again later, this first place might only look like it.
    if whole.startswith(prompt + response) and response not in whole[len(prompt) + len(response) :]:
        return WrittenTurn(prompt, prompt, response)
    # Digits, which no template writes in another case.
    probe = next(text for text in map(str, range(10**9, 2 * 10**9)) if text not in prompt + response)
    before_probe, separator, closing = render(probe).partition(probe)
    if not separator or not whole.endswith(closing):
        raise ValueError("The chat template does not write the assistant's response as it is given: use another one.")
    written = whole[: len(whole) - len(closing)]
    turn = _where_the_turn_begins(prompt, written, render(None))
    start = _start(written, response)
    if start is None:
        kept = written.removeprefix(before_probe).strip()
        if not written.startswith(before_probe) or not kept or not response.rstrip().endswith(kept):
            raise ValueError(
                f"The chat template should write the response as it is given ({_shown(response, marks)}), and writes "
                f"{_shown(written[turn:], marks)}: give it as the template writes it."
            )
        return _after_prompt(prompt, response)
    # The template writes a reasoning block of its own although the response has one: it would stand there twice.
    twice = set(_TAG.findall(written[turn:start])) & set(_TAG.findall(response))
    if twice or (_goes_on(prompt, response) and not written.startswith(prompt)):
        return _after_prompt(prompt, response)
    return WrittenTurn(prompt, written[:start], written[start:])


def _after_prompt(prompt: str, response: str) -> WrittenTurn:
    """The response right after the prompt, without repeating the opening of a block that the prompt has opened."""
    opened = _OPENED.search(prompt)
    if opened and response.lstrip().startswith(opened["tag"]):
        response = response.lstrip().removeprefix(opened["tag"]).removeprefix(opened["space"])
    return WrittenTurn(prompt, prompt, response)


def _goes_on(prompt: str, response: str) -> bool:
    """Whether the response closes a block that the prompt opens."""
    opened = _OPENED.search(prompt)
    if opened is None or opened["tag"] in response:
        return False
    return f"{opened['tag'][0]}/{opened['tag'][1:]}" in response


def _start(written: str, response: str) -> int | None:
    """Where the response begins in a text that ends with it, white space aside; None if the text does not."""
    if written.endswith(response):
        return len(written) - len(response)
    place = len(written)
    for letter in reversed("".join(response.split())):
        place -= 1
        while place >= 0 and written[place].isspace():
            place -= 1
        if place < 0 or written[place] != letter:
            return None
    return place


def _where_the_turn_begins(prompt: str, written: str, messages: str) -> int:
    """Where the assistant's part begins; raises ValueError if the text before it differs from the prompt's."""
    turn, alike = n_common(prompt, messages), n_common(prompt, written)
    if alike < min(turn, len(prompt)):
        raise ValueError(
            "The chat template should write the messages before a response as it writes them without one, and writes "
            f"{prompt[alike : alike + 40]!r} without and {written[alike : alike + 40]!r} with it: its turns cannot be "
            "told apart, so use another template."
        )
    return turn


def _shown(text: str, marks: Marks | None) -> str:
    for mark in marks or ():
        text = text.replace(mark, "")
    return repr(text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}")
