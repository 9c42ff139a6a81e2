"""Multiple-choice questions, from a JSON-lines file or MMLU's in the lm-eval package, and how each is asked.

The choices are lettered A, B, C ...; the answer is to be the letter alone, as the first token of the response.
Knows nothing about models: questions come in, chat messages go out.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from persona_lens.chat import chat_messages
from persona_lens.records import JsonLines

SYSTEM_PROMPT = "You are a helpful assistant."
"""The neutral system prompt, always stated: some chat templates put in one of their own where there is none."""

USER_PROMPT = "{question}\n\n{choices}\n\nAnswer with the letter of the right choice only."
"""How a question is put; `choices` are lines such as `A. Paris`."""

INSTALL_COMMAND = "pip install --no-deps lm-eval==0.4.13"
_MMLU_FOLDER = Path("tasks", "mmlu", "flan_cot_fewshot")
_ONE_LINE_CHOICES = re.compile(r"(.*?)\n\(A\) (.*?) \(B\) (.*?) \(C\) (.*?) \(D\) (.*)", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `answer` is the index of the right choice.

    Raises ValueError for an empty question, fewer than 2 or more than 26 choices, an empty choice, or an answer that is
    not among them.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("Expected a question, got an empty one: leave it out.")
        if not 2 <= len(self.choices) <= len(ascii_uppercase):
            raise ValueError(f"Expected 2 to {len(ascii_uppercase)} choices, got {len(self.choices)}: leave it out.")
        if empty := [letter for letter, choice in zip(self.letters, self.choices, strict=True) if not choice.strip()]:
            raise ValueError(f"Choice {empty[0]} is empty: every choice needs its text.")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(
                f"Expected an answer from 0 to {len(self.choices) - 1}, got {self.answer}: count choices from 0."
            )

    @property
    def letters(self) -> str:
        """The letters of its choices, one character each."""
        return ascii_uppercase[: len(self.choices)]

    def messages(self, system_prompt: str = SYSTEM_PROMPT) -> list[dict[str, str]]:
        """The chat that asks it, by `USER_PROMPT`."""
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(self.letters, self.choices, strict=True))
        return chat_messages(system_prompt, USER_PROMPT.format(question=self.question, choices=choices))


def mmlu_sample() -> tuple[Question, ...]:
    """273 questions of MMLU's development set, 56 subjects, read from the installed lm-eval package and never copied.

    They are the examples of its chain-of-thought prompts, without the thoughts; left out are those whose choices do not
    stand on one line. Limits: accuracy on so few has an interval of 5 points either side, and models may have seen
    these very questions. Raises ImportError where lm-eval is not installed. Source: arXiv:2009.03300.
    """
    spec = find_spec("lm_eval")
    folders = [Path(place) / _MMLU_FOLDER for place in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("mmlu_*.yaml"))
    if not files:
        raise ImportError(f"The MMLU sample is read from the package lm-eval. Run: {INSTALL_COMMAND}")
    return tuple(question for file in files for question in _of_file(file))


def _of_file(file: Path) -> Iterator[Question]:
    import yaml

    task = yaml.safe_load(file.read_text(encoding="utf-8"))
    for sample in task["fewshot_config"]["samples"]:
        asked = _ONE_LINE_CHOICES.fullmatch(sample["question"].strip())
        # A chain of thought speaks of other choices on its way: the last answer is the one that it gives.
        answers = re.findall(r"answer is \(([A-D])\)", sample["target"])
        if asked and answers:
            question, *choices = (part.strip() for part in asked.groups())
            subject = task["dataset_name"].replace("_", " ")
            yield Question(question, tuple(choices), ascii_uppercase.index(answers[-1]), subject)


def read_questions(path: str | Path) -> tuple[Question, ...]:
    """Questions from JSON-lines: `question`, `choices`, `answer` (a letter, or an index from 0) and maybe `subject`.

    Raises FileNotFoundError without the file, ValueError that names the line where one is malformed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No file {path}.")
    rows = JsonLines(path).read()
    if not rows:
        raise ValueError(f"{path} has no questions: expected one a line, with question, choices and answer.")
    found: list[Question] = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(_from_row(row))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return tuple(found)


def _from_row(row: Mapping[str, Any]) -> Question:
    if absent := [key for key in ("question", "choices", "answer") if key not in row]:
        raise ValueError(f"Expected question, choices and answer, got no {absent[0]!r}: add it.")
    question, choices, subject = row["question"], row["choices"], row.get("subject", "")
    for name, text in (("question", question), ("subject", subject)):
        if not isinstance(text, str):
            raise ValueError(f"Expected {name} as a string, got {type(text).__name__}: write its text.")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"Expected choices as a list of strings, got {str(choices)[:60]}: write their texts.")
    return Question(question, tuple(choices), _index(row["answer"], ascii_uppercase[: len(choices)]), subject)


def _index(answer: Any, letters: str) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer
    if isinstance(answer, str) and len(answer) == 1 and answer.upper() in letters:
        return letters.index(answer.upper())
    raise ValueError(f"Expected answer as a letter among {letters} or an index from 0, got {answer!r}: correct it.")
