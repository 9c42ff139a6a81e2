"""How a command ends: locks are released, and Ctrl-C stops it with everything that is finished kept."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

_locks = ExitStack()


def lock(folder: Path) -> None:
    """Lock a run's folder until the command ends; raises OSError, naming the holder, where another process has it."""
    from persona_lens.storage.locks import writes_folder

    _locks.enter_context(writes_folder(folder))


@contextmanager
def locks() -> Iterator[None]:
    """Release every lock on leaving."""
    with _locks:
        yield


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the first press stops the command in order, the second one at once."""
    presses = 0

    def stop(*_: Any) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            os.write(2, b"persona-lens: interrupted twice, and stopped at once.\n")
            os._exit(130)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    # A caller that handles or ignores interrupts itself keeps its handler; only the main thread may set one.
    replaces = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if replaces:
        signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: presses > 0
    finally:
        if replaces:
            signal.signal(signal.SIGINT, before)
