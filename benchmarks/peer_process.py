"""A worker process that has loaded the model and measures itself: requests and answers are lines of JSON.

Knows nothing about what the worker runs; `benchmarks.peer_workers.serving` is the other side.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


class WorkerProcess:
    """A context in which a command runs as a worker, with a home folder of its own and none of the caller's keys."""

    def __init__(self, name: str, command: Sequence[str | Path], *, directory: Path):
        self.name = name
        self._command = [str(part) for part in command]
        self._directory = directory

    def __enter__(self) -> Self:
        self._home = tempfile.TemporaryDirectory(prefix="peer-")
        self._errors = Path(self._home.name) / "stderr"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=self._directory,
                # A library finds no key to use, and leaves its settings and caches in a folder that goes away.
                env={"PATH": os.environ.get("PATH", ""), "HOME": self._home.name, "LANG": "C.UTF-8", **SETTINGS},
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # it has nothing to finish
        self._process.communicate()
        self._home.cleanup()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request. Raises RuntimeError with the worker's own words where it failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            raise RuntimeError(f"The worker of {self.name} ended with {code}:\n{self._errors.read_text()[-2000:]}")
        found = json.loads(answer)
        if "error" in found:
            raise RuntimeError(f"The worker of {self.name} failed:\n{found['error']}")
        return found
