"""Comparisons and measures as tables for people and as JSON for comparing runs.

Knows nothing about how they were made. The machine is described by its processor, without names or paths.
"""

import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.comparison import Comparison, Verdict
from benchmarks.figures import distance, held_word, spread
from benchmarks.measures import Measure, Measures
from benchmarks.timing import Result

Outcome = Comparison | Measures
"""What a benchmark gives."""


def show(console: Console, outcome: Outcome) -> None:
    """Print what a benchmark gave."""
    if isinstance(outcome, Measures):
        _show_measures(console, outcome)
    else:
        _show_comparison(console, outcome)


def _show_measures(console: Console, found: Measures) -> None:
    """Each measure as its median (lowest to highest), with its limit."""
    table = Table(title=f"{found.name}: {found.workload}", title_justify="left")
    table.add_column("measure")
    for heading in ("median", "lowest to highest", "n", "unit", "at most", "", "1 - agreement"):
        table.add_column(heading, justify="right")
    for measure in found.measures:
        values = measure.values
        table.add_row(
            measure.name,
            f"{median(values):.3g}",
            f"{min(values):.3g} to {max(values):.3g}" if len(values) > 1 else "",
            str(len(values)),
            measure.unit,
            "-" if measure.limit is None else f"{measure.limit:g}",
            held_word(measure.held),
            distance(measure.agreement),
        )
    console.print(table)


def _show_comparison(console: Console, comparison: Comparison) -> None:
    """The contestants with what they did, then the claims: paired ratios as median (lowest to highest)."""
    work = comparison.workload
    title = f"{comparison.name}: {work.name}, {work.n_tokens} real tokens, n = {comparison.repeats}"
    table = Table(title=title, title_justify="left")
    table.add_column("contestant")
    for heading in ("min s", "median s", "CPU s", "tokens/s", "padded", "forwards", "peak MiB", "1 - agreement"):
        table.add_column(heading, justify="right")
    for result in comparison.results:
        table.add_row(result.name, *_times(result, work.n_tokens), *_facts(result))
    for result in comparison.tried:
        table.add_row(f"{result.name} (tried once)", "", "", f"{result.first_cpu:.2f}", "", *_facts(result))
    console.print(table)

    claims = Table()
    for heading in ("faster", "than"):
        claims.add_column(heading)
    for heading in ("paired ratio", "in CPU time", "of medians", "goal", ""):
        claims.add_column(heading, justify="right")
    for verdict in comparison.verdicts:
        claims.add_row(verdict.faster, verdict.than, *_ratios(verdict))
    console.print(claims)


def _times(result: Result, n_tokens: int) -> list[str]:
    times = [min(result.wall), median(result.wall), median(result.cpu)]
    return [*(f"{seconds:.2f}" for seconds in times), f"{n_tokens / median(result.wall):.0f}"]


def _facts(result: Result) -> list[str]:
    peak = "-" if result.peak_extra_mib is None else f"{result.peak_extra_mib:.0f}"
    return [str(result.padded_tokens), str(result.forwards), peak, distance(result.agreement)]


def _ratios(verdict: Verdict) -> list[str]:
    return [
        *map(spread, (verdict.paired_wall, verdict.paired_cpu)),
        f"{verdict.ratio_of_medians:.3f}",
        "-" if verdict.goal is None else f"{verdict.goal:.2f}",
        held_word(verdict.held),
    ]


def as_json(outcomes: list[Outcome]) -> dict[str, Any]:
    """Everything that was measured, with the machine and the libraries."""
    comparisons = [each for each in outcomes if isinstance(each, Comparison)]
    measured = [each for each in outcomes if isinstance(each, Measures)]
    return {
        "format_version": 1,
        "machine": machine(),
        "comparisons": [
            {
                "name": comparison.name,
                "workload": comparison.workload.name,
                "rows": len(comparison.workload.rows),
                "tokens": comparison.workload.n_tokens,
                "repeats": comparison.repeats,
                "minimum_agreement": comparison.minimum,
                "contestants": [asdict(result) for result in comparison.results],
                "tried_once": [asdict(result) for result in comparison.tried],
                "claims": [asdict(verdict) | {"held": verdict.held} for verdict in comparison.verdicts],
            }
            for comparison in comparisons
        ],
        "measures": [
            {
                "name": found.name,
                "workload": found.workload,
                "minimum_agreement": found.minimum,
                "measures": [_as_values(measure) for measure in found.measures],
            }
            for found in measured
        ],
    }


def merged(earlier: dict[str, Any] | None, later: dict[str, Any]) -> dict[str, Any]:
    """Both files' results; where both have a workload, the later's, in the earlier's place."""
    if earlier is None:
        return later
    both = dict(later)
    for kind in ("comparisons", "measures"):
        found = {(each["name"], each["workload"]): each for each in earlier[kind]}
        found |= {(each["name"], each["workload"]): each for each in later[kind]}
        both[kind] = list(found.values())
    return both


def _as_values(measure: Measure) -> dict[str, Any]:
    return asdict(measure) | {"median": median(measure.values), "held": measure.held}


def machine() -> dict[str, Any]:
    """The processor, its cores, and the versions that the numbers depend on."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    libraries = ("torch", "transformers", "transformer-lens", "persona-lens")
    return {
        "processor": named[0] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{library: version(library) for library in libraries},
    }
