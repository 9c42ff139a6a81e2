"""Vectors to the hub and back, through the hub's own client, to a hub on this machine; and what the hub may refuse."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from persona_lens.interop.hub import model_card
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests.fake_hub import COMMIT, FakeHub
from tests.vector_cases import assert_same_bits, make_provenance, make_statistics, make_vectors

TOKEN = "hf_secret0123456789abcdef"
PUSH = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from persona_lens.interop.hub import push_vectors
from persona_lens.vectors.persona_vectors import PersonaVectors
print(push_vectors(PersonaVectors.load(sys.argv[1]), sys.argv[2]))
"""
PULL = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from persona_lens.interop.hub import pull_vectors
pull_vectors(sys.argv[1]).save(sys.argv[2])
"""


def ask(script, hub, home, *arguments, token=TOKEN):
    """Run a script in a process whose hub is `hub`: its client reads the environment once, as it is imported."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def saved(tmp_path):
    vectors = make_vectors(provenance=make_provenance(), statistics=make_statistics())
    vectors.save(tmp_path / "mine.safetensors")
    return vectors


@pytest.mark.slow
def test_vectors_come_back_from_the_hub_to_the_bit_and_the_token_is_nowhere(tmp_path, saved):
    with FakeHub(TOKEN) as hub:
        pushed = ask(PUSH, hub, tmp_path, tmp_path / "mine.safetensors", "someone/evil")
        assert pushed.returncode == 0, pushed.stderr
        assert f"{hub.url}/someone/evil/commit/{COMMIT}" in pushed.stdout
        pulled = ask(PULL, hub, tmp_path, "someone/evil", tmp_path / "again.safetensors", token=None)
        assert pulled.returncode == 0, pulled.stderr

    again = PersonaVectors.load(tmp_path / "again.safetensors")
    assert_same_bits(again.directions, saved.directions)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "mine.safetensors").read_bytes()
    assert set(hub.files) == {("someone/evil", "vectors.safetensors"), ("someone/evil", "README.md")}
    assert hub.private == {"someone/evil": True}
    assert {token for command, _, token in hub.seen if command == "POST"} == {f"Bearer {TOKEN}"}
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert kept == []
    assert TOKEN not in "".join((pushed.stdout, pushed.stderr, pulled.stdout, pulled.stderr))
    assert TOKEN.encode() not in b"".join(hub.files.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token": "hf_another"}, "Could not push to someone/evil on the hub (status 401): check that the repository"),
        ({"refuse": 403}, "Could not push to someone/evil on the hub (status 403): check that the repository exists"),
    ],
)
def test_a_refusal_is_one_sentence_without_the_token(tmp_path, saved, options, words):
    with FakeHub(**({"token": TOKEN} | options)) as hub:
        done = ask(PUSH, hub, tmp_path, tmp_path / "mine.safetensors", "someone/evil")
    assert done.returncode == 1
    assert words in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_a_repository_that_is_not_there_is_one_sentence(tmp_path):
    with FakeHub(TOKEN) as hub:
        done = ask(PULL, hub, tmp_path, "someone/none", tmp_path / "again.safetensors")
    assert "Could not pull from someone/none on the hub (status 404)" in done.stderr


def test_a_repository_of_something_else_is_refused(tmp_path):
    with FakeHub(TOKEN) as hub:
        hub.files["someone/else", "model.bin"] = b"pickle"
        done = ask(PULL, hub, tmp_path, "someone/else", tmp_path / "again.safetensors")
    assert "someone/else on the hub has no vectors.safetensors" in done.stderr
    assert not any("model.bin" in path for _, path, _ in hub.seen)


def test_a_damaged_file_on_the_hub_is_refused(tmp_path):
    with FakeHub(TOKEN) as hub:
        hub.files["someone/evil", "vectors.safetensors"] = b"\x08\x00"
        done = ask(PULL, hub, tmp_path, "someone/evil", tmp_path / "again.safetensors")
    assert "is not a whole safetensors file" in done.stderr


def test_pushing_without_a_token_asks_for_one(monkeypatch):
    from persona_lens.interop.hub import push_vectors

    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match="Pushing to someone/evil needs a token: set HF_TOKEN"):
        push_vectors(make_vectors(), "someone/evil")


def test_a_name_that_is_no_repository_is_refused(monkeypatch):
    from persona_lens.interop.hub import pull_vectors, push_vectors

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for ask_hub in (lambda: push_vectors(make_vectors(), "a/b/c"), lambda: pull_vectors("a/b/c")):
        with pytest.raises(ValueError, match="'a/b/c' is no name of a repository: expected owner/name"):
            ask_hub()


def test_the_card_names_a_hub_model_and_keeps_a_local_path_to_itself():
    def card(name):
        provenance = make_provenance()
        object.__setattr__(provenance.model, "name", name)
        return model_card(make_vectors(provenance=provenance), "someone/evil")

    assert "base_model: Qwen/Qwen2.5-7B-Instruct" in card("Qwen/Qwen2.5-7B-Instruct")
    assert "/home/me" not in card("/home/me/models/qwen")
    assert 'vectors = pull_vectors("someone/evil")' in card("gpt2")
    assert "| 3 |" in card("gpt2")


def named(name):
    provenance = make_provenance()
    object.__setattr__(provenance.model, "name", name)
    return make_vectors(provenance=provenance)


def test_vectors_on_the_hub_do_not_say_where_a_local_model_is(tmp_path, monkeypatch):
    """Neither those that are put together by hand, nor those that an older version has saved."""
    from persona_lens.interop import hub

    sent = {}

    class Client:
        def create_repo(self, *_, **__):
            pass

        def upload_folder(self, *, folder_path, **_):
            sent.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub, "_hub", lambda _: Client())
    hub.push_vectors(named("/home/me/secret project/qwen"), "someone/evil")
    assert set(sent) == {"vectors.safetensors", "README.md"}
    assert not any(b"secret project" in contents for contents in sent.values())
    (tmp_path / "sent.safetensors").write_bytes(sent["vectors.safetensors"])
    assert PersonaVectors.load(tmp_path / "sent.safetensors").provenance.model.name == "qwen"


def test_a_file_with_a_path_as_the_models_name_is_read_without_it(tmp_path):
    named("/home/me/models/qwen").save(tmp_path / "old.safetensors")
    assert PersonaVectors.load(tmp_path / "old.safetensors").provenance.model.name == "qwen"


def test_the_card_has_no_markup_of_a_traits_name():
    card = model_card(make_vectors("<img src=x> [evil](http://x) `a` # b"), "someone/evil")
    assert r"# Persona vectors: \<img src=x\> \[evil\](http://x) \`a\` \# b" in card
