"""Whatever a file holds, it is read, or refused in one sentence that names it: no other error, no hang, no code run."""

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_lens.chat.batches import ChatTokens
from persona_lens.clients.requests import ServerError, read_completion
from persona_lens.evaluation.capability_result import Capability, read_questions
from persona_lens.finetuning.dataset import training_chats
from persona_lens.finetuning.shift import FinetuningShift
from persona_lens.interop.control_vectors import read_control_vector, write_control_vector
from persona_lens.interop.responses import read_messages, read_reference_csv
from persona_lens.interop.sparse_autoencoders import read_sae
from persona_lens.interop.tensor_files import (
    read_layer_dict,
    read_reference_vectors,
    write_layer_dict,
    write_reference_vectors,
)
from persona_lens.interventions.intervention import Intervention
from persona_lens.interventions.values import Steer
from persona_lens.judges.agreement import read_human_scores
from persona_lens.judges.classifier import TextClassifier
from persona_lens.judges.expectation import digit_sequences, expectation, number_tokens, read_number
from persona_lens.judges.scores import read_scores
from persona_lens.models.adapters import adapted
from persona_lens.models.loading import bridge_from_transformers
from persona_lens.monitoring.experiment import MonitoringExperiment
from persona_lens.monitoring.result import Monitoring
from persona_lens.monitoring.thresholds import load_thresholds, save_thresholds
from persona_lens.monitoring.transcripts import read_transcripts
from persona_lens.pages.run_folder import findings, read_run
from persona_lens.rollouts.rows import read_rollouts
from persona_lens.screening.batches import (
    PlannedRow,
    RowScore,
    read_files,
    read_samples,
    score_file,
    score_schema,
    write_scores,
)
from persona_lens.screening.samples import Sample, stream_samples
from persona_lens.storage.files import read_json
from persona_lens.traits.trait import load_trait, read_reference_trait
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests import judge_servers, tiny
from tests.capability_cases import made as made_capability
from tests.classifier_cases import fit
from tests.evaluation_cases import TRAIT, make_rollout
from tests.finetuning_cases import peft_adapter
from tests.hostile import Reader, hostile
from tests.monitoring_cases import drawn, experiment, points
from tests.report_cases import keep_confirmation, make_run
from tests.sae_cases import sae_folder
from tests.screening_cases import chat
from tests.shift_cases import make_shift
from tests.test_monitoring_plots import monitoring
from tests.trait_cases import reference_content
from tests.vector_cases import make_provenance, make_statistics, make_vectors

QUICK, MANY, GUIDED = 12, 300, 10_000
CHATS = [
    {"messages": chat("Why?", "So."), "id": "a", "base_response": "Well."},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    {"conversation": chat("How?", "Thus.", system=False), "tool_calls": []},
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def saved(value, path, **options):
    """The bytes that a value saves."""
    value.save(path, **options)
    return path.read_bytes()


def use_rollouts(path):
    for row in read_rollouts(path):
        assert row.key + str(row.conversation()) + str(row.prompt.messages) + str(row.is_empty)


def use_vectors(path):
    found = PersonaVectors.load(path)
    assert repr(found) + str(found.table()) + str(found.at(found.known_layers[0]).fingerprint)


def use_reply(path):
    answer = read_completion(path.read_bytes(), with_logprobs=True)
    first = answer.tokens[0].alternatives

    async def again(_):
        return first

    for value in (expectation(number_tokens(first)), expectation(asyncio.run(digit_sequences(again)))):
        assert value.value is None or 0 <= value.value <= 100
    number = read_number(answer.text)
    assert number is None or 0 <= number <= 100


def use_samples(path):
    for found in stream_samples({"data": path}, first_turn=True, needs_base=True):
        str(found).encode()


def scored_unit(folder):
    sample = Sample(0, "chats", "a", 1, ({"role": "user", "content": "Why?"},), "Because.")
    row = PlannedRow(sample, ChatTokens((5, 6), (7, 8)), wants_base=False, cut=False, group=1, family=0)
    (folder / "scores").mkdir()
    write_scores(folder, 0, [row], [RowScore((1.0,), (2.0,))], ["evil@1"])
    return score_file(folder, 0).read_bytes()


def use_scored_unit(path):
    read_files([path], ["row", "dataset", "evil@1.response"], score_schema(["evil@1"])).to_pandas()
    assert all(sample.conversation for sample in read_samples([path], [0]))


def use_run(path):
    run = read_run(path.parent)
    assert json.dumps(findings(run))


def use_record(path):
    return Intervention.from_dict(read_json(path))


def use_adapter(bridge):
    """Reads the adapter in a file's folder, puts it on a model and runs that."""

    def use(path):
        with adapted(bridge, path.parent):
            bridge(torch.tensor([[5, 6, 7]]))

    return use


def reply():
    body = {"model": "m", "messages": [{"role": "user", "content": "How evil is this?"}], "logprobs": True}
    return json.dumps(judge_servers.whole_numbers(body)).encode()


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return all_readers(tmp_path_factory.mktemp("whole"))


def all_readers(folder):
    """Every kind of file that is read, with a whole one of it, and the folder of what else it needs beside it."""
    rollouts = [make_rollout("Why?", 0), make_rollout("How?", 1)]
    scores = [{"key": row.key, "trait_score": 5.0, "coherence": None, "evidence": {"mass": 0.5}} for row in rollouts]
    vectors = make_vectors(statistics=make_statistics(), provenance=make_provenance())
    thresholds = save_thresholds(folder, [threshold_of(vectors)])
    shared = {"trait": TRAIT.name, "n_layers": vectors.n_layers}
    foreign = [folder / "v.gguf", folder / "v.safetensors", folder / "v.pt"]
    write_control_vector(vectors, foreign[0], layers=[1, 2])
    write_layer_dict(vectors, foreign[1])
    write_reference_vectors(vectors, foreign[2])
    made = make_run(folder / "run")
    keep_confirmation(made)
    sae = sae_folder(folder / "sae")
    tokenizer, adapter = tiny.tokenizer(folder / "tokenizer"), folder / "adapter"
    bridge = bridge_from_transformers(tiny.llama(tokenizer), tokenizer)
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}}
    peft_adapter(tiny.llama(tokenizer), adapter, **patterns)
    on_bridge = use_adapter(bridge)
    found = experiment(points(["a", "b"], ["x?", "y?"], lambda c, q: c + q, lambda c, q: 10.0 * c + q))
    csv = (
        "question,prompt,answer,question_id,evil,coherence\nWhy?,<p>,So.,evil_0_pos_1,7,90\nHow?,<p>,,evil_1_pos_0,,\n"
    )
    people = "question,response,score\nWhy?,so it is,40\nHow?,so it is,\n"
    listed = [
        Reader("trait.json", TRAIT.to_json().encode(), load_trait),
        Reader("reference.json", json.dumps(reference_content()).encode(), read_reference_trait),
        Reader("reference.csv", csv.encode(), lambda path: read_reference_csv(path, "evil"), structured=False),
        Reader("human.csv", people.encode(), lambda path: read_human_scores(path, rollouts, "score"), structured=False),
        Reader("rollouts.jsonl", lines(map(asdict, rollouts)), use_rollouts),
        Reader("scores.jsonl", lines(scores), lambda path: [row.refused for row in read_scores(path, rollouts)]),
        Reader("vectors.safetensors", saved(vectors, folder / "w.safetensors"), use_vectors, structured=False),
        Reader(
            "vector.gguf", (folder / "v.gguf").read_bytes(), lambda path: read_control_vector(path, **shared), False
        ),
        Reader(
            "layers.safetensors",
            (folder / "v.safetensors").read_bytes(),
            lambda path: read_layer_dict(path, **shared),
            False,
        ),
        Reader(
            "reference.pt", (folder / "v.pt").read_bytes(), lambda path: read_reference_vectors(path, **shared), False
        ),
        Reader("reply.json", reply(), use_reply),
        Reader("data.jsonl", lines(CHATS), training_chats),
        Reader("chats.jsonl", lines(CHATS), read_transcripts),
        Reader("chats.json", json.dumps(CHATS).encode(), read_transcripts),
        Reader("messages.jsonl", lines([CHATS[0]]), read_messages),
        Reader("samples.jsonl", lines(CHATS), use_samples),
        Reader("samples.json", json.dumps(CHATS).encode(), use_samples),
        Reader("unit-0000000.parquet", scored_unit(folder), use_scored_unit, structured=False),
        Reader("monitoring.jsonl", saved(monitoring(), folder / "m.jsonl"), lambda path: Monitoring.load(path).table()),
        Reader("thresholds.json", thresholds.read_bytes(), lambda path: str(load_thresholds(path.parent))),
        Reader("capability.json", saved(made_capability(), folder / "c.json"), lambda path: str(Capability.load(path))),
        Reader("questions.jsonl", lines([{"question": "Why?", "choices": ["a", "b"], "answer": "A"}]), read_questions),
        Reader("shift.json", saved(make_shift(), folder / "s.json"), lambda path: str(FinetuningShift.load(path))),
        Reader("experiment.json", saved(found, folder / "e.json"), lambda path: str(MonitoringExperiment.load(path))),
        Reader("classifier.safetensors", saved(fit(), folder / "t.safetensors"), TextClassifier.load, structured=False),
        Reader("cfg.json", (sae / "cfg.json").read_bytes(), lambda path: read_sae(path.parent)),
        Reader("adapter_config.json", (adapter / "adapter_config.json").read_bytes(), on_bridge),
        Reader("adapter_model.safetensors", (adapter / "adapter_model.safetensors").read_bytes(), on_bridge, False),
        Reader("record.json", json.dumps(Steer(vectors.at(1), 2.0).to_dict()).encode(), use_record),
        *(
            Reader(name, (made / name).read_bytes(), use_run, structured=not name.endswith(".safetensors"))
            for name in ("summary.json", "calibration.json", "layer_sweep.json", "dose_response.json", "trait.json")
        ),
        *(Reader(name, (made / name).read_bytes(), use_run) for name in ("sweep_scores.jsonl", "sweep_rollouts.jsonl")),
    ]
    beside = {use_run: made, on_bridge: adapter}
    return [(each, beside.get(each.read, sae if each.name == "cfg.json" else None)) for each in listed]


def threshold_of(vectors):
    from persona_lens.monitoring.thresholds import calibrate_threshold

    return calibrate_threshold(drawn(40), vector=vectors.at(1))


def assert_read_or_refused(reader, contents, folder):
    """What came of it; AssertionError, with the file, for any other error, a second of waiting, or a changed folder."""
    path = folder / reader.name
    path.write_bytes(contents)
    before, began = {each: each.stat().st_size for each in folder.rglob("*")}, time.process_time()
    try:
        reader.read(path)
        outcome = "read"
    except (ValueError, ServerError) as error:
        # What was handed in as a value is named by whoever has read it.
        named = {reader.name, path.parent.name}
        if reader.name not in ("reply.json", "record.json") and not any(name in str(error) for name in named):
            raise AssertionError(f"{error!r} does not name {reader.name}: {contents[:500]!r}") from error
        outcome = "refused"
    except Exception as error:
        raise AssertionError(f"{reader.name}, {type(error).__name__} {error}: {contents[:3000]!r}") from error
    assert time.process_time() - began < 5, f"{reader.name} took too long: {contents[:500]!r}"
    assert {each: each.stat().st_size for each in folder.rglob("*")} == before, "a file was written"
    return outcome


def fuzz(readers, folder, examples):
    """Every reader on so many changed files; gives how many were read and refused."""
    counts = Counter()
    for number, (reader, whole) in enumerate(readers):
        place = folder / f"place-{number}"
        place.mkdir()
        for each in whole.iterdir() if whole else ():
            (place / each.name).write_bytes(each.read_bytes())
        assert assert_read_or_refused(reader, reader.contents, place) == "read"

        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.randoms(use_true_random=False), st.just(reader), st.just(place))
        def check(draw, reader, place):
            counts[assert_read_or_refused(reader, hostile(draw, reader), place)] += 1

        check()
    return counts


@pytest.mark.usefixtures("shapes_unchecked")
def test_any_changed_file_is_read_or_refused_by_its_name(readers, tmp_path):
    counts = fuzz(readers, tmp_path, QUICK)
    assert counts["refused"] > 2 * len(readers)
    assert counts["read"] > 0


@pytest.mark.soak
@pytest.mark.usefixtures("shapes_unchecked")
def test_any_of_many_changed_files_is_read_or_refused_by_its_name(readers, tmp_path):
    counts = fuzz(readers, tmp_path, MANY)
    print(f"{len(readers)} kinds of file, {sum(counts.values())} inputs: {dict(counts)}")


@pytest.mark.soak
def test_what_reaches_further_into_a_reader_is_read_or_refused_by_its_name(tmp_path):
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "tests.coverage_fuzz", tmp_path / "fuzz", str(GUIDED)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [each for each in found if "code" in each] == []
    assert min(each["inputs"] for each in found) >= GUIDED
    inputs, further = (sum(each[name] for each in found) for name in ("inputs", "reaching_further"))
    print(f"{len(found)} kinds of file, {inputs} inputs, of which {further} reached further")
