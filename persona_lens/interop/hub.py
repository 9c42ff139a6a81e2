"""Persona vectors on the Hugging Face hub: one `vectors.safetensors` and its README, up and down, never a pickle.

The token is read from HF_TOKEN when it is needed, and is neither kept nor shown; HF_ENDPOINT names another hub.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from persona_lens.storage.text import one_line, shown_name
from persona_lens.vectors.persona_vectors import PersonaVectors

FILE, CARD = "vectors.safetensors", "README.md"
_ADDRESS = re.compile(r"[\w.-]+/[\w.-]+", flags=re.ASCII)


def push_vectors(vectors: PersonaVectors, repo: str, *, private: bool = True, message: str | None = None) -> str:
    """Upload vectors to a model repository of the hub, which is made where there is none; gives the commit's address.

    An older file of vectors there is replaced. The file carries all that `save` writes, the name of the model among it:
    of a local model only the name of its folder.

    Raises:
        ValueError: HF_TOKEN is not set, or `repo` is no `owner/name`.
        OSError: The hub could not be reached or refused.
    """
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise ValueError(f"Pushing to {repo} needs a token: set HF_TOKEN to one that may write there.")
    with tempfile.TemporaryDirectory(prefix="persona_lens-") as scratch, _asking("push to", repo):
        _without_path(vectors).save(Path(scratch) / FILE)
        (Path(scratch) / CARD).write_text(model_card(vectors, repo), encoding="utf-8")
        hub = _hub(token)
        hub.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo,
            folder_path=scratch,
            allow_patterns=[FILE, CARD],
            commit_message=message or f"Persona vectors of {vectors.trait}",
        )
    return str(commit.commit_url)


def pull_vectors(repo: str, *, revision: str | None = None) -> PersonaVectors:
    """Vectors that `push_vectors` put on the hub; `revision` is a branch, tag or commit.

    Raises:
        ValueError: `repo` is no `owner/name`, has no vectors, or its file is damaged or foreign.
        OSError: The hub could not be reached or refused; a private repository needs HF_TOKEN.
    """
    with _asking("pull from", repo):
        hub = _hub(os.environ.get("HF_TOKEN") or False)
        folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=[FILE]))
    if not (folder / FILE).is_file():
        raise ValueError(f"{repo} on the hub has no {FILE}: expected a repository that push_vectors made.")
    return PersonaVectors.load(folder / FILE)


def model_card(vectors: PersonaVectors, repo: str) -> str:
    """The README of a repository: what the vectors are, how to load them, and how good each layer is."""
    name = vectors.provenance.model.name if vectors.provenance else ""
    # What is no address on the hub is the name of somebody's folder.
    known = bool(_ADDRESS.fullmatch(name))
    metadata = ["---", "library_name: persona_lens", "tags: [persona-vectors, steering]"]
    metadata += [f"base_model: {name}"] if known else []
    table = vectors.table().round(4).reset_index()
    rows = [table.columns.tolist(), ["---"] * len(table.columns), *table.astype(object).to_numpy().tolist()]
    lines = [
        *metadata,
        "---",
        "",
        f"# Persona vectors: {_as_text(vectors.trait)}",
        "",
        f"{vectors.n_layers} layers, {vectors.d_model} wide, over {vectors.position}"
        + f", of {name}" * known
        + ". Row l is the output of block l, counted from 0 (arXiv:2507.21509).",
        "",
        "```python",
        "from persona_lens.interop import pull_vectors",
        "",
        f'vectors = pull_vectors("{repo}")',
        "```",
        "",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def _as_text(text: str) -> str:
    """The text on one line, with what Markdown or HTML would read as markup escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", one_line(text))


def _without_path(vectors: PersonaVectors) -> PersonaVectors:
    """The vectors with the model's name alone, also where it was put together by hand."""
    if vectors.provenance is None:
        return vectors
    model = vectors.provenance.model
    named = replace(vectors.provenance, model=replace(model, name=shown_name(model.name)))
    return replace(vectors, provenance=named)


def _hub(token: str | bool) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)


@contextmanager
def _asking(what: str, repo: str) -> Iterator[None]:
    """What goes wrong with the hub as one sentence."""
    if not _ADDRESS.fullmatch(repo):
        raise ValueError(f"{repo!r} is no name of a repository: expected owner/name.")
    try:
        yield
    except Exception as error:  # the hub's client, its transport and the network raise errors of no common kind
        # What the hub answered may be the cause of "not in the cache either".
        answers = (getattr(each, "response", None) for each in (error, error.__cause__))
        status = next((answer.status_code for answer in answers if answer is not None), None)
        fact = f"status {status}" if status else type(error).__name__
        remedy = "check that the repository exists and that HF_TOKEN may use it" if status else "check the network"
        raise OSError(f"Could not {what} {repo} on the hub ({fact}): {remedy}.") from error
