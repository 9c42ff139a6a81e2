"""Texts out of other people's files and names of the user's folders, before results keep them or show them.

A name of a trait or a model is one line: what steers a terminal or starts a new line would be read as something else on
a terminal, in a model card's front matter, or in a table.
Knows nothing about traits or models.
"""

import os
import re
from pathlib import Path

# Control characters, new lines of any kind, what turns text around, and what is no text.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_PATH = re.compile(r"[/\\~]|\.{1,2}([/\\]|$)|[A-Za-z]:[/\\]")
_CACHED = "models--"
"""How the Hugging Face cache begins the folder of a model from the hub."""


def refuse_controls(field: str, text: object) -> None:
    """Raise ValueError for what is no text of one line without control characters."""
    if not isinstance(text, str) or _CONTROLS.search(text):
        raise ValueError(f"{field} is one line of text without control characters, got {text!r:.60}: rename it.")


def one_line(text: str) -> str:
    r"""The text with control characters written out, as `\x1b` for an escape and `\n` for a new line."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown_name(name: str | os.PathLike[str]) -> str:
    """The name by which results call a model or an adapter: a hub name as it is, the last folder of a path.

    The rest of a path says where its owner keeps things, and results are shared. A snapshot in the Hugging Face cache
    has the name that it has on the hub.
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
