"""What is run: real text out of the bundled traits, the same rows on every machine.

Questions are the traits' extraction and evaluation questions; answers are their instructions, positive ones for the
positive rows and negative ones for the negative rows, so that a difference in means has something to find.
Knows tokenizers through persona_lens.chat.batches alone; knows nothing about models or time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, cycle, islice
from typing import Any

from persona_lens import Trait, bundled_traits, load_trait
from persona_lens.chat.batches import ChatTokens, chat_messages, encode, render_prompt


@dataclass(frozen=True)
class Workload:
    """Rows of token ids, and which of them are the positive side of a difference in means."""

    name: str
    rows: tuple[ChatTokens, ...]
    positive: tuple[bool, ...]

    @property
    def n_tokens(self) -> int:
        """Real tokens of every prompt and response, a shared prompt counted once for each of its rows."""
        return sum(map(len, self.rows))


def short_texts(tokenizer: Any, n: int) -> Workload:
    """Texts of 20 to 80 words: a question, distinct in every row, and an answer, without a template."""
    rows: list[ChatTokens] = []
    positive: list[bool] = []
    for index, question in enumerate(_questions()[:n]):
        n_words = 20 + 37 * index % 61  # 37 and 61 share no factor, so neighbours differ and the range fills evenly
        positive.append(index % 2 == 0)
        answer = islice(_words(positive[-1], index), n_words - len(question.split()))
        rows.append(ChatTokens(encode(tokenizer, question), encode(tokenizer, " " + " ".join(answer))))
    return Workload(f"{n} texts of 20 to 80 words", tuple(rows), tuple(positive))


def shared_prompts(
    tokenizer: Any, name: str, *, n_prompts: int, n_prompt_tokens: int, response_lengths: Sequence[int]
) -> Workload:
    """Chat prompts of exactly `n_prompt_tokens`, each with a response of every length, positive, negative in turn."""
    rows: list[ChatTokens] = []
    for number in range(n_prompts):
        prompt = _chat_prompt(tokenizer, number, n_prompt_tokens)
        for index, length in enumerate(response_lengths, start=number * len(response_lengths)):
            answer = encode(tokenizer, " ".join(islice(_words(index % 2 == 0, index), length)))
            rows.append(ChatTokens(prompt, answer[:length]))  # a word is at least one token
    return Workload(name, tuple(rows), tuple(index % 2 == 0 for index in range(len(rows))))


def many_rollouts(
    tokenizer: Any, n_rows: int, *, per_prompt: int, n_prompt_tokens: int, n_response_tokens: int
) -> Workload:
    """Rollouts of more prompts than there are questions: all are cut out of running text, and follow no template."""
    asked = encode(tokenizer, " ".join(_questions()))
    said = [encode(tokenizer, " ".join(islice(_words(positive, 0), 5000))) for positive in (True, False)]
    n_prompts = -(-n_rows // per_prompt)
    step = (len(asked) - n_prompt_tokens) // n_prompts
    if step < 1:
        raise ValueError(f"The questions' {len(asked)} tokens hold no {n_prompts} prompts: ask for fewer rows.")
    rows: list[ChatTokens] = []
    for index in range(n_rows):
        start, begin = step * (index // per_prompt), 5 * index % 4000
        answer = said[index % 2][begin : begin + n_response_tokens]
        rows.append(ChatTokens(asked[start : start + n_prompt_tokens], answer))
    name = f"{n_rows} rollouts, {per_prompt} a prompt, {n_prompt_tokens} + {n_response_tokens} tokens"
    return Workload(name, tuple(rows), tuple(index % 2 == 0 for index in range(n_rows)))


def _chat_prompt(tokenizer: Any, number: int, n_tokens: int) -> tuple[int, ...]:
    """The last `n_tokens` tokens of a rendered chat, so that it ends where the assistant would speak."""
    system = _traits()[number].system_prompt("positive", 0)
    asked: list[str] = []
    for question in _questions()[number:]:
        asked.append(question)
        ids = encode(tokenizer, render_prompt(tokenizer, chat_messages(system, " ".join(asked))).text)
        if len(ids) >= n_tokens:
            return ids[-n_tokens:]
    raise ValueError(f"The traits' questions do not fill a prompt of {n_tokens} tokens: ask for a shorter one.")


@cache
def _traits() -> tuple[Trait, ...]:
    return tuple(load_trait(name) for name in bundled_traits())


@cache
def _questions() -> tuple[str, ...]:
    """Every question, the traits taking turns."""
    by_trait = (trait.extraction_questions + trait.evaluation_questions for trait in _traits())
    return tuple(dict.fromkeys(chain.from_iterable(zip(*by_trait, strict=False))))


def _words(positive: bool, start: int) -> chain[str]:
    """The words of the instructions of one side without end, from the instruction `start` on."""
    by_trait = ([getattr(pair, "positive" if positive else "negative") for pair in t.instructions] for t in _traits())
    instructions = list(chain.from_iterable(zip(*by_trait, strict=False)))
    first = start % len(instructions)
    return chain.from_iterable(text.split() for text in cycle(instructions[first:] + instructions[:first]))
