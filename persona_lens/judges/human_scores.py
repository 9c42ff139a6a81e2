"""Scores that people gave to rollouts, from a CSV file such as a spreadsheet writes.

Rows are joined to rollouts by `key`, or by `question` and `response`; an empty cell, or no row, is a missing score.
Knows nothing about judges: numbers come out, in the rollouts' order.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persona_lens.rollouts import Rollout
from persona_lens.statistics import on_scale


def read_human_scores(path: str | Path, rollouts: Sequence[Rollout], column: str) -> list[float | None]:
    """The scores, 0 to 100, in `column` of a CSV file, in the rollouts' order; None where a rollout has none.

    The file has a column `key` (`Rollout.key`), or else `question` and `response`, where line ends and outer space do
    not matter and a row scores every rollout with its text. Rows are counted as spreadsheets do: the names of the
    columns are row 1.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no CSV file, a column is absent, a row matches no rollout, two rows score the same text
            differently, or a score is not a number from 0 to 100.
    """
    table = _read(Path(path), column)
    by_key = "key" in table.columns
    wanted = [_name(rollout.key) if by_key else _name(rollout.question, rollout.response) for rollout in rollouts]
    scores: dict[tuple[str, ...], tuple[float | None, int]] = {}
    strangers: list[int] = []
    known = set(wanted)
    for row, cells in enumerate(table.to_dict("records"), start=2):
        if not any(cells.values()):
            continue
        name = _name(cells["key"]) if by_key else _name(cells["question"], cells["response"])
        score = _score(cells[column], f"{path}, row {row}, column {column!r}")
        if name not in known:
            strangers.append(row)
        elif name in scores and scores[name][0] != score:
            remedy = (
                "keep one of them"
                if by_key
                else "keep one of them, or tell rollouts of one text apart by a column 'key'"
            )
            raise ValueError(f"{path}, row {row}, scores what row {scores[name][1]} scores, and differently: {remedy}.")
        scores.setdefault(name, (score, row))
    if strangers:
        joined = "key" if by_key else "question and response"
        raise ValueError(
            f"{path}: {len(strangers)} rows match none of the {len(rollouts)} rollouts by {joined}, "
            f"the first of them row {strangers[0]}."
        )
    return [scores[name][0] if name in scores else None for name in wanted]


def _read(path: Path, column: str) -> Any:
    """The file as a table of text, with the columns that joining needs."""
    import pandas
    from pandas import errors

    if not path.exists():
        raise FileNotFoundError(f"No file {path}.")
    try:
        with warnings.catch_warnings():
            # Cells beyond the last column, which pandas would drop.
            warnings.simplefilter("error", errors.ParserWarning)
            # With the empty lines, so that rows keep their numbers; spreadsheets begin a file with a byte order mark.
            table = pandas.read_csv(
                path, dtype=str, keep_default_na=False, skip_blank_lines=False, index_col=False, encoding="utf-8-sig"
            )
    except (errors.ParserError, errors.ParserWarning, errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file that can be read: {error}.") from error
    there = list(table.columns)
    if column not in there:
        raise ValueError(f"{path} has no column {column!r}, only {there}.")
    if "key" not in there and not {"question", "response"} <= set(there):
        raise ValueError(f"{path} has neither a column 'key' nor both 'question' and 'response', only {there}.")
    return table


def _name(*texts: str) -> tuple[str, ...]:
    """Text as it is compared: spreadsheets change line ends and trim cells."""
    return tuple("\n".join(text.splitlines()).strip() for text in texts)


def _score(text: str, place: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = on_scale(float(text))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise ValueError(f"{place}: expected a number from 0 to 100, or nothing for a missing one, got {text!r}.")
    return value
