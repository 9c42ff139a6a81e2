"""A replication that is killed over and over, at any moment, ends where an undisturbed one does."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.replication_cases import values

PROGRAM = """
import json, sys, torch
torch.set_num_threads(1)
from persona_lens import load_model
from persona_lens.replication.preset import Preset
from persona_lens.replication.run import replicate
preset = Preset.model_validate_json(open(sys.argv[1]).read())
found = replicate(preset, sys.argv[2], model=load_model(), progress=False)
sys.exit(3 if found.failures else 0)
"""
KILLS = 10


@pytest.mark.soak
def test_a_replication_that_is_killed_ten_times_ends_in_an_equal_report(embedded_directory, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("lm_eval")
    short = {"questions": 3, "per_question": 1, "max_new_tokens": 6}
    changed = values(
        tmp_path,
        traits=["evil"],
        model={"name": "smollm2-135m-instruct", "n_layers": 30},
        extraction={**short, "questions": 6, "threshold": 50.0, "min_coherence": 0.0, "min_pairs": 1},
        layers={**short, "layers": [14, 19], "coefficients": [2.0], "min_coherence": 0.0},
        moods={"moods": ["happy"], "neutral_tokens": 40, "neutral_prompts": 20, "layers": [14]},
    )
    changed["monitoring"] = {**short, "questions": 2, "shots": [0, 1]}
    del changed["trait-files"]
    preset = tmp_path / "preset.json"
    preset.write_text(json.dumps(changed), encoding="utf-8")

    def start(folder):
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(preset), str(folder)], env=os.environ)

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    took = time.monotonic() - began
    draw = random.Random(0)
    for _ in range(KILLS):
        process = start(tmp_path / "killed")
        try:
            process.wait(timeout=draw.uniform(0.15, 0.45) * took)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert start(tmp_path / "killed").wait() == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "killed")]
    assert reports[0] == reports[1]
