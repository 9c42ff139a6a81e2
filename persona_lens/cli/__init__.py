"""`persona-lens`: the library's functions from the command line.

Results go to standard output (a table, or JSON with `--json`), progress to standard error. Exit code 0 is success, 1 is
bad input with one sentence that says what to do, 2 is bad usage, 3 is a threshold that was passed.
"""

import sys

from persona_lens.cli import (  # noqa: F401 (each adds its commands)
    commands,
    converting,
    evaluating,
    finetuning,
    judging,
    making,
    monitoring,
    replicating,
    reporting,
    screening,
    steering,
    traits,
)
from persona_lens.cli.options import app
from persona_lens.cli.output import say

# Help lists the commands in the order in which one needs them.
_ORDER = ["demo", "traits", "generate_trait", "rollouts", "judge", "agreement", "extract", "show", "convert"]
_ORDER += ["select_layer", "steer", "monitor", "finetune", "shift", "evaluate", "screen", "report", "replicate"]
app.registered_commands.sort(key=lambda command: _ORDER.index(getattr(command.callback, "__name__", "")))


def main() -> None:
    """Run the command line; bad input becomes one sentence and exit code 1."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        say(f"persona-lens: {' '.join(str(error).split())}")
        sys.exit(1)
