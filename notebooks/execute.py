"""Executes the notebooks from their .py halves, and keeps the .ipynb with its outputs and a still of every picture.

    python notebooks/execute.py                        # all of them
    python notebooks/execute.py 00 03                  # those whose names begin so
    python notebooks/execute.py 01 --hooked            # on a HookedTransformer: runs, and writes nothing
    python notebooks/execute.py 01 --prose             # runs nothing: takes over changes of prose alone

Pictures are kept twice: as plotly's JSON, which Jupyter and VS Code draw, and as a PNG, which GitHub and Sphinx show.
The stills need a Chromium (`--chromium`); without one the JSON stands alone.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from datetime import datetime
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
LOAD_LINE = 'model = pl.load_model("smollm2-135m-instruct")'
HOOKED_LINE = 'model = pl.load_model("smollm2-135m-instruct", model_class="HookedTransformer")'
# Chromium draws every picture of a notebook in one page, and writes them into it as data URLs.
PAGE = """<!doctype html><meta charset="utf-8"><script src="{script}"></script><body><script>
const figures = {figures};
Promise.all(figures.map(each => Plotly.toImage(each, {{
  format: "png", width: each.layout.width || 900, height: each.layout.height || 500, scale: 1.5
}}))).then(images => {{ document.body.textContent = JSON.stringify(images); }});
</script>"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Executes notebooks and keeps their outputs.")
    parser.add_argument("names", nargs="*", help="beginnings of their names; all of them by default")
    parser.add_argument("--hooked", action="store_true", help="on a HookedTransformer, writing nothing")
    parser.add_argument("--prose", action="store_true", help="run nothing, and refuse changes of code")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    chosen = parser.parse_args()
    wanted = tuple(chosen.names)
    for source in sorted(FOLDER.glob("[0-9]*.py")):
        if chosen.prose and source.name.startswith(wanted or ""):
            nbformat.write(tidied(with_outputs(source)), source.with_suffix(".ipynb"))
        elif not chosen.prose and (not wanted or source.name.startswith(wanted)):
            started = time.monotonic()
            notebook = execute(source, hooked=chosen.hooked)
            took, cells = time.monotonic() - started, slowest(notebook)
            if not chosen.hooked:
                add_stills(notebook, chosen.chromium)
                nbformat.write(tidied(notebook), source.with_suffix(".ipynb"))
            print(f"{source.stem}: {took:.0f} s", *cells, sep="\n    ", flush=True)


def execute(source: Path, *, hooked: bool = False) -> nbformat.NotebookNode:
    """The notebook of a .py, executed in a fresh kernel; `hooked` changes the one line that loads the model."""
    text = source.read_text(encoding="utf-8")
    if hooked:
        if text.count(LOAD_LINE) != 1:
            raise ValueError(f"{source.name} has {text.count(LOAD_LINE)} lines {LOAD_LINE!r}, and needs one.")
        text = text.replace(LOAD_LINE, HOOKED_LINE)
    notebook = jupytext.reads(text, fmt="py:percent")
    environment = {"PLOTLY_RENDERER": "plotly_mimetype", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm wants widgets, and does without them
    NotebookClient(notebook, timeout=1800, kernel_name="python3").execute(
        cwd=str(source.parent), env={**os.environ, **environment}
    )
    return notebook


def with_outputs(source: Path) -> nbformat.NotebookNode:
    """The notebook of a .py with the outputs of its .ipynb, whose code must be the same."""
    notebook = jupytext.read(source, fmt="py:percent")
    old = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    code, before = ([cell for cell in each.cells if cell.cell_type == "code"] for each in (notebook, old))
    if [cell.source for cell in code] != [cell.source for cell in before]:
        raise ValueError(f"{source.name} has other code than its .ipynb: execute it.")
    for cell, kept in zip(code, before, strict=True):
        cell.outputs, cell.execution_count = kept.outputs, kept.execution_count
    return notebook


def slowest(notebook: nbformat.NotebookNode, n: int = 4) -> list[str]:
    """The cells that took longest, with their first lines."""
    taken = []
    for cell in notebook.cells:
        times = cell.metadata.get("execution", {})
        if "iopub.execute_input" in times and "shell.execute_reply" in times:
            start, end = (datetime.fromisoformat(times[key]) for key in ("iopub.execute_input", "shell.execute_reply"))
            taken.append(((end - start).total_seconds(), cell.source.split("\n")[0]))
    return [f"{seconds:.0f} s: {line}" for seconds, line in sorted(taken, reverse=True)[:n]]


def tidied(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without times and random ids, so that a second run changes only what was computed."""
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("language_info", None)
    return notebook


def add_stills(notebook: nbformat.NotebookNode, chromium: str | None) -> None:
    """A PNG beside the JSON of every picture."""
    shown = [
        output.data for cell in notebook.cells for output in cell.get("outputs", []) if PLOTLY in output.get("data", {})
    ]
    if not shown or chromium is None:
        return
    import plotly

    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    figures = json.dumps([each[PLOTLY] for each in shown]).replace("</", "<\\/")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(PAGE.format(script=script.as_uri(), figures=figures), encoding="utf-8")
        command = [chromium, "--headless=new", "--no-sandbox", "--virtual-time-budget=20000", "--dump-dom"]
        drawn = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=True).stdout
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", drawn)
    if len(images) != len(shown):
        raise RuntimeError(f"Chromium drew {len(images)} of {len(shown)} pictures.")
    for data, image in zip(shown, images, strict=True):
        data[PNG] = image


if __name__ == "__main__":
    main()
