"""The page's parts on steering: layers against coefficients, the frontier, the confirmation, and what the model says.

Knows nothing about how answers were sampled or judged.
"""

from functools import partial
from typing import Any, Literal

from persona_lens.evaluation.dose_response import DoseResponse
from persona_lens.evaluation.evaluate import Evaluation
from persona_lens.evaluation.layer_selection import LayerChoice, LayerSweep
from persona_lens.judges.scores import ScoredRollout
from persona_lens.pages.page import LONGEST, cut_text
from persona_lens.pages.run_findings import MAKERS, choice_of
from persona_lens.pages.run_folder import Run
from persona_lens.pages.sections import Section, absent, boxed_table, details, figure, note
from persona_lens.plots.layers import plot_dose_response, plot_frontier, plot_layer_sweep
from persona_lens.plots.style import number

N_QUESTIONS = 4
"""How many questions' answers stand on the page."""


def sweep_section(run: Run, min_coherence: float) -> Section:
    """Trait score and coherence of every layer and coefficient."""
    heading, sweep = "Which layer, and how strongly", run.sweep
    if sweep is None:
        return Section(heading, absent("No layer was chosen", "layer_sweep.json", MAKERS["layer_sweep.json"]))
    height = 44 * len(sweep.coefficients) + 12
    framed = "The solid frame is the recommended cell, dotted ones are cells not told apart from it by the questions."
    if choice_of(sweep, min_coherence) is None:
        framed = f"No cell is framed: none has a trait score and a mean coherence of {min_coherence:g} or more."
    shown: list[tuple[Literal["trait_score", "coherence"], str]] = [
        ("trait_score", f"<b>Trait score</b>, 0 to 100. {framed}"),
        ("coherence", "<b>Coherence</b> of the same answers, 0 to 100: how far they are still sensible text."),
    ]
    pictures = [
        figure(
            partial(_heat_map, sweep, value, min_coherence),
            f"sweep-{value}",
            label=f"Heat map: mean {value.replace('_', ' ')} of every layer at every coefficient. Numbers below.",
            caption=caption,
            height=height,
            least=130 + 21 * len(sweep.layers),
        )
        for value, caption in shown
    ]
    numbers = details("All cells in numbers", _cells(sweep))
    return Section(heading, "".join(part.html for part in pictures) + numbers, _joined(pictures))


def frontier_section(run: Run, min_coherence: float) -> Section | None:
    """What a higher trait score costs in coherence; nothing without a sweep."""
    sweep = run.sweep
    if sweep is None:
        return None
    caption = (
        f"Each point is a layer at a coefficient. The dashed line is the coherence of {min_coherence:g} that a "
        "recommendation needs, the ring what is recommended, the star the model without steering; no point is better "
        "than the grey stairs in one score without being worse in the other."
    )
    label = "Scatter plot of trait score against coherence, a point for each cell of the table above."
    drawn = figure(lambda: plot_frontier(sweep, min_coherence), "frontier", label=label, caption=caption, height=360)
    return Section("What the trait costs in coherence", drawn.html, drawn.pictures)


def confirmation_section(run: Run) -> Section | None:
    """The chosen direction on other questions, beside random directions; nothing without a sweep."""
    heading, confirmed = "Does it hold on other questions?", run.confirmed
    if confirmed is None:
        if run.sweep is None:
            return None
        said = "Not confirmed, and the best of many cells is optimistic"
        return Section(heading, absent(said, "dose_response.json", MAKERS["dose_response.json"]))
    drawn = figure(
        partial(_doses, confirmed),
        "doses",
        label="Trait score and coherence against the coefficient. The sentence below has the slope.",
        caption="Bands are 95 % intervals over questions, grey lines random directions of equal norm; hollow points "
        "are incoherent and do not count in the slope. Under a coefficient stands its dose, the shift over the "
        "norm of the residual stream.",
        height=440,
    )
    return Section(heading, drawn.html + note(f"{confirmed}."), drawn.pictures)


def texts_section(run: Run, min_coherence: float) -> Section | None:
    """Answers at each dose of the recommended layer, next to the unsteered one; nothing without a sweep."""
    sweep = run.sweep
    if sweep is None:
        return None
    choice, said = choice_of(sweep, min_coherence), ""
    if choice is None:
        said = f"No cell has a mean coherence of {min_coherence:g} or more; this layer has the highest trait score. "
        try:
            choice = sweep.best(None)
        except ValueError as error:
            return Section("What the model says", note(str(error)))
    questions = sweep.baseline.questions
    shown = questions[:N_QUESTIONS]
    said += f"Layer {choice.layer}, {len(shown)} of {len(questions)} questions, the first answer to each. "
    said += "The bars are trait scores, from 0 to 100."
    recommended = choice_of(sweep, min_coherence) is not None
    cards = "".join(_answers(sweep, choice, question, recommended) for question in shown)
    return Section("What the model says", note(said) + cards)


def _answers(sweep: LayerSweep, choice: LayerChoice, question: str, recommended: bool) -> str:
    """A question with its unsteered answer and those at each dose."""
    answers = [_answer("<strong>unsteered</strong>", _first(sweep.baseline, question))]
    for coefficient in sweep.coefficients:
        dose = sweep.doses[choice.layer, coefficient]
        about = "" if dose is None else f"<span>dose {number(dose)}</span>"
        best = "<b>recommended</b>" * (recommended and coefficient == choice.coefficient)
        row = _first(sweep.evaluations[choice.layer, coefficient], question)
        answers.append(_answer(f"<strong>× {coefficient:g}</strong>{about}{best}", row))
    head = f"<h3 class=question>{_long(question)}</h3>"
    return f"<article class=sample>{head}<div class=doses>{''.join(answers)}</div></article>"


def _first(found: Evaluation, question: str) -> ScoredRollout | None:
    rows = [row for row in found.scored if row.rollout.question == question]
    return min(rows, key=lambda row: row.rollout.sample, default=None)


def _answer(head: str, row: ScoredRollout | None) -> str:
    if row is None:
        return f"<div><header>{head}</header><p class=note>no answer</p></div>"
    return f"<div><header>{head}</header>{answer_html(row)}</div>"


def answer_html(row: ScoredRollout, shown: str | None = None) -> str:
    """An answer under its scores; the bar is as long as the trait score, and missing where that is.

    `shown` is the answer as HTML, where it is more than its text.
    """
    bar = ""
    if row.trait_score is not None:
        bar = f'<span class=meter aria-hidden=true><i style="width:{row.trait_score:.0f}%"></i></span>'
    scores = f"trait {number(row.trait_score, 0)} · coherence {number(row.coherence, 0)}"
    text = "<span class=cut>no text</span>" if row.is_empty else shown or _long(row.rollout.response)
    return f"{bar}<p class=scores>{scores}</p><div class=text>{text}</div>"


def _long(text: str) -> str:
    return cut_text(text, LONGEST)


def _cells(sweep: LayerSweep) -> str:
    """The table behind the heat maps, and what the cheap screens of layers are worth."""

    def shown(found: Evaluation) -> str:
        return f"{found.trait_score} / {number(found.coherence.value, 0)}"

    rows = [["unsteered", *[shown(sweep.baseline)] * len(sweep.coefficients)]]
    rows += [
        [str(layer), *(shown(sweep.evaluations[layer, each]) for each in sweep.coefficients)] for layer in sweep.layers
    ]
    head = ["layer", *(f"× {each:g}" for each in sweep.coefficients)]
    said = f"Trait score with its 95 % interval over {len(sweep.baseline.questions)} questions, and mean coherence."
    return note(said) + boxed_table("Trait score and coherence of every cell", head, rows)


def _heat_map(sweep: LayerSweep, value: Literal["trait_score", "coherence"], min_coherence: float) -> Any:
    """A heat map whose bar of colours leaves the width to the cells; the legend stands over the first one alone."""
    drawn: Any = plot_layer_sweep(sweep, value, min_coherence=min_coherence)
    bar = {"thickness": 10, "title": None, "len": 1.0, "outlinewidth": 0, "tickvals": [0, 50, 100]}
    drawn.update_traces(colorbar=bar)
    return drawn.update_layout(showlegend=value == "trait_score")


def _doses(confirmed: DoseResponse) -> Any:
    """A dose-response whose axis leaves the explanation of its second line to the caption."""
    drawn: Any = plot_dose_response(confirmed)
    # Only the lowest panel's axis has a name.
    return drawn.for_each_xaxis(lambda axis: axis.title.text and axis.update(title_text="coefficient"))


def _joined(parts: list[Section]) -> tuple:
    return tuple(picture for part in parts for picture in part.pictures)
