"""`persona-lens`: the library's functions from the command line.

Results go to standard output (a table, or JSON with `--json`), progress to standard error. Exit code 0 is success, 1 is
bad input with one sentence that says what to do, 2 is bad usage, 3 is a threshold that was passed, 130 an interrupt.
"""

import sys

from persona_lens.cli import (  # noqa: F401 (each adds its commands)
    evaluation,
    finetuning,
    monitoring,
    reports,
    rollouts,
    screening,
    steering,
    traits,
    vectors,
)
from persona_lens.cli.interrupts import interrupts, locks
from persona_lens.cli.options import app
from persona_lens.cli.output import escape_unencodable, say

# Help lists the commands in the order in which one needs them.
_ORDER = ["demo", "traits", "generate_trait", "rollouts", "judge", "agreement", "extract", "show", "convert"]
_ORDER += ["select_layer", "steer", "monitor", "finetune", "shift", "evaluate", "screen", "report", "replicate"]
app.registered_commands.sort(key=lambda command: _ORDER.index(getattr(command.callback, "__name__", "")))


def main() -> None:
    """Run the command line; bad input becomes one sentence and exit code 1, an interrupt one line and exit code 130."""
    escape_unencodable()
    with interrupts() as interrupted:
        try:
            with locks():
                app()
        except BaseException as error:
            if interrupted():
                say("persona-lens: interrupted. What was written is kept, and the same command goes on from it.")
                sys.exit(130)
            if isinstance(error, ValueError | OSError | ImportError | MemoryError):
                say(f"persona-lens: {' '.join(str(error).split()) or type(error).__name__}")
                sys.exit(1)
            raise
