"""Which server a command asks, and where its answers are kept: calls.sqlite, in the folder of the command's output.

Knows nothing about what is asked of it.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from persona_lens.clients import OpenAIClient


def client_of(
    spec: str, folder: Path, *, concurrency: int = 20, timeout: float = 60.0, dry_run: bool = False
) -> "OpenAIClient":
    """The client of `openai:MODEL`, or of `openai:MODEL@URL`, where the URL begins at the first `@http`.

    Raises typer.BadParameter where the word is of another form or the URL is none.
    """
    found = re.fullmatch(r"openai:(?P<model>(?!@http).+?)(?:@(?P<url>https?:.*))?", spec.strip())
    if found is None:
        raise typer.BadParameter(
            f"expected openai:MODEL, or openai:MODEL@URL as in openai:my-model@http://localhost:8000/v1; got {spec!r}"
        )
    try:
        return connect(found["url"], found["model"], folder, concurrency=concurrency, timeout=timeout, dry_run=dry_run)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def connect(
    url: str | None, model: str, folder: Path, *, concurrency: int, timeout: float, dry_run: bool = False
) -> "OpenAIClient":
    """A client whose answers are kept in the folder; a dry run makes no such file."""
    from persona_lens.clients import OpenAIClient

    kept = folder / "calls.sqlite"
    cache = kept if kept.exists() or not dry_run else None
    return OpenAIClient(model, base_url=url, concurrency=concurrency, timeout=timeout, cache=cache)
