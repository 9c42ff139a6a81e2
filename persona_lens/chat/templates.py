"""The day that chat templates are told: one for a whole run, also where it goes on another day.

Some templates (Llama 3.x, SmolLM3, gpt-oss) write today's date into the prompt by calling `strftime_now`. A run that
went on tomorrow would then mix two prompts. Here the day is fixed while a run is at work, and what it made records it.
Knows nothing about messages.

Where a given response stands in the assistant's turn as the chat template writes it.

A template may write more into a turn than its prompt for generation announces, or something else: Qwen3 puts an empty
`<think>` block before an answer, DeepSeek-R1 opens a block in the prompt and leaves it out of finished turns, Llama 3
trims what is said. A response that is given as text is one that the template writes, so its own turn decides.
Works on rendered texts; knows nothing about tokens.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

from persona_lens.chat.encoding import Marks

_fixed: ContextVar[str] = ContextVar("fixed template date", default="")
_DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxXGuV"
"""What a template may ask for by a format that it puts together itself; what is written in it is found there."""
_WRITTEN = re.compile("%[-_0^#]?[EO]?[a-zA-Z]")


@contextmanager
def fixed_date(day: str = "") -> Iterator[str]:
    """While open, chat templates that read the clock are told this day (ISO form, as `2026-11-30`) at midnight.

    Without a day it is the one that is fixed already, or else today, which then stays for as long as this is open. Also
    a decorator, `@fixed_date()`. Raises ValueError for what is no date in ISO form.
    """
    day = datetime.fromisoformat(day or _today()).date().isoformat()
    token = _fixed.set(day)
    try:
        yield day
    finally:
        _fixed.reset(token)


def date_told(tokenizer: Any) -> str:
    """The day that the tokenizer's chat template is told now, in ISO form; empty where it reads no clock."""
    return _today() if "strftime_now" in str(getattr(tokenizer, "chat_template", None)) else ""


def dated_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template with the day that it is told written into it; None where it reads no clock."""
    day = date_told(tokenizer)
    return _with_date(tokenizer.get_chat_template(), day) if day else None


def _today() -> str:
    return _fixed.get() or datetime.now().date().isoformat()


@lru_cache(maxsize=64)
def _with_date(template: str, day: str) -> str:
    """The template after a macro that takes the place of transformers' `strftime_now`.

    A template is given plain data only, no functions, so that the macro writes out the directives one by one.
    """
    moment = datetime.fromisoformat(day)
    told = {f"%{each}": moment.strftime(f"%{each}") for each in _DIRECTIVES}
    told |= {directive: moment.strftime(directive) for directive in sorted(set(_WRITTEN.findall(template)))}
    # "%%" is a per cent sign, also before a letter, and so is kept aside until the end.
    changes = [("%%", "\0"), *told.items(), ("\0", "%")]
    filters = "".join(f"|replace({json.dumps(old)}, {json.dumps(new)})" for old, new in changes)
    # transformers trims the line break after a block, so that the template itself begins as it did.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


_TAG = re.compile(r"</?\w+>|\[/?\w+\]")
_OPENED = re.compile(r"(?P<tag><\w+>|\[\w+\])(?P<space>\s*)\Z")


class WrittenTurn(NamedTuple):
    """A response in the rendered chat."""

    prompt: str
    """The messages with the prompt for generation."""
    before: str
    """Everything that stands before the response; most often the same text."""
    response: str
    """The response as the template writes it, without what closes the turn."""


def written_turn(
    response: str,
    prompt: str,
    render: Callable[[str | None], str],
    marks: Marks | None = None,
) -> WrittenTurn:
    """The response in the template's own turn.

    `render` renders the messages with an assistant's turn that says its argument, or without a turn for None, and never
    with a prompt for generation. A thought that the template leaves out of finished turns stays: it is what the model
    says after its prompt, once, also where the prompt opens the thought and the response repeats the opening.

    Raises ValueError where the template writes the response in other words, and where it writes the prompt in other
    words once there is a response.
    """
    whole = render(response)
    # Where the response stood later too, what follows the prompt might only look like it.
    if whole.startswith(prompt + response) and response not in whole[len(prompt) + len(response) :]:
        return WrittenTurn(prompt, prompt, response)
    # Digits, which no template writes in another case.
    probe = next(text for text in map(str, range(10**9, 2 * 10**9)) if text not in prompt + response)
    before_probe, found, closing = render(probe).partition(probe)
    if not found or not whole.endswith(closing):
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
    # A template that writes a block of its own, though the response brings or goes on with one, would have it twice.
    twice = set(_TAG.findall(written[turn:start])) & set(_TAG.findall(response))
    if twice or (_goes_on(prompt, response) and not written.startswith(prompt)):
        return _after_prompt(prompt, response)
    return WrittenTurn(prompt, written[:start], written[start:])


def _after_prompt(prompt: str, response: str) -> WrittenTurn:
    """What the model says after its prompt, without the opening of a block that the prompt has opened."""
    opened = _OPENED.search(prompt)
    if opened and response.lstrip().startswith(opened["tag"]):
        response = response.lstrip().removeprefix(opened["tag"]).removeprefix(opened["space"])
    return WrittenTurn(prompt, prompt, response)


def _goes_on(prompt: str, response: str) -> bool:
    """Whether the prompt opens a block that the response closes without opening it."""
    opened = _OPENED.search(prompt)
    if opened is None or opened["tag"] in response:
        return False
    return f"{opened['tag'][0]}/{opened['tag'][1:]}" in response


def _start(written: str, response: str) -> int | None:
    """Where the response begins in a text that ends with it, white space aside; None where the text does not."""
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
    """Where the assistant's part begins; raises ValueError where the text before it differs from the prompt's."""
    turn, alike = _n_common(prompt, messages), _n_common(prompt, written)
    if alike < min(turn, len(prompt)):
        raise ValueError(
            "The chat template should write the messages before a response as it writes them without one, and writes "
            f"{prompt[alike : alike + 40]!r} without and {written[alike : alike + 40]!r} with it: its turns cannot be "
            "told apart, so use another template."
        )
    return turn


def _n_common(one: Sequence[str], other: Sequence[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _shown(text: str, marks: Marks | None) -> str:
    for mark in marks or ():
        text = text.replace(mark, "")
    return repr(text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}")
