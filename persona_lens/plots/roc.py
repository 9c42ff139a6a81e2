"""The picture of a projection as a detector: its ROC curve, and what thresholds catch.

Knows nothing about how the rates were counted.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from persona_lens.plots.style import BLUE, GREY, INK, VERMILION, number, safe, styled_figure
from persona_lens.statistics import Estimate
from persona_lens.thresholds import Detection, Threshold

if TYPE_CHECKING:
    import plotly.graph_objects

SYMBOLS = ("diamond", "square", "triangle-up", "x")


def plot_roc(
    detection: Detection, *, thresholds: Sequence[Threshold] = (), title: str = "how well the projection detects"
) -> "plotly.graph_objects.Figure":
    """True (upward) against false positive rate, with the area under the curve; the diagonal is chance.

    The ring is the best Youden's J, chosen on these very values. Each of `thresholds` is a point with the 95 %
    intervals of both rates.
    """
    found, best = detection, detection.best
    shown = f"Youden's J {number(best.tpr - best.fpr)} at {number(best.threshold)}"
    notes = [
        f"area under the curve {_interval(found.auc)}; best {shown}",
        f"{found.n_positive} positive and {found.n_negative} negative values, {found.n_groups} groups",
    ]
    figure = styled_figure(safe(title, 60), notes, legend_rows=3 + len(thresholds))
    hover = [f"above {number(t)}<br>true positives {y:.0%}<br>false positives {x:.0%}" for x, y, t in found.points]
    chance = {"color": GREY, "width": 1.5, "dash": "dot"}
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", name="chance", line=chance, hoverinfo="skip")
    look = {"line": {"color": BLUE, "width": 3}, "fill": "tozeroy", "fillcolor": "rgba(0, 114, 178, 0.08)"}
    figure.add_scatter(
        x=[point.fpr for point in found.points],
        y=[point.tpr for point in found.points],
        mode="lines",
        name="projection",
        hovertext=hover,
        hoverinfo="text",
        **look,
    )
    ring = {"symbol": "circle-open", "size": 16, "color": VERMILION, "line": {"width": 3}}
    figure.add_scatter(
        x=[best.fpr], y=[best.tpr], mode="markers", name="best Youden’s J", marker=ring, hoverinfo="skip"
    )
    for threshold, symbol in zip(thresholds, cycle(SYMBOLS), strict=False):
        _add_rates(figure, found, threshold, symbol)
    ends = {"range": [-0.02, 1.02], "tickformat": ".0%", "tickvals": [0, 0.25, 0.5, 0.75, 1]}
    figure.update_xaxes(title_text="false positive rate", **ends)
    figure.update_yaxes(title_text="true positive rate", **ends)
    margin, width = figure.layout.margin, 620
    height = width - margin.l - margin.r + margin.t + margin.b
    figure.update_layout(width=width, height=height, legend_orientation="v", title_y=1 - 15 / height)
    return figure


def _add_rates(figure: Any, detection: Detection, threshold: Threshold, symbol: str) -> None:
    """A threshold's point, with the intervals of both its rates as bars."""
    rates = detection.rates(threshold)
    name = f"{threshold.percentile:g}th percentile of benign: true {_share(rates.tpr)}, false {_share(rates.fpr)}"
    figure.add_scatter(
        x=[rates.fpr.value],
        y=[rates.tpr.value],
        error_x=_bars(rates.fpr),
        error_y=_bars(rates.tpr),
        mode="markers",
        name=name,
        marker={"symbol": symbol, "size": 11, "color": INK},
        hovertext=safe(str(threshold), 120),
        hoverinfo="text",
    )


def _bars(estimate: Estimate) -> dict[str, Any]:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return {}
    above, below = estimate.high - estimate.value, estimate.value - estimate.low
    return {"array": [above], "arrayminus": [below], "symmetric": False, "color": INK, "thickness": 1.5, "width": 4}


def _share(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    interval = "" if estimate.low is None or estimate.high is None else f" [{estimate.low:.0%}, {estimate.high:.0%}]"
    return f"{estimate.value:.0%}{interval}"


def _interval(estimate: Estimate) -> str:
    interval = "" if estimate.low is None else f" [{number(estimate.low)}, {number(estimate.high)}]"
    return number(estimate.value) + interval
