"""Made-up results that the pictures' tests draw, and how they read a figure."""

from dataclasses import replace

from persona_lens.plots.mitigation import MitigationPoint
from persona_lens.statistics import Estimate
from tests.evaluation_cases import make_evaluation

MISSING = Estimate(None, None, None, 0)
CELLS = {
    (2, 1.0): ([20.0, 30.0, 25.0], 90.0),
    (2, 2.0): ([60.0, 70.0, 62.0], 80.0),
    (5, 1.0): ([10.0, 12.0, 11.0], 95.0),
    (5, 2.0): ([None, None, None], 30.0),
    (9, 1.0): ([61.0, 68.0, 62.0], 85.0),
    (9, 2.0): ([99.0, 98.0, 97.0], 40.0),
}
NASTY = "<b>bold</b> & <script>alert('x')</script>"
NASTY_AS_TEXT = "&lt;b&gt;bold&lt;/b&gt; &amp; &lt;script&gt;alert('x')&lt;"


def response(**parts):
    from persona_lens.evaluation.dose_response import DoseResponse

    cells = [make_evaluation(scores) for scores in ([5.0, 9.0], [20.0, 24.0], [60.0, 72.0])]
    others = [tuple([cells[0], cells[1], make_evaluation([7.0 + index, 9.0])]) for index in range(2)]
    made = DoseResponse("grumpy", 4, "made up", (-1.0, 0.0, 2.0), (-0.1, 0.0, 0.2), tuple(cells), tuple(others))
    return replace(made, **parts)


def traces(figure, name, **wanted):
    found = [trace for trace in figure.data if trace.name == name]
    return [trace for trace in found if all(trace[key] == value for key, value in wanted.items())]


def shown(figure):
    """All text of a figure, as it is sent to the browser."""
    return str(figure.to_dict())


def estimate(value, below=2.0, above=3.0, n=9):
    return Estimate(value, value - below, value + above, n)


def steered(coefficient, trait_score=50.0, coherence=90.0, capability=1.5, method="post-hoc"):
    numbers = (None if each is None else estimate(each) for each in (coherence, capability))
    return MitigationPoint(method, coefficient, MISSING if trait_score is None else estimate(trait_score), *numbers)


def points(figure, name, axis):
    """The points of a name on an axis of scores, by their place across."""
    found = [trace for trace in traces(figure, name) if trace.yaxis == axis]
    return {x: y for trace in found for x, y in zip(trace.x, trace.y, strict=True)}


def whiskers(bars, values):
    """The ends of the bars, from plotly's distances to the values."""
    return [
        (value - below, value + above) for value, below, above in zip(values, bars.arrayminus, bars.array, strict=True)
    ]
