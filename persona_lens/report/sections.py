"""What the page's parts are made of: a heading, some HTML, and the pictures that scripts draw into it.

Knows nothing about runs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from persona_lens.plots.page import escaped, visible
from persona_lens.plots.page_parts import Picture, picture_of, table_html


class Section(NamedTuple):
    """A part of the page."""

    heading: str
    html: str
    pictures: tuple[Picture, ...] = ()


def figure(make: Callable[[], Any], place: str, *, label: str, caption: str, height: int, least: int = 0) -> Section:
    """A picture with its caption, the legend in the room above it; where there is nothing to draw, the reason.

    `height` is that of the axes, without what stands around them, `least` the width below which it scrolls.
    """
    try:
        drawn = make()
    except ValueError as error:
        return Section("", f"<p class=note>{visible(str(error))}</p>")
    above = 14 if drawn.layout.showlegend is False else 46
    margin = {"t": above, "b": 58, "l": 62, "r": 14}
    drawn.update_layout(height=height + above + 64, margin=margin, hovermode="closest")
    drawn.update_layout(dragmode=False, font_size=12.5, legend_font_size=12.5)
    # A finger that drags over a picture scrolls the page.
    drawn.update_xaxes(fixedrange=True, title_font_size=13)
    drawn.update_yaxes(fixedrange=True, title_font_size=13)
    picture = picture_of(drawn, place, label, least=least)
    return Section("", f"<figure>{picture.element}<figcaption>{caption}</figcaption></figure>", (picture,))


def boxed_table(name: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in a box of its own, which scrolls where the page is too narrow or the table too long."""
    label = f'tabindex=0 role=region aria-label="{escaped(name)}"'
    return f"<div class=scroll {label}>{table_html(heads, rows)}</div>"


def details(summary: str, html: str) -> str:
    """What few readers want, closed until it is asked for."""
    return f"<details><summary>{escaped(summary)}</summary>{html}</details>"


def note(text: str) -> str:
    """A paragraph beside the results."""
    return f"<p class=note>{visible(text, breaks=False)}</p>"


def absent(what: str, file: str, maker: str) -> str:
    """That something is not in the folder, and what makes it."""
    return (
        f"<p class=absent>{escaped(what)}: the folder has no <code>{escaped(file)}</code>, which "
        f"<code>{escaped(maker)}</code> writes.</p>"
    )
