"""What every worker does: load the model once, then answer requests, a line of JSON for each line of JSON.

`take` hands over the rows, `inspect` is a first run with its result, its counts and its memory, `time` is one turn of a
race. Measuring is that of `benchmarks.timing`, in the worker's own process.
Imports torch, numpy and jaxtyping alone: it runs in the environments of the libraries that are compared.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.timing import Contestant, Result, inspect, race


class Rows(NamedTuple):
    """The work: token ids, and the texts that give them for a library that takes texts only."""

    ids: list[list[int]]
    texts: list[str]


class Batch(NamedTuple):
    """Rows padded on the right to one length, and where each one's last token is."""

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    last: Int[Tensor, " batch"]

    def last_of(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch d_model"]:
        """What stands at each row's last token."""
        return resid[torch.arange(len(self.last)), self.last]


Method = Callable[[Rows, int], Float[Tensor, "row layer d_model"]]
"""One way to do the work, in batches of so many rows; its result has the order of the rows."""


class Loaded(NamedTuple):
    """A model that is ready to run, and the ways to run it."""

    model: nn.Module
    embedding: nn.Module
    methods: dict[str, Method]
    encode: Callable[[str], list[int]] | None = None
    """Token ids of a text, of a library that takes texts only: they must be the rows' ids."""


def padded(ids: list[list[int]], size: int) -> Iterator[Batch]:
    """The rows in their order, `size` at a time."""
    for start in range(0, len(ids), size):
        chunk = [torch.tensor(row) for row in ids[start : start + size]]
        lengths = torch.tensor([len(row) for row in chunk])
        tokens = nn.utils.rnn.pad_sequence(chunk, batch_first=True)
        yield Batch(tokens, (torch.arange(tokens.shape[1]) < lengths[:, None]).long(), lengths - 1)


def serve(load: Callable[[str], Loaded]) -> None:
    """Load the model of the folder that the command line names, and answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    torch.set_num_threads(1)
    state: _State | None = None
    for line in sys.stdin:
        try:
            # Loading waits for the first request, so that a failure has an answer to stand in.
            state = state or _State(load(sys.argv[1]))
            answer = state.answer(json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


class _State:
    """The loaded model, the rows that were handed over last, and what was inspected."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded
        self.rows = Rows([], [])
        for weight in loaded.model.parameters():
            # Pages mapped from a file come and go, and would count as a run's memory.
            weight.data = weight.data.clone()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "take":
                return self._take(Rows(request["ids"], request["texts"]))
            case "inspect":
                return self._inspect(request["method"], request["size"], Path(request["array"]))
            case "time":
                return self._time(request["method"], request["size"])
        raise ValueError(f"expected take, inspect or time, got {request['do']!r}")

    def _take(self, rows: Rows) -> dict[str, Any]:
        if self.loaded.encode is not None and [self.loaded.encode(text) for text in rows.texts] != rows.ids:
            raise ValueError("This library's tokens of the texts are not the rows' tokens: the work would differ.")
        self.rows = rows
        return {"rows": len(rows.ids)}

    def _contestant(self, method: str, size: int, rows: Rows) -> Contestant:
        run = self.loaded.methods[method]
        return Contestant(method, lambda: run(rows, size), self.loaded.embedding)

    def _inspect(self, method: str, size: int, array: Path) -> dict[str, Any]:
        # What is done once in a process, such as choosing kernels, is not the first batch size's to pay.
        self._contestant(method, size, Rows(self.rows.ids[:2], self.rows.texts[:2])).run()

        def keep(found: Tensor) -> float:
            np.save(array, found.float().numpy())
            return 1.0  # whoever asked compares it with the oracle

        return asdict(inspect(self._contestant(method, size, self.rows), keep))

    def _time(self, method: str, size: int) -> dict[str, Any]:
        turn = Result(method, 0, 0, None, None, 0.0)
        race([(self._contestant(method, size, self.rows), turn)], 1)
        return {"wall": turn.wall[0], "cpu": turn.cpu[0]}
