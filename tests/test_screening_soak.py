"""Screening at size: a million rows with flat memory, and real rows under Ray whose processes are killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from persona_lens.screening.batches import scored_units
from persona_lens.screening.plan import RowChoice, make_plan, read_plan
from persona_lens.screening.run import finish, score_here, score_units
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests.processes import child_process
from tests.screening_cases import QUIET, StubScorer, assert_same_files, mood_rows, screened

N_ROWS = 1_000_000
# Below what a list of the rows' numbers alone would take: 8 bytes a row are 0.8 MB in 100,000.
FLAT = 1.0

pytestmark = pytest.mark.soak


class Memory:
    """Resident memory as rows go by."""

    def __init__(self) -> None:
        self.process, self.rows, self.megabytes = psutil.Process(), [0], [0.0]

    def note(self, row: int) -> None:
        if row - self.rows[-1] >= 10_000:
            self.rows.append(row)
            self.megabytes.append(self.process.memory_info().rss / 2**20)

    @property
    def slope(self) -> float:
        """MB for each 100,000 rows, over all but the first fifth, which fills caches."""
        settled = np.array(self.rows) > self.rows[-1] / 5
        return float(np.polyfit(np.array(self.rows)[settled], np.array(self.megabytes)[settled], 1)[0] * 100_000)


def mixture(memory: Memory) -> Iterator[dict[str, Any]]:
    """Synthetic rows of many lengths: parts of real responses, shuffled by number, so that few are repeats."""
    texts = [row["messages"] for row in mood_rows(300)]
    for number in range(N_ROWS):
        memory.note(number)
        messages = texts[number % len(texts)]
        words = texts[number * 7919 % len(texts)][-1]["content"].split()
        start = number % max(1, len(words) - 20)
        said = " ".join(words[start : start + 5 + number % 40]) + f" {number}"
        yield {"messages": [*messages[:-1], {"role": "assistant", "content": said}], "id": number}


def test_a_million_rows_take_no_more_memory_than_a_few_and_resume(embedded_directory, tmp_path):
    from transformers import AutoTokenizer

    tokenizer, planning, scoring = AutoTokenizer.from_pretrained(embedded_directory), Memory(), Memory()
    settings = {"vectors": ["any@14"], "fingerprints": ["none"], "base": "proxy"}
    began = time.process_time()
    plan = make_plan(tokenizer, 8192, {"mix": mixture(planning)}, RowChoice(), settings, tmp_path, **QUIET)
    planned, scored = time.process_time() - began, 0
    assert plan.n_rows == N_ROWS
    stops = StubScorer(stop_after=plan.n_units // 3)
    with pytest.raises(KeyboardInterrupt):
        score_units(plan, partial(score_here, stops.score, plan), **QUIET)
    assert len(scored_units(tmp_path)) == plan.n_units // 3

    def score(rows: Any) -> Any:
        nonlocal scored
        scored += len(rows)
        scoring.note(scored)
        return StubScorer().score(rows)

    score_units(plan, partial(score_here, score, plan), **QUIET)
    before = psutil.Process().memory_info().rss
    screening = finish(tmp_path)
    summary = (psutil.Process().memory_info().rss - before) / 2**20
    assert screening.rows.index.tolist() == list(range(N_ROWS))  # each once, in order
    print(f"{plan.n_units} units; planned in {planned:.0f} s, all in {time.process_time() - began:.0f} s of CPU time")
    print(f"MB for 100,000 rows: planning {planning.slope:.2f}, scoring {scoring.slope:.2f}; summary {summary:.0f} MB")
    assert planning.slope < FLAT
    assert scoring.slope < FLAT


# Few enough that a hundred rows are units enough to kill something between two of them.
UNIT_ROWS = 8
PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from persona_lens import load_model
from persona_lens.screening import batches
from persona_lens.screening.run import Workers, screen
from tests.test_screening_soak import UNIT_ROWS, arguments
batches.UNIT_ROWS = UNIT_ROWS
if __name__ == "__main__":
    model = load_model()
    data, vectors, choices = arguments(model, sys.argv[2])
    screen(model, data, vectors, output_dir=sys.argv[1], workers=Workers(2), progress=False, **choices)
"""


def arguments(model: Any, base: str) -> tuple[Any, Any, dict[str, Any]]:
    import torch

    rows = torch.randn(model.cfg.n_layers, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    vectors = PersonaVectors.from_directions(rows, trait="any", model=model)
    data = mood_rows(223)[:2000] if base == "proxy" else mood_rows(12)[:100]
    # Two thousand rows are read where a pass is short: which layer it is changes nothing of what is tested.
    layers = (1, 0) if base == "proxy" else (14, 9)
    return data, [vectors.at(layer) for layer in layers], {"base": base, "max_new_tokens": 32}


@pytest.mark.parametrize("base", ["proxy", "generate"])
def test_real_rows_under_actors_whose_processes_are_killed_are_those_of_the_plain_loop(
    embedded_bridge, tmp_path, base, monkeypatch
):
    monkeypatch.setattr("persona_lens.screening.batches.UNIT_ROWS", UNIT_ROWS)
    data, vectors, choices = arguments(embedded_bridge, base)
    plain = screened(embedded_bridge, data, tmp_path / "plain", vectors, **choices)
    folder = tmp_path / "ray"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder), base]
    n_units = read_plan(plain.folder).n_units

    def wait_for(process: subprocess.Popen[bytes], units: int) -> None:
        while process.poll() is None and len(scored_units(folder)) < units:
            time.sleep(0.2)
        assert process.poll() is None, "it ended before it could be killed"

    with child_process(command, env=environment) as driver:
        wait_for(driver, max(1, n_units // 5))
        named = psutil.process_iter(["cmdline"])
        worker = next(each for each in named if "MapWorker" in " ".join(each.info["cmdline"]))
        worker.send_signal(signal.SIGKILL)
        wait_for(driver, max(2, n_units // 2))
        driver.kill()
    kept = len(scored_units(folder))
    assert 0 < kept < n_units
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert_same_files(folder, plain.folder)
    assert finish(folder).rows.equals(plain.rows)
    print(f"{base}: {len(data)} rows in {n_units} units, {kept} of them kept by the killed driver")
