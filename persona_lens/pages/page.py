"""The frame of all pages: one file of HTML, its look on a light ground or a dark one, and how foreign text is written.

A page loads nothing, and runs no script but those that it was made with: its policy names their hashes, so that nothing
of the text can run, should it ever get through the escaping.
Knows nothing about what is shown.

The parts that pages are made of: facts, tables, pictures that a script draws, and texts, cut where they are long.

Everything that is handed in as text is foreign, and escaped.
Knows nothing about what the parts say.
"""

import base64
import hashlib
import html
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from persona_lens.plots.style import graph_objects

FRAME = """<!DOCTYPE html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{heading}</h1>
{body}
{scripts}
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --card: #fafafa; --ink: #222; --grey: #6b6b6b; --line: #dcdcdc; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171a; --card: #1c1f23; --ink: #ececec; --grey: #a2a2a2; --line: #383c42; }
}
body { background: var(--ground); color: var(--ink); max-width: 880px; margin: 2rem auto; padding: 0 1.2rem;
  font: 15px/1.5 "Open Sans", Helvetica, Arial, sans-serif; -webkit-print-color-adjust: exact;
  print-color-adjust: exact; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: .8rem; font-weight: 600; letter-spacing: .03em; color: var(--grey); margin: 0 0 .5rem; }
.note { color: var(--grey); margin: 0 0 .4rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  margin: 0 0 .8rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 16px; line-height: 1.85; }
.sign { font-style: normal; font-size: .75em; opacity: .6; }
"""

_UNSEEN = {"\n": ("↵", "\n"), "\t": ("⇥", "\t")}


def html_page(title: str, body: str, *, style: str = "", scripts: Sequence[str] = ()) -> str:
    """A page with a title, a body of HTML, further style rules, and scripts that run after the body."""
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    # A picture that a script draws is saved by way of a data or blob address.
    drawing = f"; script-src {hashes}; img-src data: blob:" if scripts else ""
    return FRAME.format(
        policy=f"default-src 'none'; style-src 'unsafe-inline'{drawing}",
        title=escaped(title),
        heading=visible(title, breaks=False),
        style=STYLE + style,
        body=body,
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def escaped(text: str) -> str:
    """Text for an element or an attribute; what UTF-8 cannot write becomes a question mark."""
    return html.escape(text.encode("utf-8", "replace").decode())


def visible(text: str, *, breaks: bool = True) -> str:
    """The text as HTML, with a sign for every character that cannot be seen or would turn the text around.

    Line breaks and tabs are themselves, after a sign of their own where `breaks`.
    """
    shown = []
    for character in text:
        if character in _UNSEEN:
            sign, itself = _UNSEEN[character]
            shown.append(f'<i class="sign">{sign}</i>{itself}' if breaks else itself)
        elif unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}:
            shown.append(f'<i class="sign">U+{ord(character):04X}</i>')
        else:
            shown.append(html.escape(character))
    return "".join(shown)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


LONGEST, LONGEST_NAME = 700, 120

PARTS_STYLE = """
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
