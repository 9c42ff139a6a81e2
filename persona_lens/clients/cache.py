"""Answers that were paid for, kept in one SQLite file: each is committed as it comes, so a killed run loses none.

Knows nothing about servers: a key and an answer come in, and the answer comes out again.
"""

import sqlite3
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path

from persona_lens.clients.requests import ChatCompletion
from persona_lens.records import ensure_writable

FORMAT_VERSION = 1


class CallCache:
    """Answers by their request's key. Threads and processes may share a file.

    Raises ValueError where the file is something else, and OSError where it cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        ensure_writable(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        self._closing = weakref.finalize(self, self._connection.close)
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            self.close()
            raise ValueError(f"{self.path} is not a cache of calls ({error}): name another file.") from error

    def _prepare(self) -> None:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version != FORMAT_VERSION and (version or tables):
            raise sqlite3.DatabaseError(f"version {version}, and this persona_lens reads {FORMAT_VERSION}")
        # With a write-ahead log a commit survives the process without waiting for the disk.
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)")
        self._connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")

    def get(self, key: str) -> ChatCompletion | None:
        """The answer to the request of this key, or None."""
        with self._lock:
            row = self._connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else ChatCompletion.from_json(row[0])

    def put(self, key: str, completion: ChatCompletion) -> None:
        """Keep an answer; it is committed on return. A key that is there already keeps its first answer."""
        with self._lock:
            self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, completion.to_json()))

    def count(self, keys: Iterable[str]) -> int:
        """How many of these keys have an answer."""
        return sum(key in self for key in keys)

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return self._connection.execute("SELECT 1 FROM answers WHERE key = ?", (key,)).fetchone() is not None

    def __len__(self) -> int:
        with self._lock:
            return self._connection.execute("SELECT count(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._closing()
