"""The day that chat templates are told: one for a whole run, also where it goes on another day.

Some templates (Llama 3.x, SmolLM3, gpt-oss) write today's date into the prompt by calling `strftime_now`. A run that
went on tomorrow would then mix two prompts. Here the day is fixed while a run is at work, and what it made records it.
Knows nothing about messages.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

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
