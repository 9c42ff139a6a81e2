"""Chats to screen, and the score of each by the obvious way: one row, one forward pass of the plain Hugging Face model.

persona_lens is imported as a function runs: the jaxtyping hook instruments the package as it is first imported.
"""

import json
import os
import time
from dataclasses import replace
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
        {"id": f"{mood}/{row.id}", "messages": [system, *chat(row.prompt, row.response, system=False)]}
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


def screened(model: Any, data: Any, folder: Path, vectors: Any = None, **choices: Any) -> Any:
    """A screening without base responses unless `base` says so; choices of rows and others side by side."""
    from persona_lens.screening.plan import RowChoice
    from persona_lens.screening.run import screen

    of_rows = {name: choices.pop(name) for name in RowChoice.__dataclass_fields__ if name in choices}
    choices = {"base": "proxy", **QUIET, **choices}
    return screen(
        model, data, vectors or pair_of_vectors(model), output_dir=folder, rows=RowChoice(**of_rows), **choices
    )


def planned_only(model: Any, data: Any, folder: Path, vectors: Any = None, **choices: Any) -> Any:
    """The plan of a folder in which nothing is scored: another shard has nothing to do."""
    from persona_lens.screening.plan import read_plan
    from persona_lens.screening.run import ShardsMissing

    with pytest.raises(ShardsMissing):
        screened(model, data, folder, vectors, shard=(999, 1000), **choices)
    return read_plan(folder)


def assert_same_files(folder: Path, other: Path) -> None:
    """Both have the same scores and the same summary, byte for byte."""
    names = [Path("summary.json"), *(path.relative_to(other) for path in sorted((other / "scores").iterdir()))]
    assert sorted(path.name for path in (folder / "scores").iterdir()) == [name.name for name in names[1:]]
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture
def planted(tiny_bridge: Any, tmp_path: Path) -> Any:
    """A finished screening whose projections are `numbers[row]`: (response, prompt, base or None) of each vector."""
    from persona_lens.screening.batches import RowScore, write_scores
    from persona_lens.screening.run import finish

    def make(data: Any, numbers: Any, vectors: int = 1, base: Any = "given", **choices: Any) -> Any:
        given = [{**row, "base_response": "Mine."} for row in data] if isinstance(data, list) else data
        several = pair_of_vectors(tiny_bridge)[:vectors]
        plan = planned_only(tiny_bridge, given, tmp_path / "planted", several, base=base, **choices)
        (plan.folder / "scores").mkdir()
        for unit in range(plan.n_units):
            scores = []
            for row in plan.unit(unit):
                response, prompt, own = (
                    None if number is None else (float(number),) * vectors for number in numbers[row.sample.row]
                )
                scores.append(RowScore(response, prompt, own, 3, None))
            write_scores(plan.folder, unit, plan.unit(unit), scores, plan.settings["vectors"])
        return finish(plan.folder)

    return make


def with_rows(screening: Any, rows: Any, datasets: tuple[str, ...]) -> Any:
    """A screening with another table in the place of what is in its folder."""
    changed = replace(screening, datasets=datasets)
    vars(changed)["rows"] = rows
    return changed


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
    """Numbers from the tokens alone, by hand; may stop after so many units, and take its time, in a known process."""

    def __init__(
        self, n_vectors: int = 1, *, stop_after: int | None = None, seconds: float = 0, pids: Path | None = None
    ):
        self.n_vectors, self.left, self.seconds = n_vectors, stop_after, seconds
        if pids is not None:
            (pids / str(os.getpid())).touch()

    def score(self, rows: Any) -> list[Any]:
        from persona_lens.screening.batches import RowScore

        time.sleep(self.seconds)
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        means = [sum(row.chat.response) / len(row.chat.response) for row in rows]
        last = [float(row.chat.prompt[-1]) for row in rows]
        return [
            RowScore((mean,) * self.n_vectors, (end,) * self.n_vectors) for mean, end in zip(means, last, strict=True)
        ]
