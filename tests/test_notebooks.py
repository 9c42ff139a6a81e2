"""The notebooks: each .py with its .ipynb, whose committed outputs are whole, clean and light."""

import re
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = sorted({file.stem for file in FOLDER.glob("[0-9]*.*")})
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
MOST_BYTES = 1_500_000


def sources(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def executed(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(name: str) -> list[Any]:
    return [output for cell in executed(name).cells for output in cell.get("outputs", [])]


def test_the_notebooks_are_numbered_from_00_without_a_gap():
    assert [int(name[:2]) for name in NAMES] == list(range(len(NAMES)))


@pytest.mark.parametrize("name", NAMES)
def test_both_halves_of_a_notebook_have_the_same_cells(name: str):
    assert sources(jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")) == sources(executed(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_of_a_notebook_was_executed_in_order(name: str):
    counts = [cell.execution_count for cell in executed(name).cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_of_a_notebook_hold_no_warning_no_error_and_no_path_of_a_machine(name: str):
    for output in outputs(name):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        text = output.get("text") or str({kind: value for kind, value in output.get("data", {}).items() if kind != PNG})
        assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr)/", text)


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_of_a_notebook_has_a_still_for_viewers_that_draw_nothing(name: str):
    pictures = [output.data for output in outputs(name) if PLOTLY in output.get("data", {})]
    assert pictures
    assert all(PNG in data and "text/html" not in data for data in pictures)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_light(name: str):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES
