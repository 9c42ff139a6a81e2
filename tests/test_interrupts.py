"""Interrupts at random lines leave nothing on a model, and the next result is that of an undisturbed run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import has_hooked_transformer

ROOT = Path(__file__).parent.parent
INTERRUPTS = {"TransformerBridge": 300, "HookedTransformer": 200}


def interrupt(model_class, seed, interrupts):
    """What `tests.interrupted_run` did and found, in a process without executed annotations."""
    if model_class == "HookedTransformer" and not has_hooked_transformer():
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    command = [sys.executable, "-W", "ignore", "-m", "tests.interrupted_run", model_class, str(seed), str(interrupts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert sum(found["interrupts"].values()) == interrupts
    return found


@pytest.mark.parametrize("model_class", list(INTERRUPTS))
@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_interrupts_leave_nothing_and_the_next_results_are_equal(model_class, many):
    found = interrupt(model_class, seed=int(many), interrupts=INTERRUPTS[model_class] if many else 28)
    assert found["left"] == []
    assert found["unequal"] == []
