"""Run the benchmarks: `python -m benchmarks [NAME ...]`, where a name may be the beginning of several."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

# Read as torch and the hub client are first imported: one thread, and no download in the middle of a timing.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import typer
from rich.console import Console
from transformers.utils import logging

from benchmarks import (
    clients,
    decoding,
    demo,
    extraction,
    finetuning,
    growth,
    live,
    memory,
    peers,
    screening,
    startup,
    steering,
)
from benchmarks.report import Outcome, as_json, machine, merged, show

BENCHMARKS: dict[str, Callable[[int], Sequence[Outcome]]] = {
    "extraction-texts": extraction.extraction_texts,
    "extraction-hooked": extraction.extraction_hooked,
    "extraction-shared-prompts": extraction.extraction_shared_prompts,
    "steering-overhead": steering.steering_overhead,
    "layer-sweep": steering.layer_sweep,
    "live-monitoring": live.live_monitoring,
    "capture": live.capture,
    "training-step": finetuning.training_step,
    "screening-layers": screening.screening_layers,
    "client-throughput": clients.client_throughput,
    "decoding": decoding.decoding,
    "startup": startup.startup,
    "growth": growth.growth,
    "memory": memory.memory,
    "peers-short": peers.peers_short,
    "peers-texts": peers.peers_texts,
    "peers-long": peers.peers_long,
    "demo": demo.demo,  # last, since it takes the longest
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(BENCHMARKS)}; all without one.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which every contestant runs once.")] = 3,
    output: Annotated[
        Path | None, typer.Option(help="A JSON file for the results, which keeps those of benchmarks not run now.")
    ] = None,
) -> None:
    """Measure persona_lens. Exits with 1 where a result differs from the oracle; a missed goal is only printed."""
    unknown = [name for name in names or [] if not any(each.startswith(name) for each in BENCHMARKS)]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: expected one of {', '.join(BENCHMARKS)}, or a beginning.")
    earlier = None if output is None else _earlier(output)  # refused before minutes of work, not after
    chosen = [name for name in BENCHMARKS if not names or name.startswith(tuple(names))]
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    console = Console()
    console.width = max(console.width, 130)  # a pipe has no width of its own, and a cut number is no number
    started = time.perf_counter()
    outcomes: list[Outcome] = []
    for name in chosen:
        found = BENCHMARKS[name](repeats)
        if not found:
            console.print(f"{name}: skipped, what it measures is not installed (peers: make bench-peers).")
        for outcome in found:
            show(console, outcome)
        outcomes += found
    console.print(f"{time.perf_counter() - started:.0f} s in all.")
    if output is not None:
        output.write_text(json.dumps(merged(earlier, as_json(outcomes)), indent=2) + "\n")
    if unequal := [f"{outcome.name}: {each.name}" for outcome in outcomes for each in outcome.unequal]:
        console.print(f"[red]Not what it should be: {'; '.join(unequal)}")
        raise typer.Exit(1)


def _earlier(output: Path) -> dict[str, Any] | None:
    """The results that a file has already; refused where they come from another machine or other versions."""
    if not output.parent.is_dir():
        raise typer.BadParameter(f"{output.parent} is no folder: make it first.")
    if not output.exists():
        return None
    found: dict[str, Any] = json.loads(output.read_text("utf-8"))
    if found["machine"] != machine():
        raise typer.BadParameter(
            f"{output} has results of {found['machine']}, this is {machine()}: their seconds do not compare; "
            "name another file."
        )
    return found


if __name__ == "__main__":
    typer.run(main)
