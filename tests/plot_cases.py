"""Made-up results that the pictures' tests draw, and how they read a figure."""

from dataclasses import replace

from tests.evaluation_cases import make_evaluation

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
    from persona_lens.layer_selection import DoseResponse

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
