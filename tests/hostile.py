"""Files that somebody else has changed: what they hold replaced, taken away or cut, in ways drawn at random.

Knows nothing about what the files are.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

NUMBERS = [0, -1, 7, 1.5, -0.0, 1e308, 10**9, 2**63, 10**40, float("nan"), float("inf")]
TEXTS = ["", " ", "evil", "\0", "../../etc/passwd", "/etc/passwd", "\ud800", "\u202egnp.exe", "e\u0301", "con", "-rf"]
TEXTS += [
    "x" * 10_000,
    "[red]",
    "[/]",
    "\x1b]0;title\x07",
    "<script>alert(1)</script>",
    "{question}",
    "{{ 7 * 7 }}",
    "\n",
    "(([a-z_.0-9])+)+!",
    "evil\x1b[31m\n---\nlicense: other",
]
NESTED = [[], {}, [[]], [None], [[[[[[]]]]]], {"a": {"b": []}}, ["a", 1], [1e308, -1e308], {"role": "user"}]
VALUES: list[Any] = [None, True, False, *NUMBERS, *TEXTS, *NESTED, [{"role": ["user"], "content": {}}]]
BYTES = [
    b"\0",
    b"\xff",
    b"\n",
    b"{",
    b"[" * 3000,
    b'"',
    b"\xed\xa0\x80",
    b",",
    b"1e999",
    b"-",
    b"\xef\xbb\xbf",
    b"9" * 5000,
]


class Reader(NamedTuple):
    """What reads a kind of file, and what a whole one holds.

    Attributes:
        name: The file's name.
        contents: A whole file.
        read: Reads the file at a path, and uses what it found as a caller would.
        structured: Whether it is JSON, or lines of it, whose values can be replaced.
    """

    name: str
    contents: bytes
    read: Callable[[Path], Any]
    structured: bool = True


def hostile(draw: random.Random, reader: Reader) -> bytes:
    """The file with one to three changes."""
    contents = reader.contents
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if reader.structured and draw.random() < 0.75:
            contents = changed_value(draw, contents)
        else:
            contents = changed_bytes(draw, contents)
    return contents


def changed_value(draw: random.Random, contents: bytes) -> bytes:
    """One value of a JSON file, or of a line, replaced or taken away; the bytes changed where it is JSON no more."""
    lines = contents.splitlines() if contents.count(b"\n") > 1 and _is_json(contents.splitlines()[0]) else [contents]
    number = draw.randrange(len(lines)) if lines else 0
    try:
        found = json.loads(lines[number])
    except (ValueError, IndexError, RecursionError):
        return changed_bytes(draw, contents)
    places = list(_places(found, []))
    lines[number] = json.dumps(_replaced(draw, found, draw.choice(places))).encode()
    return b"\n".join(lines) + b"\n" * (len(lines) > 1)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _places(value: Any, place: list[Any]) -> Iterator[list[Any]]:
    yield place
    for key, each in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from _places(each, [*place, key])


def _replaced(draw: random.Random, value: Any, place: list[Any]) -> Any:
    if not place:
        return draw.choice(VALUES)
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    how = draw.random()
    if how < 0.2:
        del parent[place[-1]]
    elif how < 0.3 and isinstance(parent, dict):
        parent[str(draw.choice(VALUES))[:50]] = parent.pop(place[-1])
    else:
        parent[place[-1]] = draw.choice(VALUES)
    return value


def changed_bytes(draw: random.Random, contents: bytes) -> bytes:
    """Bytes cut off, flipped, put in or taken out."""
    at = draw.randrange(len(contents) + 1)
    match draw.randrange(5):
        case 0:
            return contents[:at]
        case 1:
            return contents[:at] + draw.choice(BYTES) + contents[at:]
        case 2:
            return contents[:at] + contents[at + draw.randrange(1, 40) :]
        case 3:
            return contents[:at] + draw.randbytes(draw.randrange(1, 9)) + contents[at + 8 :]
        case _:
            return contents[:at] + bytes([draw.randrange(256)]) + contents[at + 1 :]
