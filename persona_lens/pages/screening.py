"""A screening as one page of HTML: what was screened, every data set's numbers, and samples at both ends.

It is for whoever decides what a model is trained on (arXiv:2507.21509, section 6): a mean does not say what drives it,
the highest and the lowest samples do. Ids, names and texts are foreign, and all of them are escaped.
"""

from collections.abc import Iterator, Mapping
from math import isnan
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_lens.monitoring.thresholds import Threshold
from persona_lens.pages.page import Picture, picture_of, render
from persona_lens.plots.screening import FORMS, plot_screening, threshold_value
from persona_lens.plots.style import in_words, number
from persona_lens.screening.result import Screening
from persona_lens.screening.samples import Sample
from persona_lens.statistics import Estimate

if TYPE_CHECKING:
    from persona_lens.screening.result import By

BASES = {
    "generate": "the model’s own greedy responses, made for this run",
    "given": "given with the data",
    "proxy": "none; the last prompt token stands in for them",
    "none": "none",
}
LIMITS = {
    "max_new_tokens": "tokens of a base response, at most",
    "base_fraction": "share of rows with a base response",
    "max_prompt_tokens": "tokens of a prompt, at most",
    "max_response_tokens": "tokens of a response, at most",
    "sample": "random samples of each data set, at most",
    "after": "averaged after the text",
    "system_prompt": "system prompt of rows without one",
}


class _View(NamedTuple):
    """What the page shows of a screening: one vector, one form of score, a threshold or none."""

    screening: Screening
    vector: str
    by: "By"
    threshold: float | None


class _Card(NamedTuple):
    """A sample as the page shows it; `repeats` is how many near-duplicates it stands for."""

    score: str
    places: list[str]
    is_above: bool
    repeats: int
    prompt: str
    response: str
    base_response: str | None


def screening_html(
    screening: Screening,
    *,
    vector: str | None = None,
    by: "By | None" = None,
    n: int = 10,
    threshold: float | Threshold | None = None,
) -> str:
    """One page of HTML about a screening on one vector; the caller writes it.

    It has the run's settings and counts, a table and a picture of the data sets' scores (`Screening.dataset_scores`,
    `Screening.controls`, `plot_screening`), and the `n` highest and `n` lowest samples as texts. Of a family of
    near-duplicates only the first sample is shown, with how many more there are. Texts are cut at 700 characters. The
    page loads nothing, and runs plotly's script alone.

    Raises:
        ValueError: There is no such vector or score, or the threshold is another vector's.
        ImportError: Plotly is not installed.
    """
    vector, by = screening.vector(vector), screening.by if by is None else by
    view = _View(screening, vector, by, threshold_value(screening, vector, by, threshold))
    highest, lowest = _ends(view, n)
    heads = ["data set", "n", "no score", "score [95 %]", "above threshold", "Spearman with length", "near-duplicates"]
    heads.append("score without them")
    if view.threshold is None:
        heads.remove("above threshold")
    return render(
        "screening.html",
        f"Screening on {vector}",
        "results screening",
        pictures=_pictures(view, threshold),
        settings=_settings(view, threshold),
        heads=heads,
        rows=list(_rows(view)),
        threshold=view.threshold,
        highest=highest,
        lowest=lowest,
        folder=screening.folder.name,
        rejected=_count(sum(screening.counts["rejected"].values())),
        vector=vector,
        by=by,
    )


def _settings(view: _View, threshold: float | Threshold | None) -> dict[str, str]:
    """What was screened, how, and what became of every row that was read."""
    screening = view.screening
    settings, others = screening.settings, [name for name in screening.vectors if name != view.vector]
    limit = "none" if threshold is None else str(threshold) if isinstance(threshold, Threshold) else number(threshold)
    facts = {
        "model": settings["model"],
        "vector": view.vector + (f" (also screened: {', '.join(others)})" if others else ""),
        "score": f"{FORMS[view.by]}; above 0 is along the vector, in units of the residual stream",
        "base responses": BASES.get(screening.base, screening.base),
        "threshold": limit,
    }
    usual = {"base_fraction": 1.0}
    facts |= {words: settings[key] for key, words in LIMITS.items() if settings.get(key) not in (None, usual.get(key))}
    if settings.get("interventions"):
        facts["interventions"] = "; ".join(settings["interventions"])
    counts = screening.counts
    cut = _count(counts["cut"])
    repeats = "near-duplicates not detected"
    if counts["repeated"] is not None:
        repeats = f"{_count(counts['repeated'])} nearly repeat an earlier response"
    facts |= {
        "rows read": _count(counts["read"]),
        "rejected": _listed(counts["rejected"]),
        "left out": _listed(counts["left_out"]),
        "screened": f"{_count(counts['planned'])}, {cut} of them cut, {repeats}",
    }
    return {name: str(fact) for name, fact in facts.items()}


def _listed(counts: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{_count(count)} {reason}" for reason, count in counts.items())
    return _count(sum(counts.values())) + (f" ({reasons})" if reasons else "")


def _rows(view: _View) -> Iterator[list[str]]:
    """A row of the table for each data set."""
    screening, scores = view.screening, view.screening.score(view.vector, view.by)
    samples: Any = screening.rows
    controls: Any = screening.controls(view.by)
    controls = controls[controls["vector"] == view.vector].set_index("dataset").to_dict("index")
    for dataset in screening.datasets:
        in_set: Any = scores[samples["dataset"] == dataset]
        scored, control = in_set.dropna(), controls[dataset]
        value, low, high = (_defined(control[name]) for name in ("score_without_repeats", "low", "high"))
        cells = [dataset, _count(len(scored)), _count(len(in_set) - len(scored))]
        cells.append(in_words(screening.dataset_score(dataset, view.vector, view.by)))
        if view.threshold is not None:
            cells.append(f"{(scored > view.threshold).mean():.1%}" if len(scored) else "-")
        cells.append(number(_defined(control["spearman_length"])))
        cells.append("-" if _defined(control["repeated"]) is None else f"{control['repeated']:.1%}")
        yield [*cells, in_words(Estimate(value, low, high, len(scored)))]


def _defined(value: float | None) -> float | None:
    # pandas makes a missing number NaN where others of its column are there.
    return None if value is None or isnan(value) else value


def _pictures(view: _View, threshold: float | Threshold | None) -> list[Picture]:
    """The picture of the samples' scores; none where no sample has a score."""
    if not view.screening.score(view.vector, view.by).notna().any():
        return []
    figure: Any = plot_screening(view.screening, view.vector, by=view.by, threshold=threshold)
    height = figure.layout.height - figure.layout.margin.t + 10
    figure.update_layout(height=height, margin={"t": 10, "l": 14, "r": 14})
    figure.update_xaxes(title={"text": "score", "font": {"size": 13}}, fixedrange=True)
    return [picture_of(figure, "scores", "Scores of each data set’s samples; the table above has the means.")]


def _ends(view: _View, n: int) -> tuple[list[_Card], list[_Card]]:
    """The `n` highest families, highest first, and the `n` lowest of the others, lowest first."""
    rows: Any = view.screening.rows
    ranked: Any = view.screening.ranking(view.vector, view.by)
    sizes = rows["family"].value_counts()
    high = ranked.drop_duplicates("family").head(n)
    low = ranked[~ranked["family"].isin(high["family"])].iloc[::-1].drop_duplicates("family").head(n)

    def cards(part: Any) -> list[_Card]:
        samples = view.screening.samples(part.index.tolist())
        return [
            _card(view, numbers, sample, int(sizes[numbers["family"]]) - 1)
            for numbers, sample in zip(part.to_dict("records"), samples, strict=True)
        ]

    return cards(high), cards(low)


def _card(view: _View, numbers: Mapping[str, Any], sample: Sample, repeats: int) -> _Card:
    places = [f"{sample.dataset}:{sample.line}"]
    # A row without an id was given one that says the same.
    places += [sample.id] * (sample.id != places[0])
    places += [f"read up to token {numbers['response_tokens']}"] * bool(numbers["cut"])
    is_above = view.threshold is not None and numbers["score"] > view.threshold
    turns = [message["content"] for message in sample.messages if message["role"] == "user"]
    prompt = (turns or [sample.messages[-1]["content"]])[-1]
    return _Card(number(numbers["score"]), places, is_above, repeats, prompt, sample.response, sample.base_response)


def _count(value: int) -> str:
    return f"{value:,}"
