"""Faults for tests: another process that holds a lock, memory that fails, and a disk that is full.

persona_lens is imported as a function runs: the jaxtyping hook instruments the package as it is first imported.
"""

import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import child_process

HOLD = """
import fcntl, json, os, socket, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
file.flush()
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(lock: Path) -> Iterator[int]:
    """A process that holds a lock file; gives its number."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-S", "-c", HOLD, str(lock)]
    with child_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """The kernel lets no file of this process grow beyond so many bytes, as a full disk would not."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own in a new folder; skips where mounting is not permitted."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        # Lazily: an error keeps files open as long as its traceback lasts.
        subprocess.run(["umount", "--lazy", folder], check=True)


def small_memory(forward: Callable[..., Any], most_rows: int, sizes: list[int]) -> Any:
    """A forward pass for which memory suffices for so many rows; notes the rows of each pass that it ran."""

    def run(model: Any, tokens: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if len(tokens) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        sizes.append(len(tokens))
        return forward(model, tokens, *arguments, **options)

    return run
