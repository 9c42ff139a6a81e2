"""What `persona-lens screen` says of a finished screening: tables, pages, splits, and a threshold that was passed."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from persona_lens.cli.output import print_table, records, say, tell, tell_json

if TYPE_CHECKING:
    from persona_lens.monitoring.thresholds import Threshold
    from persona_lens.screening.result import By, Screening

PASSED = 3
"""The exit code where a data set's score passes the threshold that the user set."""


Judging = Callable[["Screening", Sequence[int] | None], Any]
"""A judge's scores of a screening's samples."""


class Asked(NamedTuple):
    """What is done with a finished screening."""

    by: "By | None"
    benign: str | None
    percentile: float
    split: int | None
    judge_top: int | None
    fail_above: float | None
    as_json: bool


def report(found: "Screening", asked: Asked, judge: Judging | None) -> None:
    """Print what was found, write the pages and splits, and exit with 3 where a set's score passes --fail-above."""
    if asked.benign is not None and asked.benign not in found.datasets:
        raise typer.BadParameter(f"--benign {asked.benign} is none of the sets: {', '.join(found.datasets)}")
    thresholds = _thresholds(found, asked)
    rows = _rows(found, asked, thresholds)
    flagged = None
    if judge is not None:
        top = None if asked.judge_top is None else _top(found, asked, asked.judge_top)
        from persona_lens.screening.filtering import count_flagged

        flagged = records(count_flagged(found, thresholds, judged=judge(found, top), by=asked.by).set_index("dataset"))
    if asked.as_json:
        tell_json({"counts": found.counts, "by": asked.by or found.by, "sets": rows, "flagged": flagged})
    else:
        _show(found, asked, rows, flagged)
    _write(found, asked, thresholds)
    if asked.fail_above is not None and (passed := _first_above(rows, asked.benign, asked.fail_above)):
        say(f"persona-lens: {passed}")
        raise typer.Exit(PASSED)


def _first_above(rows: list[dict[str, Any]], benign: str | None, limit: float) -> str | None:
    """One sentence about the first set whose score is above a limit, the benign one apart; None where there is none.

    Raises ValueError where a set has no score, which is no proof of a low one.
    """
    held = [row for row in rows if row["dataset"] != benign]
    for row in held:
        if row["score"] is not None and row["score"] > limit:
            score = f"its score on {row['vector']} is {row['score']:.3f}"
            return f"{row['dataset']}: {score}, above the threshold of {limit:g}."
    if silent := [row for row in held if row["score"] is None]:
        raise ValueError(
            f"{silent[0]['dataset']}: no sample has a score on {silent[0]['vector']} to hold against --fail-above: "
            "raise --base-fraction, or report another form --by."
        )
    return None


def _thresholds(found: "Screening", asked: Asked) -> "dict[str, Threshold]":
    """The benign percentile for every vector, kept in the run's folder; none without benign chats."""
    if asked.benign is None:
        return {}
    from persona_lens.monitoring.thresholds import save_thresholds

    each = {
        name: found.threshold(name, benign=asked.benign, percentile=asked.percentile, by=asked.by)
        for name in found.vectors
    }
    save_thresholds(found.folder, each.values())
    return each


def _rows(found: "Screening", asked: Asked, thresholds: "dict[str, Threshold]") -> list[dict[str, Any]]:
    """A row for every set and vector: its score, its controls, and the share of samples above the threshold."""
    scores, controls = records(found.dataset_scores(asked.by)), records(found.controls(asked.by))
    rows = []
    for score, control in zip(scores, controls, strict=True):
        row = {name: score[name] for name in ("dataset", "vector", "n", "missing", "score", "low", "high")}
        row |= {name: control[name] for name in ("spearman_length", "repeated", "score_without_repeats")}
        if thresholds:
            of_set: Any = found.score(row["vector"], asked.by)[found.rows["dataset"] == row["dataset"]]
            values = of_set.dropna()
            row["above"] = float((values > thresholds[row["vector"]].value).mean()) if len(values) else None
        rows.append(row)
    return rows


def _top(found: "Screening", asked: Asked, n: int) -> list[int]:
    """The highest samples on any of the vectors."""
    each = [found.ranking(name, asked.by).index[:n].tolist() for name in found.vectors]
    return sorted({row for rows in each for row in rows})


def _show(found: "Screening", asked: Asked, rows: list[dict[str, Any]], flagged: list[dict[str, Any]] | None) -> None:
    head = ["set", "vector", "n", "without a score", f"{asked.by or found.by} [95 %]"]
    head += ["above the benign threshold"] * (asked.benign is not None) + ["Spearman with length", "repeats"]
    table = []
    for row in rows:
        interval = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
        cells = [row["dataset"], row["vector"], str(row["n"]), str(row["missing"])]
        cells.append("-" if row["score"] is None else f"{row['score']:.2f}{interval}")
        cells += ["-" if row["above"] is None else f"{row['above']:.1%}"] if "above" in row else []
        table.append([*cells, _decimals(row["spearman_length"]), f"{row['repeated']:.1%}"])
    print_table(head, table)
    if flagged:
        names = ("n", "unscored", "projection", "judge", "union", "both")
        print_table(["set", *names], [[row["dataset"], *(str(row[name]) for name in names)] for row in flagged])
    counts = found.counts
    tell(f"Of {counts['read']} rows {counts['planned']} were screened, {counts['cut']} of them cut.")
    lost = [f"{count} {what}" for what, count in (*counts["rejected"].items(), *counts["left_out"].items())]
    if lost:
        tell(f"Not screened: {', '.join(lost)}; what was rejected is listed in {found.folder / 'rejects.jsonl'}.")


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _write(found: "Screening", asked: Asked, thresholds: "dict[str, Threshold]") -> None:
    """A page for every vector, and then the splits, for which there may be too few samples."""
    from persona_lens.screening.filtering import write_split
    from persona_lens.storage.files import write_whole

    endings = {name: f"-{re.sub(r'[^a-zA-Z0-9@._-]', '_', name)}" for name in found.vectors}
    if len(found.vectors) == 1:
        endings = dict.fromkeys(found.vectors, "")
    try:
        from persona_lens.pages.screening import screening_html

        for name, own in endings.items():
            page = screening_html(found, vector=name, by=asked.by, threshold=thresholds.get(name))
            write_whole(found.folder / f"report{own}.html", page.encode())
            say(f"The page is {found.folder / f'report{own}.html'}.")
    except ImportError as error:
        say(f"No page: {error}")
    if asked.split is None:
        return
    # What a split is held against is no candidate for training.
    table: Any = found.rows
    candidates = table.index[table["dataset"] != asked.benign].tolist()
    for name, own in endings.items():
        folder = found.folder / f"split{own}"
        paths = write_split(found, folder, asked.split, vector=name, by=asked.by, rows=candidates)
        say(f"{name}: the highest, random and lowest samples are in {', '.join(map(str, paths.values()))}.")
