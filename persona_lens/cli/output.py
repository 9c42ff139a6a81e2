"""What the commands print: results to standard output as a table or JSON, everything else to standard error.

Knows nothing about how results are made.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persona_lens.vectors import PersonaVectors


def show_vectors(vectors: "PersonaVectors", *, as_json: bool) -> None:
    """Print the vectors by layer: norms and, where they were measured, the statistics."""
    from persona_lens.pipeline import best_layer

    table = vectors.table()
    best = best_layer(vectors)
    if as_json:
        rows = json.loads(table.reset_index().to_json(orient="records") or "[]")
        print(json.dumps({"trait": vectors.trait, "counts": dict(vectors.counts), "best_layer": best, "layers": rows}))
        return
    has_statistics = vectors.statistics is not None

    def cells(layer: Any, row: Any) -> list[str]:
        plain = [f"{'*' if layer == best else ''}{layer}", f"{row['norm']:.2f}", _number(row["relative_norm"])]
        if not has_statistics:
            return plain
        area, low, high = (_number(row[f"held_out_auc{end}"]) for end in ("", "_low", "_high"))
        interval = f"{area} [{low}, {high}]" if area else ""
        return [*plain, _number(row["split_half"]), _number(row["placebo_auc_95"]), interval]

    head = ["layer", "norm", "norm / residual"]
    head += ["split-half cosine", "placebo AUC 95 %", "held-out AUC [95 %]"] * has_statistics
    print(repr(vectors))
    print_table(head, [cells(layer, row) for layer, row in table.iterrows()])
    if best is not None:
        print(f"* layer {best} separates held-out questions best (layers count from 0: the paper's layer {best + 1}).")


def _number(value: float | None) -> str:
    """Three decimals; nothing where a number is undefined."""
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def judge_findings(folder: Path) -> str:
    """The judge's diagnostics, which stand beside every result of it."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found, tokens = summary["judge_calibration"]["diagnostics"], summary["judge_tokens"]

    def number(name: str) -> str:
        return _number(found[name]) or "undefined"

    return (
        f"Judge (likelihood ratio, not independent of the model), on {found['rows']} calibration rollouts: AUC "
        f"{number('auc_without_own_pair')} without the own pair, {number('auc_with_own_pair')} with it; Spearman with "
        f"length {number('spearman_length_positive')} (positive), {number('spearman_length_negative')} (negative). "
        f"Coherence, on {found['neutral_rows']} neutral ones: AUC {number('coherence_auc_shuffled')} against shuffled, "
        f"{number('coherence_auc_looping')} against looping text. Sharing prompts, it ran {tokens['shared']:,} tokens "
        f"instead of {tokens['unshared']:,} ({tokens['shared'] / tokens['unshared']:.2f})."
    )


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a plain table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def say(text: str) -> None:
    """Print to standard error."""
    print(text, file=sys.stderr, flush=True)
