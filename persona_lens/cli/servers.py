"""Which server a command asks, as one word: `openai:MODEL`, or `openai:MODEL@URL` for a server of your own.

Knows nothing about what is asked of it.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from persona_lens.clients import OpenAIClient


def client_of(spec: str, *, cache: Path | None, concurrency: int = 20, timeout: float = 60.0) -> "OpenAIClient":
    """The client of `openai:MODEL` or `openai:MODEL@URL`; the URL begins at the first `@http`.

    Raises typer.BadParameter where the word is of another form or the URL is none.
    """
    from persona_lens.clients import OpenAIClient

    found = re.fullmatch(r"openai:(?P<model>(?!@http).+?)(?:@(?P<url>https?:.*))?", spec.strip())
    if found is None:
        raise typer.BadParameter(
            f"expected openai:MODEL, or openai:MODEL@URL as in openai:my-model@http://localhost:8000/v1; got {spec!r}"
        )
    try:
        return OpenAIClient(
            found["model"], base_url=found["url"], cache=cache, concurrency=concurrency, timeout=timeout
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
