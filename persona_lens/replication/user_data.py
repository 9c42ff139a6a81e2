"""Data that the user brings: found or not, and checked before anything is spent.

The paper's datasets, benchmarks and chats are not ours to ship; a preset names where each is looked for and its form.
A stage whose data is not there is left out, with the reason; data in another form is refused in one sentence.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from persona_lens.replication.preset import Preset, UserDataTable

CHECKED_ROWS = 200
"""Of each file, from its beginning: a log of real chats may have a million."""


@dataclass(frozen=True)
class UserData:
    """One thing that a preset asks for.

    Attributes:
        name: Its name in the preset's table `bring`.
        table: What the preset says of it.
        path: Where it was looked for.
        is_there: Whether it was found; then it has the form that is asked for.
    """

    name: str
    table: UserDataTable
    path: Path
    is_there: bool

    @property
    def sets(self) -> dict[str, Path]:
        """The files of datasets, by `{name}_{version}`."""
        return {key: self.path / name / f"{version}.jsonl" for key, (name, version) in self.table.set_parts.items()}

    @property
    def files(self) -> dict[Path, str]:
        """Every file, with the form of its rows."""
        if self.name == "finetuning":
            return dict.fromkeys(self.sets.values(), "chat")
        if self.name in ("new_facts", "narrow"):
            return {self.path / "train.jsonl": "chat", self.path / "questions.jsonl": "question"}
        return {self.path: "chat" if self.name == "chats" else "score"}


def find_user_data(preset: Preset, data: str | Path | None = None) -> dict[str, UserData]:
    """Everything that the preset asks for, checked; paths are taken from `data`, by default the working folder.

    Raises FileNotFoundError where a folder is there and lacks a file, or `data` is none; ValueError that names file,
    line, what was expected and what came.
    """
    root = Path(data or ".")
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder: give the one that the preset's paths start from.")
    items: dict[str, UserData] = {}
    for name in type(preset.bring).model_fields:
        table = getattr(preset.bring, name)
        if table is not None:
            path = root / table.path
            items[name] = UserData(name, table, path, path.exists())
            if path.exists():
                _check(items[name])
    return items


def missing_data(user_data: dict[str, UserData], names: tuple[str, ...]) -> str:
    """Why a stage that needs one of these cannot run, in one sentence; empty where it can."""
    items = [user_data[name] for name in names if name in user_data]
    if any(item.is_there for item in items) or not names:
        return ""
    if not items:
        return "the preset does not ask for its data"
    return "; ".join(f"{item.path} is not there (section {item.table.section}): {item.table.form}" for item in items)


def _check(item: UserData) -> None:
    for path, form in item.files.items():
        if not path.is_file():
            raise FileNotFoundError(
                f"bring.{item.name}: {path} is missing, while {item.path} is there: "
                f"expected {item.table.form} (section {item.table.section})."
            )
        rows = 0
        for line, row in _rows(path):
            rows += 1
            if problem := _PROBLEMS[form](row):
                raise ValueError(f"bring.{item.name}: {path}, line {line}: {problem}; expected {item.table.form}.")
        if not rows:
            raise ValueError(f"bring.{item.name}: {path} is empty; expected {item.table.form}.")


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(islice(file, CHECKED_ROWS), start=1):
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}.") from error


def _chat_problem(row: Any) -> str:
    turns = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        return "it has no messages"
    if not all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns):
        return "a message is no object with a role and a text as content"
    roles = [turn.get("role") for turn in turns]
    return "" if "assistant" in roles else f"no message is by the assistant (roles {roles})"


def _question_problem(row: Any) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        return "it has no question"
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        return "it has no choices"
    return "" if isinstance(answer, int | str) else f"answer is {answer!r}"


def _score_problem(row: Any) -> str:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("trait", "set")):
        return "it has no trait and set"
    return "" if isinstance(row.get("score"), int | float) else f"score is {row.get('score')!r}, no number"


_PROBLEMS = {"chat": _chat_problem, "question": _question_problem, "score": _score_problem}
