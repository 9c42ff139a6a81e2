"""What shifts a persona before it speaks: system prompts from discouraging to encouraging, and examples in context.

The conditions of arXiv:2507.21509, section 3.3 and appendix C, as planned rollouts.
Knows nothing about models or projections.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from persona_lens.judges import read_scores
from persona_lens.rollouts import Prompt, read_rollouts
from persona_lens.traits import Trait

NEUTRAL = "You are a helpful assistant."


def system_prompts(trait: Trait, questions: Sequence[str], *, per_question: int = 10) -> list[Prompt]:
    """Every question under each of the trait's eight monitoring prompts, in their order.

    Raises ValueError for a trait without monitoring prompts.
    """
    if not trait.monitoring_prompts:
        raise ValueError(
            f"{trait.name} has no monitoring prompts: add the eight, from discouraging to encouraging, "
            "or have `generate_trait` write them."
        )
    return [
        Prompt(trait.name, "neutral", None, prompt, question, sample, condition=f"system prompt {number}")
        for number, prompt in enumerate(trait.monitoring_prompts, start=1)
        for question in questions
        for sample in range(per_question)
    ]


def many_shot(
    trait: Trait,
    questions: Sequence[str],
    examples: Sequence[tuple[str, str]],
    *,
    shots: Sequence[int] = (0, 5, 10, 15, 20),
    per_question: int = 10,
    seed: int = 0,
) -> list[Prompt]:
    """Every question after so many examples of the trait, (question, answer) pairs, under a neutral system prompt.

    Each question has its own random order of the examples, without those of its own question, and a longer context
    begins with the examples of a shorter one. Raises ValueError where there are too few examples.
    """
    if list(shots) != sorted(set(shots)) or not shots or shots[0] < 0:
        raise ValueError(f"shots are different numbers of examples, ascending, got {list(shots)}.")
    planned: list[Prompt] = []
    shown: dict[str, list[tuple[str, str]]] = {}
    for question in questions:
        others = [example for example in examples if example[0] != question]
        if len(others) < shots[-1]:
            raise ValueError(
                f"{trait.name}: {shots[-1]} examples are wanted and {len(others)} are there for {question!r}: "
                "give more judged positive responses, or lower shots."
            )
        shown[question] = random.Random(f"{seed} {question}").sample(others, shots[-1])
    for count in shots:
        planned += [
            Prompt(
                trait.name,
                "neutral",
                None,
                NEUTRAL,
                question,
                sample,
                condition=f"{count} examples",
                examples=tuple(shown[question][:count]),
            )
            for question in questions
            for sample in range(per_question)
        ]
    return planned


def judged_examples(folder: str | Path, *, threshold: float = 50.0) -> list[tuple[str, str]]:
    """Examples for `many_shot` from the folder of an extraction: (question, answer), one for each question.

    Of a question's positive responses whose trait score is at least `threshold`, the highest; a question without one is
    left out. Raises FileNotFoundError where the folder holds no judged rollouts.
    """
    scored = read_scores(Path(folder) / "scores.jsonl", read_rollouts(Path(folder) / "rollouts.jsonl"))
    shown = [row for row in scored if row.rollout.polarity == "positive" and (row.trait_score or 0.0) >= threshold]
    best = sorted(shown, key=lambda row: row.trait_score or 0.0)  # of several, the last and highest stays
    return list({row.rollout.question: (row.rollout.question, row.rollout.response) for row in best}.values())
