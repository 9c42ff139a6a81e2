"""lm-eval beside our own multiple choice: the same rendered prompts, the same letters, the same answers."""

import sys
from contextlib import nullcontext

import pytest
import torch

from persona_lens.evaluation.capability import measure_capability
from persona_lens.evaluation.capability_result import mmlu_sample
from persona_lens.evaluation.lm_eval import lm_eval_accuracy
from persona_lens.interventions.hooks import steer
from persona_lens.models.adapters import adapted
from tests.capability_cases import QUIET, adapter_folder, flat, letters_of, lm_eval_task, some_questions
from tests.intervention_cases import some_vectors

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval==0.4.13")

pytestmark = [
    # Raised inside lm-eval and what it imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def bridge(make_tiny_model):
    return make_tiny_model("TransformerBridge")


def centred(rows):
    """lm-eval moves the newline before the letter into the response: a constant for each question."""
    return flat([[value - max(row) for value in row] for row in rows])


def assert_same_answers(ours, theirs):
    assert theirs.scores == tuple(float(answer.is_right) for answer in ours.answers)
    assert theirs.mean.value == ours.accuracy.value
    assert centred(theirs.log_likelihoods) == pytest.approx(centred(letters_of(ours)), abs=1e-4)


@pytest.mark.parametrize("acting", ["nothing", "steering by 0", "steering", "an adapter"])
def test_lm_eval_gives_every_question_the_answer_that_we_give(bridge, tiny_tokenizer, tmp_path, acting):
    task = lm_eval_task(tmp_path / "task", tiny_tokenizer, some_questions())
    plain = measure_capability(bridge, some_questions(), **QUIET)
    contexts = {
        "nothing": nullcontext,
        "steering by 0": lambda: steer(bridge, some_vectors(bridge).at(1), 0.0),
        "steering": lambda: steer(bridge, some_vectors(bridge).at(1), 3.0),
        "an adapter": lambda: adapted(bridge, adapter_folder(tiny_tokenizer, tmp_path / "adapter")[0]),
    }
    with contexts[acting]():
        ours = measure_capability(bridge, some_questions(), **QUIET)
        theirs = lm_eval_accuracy(bridge, tmp_path / "task", task)
    assert_same_answers(ours, theirs)
    assert (letters_of(ours) == letters_of(plain)) is (acting in {"nothing", "steering by 0"})


def test_lm_eval_leaves_the_model_and_the_random_state_as_they_were(bridge, tiny_tokenizer, tmp_path):
    task = lm_eval_task(tmp_path / "task", tiny_tokenizer, some_questions())
    bridge.train()
    weights = {name: weight.clone() for name, weight in bridge.named_parameters()}
    state = torch.get_rng_state()
    lm_eval_accuracy(bridge, tmp_path / "task", task, limit=1)
    assert all(module.training for module in bridge.original_model.modules())
    assert all(torch.equal(weight, weights[name]) for name, weight in bridge.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_lm_eval_cannot_run_is_refused(bridge, both_classes, make_tiny_model, tiny_tokenizer, tmp_path):
    task = lm_eval_task(tmp_path / "task", tiny_tokenizer, some_questions())
    with pytest.raises(ValueError, match="has no task 'absent', but letters"):
        lm_eval_accuracy(bridge, tmp_path / "task", "absent")
    with pytest.raises(ValueError, match="has no metric 'f1', but acc"):
        lm_eval_accuracy(bridge, tmp_path / "task", task, metric="f1", limit=1)
    with pytest.raises(ValueError, match="Expected a folder"):
        lm_eval_accuracy(bridge, tmp_path / "absent", task)
    with (
        steer(bridge, some_vectors(bridge).at(1), 2.0, at="response"),
        pytest.raises(ValueError, match="at='response' cannot tell the prompt from the response"),
    ):
        lm_eval_accuracy(bridge, tmp_path / "task", task, limit=1)
    with pytest.raises(ValueError, match="model_class='TransformerBridge'"):
        lm_eval_accuracy(make_tiny_model("HookedTransformer"), tmp_path / "task", task)


BOMB = "import pathlib\npathlib.Path('owned').touch()\ndef run(*_, **__):\n    return 0\n"
ESCAPE = "{{ cycler.__init__.__globals__.os.mkdir('owned') }}"


@pytest.fixture
def armed(tiny_tokenizer, tmp_path, monkeypatch):
    """Adds lines to a task in whose folder is Python that makes the file `owned`; gives the folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "task"
    lm_eval_task(folder, tiny_tokenizer, some_questions())
    (folder / "bomb.py").write_text(BOMB)
    (folder / "bomb").mkdir()
    (folder / "bomb" / "bomb.py").write_text(BOMB)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(BOMB)

    def add(text, old="", new=""):
        path = folder / "task.yaml"
        path.write_text(path.read_text().replace(old, new) + text)
        return folder

    return add


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("process_docs: !function bomb.run\n", r"has a tag .*!function"),
        ("doc_to_image: !function bomb.run\n", r"has a tag .*!function"),
        ("class: !function bomb.run\n", r"has a tag .*!function"),
        ("class: bomb.run\n", "sets 'class'"),
        ("fewshot_config: {sampler: !function bomb.run}\n", r"has a tag .*!function"),
        ("fewshot_config: {process_docs: bomb.run}\n", "sets 'fewshot_config.process_docs'"),
        ("custom_dataset: !function bomb.run\n", r"has a tag .*!function"),
        ("use_prompt: 'prompts.yaml:one'\n", "sets 'use_prompt'"),
        ("unsafe_code: true\n", "sets 'unsafe_code'"),
        ("include: base.yml\n", r"base\.yml has a tag .*!function"),
        ("generation_kwargs: {custom_generate: ., trust_remote_code: true}\n", "generates with 'custom_generate'"),
    ],
)
def test_a_task_that_names_python_is_refused_and_nothing_of_it_runs(bridge, armed, text, words, tmp_path):
    folder = armed(text)
    (folder / "base.yml").write_text("process_docs: !function bomb.run\n")
    with pytest.raises(ValueError, match=rf"{words}.*: pass allow_code=True if you would run its code yourself\.$"):
        lm_eval_accuracy(bridge, folder, "letters", limit=1)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("extra", ["", "\n    hf_evaluate: true"])
def test_a_metric_that_is_a_script_is_refused_and_does_not_run(bridge, armed, tmp_path, extra):
    folder = armed("", "metric: acc", f"metric: {tmp_path}/task/bomb{extra}")
    with pytest.raises(ValueError, match="which is no metric of lm-eval's own, which runs code"):
        lm_eval_accuracy(bridge, folder, "letters", limit=1)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("data", ["pandas", "rows.py"])
def test_documents_that_are_a_pickle_or_a_script_are_refused(bridge, armed, data):
    folder = armed("", "dataset_path: json", f"dataset_path: {data}")
    with pytest.raises(ValueError, match=rf"loads its documents from '{data}' by a script or a pickle"):
        lm_eval_accuracy(bridge, folder, "letters", limit=1)


@pytest.mark.parametrize("field", ["doc_to_text", "doc_to_choice", "doc_to_target", "description", "gen_prefix"])
def test_a_template_of_a_task_cannot_leave_the_sandbox(bridge, armed, tmp_path, field):
    old = {"doc_to_text": 'doc_to_text: "{{prompt}}"', "doc_to_choice": "doc_to_choice: letters"}
    old |= {"doc_to_target": "doc_to_target: answer"}
    folder = armed(f'{field}: "{ESCAPE}"\n', old.get(field, "\0"), "")
    with pytest.raises(ValueError, match=r"A template of .*, task 'letters' cannot be filled in a sandbox \("):
        lm_eval_accuracy(bridge, folder, "letters", limit=1)
    assert not (tmp_path / "owned").exists()


def test_lm_evals_own_templates_are_as_they_were_afterwards(bridge, armed):
    from lm_eval import utils

    before = utils.env
    lm_eval_accuracy(bridge, armed(""), "letters", limit=1)
    with pytest.raises(ValueError, match="sandbox"):
        lm_eval_accuracy(bridge, armed("description: '{{ 1 / 0 }}'\n"), "letters", limit=1)
    assert utils.env is before


def test_a_task_with_a_tag_of_python_itself_is_no_task(bridge, armed, tmp_path):
    from persona_lens.evaluation.lm_eval import plain_task

    folder = armed("description: !!python/object/apply:os.mkdir [owned]\n")
    with pytest.raises(ValueError, match="has no task 'letters', but none"):
        lm_eval_accuracy(bridge, folder, "letters", limit=1)
    (folder / "base.yml").write_text("description: !!python/object/apply:os.mkdir [owned]\n")
    with pytest.raises(ValueError, match=r"base\.yml has a tag"):
        plain_task(folder / "base.yml", "letters")
    assert not (tmp_path / "owned").exists()


def test_a_task_runs_its_code_where_the_caller_allows_it(bridge, armed, tmp_path):
    (armed("process_docs: !function own.same\n") / "own.py").write_text(
        "import pathlib\npathlib.Path('owned').touch()\ndef same(docs):\n    return docs\n"
    )
    found = lm_eval_accuracy(bridge, tmp_path / "task", "letters", limit=1, allow_code=True)
    assert len(found.scores) == 1
    assert (tmp_path / "owned").exists()


def test_a_task_that_includes_a_plain_one_gives_its_scores(bridge, armed, tmp_path, monkeypatch):
    expected = lm_eval_accuracy(bridge, armed(""), "letters", limit=2)
    assert len(expected.scores) == 2  # the first documents only
    (tmp_path / "task" / "group.yaml").write_text("group: all\ntask: [letters]\n")
    with pytest.raises(ValueError, match=r"'all' of .* is a group of tasks: name one task of it"):
        lm_eval_accuracy(bridge, tmp_path / "task", "all")
    (tmp_path / "task" / "other.yaml").write_text("include: task.yaml\ntask: others\ndescription: ''\n")
    found = lm_eval_accuracy(bridge, tmp_path / "task", "others", limit=2)
    assert found.log_likelihoods == expected.log_likelihoods
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"persona-lens\[eval\]"):
        lm_eval_accuracy(bridge, tmp_path, "letters")


def test_on_the_embedded_model_lm_eval_agrees_with_and_without_steering(embedded_bridge, tmp_path):
    questions = mmlu_sample()[::40]
    task = lm_eval_task(tmp_path / "task", embedded_bridge.tokenizer, questions)
    plain = measure_capability(embedded_bridge, questions, **QUIET)
    assert_same_answers(plain, lm_eval_accuracy(embedded_bridge, tmp_path / "task", task))
    with steer(embedded_bridge, some_vectors(embedded_bridge).at(14), 2.0):
        steered = measure_capability(embedded_bridge, questions, **QUIET)
        assert_same_answers(steered, lm_eval_accuracy(embedded_bridge, tmp_path / "task", task))
    assert letters_of(steered) != letters_of(plain)
