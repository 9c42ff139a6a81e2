"""What commands print: results to standard output as a table or JSON, everything else to standard error."""

import io
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

# What steers a terminal, turns text around, or is no text: a model's words may hold any of it.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def say(text: str) -> None:
    """Print to standard error."""
    print(plain(text), file=sys.stderr, flush=True)


def tell(text: object) -> None:
    """Print a result to standard output."""
    print(plain(str(text)))


def tell_json(value: Any) -> None:
    """Print a result as one line of JSON to standard output, with JSON's own escapes for what it cannot encode."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(_CONTROLS.sub(lambda control: f"\\u{ord(control[0]):04x}", text))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a plain table; no cell is markup, whatever brackets stand in it."""
    _print_rich(head, rows, width=120, box=None, pad_edge=False)


def print_columns(texts: Mapping[str, str]) -> None:
    """Print texts side by side under their names."""
    _print_rich(list(texts), [list(texts.values())], width=160, show_lines=True, expand=True)


def _print_rich(head: Sequence[str], rows: Sequence[Sequence[str]], *, width: int, **style: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(**style)
    for name in head:
        table.add_column(Text(plain(name)))
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))  # a model's text is no markup
    Console(width=None if sys.stdout.isatty() else width).print(table)


def write_page(path: Path, figure: Any) -> None:
    """Write a plotly figure as a page that needs nothing else."""
    from persona_lens.storage.files import write_whole

    write_whole(path, figure.to_html(include_plotlyjs=True).encode())


def records(table: "DataFrame") -> list[dict[str, Any]]:
    """A table's rows as JSON values; a number that is undefined is null."""
    return json.loads(table.reset_index().to_json(orient="records") or "[]")


def number(value: float | None, form: str = ".3f", missing: str = "-") -> str:
    """A number as a cell, or `missing` where it is undefined."""
    return missing if value is None or math.isnan(value) else format(value, form)


def interval(value: float | None, low: float | None, high: float | None, form: str = ".3f") -> str:
    """A number with its interval, where it has one, as a cell."""
    ends = number(low, form, ""), number(high, form, "")
    return number(value, form) + (f" [{ends[0]}, {ends[1]}]" if all(ends) else "")


def plain(text: str) -> str:
    r"""The text with whatever would steer a terminal written out, as `\x1b` for an escape."""
    return _CONTROLS.sub(lambda control: control[0].encode("unicode_escape").decode(), text)


def escape_unencodable() -> None:
    r"""Let standard output and standard error write out what their encoding lacks, as `\u4e2d`, instead of raising.

    A console of Windows or of a C locale cannot show every text, and a command prints before all is written: an error
    there would lose the rest of its work.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a stream that somebody put there has its own rules
            stream.reconfigure(errors="backslashreplace")
