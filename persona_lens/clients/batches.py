"""Calls by the batch: files of requests for OpenAI's Batch API, which costs half, and its results back into the cache.

A request goes by its key, so what comes back is found by whoever asks the same client for the same thing; submitting
the files is the user's own step (`openai batches create`, or the web page).
Knows nothing about what the calls are for.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_lens.clients.cache import CallCache
from persona_lens.clients.requests import ChatCompletion, UnusableAnswer, read_completion
from persona_lens.storage.files import JsonLines, ensure_writable, write_whole

if TYPE_CHECKING:
    from persona_lens.clients.client import OpenAIClient
    from persona_lens.clients.requests import ChatRequest

MAX_REQUESTS = 50_000
MAX_BYTES = 200_000_000


class BatchResults(NamedTuple):
    """What a results file held: answers that went into the cache, and why others are none."""

    kept: int
    failed: dict[str, str]
    """The key of each failed request, and what the server said of it."""

    def __str__(self) -> str:
        if not self.failed:
            return f"{self.kept:,} answers"
        return f"{self.kept:,} answers, {len(self.failed):,} failed (such as: {next(iter(self.failed.values()))})"


def write_batch(
    client: "OpenAIClient",
    requests: Sequence["ChatRequest"],
    path: str | Path,
    *,
    max_requests: int = MAX_REQUESTS,
    max_bytes: int = MAX_BYTES,
) -> list[Path]:
    """Write the requests that the client's cache has no answer to, each once, and return the files.

    Where they pass the API's limits of one file, there are several: `name.jsonl`, `name-2.jsonl`, ... None is written
    where nothing is missing.

    Raises:
        ValueError: The client has no cache for the results to go to.
    """
    _require_cache(client)
    path = Path(path)
    ensure_writable(path)
    parts: list[list[bytes]] = []
    size = 0
    for request in client.uncached(requests):
        # What must come back is said by the name too: the results repeat nothing else of the request.
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
    """Put the answers of a results file into the client's cache; a failed request is reported, and asked for again.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The client has no cache, or a line is no result of a request that `write_batch` wrote.
        ServerError: Another model than the client's answered.
    """
    cache = _require_cache(client)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No batch results at {path}: download the batch's output file.")
    kept: dict[str, ChatCompletion] = {}
    failed: dict[str, str] = {}
    for number, row in enumerate(JsonLines(path).read(), start=1):
        named = re.fullmatch("([0-9a-f]{32})-(text|logprobs)", str(row.get("custom_id")))
        if named is None:
            raise ValueError(f"{path}, line {number}: not a result of these files ({row.get('custom_id')!r}).")
        try:
            completion = _completion(row, with_logprobs=named[2] == "logprobs")
        except UnusableAnswer as error:
            failed[named[1]] = str(error)
            continue
        client.endpoint.check(completion.model)
        kept[named[1]] = completion
    for key, completion in kept.items():
        cache.put(key, completion)
    return BatchResults(len(kept), failed)


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
