"""Pictures of finetuning: trait scores by finetuning set, finetuning shifts, losses.

In the shape of arXiv:2507.21509, figures 5 and 6 (section 4).
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from math import ceil, isfinite
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from persona_lens.plots.monitoring import CHATS
from persona_lens.plots.style import (
    BLUE,
    DIVERGING,
    GREY,
    INK,
    SCORES,
    SEQUENTIAL,
    VERMILION,
    WHISKERS,
    add_grid,
    add_trace,
    in_words,
    index_axis,
    known,
    number,
    safe,
    size_panels,
    styled_figure,
    subplots,
    whiskers,
)
from persona_lens.statistics import Estimate, on_scale, slopes

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

DASHES = ("solid", "dot", "dashdot", "longdash")
PANELS_ACROSS = 3
SHIFT = "shift: change of the last prompt token’s projection, in units of the residual stream"


class TraitShifts(NamedTuple):
    """One trait's panel of `plot_shift_scores`: a shift and a score for every finetuning set, all in one order.

    Attributes:
        trait: The trait.
        shifts: Finetuning shift along the trait's direction, in units of the residual stream; None where missing.
        scores: Mean trait score after finetuning, 0 to 100.
        correlation: Of the two; None to write none.
        own: Names of the sets that were made to bring out this trait.
    """

    trait: str
    shifts: Sequence[float | None]
    scores: Sequence[Estimate]
    correlation: Estimate | None = None
    own: Collection[str] = ()


class LossCurves(NamedTuple):
    """A training run's losses by step, None where one is missing; `evaluation` is None where there was none."""

    run: str
    train: Mapping[int, float | None]
    evaluation: Mapping[int, float | None] | None = None


def plot_trait_scores(
    scores: "pandas.DataFrame",
    *,
    title: str = "mean trait score (0 to 100) by finetuning set",
    base: str | None = None,
    colours: Literal["score", "change"] = "score",
) -> "plotly.graph_objects.Figure":
    """Heat map of mean trait scores, 0 to 100: finetuning sets downward, traits across, the score in each cell.

    The rows of an index of two levels, set and severity, stand together by set. `base` names the row of the model
    before finetuning, which comes first. Colours are the score, or its change from `base`: red is more, blue less; NaN
    is grey and empty. Source: arXiv:2507.21509, figure 5.
    Raises ValueError where there is no score, one outside 0 to 100, not one row `base`, or a change without `base`.
    """
    if colours == "change" and base is None:
        raise ValueError("Colours of changes need the model before finetuning, got no `base`: name its row.")
    rows = _rows(scores, base)
    traits = [safe(str(each), 16) for each in scores.columns]
    hover = [[_score_hover(row, place, trait, base) for place, trait in enumerate(traits)] for row in rows]
    figure = styled_figure(safe(title, 90), ["numbers are scores, colours their changes"] * (colours == "change"))
    values, changes = [row.scores for row in rows], [row.changes for row in rows]
    if colours == "score":
        add_grid(figure, values, hover, name="score", decimals=0, scale=SEQUENTIAL, ends=(0.0, 100.0))
    else:
        reach = 10.0 * max(1, ceil(max(abs(each or 0.0) for row in changes for each in row) / 10))
        add_grid(figure, changes, hover, name="change", decimals=0, scale=DIVERGING, ends=(-reach, reach))
        figure.data[0].text = [["" if each is None else number(each, 0) for each in row] for row in values]
    for border, (above, below) in enumerate(pairwise(rows)):
        if above.set != below.set and (above.set == base or scores.index.nlevels > 1):
            figure.add_hline(y=border + 0.5, line={"color": "white", "width": 8}, opacity=1)
    height = figure.layout.margin.t + 40 + 32 * max(4, len(rows))
    figure.update_layout(width=max(760, 330 + 85 * len(traits)), height=height, margin_b=40, title_y=1 - 15 / height)
    figure.update_xaxes(side="top", **index_axis(traits))
    figure.update_yaxes(autorange="reversed", **index_axis([row.name for row in rows]))
    return figure


def plot_shift_scores(
    panels: Sequence[TraitShifts],
    sets: Sequence[str],
    *,
    base: str | None = None,
    title: str = "mean trait score after finetuning against the finetuning shift",
    across: str = "finetuning shift",
    note: str = SHIFT,
) -> "plotly.graph_objects.Figure":
    """Mean trait score (upward, 0 to 100) against finetuning shift (across): a panel a trait, a point a finetuning set.

    The shift is the change of the last prompt token's projection on the trait's direction; each panel has a scale of
    its own. `sets` names the points, `base` among them the model before finetuning. Above each panel is the
    correlation with its interval; the line is the least-squares fit. Points without shift or score are left out. Where
    something else than the shift is drawn, such as a data set's score, `across` names it and `note` says what it is.
    Source: arXiv:2507.21509, figure 6 (section 4.2).
    Raises ValueError where a panel has no point, lacks numbers of some sets, or a name is unknown.
    """
    _check_shifts(panels, sets, base)
    columns = min(PANELS_ACROSS, len(panels))
    down = ceil(len(panels) / columns)
    names = [safe(each.trait, 30) + _correlation(each.correlation) for each in panels]
    gaps = {"horizontal_spacing": 0.06, "vertical_spacing": 0.3 / down}
    figure = subplots(down, columns, subplot_titles=names, **gaps)
    lacking, n = sum(len(sets) - len(_drawn(each)) for each in panels), len(sets) * len(panels)
    missing = f"; {lacking} of {n} points lack a number" * bool(lacking)
    notes = [safe(note, 120), f"r is over all points; {WHISKERS}{missing}"]
    styled_figure(safe(title, 90), notes, figure)
    size_panels(figure, width=90 + 340 * max(2, columns), panels=260 * down, above=24)
    for index, panel in enumerate(panels):
        cell = {"row": 1 + index // columns, "col": 1 + index % columns}
        _add_shifts(figure, panel, sets, base, cell)
        figure.update_yaxes(**SCORES, **cell)
        if cell["col"] == 1:
            figure.update_yaxes(title_text="mean trait score", **cell)
        if index + columns >= len(panels):
            figure.update_xaxes(title_text=safe(across, 60), **cell)
    return figure


def plot_losses(
    runs: Sequence[LossCurves], *, title: str = "loss by training step", upward: str = "loss (nats per token)"
) -> "plotly.graph_objects.Figure":
    """Loss (upward) by training step (across): a line a run, and one with points for its evaluation.

    A missing loss leaves a gap.
    Raises ValueError where no run has a loss.
    """
    if not any(_finite(loss) is not None for run in runs for loss in [*run.train.values(), *_evaluation(run).values()]):
        raise ValueError(
            f"Loss curves need a run with a loss at some step, got {len(runs)} runs without one: train first."
        )
    notes = ["lines: training; lines with points: evaluation"] * any(_evaluation(run) for run in runs)
    figure = styled_figure(safe(title, 90), notes, legend_rows=0)
    for index, run in enumerate(runs):
        line = {"color": CHATS[index % len(CHATS)], "dash": DASHES[index // len(CHATS) % len(DASHES)]}
        for of, losses in (("training", run.train), ("evaluation", _evaluation(run))):
            look = {"mode": "lines", "line": {**line, "width": 2}, "opacity": 0.65}
            if of == "evaluation":
                marker = {"size": 8, "color": "white", "line": {"color": line["color"], "width": 2}}
                look = {"mode": "lines+markers", "line": {**line, "width": 2.5}, "marker": marker}
            steps = sorted(losses)
            hover = [f"<b>{safe(run.run)}</b><br>step {step}: {of} loss {number(losses[step], 3)}" for step in steps]
            if steps:
                add_trace(
                    figure, run.run, x=steps, y=[_finite(losses[step]) for step in steps], hovertext=hover, **look
                )
    figure.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"})
    figure.update_xaxes(title_text="training step", tickformat="d")
    figure.update_yaxes(title_text=safe(upward, 60))
    return figure


class _Row(NamedTuple):
    """A finetuning set's scores of all traits, and how far they are from the base's."""

    set: str
    name: str
    scores: list[float | None]
    changes: list[float | None]


def _rows(scores: "pandas.DataFrame", base: str | None) -> list[_Row]:
    """The rows, set by set, the base's first."""
    keys = [tuple(map(str, key)) if isinstance(key, tuple) else (str(key),) for key in scores.index]
    sets, table = [key[0] for key in keys], scores.to_numpy(dtype=float)
    found = table[~np.isnan(table)]
    if not found.size:
        raise ValueError("The table has no trait score to draw: pass one row a finetuning set and one column a trait.")
    if not all(0 <= on_scale(each) <= 100 for each in (found.min(), found.max())):
        raise ValueError(f"Trait scores are from 0 to 100, got {found.min():g} to {found.max():g}: rescale the table.")
    if base is not None and sets.count(base) != 1:
        raise ValueError(f"`base` names one row, {sets.count(base)} are {base!r}: name the model before finetuning.")
    groups = list(dict.fromkeys(sets if base is None else [base, *sets]))
    order = sorted(range(len(sets)), key=lambda row: groups.index(sets[row]))
    reference = [None] * table.shape[1] if base is None else known(table[order[0]].tolist())
    rows = []
    for row in order:
        values = known(table[row].tolist())
        changes = [_change(*pair) for pair in zip(values, reference, strict=True)]
        rows.append(_Row(sets[row], safe(", ".join(part for part in keys[row] if part), 36), values, changes))
    return rows


def _score_hover(row: _Row, place: int, trait: str, base: str | None) -> str:
    change = "" if base is None else f"<br>change from {safe(base)} {number(row.changes[place], 1)}"
    return f"<b>{row.name}</b><br>{trait} {number(row.scores[place], 1)}{change}"


def _change(value: float | None, before: float | None) -> float | None:
    return None if value is None or before is None else value - before


def _check_shifts(panels: Sequence[TraitShifts], sets: Sequence[str], base: str | None) -> None:
    if not panels:
        raise ValueError("A picture of shifts needs one panel a trait, got none: pass one `TraitShifts` at least.")
    for panel in panels:
        if not len(panel.shifts) == len(panel.scores) == len(sets):
            raise ValueError(
                f"{panel.trait}: each of {len(sets)} sets needs a shift and a score, got {len(panel.shifts)} and "
                f"{len(panel.scores)}: give None where one is missing."
            )
        if unknown := {*panel.own, *([] if base is None else [base])} - set(sets):
            raise ValueError(f"{panel.trait}: {sorted(unknown)[0]!r} is no set: name sets among {', '.join(sets)}.")
        if not _drawn(panel):
            raise ValueError(f"{panel.trait}: no set has both a shift and a score to draw: leave the panel out.")


def _drawn(panel: TraitShifts) -> list[int]:
    """Places of the sets that have both numbers."""
    pairs = zip(panel.shifts, panel.scores, strict=True)
    return [place for place, (x, y) in enumerate(pairs) if _finite(x) is not None and _finite(y.value) is not None]


def _add_shifts(figure: Any, panel: TraitShifts, sets: Sequence[str], base: str | None, cell: dict[str, int]) -> None:
    """The points of a panel in three kinds, and their line."""
    places = _drawn(panel)
    x, y = np.array([[panel.shifts[place], panel.scores[place].value] for place in places], dtype=float).T
    if len(places) > 2 and np.ptp(x) > 0:
        ends = np.array([x.min(), x.max()])
        fit = y.mean() + slopes(x, y[None])[0] * (ends - x.mean())
        line = {"color": GREY, "width": 2}
        add_trace(figure, "least-squares fit", x=ends.tolist(), y=fit.tolist(), mode="lines", line=line, cell=cell)
    kinds = {
        "sets for other traits": (BLUE, "circle", 7),
        "sets for this trait": (VERMILION, "diamond", 10),
        "before finetuning": (INK, "star", 15),
    }
    of = [
        "before finetuning" if each == base else f"sets for {'this trait' if each in panel.own else 'other traits'}"
        for each in sets
    ]
    for kind, (colour, symbol, size) in kinds.items():
        own = [place for place in places if of[place] == kind]
        scores = [panel.scores[place] for place in own]
        hover = [
            f"<b>{safe(sets[place])}</b><br>shift {number(panel.shifts[place])}<br>trait score {score}, n = {score.n}"
            for place, score in zip(own, scores, strict=True)
        ]
        if own:
            add_trace(
                figure,
                kind,
                x=[panel.shifts[place] for place in own],
                y=[each.value for each in scores],
                error_y=whiskers(scores, colour),
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": size, "line": {"color": "white", "width": 0.8}},
                hovertext=hover,
                cell=cell,
            )


def _correlation(found: Estimate | None) -> str:
    return "" if found is None else f": r = {in_words(found)}"


def _evaluation(run: LossCurves) -> Mapping[int, float | None]:
    return {} if run.evaluation is None else run.evaluation


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None
