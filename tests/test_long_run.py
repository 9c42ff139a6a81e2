"""Two hours of mixed commands in one process leave memory, handles, threads, hooks and files where they were."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

SECONDS = float(os.environ.get("PERSONA_LENS_LONG_RUN_SECONDS", "7200"))
SETTLED = 6
"""Rounds until every command has run once, and what is loaded once is loaded."""
GROWTH_MIB = 64.0


@pytest.mark.soak
@pytest.mark.embedded
def test_hours_of_mixed_commands_hold_no_more_at_their_end_than_at_their_beginning(tmp_path):
    pytest.importorskip("peft")
    command = [sys.executable, "-m", "tests.mixed_run", str(tmp_path), str(SECONDS)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    rounds = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(f"{len(rounds)} rounds; the first and the last: {rounds[0]} {rounds[-1]}")
    rounds = rounds[SETTLED:]
    third = len(rounds) // 3
    assert third > 0, "too short to tell"
    early, late = rounds[:third], rounds[-third:]
    for name in ("hooks", "threads", "handles", "files"):
        assert max(each[name] for each in late) <= max(each[name] for each in early), name
    memory = [median(each["rss_mib"] for each in part) for part in (early, late)]
    assert memory[1] - memory[0] < GROWTH_MIB
