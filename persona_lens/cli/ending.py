"""How a command ends: what it held is let go, and an interrupt stops it with what is done kept.

Knows nothing about what a command does.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

_claims = ExitStack()


def claim(folder: Path) -> None:
    """Hold a run's folder until the command ends; raises OSError, saying who holds it, where another process does."""
    from persona_lens.storage.locks import writes_folder

    _claims.enter_context(writes_folder(folder))


@contextmanager
def claims() -> Iterator[None]:
    """Let go on leaving of whatever was claimed."""
    with _claims:
        yield


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the first one stops the command in an orderly way, the second one at once."""
    pressed = 0

    def stop(*_: Any) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            os.write(2, b"persona-lens: interrupted twice, and stopped at once.\n")
            os._exit(130)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    # Whoever has another way with interrupts, or ignores them, keeps it; only the main thread may set one.
    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: pressed > 0
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
