"""The page around coloured tokens: its body and its style sheet, which switches vectors without any script.

A radio button that is checked makes the rules of its vector hold for the elements after it.
Knows nothing about tokens' numbers.

A text whose every token is coloured by its projection, as one page of HTML that needs nothing from outside.

Colours diverge from a neutral value, one for each side, and grow as they leave it, on a light ground or a dark one.
The text is a model's: every piece of it is escaped, and a page runs no script at all.
"""

import re
from collections.abc import Sequence
from math import isnan
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from persona_lens.monitoring.result import Monitoring
from persona_lens.monitoring.thresholds import Threshold
from persona_lens.pages.page import escaped, html_page, visible
from persona_lens.plots.style import number

BODY = """{notes}
{switch}
<div class=legends>{legends}</div>
<main>
{text}
</main>"""

TOKENS_STYLE = """
input[name=vector] { position: absolute; opacity: 0; }
label { display: inline-block; margin: .3rem .4rem .3rem 0; padding: .15rem .8rem; border: 1px solid var(--line);
  border-radius: 99px; cursor: pointer; color: var(--grey); }
label[hidden] { display: none; }
input:checked + label { background: var(--ink); border-color: var(--ink); color: var(--ground); }
input:focus-visible + label { outline: 2px solid #56b4e9; outline-offset: 2px; }
.legends { position: sticky; top: 0; background: var(--ground); padding: .6rem 0; border-bottom: 1px solid var(--line);
  margin-bottom: 1rem; }
.legend { display: none; align-items: flex-start; gap: .3rem 1.5rem; flex-wrap: wrap; font-size: .85rem; }
.name { font-weight: 600; }
.scale { width: 300px; }
.bar { position: relative; display: block; height: .9rem; border-radius: 3px; margin-top: .2rem;
  background: linear-gradient(90deg, #0072b2b8, #0072b200 50%, #d55e0000 50%, #d55e00b8);
  box-shadow: inset 0 0 0 1px var(--line); }
.mark { position: absolute; top: -3px; bottom: -3px; width: 2px; margin-left: -1px; background: var(--ink); }
.ticks { display: flex; justify-content: space-between; color: var(--grey); font-variant-numeric: tabular-nums; }
.key { color: var(--grey); }
.key u { text-decoration: underline 2px; text-underline-offset: 4px; }
.t { unicode-bidi: isolate; border-radius: 3px; padding: .12em 0; }
.t:hover { outline: 1.5px solid var(--ink); }
.special { font: .75em ui-monospace, Menlo, Consolas, monospace; }
"""


def vector_rules(n_vectors: int) -> str:
    """The rules that hold while a vector's radio button is checked: its colours, its marks, its legend."""
    rules = []
    for place in range(n_vectors):
        checked = f"#v{place}:checked ~"
        rules += [
            f"{checked} main .t {{ background: var(--c{place}); }}",
            f"{checked} main .o{place} {{ text-decoration: underline 2px; text-underline-offset: 4px; }}",
            f"{checked} .legends #l{place} {{ display: flex; }}",
        ]
    return "\n".join(rules) + "\n"


# Okabe and Ito's blue and vermilion, as far as ink on them stays legible.
BELOW, ABOVE, STRONGEST = (0, 114, 178), (213, 94, 0), 0.72
# A few tokens, the first of a chat above all, project far beyond the rest: the scale ends where these begin.
FULL_COLOUR_PERCENTILE = 98.0

Values = (
    Sequence[float | None]
    | Sequence[Sequence[float | None]]
    | Float[np.ndarray, " token"]
    | Float[np.ndarray, "token vector"]
    | Float[Tensor, " token"]
    | Float[Tensor, "token vector"]
)
Neutral = float | Sequence[float] | Literal["median"]
EMPTY = '<i class="sign">⋯</i>'
_SPECIAL = re.compile(r"<\|.+\|>|</?s>|<(bos|eos|pad|start_of_turn|end_of_turn)>")


class _Scale(NamedTuple):
    """One vector's: its name, the value without colour, how far from it full colour is, and its threshold."""

    name: str
    neutral: float
    reach: float
    threshold: float | None


def tokens_html(
    pieces: Sequence[str],
    projections: Values,
    *,
    title: str,
    names: Sequence[str] = (),
    threshold: float | Threshold | Sequence[float | Threshold | None] | None = None,
    neutral: Neutral = 0.0,
    turns: Sequence[tuple[int, str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """One page of HTML that shows a text token by token; the caller writes it (`records.write_whole`).

    `pieces` are the tokens' texts; `projections` has a row for each, with a number, or one for each of several vectors
    (called `names`), between which the page switches. Colour is the distance from `neutral` (a number, one for each
    vector, or their own medians), blue below and vermilion above, full at the 98th percentile of all distances; tokens
    above `threshold` are underlined, and hovering shows the numbers. None or NaN leaves a token without colour. `turns`
    are the places of the first tokens of the chat's parts with their headings, in order; `notes` stand under the title.
    The page loads nothing and runs no script.
    Raises ValueError where pieces and projections, or vectors and their names, differ in number.
    """
    values = _matrix(projections)
    if len(pieces) != len(values):
        raise ValueError(f"Every piece needs its projections: got {len(pieces)} pieces and {len(values)} rows.")
    if not len(pieces):
        raise ValueError("There is no token to show.")
    n_vectors = values.shape[1]
    names = names or ["projection", *(f"projection {place + 1}" for place in range(1, n_vectors))]
    if len(names) != n_vectors:
        raise ValueError(f"Every vector needs a name: got {len(names)} names and {n_vectors} vectors.")
    limits, neutrals = _for_each(threshold, n_vectors), _neutrals(neutral, values)
    scales = [
        _Scale(name, middle, _reach(values[:, place] - middle), getattr(limit, "value", limit))
        for place, (name, middle, limit) in enumerate(zip(names, neutrals, limits, strict=True))
    ]
    shown = [_token(piece, row, scales) for piece, row in zip(pieces, values, strict=True)]
    body = BODY.format(
        notes="".join(f"<p class=note>{escaped(note)}</p>" for note in notes),
        switch=_switch(scales),
        legends="".join(_legend(place, scale, n_vectors == 1) for place, scale in enumerate(scales)),
        text=_parts(shown, turns),
    )
    return html_page(title, body, style=TOKENS_STYLE + vector_rules(n_vectors))


def monitoring_html(
    monitoring: Monitoring,
    chat: int = 0,
    *,
    title: str | None = None,
    thresholds: Sequence[Threshold] = (),
    neutral: Neutral = "median",
) -> str:
    """`tokens_html` of one chat that was monitored with `tokens=True`, every vector on a switch of its own.

    Each turn has a part for what the model was given and one for its response. The median token has no colour, because
    a projection of 0 need not be an ordinary one. `thresholds` are those of single tokens; each goes to the vector that
    it was calibrated with.
    Raises ValueError where the chat's tokens were not kept, or a threshold is not of tokens or of none of the vectors.
    """
    found = monitoring.chats[chat]
    kept = [turn.tokens for turn in found.turns if turn.tokens is not None]
    if len(kept) < len(found.turns) or not kept:
        raise ValueError(f"{found.name}: its tokens were not kept: monitor it with tokens=True.")
    limits: list[Threshold | None] = [None] * len(monitoring.vectors)
    for threshold in thresholds:
        places = [at for at, each in enumerate(monitoring.vectors) if each.fingerprint == threshold.fingerprint]
        if not places or threshold.of != "token":
            raise ValueError(f"A page of tokens takes thresholds of tokens for its own vectors, got {threshold}.")
        limits[places[0]] = threshold
    pieces: list[str] = []
    turns: list[tuple[int, str]] = []
    for index, tokens in enumerate(kept, start=1):
        turns.append((len(pieces), f"turn {index}, prompt"))
        if tokens.n_prompt < len(tokens.pieces):
            turns.append((len(pieces) + tokens.n_prompt, f"turn {index}, response"))
        pieces += tokens.pieces
    return tokens_html(
        pieces,
        np.concatenate([tokens.values.numpy() for tokens in kept]),
        title=title or found.name,
        names=[f"{each.trait}, layer {each.layer}" for each in monitoring.vectors],
        threshold=limits,
        neutral=neutral,
        turns=turns,
        notes=monitoring.interventions,
    )


def coloured_tokens(pieces: Sequence[str], values: Sequence[float], *, name: str, neutral: float, reach: float) -> str:
    """Tokens as elements of a page that has their style: full colour is `reach` away from `neutral`."""
    scale = _Scale(name, neutral, reach, None)
    return "".join(_token(piece, np.array([value]), [scale]) for piece, value in zip(pieces, values, strict=True))


def colour_scale(values: Sequence[float]) -> tuple[float, float]:
    """The median, which has no colour, and how far from it full colour is, for texts that share a scale."""
    neutral = float(np.median(values))
    return neutral, _reach(np.asarray(values) - neutral)


def _matrix(projections: Any) -> np.ndarray:
    if isinstance(projections, Tensor):
        projections = projections.detach().cpu().float().numpy()
    values = np.asarray(projections, dtype=float)
    if values.ndim not in (1, 2):
        raise ValueError(f"Projections are [token] or [token, vector], got {list(values.shape)}.")
    return values.reshape(len(values), -1) if values.size else values.reshape(0, 1)


def _neutrals(neutral: Neutral, values: np.ndarray) -> list[float]:
    if neutral != "median":
        return _for_each(neutral, values.shape[1])
    measured = [column[np.isfinite(column)] for column in values.T]
    return [float(np.median(each)) if len(each) else 0.0 for each in measured]


def _for_each(given: Any, n_vectors: int) -> list[Any]:
    """One for each vector, a single one for all of them."""
    if not isinstance(given, Sequence):
        return [given] * n_vectors
    if len(given) != n_vectors:
        raise ValueError(f"Expected one number, or one for each of {n_vectors} vectors, got {len(given)}.")
    return list(given)


def _reach(distances: np.ndarray) -> float:
    finite = np.abs(distances[np.isfinite(distances)])
    if not finite.any():
        return 1.0
    # Where nearly all tokens are neutral the percentile is too, and the farthest has the full colour.
    return float(np.percentile(finite, FULL_COLOUR_PERCENTILE)) or float(finite.max())


def _colour(value: float, scale: _Scale) -> str:
    """The colour over whatever ground the page has: its side's hue, as opaque as the value is far."""
    share = min(1.0, abs(value - scale.neutral) / scale.reach)
    red, green, blue = ABOVE if value > scale.neutral else BELOW
    return f"#{red:02x}{green:02x}{blue:02x}{round(255 * STRONGEST * share):02x}"


def _token(piece: str, row: np.ndarray, scales: Sequence[_Scale]) -> str:
    """One token's element: its text, a colour and a mark for each vector, and all numbers on hovering."""
    colours, marks, numbers = [], [], []
    for place, (value, scale) in enumerate(zip(row.tolist(), scales, strict=True)):
        missing = isnan(value)
        numbers.append(f"{scale.name}: {'not measured' if missing else number(value)}")
        if not missing:
            colours.append(f"--c{place}:{_colour(value, scale)}")
            marks += [f"o{place}"] if scale.threshold is not None and value > scale.threshold else []
    classes = " ".join(["t", *marks, *(["special"] if _SPECIAL.fullmatch(piece) else [])])
    hover = escaped("\n".join(numbers)).replace("\n", "&#10;")
    return f'<span class="{classes}" style="{";".join(colours)}" title="{hover}">{visible(piece) or EMPTY}</span>'


def _parts(shown: Sequence[str], turns: Sequence[tuple[int, str]]) -> str:
    """The tokens under the headings of their parts; before the first heading, under none."""
    places = [place for place, _ in turns]
    if places != sorted(set(places)) or (places and not 0 <= places[0] <= places[-1] < len(shown)):
        raise ValueError(f"Turns begin at ascending places from 0 to {len(shown) - 1}, got {places}.")
    starts = [(0, ""), *turns] if not places or places[0] > 0 else list(turns)
    ends = [place for place, _ in starts[1:]] + [len(shown)]
    parts = []
    for (start, heading), end in zip(starts, ends, strict=True):
        head = f"<h2>{escaped(heading)}</h2>" if heading else ""
        parts.append(f"<section>{head}<div class=text>{''.join(shown[start:end])}</div></section>")
    return "\n".join(parts)


def _switch(scales: Sequence[_Scale]) -> str:
    """Radio buttons, which the style sheet reads; a single vector needs none to be seen."""
    hidden = " hidden" if len(scales) == 1 else ""
    return "".join(
        f"<input type=radio name=vector id=v{place}{' checked' if place == 0 else ''}>"
        f"<label for=v{place}{hidden}>{escaped(scale.name)}</label>"
        for place, scale in enumerate(scales)
    )


def _legend(place: int, scale: _Scale, alone: bool) -> str:
    """The bar of colours with its ends and middle; the threshold is a line on it, or a number where it is outside."""
    low, middle, high = (number(scale.neutral + side * scale.reach) for side in (-1, 0, 1))
    mark, words = "", ""
    if scale.threshold is not None:
        words = f"<span class=key><u>underlined</u>: above the threshold {number(scale.threshold)}</span>"
        at = (scale.threshold - scale.neutral + scale.reach) / (2 * scale.reach)
        mark = f'<b class=mark style="left:{100 * at:.1f}%"></b>' if 0 <= at <= 1 else ""
    name = f"<span class=name>{escaped(scale.name)}</span>" if alone else ""
    bar = f"<span class=bar>{mark}</span>"
    ticks = f"<span class=ticks><span>≤ {low}</span><span>{middle}</span><span>≥ {high}</span></span>"
    return f"<div class=legend id=l{place}>{name}<span class=scale>{bar}{ticks}</span>{words}</div>"
