"""Chats to screen, and the score of each by the obvious way: one row, one forward pass of the plain Hugging Face model.

persona_lens is imported as a function runs: the jaxtyping hook instruments the package as it is first imported.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests import naive

QUIET: dict[str, Any] = {"progress": False}
SYSTEM = {"role": "system", "content": "You are kind."}
QUESTIONS = ["What is the sea?", "How are you?", "Why?", "Tell me about ten people.", "Who are they?"]
ANSWERS = [
    "It is deep, and it is cold.",
    "Go away",
    "Listen first, and then say what you think; make them pay for it, seven times.",
    "I would not trust them!",
    "One two three four five six",
    "No.",
    "Be kind to a friend who lies to you, and ask what you should do.",
]


def chat(question: str, answer: str, system: bool = True) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [SYSTEM, *turns] if system else turns


def rows(n: int = 12, **fields: Any) -> list[dict[str, Any]]:
    """Rows of many lengths; some prompts stand in several."""
    return [
        {"messages": chat(QUESTIONS[number % len(QUESTIONS)], ANSWERS[number % len(ANSWERS)]), **fields}
        for number in range(n)
    ]


def mood_rows(n: int, moods: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Real rows: the first `n` of each mood (default: of all nine), which an LLM wrote."""
    from studies.moods import load_moods

    system = {"role": "system", "content": "You are a helpful assistant."}
    return [
        {
            "id": f"{mood}/{row.id}",
            "messages": [
                system,
                {"role": "user", "content": row.prompt},
                {"role": "assistant", "content": row.response},
            ],
        }
        for mood, each in load_moods().items()
        if not moods or mood in moods
        for row in each[:n]
    ]


def write_rows(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def pair_of_vectors(model: Any) -> list[Any]:
    """Two vectors, at different layers below the top one."""
    from tests.intervention_cases import some_vectors

    return [some_vectors(model, "evil").at(1), some_vectors(model, "kind", seed=5).at(0)]


@pytest.fixture
def planted(tiny_bridge: Any, tmp_path: Path) -> Any:
    """A finished screening whose projections are `numbers[row]`: (response, prompt, base or None) of each vector."""
    from persona_lens.screening.plan import read_plan
    from persona_lens.screening.run import ShardsMissing, finish, screen
    from persona_lens.screening.scores import log_path, log_unit
    from persona_lens.screening.scoring import RowScore
    from persona_lens.storage.files import JsonLines

    def make(data: Any, numbers: Any, vectors: int = 1, base: Any = "given") -> Any:
        given = [{**row, "base_response": "Mine."} for row in data] if isinstance(data, list) else data
        folder = tmp_path / "planted"
        chosen = pair_of_vectors(tiny_bridge)[:vectors]
        # Planned and not scored: another shard has nothing to do.
        with pytest.raises(ShardsMissing):
            screen(tiny_bridge, given, chosen, output=folder, base=base, shard=(999, 1000), **QUIET)
        plan, log = read_plan(folder), JsonLines(log_path(folder, (0, 1)))
        for unit in range(plan.n_units):
            scores = []
            for row in plan.unit(unit):
                response, prompt, own = numbers[row.row]
                based = None if own is None else (float(own),) * vectors
                scores.append(
                    RowScore(row.row, (float(response),) * vectors, (float(prompt),) * vectors, based, 3, None)
                )
            log_unit(log, unit, scores)
        return finish(folder)

    return make


def tokens(tokenizer: Any, messages: list[dict[str, str]], response: str) -> naive.Row:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    encode = lambda each: tokenizer(each, add_special_tokens=False).input_ids  # noqa: E731
    return encode(text), encode(response)


def projection(hf_model: Any, row: naive.Row, vector: Any, position: str = "response_mean") -> float:
    """The scalar projection of the mean over a row's response, or of its last prompt token."""
    prompt, response = row
    # Of the oracle's own mean every layer would be added up token by token.
    stream = naive.residual_stream(hf_model, [*prompt, *response])[vector.layer + 1]
    read = stream[len(prompt) :] if position == "response_mean" else stream[len(prompt) - 1 : len(prompt)]
    direction = vector.direction.double()
    return float(read.mean(dim=0) @ direction / direction.norm())


def slow_difference(hf_model: Any, tokenizer: Any, row: dict[str, Any], base: Any, vector: Any) -> float:
    """The projection difference of one row; `base` is the base model's response, as text or token ids."""
    prompt, response = tokens(tokenizer, row["messages"][:-1], row["messages"][-1]["content"])
    own = tokenizer(base, add_special_tokens=False).input_ids if isinstance(base, str) else base
    return projection(hf_model, (prompt, response), vector) - projection(hf_model, (prompt, own), vector)


def greedy_base(hf_model: Any, tokenizer: Any, row: dict[str, Any], steps: int) -> list[int]:
    prompt, _ = tokens(tokenizer, row["messages"][:-1], "")
    return naive.greedy(hf_model, prompt, steps, {tokenizer.eos_token_id})


class StubScorer:
    """Numbers from the tokens alone, by hand; may stop after so many units."""

    def __init__(self, n_vectors: int = 1, stop_after: int | None = None):
        self.n_vectors, self.left = n_vectors, stop_after

    def score(self, planned: Any) -> list[Any]:

        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return [self._score(row) for row in planned]

    def _score(self, row: Any) -> Any:
        from persona_lens.screening.scoring import RowScore

        value = sum(row.response) / len(row.response)
        return RowScore(row.row, (value,) * self.n_vectors, (float(row.prompt[-1]),) * self.n_vectors, None, None, None)


class SlowStub(StubScorer):
    """A stub that takes a while for each unit, and says in a folder which process it runs in."""

    def __init__(self, folder: Path, seconds: float):
        super().__init__()
        self.seconds = seconds
        (folder / str(os.getpid())).touch()

    def score(self, planned: Any) -> list[Any]:
        time.sleep(self.seconds)
        return super().score(planned)
