"""Multiple-choice questions, and what a model still can as a value: letters' log-probabilities, texts' likelihoods.

Questions come from a JSON-lines file, or are MMLU's in the lm-eval package. The choices are lettered A, B, C ...; the
right answer is the letter alone, as the first token of the response.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.util import find_spec
from math import exp, fsum
from pathlib import Path
from string import ascii_uppercase
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_lens.chat.batches import chat_messages
from persona_lens.statistics import Estimate, mean_estimate
from persona_lens.storage.files import JsonLines, checked, read_result, write_json
from persona_lens.storage.text import missing_package
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT

if TYPE_CHECKING:
    import pandas

USER_PROMPT = "{question}\n\n{choices}\n\nAnswer with the letter of the right choice only."
"""The user turn of a question; `choices` are lines such as `A. Paris`."""

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

    def messages(self, system_prompt: str = NEUTRAL_SYSTEM_PROMPT) -> list[dict[str, str]]:
        """The chat that asks it, by `USER_PROMPT`."""
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(self.letters, self.choices, strict=True))
        return chat_messages(system_prompt, USER_PROMPT.format(question=self.question, choices=choices))


def mmlu_sample() -> tuple[Question, ...]:
    """273 questions of MMLU's development set, 56 subjects, read from the installed lm-eval package.

    These are the examples of its chain-of-thought prompts without the thoughts, as far as their choices stand on one
    line. Limits: accuracy on so few has an interval of 5 points either side, and models may have been trained on them.
    Raises ImportError where lm-eval is not installed. Source: arXiv:2009.03300.
    """
    spec = find_spec("lm_eval")
    folders = [Path(place) / _MMLU_FOLDER for place in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("mmlu_*.yaml"))
    if not files:
        raise missing_package("The MMLU sample", "lm-eval", command="pip install --no-deps lm-eval==0.4.13")
    return tuple(question for file in files for question in _mmlu_questions(file))


def _mmlu_questions(file: Path) -> Iterator[Question]:
    import yaml

    task = yaml.safe_load(file.read_text(encoding="utf-8"))
    subject = task["dataset_name"].replace("_", " ")
    for sample in task["fewshot_config"]["samples"]:
        parts = _ONE_LINE_CHOICES.fullmatch(sample["question"].strip())
        # A chain of thought names other choices on its way; its last answer is the one that it gives.
        answers = re.findall(r"answer is \(([A-D])\)", sample["target"])
        if parts and answers:
            question, *choices = (part.strip() for part in parts.groups())
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
    questions: list[Question] = []
    for number, row in enumerate(rows, start=1):
        try:
            questions.append(_question(row))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return tuple(questions)


def _question(row: Mapping[str, Any]) -> Question:
    if absent := [key for key in ("question", "choices", "answer") if key not in row]:
        raise ValueError(f"Expected question, choices and answer, got no {absent[0]!r}: add it.")
    question, choices, subject = row["question"], row["choices"], row.get("subject", "")
    for name, text in (("question", question), ("subject", subject)):
        if not isinstance(text, str):
            raise ValueError(f"Expected {name} as a string, got {type(text).__name__}: write its text.")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"Expected choices as a list of strings, got {str(choices)[:60]}: write their texts.")
    answer, letters = row["answer"], ascii_uppercase[: len(choices)]
    if isinstance(answer, str) and len(answer) == 1 and answer.upper() in letters:
        answer = letters.index(answer.upper())
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise ValueError(f"Expected answer as a letter among {letters} or an index from 0, got {answer!r}: correct it.")
    return Question(question, tuple(choices), answer, subject)


FORMAT_VERSION = 1


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with the model's log-probability, in nats, of each choice's letter as the start of its response."""

    question: Question
    log_probs: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.log_probs) != len(self.question.choices):
            raise ValueError(
                f"Expected a log-probability for each of {len(self.question.choices)} choices, got "
                f"{len(self.log_probs)}: score every letter."
            )

    @property
    def chosen(self) -> int:
        """The most probable choice; of equal ones the first."""
        return self.log_probs.index(max(self.log_probs))

    @property
    def is_right(self) -> bool:
        """Whether the most probable choice is the right one."""
        return self.chosen == self.question.answer

    @property
    def margin(self) -> float:
        """The right letter's log-probability minus the mean of the wrong ones', in nats."""
        wrong = [value for index, value in enumerate(self.log_probs) if index != self.question.answer]
        return self.log_probs[self.question.answer] - fsum(wrong) / len(wrong)

    @property
    def letter_mass(self) -> float:
        """The probability that the response starts with one of the letters at all."""
        return fsum(map(exp, self.log_probs))


@dataclass(frozen=True)
class TextLikelihood:
    """A text's mean log-likelihood per response token, in nats; None for one without a response.

    Texts of one `question` are resampled together; one with an empty question stands alone.
    """

    log_likelihood: float | None
    n_tokens: int
    question: str = ""


class CapabilityChange(NamedTuple):
    """Mean differences, paired by question and by text, with their intervals."""

    accuracy: Estimate
    margin: Estimate
    letter_mass: Estimate
    nll: Estimate


@dataclass(frozen=True)
class Capability:
    """What a model still can, under interventions or an adapter.

    Attributes:
        answers: The multiple-choice questions with the log-probabilities of their letters.
        texts: The texts with their likelihoods.
        model: The model's name.
        interventions: What acted during the measurement, in words; empty for nothing.
        adapter: The folder of the LoRA adapter that was on, or a description of it; None for none.
        system_prompt: The system prompt of the questions.
        seed: Seed of the bootstrap.

    Limits: letters are read from the start of the response, so a model that reasons first, or answers in words, scores
    low without knowing less: see `letter_mass`. A preference for some letters affects the accuracy too.
    """

    answers: tuple[AnsweredQuestion, ...] = field(repr=False)
    texts: tuple[TextLikelihood, ...] = field(repr=False, default=())
    model: str = "unnamed"
    interventions: tuple[str, ...] = ()
    adapter: str | None = None
    system_prompt: str = ""
    seed: int = 0

    @cached_property
    def accuracy(self) -> Estimate:
        """Share of questions, 0 to 1, whose right letter is the most probable one."""
        return self._over_questions([float(answer.is_right) for answer in self.answers])

    @cached_property
    def margin(self) -> Estimate:
        """Mean of log p(right letter) minus the mean log p(wrong letters), in nats; 0 for letters chosen blindly.

        Finer than accuracy, which counts first places only; also of a model whose accuracy is at chance.
        """
        return self._over_questions([answer.margin for answer in self.answers])

    @cached_property
    def letter_mass(self) -> Estimate:
        """Mean probability, 0 to 1, that the response starts with one of the letters."""
        return self._over_questions([answer.letter_mass for answer in self.answers])

    @cached_property
    def nll(self) -> Estimate:
        """Mean negative log-likelihood per response token, in nats, every text counting alike; missing ones left out.

        The interval is over texts, those of one question together.
        """
        return self._over_texts([None if (value := text.log_likelihood) is None else -value for text in self.texts])

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing; None without questions."""
        return fsum(1 / len(answer.log_probs) for answer in self.answers) / len(self.answers) if self.answers else None

    def change_from(self, base: "Capability") -> CapabilityChange:
        """This one minus `base`, paired by question and by text, which is much narrower than an unpaired difference.

        Raises ValueError where the questions or texts are not the same, in the same order.
        """
        for name, ours, theirs in (
            ("questions", [answer.question for answer in self.answers], [answer.question for answer in base.answers]),
            ("texts", *([(text.question, text.n_tokens) for text in side.texts] for side in (self, base))),
        ):
            if ours != theirs:
                raise ValueError(
                    f"A change is between measurements on the same {name} in the same order, got {len(ours)} and "
                    f"{len(theirs)} that differ: measure both on the same ones."
                )

        def differences(read: Callable[[AnsweredQuestion], float]) -> Estimate:
            pairs = zip(self.answers, base.answers, strict=True)
            return self._over_questions([read(ours) - read(theirs) for ours, theirs in pairs])

        likelihoods = [
            (ours.log_likelihood, theirs.log_likelihood) for ours, theirs in zip(self.texts, base.texts, strict=True)
        ]
        return CapabilityChange(
            accuracy=differences(lambda answer: float(answer.is_right)),
            margin=differences(lambda answer: answer.margin),
            letter_mass=differences(lambda answer: answer.letter_mass),
            nll=self._over_texts([None if a is None or b is None else b - a for a, b in likelihoods]),
        )

    def _over_questions(self, values: Sequence[float]) -> Estimate:
        # Questions with one text and other choices are different questions.
        names = [repr((answer.question.question, answer.question.choices)) for answer in self.answers]
        return mean_estimate(values, names, seed=self.seed)

    def _over_texts(self, values: Sequence[float | None]) -> Estimate:
        names = [text.question or index for index, text in enumerate(self.texts)]
        return mean_estimate(values, names, seed=self.seed)

    @property
    def _estimates(self) -> dict[str, Estimate]:
        return {"accuracy": self.accuracy, "margin": self.margin, "letter_mass": self.letter_mass, "nll": self.nll}

    @property
    def columns(self) -> dict[str, float | int | None]:
        """The numbers as one row of a table of capabilities."""
        return {
            name + end: value
            for name, mean in self._estimates.items()
            for end, value in (("", mean.value), ("_low", mean.low), ("_high", mean.high), ("_n", mean.n))
        }

    def table(self) -> "pandas.DataFrame":
        """A row for each multiple-choice question: `question`, `subject`, `right`, `margin`, `letter_mass`."""
        import pandas

        rows = [
            (answer.question.question, answer.question.subject, answer.is_right, answer.margin, answer.letter_mass)
            for answer in self.answers
        ]
        return pandas.DataFrame(rows, columns=["question", "subject", "right", "margin", "letter_mass"])

    def summary(self) -> dict[str, Any]:
        """The numbers, and what acted, as JSON."""
        return {
            "model": self.model,
            "interventions": list(self.interventions),
            "adapter": self.adapter,
            "system_prompt": self.system_prompt,
            "chance": self.chance,
            **{name: mean._asdict() for name, mean in self._estimates.items()},
            "texts_without_response": sum(text.log_likelihood is None for text in self.texts),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, log-probabilities included; OSError where it cannot be written."""
        record = {
            "format_version": FORMAT_VERSION,
            "summary": self.summary(),
            "seed": self.seed,
            "answers": [{**asdict(answer.question), "log_probs": list(answer.log_probs)} for answer in self.answers],
            "texts": [asdict(text) for text in self.texts],
        }
        write_json(Path(path), record)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Capability":
        """Read what `save` wrote; FileNotFoundError, or ValueError for a damaged file or another version's."""
        return read_result(Path(path), FORMAT_VERSION, cls._from_record, "capability", "Capability.save")

    @classmethod
    def _from_record(cls, record: Mapping[str, Any]) -> "Capability":
        summary = record["summary"]
        return cls(
            tuple(_read_answer(row) for row in record["answers"]),
            tuple(_read_likelihood(**row) for row in record["texts"]),
            checked(summary["model"], str),
            tuple(checked(intervention, str) for intervention in summary["interventions"]),
            checked(summary["adapter"], str, NoneType),
            checked(summary["system_prompt"], str),
            checked(record["seed"], int, low=0),
        )

    def __str__(self) -> str:
        done = [*self.interventions, *([] if self.adapter is None else [f"adapter {self.adapter}"])]
        parts = []
        if self.answers:
            parts.append(
                f"accuracy {_text(self.accuracy)} (chance {self.chance:.2f}), margin {_text(self.margin)} nats, letter "
                f"mass {_text(self.letter_mass)} over {len(self.answers)} questions"
            )
        if self.texts:
            parts.append(f"NLL {_text(self.nll)} nats a token over {self.nll.n} of {len(self.texts)} texts")
        return f"{'; '.join(done) or 'no intervention'}: {'; '.join(parts)}"


def _read_answer(row: Mapping[str, Any]) -> AnsweredQuestion:
    text, subject = (checked(row[name], str) for name in ("question", "subject"))
    choices = tuple(checked(choice, str) for choice in row["choices"])
    question = Question(text, choices, checked(row["answer"], int), subject)
    return AnsweredQuestion(question, tuple(_read_log_prob(value) for value in row["log_probs"]))


def _read_likelihood(log_likelihood: Any, n_tokens: Any, question: Any = "") -> TextLikelihood:
    value = None if log_likelihood is None else _read_log_prob(log_likelihood)
    return TextLikelihood(value, checked(n_tokens, int, low=0), checked(question, str))


def _read_log_prob(value: Any) -> float:
    return checked(value, float, high=0.01)  # rounding may leave a little more than 0


def _text(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    return f"{estimate.value:.2f}" + ("" if estimate.low is None else f" [{estimate.low:.2f}, {estimate.high:.2f}]")
