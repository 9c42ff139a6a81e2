"""The look of a screening's page, beyond its parts, and its last paragraph.

Knows nothing about a screening's numbers.

A screening as one page of HTML to read: what was screened, every data set's numbers, and samples at both ends.

It is for who decides what a model is trained on (arXiv:2507.21509, section 6): a mean does not say what drives it, the
highest and the lowest samples do. Ids, names and texts are foreign, and all of them are escaped.
Knows nothing about how samples were scored.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_lens.monitoring.thresholds import Threshold
from persona_lens.pages.page import (
    LONGEST_NAME,
    PARTS_STYLE,
    cut_text,
    drawing_scripts,
    escaped,
    facts_html,
    html_page,
    picture_of,
    table_html,
    text_part,
    visible,
)
from persona_lens.plots.screening import FORMS, plot_screening, threshold_value
from persona_lens.plots.style import in_words, number
from persona_lens.screening.result import Screening
from persona_lens.screening.samples import Sample
from persona_lens.statistics import Estimate

if TYPE_CHECKING:
    from persona_lens.screening.result import By

SCREENING_STYLE = """
.end { margin: 1.4rem 0 .5rem; }
.next p { margin: 0; }
@media (max-width: 820px) {
  thead { display: none; }
  tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  td, td:first-child { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; }
  td::before { content: attr(data-name); color: var(--grey); font-weight: 400; white-space: nowrap; }
}
"""

NEXT = """<p>Read the samples above before the means: a score says how far a response lies along the vector, and not
whether the response is bad. In the run’s folder <code>{folder}</code>, <code>rejects.jsonl</code> lists what was
rejected (here {rejected}) with the reasons, to be mended at the source, and <code>scores.parquet</code> has a row for
each sample with its projections, to be filtered or joined by data set, id and line. To see what the scores mean for
training, finetune on the ends: <code>write_split(read_screening(folder), "split", 1000, vector={vector},
by="{by}")</code> writes the 1,000 highest, random and lowest samples as three files of chats, and of near-duplicates
only the first.</p>"""


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

    found: Screening
    vector: str
    by: "By"
    threshold: float | None


def screening_html(
    found: Screening,
    *,
    vector: str | None = None,
    by: "By | None" = None,
    n: int = 10,
    threshold: float | Threshold | None = None,
) -> str:
    """One page of HTML about a screening on one vector; the caller writes it (`records.write_whole`).

    It has the run's settings and counts, a table and a picture of the data sets' scores (`Screening.dataset_scores`,
    `Screening.controls`, `plot_screening`), and the `n` highest and `n` lowest samples as texts. Of a family of
    near-duplicates only the sample that comes first stands there, with how many more there are. Texts are cut at 700
    characters. The page loads nothing, and runs plotly's script alone.
    Raises ValueError where there is no such vector or score, or the threshold is another's; ImportError without plotly.
    """
    name, by = found.vector(vector), found.by if by is None else by
    view = _View(found, name, by, threshold_value(found, name, by, threshold))
    picture, scripts = _picture(view, threshold)
    highest, lowest = _ends(view, n)
    parts = [
        _settings(view, threshold),
        f"<section><h2>Data sets</h2>{_table(view)}</section>",
        f"<section><h2>Scores of the samples</h2>{picture}</section>",
        _samples(view, "Highest", "what would pull the model along the vector most", highest),
        _samples(view, "Lowest", "what would pull it the other way, or least", lowest),
        f"<section class=next><h2>What to do next</h2>{_next(view)}</section>",
    ]
    return html_page(f"Screening on {name}", "\n".join(parts), style=PARTS_STYLE + SCREENING_STYLE, scripts=scripts)


def _settings(view: _View, threshold: float | Threshold | None) -> str:
    """What was screened, how, and what became of every row that was read."""
    settings, others = view.found.settings, [name for name in view.found.vectors if name != view.vector]
    limit = "none" if threshold is None else str(threshold) if isinstance(threshold, Threshold) else number(threshold)
    facts = {
        "model": settings["model"],
        "vector": view.vector + (f" (also screened: {', '.join(others)})" if others else ""),
        "score": f"{FORMS[view.by]}; above 0 is along the vector, in units of the residual stream",
        "base responses": BASES.get(view.found.base, view.found.base),
        "threshold": limit,
    }
    usual = {"base_fraction": 1.0}
    facts |= {words: settings[key] for key, words in LIMITS.items() if settings.get(key) not in (None, usual.get(key))}
    if settings.get("interventions"):
        facts["interventions"] = "; ".join(settings["interventions"])
    facts |= _counts(view.found.counts)
    shown = facts_html({name: str(value) for name, value in facts.items()})
    return f"<section><h2>What was screened</h2>{shown}</section>"


def _counts(counts: Mapping[str, Any]) -> dict[str, str]:
    cut, repeated = _count(counts["cut"]), _count(counts["repeated"])
    return {
        "rows read": _count(counts["read"]),
        "rejected": _listed(counts["rejected"]),
        "left out": _listed(counts["left_out"]),
        "screened": f"{_count(counts['planned'])}, {cut} of them cut, {repeated} nearly repeat an earlier response",
    }


def _listed(counts: Mapping[str, int]) -> str:
    each = ", ".join(f"{_count(count)} {what}" for what, count in counts.items())
    return _count(sum(counts.values())) + (f" ({each})" if each else "")


def _table(view: _View) -> str:
    """A row for each data set; on a narrow page a card each, so every cell carries the name of its column."""
    heads = ["data set", "n", "no score", "score [95 %]", "above threshold", "Spearman with length", "near-duplicates"]
    heads.append("score without them")
    if view.threshold is None:
        heads.remove("above threshold")
    note = (
        "Intervals are over prompts. A large correlation with length, or a score that is another without "
        "near-duplicates, says that something else than the trait may make the score."
    )
    return f"{table_html(heads, _numbers(view))}<p class=note>{note}</p>"


def _numbers(view: _View) -> Iterator[list[str]]:
    found, scores = view.found, view.found.score(view.vector, view.by)
    rows: Any = found.rows
    controls: Any = found.controls(view.by)
    controls = controls[controls["vector"] == view.vector].set_index("dataset").to_dict("index")
    for dataset in found.datasets:
        own: Any = scores[rows["dataset"] == dataset]
        known, control = own.dropna(), controls[dataset]
        value, low, high = (_given(control[name]) for name in ("score_without_repeats", "low", "high"))
        cells = [dataset, _count(len(known)), _count(len(own) - len(known))]
        cells.append(in_words(found.dataset_score(dataset, view.vector, view.by)))
        if view.threshold is not None:
            cells.append(f"{(known > view.threshold).mean():.1%}" if len(known) else "-")
        cells.append(number(_given(control["spearman_length"])))
        cells.append("-" if _given(control["repeated"]) is None else f"{control['repeated']:.1%}")
        yield [*cells, in_words(Estimate(value, low, high, len(known)))]


def _given(value: float | None) -> float | None:
    # pandas makes a missing number NaN where others of its column are there.
    return None if value is None or isnan(value) else value


def _picture(view: _View, threshold: float | Threshold | None) -> tuple[str, list[str]]:
    """An element and the scripts that draw into it; words alone where no sample has a score."""
    if not view.found.score(view.vector, view.by).notna().any():
        return "<p class=note>No sample has a score.</p>", []
    figure: Any = plot_screening(view.found, view.vector, by=view.by, threshold=threshold)
    height = figure.layout.height - figure.layout.margin.t + 10
    figure.update_layout(height=height, margin={"t": 10, "l": 14, "r": 14})
    figure.update_xaxes(title={"text": "score", "font": {"size": 13}}, fixedrange=True)
    note = "Diamonds with whiskers are means with their 95 % intervals, outlines how the samples’ scores are spread"
    note += "; the dashed line is the threshold." if view.threshold is not None else "."
    picture = picture_of(figure, "scores", "Scores of each data set’s samples; the table above has the means.")
    return f"<p class=note>{note}</p>{picture.element}", drawing_scripts([picture])


class _Shown(NamedTuple):
    """A sample's number, its line of the table, and how many more its family of near-duplicates has."""

    row: int
    numbers: Mapping[str, Any]
    more: int


def _ends(view: _View, n: int) -> tuple[list[_Shown], list[_Shown]]:
    """The `n` highest families, highest first, and the `n` lowest of the others, lowest first."""
    rows: Any = view.found.rows
    ranked: Any = view.found.ranking(view.vector, view.by)
    sizes = rows["family"].value_counts()
    high = ranked.drop_duplicates("family").head(n)
    low = ranked[~ranked["family"].isin(high["family"])].iloc[::-1].drop_duplicates("family").head(n)

    def shown(part: Any) -> list[_Shown]:
        table = zip(part.index.tolist(), part.to_dict("records"), strict=True)
        return [_Shown(row, numbers, int(sizes[numbers["family"]]) - 1) for row, numbers in table]

    return shown(high), shown(low)


def _samples(view: _View, name: str, what: str, shown: Sequence[_Shown]) -> str:
    texts = view.found.samples([each.row for each in shown])
    cards = [_card(view, each, sample) for each, sample in zip(shown, texts, strict=True)]
    none = "<p class=note>There are no further samples with a score.</p>" if not cards else ""
    return f"<h2 class=end>{name} samples: {what}</h2>{none}{''.join(cards)}"


def _card(view: _View, shown: _Shown, sample: Sample) -> str:
    """A sample: its score and where it stands, then its texts."""
    numbers = shown.numbers
    about = [f"{sample.dataset}:{sample.line}"]
    # An id that a row without one was given says the same.
    about += [sample.id] * (sample.id != about[0])
    about += [f"read up to token {numbers['response_tokens']}"] * bool(numbers["cut"])
    over = view.threshold is not None and numbers["score"] > view.threshold
    marks = "<b class=over>above the threshold</b>" * over
    if shown.more:
        marks += f"<b class=more>{_count(shown.more)} near-duplicate{'s' * (shown.more > 1)} more</b>"
    where = "".join(f"<span>{cut_text(each, LONGEST_NAME)}</span>" for each in about)
    turns = [message["content"] for message in sample.messages if message["role"] == "user"]
    parts = text_part("prompt, last turn of the user", (turns or [sample.messages[-1]["content"]])[-1])
    both = text_part("response", sample.response)
    if sample.base_response is not None:
        both += text_part("base response", sample.base_response)
    head = f"<header><strong>{number(numbers['score'])}</strong>{where}{marks}</header>"
    return f"<section class=sample>{head}{parts}<div class=both>{both}</div></section>"


def _next(view: _View) -> str:
    rejected = _count(sum(view.found.counts["rejected"].values()))
    vector = escaped(json.dumps(view.vector, ensure_ascii=False))
    return NEXT.format(folder=visible(view.found.folder.name), rejected=rejected, vector=vector, by=view.by)


def _count(value: int) -> str:
    return f"{value:,}"
