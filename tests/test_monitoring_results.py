"""What monitoring refuses, and its results as tables and files."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from persona_lens.chat.batches import Conversation, RenderedPrompt
from persona_lens.interventions.hooks import steer
from persona_lens.monitoring.projection import monitor
from persona_lens.monitoring.result import Monitoring
from persona_lens.monitoring.transcripts import Transcript
from tests.chat_cases import CHATS, CLOCKED, chat, counted, set_clock, several
from tests.intervention_cases import some_vectors

QUIET = {"progress": False}


def test_what_cannot_be_monitored_is_refused_in_words(tiny_model, tiny_gpt2, tmp_path, shapes_unchecked):
    vector = some_vectors(tiny_model).at(1)
    with pytest.raises(ValueError, match="nothing to monitor: pass at least one chat"):
        monitor(tiny_model, [], vector, **QUIET)
    with pytest.raises(ValueError, match="pass at least one vector"):
        monitor(tiny_model, CHATS, [], **QUIET)
    with pytest.raises(ValueError, match="2 vectors are called evil@1"):
        monitor(tiny_model, CHATS, [vector, replace(vector)], **QUIET)
    with pytest.raises(ValueError, match=r"Chat 2: messages\[1\] has role 'critic'"):
        monitor(tiny_model, [CHATS[0], [*CHATS[1][:1], {"role": "critic", "content": "Hm"}]], vector, **QUIET)
    for rendered in (RenderedPrompt("<|im_start|>user", False), Conversation("<|im_start|>user", "So.")):
        with pytest.raises(ValueError, match="Chat 1: expected messages, got rendered text"):
            monitor(tiny_model, [rendered], vector, **QUIET)
    with pytest.raises(ValueError, match=r"pass \[messages\]"):
        monitor(tiny_model, CHATS[0], vector, **QUIET)
    long = Transcript(chat(*["one two three four five six"] * 40), "long")
    with pytest.raises(ValueError, match="24"):
        monitor(tiny_model, CHATS, some_vectors(tiny_gpt2).at(1), **QUIET)
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"chats\.jsonl, row 1: A chat needs a user turn"):
        monitor(tiny_model, tmp_path / "chats.jsonl", vector, **QUIET)
    with pytest.raises(ValueError, match=r"long: The chat has \d+ tokens and the model's context holds 256"):
        monitor(tiny_model, [long], vector, **QUIET)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_of_something_else_is_not_replaced_by_results(tiny_model, tmp_path, suffix):
    path, vector = tmp_path / f"chats{suffix}", some_vectors(tiny_model).at(1)
    rows = [{"messages": each} for each in CHATS]
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pd.DataFrame({"name": ["mine"]}).to_parquet(path)
    before = path.read_bytes()

    (tmp_path / f"folder{suffix}").mkdir()

    def work():
        with pytest.raises(ValueError, match="holds something else: expected results of monitoring"):
            monitor(tiny_model, path if suffix == ".jsonl" else CHATS, vector, output_file=path, **QUIET)
        with pytest.raises(ValueError, match=r"\.jsonl or \.parquet"):
            monitor(tiny_model, CHATS, vector, output_file=tmp_path / "a.csv", **QUIET)
        with pytest.raises(OSError, match="it is a folder"):
            monitor(tiny_model, CHATS, vector, output_file=tmp_path / f"folder{suffix}", **QUIET)

    assert counted(tiny_model, work)["layer -1"] == 0
    assert path.read_bytes() == before
    mine = monitor(tiny_model, CHATS, vector, output_file=tmp_path / f"new{suffix}", **QUIET)
    monitor(tiny_model, CHATS[:1], vector, output_file=tmp_path / f"new{suffix}", **QUIET)  # results replace results
    assert len(Monitoring.load(tmp_path / f"new{suffix}").chats) == 1
    mine.save(path)  # replaces any file of its name, as saving does
    assert len(Monitoring.load(path).chats) == len(CHATS)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("tokens", [False, True])
def test_results_come_back_from_their_file_as_they_were(tiny_model, tmp_path, suffix, tokens):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / "new" / f"a.{suffix}"
    chats = [*CHATS, chat("Why?", "<think>")]
    with steer(tiny_model, some_vectors(tiny_model).at(0), 1.0):
        found = monitor(
            tiny_model, chats, several(tiny_model), tokens=tokens, after="e", window=200, output_file=path, **QUIET
        )
    assert Monitoring.load(path) == found
    assert found.unclosed > 0
    assert found.table().equals(Monitoring.load(path).table())
    unanswered = monitor(tiny_model, CHATS[3:4], several(tiny_model), output_file=path, **QUIET)
    assert Monitoring.load(path) == unanswered


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_results_say_which_day_a_template_that_reads_the_clock_was_told(tiny_bridge, tmp_path, monkeypatch, suffix):
    plain = monitor(tiny_bridge, CHATS, some_vectors(tiny_bridge).at(1), progress=False)
    assert "template_date" not in plain.to_dict()
    monkeypatch.setattr(tiny_bridge.tokenizer, "chat_template", CLOCKED)
    set_clock(monkeypatch, "2026-11-30")
    found = monitor(
        tiny_bridge, CHATS, some_vectors(tiny_bridge).at(1), output_file=tmp_path / f"m{suffix}", progress=False
    )
    assert Monitoring.load(tmp_path / f"m{suffix}").template_date == found.template_date == "2026-11-30"


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": []}) + "\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("", encoding="utf-8")
    for name in ("a.jsonl", "b.jsonl"):
        with pytest.raises(ValueError, match="is not a monitoring file of version 1"):
            Monitoring.load(tmp_path / name)
    pytest.importorskip("pyarrow")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="is not a monitoring file of version 1"):
        Monitoring.load(tmp_path / "a.parquet")
    with pytest.raises(FileNotFoundError, match="No file"):
        Monitoring.load(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (lambda lines: lines[:-1], "it has 10 of 11 turns"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "turn 2 of chat 0 is not where it belongs"),
        (lambda lines: [json.dumps(json.loads(lines[0]) | {"vectors": []}), *lines[1:]], "it names no vector"),
    ],
)
def test_a_file_that_somebody_changed_is_refused(tiny_model, tmp_path, keep, words):
    path = tmp_path / "a.jsonl"
    monitor(tiny_model, CHATS, several(tiny_model), output_file=path, **QUIET)
    path.write_text("\n".join(keep(path.read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl is damaged: ValueError {words}"):
        Monitoring.load(path)


def test_the_table_has_a_row_for_each_turn(tiny_model):
    vectors = several(tiny_model)[:2]
    table = monitor(tiny_model, [Transcript(CHATS[0], "sea"), CHATS[1], Transcript(CHATS[3], "sea")], vectors, **QUIET)
    found = table.table()
    columns = ["kind@2 prompt", "kind@2 response", "evil@0 prompt", "evil@0 response"]
    assert list(found.columns) == ["chat", "turn", "message", "n_tokens", "dropped_messages", *columns]
    assert list(zip(found["chat"], found["turn"], found["message"], strict=True)) == [
        ("sea", 1, 2),
        ("sea", 2, 4),
        ("sea", 3, 6),
        ("chat 2", 1, 1),
        ("sea (2)", 1, 2),
    ]
    assert found["kind@2 response"].isna().tolist() == [False, False, True, False, True]
    assert (found["n_tokens"] == 0).tolist() == found["kind@2 response"].isna().tolist()


@pytest.mark.parametrize("form", ["pandas", "datasets", "conversations and texts"])
def test_tables_conversations_and_texts_are_monitored_as_messages_are(tiny_model, form):
    rows = [{"id": "a", "messages": CHATS[0][:3]}, {"id": "b", "messages": [{"role": "user", "content": "Why?"}]}]
    if form == "pandas":
        chats = pd.DataFrame(rows)
    elif form == "datasets":
        chats = pytest.importorskip("datasets").Dataset.from_list(rows)
    else:
        chats = [Conversation.from_messages(CHATS[0][:3]), "Why?"]
    found = monitor(tiny_model, chats, several(tiny_model), **QUIET)
    plain = monitor(tiny_model, [row["messages"] for row in rows], several(tiny_model), **QUIET)
    assert [chat.name for chat in found.chats] == (["chat 1", "chat 2"] if form.startswith("conv") else ["a", "b"])
    assert [chat.turns for chat in found.chats] == [chat.turns for chat in plain.chats]
