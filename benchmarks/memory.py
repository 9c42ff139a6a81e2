"""The memory that extraction takes beyond the loaded model: against the bare forward's, and as rollouts grow in number.

Each peak is one of a fresh process, since freed memory that a process keeps would hide what is taken next. The limit
is for the process as a user has it; since glibc keeps holes there, of another size in every run, the same is measured
where large blocks go back as they are freed, which shows what the code holds. The shared prompts' keys and values are
held on purpose, and counted apart: of the prompts that run together, and a copy for each row that goes on from them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants import bare_hugging_face
from benchmarks.extraction import _double, _hugging_face, bridge
from benchmarks.measures import Measure, Measures
from benchmarks.oracle import minimum_cosine, oracle_means
from benchmarks.texts import Workload, many_rollouts
from benchmarks.timing import peak_extra_mib
from persona_lens.activations.means import stream_means
from persona_lens.models.memory import default_token_budget

ROWS = (64, 2048)
PROMPT_TOKENS, RESPONSE_TOKENS = 24, 8
BARE_ROWS = 64
"""The bare forward's peak is that of its largest batch: more batches of one size only take longer."""
LIMIT_MIB, FLAT_MIB = 64.0, 16.0
CHECKED_ROWS = 4


@dataclass(frozen=True)
class Peak:
    """Of one process, in MiB above the loaded model; what it gave agrees with the oracle so far."""

    extra_mib: float
    cache_mib: float
    """The most keys and values held at a time, of prompts that continuations share and of those continuations."""
    agreement: float | None = None


def memory(repeats: int) -> list[Measures]:
    """Extraction of few rollouts and of many, each beside the bare forward with as many tokens a batch."""
    found = [_measures("as it is", {}, repeats, LIMIT_MIB, FLAT_MIB)]
    found.append(_measures("blocks returned as they are freed", {"MALLOC_MMAP_THRESHOLD_": "65536"}, repeats))
    return [each for each in found if each is not None]


def _measures(
    named: str, settings: dict[str, str], repeats: int, limit: float | None = None, flat: float | None = None
) -> Measures | None:
    bare, *found = ([_in_a_process(rows, settings) for _ in range(repeats)] for rows in (0, *ROWS))
    if any(peak is None for peaks in (bare, *found) for peak in peaks):
        return None  # nothing outside Linux
    measures = [Measure("bare forward", [peak.extra_mib for peak in bare if peak], "MiB")]
    for rows, peaks in zip(ROWS, found, strict=True):
        pairs = [(peak, plain) for peak, plain in zip(peaks, bare, strict=True) if peak and plain]
        agreement = min(peak.agreement or 0.0 for peak, _ in pairs)
        beside = [peak.extra_mib - plain.extra_mib - peak.cache_mib for peak, plain in pairs]
        measures += [
            Measure(f"{rows} rollouts", [peak.extra_mib for peak, _ in pairs], "MiB", agreement=agreement),
            Measure(f"{rows} rollouts, keys and values held", [peak.cache_mib for peak, _ in pairs], "MiB"),
            Measure(f"{rows} rollouts, beside these and the bare forward", beside, "MiB", limit),
        ]
    grown = [many.extra_mib - few.extra_mib for few, many in zip(*found, strict=True) if few and many]
    measures.append(Measure(f"{ROWS[1]} rollouts over {ROWS[0]}", grown, "MiB", flat))
    work = f"10 a prompt, {PROMPT_TOKENS} + {RESPONSE_TOKENS} tokens, {named}"
    return Measures("Memory of extraction", work, measures)


def _in_a_process(rows: int, settings: dict[str, str]) -> Peak | None:
    """The peak of extracting so many rollouts, or of the bare forward for 0; None where it cannot be measured."""
    command = [sys.executable, "-m", "benchmarks.memory", str(rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ | settings)
    found = json.loads(done.stdout.splitlines()[-1])
    return None if found is None else Peak(**found)


def bare_peak() -> Peak | None:
    """Of the Hugging Face decoder, in batches of as many tokens as extraction takes at a time."""
    workload = _workload(BARE_ROWS)
    size = default_token_budget(bridge()) // (PROMPT_TOKENS + RESPONSE_TOKENS)
    contestant = bare_hugging_face(_hugging_face(), workload, size)
    with peak_extra_mib() as peak:
        contestant.run()
    return Peak(peak[0], 0.0) if peak else None


def extraction_peak(n_rows: int) -> Peak | None:
    """Of `stream_means`; the first rows' means are kept, and the others let go, as extraction spools them."""
    workload = _workload(n_rows)
    kept: dict[int, Tensor] = {}
    with _held_caches(bridge()) as held, peak_extra_mib() as peak:
        for batch in stream_means(bridge(), workload.rows):
            for row, means in zip(batch.rows, batch.means, strict=True):
                if row < CHECKED_ROWS:
                    kept[row] = means[1:].clone()
    if not peak:
        return None
    found = torch.stack([kept[row] for row in range(CHECKED_ROWS)])
    expected = torch.stack([oracle_means(_double(), row) for row in workload.rows[:CHECKED_ROWS]])
    return Peak(peak[0], max(held) / 2**20, minimum_cosine(found, expected, workload.positive[:CHECKED_ROWS]))


@contextmanager
def _held_caches(model: Any) -> Iterator[list[int]]:
    """Bytes of keys and values after each pass: the prompts' and, where rows go on from them, those rows' own."""
    held: list[int] = []
    of_prompts = 0

    def count(_decoder: Any, _args: Any, given: dict[str, Any], _out: Any) -> None:
        nonlocal of_prompts
        if (cache := given.get("past_key_values")) is None:
            return
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        if given["attention_mask"].shape == given["input_ids"].shape:  # nothing was cached before this pass
            of_prompts = size
            held.append(size)
        else:
            held.append(of_prompts + size)

    handle = model.original_model.get_decoder().register_forward_hook(count, with_kwargs=True)
    try:
        yield held
    finally:
        handle.remove()


def _workload(n_rows: int) -> Workload:
    return many_rollouts(
        bridge().tokenizer,
        n_rows,
        per_prompt=10,
        n_prompt_tokens=PROMPT_TOKENS,
        n_response_tokens=RESPONSE_TOKENS,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = int(sys.argv[1])
    found = extraction_peak(asked) if asked else bare_peak()
    print(json.dumps(found and asdict(found)))
