"""A replication that is killed over and over, at any moment, ends where an undisturbed one does."""

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import child_process
from tests.replication_cases import bring_sets, values

PROGRAM = """
import sys
from pathlib import Path
import pytest, torch
torch.set_num_threads(1)
from persona_lens.models.loading import bridge_from_transformers
from persona_lens.replication.preset import Preset
from persona_lens.replication.run import replicate
from tests import tiny
from tests.replication_cases import make_tiny
make_tiny(pytest.MonkeyPatch())
folder = Path(sys.argv[2])
folder.with_suffix(".tokenizer").mkdir(exist_ok=True)
tokenizer = tiny.tokenizer(folder.with_suffix(".tokenizer"))
model = bridge_from_transformers(tiny.llama(tokenizer), tokenizer)
print("begun", flush=True)
preset = Preset.model_validate_json(Path(sys.argv[1]).read_text())
sys.exit(3 if replicate(preset, folder, model=model, data=folder.parent, progress=False).failures else 0)
"""
KILLS = 10


@pytest.mark.soak
def test_a_replication_that_is_killed_ten_times_ends_in_an_equal_report(tmp_path):
    pytest.importorskip("peft")
    bring_sets(tmp_path)
    preset = tmp_path / "preset.json"
    preset.write_text(json.dumps(values(tmp_path)), encoding="utf-8")

    @contextmanager
    def started(name):
        command = [sys.executable, "-c", PROGRAM, str(preset), str(tmp_path / name)]
        with child_process(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            process.stdout.close()
            yield process

    with started("whole") as process:
        began = time.monotonic()
        assert process.wait() == 0
        took = time.monotonic() - began
    draw, killed = random.Random(0), 0
    for _ in range(KILLS):
        with started("killed") as process:
            try:
                process.wait(timeout=draw.uniform(0.05, 0.2) * took)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
    with started("killed") as process:
        assert process.wait() == 0
    assert killed >= KILLS // 2  # the last ones may find nothing left to do
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "killed")]
    assert reports[0] == reports[1]
