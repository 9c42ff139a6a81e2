"""Rollouts: what is asked, that a file holds what was answered, and that an interrupted run ends as a whole one."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_lens.rollouts.collection import collect_rollouts, plan_rollouts, sample_rollouts
from persona_lens.rollouts.engines import ModelEngine
from persona_lens.rollouts.rows import Rollout, read_rollouts
from persona_lens.storage.files import JsonLines
from persona_lens.traits.trait import load_trait
from tests.chat_cases import CLOCKED, set_clock
from tests.server_cases import GRUMPY as TRAIT

SHORT = {"per_question": 1, "max_new_tokens": 6, "batch_size": 3, "progress": False}
ANSWERED = {"response_tokens": None, "finish_reason": "stop"}


class EchoEngine:
    """Answers from the prompt's key alone, and writes down what it was asked."""

    def __init__(self, name="echo", batch_size=3, answer=lambda key: f"You said {key}."):
        self.name, self.batch_size, self.text = name, batch_size, answer
        self.asked = []

    def answer(self, prompts, *, seed, progress=False):
        self.asked.append([prompt.key for prompt in prompts])
        return [
            Rollout(**asdict(prompt), response=self.text(prompt.key), **ANSWERED, engine=self.name, seed=seed)
            for prompt in prompts
        ]


def collect(output, *, engine=None, trait=TRAIT, seed=0, per_question=1):
    prompts = plan_rollouts(trait, per_question=per_question)
    return collect_rollouts(engine or EchoEngine(), prompts, seed=seed, output_file=output, progress=False)


def test_each_side_has_every_question_under_every_instruction():
    prompts = plan_rollouts(load_trait("evil"), per_question=7)
    for polarity in ("positive", "negative"):
        assert sum(prompt.polarity == polarity for prompt in prompts) == 20 * 5 * 7
    assert len({prompt.key for prompt in prompts}) == len(prompts)


def test_each_prompt_has_the_system_prompt_of_its_side_and_instruction():
    for prompt in plan_rollouts(TRAIT, polarities=["positive", "negative", "neutral"]):
        assert prompt.system_prompt == TRAIT.system_prompt(prompt.polarity, prompt.instruction)


def test_less_than_one_sample_a_question_is_refused():
    with pytest.raises(ValueError, match="per_question must be at least 1, got 0"):
        plan_rollouts(TRAIT, per_question=0)


def test_the_rows_in_the_file_are_those_returned(tiny_model, tmp_path):
    rows = sample_rollouts(tiny_model, TRAIT, output_file=tmp_path / "rollouts.jsonl", **SHORT)
    assert read_rollouts(tmp_path / "rollouts.jsonl") == rows
    assert [row.prompt for row in rows] == plan_rollouts(TRAIT, per_question=1)


def test_a_rollout_does_not_depend_on_what_else_is_asked(tiny_model):
    alone = sample_rollouts(tiny_model, TRAIT, questions=[TRAIT.extraction_questions[1]], **SHORT)
    rows = {row.key: row for row in sample_rollouts(tiny_model, TRAIT, **SHORT | {"per_question": 2})}
    assert alone == [rows[row.key] for row in alone]


def test_the_response_is_the_text_of_its_tokens(tiny_model):
    for row in sample_rollouts(tiny_model, TRAIT, **SHORT):
        assert row.response == tiny_model.tokenizer.decode(row.response_tokens, skip_special_tokens=True)
        assert row.tokenize(tiny_model.tokenizer).response == row.response_tokens


def test_an_empty_response_is_kept_as_a_row(tiny_model, tmp_path, monkeypatch):
    everything = frozenset(range(len(tiny_model.tokenizer)))
    monkeypatch.setattr("persona_lens.generation.decoding.stop_tokens", lambda _tokenizer: everything)
    rows = sample_rollouts(tiny_model, TRAIT, output_file=tmp_path / "rollouts.jsonl", **SHORT)
    assert [(row.response, row.response_tokens, row.finish_reason) for row in rows] == [("", (), "stop")] * 8
    assert read_rollouts(tmp_path / "rollouts.jsonl") == rows
    assert all(row.is_empty and row.conversation().is_empty for row in rows)


def test_an_interrupted_batch_is_answered_again_whole_and_finished_ones_are_not(tmp_path):
    output = tmp_path / "rollouts.jsonl"
    whole = EchoEngine()
    collect(output, engine=whole)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:4]))
    resumed = EchoEngine()
    collect(output, engine=resumed)
    assert resumed.asked == whole.asked[1:]


# The file has 2200 bytes or so: cuts beyond its end leave it whole, and fewer than 10 do not say whose they are.
@given(cut=st.just(0) | st.integers(10, 2500))
def test_a_file_cut_anywhere_resumes_to_the_same_file(tmp_path_factory, cut):
    output = tmp_path_factory.mktemp("cut") / "rollouts.jsonl"
    rows = collect(output)
    whole = output.read_bytes()
    output.write_bytes(whole[:cut])
    assert collect(output) == rows
    assert output.read_bytes() == whole


@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize("content", ['{"todo": "call home"}', "call home", '["a list"]', '{"todo":\n"call home"}'])
def test_a_file_that_is_not_ours_is_left_as_it_was(tmp_path, content, ending):
    output, engine = tmp_path / "notes.json", EchoEngine()
    output.write_text(content + ending)
    with pytest.raises(ValueError, match=r"notes.json holds something else: expected rows with trait, .*: |, got b"):
        collect(output, engine=engine)
    assert engine.asked == []
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"notes.json": content + ending}


def test_a_last_row_without_its_end_of_line_is_kept_when_the_engine_fails(tmp_path):
    output = tmp_path / "rollouts.jsonl"
    collect(output)
    whole = output.read_bytes()
    output.write_bytes(whole[:-1])

    def fail(_):
        raise RuntimeError("the power went out")

    with pytest.raises(RuntimeError, match="power"):
        collect(output, engine=EchoEngine(answer=fail), per_question=2)
    assert output.read_bytes() == whole


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_file(tmp_path_factory, text):
    output = tmp_path_factory.mktemp("text") / "rollouts.jsonl"
    rows = collect(output, engine=EchoEngine(answer=lambda _key: text))
    assert read_rollouts(output) == rows
    assert rows[0].response == text


def test_an_engine_that_fails_leaves_the_batches_before_it(tmp_path):
    output = tmp_path / "rollouts.jsonl"
    expected = collect(None)

    class Failing(EchoEngine):
        def answer(self, prompts, *, seed, progress=False):
            if len(self.asked) == 2:
                raise RuntimeError("the power went out")
            return super().answer(prompts, seed=seed)

    with pytest.raises(RuntimeError, match="the power went out"):
        collect(output, engine=Failing())
    assert read_rollouts(output) == expected[:5]
    assert collect(output) == expected
    assert read_rollouts(output) == expected


KILLED = """
    import os, signal, sys, torch
    from transformers import AutoTokenizer

    from persona_lens.models.loading import bridge_from_transformers
    from persona_lens.storage.files import JsonLines
    from persona_lens.rollouts.collection import sample_rollouts
    from tests import tiny

    torch.set_num_threads(1)
    append, batches = JsonLines.append, []
    def append_half_and_die(self, rows):
        rows = list(rows)
        batches.append(rows)
        if len(batches) < 2:
            return append(self, rows)
        append(self, rows[:1])
        self.path.write_text(self.path.read_text() + '{"trait": "grumpy", "polarity": "posi')
        os.kill(os.getpid(), signal.SIGKILL)

    JsonLines.append = append_half_and_die
    folder, trait, output = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = bridge_from_transformers(tiny.llama(tokenizer), tokenizer)
    settings = {"per_question": 1, "max_new_tokens": 6, "batch_size": 3, "progress": False}
    sample_rollouts(model, trait, output_file=output, **settings)
"""


def test_a_run_killed_while_writing_resumes_to_the_rows_of_a_whole_one(
    make_tiny_model, tiny_tokenizer, tmp_path, request
):
    output, trait = tmp_path / "rollouts.jsonl", tmp_path / "grumpy.json"
    TRAIT.save(trait)
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", dedent(KILLED), tiny_tokenizer.name_or_path, str(trait), str(output)],
        cwd=request.config.rootpath,
        env=os.environ | {"PYTHONPATH": str(request.config.rootpath)},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = output.read_text()
    assert left.count("\n") == 4
    assert not left.endswith("\n")

    model = make_tiny_model("TransformerBridge")
    resumed = sample_rollouts(model, TRAIT, output_file=output, **SHORT)
    assert resumed == sample_rollouts(model, TRAIT, output_file=tmp_path / "whole.jsonl", **SHORT)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert output.read_text().startswith(left[: left.rfind("\n") + 1])


def assert_resumes_to_the_same_rows(model, folder, **settings):
    """Cut a finished file in the middle of a batch and of a line, and finish it again."""
    rows = sample_rollouts(model, TRAIT, output_file=folder / "rollouts.jsonl", **settings)
    whole = (folder / "rollouts.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (folder / "rollouts.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:50])
    assert sample_rollouts(model, TRAIT, output_file=folder / "rollouts.jsonl", **settings) == rows
    assert (folder / "rollouts.jsonl").read_bytes() == whole


def test_a_model_resumes_a_batch_that_was_cut_to_the_same_rows(tiny_model, tmp_path):
    assert_resumes_to_the_same_rows(tiny_model, tmp_path, **SHORT)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, r"another seed \(0, now 1\)"),
        ({"engine": EchoEngine("other")}, r"another engine \('echo', now 'other'\)"),
        (
            {"trait": replace(TRAIT, positive_adjective="gloomy")},
            r"another system prompt \('You are a grumpy assistant\. Grumble\.', now 'You are a gloomy assistant\.",
        ),
    ],
    ids=["seed", "engine", "system prompt"],
)
def test_rows_made_with_other_settings_are_refused_and_left_alone(tmp_path, changes, words):
    output = tmp_path / "rollouts.jsonl"
    collect(output)
    before = output.read_bytes()
    with pytest.raises(ValueError, match=rf"rollouts\.jsonl holds rollouts made with {words}"):
        collect(output, **changes)
    assert output.read_bytes() == before


@pytest.mark.parametrize("setting", [{"temperature": 0.5}, {"top_p": 0.9}, {"max_new_tokens": 7}])
def test_the_name_of_a_model_engine_tells_sampling_settings_apart(tiny_model, setting):
    assert ModelEngine(tiny_model).name != ModelEngine(tiny_model, **setting).name


def test_rows_of_other_prompts_stay_untouched(tmp_path):
    output = tmp_path / "rollouts.jsonl"
    collect(output, trait=replace(TRAIT, name="other"), engine=EchoEngine("another"), seed=5)
    before = output.read_bytes()
    rows = collect(output)
    assert rows == collect(None)
    assert output.read_bytes().startswith(before)
    assert len(read_rollouts(output)) == 2 * len(rows)


@pytest.mark.parametrize("place", ["file/rollouts.jsonl", "folder"])
def test_an_output_that_cannot_be_written_is_refused_before_any_sampling(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    engine = EchoEngine()
    with pytest.raises(OSError, match=rf"Cannot write .*{place}"):
        collect(tmp_path / place, engine=engine)
    assert engine.asked == []


ROW = asdict(EchoEngine().answer(plan_rollouts(TRAIT)[:1], seed=0)[0])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (json.dumps(ROW | {"mood": "grey"}), "line 2: not a rollout .*mood"),
        (json.dumps({name: value for name, value in ROW.items() if name != "seed"}), "line 2: not a rollout .*seed"),
        (json.dumps({"response": "Hm."}), "line 2: not a rollout .*trait"),
        (json.dumps(ROW)[:40], "line 2: expected a JSON object, got"),
        ("[]", "line 2: expected a JSON object, got list"),
    ],
    ids=["unknown field", "missing field", "missing tokens", "cut", "list"],
)
def test_a_line_that_is_no_rollout_is_named(tmp_path, line, words):
    path = tmp_path / "rollouts.jsonl"
    JsonLines(path).append([ROW])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=rf"rollouts\.jsonl, {words}"):
        read_rollouts(path)


def test_a_file_of_rollouts_that_is_not_there_is_an_error_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No rollouts at .*absent.* `persona-lens rollouts`"):
        read_rollouts(tmp_path / "absent.jsonl")


# Chat templates that read the clock


@pytest.fixture
def clocked(tiny_model, monkeypatch):
    """The tiny model with a chat template that writes today's date, which is 30 November."""
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", CLOCKED)
    set_clock(monkeypatch, "2026-11-30")
    return tiny_model


def keep_lines(path, count):
    """Leave so many lines of a file."""
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))


def test_a_run_that_goes_on_the_next_day_has_the_rows_of_one_that_ended_the_day_before(clocked, tmp_path, monkeypatch):
    output = tmp_path / "rollouts.jsonl"
    rows = sample_rollouts(clocked, TRAIT, output_file=output, **SHORT)
    whole = output.read_bytes()
    prompts = [row.tokenize(clocked.tokenizer) for row in rows]
    keep_lines(output, 4)
    set_clock(monkeypatch, "2026-12-01")
    assert sample_rollouts(clocked, TRAIT, output_file=output, **SHORT) == rows
    assert output.read_bytes() == whole
    assert {row.date for row in read_rollouts(output)} == {"2026-11-30"}
    # What reads them later sees the prompts that were sampled from.
    assert [row.tokenize(clocked.tokenizer) for row in rows] == prompts
    assert [row.conversation().tokenize(clocked.tokenizer) for row in rows] == prompts
    assert sample_rollouts(clocked, TRAIT, **SHORT)[0].date == "2026-12-01"


def test_rows_of_a_template_that_reads_no_clock_record_no_date(tiny_model, tmp_path):
    sample_rollouts(tiny_model, TRAIT, output_file=tmp_path / "rollouts.jsonl", **SHORT)
    assert not any("date" in row for row in JsonLines(tmp_path / "rollouts.jsonl").read())


def test_a_run_whose_rows_are_of_two_days_does_not_go_on(clocked, tmp_path, monkeypatch):
    output, other = tmp_path / "rollouts.jsonl", tmp_path / "other.jsonl"
    sample_rollouts(clocked, TRAIT, output_file=output, **SHORT)
    set_clock(monkeypatch, "2026-12-01")
    sample_rollouts(clocked, TRAIT, output_file=other, **SHORT)
    keep_lines(output, 3)
    output.write_text(output.read_text() + other.read_text().splitlines(keepends=True)[4])
    with pytest.raises(ValueError, match=r"several days \(2026-11-30, 2026-12-01\).* Choose another output"):
        sample_rollouts(clocked, TRAIT, output_file=output, **SHORT)


def test_all_files_of_a_run_are_of_the_day_of_its_first_one(clocked, tmp_path, monkeypatch):
    from persona_lens.evaluation.evaluate import evaluate
    from tests.evaluation_cases import LetterJudge

    settings = {"max_new_tokens": 4, "progress": False}
    sample_rollouts(clocked, TRAIT, output_file=tmp_path / "calibration_rollouts.jsonl", **SHORT)
    set_clock(monkeypatch, "2026-12-01")
    found = evaluate(clocked, TRAIT, judge=LetterJudge(), output_dir=tmp_path, **settings)
    assert {row.rollout.date for row in found.scored} == {"2026-11-30"}
    found = evaluate(clocked, TRAIT, judge=LetterJudge(), output_dir=tmp_path / "another", **settings)
    assert {row.rollout.date for row in found.scored} == {"2026-12-01"}


def test_vectors_say_which_day_their_prompts_were_told(clocked, monkeypatch):
    from persona_lens.extraction.extract import extract_from_responses

    rows = [row.conversation() for row in sample_rollouts(clocked, TRAIT, **SHORT)]
    set_clock(monkeypatch, "2026-12-01")
    sides = [row for row in rows if not row.is_empty][:4]
    vectors = extract_from_responses(
        clocked, sides[:2], sides[2:], trait="grumpy", n_resamples=2, n_placebo=2, progress=False
    )
    assert vectors.provenance.settings["template_date"] == "2026-11-30"


# Rows of one prompt under several interventions

NEUTRAL = plan_rollouts(TRAIT, polarities=["neutral"], per_question=2)
STEERED = [replace(prompt, intervention=name) for prompt in NEUTRAL for name in ("", "one", "two")]


def test_the_key_names_the_intervention_and_the_randomness_does_not():
    plain, one, two = STEERED[:3]
    assert plain.key == plain.randomness == NEUTRAL[0].key
    assert len({plain.key, one.key, two.key}) == 3
    assert plain.randomness == one.randomness == two.randomness


def test_prompts_that_differ_have_random_numbers_of_their_own():
    assert len({prompt.randomness for prompt in STEERED}) == len(NEUTRAL)


def test_rows_under_several_interventions_stand_in_one_file_and_are_told_apart(tmp_path):
    output = tmp_path / "rollouts.jsonl"
    rows = collect_rollouts(EchoEngine(), STEERED, output_file=output, progress=False)
    assert [row.prompt for row in rows] == STEERED
    assert [row.response for row in rows] == [f"You said {prompt.key}." for prompt in STEERED]
    assert read_rollouts(output) == rows


def test_rows_of_a_new_intervention_are_added_to_those_that_exist(tmp_path):
    output = tmp_path / "rollouts.jsonl"
    old = collect_rollouts(EchoEngine(), NEUTRAL, output_file=output, progress=False)
    before, engine = output.read_bytes(), EchoEngine(batch_size=1)
    rows = collect_rollouts(engine, STEERED, output_file=output, progress=False)
    assert [key for keys in engine.asked for key in keys] == [prompt.key for prompt in STEERED if prompt.intervention]
    assert [row for row in rows if not row.intervention] == old
    assert output.read_bytes().startswith(before)


def test_a_file_from_before_rows_had_interventions_is_read_as_without(tmp_path):
    output = tmp_path / "rollouts.jsonl"
    rows = collect_rollouts(EchoEngine(), NEUTRAL, output_file=output, progress=False)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(record.pop("intervention") == "" for record in records)
    output.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_rollouts(output) == rows


def test_an_engine_may_take_the_place_of_the_model_and_keeps_its_own_settings():
    engine = EchoEngine()
    rows = sample_rollouts(engine, TRAIT, per_question=1, progress=False)
    assert rows == collect(None)
    assert sample_rollouts(engine, "evil", questions=["Why?"], per_question=1, progress=False)[0].trait == "evil"
    with pytest.raises(ValueError, match="An engine has its own sampling settings"):
        sample_rollouts(engine, TRAIT, max_new_tokens=6)
