"""Units: the fixed micro-batches that a screening is cut into, and their files before and after they are scored.

A unit is up to 64 rows of about one length, in the order of their rows. It is scored as a whole, so a row's numbers
depend neither on what was interrupted nor on how many workers there are. Before, it is a record batch of the plan with
token ids; after, it is a Parquet file of its own in `scores/` with texts and scores, which is there whole or not at
all. The scored units are the files that are there: nothing else records them, and nothing is joined at the end.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import ceil, log2
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from persona_lens.chat.batches import ChatTokens
from persona_lens.screening.samples import Sample
from persona_lens.storage.files import DAMAGE, write_whole

UNIT_ROWS, UNIT_TOKENS = 64, 16384
# Files that are read at once: pyarrow keeps the footer of each in memory until all of them are read.
READ_FILES = 256
SCORES = "scores"
ENDS = ("response", "prompt", "base")
TEXTS = ("messages", "response", "base_response")

_IDS = pa.list_(pa.int32())
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_IDENTITY = [("row", pa.int64()), ("dataset", pa.string()), ("id", pa.string()), ("line", pa.int64())]
_TEXTS = [("messages", _MESSAGES), ("response", pa.string()), ("base_response", pa.string())]
_FAMILIES = [("cut", pa.bool_()), ("group", pa.int64()), ("family", pa.int64())]
_TOKENS = [("prompt_ids", _IDS), ("response_ids", _IDS), ("skip", pa.int32()), ("wants_base", pa.bool_())]
PLAN_SCHEMA = pa.schema([*_IDENTITY, *_TEXTS, *_TOKENS, *_FAMILIES])


@dataclass(frozen=True)
class PlannedRow:
    """One sample as it will be scored.

    Attributes:
        sample: The sample; its messages begin with the system prompt that was chosen for rows without one.
        chat: Its token ids, as far as they are read.
        wants_base: Whether it is to have a base response.
        cut: Whether the response was longer than what is read of it.
        group: The same for all rows that answer one prompt.
        family: The first row of those of which it is a near-duplicate; its own number for the first.
    """

    sample: Sample
    chat: ChatTokens = field(repr=False)
    wants_base: bool
    cut: bool
    group: int
    family: int

    def __len__(self) -> int:
        return len(self.chat)


class RowScore(NamedTuple):
    """What was measured of a row; projections stand in the order of the vectors."""

    response: tuple[float, ...]
    prompt: tuple[float, ...]
    base: tuple[float, ...] | None = None
    """None where the row has no base response, or an empty one."""
    base_tokens: int | None = None
    base_response: str | None = None
    """The base response where it was generated here."""


ScoreRows = Callable[[Sequence[PlannedRow]], list[RowScore]]
"""Scores the rows of a unit, in their order."""


def length_bucket(n_tokens: int) -> int:
    """The bucket of a length; buckets are an eighth of an octave wide, so padding is at most 9 %."""
    return ceil(8 * log2(max(n_tokens, 1)))


def unit_size(bucket: int) -> int:
    """How many rows a unit of a length has."""
    return min(UNIT_ROWS, max(1, UNIT_TOKENS // ceil(2 ** (bucket / 8))))


def cut_units(rows: Iterable[PlannedRow]) -> Iterator[list[PlannedRow]]:
    """Units of rows as they fill, then the rest, where neighbouring lengths share a unit.

    No more is in memory than one unfinished unit of each length. Rows that want a base response are in units of their
    own, so that base responses are generated in whole batches.
    """
    filling: dict[tuple[bool, int], list[PlannedRow]] = defaultdict(list)
    for row in rows:
        place = row.wants_base, length_bucket(len(row))
        filling[place].append(row)
        if len(filling[place]) == unit_size(place[1]):
            yield filling.pop(place)
    rest: list[PlannedRow] = []
    for (wants_base, bucket), unit in sorted(filling.items()):
        if rest and (rest[0].wants_base != wants_base or len(rest) + len(unit) > unit_size(bucket)):
            yield rest
            rest = []
        rest = rest + unit
    if rest:
        yield rest


# The plan's file


def write_units(path: Path, units: Iterable[Sequence[PlannedRow]]) -> tuple[int, int]:
    """Write units into a new file, one record batch each; returns how many units and rows there are."""
    n_units = n_rows = 0
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, PLAN_SCHEMA, options=options) as writer:
        for unit in units:
            records = []
            for row in unit:
                tokens = {"prompt_ids": row.chat.prompt, "response_ids": row.chat.response, "skip": row.chat.skip}
                records.append({**vars(row.sample), **vars(row), **tokens})
            writer.write_batch(pa.RecordBatch.from_pylist(records, schema=PLAN_SCHEMA))
            n_units += 1
            n_rows += len(unit)
    return n_units, n_rows


def read_unit(path: Path, number: int) -> list[PlannedRow]:
    """The rows of one unit of a file of units."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
        records = reader.get_batch(number).to_pylist()
    rows = []
    for record in records:
        chat = ChatTokens(tuple(record["prompt_ids"]), tuple(record["response_ids"]), record["skip"])
        marks = {name: record[name] for name in ("wants_base", "cut", "group", "family")}
        rows.append(PlannedRow(sample_of(record), chat, **marks))
    return rows


def spooled(rows: Iterable[PlannedRow], path: Path, *, note: Callable[[PlannedRow], None]) -> Iterator[PlannedRow]:
    """All rows again, after `note` has seen every one of them; meanwhile they are in a file, which is then removed."""

    def batches() -> Iterator[list[PlannedRow]]:
        stream = iter(rows)
        while batch := list(islice(stream, 1000)):
            for row in batch:
                note(row)
            yield batch

    n_batches, _ = write_units(path, batches())
    for number in range(n_batches):
        yield from read_unit(path, number)
    path.unlink()


def sample_of(record: Mapping[str, Any]) -> Sample:
    """The sample of a row that was read from the plan or the scores."""
    columns = {name: record[name] for name in ("row", "dataset", "id", "line", "response")}
    messages = tuple(dict(message) for message in record["messages"])
    return Sample(**columns, messages=messages, base_response=record["base_response"] or None)


# The scores' files


def projection_columns(vectors: Sequence[str]) -> list[str]:
    """The columns of projections: `evil@19.response`, `.prompt` and `.base` for every vector."""
    return [f"{vector}.{end}" for vector in vectors for end in ENDS]


def score_schema(vectors: Sequence[str]) -> pa.Schema:
    """The columns of scored units, in order."""
    lengths = [("unit", pa.int64()), *((f"{name}_tokens", pa.int32()) for name in ("prompt", "response", "base"))]
    projections = [(name, pa.float64()) for name in projection_columns(vectors)]
    return pa.schema([*_IDENTITY, *lengths, *_FAMILIES, *projections, *_TEXTS])


def score_file(output: Path, unit: int) -> Path:
    """The file of a scored unit."""
    return output / SCORES / f"unit-{unit:07d}.parquet"


def scored_units(output: Path) -> list[int]:
    """The units whose scores are there, in order."""
    names = (path.name for path in (output / SCORES).glob("unit-*.parquet"))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"unit-(\d{7,})\.parquet", name)))


def write_scores(
    output: Path, unit: int, rows: Sequence[PlannedRow], scores: Sequence[RowScore], vectors: Sequence[str]
) -> None:
    """Write the file of a scored unit, whole or not at all; it is on the disk before this returns."""
    records = []
    for row, score in zip(rows, scores, strict=True):
        lengths = {"prompt_tokens": len(row.chat.prompt), "response_tokens": row.chat.n_averaged}
        ends = (score.response, score.prompt, score.base or [None] * len(vectors))
        measured = [values[place] for place in range(len(vectors)) for values in ends]
        record = {**vars(row.sample), **vars(row), **lengths, "unit": unit, "base_tokens": score.base_tokens}
        record |= dict(zip(projection_columns(vectors), measured, strict=True))
        if score.base_response is not None:
            record["base_response"] = score.base_response
        records.append(record)
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(records, schema=score_schema(vectors)), sink, compression="zstd")
    write_whole(score_file(output, unit), sink.getvalue().to_pybytes())


def read_files(
    files: Sequence[Path], columns: Sequence[str], schema: pa.Schema | None = None, rows: Sequence[int] | None = None
) -> pa.Table:
    """Columns of some files, of all their rows or of these, sorted by `row`; the other columns are not read.

    Raises ValueError for a file that cannot be read.
    """
    tables = []
    kind = "ipc" if files[0].suffix == ".arrow" else "parquet"
    only = None if rows is None else pyarrow.dataset.field("row").isin(list(map(int, rows)))
    for start in range(0, len(files), READ_FILES):
        names = [str(path) for path in files[start : start + READ_FILES]]
        try:
            dataset = pyarrow.dataset.dataset(names, schema=schema, format=kind)
            tables.append(dataset.to_table(columns=list(columns), filter=only))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"The scores in {files[start].parent} cannot be read ({error}): take them from a copy, or delete the "
                "damaged file and screen again, which scores what is missing."
            ) from error
    return pa.concat_tables(tables).sort_by("row")


def read_samples(files: Sequence[Path], rows: Sequence[int]) -> list[Sample]:
    """The samples of these rows out of files of scores, sorted by `row`; raises ValueError where one is damaged."""
    records = read_files(files, ["row", "dataset", "id", "line", *TEXTS], rows=rows).to_pylist()
    try:
        return [sample_of(record) for record in records]
    except DAMAGE as error:
        raise ValueError(f"The texts in {files[0].parent} are damaged ({error!r}): take them from a copy.") from error
