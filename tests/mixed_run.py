"""Mixed commands and calls on the embedded model, over and over in one process, which tells what it holds.

`python -m tests.mixed_run FOLDER SECONDS` prints a line of JSON a round: memory, file handles, threads, hooks, files.
"""

import contextlib
import gc
import io
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

import persona_lens as pl

CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Well."}] for text in ("Hello.", "Why?")]
QUICK: dict[str, Any] = {"seed": 0, "progress": False}


def commands(folder: Path) -> Iterator[list[str]]:
    """What a user types; each loads the model anew."""
    vectors, chats = str(folder / "made" / "vectors.safetensors"), str(folder / "chats.jsonl")
    at = ["--vectors", vectors, "--layer", "19"]
    yield ["show", vectors]
    yield ["steer", "Hello?", *at, "--coefficient", "2", "--max-new-tokens", "8"]
    yield ["monitor", chats, *at, "--output", str(folder / "command" / "projections.jsonl")]
    yield ["screen", chats, *at, "--base", "proxy", "--output", str(folder / "command" / "screened")]
    yield ["report", str(folder / "made")]
    few = ["--n-questions", "1", "--per-question", "1", "--max-new-tokens", "8"]
    yield ["rollouts", "--trait", "evil", *few, "--output", str(folder / "command" / "rollouts.jsonl")]


def calls(model: Any, vectors: Any, trait: Any, judge: Any, folder: Path) -> list[Callable[[], object]]:
    """What a notebook runs on one model."""
    vector = vectors.at(19)
    asked = trait.evaluation_questions[10:12]

    def steered() -> None:
        # Suppressed outside of both contexts, so that the interrupt crosses them.
        with contextlib.suppress(KeyboardInterrupt), pl.steer(model, vector, 2.0), pl.ablate(model, vectors.at(9)):
            pl.generate_text(model, ["Hello?"] * 4, max_new_tokens=8)
            raise KeyboardInterrupt

    def trained() -> None:
        tuned = pl.finetune(
            model, [{"messages": chat} for chat in CHATS], output=folder / "tuned", max_length=64, **QUICK
        )
        with pl.adapted(model, tuned.adapter):
            pl.generate_text(model, ["Hello?"], max_new_tokens=4)

    def watched() -> None:
        for _ in zip(range(3), pl.stream_watched(model, CHATS[0][:1], vector, max_new_tokens=8), strict=False):
            pass  # left in the middle, as a reader does who has seen enough

    def evaluated() -> None:
        how: dict[str, Any] = {
            "questions": asked,
            "per_question": 1,
            "max_new_tokens": 8,
            "output_dir": folder / "evaluated",
        }
        pl.evaluate(model, trait, judge=judge, interventions=[pl.Steer(vector, 1.0)], **how, **QUICK)

    return [
        steered,
        watched,
        evaluated,
        trained,
        lambda: pl.monitor(model, CHATS, vector, progress=False),
        lambda: pl.screen(
            model, [{"messages": chat} for chat in CHATS], vector, max_new_tokens=4, output_dir=folder / "rows", **QUICK
        ),
        lambda: pl.measure_capability(model, pl.mmlu_sample()[:2], progress=False),
        lambda: extract(model, trait, judge, folder / "extracted"),
    ]


def extract(model: Any, trait: Any, judge: Any, folder: Path) -> Any:
    """A run of a few rollouts."""
    return pl.extract_persona_vectors(
        model,
        trait,
        judge=judge,
        questions=trait.extraction_questions[:3],
        per_question=1,
        max_new_tokens=12,
        min_pairs=1,
        output_dir=folder,
        **QUICK,
    )


def held(model: Any, folder: Path) -> dict[str, float]:
    """What the process holds."""
    gc.collect()
    process = psutil.Process()
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return {
        "rss_mib": process.memory_info().rss / 2**20,
        "handles": process.num_fds(),
        "threads": process.num_threads(),
        "hooks": hooks,
        "files": sum(1 for _ in folder.rglob("*")),
    }


def main(folder: Path, seconds: float) -> None:
    """Rounds until the time is over: each a command, then every call."""
    from persona_lens.cli import main as command

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    model, trait = pl.load_model("smollm2-135m-instruct"), pl.load_trait("optimistic")
    judge = pl.LikelihoodRatioJudge(model, calibration_questions=2, contrast_pairs=2)
    vectors = extract(model, trait, judge, folder / "made")
    began = time.monotonic()
    for number, typed in enumerate(itertools.cycle(commands(folder))):
        if time.monotonic() - began > seconds:
            return
        (folder / "command").mkdir()
        sys.argv = ["persona-lens", *typed]
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                command()
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"{typed} ended with {ended.code}: {said.getvalue()[-2000:]}") from ended
        for call in calls(model, vectors, trait, judge, folder / "work"):
            call()
        shutil.rmtree(folder / "work", ignore_errors=True)
        shutil.rmtree(folder / "command", ignore_errors=True)
        took = time.monotonic() - began
        print(
            json.dumps({"round": number, "command": typed[0], "seconds": round(took), **held(model, folder)}),
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
