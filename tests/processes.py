"""Child processes of tests: each ends with the test that started it, and is interrupted as a command in a terminal is.

A shell starts a background job (`make test &`, `nohup`) with SIGINT ignored, children inherit that, and Python then
leaves it so: a test that sends SIGINT to such a child would wait for nothing.
"""

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any


@contextmanager
def child_process(command: Sequence[str | PathLike[str]], **options: Any) -> Iterator["subprocess.Popen[Any]"]:
    """A child of this process that SIGINT interrupts, by `subprocess.Popen`; killed on leaving if it still runs."""
    # A handler is not inherited, only whether a signal is ignored: the child begins with the default action.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, **options)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:  # closes its pipes and waits for it
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
