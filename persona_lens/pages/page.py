"""The frame of all pages: one HTML file from a Jinja2 template and one style sheet, with plotly figures drawn into it.

A page loads nothing, and runs no script but those it was made with: its policy names their hashes, so that nothing of a
foreign text can run, should it ever get through the escaping.
"""

import base64
import hashlib
import html
import json
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_lens.plots.style import graph_objects, number

if TYPE_CHECKING:
    from jinja2 import Environment

LONGEST, LONGEST_NAME = 700, 120
"""Characters of a text, and of a name, that are shown."""

_SIGNS = {"\n": "↵", "\t": "⇥"}
_DRAW = """
(function () {{
  var figure = {figure};
  Plotly.newPlot(document.getElementById("{id}"), figure.data, figure.layout,
    {{ responsive: true, displaylogo: false, displayModeBar: false }});
}})();
"""


class Picture(NamedTuple):
    """A figure that a script draws into an element of the page, or the reason why there is none.

    Attributes:
        id: The element's id.
        label: What the figure shows, for whoever cannot see it.
        size: The element's size, as CSS.
        script: Draws it, once plotly's own script has run.
        reason: Why there is nothing to draw; empty where there is.
    """

    id: str
    label: str
    size: str = ""
    script: str = ""
    reason: str = ""


def picture_of(figure: Any, id: str, label: str, *, min_width: int = 0) -> Picture:
    """A figure as wide as its page, or at least `min_width` pixels; then it scrolls in a box of its own."""
    figure.update_layout(title=None, width=None, autosize=True)
    # In JSON, "<" only occurs in strings; written as an escape it cannot end the script.
    data = json.dumps(json.loads(figure.to_json())).replace("<", "\\u003c")
    size = f"height:{figure.layout.height}px" + f";min-width:{min_width}px" * bool(min_width)
    return Picture(id, label, size, _DRAW.format(figure=data, id=id))


def draw(make: Callable[[], Any], id: str, label: str, *, height: int, min_width: int = 0) -> Picture:
    """The picture of a figure that `make` gives, or the reason why it raised ValueError.

    `height` is that of the axes in pixels, without title, legend and ticks.
    """
    try:
        figure = make()
    except ValueError as error:
        return Picture(id, label, reason=str(error))
    above = 14 if figure.layout.showlegend is False else 46
    margin = {"t": above, "b": 58, "l": 62, "r": 14}
    figure.update_layout(height=height + above + 64, margin=margin, hovermode="closest")
    figure.update_layout(dragmode=False, font_size=12.5, legend_font_size=12.5)
    # A finger that drags over a picture scrolls the page.
    figure.update_xaxes(fixedrange=True, title_font_size=13)
    figure.update_yaxes(fixedrange=True, title_font_size=13)
    return picture_of(figure, id, label, min_width=min_width)


def render(
    template: str, title: str, kind: str, *, pictures: Sequence[Picture] = (), rules: str = "", **values: Any
) -> str:
    """A page from a template of this package; `kind` is the class of its body, `rules` are further CSS.

    Raises ImportError without plotly where the page has pictures.
    """
    from markupsafe import Markup

    scripts = page_scripts(pictures)
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    # A picture that a script draws is saved by way of a data or blob address.
    drawing = f"; script-src {hashes}; img-src data: blob:" if scripts else ""
    page = (
        _environment()
        .get_template(template)
        .render(
            title=title,
            kind=kind,
            policy=Markup(f"default-src 'none'; style-src 'unsafe-inline'{drawing}"),
            scripts=[Markup(script) for script in scripts],
            rules=Markup(rules),
            pictures=pictures,
            **values,
        )
    )
    return page.encode("utf-8", "replace").decode()  # what UTF-8 cannot write becomes a question mark


def page_scripts(pictures: Sequence[Picture]) -> list[str]:
    """What a page with these pictures runs: plotly and a script for each; nothing where none is drawn."""
    drawn = [picture.script for picture in pictures if not picture.reason]
    return [_plotly(), *drawn] if drawn else []


def visible(text: str, breaks: bool = True) -> str:
    """The text as HTML, with a sign for every character that cannot be seen or would turn the text around.

    Line breaks and tabs are themselves, after a sign of their own where `breaks`.
    """
    from markupsafe import Markup

    shown = []
    for character in text:
        if character in _SIGNS:
            shown.append(f'<i class="sign">{_SIGNS[character]}</i>{character}' if breaks else character)
        elif unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}:
            shown.append(f'<i class="sign">U+{ord(character):04X}</i>')
        else:
            shown.append(html.escape(character))
    return Markup("".join(shown))


def cut(text: str, longest: int = 0) -> str:
    """The first `longest` (by default `LONGEST`) characters as HTML, with the number of those that are left out."""
    from markupsafe import Markup

    longest = longest or LONGEST
    left = len(text) - longest
    rest = f" <span class=cut>… {left:,} more character{'s' * (left > 1)}</span>" if left > 0 else ""
    return Markup(visible(text[:longest], breaks=False) + Markup(rest))


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("persona_lens.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=visible, cut=cut, whole=lambda value: number(value, 0))
    return environment


def _plotly() -> str:
    graph_objects()
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
