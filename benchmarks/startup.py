"""How long a user waits before anything happens: whole processes, from their start to their end.

Seconds are the CPU time of the process, user and system, since its wall time also has its neighbours in it.
"""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.measures import Measure, Measures

IMPORT_LIMIT, HELP_LIMIT = 0.3, 0.6
MINIMUM_ROUNDS = 7
"""A process of a tenth of a second is too short for a few rounds."""


def startup(repeats: int) -> list[Measures]:
    """An empty Python process, `import persona_lens`, and `persona-lens --help`, in turn."""
    script = Path(sys.executable).with_name("persona-lens")
    processes: dict[str, tuple[list[str], float | None]] = {
        "python -c pass": ([sys.executable, "-c", "pass"], None),
        "import persona_lens": ([sys.executable, "-c", "import persona_lens"], IMPORT_LIMIT),
        "persona-lens --help": ([str(script), "--help"], HELP_LIMIT),
    }
    rounds = max(repeats, MINIMUM_ROUNDS)
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for command, _ in processes.values():
        cpu_seconds(command)  # the first start also reads the files from the disk
    for _ in range(rounds):
        for name, (command, _) in processes.items():
            seconds[name].append(cpu_seconds(command))
    measures = [Measure(f"{name}, CPU", seconds[name], "s", limit) for name, (_, limit) in processes.items()]
    return [Measures("Start", "whole processes", measures)]


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a process and of those that it waited for; RuntimeError where it fails."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}.")
    return used.ru_utime + used.ru_stime
