"""The results as the tables of benchmarks/README.md: `python -m benchmarks.tables` writes them there.

Between the two marks of that page every figure comes from results.json, so that the two cannot differ.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.figures import distance, held_word, spread

PAGE = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"

GOALS = ("workload", "n", "faster", "than", "wall, paired", "CPU time, paired", "goal", "")
MEASURES = ("workload", "measure", "n", "median (lowest to highest)", "at most", "")
CONTESTANTS = (
    "workload",
    "contestant",
    "forwards",
    "padded tokens",
    "wall s, least / median",
    "CPU s",
    "1 - agreement",
)


def tables(results: dict[str, Any]) -> str:
    """Claims about who is faster, then single measures, then what every contestant did, as Markdown."""
    comparisons = results["comparisons"]
    claims = [_claim(each, claim) for each in comparisons for claim in each["claims"]]
    measures = [_measure(each, measure) for each in results["measures"] for measure in each["measures"]]
    contestants = [_contestant(each, one) for each in comparisons for one in each["contestants"]]
    return "\n\n".join(
        [
            "### Ratios\n\nHow many times faster, in turns of one round: the median (lowest to highest).",
            _table(GOALS, claims),
            "### Measures",
            _table(MEASURES, measures),
            "### Contestants\n\nAgreement is the least cosine with the oracle, or the share of equal rows.",
            _table(CONTESTANTS, contestants),
        ]
    )


def with_tables(page: str, results: dict[str, Any]) -> str:
    """The page with its tables made anew. ValueError where it lacks the marks that they stand between."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected {BEGIN!r} and then {END!r} in the page; put them where the tables belong.")
    return f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}"


def _claim(comparison: dict[str, Any], claim: dict[str, Any]) -> list[str]:
    cpu = spread(claim["paired_cpu"]) if claim["cpu_counts"] else "-"
    goal = "-" if claim["goal"] is None else f"{claim['goal']:.2f}"
    work = f"{comparison['name']}: {comparison['workload']}"
    return [
        work,
        str(comparison["repeats"]),
        claim["faster"],
        claim["than"],
        spread(claim["paired_wall"]),
        cpu,
        goal,
        held_word(claim["held"]),
    ]


def _measure(found: dict[str, Any], measure: dict[str, Any]) -> list[str]:
    values, limit = measure["values"], measure["limit"]
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    return [
        f"{found['name']}: {found['workload']}",
        measure["name"],
        str(len(values)),
        f"{median(values):.3g}{spread} {measure['unit']}".strip(),
        "-" if limit is None else f"{limit:g}",
        held_word(measure["held"]),
    ]


def _contestant(comparison: dict[str, Any], one: dict[str, Any]) -> list[str]:
    agreement = one["agreement"]
    return [
        f"{comparison['name']}: {comparison['tokens']} tokens",
        one["name"],
        str(one["forwards"]),
        str(one["padded_tokens"]),
        f"{min(one['wall']):.2f} / {median(one['wall']):.2f}",
        f"{median(one['cpu']):.2f}",
        distance(agreement),
    ]


def _table(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text("utf-8"), json.loads(RESULTS.read_text("utf-8"))), encoding="utf-8")
