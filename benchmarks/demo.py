"""`persona-lens demo`, from its start to its last line: where its time goes, against the bare generation of its texts.

The demo runs in a fresh process, with a clock around its stages; what a stage contains of another counts for that one
alone. The same prompts are then generated once more, in the same batches, with nothing steered, read or judged.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from benchmarks.measures import Measure, Measures

LIMIT = 3.0
EQUAL_ROWS = 0.98
"""Of the texts that the demo did not steer."""

STAGES = {
    "persona_lens.cli.options.LoadOptions.load_by_name": "loading",
    "persona_lens.rollouts.engines.generate": "generation",
    "persona_lens.extraction.pipeline.calibrate": "calibration",
    "persona_lens.judges.likelihood_ratio.mean_log_likelihoods": "likelihoods",
    "persona_lens.extraction.pipeline.score_rollouts": "judging",
    "persona_lens.evaluation.evaluate.score_rollouts": "judging",
    "persona_lens.extraction.extract._spool_means": "extraction",
    "persona_lens.extraction.extract._statistics": "statistics",
    "persona_lens.evaluation.layer_selection.evaluate_cells": "sweep",
    "persona_lens.evaluation.layer_selection.likelihood_ratio_changes": "screens",
    "persona_lens.cli.vectors.show_vectors": "report",
    "persona_lens.cli.vectors.judge_diagnostics": "report",
    "persona_lens.cli.vectors.show_doses": "report",
}
"""Functions as they are looked up where the demo calls them, and the stage that each is."""


@dataclass
class Clock:
    """CPU seconds of each stage, named by the stages around it, from the process's start on."""

    seconds: dict[str, float] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)
    last: float = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is run inside counts for this stage, and no longer for the one around it."""
        self.tick()
        self.open.append(name)
        try:
            yield
        finally:
            self.tick()
            self.open.pop()

    def tick(self) -> None:
        """Book the time since the last tick."""
        now = time.process_time()
        name = " > ".join(self.open) or "the rest"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a stage."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return run


@dataclass
class Call:
    """What the demo asked `generate` for, and what it got."""

    prompts: list[Sequence[int]]
    settings: dict[str, Any]
    completions: list[Any]

    def again(self, generate: Callable[..., Any], model: Any) -> list[Any]:
        """The same prompts, with nothing attached to the model and nothing read."""
        wanted = ["max_new_tokens", "temperature", "top_p", "seed", "batch_size"] + ["keys"] * self.plain
        return generate(model, self.prompts, **{name: self.settings[name] for name in wanted})

    @property
    def plain(self) -> bool:
        """Whether rows had keys of their own, which the steered rows of a sweep have not."""
        return len(set(self.settings["keys"])) == len(self.prompts)


def bare_generation(calls: Sequence[Call], generate: Callable[..., Any], model: Any) -> dict[str, Any]:
    """CPU seconds and tokens of all calls made again, and the share of rows of plain calls that have the same text."""
    started = time.process_time()
    found = [call.again(generate, model) for call in calls]
    seconds = time.process_time() - started
    equal = [
        one.tokens == other.tokens
        for call, done in zip(calls, found, strict=True)
        if call.plain
        for one, other in zip(call.completions, done, strict=True)
    ]
    return {
        "bare_seconds": seconds,
        "bare_tokens": sum(map(sampled_tokens, found)),
        "agreement": sum(equal) / len(equal),
    }


def sampled_tokens(completions: Sequence[Any]) -> int:
    """Tokens that were sampled, the one that ended a turn included."""
    return sum(len(each.tokens) + (each.finish_reason == "stop") for each in completions)


def demo(repeats: int) -> list[Measures]:
    """One run, whatever the repeats: it takes minutes."""
    command = [sys.executable, "-m", "benchmarks.demo"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return [as_measures(json.loads(done.stdout.splitlines()[-1]))]


def as_measures(found: Mapping[str, Any]) -> Measures:
    """The stages with their shares, and the ratio."""
    total, bare = sum(found["stages"].values()), found["bare_seconds"] / found["bare_tokens"]
    stages = sorted(found["stages"].items(), key=lambda item: -item[1])
    measures = [Measure(f"{name}: {seconds / total:.1%}", [seconds], "CPU s") for name, seconds in stages]
    measures += [
        Measure("all stages", [total], "CPU s"),
        Measure("bare generation", [found["bare_seconds"]], "CPU s", agreement=found["agreement"]),
        # Steered texts end elsewhere than plain ones, so the bare time is that of as many tokens.
        Measure("demo over the bare generation of as many tokens", [total / (bare * found["tokens"])], "times", LIMIT),
    ]
    tokens = f"{found['tokens']} tokens sampled, {found['bare_tokens']} by the bare generation"
    return Measures("persona-lens demo", tokens, measures, minimum=EQUAL_ROWS)


def staged_demo() -> dict[str, Any]:
    """Run the demo and then the bare generation, in this process."""
    from persona_lens.cli import vectors
    from persona_lens.cli.options import LoadOptions
    from persona_lens.models.loading import load_model
    from persona_lens.rollouts import engines

    clock, calls, generate = Clock(), [], engines.generate

    def recorded(model: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Any]:
        done = generate(model, prompts, **settings)
        calls.append(Call(list(prompts), settings, done))
        return done

    with ExitStack() as stack, TemporaryDirectory() as folder:
        for target, name in STAGES.items():
            function = recorded if name == "generation" else resolve_name(target)
            stack.enter_context(patch(target, clock.timed(name, function)))
        clock.seconds["start and imports"] = clock.last = time.process_time()
        vectors.demo(LoadOptions(threads=1), output=Path(folder))
        clock.tick()
    tokens = sum(sampled_tokens(call.completions) for call in calls)
    return {"stages": clock.seconds, "tokens": tokens, **bare_generation(calls, generate, load_model())}


if __name__ == "__main__":
    print("\n" + json.dumps(staged_demo()))
