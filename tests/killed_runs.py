"""Runs on a tiny model that are killed at random moments, again and again, and go on until they are done.

`python -m tests.killed_runs KIND FOLDER SEED KILLS` makes a run in FOLDER/whole that nothing disturbs, and runs in
FOLDER/0, FOLDER/1, ... until KILLS processes were killed at work and the last run has ended; it prints what it did, as
JSON. Each process is a fork of one that has loaded everything, so that a run lasts about a second.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests import tiny


def extraction(model: Any, folder: Path) -> None:
    """Rollouts with their means, judged by the model itself, and vectors of what is kept."""
    from persona_lens import extract_persona_vectors
    from persona_lens.judges.likelihood_ratio import LikelihoodRatioJudge
    from persona_lens.rollouts.engines import ModelEngine
    from tests.evaluation_cases import TRAIT, make_calibration

    judge = LikelihoodRatioJudge(model, batch_size=3)
    judge.calibrations[TRAIT.name] = make_calibration()
    engine = ModelEngine(model, max_new_tokens=12, batch_size=3)
    # Random weights show no trait: a mild rule leaves a few pairs.
    keep = {"threshold": 40.0, "min_coherence": 0.0, "min_pairs": 1}
    extract_persona_vectors(
        model, TRAIT, judge=judge, engine=engine, per_question=4, output_dir=folder, progress=False, **keep
    )


def sweep(model: Any, folder: Path) -> None:
    """Two layers at two coefficients."""
    from persona_lens.evaluation.layer_selection import select_layer
    from tests.evaluation_cases import SHORT, TRAIT, LetterJudge
    from tests.intervention_cases import some_vectors

    choices = {"layers": [2, 0], "coefficients": (2.0, -1.0), "batch_size": 3, "per_question": 4, **SHORT}
    vectors = some_vectors(model)
    select_layer(model, vectors, TRAIT, judge=LetterJudge(batch_size=3), output_dir=folder, **choices)


def screening(model: Any, folder: Path) -> None:
    """Rows in units of four, with base responses that the model makes."""
    from persona_lens.screening import batches as units
    from persona_lens.screening.run import screen
    from tests.screening_cases import QUIET, pair_of_vectors, rows

    units.UNIT_ROWS = 4
    screen(model, rows(60), pair_of_vectors(model), output_dir=folder, max_new_tokens=6, **QUIET)


def training(model: Any, folder: Path) -> None:
    """Six steps with dropout, a checkpoint after each."""
    from tests.finetuning_cases import train

    train(model, output=folder, checkpoint_every=1, dropout=0.2)


KINDS: dict[str, Callable[[Any, Path], None]] = {
    "extraction": extraction,
    "sweep": sweep,
    "screening": screening,
    "training": training,
}


class StoppedClock(datetime):
    """For the one thing in a file that says when it was made."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        """Always the same moment."""
        return datetime(2020, 1, 1, tzinfo=UTC)


def load() -> Any:
    """The tiny model."""
    from persona_lens.models.loading import bridge_from_transformers
    from persona_lens.vectors import provenance

    provenance.datetime = StoppedClock  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = tiny.tokenizer(Path(scratch))
        return bridge_from_transformers(tiny.llama(tokenizer), tokenizer)


def start(run: Callable[[Any, Path], None], model: Any, folder: Path) -> int:
    """Fork a process that makes the run; gives its number."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            run(model, folder)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def ended(child: int) -> None:
    """Wait for a process; AssertionError where it failed. It is killed where this one is interrupted."""
    try:
        _, status = os.waitpid(child, 0)
    except BaseException:
        kill(child)
        raise
    assert os.waitstatus_to_exitcode(status) == 0, "a run failed by itself"


def kill(child: int) -> None:
    """Kill a process and wait for its end."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main(kind: str, folder: Path, seed: int, kills: int) -> dict[str, Any]:
    """The whole run, and the killed ones; gives how many kills there were, and on how many runs."""
    run, model, draw = KINDS[kind], load(), random.Random(seed)
    run(model, folder / "warm")  # here, so that what it imports is there in every fork
    begun = time.monotonic()
    ended(start(run, model, folder / "whole"))
    lasts = time.monotonic() - begun
    survived, runs, at_work = 0, 0, 0
    while survived < kills:
        output = folder / str(runs)
        for _ in range(draw.randint(2, 6)):
            child = start(run, model, output)
            try:
                time.sleep(draw.uniform(0.02, 0.8) * lasts)
            except BaseException:
                kill(child)
                raise
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                break  # it ended before
            at_work += output.exists() and any(output.iterdir())
            kill(child)
            survived += 1
        ended(start(run, model, output))
        runs += 1
    return {"kind": kind, "seed": seed, "kills": survived, "of them with files begun": at_work, "runs": runs}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
