"""JSON-lines files that survive being killed, and errors before long work."""

import os
import stat
import threading

import pytest


@pytest.fixture(scope="module")
def records():
    """The module under test, imported late so that the jaxtyping hook instruments it."""
    import persona_lens.storage.files

    return persona_lens.storage.files


@pytest.fixture
def file(records, tmp_path):
    return records.JsonLines(tmp_path / "new" / "rows.jsonl")


FIELDS = ("text", "score")
ROWS = [{"text": "one\ntwo\u2028three", "score": 1.5}, {"text": "é", "score": None}]


def test_rows_come_back_as_they_were_appended_one_a_line(file):
    file.append(ROWS[:1])
    file.append(ROWS[1:])
    assert file.read() == ROWS
    assert file.path.read_bytes().count(b"\n") == len(ROWS)


def test_a_missing_file_has_no_rows_and_is_not_made(file):
    assert file.read() == file.resume(FIELDS) == []
    assert not file.path.exists()


@pytest.mark.parametrize("rows", [ROWS, []], ids=["after rows", "the first row"])
def test_a_line_left_unfinished_is_moved_aside_on_resume_and_none_is_overwritten(file, rows):
    file.append(ROWS)
    whole = file.path.read_bytes() if rows else b""
    for tail in (b'{"text": "half a ro', b'{"text": '):
        file.path.write_bytes(whole + tail)
        assert file.resume(FIELDS) == rows
        assert file.path.read_bytes() == whole
    aside = {path.name: path.read_bytes() for path in file.path.parent.iterdir() if path != file.path}
    assert aside == {"rows.jsonl.damaged": b'{"text": "half a ro\n', "rows.jsonl.damaged-2": b'{"text": \n'}


@pytest.mark.parametrize(
    "content",
    [
        b"a note",
        b"a note\nand half a no",
        b'{"score": 1.0}',
        b'{"score": 1.0}\n{"text"',
        b'["text", "score"]',
        b"{\n",
        b"\0",
    ],
)
def test_a_file_that_is_not_ours_is_left_as_it_was(file, content):
    file.path.parent.mkdir()
    file.path.write_bytes(content)
    for touch in (file.resume, file.mend):
        with pytest.raises(ValueError, match=r"rows.jsonl holds something else: expected rows with text, score, got b"):
            touch(FIELDS)
    assert {path.name: path.read_bytes() for path in file.path.parent.iterdir()} == {"rows.jsonl": content}


@pytest.mark.parametrize("kept", range(1, 12))
def test_wherever_a_write_stops_a_resume_goes_on(file, kept):
    file.append(ROWS)
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-kept])
    rows = ROWS if kept == 1 else ROWS[:1]  # a row that lacks only its end of line is kept
    assert file.whole() == list(file.stream()) == rows
    assert file.resume(FIELDS) == rows
    file.append(ROWS[len(rows) :])
    assert file.path.read_bytes() == whole
    assert len(list(file.path.parent.iterdir())) == 1 + (kept > 1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"not json\n", r"got b'not json'"),
        (b"[1]\n", "got list"),
        (b"\xff{}\n", "expected a JSON object"),
        (b"{", "got b'{'"),
    ],
)
def test_a_malformed_line_is_named_and_left_there(file, line, words):
    file.append(ROWS[:1])
    content = file.path.read_bytes() + line
    file.path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 2: .*{words}"):
        file.read()
    if line.endswith(b"\n"):
        with pytest.raises(ValueError, match="line 2"):
            file.resume(FIELDS)
    assert {path.name: path.read_bytes() for path in file.path.parent.iterdir()} == {"rows.jsonl": content}


def test_a_number_that_json_does_not_have_is_refused_and_nothing_is_written(file):
    file.append(ROWS)
    with pytest.raises(ValueError, match="Out of range float"):
        file.append([ROWS[0], {"score": float("nan")}])
    assert file.read() == ROWS


def test_a_json_file_is_replaced_whole(records, tmp_path):
    path = tmp_path / "new" / "settings.json"
    records.write_json(path, {"é": 1})
    with pytest.raises(TypeError):
        records.write_json(path, {"é": object()})
    assert path.read_text() == '{\n  "é": 1\n}\n'
    assert list(path.parent.iterdir()) == [path]


def test_many_threads_write_one_file_and_every_reader_finds_it_whole(records, tmp_path):
    path, errors = tmp_path / "shared.json", []
    path.write_bytes(b"start")
    wanted = {bytes([letter]) * 20_000 for letter in b"abcd"}

    def write(contents):
        try:
            for _ in range(25):
                records.write_whole(path, contents)
                if (there := path.read_bytes()) not in wanted:
                    errors.append(f"read {len(there)} bytes")
        except OSError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=write, args=(contents,)) for contents in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_written_whole_and_its_folder_are_flushed_and_have_the_usual_permissions(
    records, tmp_path, monkeypatch
):
    flushed, before = [], os.umask(0o027)
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(stat.S_ISDIR(os.fstat(descriptor).st_mode)))
    try:
        records.write_whole(tmp_path / "a.json", b"1")
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    assert flushed == [False, True]
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_planted_link_is_neither_followed_nor_written_by_a_whole_write(records, tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    # The name of the temporary file as an attacker would have to guess it.
    monkeypatch.setattr("secrets.token_hex", lambda _: "0" * 16)
    (tmp_path / f".a.json.{'0' * 16}.unfinished").symlink_to(victim)
    (tmp_path / f".a.json.{os.getpid()}.unfinished").symlink_to(victim)
    with pytest.raises(OSError, match=r"Cannot write .*a\.json"):
        records.write_whole(tmp_path / "a.json", b"ours")
    assert victim.read_text() == "mine"


def test_a_whole_write_replaces_a_link_and_leaves_what_it_points_to(records, tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("mine")
    link.symlink_to(target)
    records.write_whole(link, b"ours")
    assert (target.read_text(), link.read_text(), link.is_symlink()) == ("mine", "ours", False)


def test_rows_are_appended_to_what_a_link_points_to(records, tmp_path):
    records.JsonLines(tmp_path / "rows.jsonl").append(ROWS)
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "rows.jsonl")
    assert records.JsonLines(link).resume(FIELDS) == ROWS
    records.JsonLines(link).append(ROWS)
    assert link.is_symlink()
    assert len(records.JsonLines(tmp_path / "rows.jsonl").read()) == 4


def test_a_write_that_fails_takes_no_rows_of_another_process_away(file, monkeypatch):
    file.append(ROWS)

    def fail(_):
        with file.path.open("ab") as other:
            other.write(b'{"text": "theirs", "score": 1}\n')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Cannot write"):
        file.append(ROWS[:1])
    assert {"text": "theirs", "score": 1} in file.read()


def test_a_mapped_file_begins_with_the_rows_it_is_given(records, tmp_path):
    rows = records.zeros_on_disk(tmp_path / "rows.npy", "float32", (3, 2), first=[[1, 2]])
    assert rows.tolist() == [[1, 2], [0, 0], [0, 0]]
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.npy"]


def test_whether_a_path_can_be_written_is_known_before(records, tmp_path):
    (tmp_path / "file").touch()
    records.ensure_writable(tmp_path / "a" / "b" / "rows.jsonl")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    for path, words in [(tmp_path / "file" / "rows.jsonl", "file is not a folder that can"), (tmp_path, "is a folder")]:
        with pytest.raises(OSError, match=f"Cannot write .*{words}"):
            records.ensure_writable(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_cannot_be_written(records, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="Cannot write"):
        records.ensure_writable(tmp_path / "rows.jsonl")


@pytest.mark.timeout(60)  # whoever opens it waits
@pytest.mark.parametrize("write", ["whole", "rows", "mend", "check", "resume"])
def test_a_pipe_is_neither_replaced_nor_waited_for(records, tmp_path, write):
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    does = {
        "whole": lambda: records.write_whole(pipe, b"ours"),
        "rows": lambda: records.JsonLines(pipe).append(ROWS),
        "mend": lambda: records.JsonLines(pipe).mend(FIELDS),
        "check": lambda: records.ensure_writable(pipe),
        "resume": lambda: records.JsonLines(pipe).resume(FIELDS),
    }
    with pytest.raises(OSError, match="expected a file, got a pipe, a device or a socket: name another output"):
        does[write]()
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


@pytest.mark.parametrize("content", [None, b"", b'{"text": "o'], ids=["no file", "an empty file", "a row cut short"])
def test_a_link_is_followed_only_to_a_row_of_ours(records, tmp_path, content):
    target, link = tmp_path / "target", tmp_path / "link.jsonl"
    if content is not None:
        target.write_bytes(content)
    link.symlink_to(target)
    rows = records.JsonLines(link)
    for work in (lambda: rows.resume(FIELDS), lambda: rows.mend(FIELDS)):
        with pytest.raises((OSError, ValueError), match=r"link\.jsonl"):
            work()
    if not content:
        with pytest.raises(OSError, match="remove the link, or name another output"):
            rows.append(ROWS)
    assert (target.read_bytes() if target.exists() else None) == content
    assert link.is_symlink()


@pytest.mark.parametrize("content", ['{"mine": 1}', "[1]", "mine"])
def test_a_result_of_something_else_is_left_as_it_was(records, tmp_path, content):
    path = tmp_path / "result.json"
    records.refuse_other_json(path, ["trait"])
    path.touch()
    records.refuse_other_json(path, ["trait"])
    path.write_text(content)
    with pytest.raises(ValueError, match=r"result\.json"):
        records.refuse_other_json(path, ["trait"])
    assert path.read_text() == content
    path.write_text('{"trait": "evil", "more": 1}')
    records.refuse_other_json(path, ["trait"])


@pytest.mark.parametrize("value", [1e39, -1e308, 10**39])
def test_a_number_that_no_measurement_has_is_refused(records, value):
    with pytest.raises(ValueError, match="expected a number that float32 has"):
        records.checked(value, float)
    assert records.checked(3e38, float) == 3e38


def read_trait(records, path):
    def parse(record):
        return records.checked(record["trait"], str)

    return records.read_result(path, 1, parse, "layer sweep", "the command")


def test_a_result_file_is_read_or_refused_in_one_sentence(records, tmp_path):
    path = tmp_path / "sweep.json"
    with pytest.raises(FileNotFoundError, match=r"No layer sweep at .*sweep\.json: make one with the command\.$"):
        read_trait(records, path)
    records.write_json(path, {"format_version": 1, "trait": "evil"})
    assert read_trait(records, path) == "evil"
    records.write_json(path, {"format_version": 2, "traits": ["evil"]})
    with pytest.raises(ValueError, match="format version 2, and this persona_lens reads 1: install"):
        read_trait(records, path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "trait": 3}', "\x00", "[" * 9999]
)
def test_a_damaged_result_file_is_named_with_its_remedy(records, tmp_path, content):
    path = tmp_path / "sweep.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"sweep\.json is not a whole layer sweep \(.*\): make it again"):
        read_trait(records, path)
