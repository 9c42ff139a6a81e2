"""Answers that were paid for, kept in one SQLite file: each is committed as it comes, so a killed run loses none.

Knows nothing about servers: a key and an answer come in, and the answer comes out again.
"""

import sqlite3
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from persona_lens.clients.requests import ChatCompletion
from persona_lens.storage.files import DAMAGE, ensure_writable, refuse_link_to_nothing

FORMAT_VERSION = 1
TIMEOUT = 60.0
"""Seconds to wait for another process that writes."""


class CallCache:
    """Answers by their request's key. Threads and processes may share a file.

    Raises ValueError where the file is something else, and OSError where it cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        ensure_writable(self.path)
        refuse_link_to_nothing(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(self.path, timeout=TIMEOUT, isolation_level=None, check_same_thread=False)
        self._closing = weakref.finalize(self, self._connection.close)
        try:
            self._prepare()
        except sqlite3.OperationalError as error:
            self.close()
            raise OSError(f"Cannot use {self.path} as a cache of calls: {error}.") from error
        except sqlite3.DatabaseError as error:
            self.close()
            raise ValueError(f"{self.path} is not a cache of calls ({error}): name another file.") from error

    def _prepare(self) -> None:
        is_new = self._check()
        # With a write-ahead log a commit survives the process without waiting for the disk.
        self._use_log()
        self._connection.execute("PRAGMA synchronous = NORMAL")
        if is_new:
            # At once, so that nobody who opens the file meanwhile finds a table without a version.
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)")
            self._connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            self._connection.execute("COMMIT")

    def _check(self) -> bool:
        """Whether the file is empty; raises DatabaseError where it is no cache of this version. Only reads."""
        self._connection.execute("BEGIN")
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        tables = [name for (name,) in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        self._connection.execute("COMMIT")
        if (version, tables) not in [(0, []), (FORMAT_VERSION, ["answers"])]:
            found = "other tables" if version == FORMAT_VERSION else f"version {version}"
            raise sqlite3.DatabaseError(f"it has {found}, and this persona_lens reads version {FORMAT_VERSION}")
        return not tables

    def _use_log(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                # This one statement does not wait by itself for others who open the file.
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def get(self, key: str) -> ChatCompletion | None:
        """The answer to the request of this key, or None; raises ValueError where what is kept is no answer."""
        row = self._one("SELECT answer FROM answers WHERE key = ?", key)
        try:
            return None if row is None else ChatCompletion.from_json(row[0])
        except DAMAGE as error:
            raise ValueError(f"{self.path} has a damaged answer at {key}: move it away, or name another.") from error

    def put(self, key: str, completion: ChatCompletion) -> None:
        """Keep an answer; it is committed on return. A key that is there already keeps its first answer."""
        self._one("INSERT OR IGNORE INTO answers VALUES (?, ?)", key, completion.to_json())

    def __contains__(self, key: str) -> bool:
        return self._one("SELECT 1 FROM answers WHERE key = ?", key) is not None

    def __len__(self) -> int:
        return self._one("SELECT count(*) FROM answers")[0]

    def _one(self, statement: str, *values: str) -> Any:
        """The first row of a statement. Raises OSError where it cannot be written, ValueError where it is damaged."""
        try:
            with self._lock:
                return self._connection.execute(statement, values).fetchone()
        except sqlite3.OperationalError as error:
            raise OSError(
                f"Cannot use {self.path} as a cache of calls ({error}): free disk space, or see who else uses it, and "
                "run again, which pays for nothing twice that is there."
            ) from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is damaged ({error}): move it away, or name another file.") from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._closing()
