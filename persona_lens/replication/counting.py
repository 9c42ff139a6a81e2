"""What a stage asks of the model and the judge, counted by running it with an engine that answers at once.

Exact in responses, texts read, training rows and judge calls, where no response is empty; an upper bound in tokens,
since a response may end before its limit. How long prompts and training rows are is the preset's estimate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from persona_lens.replication.context import CHOICES, Context, Method, Trained
from persona_lens.replication.preset import Preset, SamplingTable
from persona_lens.traits.trait import Trait

EXAMPLES = 3
"""Kept pairs that are read token by token for the page."""
MONITORED = 8
"""System prompts of a trait's monitoring."""


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        rollouts: Responses that are sampled.
        generated: Their tokens, at most.
        prompt_tokens: Tokens of prompts, each distinct one counted once for the responses that share it; an estimate.
        forwards: Texts that are read, each a row of a forward pass.
        read: Tokens of their responses, at most.
        trained: Rows of training passes.
        judged: Responses that a judge scores.
        calls: Calls to a judge on a server.
    """

    rollouts: int = 0
    generated: int = 0
    prompt_tokens: int = 0
    forwards: int = 0
    read: int = 0
    trained: int = 0
    judged: int = 0
    calls: int = 0

    def __add__(self, other: "Work") -> "Work":
        """Both, one after the other."""
        return Work(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def __sub__(self, other: "Work") -> "Work":
        """What is added to the other."""
        return Work(*(getattr(self, part.name) - getattr(other, part.name) for part in fields(self)))


@dataclass
class CountingEngine:
    """Answers and reads at once, each response as long as its limit, and counts what that would have been."""

    preset: Preset
    work: Work = Work()

    def answer(self, rows: int, max_new_tokens: int, *, prompts: int) -> None:
        """Sample so many responses to so many distinct prompts."""
        self.work += Work(rollouts=rows, generated=rows * max_new_tokens, prompt_tokens=self._tokens(prompts))

    def read(self, texts: int, tokens: int = 0, *, prompts: int = 0) -> None:
        """Read texts whose responses have so many tokens, under so many distinct prompts."""
        self.work += Work(forwards=texts, read=texts * tokens, prompt_tokens=self._tokens(prompts))

    def train(self, rows: int) -> None:
        """Train on so many rows, every epoch."""
        self.work += Work(trained=rows * self.preset.finetuning.epochs)

    def _tokens(self, prompts: int) -> int:
        return round(prompts * self.preset.cost.prompt_tokens)


@dataclass
class CountingJudge:
    """Counts calls to a server, or what the likelihood-ratio judge reads: its calibration once, then every response."""

    engine: CountingEngine
    calibrated: set[str] = field(default_factory=set)

    def calibrate(self, trait: Trait) -> None:
        """What fitting the judge to a trait takes, the first time."""
        how, engine, pairs = self.engine.preset.judge, self.engine, len(trait.instructions)
        if how.kind != "likelihood" or trait.name in self.calibrated:
            return
        self.calibrated.add(trait.name)
        length = engine.preset.extraction.max_new_tokens
        questions = min(how.calibration_questions, len(trait.evaluation_questions))
        contrastive, neutral = questions * 2 * pairs, questions * how.neutral_samples
        engine.answer(contrastive + neutral, length, prompts=questions * (2 * pairs + 1))
        # The other pairs and the own one, each on both sides; neutral text as it is, shuffled and looping.
        others = min(how.contrast_pairs or pairs, pairs - 1)
        texts = contrastive * 2 * (others + 1) + 3 * neutral
        engine.read(texts, length, prompts=questions * (2 * pairs + 1))

    def scorable(self, trait: Trait) -> int:
        """How many evaluation questions it was not calibrated on."""
        how = self.engine.preset.judge
        used = how.calibration_questions if how.kind == "likelihood" else 0
        return max(0, len(trait.evaluation_questions) - used)

    def score(self, trait: Trait, rows: int, tokens: int, *, questions: int, contrastive: bool = False) -> None:
        """Score trait and coherence: two calls a response, or a reading of it under each of the other prompts."""
        how, pairs = self.engine.preset.judge, len(trait.instructions)
        self.engine.work += Work(judged=rows, calls=2 * rows * (how.kind == "openai"))
        if how.kind == "likelihood":
            others = min(how.contrast_pairs or pairs, pairs - contrastive)
            # Responses of all pairs to a question are judged under all prompts between them, neutral ones under a few.
            prompts = questions * (2 * (pairs if contrastive else others) + 1)
            self.engine.read(rows * (2 * others + 1), tokens, prompts=prompts)


class Counting(Context):
    """A replication that counts what its stages ask for, and does none of it; nothing is read or written."""

    def __init__(self, preset: Preset, user_data: dict[str, Any]) -> None:
        super().__init__(None, preset, Path("counted"), user_data, progress=False)  # pyright: ignore[reportArgumentType]
        self.engine = CountingEngine(preset)
        self.counting_judge = CountingJudge(self.engine)
        self.finished: set[Path] = set()
        """Folders of adapters and answers that earlier pieces made: they are not made again."""

    def once(self, path: Path, make: Callable[[], dict[str, Any]]) -> None:
        """Run the piece, and keep nothing."""
        make()

    def extract(self, name: str) -> None:
        """Rollouts of both polarities, their scores, and the examples for the page."""
        how, trait = self.preset.extraction, self.preset.trait(name)
        questions = trait.extraction_questions[: how.questions]
        prompts = len(questions) * 2 * len(trait.instructions)
        rows = prompts * how.per_question
        self.engine.answer(rows, how.max_new_tokens, prompts=prompts)
        self.counting_judge.calibrate(trait)
        self.counting_judge.score(trait, rows, how.max_new_tokens, questions=len(questions), contrastive=True)
        self.engine.read(2 * EXAMPLES, how.max_new_tokens)

    def sweep_layers(self, name: str) -> None:
        """Every cell, and the unsteered answers once."""
        how, trait = self.preset.layers, self.preset.trait(name)
        layers = len(set(how.layers)) or self.preset.model.n_layers
        cells = 1 + layers * len(how.coefficients)
        self._neutral_answers(trait, how, min(how.questions, len(trait.extraction_questions)), cells)

    def measure_doses(self, name: str) -> None:
        """Every coefficient of the direction and of the random ones, and the unsteered answers once."""
        how = self.preset.dose_response
        doses = len({float(dose) for dose in how.coefficients} - {0.0})
        self._neutral_answers(self.preset.trait(name), how, self._asked(name, how), 1 + doses * (1 + how.random))

    def monitor(self, name: str, kind: str) -> None:
        """Answers under every condition; each prompt is read once to answer, and once for its last token."""
        how, asked = self.preset.monitoring, self._asked(name, self.preset.monitoring)
        conditions = MONITORED if kind == "system-prompts" else len(how.shots)
        self._neutral_answers(self.preset.trait(name), how, asked, conditions, prompts=asked * conditions)
        self.engine.read(asked * conditions, prompts=asked * conditions)
        if kind == "many-shot":
            example = self.preset.cost.prompt_tokens / 2 + how.max_new_tokens * self.preset.cost.response_share
            self.engine.work += Work(prompt_tokens=2 * asked * round(sum(how.shots) * example))

    def interventions(self, trait: str, method: Method) -> list[Any]:
        """Nothing acts."""
        return []

    def train(self, rows: Any, output: Path, during: Sequence[Any] = (), *, at_most: int | None = None) -> Trained:
        """Rows of training passes, where no earlier piece has trained this adapter."""
        count = rows if isinstance(rows, int) else count_rows(rows)
        count = count if at_most is None else min(count, at_most)
        if self._is_new(output):
            self.engine.train(count)
        return Trained(output, count, {})

    def answer(self, adapter: object, name: str, output: Path, acting: Sequence[Any] = ()) -> dict[str, Any]:
        """The trait's questions answered and judged, where no earlier piece has."""
        how = self.preset.finetuning
        if self._is_new(output):
            self._neutral_answers(self.preset.trait(name), how, self._asked(name, how), 1)
        return {"score": {}, "coherence": {}}

    def shifts(self, adapter: object, name: str) -> dict[str, float]:
        """The last prompt tokens of the base model and of the finetuned one."""
        if adapter is not None:
            asked = self._asked(name, self.preset.finetuning)
            self.engine.read(2 * asked, prompts=2 * asked)
        return {}

    def capability(self, questions: Path | int, adapter: object, acting: Sequence[Any] = ()) -> dict[str, Any]:
        """Every question read once."""
        asked = questions if isinstance(questions, int) else count_rows(questions)
        self.engine.read(asked, prompts=asked)
        return {}

    def screen(self, name: str, chats: Path, output: Path, traits: Sequence[str], sample: int, **options: Any) -> None:
        """Base responses to the rows, and both responses read; a row's own is about as long as a training row."""
        rows, limit = min(sample, count_rows(chats)), self.preset.projection_difference.base_tokens
        self.engine.answer(rows, limit, prompts=rows)
        self.engine.read(rows, limit)
        self.engine.read(rows, round(self.preset.cost.training_row_tokens), prompts=rows)

    def split(self, screened: Path, output: Path, count: int) -> dict[str, Any]:
        """As many rows of each choice as there may be."""
        chats = self.user_data["chats"].path
        return dict.fromkeys(CHOICES, min(count, count_rows(chats)))

    def _asked(self, name: str, how: SamplingTable) -> int:
        trait = self.preset.trait(name)
        self.counting_judge.calibrate(trait)
        return min(how.questions, self.counting_judge.scorable(trait))

    def _neutral_answers(
        self, trait: Trait, how: SamplingTable, asked: int, cells: int, *, prompts: int | None = None
    ) -> None:
        rows = asked * how.per_question * cells
        self.engine.answer(rows, how.max_new_tokens, prompts=asked if prompts is None else prompts)
        self.counting_judge.score(trait, rows, how.max_new_tokens, questions=asked)

    def _is_new(self, output: Path) -> bool:
        is_new = output not in self.finished
        self.finished.add(output)
        return is_new


def count_rows(path: Path) -> int:
    """The lines of a file of rows."""
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())
