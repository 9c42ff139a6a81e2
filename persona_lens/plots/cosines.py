"""The picture of a cosine matrix: traits by traits, on a scale of two colours that meets at 0.

Knows nothing about vectors: `cosine_matrix` gives the table.
"""

from typing import TYPE_CHECKING

from persona_lens.plots.style import DIVERGING, add_grid, index_axis, known, number, safe, styled_figure

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects


def plot_cosine_matrix(cosines: "pandas.DataFrame", title: str = "") -> "plotly.graph_objects.Figure":
    """Cosines between traits, as `cosine_matrix` gives them: red is 1, white 0, blue -1; NaN is grey and empty.

    Raises ValueError where there is no cosine, or a number outside -1 to 1.
    """
    values = [known(row) for row in cosines.to_numpy(dtype=float).tolist()]
    numbers = [each for row in values for each in row if each is not None]
    if not numbers:
        raise ValueError("The table has no cosine to draw: pass what `cosine_matrix` gives.")
    if max(map(abs, numbers)) > 1 + 1e-6:
        raise ValueError("The table has numbers outside -1 to 1, so no cosines: pass what `cosine_matrix` gives.")
    rows, columns = ([safe(str(each), 24) for each in names] for names in (cosines.index, cosines.columns))
    hover = [
        [f"{row} and {column}<br>cosine {number(each)}" for column, each in zip(columns, found, strict=True)]
        for row, found in zip(rows, values, strict=True)
    ]
    figure = styled_figure(safe(title, 60) or "Cosines between the directions of traits")
    add_grid(figure, values, hover, name="cosine", decimals=2, scale=DIVERGING, ends=(-1.0, 1.0))
    grown = 36 * max(0, max(len(rows), len(columns)) - 8)
    figure.update_layout(width=700 + grown, height=500 + grown)
    figure.update_xaxes(constrain="domain", **index_axis(columns))
    figure.update_yaxes(scaleanchor="x", constrain="domain", autorange="reversed", **index_axis(rows))
    return figure
