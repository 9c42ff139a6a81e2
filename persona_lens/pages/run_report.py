"""The report of a run's folder: one page with the recommended layer, the sweep, samples, statistics and provenance."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, Literal, NamedTuple

import persona_lens
from persona_lens.evaluation.evaluate import Evaluation
from persona_lens.evaluation.layer_selection import LayerChoice, LayerSweep
from persona_lens.extraction.pipeline import best_layer, example_pairs
from persona_lens.judges.scores import ScoredRollout
from persona_lens.pages.page import Picture, draw, render
from persona_lens.pages.run_folder import FILES, MAKERS, PAGE, Run, read_run
from persona_lens.pages.tokens import colour_scale, coloured_tokens
from persona_lens.plots.layers import plot_dose_response, plot_frontier, plot_layer_statistics, plot_layer_sweep
from persona_lens.plots.style import number
from persona_lens.statistics import Estimate
from persona_lens.storage.files import ensure_writable, write_whole

N_QUESTIONS = 4
"""How many questions' answers are on the page."""
LONGEST_RESPONSE = 400
"""Tokens of a coloured response that are shown."""
UNKNOWN = "–"
DIAGNOSTICS = {
    "auc_without_own_pair": ("AUC, own pair left out", "near 1"),
    "auc_with_own_pair": ("AUC with the own pair", "not much above"),
    "spearman_length_positive": ("Spearman with length, positive side", "within ± 0.2"),
    "spearman_length_negative": ("Spearman with length, negative side", "within ± 0.2"),
    "coherence_auc_shuffled": ("coherence: AUC against shuffled words", "0.95 or more"),
    "coherence_auc_looping": ("coherence: AUC against looping text", "0.95 or more"),
}
"""The likelihood-ratio judge's diagnostics, and the values that a good judge has."""


def write_report(folder: str | Path, output: str | Path | None = None, *, min_coherence: float = 75.0) -> Path:
    """Write the report of a run's folder, by default as report.html in it, and return the page's path.

    The page is one file, for any browser, without a network: the recommended layer and coefficient, the sweep, samples
    at each dose, the layers' statistics, kept and dropped responses, the judge, and the provenance. A cell needs a mean
    coherence of `min_coherence` to be recommended. An older page stays until the new one is whole.

    Raises:
        FileNotFoundError: The folder holds no run.
        ValueError: A file is damaged, or of another trait; the message names it.
        OSError: The page cannot be written.
        ImportError: Plotly is not installed.
    """
    page = Path(folder) / PAGE if output is None else Path(output)
    run = read_run(folder)
    ensure_writable(page)
    write_whole(page, report_html(run, min_coherence=min_coherence).encode())
    return page


def report_html(run: Run, *, min_coherence: float = 75.0) -> str:
    """The page of a run, as `write_report` writes it."""
    choice = run.choice(min_coherence)
    pictures = _pictures(run, min_coherence)
    return render(
        "report.html",
        f"Persona vectors: {run.name}",
        "results report",
        pictures=list(pictures.values()),
        drawn=pictures,
        run=run,
        sweep=run.sweep,
        choice=choice,
        least=f"{min_coherence:g}",
        version=persona_lens.__version__,
        makers=MAKERS,
        missing=run.missing,
        about=_about(run),
        tiles=_tiles(run, choice),
        reason=_reason(run, choice, min_coherence),
        cells=None if run.sweep is None else _cells(run.sweep),
        texts=None if run.sweep is None else _texts(run.sweep, choice, min_coherence),
        layers=None if run.vectors is None else _layers(run, choice),
        responses=_responses(run, choice),
        judge=run.judge_name,
        diagnostics=_diagnostics(run),
        origin=dict(_origin(run)),
        files=[[name, _size(size), FILES.get(name, "")] for name, size in run.files],
    )


def _pictures(run: Run, min_coherence: float) -> dict[str, Picture]:
    pictures = {}
    if run.sweep is not None:
        sweep = run.sweep
        values: tuple[Literal["trait_score", "coherence"], ...] = ("trait_score", "coherence")
        for value in values:
            pictures[value] = draw(
                partial(_heat_map, sweep, value, min_coherence),
                f"sweep-{value}",
                f"Heat map: mean {value.replace('_', ' ')} of every layer at every coefficient. Numbers below.",
                height=44 * len(sweep.coefficients) + 12,
                min_width=130 + 21 * len(sweep.layers),
            )
        label = "Scatter plot of trait score against coherence, a point for each cell of the table above."
        pictures["frontier"] = draw(lambda: plot_frontier(sweep, min_coherence), "frontier", label, height=360)
    if run.confirmed is not None:
        label = "Trait score and coherence against the coefficient. The sentence below has the slope."
        pictures["doses"] = draw(partial(_dose_figure, run.confirmed), "doses", label, height=440)
    if run.vectors is not None:
        vectors = run.vectors
        label = "Held-out AUC and split-half cosine of every layer. The table below has the numbers."
        pictures["layers"] = draw(lambda: plot_layer_statistics(vectors), "layers", label, height=420)
    return pictures


def _heat_map(sweep: LayerSweep, value: Literal["trait_score", "coherence"], min_coherence: float) -> Any:
    """A heat map whose colour bar leaves the width to the cells; only the first one has a legend."""
    figure: Any = plot_layer_sweep(sweep, value, min_coherence=min_coherence)
    bar = {"thickness": 10, "title": None, "len": 1.0, "outlinewidth": 0, "tickvals": [0, 50, 100]}
    figure.update_traces(colorbar=bar)
    return figure.update_layout(showlegend=value == "trait_score")


def _dose_figure(confirmed: Any) -> Any:
    """A dose-response whose axis leaves the explanation of its second line to the caption."""
    figure: Any = plot_dose_response(confirmed)
    # Only the lowest panel's axis has a name.
    return figure.for_each_xaxis(lambda axis: axis.title.text and axis.update(title_text="coefficient"))


# The headline


class _Tile(NamedTuple):
    """One of the large numbers at the top of the page."""

    name: str
    value: str
    about: str
    is_main: bool = False


def _about(run: Run) -> str:
    name, vectors = run.model_name, run.vectors
    if vectors is None or name is None:
        return "The folder does not say which model this is of."
    return f"{name}: {vectors.n_layers} layers of width {vectors.d_model}. Layers count from 0, the paper's from 1."


def _tiles(run: Run, choice: LayerChoice | None) -> list[_Tile]:
    if run.sweep is None:
        tiles = [_Tile("Steer", UNKNOWN, "no layer was chosen yet")]
    elif choice is None:
        tiles = [_Tile("Steer", UNKNOWN, "no cell is coherent enough")]
    else:
        start = run.sweep.baseline
        dose = "" if choice.dose is None else f"dose {choice.dose:.2f} of the residual norm"
        tiles = [
            _Tile("Steer", f"layer {choice.layer} × {choice.coefficient:g}", dose, is_main=True),
            _change_tile("Trait score", start.trait_score, choice.trait_score),
            _change_tile("Coherence", start.coherence, choice.coherence),
        ]
    return [*tiles, _pairs_tile(run), _held_out_tile(run), _judge_tile(run)]


def _change_tile(name: str, before: Estimate, after: Estimate) -> _Tile:
    interval = "" if after.low is None else f"steered: [{number(after.low, 0)}, {number(after.high, 0)}]"
    return _Tile(name, f"{number(before.value, 0)} → {number(after.value, 0)}", interval)


def _pairs_tile(run: Run) -> _Tile:
    report = run.report
    if report is None:
        return _Tile("Pairs kept", UNKNOWN, "no summary.json")
    below = "below" if report.negative_below is None else f"< {report.negative_below:g}"
    rule = f"trait ≥ {report.threshold:g} against {below}, coherence ≥ {report.min_coherence:g}"
    return _Tile("Pairs kept", f"{report.kept} of {report.pairs}", rule)


def _held_out_tile(run: Run) -> _Tile:
    layer = None if run.vectors is None else best_layer(run.vectors)
    statistics = None if run.vectors is None else run.vectors.statistics
    if statistics is None or layer is None:
        return _Tile("Held-out AUC", UNKNOWN, "not measured")
    area, low, high, placebo = (
        float(values[layer])
        for values in (
            statistics.held_out_auc,
            statistics.held_out_auc_low,
            statistics.held_out_auc_high,
            statistics.placebo_auc_95,
        )
    )
    about = f"layer {layer}" + ("" if isnan(low) else f" [{low:.2f}, {high:.2f}]")
    return _Tile("Held-out AUC", f"{area:.2f}", about + ("" if isnan(placebo) else f"; placebo {placebo:.2f}"))


def _judge_tile(run: Run) -> _Tile:
    if run.judge_name is None:
        return _Tile("Judge", UNKNOWN, "nothing was judged")
    kind = run.judge_name.partition(",")[0].partition(" (")[0]
    area = None if run.calibration is None else run.calibration.diagnostics.get("auc_without_own_pair")
    if area is None:
        return _Tile("Judge", UNKNOWN, f"{kind}; no AUC here")
    return _Tile("Judge", f"AUC {number(area)}", kind)


def _reason(run: Run, choice: LayerChoice | None, min_coherence: float) -> str:
    if choice is not None:
        warning = ". The best of many cells scores higher than it will on other questions, where it is unconfirmed"
        return f"{choice.reason[0].upper()}{choice.reason[1:]}{warning * (run.confirmed is None)}."
    if run.sweep is None:
        return ""
    try:
        run.sweep.best(min_coherence)
    except ValueError as error:
        return str(error)
    return ""


# The sweep and its texts


def _cells(sweep: LayerSweep) -> dict[str, Any]:
    """The table behind the heat maps."""

    def shown(cell: Evaluation) -> str:
        return f"{cell.trait_score} / {number(cell.coherence.value, 0)}"

    rows = [["unsteered", *[shown(sweep.baseline)] * len(sweep.coefficients)]]
    for layer in sweep.layers:
        rows.append([str(layer), *(shown(sweep.evaluations[layer, amount]) for amount in sweep.coefficients)])
    return {"heads": ["layer", *(f"× {amount:g}" for amount in sweep.coefficients)], "rows": rows}


class _Column(NamedTuple):
    """The answer to a question at one dose."""

    name: str
    dose: str
    is_best: bool
    row: ScoredRollout | None


def _texts(sweep: LayerSweep, choice: LayerChoice | None, min_coherence: float) -> dict[str, Any]:
    """Answers at each dose of the recommended layer, beside the unsteered one."""
    about, recommended = "", choice is not None
    if choice is None:
        about = f"No cell has a mean coherence of {min_coherence:g} or more; this layer has the highest trait score. "
        try:
            choice = sweep.best(None)
        except ValueError as error:
            return {"reason": str(error)}
    questions = []
    for question in sweep.baseline.questions[:N_QUESTIONS]:
        columns = [_Column("unsteered", "", False, _first(sweep.baseline, question))]
        for amount in sweep.coefficients:
            dose = sweep.doses[choice.layer, amount]
            row = _first(sweep.evaluations[choice.layer, amount], question)
            is_best = recommended and amount == choice.coefficient
            columns.append(_Column(f"× {amount:g}", "" if dose is None else number(dose), is_best, row))
        questions.append((question, columns))
    about += (
        f"Layer {choice.layer}, {len(questions)} of {len(sweep.baseline.questions)} questions, the first answer to "
    )
    about += "each. The bars are trait scores, from 0 to 100."
    return {"reason": "", "about": about, "questions": questions}


def _first(evaluation: Evaluation, question: str) -> ScoredRollout | None:
    rows = [row for row in evaluation.scored if row.rollout.question == question]
    return min(rows, key=lambda row: row.rollout.sample, default=None)


# What the findings rest on


def _layers(run: Run, choice: LayerChoice | None) -> dict[str, Any]:
    """The numbers of every layer; the recommended one and the one with the best held-out AUC are marked."""
    assert run.vectors is not None
    marks: dict[Any, str] = {best_layer(run.vectors): ", best AUC"}
    if choice is not None:
        marks[choice.layer] = marks.get(choice.layer, "") + ", recommended"
    heads = ["layer", "norm", "norm / residual", "held-out AUC [95 %]", "placebo AUC 95 %", "split-half [95 %]"]
    heads.append("bootstrap cosine, low")
    rows = [
        _layer_row(f"{layer}{marks.get(layer, '')}", row) for layer, row in run.vectors.table().to_dict("index").items()
    ]
    return {"heads": heads, "rows": rows}


def _layer_row(name: str, row: Mapping[Any, float]) -> list[str]:
    def shown(column: str) -> str:
        value = row.get(column, float("nan"))
        return "-" if isnan(value) else number(value)

    def interval(column: str) -> str:
        low, high = shown(f"{column}_low"), shown(f"{column}_high")
        return shown(column) + (f" [{low}, {high}]" if low != "-" else "")

    norms, cosine = [shown("norm"), shown("relative_norm")], shown("bootstrap_cosine_low")
    return [name, *norms, interval("held_out_auc"), shown("placebo_auc_95"), interval("split_half"), cosine]


def _responses(run: Run, choice: LayerChoice | None) -> dict[str, Any]:
    """Samples of kept and dropped responses, or what is missing for them."""
    empty: dict[str, Any] = {"missing": "", "pairs": [], "tokens": {}}
    if not run.pairs:
        lacking = next((name for name in ("rollouts.jsonl", "scores.jsonl") if name in run.missing), "")
        return empty | {"missing": lacking, "about": "No rollout has a pair."}
    kept = [pair for pair in run.pairs if pair.dropped is None]
    if run.report is not None and (run.report.pairs, run.report.kept) != (len(run.pairs), len(kept)):
        about = (
            f"rollouts.jsonl and scores.jsonl now have {len(kept)} of {len(run.pairs)} pairs to keep, so they are not "
            "what the vectors were made of, and no sample is shown."
        )
        return empty | {"about": about}
    first_of_reason = {pair.dropped: pair for pair in reversed(run.pairs) if pair.dropped is not None}
    examples = example_pairs(kept)
    texts, colours = coloured_texts(run, choice)
    pairs = [*examples, *first_of_reason.values()]
    keys = [side.rollout.key for pair in pairs for side in (pair.positive, pair.negative) if side is not None]
    about = f"{len(examples)} of the kept pairs, and the first of those that each reason dropped. {colours}"
    return {"missing": "", "about": about, "pairs": pairs, "tokens": {key: texts.get(key, "") for key in keys}}


def coloured_texts(run: Run, choice: LayerChoice | None) -> tuple[Mapping[str, str], str]:
    """Kept responses as HTML by their rollouts' keys, each token coloured by its projection, and a caption.

    The layer is that of `choice`, or else the one with the best held-out AUC; nothing where its tokens were not read.
    """
    from markupsafe import Markup

    layer = choice.layer if choice is not None else None if run.vectors is None else best_layer(run.vectors)
    layers = [] if run.examples is None else [vector.layer for vector in run.examples.vectors]
    if run.examples is None or layer not in layers:
        return {}, ""
    vector = layers.index(layer)
    responses = {
        chat.name: (tokens.pieces[tokens.n_prompt :], tokens.values[tokens.n_prompt :, vector].tolist())
        for chat in run.examples.chats
        for tokens in (turn.tokens for turn in chat.turns)
        if tokens is not None
    }
    values = [value for _, projections in responses.values() for value in projections]
    if not values:
        return {}, ""
    neutral, reach = colour_scale(values)
    texts = {}
    for name, (pieces, projections) in responses.items():
        shown, left = slice(LONGEST_RESPONSE), len(pieces) - LONGEST_RESPONSE
        spans = coloured_tokens(pieces[shown], projections[shown], name=f"layer {layer}", neutral=neutral, reach=reach)
        texts[name] = Markup(spans + (f" <span class=cut>… {left:,} more tokens</span>" if left > 0 else ""))
    caption = (
        f"The kept ones' tokens are coloured by their projection on the direction of layer {layer}: vermilion above "
        f"{number(neutral)}, the median of what is shown, blue below. Hovering shows the number."
    )
    return texts, caption


def _diagnostics(run: Run) -> list[list[str]]:
    values = {} if run.calibration is None else run.calibration.diagnostics
    return [
        [words, number(values[key]), wanted]
        for key, (words, wanted) in DIAGNOSTICS.items()
        if values.get(key) is not None
    ]


def _origin(run: Run) -> Iterator[tuple[str, str]]:
    """The model, the settings and the libraries behind the run."""
    provenance = None if run.vectors is None else run.vectors.provenance
    if provenance is None:
        yield "model", "unknown: the folder has no vectors that say where they come from"
    else:
        model = provenance.model
        yield "model", f"{model.name}, {model.model_class}, weights {model.weights_hash}"
        yield "read at", f"{provenance.hook_point}, {model.residual_basis} residual stream"
        yield "chat template", provenance.template_hash or "none"
        settings = provenance.settings.items()
        yield from ((_words(name), _worded(value)) for name, value in settings if value is not None)
    plan = run.summary.get("plan", {})
    yield from ((f"planned {_words(name)}", _worded(value)) for name, value in plan.items() if isinstance(value, int))
    if run.sweep is not None:
        swept = run.sweep.baseline.plan
        size = f"{len(run.sweep.layers)} layers × {len(run.sweep.coefficients)} coefficients"
        questions = f"{len(swept['questions'])} questions, answered {swept['per_question']} × each"
        yield "sweep", f"{size}, {questions}, steered on {swept['at']} tokens, seed {swept['seed']}"
        if run.sweep.judge != run.judge_name:
            yield "sweep judged by", run.sweep.judge
    if provenance is not None:
        yield "made", provenance.created
        yield "libraries", ", ".join(f"{name} {version}" for name, version in provenance.library_versions.items())


def _words(name: str) -> str:
    return name.replace("_", " ")


def _worded(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _size(size: float) -> str:
    for unit in ("B", "kB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} MB"
