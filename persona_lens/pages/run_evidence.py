"""The page's parts on what the findings rest on: the layers' statistics, the responses, the judge, and the files.

Knows nothing about steering.
"""

import json
from collections.abc import Iterator, Mapping
from math import isnan
from typing import Any

from persona_lens.extraction.pipeline import best_layer, example_pairs
from persona_lens.pages.page import cut_text, escaped, facts_html, visible
from persona_lens.pages.run_examples import coloured_texts
from persona_lens.pages.run_findings import MAKERS, choice_of, judge_name, missing
from persona_lens.pages.run_folder import FILES, JudgedPair, Run
from persona_lens.pages.run_steering import answer_html
from persona_lens.pages.sections import Section, absent, boxed_table, figure, note
from persona_lens.plots.layers import plot_layer_statistics
from persona_lens.plots.style import number

LONGEST_PROMPT = 400
DIAGNOSTICS = {
    "auc_without_own_pair": ("AUC, own pair left out", "near 1"),
    "auc_with_own_pair": ("AUC with the own pair", "not much above"),
    "spearman_length_positive": ("Spearman with length, positive side", "within ± 0.2"),
    "spearman_length_negative": ("Spearman with length, negative side", "within ± 0.2"),
    "coherence_auc_shuffled": ("coherence: AUC against shuffled words", "0.95 or more"),
    "coherence_auc_looping": ("coherence: AUC against looping text", "0.95 or more"),
}
"""The likelihood-ratio judge's diagnostics: what they are, and what is wanted of them."""


def layers_section(run: Run, min_coherence: float) -> Section:
    """How good each layer's direction is, as a picture and as numbers."""
    heading, vectors = "How good the direction of each layer is", run.vectors
    if vectors is None:
        return Section(heading, absent("No vectors", "vectors.safetensors", MAKERS["vectors.safetensors"]))
    drawn = figure(
        lambda: plot_layer_statistics(vectors),
        "layers",
        label="Held-out AUC and split-half cosine of every layer. The table below has the numbers.",
        caption="Above, how well the direction separates questions that it was not made from; below, how far the "
        "directions of two halves of the questions agree. Bands are 95 % intervals over questions. An AUC should "
        "exceed the placebo (polarity swapped at random) and the embedding row, which is what the words alone give.",
        height=420,
    )
    heads = ["layer", "norm", "norm / residual", "held-out AUC [95 %]", "placebo AUC 95 %", "split-half [95 %]"]
    heads.append("bootstrap cosine, low")
    marks = _marks(run, min_coherence)
    rows = [_layer_row(layer, row, marks) for layer, row in vectors.table().to_dict("index").items()]
    return Section(heading, drawn.html + boxed_table("Numbers of every layer", heads, rows), drawn.pictures)


def _marks(run: Run, min_coherence: float) -> dict[Any, str]:
    """What stands beside a layer's number."""
    best = None if run.vectors is None else best_layer(run.vectors)
    choice = None if run.sweep is None else choice_of(run.sweep, min_coherence)
    marks = {best: ", best AUC"}
    if choice is not None:
        marks[choice.layer] = marks.get(choice.layer, "") + ", recommended"
    return marks


def _layer_row(layer: Any, row: Mapping[Any, float], marks: Mapping[Any, str]) -> list[str]:
    def shown(name: str) -> str:
        value = row.get(name, float("nan"))
        return "-" if isnan(value) else number(value)

    def interval(name: str) -> str:
        low, high = shown(f"{name}_low"), shown(f"{name}_high")
        return shown(name) + (f" [{low}, {high}]" if low != "-" else "")

    first = f"{layer}{marks.get(layer, '')}"
    norms = [shown("norm"), shown("relative_norm")]
    return [
        first,
        *norms,
        interval("held_out_auc"),
        shown("placebo_auc_95"),
        interval("split_half"),
        shown("bootstrap_cosine_low"),
    ]


def responses_section(run: Run, min_coherence: float) -> Section:
    """What was kept and dropped, and samples of both."""
    heading, report = "The responses behind the vectors", run.report
    counted = "" if report is None else note(f"{report}.")
    if not run.pairs:
        lacking = next((name for name in ("rollouts.jsonl", "scores.jsonl") if name in missing(run)), None)
        said = note("No rollout has a pair.") if lacking is None else absent("No samples", lacking, MAKERS[lacking])
        return Section(heading, counted + said)
    kept = [pair for pair in run.pairs if pair.dropped is None]
    if report is not None and (report.pairs, report.kept) != (len(run.pairs), len(kept)):
        said = (
            f"rollouts.jsonl and scores.jsonl now have {len(kept)} of {len(run.pairs)} pairs to keep, so they are not "
            "what the vectors were made of, and no sample is shown."
        )
        return Section(heading, counted + note(said))
    of_reasons = {pair.dropped: pair for pair in reversed(run.pairs) if pair.dropped is not None}
    texts, colours = coloured_texts(run, min_coherence)
    examples = example_pairs(kept)
    cards = [_pair(pair, texts) for pair in (*examples, *of_reasons.values())]
    about = f"{len(examples)} of the kept pairs, and the first of those that each reason dropped. {colours}"
    return Section(heading, counted + note(about) + "".join(cards))


def _pair(pair: JudgedPair, texts: Mapping[str, str]) -> str:
    """A pair side by side, under its question."""
    sides = [side for side in (pair.positive, pair.negative) if side is not None]
    mark = (
        "<b class=kept>kept</b>" if pair.dropped is None else f"<b class=dropped>dropped: {escaped(pair.dropped)}</b>"
    )
    answers = "".join(
        f"<div><header><strong>{escaped(side.rollout.polarity)}</strong>"
        f"<span>{cut_text(side.rollout.system_prompt, LONGEST_PROMPT)}</span></header>"
        f"{answer_html(side, texts.get(side.rollout.key))}</div>"
        for side in sides
    )
    question = cut_text(sides[0].rollout.question, LONGEST_PROMPT)
    return f"<article class=sample><h3 class=question>{question} {mark}</h3><div class=both>{answers}</div></article>"


def judge_section(run: Run) -> Section:
    """Who scored, how good that judge was on its calibration questions, and its limits."""
    name, heading = judge_name(run), "The judge"
    if name is None:
        return Section(heading, absent("Nothing was judged", "scores.jsonl", MAKERS["scores.jsonl"]))
    said = facts_html({"judge": name})
    if run.calibration is None:
        return Section(heading, said + note("Its agreement with people or another judge: `persona-lens agreement`."))
    found = run.calibration.diagnostics
    rows = [
        [words, number(found[key]), wanted]
        for key, (words, wanted) in DIAGNOSTICS.items()
        if found.get(key) is not None
    ]
    n = found.get("rows")
    limits = (
        f"Measured on {n} rollouts of {len(run.calibration.questions)} questions that are never scored. This judge is "
        "the model itself, never steered while it judges: it is not independent of what it scores. Confirm what "
        "matters with another judge, or with people: persona-lens agreement says how far they agree."
    )
    return Section(
        heading, said + boxed_table("Diagnostics of the judge", ["diagnostic", "here", "wanted"], rows) + note(limits)
    )


def origin_section(run: Run) -> Section:
    """The model, the settings and the libraries behind the run, and its files."""
    facts = dict(_origin(run))
    files = [[name, _size(size), FILES.get(name, "")] for name, size in run.files]
    heads = ["file", "size", "what it holds"]
    table = f"<div class=files>{boxed_table('Files of the run', heads, files)}</div>"
    # The other parts say themselves what they lack.
    lacking = [
        absent("Not here", name, MAKERS[name]) for name in ("trait.json", "summary.json") if name in missing(run)
    ]
    return Section("Where it comes from", facts_html(facts) + table + "".join(lacking))


def _origin(run: Run) -> Iterator[tuple[str, str]]:
    known = None if run.vectors is None else run.vectors.provenance
    if known is None:
        yield "model", "unknown: the folder has no vectors that say where they come from"
    else:
        model = known.model
        yield "model", f"{model.name}, {model.model_class}, weights {model.weights_hash}"
        yield "read at", f"{known.hook_point}, {model.residual_basis} residual stream"
        yield "chat template", known.template_hash or "none"
        yield from ((_words(name), _worded(value)) for name, value in known.settings.items() if value is not None)
    plan = run.summary.get("plan", {})
    yield from ((f"planned {_words(name)}", _worded(value)) for name, value in plan.items() if isinstance(value, int))
    if run.sweep is not None:
        swept = run.sweep.baseline.plan
        size = f"{len(run.sweep.layers)} layers × {len(run.sweep.coefficients)} coefficients"
        asked = f"{len(swept['questions'])} questions, answered {swept['per_question']} × each"
        yield "sweep", f"{size}, {asked}, steered on {swept['at']} tokens, seed {swept['seed']}"
        if run.sweep.judge != judge_name(run):
            yield "sweep judged by", run.sweep.judge
    if known is not None:
        yield "made", known.created
        yield "libraries", ", ".join(f"{name} {version}" for name, version in known.library_versions.items())


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


def ending(made_with: str) -> str:
    """The page's last line."""
    return f"<footer>{visible(made_with, breaks=False)}</footer>"
