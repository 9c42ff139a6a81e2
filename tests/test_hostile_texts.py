"""Foreign text stays text: in names of files, in chat templates, on pages, in pictures, and on a terminal."""

import json
import os
import pickle
import re
import unicodedata
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from persona_lens.chat.batches import end_of_turn, render_prompt
from persona_lens.interop.conversion import read_vectors
from persona_lens.pages.tokens import monitoring_html
from persona_lens.plots.monitoring import plot_turns
from persona_lens.traits.trait import Trait, write_reference_trait
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests.evaluation_cases import TRAIT
from tests.plot_cases import NASTY
from tests.test_monitoring_plots import monitoring
from tests.vector_cases import make_provenance, make_vectors

NAMES = ["../evil", "..", "a/b", "a\\b", "evil\0", "x" * 10_000, "x" * 101, "\u202elive", "e\u0301vil", "CON", "com1"]
NAMES += ["nul.txt", "-rf", ".hidden", "evil.", "evil ", "evil\n", "", "\ud800", "ev\u200dil", "a:b", "*", "~", "%00"]
STRANGE = "\x1b]0;title\x07[red]red[/red][/] \x9b31m\u202eevil\x00 <b>bold</b>\rgone"
TURNS = [{"role": "user", "content": "Why?"}]


def named(name):
    return Trait(**{field: getattr(TRAIT, field) for field in TRAIT.__dataclass_fields__} | {"name": name})


# Names


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_a_name_that_would_make_no_file_of_its_own_is_refused(name):
    with pytest.raises(ValueError, match=r"^name should be "):
        named(name)


@pytest.mark.parametrize("name", ["evil", "very-evil", "two words", "v1.5", "\u00e9vil", "\u05e8\u05e2", "x" * 100])
def test_other_names_make_a_file_in_the_folder_and_none_that_is_another_ones(name, tmp_path):
    write_reference_trait(named(name), tmp_path)
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")}
    assert made == {f"trait_data_{kind}/{name}.json" for kind in ("extract", "eval")}
    assert unicodedata.normalize("NFC", name) == name


# Chat templates


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{% for number in range(10 ** 12) %}x{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
        "{% include '/etc/passwd' %}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_runs_in_a_sandbox_and_what_it_may_not_do_is_one_sentence(
    tiny_tokenizer, template, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    for render in (lambda: render_prompt(tiny_tokenizer, TURNS), lambda: end_of_turn(tiny_tokenizer)):
        with pytest.raises(ValueError, match=r"^The chat template refuses these messages: "):
            render()
    assert list(tmp_path.iterdir()) == []


# Pickles


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("ending", [".pt", ".pth", ".safetensors", ".gguf"])
def test_a_pickle_runs_nothing_whatever_its_name_is(tmp_path, ending, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / f"plain{ending}", tmp_path / f"saved{ending}"]
    paths[0].write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), paths[1])
    for path in paths:
        with pytest.raises(ValueError, match=path.name):
            read_vectors(path, n_layers=4)
    assert not (tmp_path / "owned").exists()


# Pages and pictures


def test_a_picture_and_a_page_have_no_tag_of_a_chats_name_or_text():
    found = monitoring(name=NASTY)
    figure = plot_turns(found, vector=None)
    figure.update_traces(legendgroup=None)  # which is never shown
    assert "<b>bold" not in str(figure.to_dict())
    for page in (figure.to_html(include_plotlyjs=False), monitoring_html(found, chat=1, title=NASTY)):
        assert "<script>alert" not in page
        assert "<b>bold" not in page


def test_results_have_no_html_form_of_their_own():
    import persona_lens

    public = [getattr(persona_lens, name) for name in persona_lens.__all__]
    assert not [value for value in public if isinstance(value, type) and hasattr(value, "_repr_html_")]


# Terminals


@pytest.mark.parametrize("command", ["table", "columns", "say", "tell", "json"])
def test_foreign_text_neither_crashes_nor_steers_a_terminal(command, capsys):
    from persona_lens.cli import output

    commands = {
        "table": lambda: output.print_table(["a", STRANGE], [[STRANGE, "[/]"], ["[red]", STRANGE]]),
        "columns": lambda: output.print_columns({STRANGE: STRANGE, "[/]": "[/red]"}),
        "say": lambda: output.say(STRANGE),
        "tell": lambda: output.tell(STRANGE),
        "json": lambda: output.tell_json({"text": STRANGE}),
    }
    commands[command]()
    printed = "".join(capsys.readouterr())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", printed)
    whole = re.sub(r"[\s│]", "", printed)
    assert "[red]red[/red][/]" in whole
    assert ("\\u001b" if command == "json" else "\\x1b") in whole


# Files of vectors

LINES = ["evil\n---\nlicense: other\n", "evil\x1b[31m", "evil\rgood", "e\x9b31m", "evil\u2028", "evil\u202e", "\ud800"]


@pytest.mark.parametrize("name", [*LINES, 5, None], ids=ascii)
def test_a_trait_of_vectors_is_one_line_that_steers_no_terminal(name, shapes_unchecked):
    vectors = make_vectors()
    for given in (vectors, vectors.at(1)):
        with pytest.raises(ValueError, match="The name of a trait is one line of text without control characters"):
            replace(given, trait=name)


def changed_header(path, change):
    """A vector file whose header somebody has changed."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["persona_lens"])
    change(header)
    save_file(tensors, path, metadata={"persona_lens": json.dumps(header)})


@pytest.mark.parametrize("text", LINES[:-1], ids=ascii)
@pytest.mark.parametrize(
    "place", [("trait",), ("provenance", "model", "name"), ("provenance", "hook_point"), ("provenance", "created")]
)
def test_a_vector_file_with_control_characters_is_refused_by_its_name(tmp_path, text, place):
    path = tmp_path / "v.safetensors"
    make_vectors(provenance=make_provenance()).save(path)

    def change(header):
        for key in place[:-1]:
            header = header[key]
        header[place[-1]] = text

    changed_header(path, change)
    with pytest.raises(ValueError, match=rf"^{path} .*is one line of text without control characters") as refused:
        PersonaVectors.load(path)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u202e]", str(refused.value))


def test_a_control_vector_whose_name_is_no_line_is_refused_by_its_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "v.gguf"
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("general.name", LINES[0])
    writer.add_tensor("direction.1", torch.ones(6).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=rf"^{path}: The name of a trait is one line"):
        read_vectors(path, n_layers=4)
