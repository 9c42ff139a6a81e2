"""The look of a report, beyond that of all pages.

Knows nothing about a run's numbers.

What the page's parts are made of: a heading, some HTML, and the pictures that scripts draw into it.

Knows nothing about runs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from persona_lens.pages.page import Picture, escaped, picture_of, table_html, visible

REPORT_STYLE = """
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; margin: .4rem 0 .5rem; }
.lead { font-size: 1.1rem; margin: 0 0 .3rem; max-width: 46rem; }
h2 { font-size: 1.15rem; letter-spacing: 0; color: var(--ink); margin: .1rem 0 .7rem; }
section { padding: 1.1rem 1.3rem 1.2rem; margin: 0 0 1.1rem; border-radius: 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem;
  margin: 1.1rem 0 .9rem; }
.tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; }
.tiles > .main { border-color: #0072b2; box-shadow: inset 0 3px 0 #0072b2; }
.tiles dt { font-size: .8rem; }
.tiles dd { font-size: 1.35rem; font-weight: 650; line-height: 1.3; margin: .1rem 0;
  font-variant-numeric: tabular-nums; }
.tiles .about { font-size: .8rem; font-weight: 400; color: var(--grey); }
.reason { margin: 0 0 1.3rem; max-width: 60rem; overflow-wrap: anywhere; }
figure { margin: 0 0 .9rem; }
figcaption { color: var(--grey); font-size: .88rem; margin: .4rem 0 0; max-width: 60rem; }
figcaption b { color: var(--ink); }
.scroll { overflow: auto; max-height: 27rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--ground); }
.scroll + .note, .files + .absent { margin-top: .7rem; }
.scroll:focus-visible { outline: 2px solid #56b4e9; outline-offset: 1px; }
.scroll table { margin: 0; font-size: .88rem; }
.scroll thead th { position: sticky; top: 0; background: var(--ground); box-shadow: inset 0 -1px 0 var(--line); }
.scroll th, .scroll td { padding: .28rem .8rem; }
.scroll th:first-child, .scroll td:first-child { padding-left: .8rem; white-space: nowrap; }
.scroll tr:last-child td { border-bottom: 0; }
.files { margin-top: .9rem; }
.files td:last-child, .files th:last-child { text-align: left; width: 99%; }
details { margin-top: .6rem; }
summary { cursor: pointer; color: var(--grey); }
summary:focus-visible { outline: 2px solid #56b4e9; outline-offset: 2px; }
details .note { margin: .4rem 0; }
.note, .absent { overflow-wrap: anywhere; }
.absent { color: var(--grey); border-left: 3px solid var(--line); padding-left: .8rem; margin: .3rem 0; }
.sample { border-top: 1px solid var(--line); padding: .8rem 0 .3rem; margin: .3rem 0 0; }
.question { font-size: .98rem; color: var(--ink); margin: 0 0 .6rem; overflow-wrap: anywhere; }
.sample .question b { font-weight: 500; white-space: nowrap; margin-left: .3rem; }
.sample b.kept { border-color: #0072b2; }
.sample b.dropped { border-color: #d55e00; }
.doses { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)); gap: .9rem 1.4rem; }
.sample header { margin-bottom: .3rem; }
.sample header strong { font-size: .95rem; }
.sample .both { gap: .9rem 1.6rem; }
.sample .text { font-size: 14px; }
.text { unicode-bidi: plaintext; }
.t { background: var(--c0); border-radius: 3px; padding: .12em 0; unicode-bidi: isolate; }
.t:hover { outline: 1.5px solid var(--ink); }
.meter { display: block; height: 5px; border-radius: 3px; background: var(--line); overflow: hidden; }
.meter i { display: block; height: 100%; background: #0072b2; }
.scores { color: var(--grey); font-size: .8rem; font-variant-numeric: tabular-nums; margin: .2rem 0 .3rem; }
dl { font-size: .92rem; margin-bottom: .6rem; }
footer { color: var(--grey); font-size: .85rem; margin: 1rem 0 2rem; overflow-wrap: anywhere; }
@media (max-width: 820px) {
  h1 { font-size: 1.45rem; }
  section { padding: .9rem .8rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem; }
}
@media print { section, .sample, figure { break-inside: avoid; } .scroll { max-height: none; } }
"""


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
