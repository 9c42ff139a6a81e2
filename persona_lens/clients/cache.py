"""Paid answers in one SQLite file, each committed as it comes; and the files of OpenAI's Batch API, at half the price.

A batch file holds the requests that the cache has no answer to, named by their keys; `read_batch` puts the results into
the cache. Submitting a file is the user's own step (`openai batches create`, or the web page).
"""

import json
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_lens.clients.requests import ChatCompletion, ChatRequest, UnusableAnswer, read_completion
from persona_lens.storage.files import DAMAGE, JsonLines, ensure_writable, refuse_link_to_nothing, write_whole

if TYPE_CHECKING:
    from persona_lens.clients.client import OpenAIClient

FORMAT_VERSION = 1
TIMEOUT = 60.0
"""Seconds to wait for another process that writes."""
MAX_REQUESTS = 50_000
MAX_BYTES = 200_000_000


class CallCache:
    """Answers by the key of their request. Threads and processes may share a file.

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
            # In one transaction, so that whoever opens the file meanwhile never sees a table without a version.
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
            difference = "other tables" if version == FORMAT_VERSION else f"version {version}"
            raise sqlite3.DatabaseError(f"it has {difference}, and this persona_lens reads version {FORMAT_VERSION}")
        return not tables

    def _use_log(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                # SQLite's own timeout does not cover this statement.
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def get(self, key: str) -> ChatCompletion | None:
        """The answer to the request of this key, None without one; raises ValueError for a damaged one."""
        row = self._one("SELECT answer FROM answers WHERE key = ?", key)
        try:
            return None if row is None else ChatCompletion.from_json(row[0])
        except DAMAGE as error:
            raise ValueError(f"{self.path} has a damaged answer at {key}: move it away, or name another.") from error

    def put(self, key: str, completion: ChatCompletion) -> None:
        """Keep an answer, committed on return. A key that is there already keeps its first answer."""
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
                "run again; what is there is not paid for twice."
            ) from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is damaged ({error}): move it away, or name another file.") from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._closing()


class BatchResults(NamedTuple):
    """How many answers went into the cache, and the server's message by the key of each failed request."""

    kept: int
    failed: dict[str, str]

    def __str__(self) -> str:
        failed = f", {len(self.failed):,} failed (such as: {next(iter(self.failed.values()))})" if self.failed else ""
        return f"{self.kept:,} answers{failed}"


def write_batch(
    client: "OpenAIClient",
    requests: Sequence[ChatRequest],
    path: str | Path,
    *,
    max_requests: int = MAX_REQUESTS,
    max_bytes: int = MAX_BYTES,
) -> list[Path]:
    """Write the requests that the client's cache has no answer to, each once, and return the files.

    Beyond the API's limits of one file there are several: `name.jsonl`, `name-2.jsonl`, ... Nothing is written where
    nothing is missing. Raises ValueError for a client without a cache.
    """
    _require_cache(client)
    path = Path(path)
    ensure_writable(path)
    parts: list[list[bytes]] = []
    size = 0
    for request in client.uncached(requests):
        # The results repeat nothing of the request but its name, which therefore says what must come back.
        name = f"{client.key(request)}-{'text' if request.top_logprobs is None else 'logprobs'}"
        line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": client.body(request)}
        row = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        if not parts or len(parts[-1]) >= max_requests or size + len(row) > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += len(row)
    files = [path if part == 0 else path.with_stem(f"{path.stem}-{part + 1}") for part in range(len(parts))]
    for file, rows in zip(files, parts, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, b"".join(rows))
    return files


def read_batch(client: "OpenAIClient", path: str | Path) -> BatchResults:
    """Put the answers of a results file into the client's cache; a failed request is reported and may be asked again.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The client has no cache, or a line is no result of a request that `write_batch` wrote.
        ServerError: Another model than the client's answered.
    """
    cache = _require_cache(client)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No batch results at {path}: download the batch's output file.")
    answers: dict[str, ChatCompletion] = {}
    failed: dict[str, str] = {}
    for number, row in enumerate(JsonLines(path).read(), start=1):
        name = re.fullmatch("([0-9a-f]{32})-(text|logprobs)", str(row.get("custom_id")))
        if name is None:
            raise ValueError(f"{path}, line {number}: not a result of these files ({row.get('custom_id')!r}).")
        try:
            completion = _completion(row, with_logprobs=name[2] == "logprobs")
        except UnusableAnswer as error:
            failed[name[1]] = str(error)
            continue
        client.endpoint.check(completion.model)
        answers[name[1]] = completion
    for key, completion in answers.items():
        cache.put(key, completion)
    return BatchResults(len(answers), failed)


def _completion(row: dict[str, Any], *, with_logprobs: bool) -> ChatCompletion:
    response = row.get("response") or {}
    body = response.get("body") or {}
    error = row.get("error") or body.get("error")
    if error or response.get("status_code") != 200:
        said = error.get("message") if isinstance(error, dict) else error
        raise UnusableAnswer(f"status {response.get('status_code')}: {said or 'no message'}")
    return read_completion(json.dumps(body), with_logprobs=with_logprobs)


def _require_cache(client: "OpenAIClient") -> CallCache:
    if client.cache is None:
        raise ValueError("Batch results go to the client's cache, and it has none: pass OpenAIClient(cache='...').")
    return client.cache
