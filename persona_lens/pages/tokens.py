"""A text whose every token is coloured by its projection, as one page of HTML that needs nothing from outside.

Colours diverge from a neutral value, blue below and vermilion above, and grow with the distance, on a light ground or a
dark one. The text is a model's: every piece of it is escaped. A page runs no script at all: radio buttons and the style
sheet switch between vectors.
"""

import html
import re
from collections.abc import Sequence
from math import isnan
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from persona_lens.monitoring.result import Monitoring
from persona_lens.monitoring.thresholds import Threshold
from persona_lens.pages.page import render, visible
from persona_lens.plots.style import number

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
    """The scale of one vector: its name, the value without colour, how far from it full colour is, and a threshold."""

    name: str
    neutral: float
    reach: float
    threshold: float | None

    def at(self, side: float) -> str:
        """The value at a place of the scale, from -1 to 1."""
        return number(self.neutral + side * self.reach)

    @property
    def threshold_text(self) -> str:
        """The threshold as a number."""
        return number(self.threshold)

    @property
    def mark(self) -> float:
        """Where the threshold is on the bar, from 0 to 1; outside of these where it is not on it."""
        return -1.0 if self.threshold is None else (self.threshold - self.neutral + self.reach) / (2 * self.reach)


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
    """One page of HTML that shows a text token by token; the caller writes it.

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
    tokens = [_token(piece, row, scales) for piece, row in zip(pieces, values, strict=True)]
    rules = "\n".join(_rules(index) for index in range(n_vectors))
    parts = _parts(tokens, turns)
    return render("tokens.html", title, "tokens", rules=rules, notes=notes, scales=scales, parts=parts)


def _rules(index: int) -> str:
    """The rules that hold while a vector's radio button is checked: its colours, its marks, its legend."""
    checked = f".tokens #v{index}:checked ~"
    return f"""{checked} main .t {{ background: var(--c{index}); }}
{checked} main .o{index} {{ text-decoration: underline 2px; text-underline-offset: 4px; }}
{checked} .legends #l{index} {{ display: flex; }}"""


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
    projected = monitoring.chats[chat]
    kept = [turn.tokens for turn in projected.turns if turn.tokens is not None]
    if len(kept) < len(projected.turns) or not kept:
        raise ValueError(f"{projected.name}: its tokens were not kept: monitor it with tokens=True.")
    limits: list[Threshold | None] = [None] * len(monitoring.vectors)
    for threshold in thresholds:
        matches = [i for i, vector in enumerate(monitoring.vectors) if vector.fingerprint == threshold.fingerprint]
        if not matches or threshold.of != "token":
            raise ValueError(f"A page of tokens takes thresholds of tokens for its own vectors, got {threshold}.")
        limits[matches[0]] = threshold
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
        title=title or projected.name,
        names=[f"{vector.trait}, layer {vector.layer}" for vector in monitoring.vectors],
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
    finite = [column[np.isfinite(column)] for column in values.T]
    return [float(np.median(column)) if len(column) else 0.0 for column in finite]


def _for_each(numbers: Any, n_vectors: int) -> list[Any]:
    """A number for each vector; a single one serves all of them."""
    if not isinstance(numbers, Sequence):
        return [numbers] * n_vectors
    if len(numbers) != n_vectors:
        raise ValueError(f"Expected one number, or one for each of {n_vectors} vectors, got {len(numbers)}.")
    return list(numbers)


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
    hover = html.escape("\n".join(numbers)).replace("\n", "&#10;")
    return f'<span class="{classes}" style="{";".join(colours)}" title="{hover}">{visible(piece) or EMPTY}</span>'


def _parts(tokens: Sequence[str], turns: Sequence[tuple[int, str]]) -> list[tuple[str, str]]:
    """The tokens with the headings of their parts; before the first heading, an empty one."""
    starts = [start for start, _ in turns]
    if starts != sorted(set(starts)) or (starts and not 0 <= starts[0] <= starts[-1] < len(tokens)):
        raise ValueError(f"Turns begin at ascending places from 0 to {len(tokens) - 1}, got {starts}.")
    headed = [(0, ""), *turns] if not starts or starts[0] > 0 else list(turns)
    ends = [start for start, _ in headed[1:]] + [len(tokens)]
    return [(heading, Markup("".join(tokens[start:end]))) for (start, heading), end in zip(headed, ends, strict=True)]
