"""What a model still can, as a value: every question's log-probabilities, every text's likelihood, means and intervals.

Knows nothing about models: numbers come in, tables and files go out.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import exp, fsum
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from persona_lens.capability.questions import Question
from persona_lens.records import DAMAGE, checked, write_json
from persona_lens.statistics import Estimate, mean_estimate

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

    `question` says which texts are not independent of each other; an empty one, that no other text belongs to it.
    """

    log_likelihood: float | None
    n_tokens: int
    question: str = ""


class CapabilityChange(NamedTuple):
    """Means of the differences, question by question and text by text, with their intervals."""

    accuracy: Estimate
    margin: Estimate
    letter_mass: Estimate
    nll: Estimate


@dataclass(frozen=True)
class Capability:
    """What a model still can, under what was done to it.

    Attributes:
        answers: The multiple-choice questions with the log-probabilities of their letters.
        texts: The given texts with their likelihoods.
        model: The model's name.
        interventions: What acted while it was measured, in words; empty for nothing.
        adapter: The folder of the LoRA adapter that was on, or what else is known of it; None for none.
        system_prompt: Under which the questions were asked.
        seed: Seed of the bootstrap.

    Limits: letters are read from the start of the response, so a model that reasons first, or answers in words, scores
    low without knowing less: see `letter_mass`. Which letters a model favours is in its accuracy too.
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
        """This one minus `base`, paired by question and by text: much narrower than the difference of two means.

        Raises ValueError where the questions or texts are not the same, in the same order.
        """
        for name, ours, theirs in (
            ("questions", [each.question for each in self.answers], [each.question for each in base.answers]),
            ("texts", list(map(_identity, self.texts)), list(map(_identity, base.texts))),
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
        # Two questions may have one text and other choices, and are two.
        names = [repr((answer.question.question, answer.question.choices)) for answer in self.answers]
        return mean_estimate(values, names, seed=self.seed)

    def _over_texts(self, values: Sequence[float | None]) -> Estimate:
        # A text of no question is on its own.
        names = [
            repr((index, text.question)) if not text.question else text.question
            for index, text in enumerate(self.texts)
        ]
        return mean_estimate(values, names, seed=self.seed)

    @property
    def columns(self) -> dict[str, float | int | None]:
        """Its numbers as a row of a table."""
        return {
            name + end: value
            for name, found in self._estimates().items()
            for end, value in (("", found.value), ("_low", found.low), ("_high", found.high), ("_n", found.n))
        }

    def _estimates(self) -> dict[str, Estimate]:
        return {"accuracy": self.accuracy, "margin": self.margin, "letter_mass": self.letter_mass, "nll": self.nll}

    def summary(self) -> dict[str, Any]:
        """The numbers, and what acted, as JSON."""
        return {
            "model": self.model,
            "interventions": list(self.interventions),
            "adapter": self.adapter,
            "system_prompt": self.system_prompt,
            "chance": self.chance,
            **{name: found._asdict() for name, found in self._estimates().items()},
            "texts_without_response": sum(text.log_likelihood is None for text in self.texts),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, log-probabilities included, whole or not at all; OSError where it cannot be written."""
        record = {
            "format_version": FORMAT_VERSION,
            "summary": self.summary(),
            "seed": self.seed,
            "answers": [{**asdict(each.question), "log_probs": list(each.log_probs)} for each in self.answers],
            "texts": [asdict(text) for text in self.texts],
        }
        write_json(Path(path), record)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Capability":
        """What `save` wrote. Raises FileNotFoundError, or ValueError for a damaged file or another version's."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"No file {path}.")
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            if (version := saved["format_version"]) == FORMAT_VERSION:
                return cls._from_record(saved)
        except DAMAGE as error:
            raise ValueError(f"{path} does not hold a capability ({error}): measure it again.") from error
        raise ValueError(
            f"{path} has format version {version}, and this persona_lens reads {FORMAT_VERSION}: install the "
            "persona_lens that wrote it, or a newer one."
        )

    @classmethod
    def _from_record(cls, saved: Mapping[str, Any]) -> "Capability":
        made = saved["summary"]
        return cls(
            tuple(_answer(row) for row in saved["answers"]),
            tuple(_likelihood(**row) for row in saved["texts"]),
            checked(made["model"], str),
            tuple(checked(each, str) for each in made["interventions"]),
            checked(made["adapter"], str, NoneType),
            checked(made["system_prompt"], str),
            checked(saved["seed"], int, low=0),
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


def _identity(text: TextLikelihood) -> tuple[str, int]:
    return text.question, text.n_tokens


def _answer(row: Mapping[str, Any]) -> AnsweredQuestion:
    asked, subject = (checked(row[name], str) for name in ("question", "subject"))
    choices = tuple(checked(choice, str) for choice in row["choices"])
    question = Question(asked, choices, checked(row["answer"], int), subject)
    # Rounding may leave a hair above 0.
    return AnsweredQuestion(question, tuple(checked(each, float, high=0.01) for each in row["log_probs"]))


def _likelihood(log_likelihood: Any, n_tokens: Any, question: Any = "") -> TextLikelihood:
    value = checked(log_likelihood, float, NoneType, high=0.01)
    return TextLikelihood(value, checked(n_tokens, int, low=0), checked(question, str))


def _text(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    return f"{estimate.value:.2f}" + ("" if estimate.low is None else f" [{estimate.low:.2f}, {estimate.high:.2f}]")
