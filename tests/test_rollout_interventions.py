"""Rollouts under interventions: rows of one prompt that differ in what is done to the model."""

import json
from dataclasses import replace

from persona_lens.rollouts.collection import collect_rollouts, plan_rollouts
from persona_lens.rollouts.rows import Rollout, read_rollouts
from tests.evaluation_cases import TRAIT

PLAN = plan_rollouts(TRAIT, polarities=["neutral"], per_question=2)
STEERED = [replace(prompt, intervention=name) for prompt in PLAN for name in ("", "one", "two")]


class EchoEngine:
    """Answers with the key, and writes down what it was asked."""

    name = "echo"

    def __init__(self, batch_size=6):
        self.batch_size = batch_size
        self.asked = []

    def answer(self, prompts, *, seed, progress=False):
        self.asked += [prompt.key for prompt in prompts]
        answered = {"response_tokens": None, "finish_reason": "stop", "engine": self.name, "seed": seed}
        return [Rollout(**vars(prompt), response=prompt.key, **answered) for prompt in prompts]


def test_the_key_names_the_intervention_and_the_randomness_does_not():
    plain, one, two = STEERED[:3]
    assert plain.key == plain.randomness == PLAN[0].key
    assert len({plain.key, one.key, two.key}) == 3
    assert plain.randomness == one.randomness == two.randomness


def test_prompts_that_differ_have_random_numbers_of_their_own():
    assert len({prompt.randomness for prompt in STEERED}) == len(PLAN)


def test_rows_under_several_interventions_stand_in_one_file_and_are_told_apart(tmp_path):
    output = tmp_path / "rollouts.jsonl"
    rows = collect_rollouts(EchoEngine(), STEERED, output_file=output, progress=False)
    assert [row.prompt for row in rows] == STEERED
    assert [row.response for row in rows] == [prompt.key for prompt in STEERED]
    assert read_rollouts(output) == rows


def test_rows_of_a_new_intervention_are_added_to_those_that_exist(tmp_path):
    output = tmp_path / "rollouts.jsonl"
    old = collect_rollouts(EchoEngine(), PLAN, output_file=output, progress=False)
    before, engine = output.read_bytes(), EchoEngine(batch_size=1)
    rows = collect_rollouts(engine, STEERED, output_file=output, progress=False)
    assert engine.asked == [prompt.key for prompt in STEERED if prompt.intervention]
    assert [row for row in rows if not row.intervention] == old
    assert output.read_bytes().startswith(before)


def test_a_file_from_before_rows_had_interventions_is_read_as_without(tmp_path):
    output = tmp_path / "rollouts.jsonl"
    rows = collect_rollouts(EchoEngine(), PLAN, output_file=output, progress=False)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(record.pop("intervention") == "" for record in records)
    output.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_rollouts(output) == rows
