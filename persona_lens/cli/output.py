"""What the commands print: results to standard output as a table or JSON, everything else to standard error.

Knows nothing about how results are made.
"""

import io
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

    from persona_lens.evaluation.dose_response import DoseResponse
    from persona_lens.evaluation.evaluate import Evaluation
    from persona_lens.evaluation.layer_selection import LayerChoice, LayerSweep
    from persona_lens.traits.trait import Trait
    from persona_lens.vectors.persona_vectors import PersonaVectors

# What steers a terminal, turns text around, or is no text: a model's words may hold any of it.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def show_vectors(vectors: "PersonaVectors", *, as_json: bool) -> None:
    """Print the vectors by layer: norms and, where they were measured, the statistics."""
    from persona_lens.extraction.pipeline import best_layer

    if as_json:
        tell_json(vectors_as_json(vectors))
        return
    table = vectors.table()
    best = best_layer(vectors)
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
    tell(repr(vectors))
    print_table(head, [cells(layer, row) for layer, row in table.iterrows()])
    if best is not None:
        tell(f"* layer {best} separates held-out questions best (layers count from 0: the paper's layer {best + 1}).")


def vectors_as_json(vectors: "PersonaVectors") -> dict[str, Any]:
    """The vectors' table, counts and best layer by held-out AUC."""
    from persona_lens.extraction.pipeline import best_layer

    rows = records(vectors.table())
    return {"trait": vectors.trait, "counts": dict(vectors.counts), "best_layer": best_layer(vectors), "layers": rows}


def sweep_as_json(sweep: "LayerSweep", min_coherence: float = 75.0) -> dict[str, Any]:
    """A sweep's table, its choice (null where no cell is coherent enough) and what the screens are worth."""
    try:
        choice = asdict(sweep.best(min_coherence))
    except ValueError:
        choice = None
    return {
        "trait": sweep.trait,
        "judge": sweep.judge,
        "best": choice,
        "cells": records(sweep.table()),
        "screens": records(sweep.screen_correlations()),
    }


def records(table: "DataFrame") -> list[dict[str, Any]]:
    """A table's rows as JSON values; a number that is undefined is null."""
    return json.loads(table.reset_index().to_json(orient="records") or "[]")


def show_doses(sweep: "LayerSweep", trait: "Trait", *, min_coherence: float) -> None:
    """Print the chosen layer's dose-response, with a sentiment lexicon beside the judge where one is installed."""
    from persona_lens.judges.lexicon import SentimentJudge
    from persona_lens.judges.scores import score_rollouts
    from persona_lens.statistics import mean_estimate

    best = sweep.best(min_coherence)
    rows = []
    for coefficient, found in sweep.dose_response(best.layer).items():
        dose = sweep.doses.get((best.layer, coefficient), 0.0)
        cells = [f"{coefficient:g}", "" if dose is None else f"{dose:+.2f}", str(found.trait_score)]
        try:
            rollouts = [row.rollout for row in found.scored]
            scored = score_rollouts(SentimentJudge(), trait, rollouts, progress=False)
            questions = [row.rollout.question for row in scored]
            cells.append(str(mean_estimate([row.trait_score for row in scored], questions)))
        except ImportError:
            cells.append("")
        example = found.scored[0].rollout.response
        rows.append([*cells, str(found.coherence), shorten(example, 40, placeholder="...")])
    head = ["coefficient", "dose", f"{sweep.trait} [95 %]", "sentiment lexicon", "coherence", "first answer"]
    tell(f"\nSteering layer {best.layer}, with intervals over {len(sweep.baseline.questions)} questions:")
    print_table(head, rows)
    tell(f"{best.reason[0].upper()}{best.reason[1:]}.")


def show_sweep(sweep: "LayerSweep", best: "LayerChoice") -> None:
    """Print every layer with the trait score and mean coherence of each coefficient; the chosen layer has a star."""

    def shown(cell: "Evaluation") -> str:
        coherence = "-" if cell.coherence.value is None else f"{cell.coherence.value:.0f}"
        return f"{cell.trait_score} / {coherence}"

    head = ["layer", *(f"x {coefficient:g}: {sweep.trait} / coherence" for coefficient in sweep.coefficients)]
    rows = [["none", shown(sweep.baseline)]]
    for layer in sweep.layers:
        cells = [sweep.evaluations[layer, coefficient] for coefficient in sweep.coefficients]
        star = "*" * (layer == best.layer)
        rows.append([f"{star}{layer}", *map(shown, cells)])
    print_table(head, rows)


def show_confirmation(response: "DoseResponse") -> None:
    """Print what the chosen direction does on other questions, beside random directions of equal norm."""
    head = [
        "coefficient",
        "dose",
        f"{response.trait} [95 %]",
        "coherence",
        "random directions: mean (lowest to highest)",
    ]
    rows = []
    for found, row in zip(response.evaluations, records(response.table()), strict=True):
        dose = "" if row["dose"] is None else f"{row['dose']:+.2f}"
        known = row["random_mean"] is not None
        others = f"{row['random_mean']:.1f} ({row['random_low']:.1f} to {row['random_high']:.1f})" if known else "-"
        rows.append([f"{row['coefficient']:g}", dose, str(found.trait_score), str(found.coherence), others])
    n_questions = len(response.evaluations[0].questions)
    tell(f"\nConfirmed at layer {response.layer} on {n_questions} evaluation questions:")
    print_table(head, rows)
    tell(f"{response}.")


def show_screens(sweep: "LayerSweep") -> None:
    """Print how well each cheap screen ranks the layers as the sweep does."""
    table = sweep.screen_correlations()
    if all(row["spearman"] is None for row in records(table)):  # fewer than three layers have no ranks
        return
    print("\nSpearman of cheap screens with the swept trait score, over layers:")
    rows = [
        [
            str(name),
            *(
                "-" if row["low"] is None else f"{row['spearman']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
                for row in records(group)
            ),
        ]
        for name, group in table.groupby("screen", sort=False)
    ]
    print_table(["screen", *(f"x {coefficient:g}" for coefficient in sweep.coefficients)], rows)


def print_columns(texts: Mapping[str, str]) -> None:
    """Print texts side by side under their names."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True, expand=True)
    for name in texts:
        table.add_column(Text(plain(name)))
    table.add_row(*(Text(plain(text)) for text in texts.values()))  # a model's text is no markup
    Console(width=None if sys.stdout.isatty() else 160).print(table)


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
    """Print a plain table; no cell is markup, whatever brackets stand in it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in head:
        table.add_column(Text(plain(name)))
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def plain(text: str) -> str:
    r"""The text with whatever would steer a terminal written out, as `\x1b` for an escape."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def tell(text: object) -> None:
    """Print a result to standard output."""
    print(plain(str(text)))


def tell_json(value: Any) -> None:
    """Print a result as one line of JSON to standard output, with JSON's own escapes for what it cannot encode."""
    text = json.dumps(value, ensure_ascii=False)
    if not _encodable(text):
        text = json.dumps(value)
    print(_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _encodable(text: str) -> bool:
    """Whether standard output has all characters of a text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def escape_unencodable() -> None:
    r"""Let standard output and standard error write out what their encoding lacks, as `\u4e2d`, instead of raising.

    A console of Windows or of a C locale cannot show every text, and a command prints before all is written: an error
    there would lose the rest of its work.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whoever put something else there knows what it takes
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print to standard error."""
    print(plain(text), file=sys.stderr, flush=True)
