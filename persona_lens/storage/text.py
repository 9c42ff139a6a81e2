"""Names and texts from other people's files, made safe before results store or show them.

The name of a trait or a model is one line without control characters, which could otherwise steer a terminal or break
out of a table or of a model card's front matter.
"""

import os
import re
from pathlib import Path

# Control characters, line breaks of every kind, marks of text direction, and halves of surrogate pairs.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_PATH = re.compile(r"[/\\~]|\.{1,2}([/\\]|$)|[A-Za-z]:[/\\]")
_CACHED = "models--"
"""The first letters of a hub model's folder in the Hugging Face cache."""


def refuse_controls(field: str, text: object) -> None:
    """Raise ValueError unless the text is one line without control characters."""
    if not isinstance(text, str) or _CONTROLS.search(text):
        raise ValueError(f"{field} is one line of text without control characters, got {text!r:.60}: rename it.")


def one_line(text: str) -> str:
    r"""The text with control characters written out, as `\x1b` for an escape and `\n` for a new line."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def shown_name(name: str | os.PathLike[str]) -> str:
    """The name that results give a model or an adapter: a hub name as it is, of a path only the last folder.

    Results are shared, and the rest of a path is private. A snapshot in the Hugging Face cache gets its hub name.
    """
    name = os.fspath(name)
    if not (_PATH.match(name) or "\\" in name or name.count("/") > 1):
        return one_line(name)
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..", "~")]
    cached = next((part for part in parts if part.startswith(_CACHED)), None)
    if cached is not None:
        return one_line(cached.removeprefix(_CACHED).replace("--", "/"))
    return one_line(parts[-1] if parts else Path(name).absolute().name)


def missing_package(user: str, package: str, *, extra: str = "", command: str = "") -> ImportError:
    """The error of a feature whose package is not installed, with the command that installs it."""
    command = command or f'pip install "persona-lens[{extra}]"'
    return ImportError(f"{user} needs the package {package}, which is not installed. Run: {command}")
