"""The scores of a run: a log that grows unit by unit while they are made, and the table that they end up in.

Each line of the log is a whole unit, so what was interrupted is scored again and nothing is half there; any number of
processes may each keep a log of their own. The table has one row for each sample, in the order of the data.
Knows nothing about models.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from persona_lens.screening.batches import PlannedRow
from persona_lens.screening.plan import Plan
from persona_lens.screening.scoring import RowScore
from persona_lens.storage.files import JsonLines, empty_folder, room_for, whole_file

TABLE = "scores.parquet"
ENDS = ("response", "prompt", "base")
N_FIELDS = len(RowScore._fields)
# A row group of the table; what is held in memory at once.
CHUNK = 65536


LOG_FIELDS = ("unit", "rows")
"""What every line of a log has."""


def log_path(output: Path, shard: tuple[int, int]) -> Path:
    """The log of one shard of so many, counted from 0."""
    number, count = shard
    return output / ("scored.jsonl" if count == 1 else f"scored-{number}-of-{count}.jsonl")


def log_unit(log: JsonLines, unit: int, scores: list[RowScore]) -> None:
    """Keep the scores of a unit; they are on the disk before this returns."""
    log.append([{"unit": unit, "rows": scores}])


def scored_units(output: Path) -> set[int]:
    """The units that stand in any log of the run."""
    return {line["unit"] for path in _logs(output) for line in _lines(path)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The units of a log. Raises ValueError that names the line where it is none."""
    for number, line in enumerate(JsonLines(path).stream(), start=1):
        unit, rows = line.get("unit"), line.get("rows")
        whole = isinstance(rows, list) and all(isinstance(row, list) and len(row) == N_FIELDS for row in rows)
        if type(unit) is not int or not whole:
            raise ValueError(f"{path}, line {number}: not the scores of a unit: copy the file again, or run anew.")
        yield line


def _logs(output: Path) -> list[Path]:
    return sorted(output.glob("scored*.jsonl"))


def columns(vectors: Sequence[str]) -> list[str]:
    """The table's columns of projections."""
    return [f"{vector}.{end}" for vector in vectors for end in ENDS]


def write_table(output: Path, plan: Plan, vectors: Sequence[str]) -> None:
    """Join the plan with the scores of all logs and write the table, whole or not at all.

    Memory is bounded by a chunk of rows, however many there are: rows are first dealt out to chunks on the disk.
    """
    schema = table_schema(vectors)
    scratch = empty_folder(output / ".chunks.unfinished")
    try:
        with room_for(output / TABLE), whole_file(output / TABLE, "name another output") as unfinished:
            chunks = _dealt(_records(output, plan, vectors), schema, scratch)
            with pyarrow.parquet.ParquetWriter(unfinished, schema, compression="zstd") as writer:
                for path in chunks:
                    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
                        writer.write_table(reader.read_all().sort_by("row"), row_group_size=CHUNK)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def table_schema(vectors: Sequence[str]) -> pa.Schema:
    """The columns of the table, in order."""
    return pa.schema(
        [
            ("row", pa.int64()),
            ("dataset", pa.string()),
            ("id", pa.string()),
            ("line", pa.int64()),
            ("unit", pa.int64()),
            ("prompt_tokens", pa.int32()),
            ("response_tokens", pa.int32()),
            ("base_tokens", pa.int32()),
            ("cut", pa.bool_()),
            ("group", pa.int64()),
            ("family", pa.int64()),
            *((name, pa.float64()) for name in columns(vectors)),
            ("base_response", pa.string()),
        ]
    )


def _records(output: Path, plan: Plan, vectors: Sequence[str]) -> Iterator[dict[str, Any]]:
    done: set[int] = set()
    for path in _logs(output):
        for line in _lines(path):
            unit = line["unit"]
            # Shards that were cut another way may have scored a unit twice, to the same numbers.
            if unit not in done:
                done.add(unit)
                scores = [RowScore(*row) for row in line["rows"]]
                for row, score in zip(plan.unit(unit), scores, strict=True):
                    yield _record(unit, row, score, vectors)


def _record(unit: int, row: PlannedRow, score: RowScore, vectors: Sequence[str]) -> dict[str, Any]:
    if row.row != score.row:
        raise ValueError(f"Unit {unit} was scored for row {score.row}, and the plan has row {row.row}: run anew.")
    measured = {"response": score.response, "prompt": score.prompt, "base": score.base or [None] * len(vectors)}
    return {
        "row": row.row,
        "dataset": row.dataset,
        "id": row.id,
        "line": row.line,
        "unit": unit,
        "prompt_tokens": len(row.prompt),
        "response_tokens": len(row.response) - row.skip,
        "base_tokens": score.base_tokens,
        "cut": row.cut,
        "group": row.group,
        "family": row.family,
        **{f"{name}.{end}": measured[end][place] for place, name in enumerate(vectors) for end in ENDS},
        "base_response": score.base_response,
    }


def _dealt(records: Iterable[Mapping[str, Any]], schema: pa.Schema, folder: Path) -> list[Path]:
    """Records dealt out by their rows to files of a chunk each, in the order of the chunks."""
    waiting: dict[int, list[Mapping[str, Any]]] = {}
    writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
    with ExitStack() as stack:

        def write(chunk: int) -> None:
            if chunk not in writers:
                file = stack.enter_context(pa.OSFile(str(folder / f"{chunk:09d}.arrow"), "wb"))
                writers[chunk] = stack.enter_context(pa.ipc.new_stream(file, schema))
            writers[chunk].write_batch(pa.RecordBatch.from_pylist(waiting.pop(chunk), schema=schema))

        for record in records:
            chunk = record["row"] // CHUNK
            waiting.setdefault(chunk, []).append(record)
            if len(waiting[chunk]) == 1000:
                write(chunk)
        for chunk in list(waiting):
            write(chunk)
    return sorted(folder.glob("*.arrow"))
