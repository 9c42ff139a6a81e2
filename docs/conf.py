"""How Sphinx builds these pages: `make docs`.

Whatever the code says already is taken from it at each build (`generate.py`): the commands' help, the public names and
their docstrings, and the notebooks with their outputs.
"""

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import generate  # noqa: E402 (found beside this file)

import persona_lens  # noqa: E402

project = "persona_lens"
author = "The persona_lens authors"
project_copyright = "The persona_lens authors"
release = version = persona_lens.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build", "results"]
html_theme = "furo"
html_title = f"persona_lens {release}"
html_static_path: list[str] = []
templates_path: list[str] = []

# Notebooks are shown as they are kept: their outputs took minutes to make, and `make notebooks` checks them.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a page that is included may begin below its first level

napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has the types
napoleon_use_rtype = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
# What a class inherits from one of ours is its own to a reader; what Python's classes bring along is not.
autodoc_default_options = {"members": True, "inherited-members": "object, tuple, Protocol, Generic, BaseModel"}
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
add_module_names = False
pygments_style = "friendly"

doctest_global_setup = "import torch\nimport persona_lens as pl"

generate.write_pages(HERE, HERE / "generated")


def setup(app: Any) -> None:
    """Make what was written for other readers fit these pages."""
    app.connect("autodoc-process-docstring", _escape_docstring, priority=100)
    app.connect("autodoc-process-docstring", _give_colons_back, priority=900)
    app.connect("autodoc-process-signature", _readable_defaults)
    app.connect("source-read", _without_folder_links)


_CODE = re.compile(r"(`[^`]+`)")
# Only to reStructuredText do these mean something in prose.
_SPECIAL = re.compile(r"(\*|\||_(?=\W|$))")


def _escape_docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are Markdown in spirit: code stands in single backticks, and a letter may follow (`Steer`s)."""
    parts = _CODE.split("\n".join(lines))
    for place, part in enumerate(parts):
        if place % 2:
            before, after = parts[place - 1][-1:], parts[place + 1][:1]
            parts[place] = f"{_joint(before)}`{part}`{_joint(after)}"
        else:
            parts[place] = _SPECIAL.sub(r"\\\1", part)
    lines[:] = "".join(parts).split("\n")
    if what == "property" and lines:
        lines[0] = lines[0].replace(":", _COLON)


# Napoleon takes what stands before a colon in a property's first line for its type.
_COLON = "\ue000"


def _give_colons_back(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def _readable_defaults(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A default that is made anew for each instance stands as `...`; a protocol, which is never made, has none."""
    if signature == "(*args, **kwargs)":
        return "", returns
    return signature and signature.replace("<factory>", "..."), returns


def _joint(beside: str) -> str:
    return "\\ " if beside.isalnum() else ""


def _without_folder_links(app: Any, page: str, source: list[str]) -> None:
    """A link to a folder of records leads somewhere in the repository, and nowhere on a site."""
    source[0] = re.sub(r"\[(results/\w+)\]\(results/\w+\)", r"`docs/\1`", source[0])
