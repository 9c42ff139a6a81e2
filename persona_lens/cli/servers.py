"""Which server a command asks, and where its answers are kept: calls.sqlite, in the folder of the command's output.

Knows nothing about what is asked of it.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from persona_lens.clients.client import OpenAIClient


def client_of(
    spec: str,
    folder: Path,
    *,
    concurrency: int = 20,
    timeout: float = 60.0,
    dry_run: bool = False,
    aliases: Sequence[str] | None = None,
    extra_body: str | None = None,
) -> "OpenAIClient":
    """The client of `openai:MODEL`, or of `openai:MODEL@URL`, where the URL begins at the first `@http`.

    `extra_body` is JSON. Raises typer.BadParameter where the word is of another form, the URL is none, or the JSON is
    no object of further fields.
    """
    found = re.fullmatch(r"openai:(?P<model>(?!@http).+?)(?:@(?P<url>https?:.*))?", spec.strip())
    if found is None:
        raise typer.BadParameter(
            f"expected openai:MODEL, or openai:MODEL@URL as in openai:my-model@http://localhost:8000/v1; got {spec!r}"
        )
    try:
        return connect(
            found["url"],
            found["model"],
            folder,
            concurrency=concurrency,
            timeout=timeout,
            dry_run=dry_run,
            aliases=aliases,
            extra_body=extra_body,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def connect(
    url: str | None,
    model: str,
    folder: Path,
    *,
    concurrency: int,
    timeout: float,
    dry_run: bool = False,
    aliases: Sequence[str] | None = None,
    extra_body: str | None = None,
) -> "OpenAIClient":
    """A client whose answers are kept in the folder; a dry run makes no such file.

    `aliases` are MODEL=NAME, for this model and others; `extra_body` is JSON. Raises typer.BadParameter where one is of
    another form.
    """
    from persona_lens.clients.client import OpenAIClient

    kept = folder / "calls.sqlite"
    cache = kept if kept.exists() or not dry_run else None
    pairs = [alias.partition("=") for alias in aliases or ()]
    if wrong := ["".join(pair) for pair in pairs if not all(part.strip() for part in pair)]:
        raise typer.BadParameter(f"--alias is MODEL=NAME, such as my-deployment=gpt-4.1-mini; got {wrong[0]!r}")
    own = [name for asked, _, name in pairs if asked == model]
    settings: dict[str, Any] = {"concurrency": concurrency, "timeout": timeout, "cache": cache}
    return OpenAIClient(model, base_url=url, **settings, aliases=own, extra_body=extra_fields(extra_body))


def extra_fields(text: str | None) -> dict[str, Any]:
    """The further fields of a request that an option gives as JSON.

    Raises typer.BadParameter where it is no JSON object, or names a field that the calls themselves set.
    """
    if text is None:
        return {}
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        found = error
    if not isinstance(found, dict):
        raise typer.BadParameter(
            'expected further fields as a JSON object such as {"chat_template_kwargs": {"enable_thinking": false}}; '
            f"got {text}"
        )
    if owned := sorted({"model", "messages", "stream", "n"} & found.keys()):
        raise typer.BadParameter(
            f"further fields of a request cannot be {', '.join(owned)}: every call sets them itself"
        )
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
