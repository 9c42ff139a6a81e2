"""The picture of a screening: how the samples' scores of each data set are spread, and the mean with its interval.

Samples and data sets are scored as in arXiv:2507.21509, section 6. A figure holds quantiles of a large data set, never
all of it, so its size does not grow with the data.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from persona_lens.monitoring.thresholds import Threshold
from persona_lens.plots.style import (
    BLUE,
    DASHED,
    GREY,
    INK,
    PALE_BLUE,
    VERMILION,
    in_words,
    number,
    safe,
    styled_figure,
    whiskers,
)
from persona_lens.screening.result import Screening
from persona_lens.statistics import Estimate

if TYPE_CHECKING:
    import plotly.graph_objects

    from persona_lens.screening.result import By

# Of more samples than this a cloud of points says no more than its outline.
MOST_POINTS = 100
MOST_NUMBERS, QUANTILES = 2000, 1001
# An outline of fewer is the look of the kernel, not of the data.
LEAST_FOR_OUTLINE = 10
ROW_PIXELS, LOOSE_ROW_PIXELS = 66, 84
FORMS = {
    "difference": "projection difference to the base model’s response",
    "proxy": "projection difference to the last prompt token",
    "response": "projection of the response",
}


class _Row(NamedTuple):
    """A data set: its place upward, its scores, where its samples stand, and its mean."""

    place: int
    name: str
    scores: np.ndarray
    points: list[str]
    missing: int
    mean: Estimate


def plot_screening(
    found: Screening, vector: str | None = None, *, by: "By | None" = None, threshold: float | Threshold | None = None
) -> "plotly.graph_objects.Figure":
    """Distribution of the samples' scores (across) on one vector: a row for each data set, downward in their order.

    The outline is a kernel density over the samples, or over 1,001 quantiles of more than 2,000; samples are points
    where a set has at most 100. The diamond with whiskers is the set's mean with its 95 % interval over prompts, as in
    `Screening.dataset_scores`; the dashed line is `threshold`. A sample without a score is not drawn, and counted on
    hovering. Every row's outline is equally high. Source of the scores: arXiv:2507.21509, section 6.
    Raises ValueError where no sample has a score, there is no such vector or score, or the threshold is another's.
    """
    name, by = found.vector(vector), found.by if by is None else by
    limit = threshold_value(found, name, by, threshold)
    rows = _rows(found, name, by)
    if not any(len(row.scores) for row in rows):
        raise ValueError(f"No sample has a score on {name} (by={by!r}): there is nothing to draw; choose another `by`.")
    notes = ["diamonds with whiskers: means with 95 % intervals over prompts"]
    notes += [f"dashed: threshold {number(limit)}"] * (limit is not None)
    figure = styled_figure(f"{safe(name, 40)}: scores of the samples by data set", notes, legend_rows=0)
    for row in rows:
        _add_spread(figure, row)
    _add_means(figure, rows)
    if limit is not None:
        top = {"x0": limit, "x1": limit, "y0": -0.3, "y1": len(rows) - 0.25, "line": DASHED}
        figure.add_shape(type="line", layer="above", opacity=1, **top)
    _add_names(figure, rows)
    height = len(rows) * (LOOSE_ROW_PIXELS if len(rows) <= 8 else ROW_PIXELS)
    margin = figure.layout.margin
    figure.update_layout(
        height=margin.t + height + margin.b, margin_l=30, showlegend=False, hovermode="closest", violinmode="overlay"
    )
    figure.update_layout(title_y=1 - 15 / figure.layout.height)
    figure.update_xaxes(title_text=f"score: {FORMS[by]}", range=_ends(rows, limit), zerolinecolor=GREY, zeroline=True)
    figure.update_yaxes(range=[-0.3, len(rows) - 0.25], visible=False, fixedrange=True)
    return figure


def threshold_value(found: Screening, vector: str, by: str, threshold: float | Threshold | None) -> float | None:
    """The number of a threshold; raises ValueError where it was calibrated with another vector or form of score."""
    if not isinstance(threshold, Threshold):
        return threshold
    own = found.settings["fingerprints"][found.vectors.index(vector)]
    if threshold.fingerprint != own or threshold.of != by:
        raise ValueError(
            f"Expected a threshold of {vector} ({own}), {by}, got that of {threshold} ({threshold.fingerprint}): "
            "make it with `Screening.threshold` of this vector and this `by`."
        )
    return threshold.value


def _rows(found: Screening, vector: str, by: "By") -> list[_Row]:
    """The data sets, the first one at the highest place."""
    table: Any = found.rows
    scores: Any = found.score(vector, by)
    rows = []
    for place, name in enumerate(reversed(found.datasets)):
        own = scores[table["dataset"] == name]
        known = own.dropna().sort_values(kind="stable")
        points = []
        if len(known) <= MOST_POINTS:
            places = table.loc[known.index, ["id", "line"]].itertuples(index=False)
            points = [f"{safe(str(each.id))}, line {each.line}" for each in places]
        mean = found.dataset_score(name, vector, by)
        rows.append(_Row(place, name, known.to_numpy(dtype=float), points, len(own) - len(known), mean))
    return rows[::-1]


def _add_spread(figure: Any, row: _Row) -> None:
    """A data set's outline, and its samples where they are few."""
    if len(row.scores) >= LEAST_FOR_OUTLINE:
        figure.add_violin(
            x=_drawn(row.scores).tolist(),
            y0=row.place,
            orientation="h",
            side="positive",
            width=0.88,
            scalemode="width",
            # A density that goes on beyond the data shows scores that no sample has.
            spanmode="hard",
            points=False,
            fillcolor=PALE_BLUE,
            line={"color": BLUE, "width": 1.2},
            hoverinfo="skip",
        )
    if row.points:
        # Neighbours on the scale stand at three heights, so that they can be told apart.
        heights = [row.place - 0.08 - 0.07 * (index % 3) for index in range(len(row.points))]
        figure.add_scatter(
            x=row.scores.tolist(),
            y=heights,
            mode="markers",
            marker={"size": 5, "color": BLUE, "opacity": 0.5},
            hovertext=[f"{safe(row.name)}<br>{each}" for each in _with_scores(row)],
            hoverinfo="text",
        )


def _with_scores(row: _Row) -> list[str]:
    return [f"{point}<br>score {number(score)}" for point, score in zip(row.points, row.scores.tolist(), strict=True)]


def _drawn(scores: np.ndarray) -> np.ndarray:
    """The scores, or quantiles of very many, the lowest and the highest among them."""
    return scores if len(scores) <= MOST_NUMBERS else np.quantile(scores, np.linspace(0, 1, QUANTILES))


def _add_means(figure: Any, rows: Sequence[_Row]) -> None:
    scored = [row for row in rows if row.mean.value is not None]
    figure.add_scatter(
        name="mean",
        x=[row.mean.value for row in scored],
        y=[row.place for row in scored],
        mode="markers",
        marker={"size": 10, "symbol": "diamond", "color": VERMILION, "line": {"color": "white", "width": 1}},
        error_x={**whiskers([row.mean for row in scored], VERMILION), "thickness": 2.5, "width": 5},
        hovertext=[
            f"<b>{safe(row.name)}</b><br>n = {row.mean.n}, {row.missing} without a score"
            f"<br>mean and 95 % interval: {in_words(row.mean)}"
            for row in scored
        ],
        hoverinfo="text",
    )


def _add_names(figure: Any, rows: Sequence[_Row]) -> None:
    """Each data set's name above its row: beside it, long names would take the picture's room on a narrow page."""
    for row in rows:
        text = f"<b>{safe(row.name, 36)}</b>  n = {row.mean.n}"
        left = {"x": 0, "xref": "paper", "xanchor": "left", "y": row.place + 0.46, "yanchor": "bottom"}
        figure.add_annotation(text=text, showarrow=False, font={"size": 12, "color": INK}, **left)


def _ends(rows: Sequence[_Row], limit: float | None) -> list[float]:
    """From the lowest to the highest number, with the threshold, and a little more."""
    numbers = [each for row in rows if len(row.scores) for each in (row.scores[0], row.scores[-1])]
    numbers += [each for row in rows for each in row.mean[:3] if each is not None]
    numbers += [] if limit is None else [limit]
    low, high = float(min(numbers)), float(max(numbers))
    more = 0.04 * (high - low) or 1.0
    return [low - more, high + more]
