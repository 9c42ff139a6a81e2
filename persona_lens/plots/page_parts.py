"""The parts that pages are made of: facts, tables, pictures that a script draws, and texts, cut where they are long.

Everything that is handed in as text is foreign, and escaped.
Knows nothing about what the parts say.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from persona_lens.plots.page import escaped, visible
from persona_lens.plots.style import graph_objects

LONGEST, LONGEST_NAME = 700, 120

STYLE = """
body { max-width: 1080px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt { color: var(--grey); }
dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin-bottom: .6rem; }
th { color: var(--grey); font-size: .85rem; font-weight: 600; text-align: right; vertical-align: bottom; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); }
td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { font-weight: 600; white-space: normal; overflow-wrap: anywhere; }
.box { overflow-x: auto; border-radius: 6px; }
.picture { background: #fff; border-radius: 6px; overflow: hidden; }
.sample header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem .9rem; color: var(--grey);
  font-size: .9rem; margin-bottom: .4rem; }
.sample header span { overflow-wrap: anywhere; }
.sample strong { color: var(--ink); font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.sample b { color: var(--ink); border: 1px solid var(--line); border-radius: 99px; padding: 0 .6rem;
  font-weight: 600; font-size: .8rem; }
.sample b.over { border-color: #d55e00; }
.sample .text { font-size: 15px; line-height: 1.5; }
.both { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 1.6rem; }
h3 { font-size: .75rem; font-weight: 600; color: var(--grey); margin: .5rem 0 .1rem; }
.cut { color: var(--grey); white-space: nowrap; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 820px) {
  body { margin: 1rem auto; padding: 0 .7rem; }
  dl { display: block; }
  dd { margin-bottom: .4rem; }
}
"""

DRAW = """
(function () {{
  var figure = {figure};
  Plotly.newPlot(document.getElementById("{place}"), figure.data, figure.layout,
    {{ responsive: true, displaylogo: false, displayModeBar: false }});
}})();
"""


class Picture(NamedTuple):
    """An element, and the script that draws into it once plotly's own has run."""

    element: str
    script: str


def picture_of(figure: Any, place: str, label: str, *, least: int = 0) -> Picture:
    """A figure as wide as its page, which has the title, or `least` pixels; then it scrolls in a box of its own.

    `place` is an id of its own, `label` says what cannot be seen.
    """
    figure.update_layout(title=None, width=None, autosize=True)
    # In JSON "<" stands in strings alone; written so, it cannot end the script.
    drawn = json.dumps(json.loads(figure.to_json())).replace("<", "\\u003c")
    height = figure.layout.height
    size = f"height:{height}px" + f";min-width:{least}px" * bool(least)
    element = f'<div class=picture id={place} role=img aria-label="{escaped(label)}" style="{size}"></div>'
    return Picture(f"<div class=box>{element}</div>", DRAW.format(figure=drawn, place=place))


def drawing_scripts(pictures: Sequence[Picture]) -> list[str]:
    """What a page with these pictures runs: plotly and a script for each, nothing where there are none."""
    if not pictures:
        return []
    graph_objects()
    from plotly.offline import get_plotlyjs

    return [get_plotlyjs(), *(picture.script for picture in pictures)]


def facts_html(facts: Mapping[str, str]) -> str:
    """Names with what they are."""
    return (
        "<dl>" + "".join(f"<dt>{escaped(name)}</dt><dd>{visible(fact)}</dd>" for name, fact in facts.items()) + "</dl>"
    )


def table_html(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; every cell also carries the name of its column, for a page too narrow for columns."""
    lines = [
        "".join(f'<td data-name="{escaped(head)}">{visible(cell)}</td>' for head, cell in zip(heads, row, strict=True))
        for row in rows
    ]
    head = "".join(f"<th>{escaped(each)}</th>" for each in heads)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def text_part(name: str, text: str) -> str:
    """A text under its name."""
    return f"<div><h3>{escaped(name)}</h3><div class=text>{cut_text(text, LONGEST)}</div></div>"


def cut_text(text: str, longest: int) -> str:
    """Foreign text as HTML, as far as it is shown, with the number of characters that are not."""
    left = len(text) - longest
    rest = f" <span class=cut>… {left:,} more character{'s' * (left > 1)}</span>" if left > 0 else ""
    return visible(text[:longest], breaks=False) + rest
