"""The written pages of the site say only what the code has; `make docs` builds them and runs their examples."""

import ast
import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests import zoo

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("reliability/*.md")])
CODE = re.compile(r"```\w+\n(.*?)```|`([^`\n]+)`", re.DOTALL)


def calls(text: str) -> list[ast.Call]:
    """Every call of `pl.<name>(...)` in the code of a page, in blocks and in lines."""
    found = []
    for block, line in CODE.findall(text):
        for code in (block, line, f"{line} pass"):
            try:
                tree = ast.parse(code.strip())
            except SyntaxError:
                continue
            found += [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in found if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "pl"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_names_only_what_is_public(page):
    import persona_lens

    named = set(re.findall(r"\bpl\.([A-Za-z]\w*)", page.read_text()))
    assert named <= set(persona_lens.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_passes_only_arguments_that_exist(page):
    import persona_lens

    for call in calls(page.read_text()):
        assert isinstance(call.func, ast.Attribute)
        parameters = inspect.signature(getattr(persona_lens, call.func.attr)).parameters
        given = [keyword.arg for keyword in call.keywords]
        assert set(given) <= set(parameters), ast.unparse(call)


def test_the_calls_of_the_page_on_other_tools_are_found():
    names = {
        call.func.attr for call in calls((DOCS / "coming_from.md").read_text()) if isinstance(call.func, ast.Attribute)
    }
    assert {"evaluate", "steer", "read_vectors", "finetune"} <= names


def test_the_page_on_architectures_has_those_that_are_tested():
    assert zoo.table() in (DOCS / "reliability" / "architectures.md").read_text()


def test_the_reference_has_every_public_name_once_and_the_commands_page_every_command():
    import typer

    from persona_lens.cli.options import app

    generate = runpy.run_path(str(DOCS / "generate.py"))
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]

    assert generate["reference_pages"]()  # raises where a name is in no group, or in two
    assert re.findall(r"^## (\S+)$", generate["commands_page"](), re.MULTILINE) == list(commands)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_its_examples_hold(tmp_path):
    pytest.importorskip("sphinx")
    for builder in ("html", "doctest"):
        command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "doctrees")]
        done = subprocess.run(
            [*command, "-b", builder, str(DOCS), str(tmp_path / builder)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert (tmp_path / "html" / "index.html").exists()
