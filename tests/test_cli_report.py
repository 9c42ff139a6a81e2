"""`persona-lens report` and the demo write a run's page; so do runs that were computed."""

import json

import pytest

from persona_lens.evaluation.layer_selection import LayerSweep
from persona_lens.pages.run_folder import read_run
from persona_lens.pages.run_report import report_html
from tests.evaluation_cases import SHORT, TRAIT, LetterJudge, planted_vectors
from tests.report_cases import make_run, tiles


@pytest.fixture
def folder(tmp_path):
    """The folder of a run."""
    return make_run(tmp_path / "run")


def test_the_command_writes_the_page_and_says_where(cli, folder, tmp_path):
    code, out, err = cli("report", folder)
    assert (code, out) == (0, "")
    assert f"The page is {folder / 'report.html'}." in err
    code, out, _ = cli("report", folder, "--output", tmp_path / "page.html", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["page"], found["best"]["layer"]) == (str(tmp_path / "page.html"), 0)
    assert found["bytes"] == (tmp_path / "page.html").stat().st_size
    # The first page is no file of the run that the second one lists.
    assert (tmp_path / "page.html").read_bytes() == (folder / "report.html").read_bytes()


def test_the_commands_help_has_an_example(cli):
    code, out, _ = cli("report", "--help")
    assert code == 0
    assert "Example: persona-lens report runs/demo --output demo.html" in " ".join(out.split())


def test_a_folder_without_a_run_exits_1_with_one_sentence(cli, tmp_path):
    code, out, err = cli("report", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith(f"persona-lens: {tmp_path} holds no run")
    assert err.count("\n") == 1


def test_a_page_that_cannot_be_written_exits_1(cli, folder, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = cli("report", folder, "--output", tmp_path / "file" / "page.html")
    assert code == 1
    assert "Cannot write" in err


def test_the_demo_ends_with_its_page(cli, tmp_path, monkeypatch):
    from persona_lens.extraction import pipeline
    from persona_lens.vectors.persona_vectors import PersonaVectors
    from tests.vector_cases import ToyModel

    run = make_run(tmp_path / "demo", trait="optimistic")
    monkeypatch.setattr("persona_lens.models.loading.load_model", lambda *_, **__: ToyModel())
    monkeypatch.setattr(
        pipeline, "extract_persona_vectors", lambda *_, **__: PersonaVectors.load(run / "vectors.safetensors")
    )
    monkeypatch.setattr("persona_lens.evaluation.layer_selection.select_layer", lambda *_, **__: LayerSweep.load(run))
    code, _, err = cli("demo", "--output", run, "--json")
    assert code == 0
    assert f"The page to read is {run / 'report.html'}." in err
    assert "<h1>Persona vectors: optimistic</h1>" in (run / "report.html").read_text(encoding="utf-8")


# --- runs that were computed ---------------------------------------------------------------------------------------


def test_a_computed_sweep_and_its_confirmation_are_reported(tiny_bridge, tiny_hf_model, tmp_path):
    from persona_lens import dose_response, select_layer

    vectors, judge = planted_vectors(tiny_bridge, tiny_hf_model), LetterJudge("z")
    choices = {"judge": judge, "output_dir": tmp_path, **SHORT}
    vectors.save(tmp_path / "vectors.safetensors")
    sweep = select_layer(tiny_bridge, vectors, TRAIT, layers=[1, 3], coefficients=(1.0, 4.0), **choices)
    dose_response(tiny_bridge, vectors.at(3), TRAIT, coefficients=(-1.0, 1.0), random=1, **choices)
    run = read_run(tmp_path)
    assert run.sweep == sweep
    assert tiles(report_html(run))["Steer"] == f"layer {sweep.best().layer} × {sweep.best().coefficient:g}"
    assert run.confirmed.layer == 3
