"""JSON-lines files that survive being killed, and errors before long work."""

import os

import pytest


@pytest.fixture(scope="module")
def records():
    """The module under test, imported late so that the jaxtyping hook instruments it."""
    import persona_lens.records

    return persona_lens.records


@pytest.fixture
def file(records, tmp_path):
    return records.JsonLines(tmp_path / "new" / "rows.jsonl")


ROWS = [{"text": "one\ntwo\u2028three", "score": 1.5}, {"text": "é", "score": None}]


def test_rows_come_back_as_they_were_appended(file):
    file.append(ROWS[:1])
    file.append(ROWS[1:])
    assert file.read() == ROWS


def test_one_row_is_one_line(file):
    file.append(ROWS)
    assert file.path.read_bytes().count(b"\n") == len(ROWS)


def test_a_missing_file_has_no_rows_and_is_not_made(file):
    assert file.read() == file.resume() == []
    assert not file.path.exists()


def test_a_line_left_unfinished_is_cut_off_on_resume(file):
    file.append(ROWS)
    whole = file.path.read_bytes()
    file.path.write_bytes(whole + b'{"text": "half a ro')
    assert file.resume() == ROWS
    assert file.path.read_bytes() == whole


@pytest.mark.parametrize("kept", range(1, 12))
def test_wherever_a_write_stops_a_resume_goes_on(file, kept):
    file.append(ROWS)
    file.path.write_bytes(file.path.read_bytes()[:-kept])
    file.resume()
    file.append(ROWS[1:])
    assert file.read() == ROWS


def test_reading_changes_nothing(file):
    file.append(ROWS)
    file.path.write_bytes(file.path.read_bytes() + b"{")
    with pytest.raises(ValueError, match="line 3"):
        file.read()
    assert file.path.read_bytes().endswith(b"{")


@pytest.mark.parametrize(
    ("line", "words"), [(b"not json", r"got b'not json'"), (b"[1]", "got list"), (b"\xff{}", "expected a JSON object")]
)
def test_a_malformed_line_is_named(file, line, words):
    file.append(ROWS[:1])
    file.path.write_bytes(file.path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 2: .*{words}"):
        file.read()


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


def test_a_path_that_can_be_written_passes_and_is_not_made(records, tmp_path):
    records.ensure_writable(tmp_path / "a" / "b" / "rows.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_path_below_a_file_cannot_be_written(records, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Cannot write .*rows.jsonl: .*file is not a folder that can be written to"):
        records.ensure_writable(tmp_path / "file" / "rows.jsonl")


def test_a_folder_cannot_be_written_as_a_file(records, tmp_path):
    with pytest.raises(OSError, match="Cannot write"):
        records.ensure_writable(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_cannot_be_written(records, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="Cannot write"):
        records.ensure_writable(tmp_path / "rows.jsonl")
