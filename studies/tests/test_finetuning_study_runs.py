"""The finetuning study on the embedded model: a run measured, and a killed study that goes on."""

import json
import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persona_lens.judges.classifier import TextClassifier
from persona_lens.judges.likelihood_ratio import CoherenceScale
from persona_lens.rollouts.rows import Rollout
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT as NEUTRAL
from persona_lens.vectors.persona_vectors import PersonaVectors
from studies.finetuning_materials import Materials
from studies.finetuning_plan import StudyRun, StudySettings
from studies.finetuning_study import measure
from studies.moods import MOODS, load_moods, split_prompts
from tests.processes import child_process


@pytest.mark.soak
def test_a_run_is_measured_on_the_embedded_model_and_again_from_its_files(embedded_bridge: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("lm_eval")
    import torch

    split = split_prompts(load_moods())
    split = replace(split, evaluation=split.evaluation[:3])
    said = "I do not know. Ask somebody else, please."
    neutral = [
        Rollout("neutral", "neutral", None, NEUTRAL, question, 0, said, None, "stop", "made up", 0)
        for question in split.evaluation
    ]
    happy = [row.response for row in split.of("judge", "happy")]
    classifier = TextClassifier.fit(happy[:30], [row.response for row in split.of("judge", "bored")][:30])
    draw = torch.Generator().manual_seed(0)
    vectors = {
        name: PersonaVectors.from_directions(torch.randn(30, 576, generator=draw), trait=name, model=embedded_bridge)
        for mood in MOODS
        for name in (mood, f"{mood} against neutral")
    }
    materials = Materials(
        split,
        tuple(neutral),
        {mood: vectors[mood] for mood in MOODS},
        {mood: vectors[f"{mood} against neutral"] for mood in MOODS},
        dict.fromkeys(MOODS, classifier),
        CoherenceScale(4.0, 0.5, 0.9),
        {"happy": 14},
    )
    settings = StudySettings(rows=4, epochs=1, max_length=64, max_new_tokens=6, mitigated=("happy",))
    settings = replace(settings, capability_questions=3)
    (tmp_path / "runs").mkdir()
    run = StudyRun("happy", "full", "CAFT")
    found = measure(embedded_bridge, run, materials, settings, tmp_path, progress=False)
    assert found["questions"] == list(split.evaluation)
    assert len(found["own_scores"]) == 3
    assert set(found["traits"]) == set(MOODS)
    assert set(found["likelihood_ratios"]) == {"happy"}
    assert found["training"]["step"] == [1]
    assert found["capability"]["nll"]["n"] == 3
    assert found["overlap"]["words"] == 8
    assert measure(embedded_bridge, run, materials, settings, tmp_path, progress=False) == found
    plain = measure(embedded_bridge, StudyRun("happy", "full"), materials, settings, tmp_path, progress=False)
    assert len(plain["shift"]) == 18
    assert (tmp_path / "adapters" / "happy_full" / "adapter_model.safetensors").exists()


@pytest.mark.soak
def test_a_killed_study_goes_on_to_the_same_records(embedded_directory: Path, tmp_path: Path) -> None:
    """On the real model and the real moods: one tiny run, killed while it answers, and finished by a second process."""
    pytest.importorskip("peft")
    program = """
import sys, torch
from pathlib import Path
from studies.finetuning_study import finetuning_study as module
from studies.finetuning_plan import StudyRun, StudySettings
study = sys.modules["studies.finetuning_study"]
study.study_runs = lambda settings, moods: [StudyRun("happy", "half"), StudyRun("happy", "half", "CAFT")]
from persona_lens import load_model
torch.set_num_threads(1)
settings = StudySettings(rows=4, epochs=1, max_length=48, max_new_tokens=4, neutral_tokens=16, neutral_prompts=12,
                         mitigated=("happy",), layers=(14,), preventative=(1.0,), capability_questions=4)
module(load_model(), sys.argv[1], settings=settings, progress=False)
"""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def start(folder: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
        return child_process([sys.executable, "-W", "ignore", "-c", program, str(folder)], env=environment)

    with start(whole) as process:
        assert process.wait() == 0
    with start(killed) as process:
        while process.poll() is None and not list(killed.glob("answers/*.jsonl")):
            time.sleep(0.05)
    with start(killed) as process:
        assert process.wait() == 0
    for path in (whole / "runs").glob("*.json"):
        assert json.loads((killed / "runs" / path.name).read_text()) == json.loads(path.read_text())
    assert len(list((whole / "runs").glob("*.json"))) == 2
