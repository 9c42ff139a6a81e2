"""Units: the fixed micro-batches that a screening is cut into before anything else sees it, and their files.

A unit is up to 64 rows of about one length, in the order of their rows. It is scored as a whole, by whoever takes it,
so a row's numbers depend neither on what was interrupted nor on how many workers there are.
Knows nothing about models.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from math import ceil, log2
from pathlib import Path

import pyarrow as pa

from persona_lens.chat.batches import ChatTokens

UNIT_ROWS, UNIT_TOKENS = 64, 16384
# Units of one file: few enough that its index is small, many enough that a million rows are some hundred files.
FILE_UNITS = 256

_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("dataset", pa.string()),
        ("id", pa.string()),
        ("line", pa.int64()),
        ("prompt", _IDS),
        ("response", _IDS),
        ("skip", pa.int32()),
        ("base", _IDS),
        ("wants_base", pa.bool_()),
        ("cut", pa.bool_()),
        ("group", pa.int64()),
        ("family", pa.int64()),
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True)
class PlannedRow:
    """One sample as it will be scored.

    Attributes:
        row: Its number over all data sets.
        dataset: Its data set's name.
        id: Its own name.
        line: Where it stands in its data set, counted from 1.
        prompt: Token ids.
        response: Token ids, as far as they are read.
        skip: How many of the response's first tokens are not averaged.
        base: Token ids of the base model's response where the data brought one.
        wants_base: Whether it is to have a base response.
        cut: Whether the response was longer than what is read of it.
        group: The same for all rows that answer one prompt.
        family: The first row of those of which it is a near-duplicate; its own number for the first.
        text: The messages as JSON, with the response, and with the base response where the data brought one.
    """

    row: int
    dataset: str
    id: str
    line: int
    prompt: Sequence[int] = field(repr=False)
    response: Sequence[int] = field(repr=False)
    skip: int
    base: Sequence[int] | None = field(repr=False)
    wants_base: bool
    cut: bool
    group: int
    family: int
    text: str = field(repr=False)

    @property
    def tokens(self) -> ChatTokens:
        """Prompt and response."""
        return ChatTokens(tuple(self.prompt), tuple(self.response), self.skip)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


assert [each.name for each in fields(PlannedRow)] == SCHEMA.names


def length_bucket(n_tokens: int) -> int:
    """The bucket of a length; buckets are an eighth of an octave wide, so padding is at most 9 %."""
    return ceil(8 * log2(max(n_tokens, 1)))


def cut_units(rows: Iterable[PlannedRow]) -> Iterator[list[PlannedRow]]:
    """Units of rows as they fill, then what is left of neighbouring lengths; one unfinished unit a length is held.

    Rows that want a base response are in units of their own, so that answers are generated in whole batches.
    """
    filling: dict[tuple[bool, int], list[PlannedRow]] = defaultdict(list)
    for row in rows:
        place = row.wants_base, length_bucket(len(row))
        filling[place].append(row)
        if len(filling[place]) == unit_size(place[1]):
            yield filling.pop(place)
    left: list[PlannedRow] = []
    for (wants_base, bucket), unit in sorted(filling.items()):
        if left and (left[0].wants_base != wants_base or len(left) + len(unit) > unit_size(bucket)):
            yield left
            left = []
        left = left + unit
    if left:
        yield left


def unit_size(bucket: int) -> int:
    """How many rows a unit of a length has."""
    return min(UNIT_ROWS, max(1, UNIT_TOKENS // ceil(2 ** (bucket / 8))))


def write_units(folder: Path, units: Iterable[Sequence[PlannedRow]]) -> tuple[int, int]:
    """Write units into a new folder, some hundred to a file, one record batch each; gives how many units and rows."""
    folder.mkdir(parents=True)
    n_units = n_rows = 0
    writer: pa.ipc.RecordBatchFileWriter | None = None
    try:
        for unit in units:
            if n_units % FILE_UNITS == 0:
                if writer is not None:
                    writer.close()
                options = pa.ipc.IpcWriteOptions(compression="zstd")
                writer = pa.ipc.new_file(str(_path(folder, n_units)), SCHEMA, options=options)
            assert writer is not None
            writer.write_batch(pa.RecordBatch.from_pylist([_plain(row) for row in unit], schema=SCHEMA))
            n_units += 1
            n_rows += len(unit)
    finally:
        if writer is not None:
            writer.close()
    return n_units, n_rows


def _plain(row: PlannedRow) -> dict[str, object]:
    return {name: getattr(row, name) for name in SCHEMA.names}


def _path(folder: Path, unit: int) -> Path:
    return folder / f"units-{unit // FILE_UNITS:05d}.arrow"


def read_unit(folder: Path, number: int) -> list[PlannedRow]:
    """The rows of one unit."""
    return [PlannedRow(**row) for row in unit_batch(folder, number).to_pylist()]


def unit_batch(folder: Path, number: int) -> pa.RecordBatch:
    """The rows of one unit as they stand in its file."""
    with pa.OSFile(str(_path(folder, number))) as file, pa.ipc.open_file(file) as reader:
        return reader.get_batch(number % FILE_UNITS)


def spooled(rows: Iterable[PlannedRow], path: Path, *, each: Callable[[PlannedRow], None]) -> Iterator[PlannedRow]:
    """All rows again, after every one of them was told to `each`; they wait in a file, which is removed."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        waiting: list[dict[str, object]] = []
        for row in rows:
            each(row)
            waiting.append(_plain(row))
            if len(waiting) == 1000:
                writer.write_batch(pa.RecordBatch.from_pylist(waiting, schema=SCHEMA))
                waiting = []
        writer.write_batch(pa.RecordBatch.from_pylist(waiting, schema=SCHEMA))
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            yield from (PlannedRow(**row) for row in batch.to_pylist())
    path.unlink()
