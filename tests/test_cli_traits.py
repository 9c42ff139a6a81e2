"""`persona-lens generate-trait`: what it writes, what it refuses, and that nothing paid for or written is lost."""

import json

import pytest
import typer

from persona_lens.cli.options import ServerOptions
from persona_lens.traits.trait import load_trait
from tests.trait_drafts import DESCRIPTION, NAME, draft, with_questions, writer

GOOD = json.dumps(draft())


@pytest.fixture
def generate(cli, tmp_path):
    """Run `generate-trait` against a server; gives exit code, standard output and standard error."""

    def run(server, *arguments, output=None):
        where = ["--writer", f"openai:writer@{server.url}", "--output", output or tmp_path / "pedantic.json"]
        return cli("generate-trait", NAME, "--description", DESCRIPTION, *where, *arguments)

    return run


def test_the_trait_is_written_and_previewed(generate, tmp_path):
    with writer(GOOD) as server:
        code, out, err = generate(server, output=tmp_path / "new" / "pedantic.json")
    trait = load_trait(tmp_path / "new" / "pedantic.json")
    assert (code, trait.name, trait.description) == (0, NAME, DESCRIPTION)
    assert trait.evaluation_questions[19] in out
    assert trait.monitoring_prompts[7] in out
    assert "1 calls" in err


def test_json_for_scripts_is_the_trait_itself(generate, tmp_path):
    with writer(GOOD) as server:
        _, out, _ = generate(server, "--json")
    assert out == (tmp_path / "pedantic.json").read_text()


def test_the_options_reach_the_request_and_the_trait(generate, tmp_path):
    small = draft(instructions={"pair_1": draft()["instructions"]["pair_1"]}, questions={"question_1": "Why, though?"})
    sizes = ["--n-pairs", 1, "--n-questions", 1, "--no-monitoring-prompts", "--template-rubric"]
    with writer(json.dumps(small)) as server:
        code, _, _ = generate(server, *sizes, "--seed", 5, "--max-tokens", 300, "--temperature", 0.5)
    [body] = server.bodies
    assert (code, body["seed"], body["max_tokens"], body["temperature"]) == (0, 5, 300, 0.5)
    trait = load_trait(tmp_path / "pedantic.json")
    assert (len(trait.instructions), trait.extraction_questions) == (1, ("Why, though?",))
    assert trait.monitoring_prompts == ()
    assert DESCRIPTION in trait.rubric


def test_a_dry_run_asks_nothing_and_writes_nothing(generate, tmp_path):
    with writer(GOOD) as server:
        code, out, _ = generate(server, "--dry-run", "--max-tokens", "900")
        _, as_json, _ = generate(server, "--dry-run", "--json")
    assert code == 0
    assert out.startswith("1 calls, 0 of them in the cache")
    assert "at most 900" in out
    assert json.loads(as_json)["completion_tokens"] == 8000
    assert server.bodies == []
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_asks_nothing_and_gives_the_same(generate, tmp_path):
    with writer(GOOD) as server:
        first = generate(server)
        written = (tmp_path / "pedantic.json").read_bytes()
        second = generate(server)
    assert (first[0], second[0], len(server.bodies)) == (0, 0, 1)
    assert first[1] == second[1]
    assert (tmp_path / "pedantic.json").read_bytes() == written


def test_an_output_that_was_edited_is_kept(generate, tmp_path):
    with writer(GOOD) as server:
        generate(server)
        edited = (tmp_path / "pedantic.json").read_text().replace("easy-going", "relaxed")
        (tmp_path / "pedantic.json").write_text(edited)
        code, _, err = generate(server)
    assert (code, len(server.bodies)) == (1, 1)
    assert "--overwrite" in err
    assert (tmp_path / "pedantic.json").read_text() == edited


def test_an_output_that_exists_is_refused_before_anything_is_paid(generate, tmp_path):
    (tmp_path / "pedantic.json").write_text("mine")
    with writer(GOOD) as server:
        code, _, err = generate(server)
    assert (code, server.bodies) == (1, [])
    assert "--overwrite" in err
    assert (tmp_path / "pedantic.json").read_text() == "mine"


def test_overwrite_replaces_the_output(generate, tmp_path):
    (tmp_path / "pedantic.json").write_text("mine")
    with writer(GOOD) as server:
        code, _, _ = generate(server, "--overwrite")
    assert code == 0
    assert load_trait(tmp_path / "pedantic.json").name == NAME


def test_a_draft_that_cannot_be_used_is_kept_beside_the_output(generate, tmp_path):
    bad = with_questions(question_4=None)
    with writer(bad) as server:
        code, _, err = generate(server)
    [line] = err.strip().splitlines()
    assert code == 1
    assert "questions should be 40, and there are 39" in line
    assert (tmp_path / "pedantic.draft.json").read_text() == bad
    assert str(tmp_path / "pedantic.draft.json") in line
    assert not (tmp_path / "pedantic.json").exists()


def test_an_output_that_is_no_json_file_is_bad_usage(generate, tmp_path):
    with writer(GOOD) as server:
        code, _, err = generate(server, output=tmp_path / "pedantic.txt")
    assert (code, server.bodies) == (2, [])
    assert "must end in .json" in " ".join(err.split())


def test_the_command_has_help_with_an_example(cli):
    _, out, _ = cli("generate-trait", "--help")
    assert "Example: persona-lens generate-trait" in " ".join(out.split())


@pytest.mark.parametrize(
    ("spec", "model", "url"),
    [
        ("openai:gpt-4.1", "gpt-4.1", "https://api.openai.com/v1"),
        ("openai:my/model@http://localhost:8000/v1", "my/model", "http://localhost:8000/v1"),
        ("openai:m@q4@https://host/a@b/v1", "m@q4", "https://host/a@b/v1"),
        ("openai:m@http://one/@http://two", "m", "http://one/@http://two"),
    ],
)
def test_a_server_is_a_model_and_a_url(spec, model, url, monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    found = ServerOptions(3, 9.0).client(spec, tmp_path, dry_run=True)
    assert (found.endpoint.model, found.endpoint.url) == (model, url)
    assert (found.concurrency, found.timeout, found.cache) == (3, 9.0, None)


@pytest.mark.parametrize("spec", ["gpt-4.1", "openai:", "openai:@http://host/v1", "vllm:m", "openai:m@http://"])
def test_a_server_of_another_form_is_bad_usage(spec, tmp_path):
    with pytest.raises(typer.BadParameter):
        ServerOptions().client(spec, tmp_path, dry_run=True)
