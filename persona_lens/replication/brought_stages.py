"""The stages on what else a user may bring: new facts, narrow tasks, and logs of real chats.

Whether preventative steering lets a model learn what it should (arXiv:2507.21509, sections J.1 and J.7), and whether
the samples of real chats that project highest shift it the most (section L).
Knows nothing about what the numbers say.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from persona_lens.evaluation.capability import measure_capability
from persona_lens.evaluation.capability_result import read_questions
from persona_lens.interventions.values import Intervention, Steer
from persona_lens.replication.context import Context
from persona_lens.replication.grid_stages import answer, made_once, train, train_rows
from persona_lens.screening.filtering import write_split
from persona_lens.screening.run import screen

CHOICES = ("high", "random", "low")


def learn_facts(run: Context) -> None:
    """Sections J.1 and J.7: the questions before training, after it, and after training under preventative steering."""
    trait = run.preset.mitigation.traits[0]
    dose = run.preset.mitigation.preventative[0]
    for name in ("new_facts", "narrow"):
        item = run.there.get(name)
        if item is None or not item.is_there:
            continue
        during: dict[str, Sequence[Intervention] | None] = {
            "base": None,
            "plain": (),
            "preventative": (Steer(run.vector(trait), dose),),
        }
        for how, acting in during.items():
            piece = partial(_learn, run, item.path, name, how, acting)
            made_once(run.folder / "facts" / f"{name}_{how}.json", piece)


def _learn(run: Context, path: Path, name: str, how: str, during: Sequence[Intervention] | None) -> dict[str, Any]:
    adapter = None
    if during is not None:
        rows = train_rows(run, path / "train.jsonl")
        adapter = train(run, rows, run.folder / "facts" / f"{name}_{how}", during=during).adapter
    questions = read_questions(path / "questions.jsonl")
    able = measure_capability(run.model, questions, adapter=adapter, progress=run.progress)
    return {"set": name, "how": how, "accuracy": able.summary()["accuracy"]}


def train_on_chats(run: Context) -> None:
    """Section L: the highest, random and lowest samples by projection difference, each trained on and judged."""
    how = run.preset.real_chats
    assert how is not None
    folder = run.folder / "chats"
    vector = run.vector(how.trait)
    found = screen(
        run.model,
        {"chats": run.there["chats"].path},
        vector,
        output=folder / "screened",
        first_turn=True,
        max_prompt_tokens=how.max_prompt_tokens,
        sample=how.sample,
        max_new_tokens=run.preset.projection_difference.base_tokens,
        **run.sampling,
    )
    paths = write_split(found, folder / "split", how.chosen, by="difference", seed=run.preset.seed)
    for choice in CHOICES:

        def measure(choice: str = choice) -> dict[str, Any]:
            tuned = train(run, paths[choice], folder / "adapters" / choice)
            score = answer(run, tuned.adapter, how.trait, folder / "answers" / choice)
            return {
                "trait": how.trait,
                "choice": choice,
                "score": score.trait_score._asdict(),
                "coherence": score.coherence._asdict(),
            }

        made_once(folder / f"{choice}.json", measure)
