"""Rows that repeat others, detected while streaming: ids that were used before, and near-duplicates of a response.

Near-duplicates are found by MinHash over a response's runs of three words, in four bands of eight: two responses that
share a band are of one family. With a Jaccard index J of their runs they share one with probability 1 - (1 - J^8)^4:
.98 at .95, .89 at .9, .52 at .8, .02 at .5. What was seen is kept in a file, so memory does not grow with the rows.
"""

import hashlib
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from persona_lens.storage.text import missing_package

BANDS, BAND_ROWS = 4, 8
RUN_WORDS = 3


def require_datasketch() -> None:
    """Raise ImportError, with the command that installs it, where datasketch is missing."""
    if find_spec("datasketch") is None:
        raise ImportError(
            f"{missing_package('Detecting near-duplicates', 'datasketch', extra='screening')}, or screen without "
            "detecting them: rows=RowChoice(near_duplicates=False)."
        )


class Seen:
    """The ids and the bands of responses that were seen, each with the row (or line) that had it first."""

    def __init__(self, path: Path):
        self._path = path
        self._file = sqlite3.connect(path, isolation_level=None)
        with self._writing():
            # A scratch file, made anew when a plan is made anew: it needs no journal.
            for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -16000"):
                self._file.execute(f"PRAGMA {setting}")
            self._file.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, first INTEGER) WITHOUT ROWID")
            self._file.execute("BEGIN")

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
        self._path.unlink()

    def first_line(self, dataset: str, own_id: str, line: int) -> int:
        """The line of its data set at which an id stood first: this line where it is new."""
        return self._first(_key("id", dataset, own_id), line)

    def family(self, response: str, row: int) -> int:
        """The number of the first row that this response nearly repeats; its own number where there is none."""
        return min(self._first(band, row) for band in _bands(response))

    def _first(self, key: bytes, value: int) -> int:
        with self._writing():
            self._file.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, value))
            return self._file.execute("SELECT first FROM seen WHERE key = ?", (key,)).fetchone()[0]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(f"Cannot write {self._path} ({error}): free disk space and run again.") from error


def _bands(response: str) -> list[bytes]:
    """The keys under which a response is looked up; of a response without words, its text stands for its runs."""
    words = re.findall(r"\w+", response.casefold())
    runs = [" ".join(words[start : start + RUN_WORDS]) for start in range(max(1, len(words) - RUN_WORDS + 1))]
    hashes = _signature([run.encode() for run in (runs if words else [response])]).reshape(BANDS, BAND_ROWS)
    return [_key("band", str(number), band.tobytes().hex()) for number, band in enumerate(hashes)]


def _signature(runs: Sequence[bytes]) -> Any:
    from datasketch import MinHash

    minhash = MinHash(BANDS * BAND_ROWS, scheme="affine64", permutations=_permutations())
    minhash.update_batch(runs)
    return minhash.hashvalues


@cache
def _permutations() -> Any:
    """Drawn once: drawing them takes longer than hashing a response."""
    from datasketch import MinHash

    return MinHash(BANDS * BAND_ROWS, scheme="affine64").permutations


def _key(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).digest()
