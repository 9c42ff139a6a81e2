"""What each stage makes the model and the judge do, counted before anything runs.

Exact in responses, texts read, training rows and judge calls, where no response is empty; an upper bound in tokens,
since a response may end before its limit. Tokens of prompts are the preset's estimate.
Knows nothing about seconds or dollars: no torch is needed to count.
"""

from collections.abc import Callable, Mapping

from persona_lens.replication.brought import Brought
from persona_lens.replication.mood_work import mood_finetuning, mood_mitigation, mood_projection
from persona_lens.replication.preset import Preset
from persona_lens.replication.tables import FinetuningTable, SamplingTable, Stage
from persona_lens.replication.units import Work, judging, sampling, total
from persona_lens.traits.trait import Trait

UNKNOWN_ROWS = 5000
"""Rows of a set that is not there yet; an assumption."""
MONITORED = 8
"""System prompts of a trait's monitoring."""


def stage_work(preset: Preset, stage: Stage, there: Mapping[str, Brought]) -> Work:
    """What a stage does for the whole preset, as if nothing of it had been done yet."""
    by_trait: dict[Stage, Callable[[Preset, Trait], Work]] = {
        "extraction": extraction_work,
        "layers": layers_work,
        "dose-response": dose_work,
        "monitoring": monitoring_work,
    }
    if stage in by_trait:
        return total(by_trait[stage](preset, preset.trait(name)) for name in preset.traits)
    if preset.finetuning.source == "moods":
        by_mood: dict[Stage, Callable[[Preset], Work]] = {
            "finetuning": mood_finetuning,
            "projection-difference": mood_projection,
            "mitigation": mood_mitigation,
        }
        return by_mood[stage](preset) if stage in by_mood else Work()
    by_set: dict[Stage, Callable[[Preset, Mapping[str, Brought]], Work]] = {
        "finetuning": grid_work,
        "projection-difference": projection_work,
        "mitigation": mitigation_work,
        "new-facts": facts_work,
        "real-chats": chats_work,
    }
    return by_set[stage](preset, there) if stage in by_set else Work()


EXAMPLES = 3
"""Kept pairs that are read token by token for the page."""


def extraction_work(preset: Preset, trait: Trait) -> Work:
    """Rollouts of both polarities, the judge's calibration where it needs one, and the scores."""
    how, judge, pairs = preset.extraction, preset.judge, len(trait.instructions)
    asked = min(how.questions, len(trait.extraction_questions))
    rows = asked * 2 * pairs * how.per_question
    found = sampling(preset, rows, how.max_new_tokens, prompts=asked * 2 * pairs)
    found += judging(preset, pairs, rows, how.max_new_tokens, questions=asked, contrastive=True)
    found += Work(forwards=2 * EXAMPLES, read=2 * EXAMPLES * how.max_new_tokens)
    if judge.kind != "likelihood":
        return found
    questions = min(judge.calibration_questions, len(trait.evaluation_questions))
    contrastive, neutral = questions * 2 * pairs, questions * judge.neutral_samples
    found += sampling(preset, contrastive + neutral, how.max_new_tokens, prompts=questions * (2 * pairs + 1))
    # The other pairs that are asked and the own one, each on both sides; neutral text as it is, shuffled and looping.
    others = min(judge.contrast_pairs or pairs, pairs - 1)
    texts = contrastive * 2 * (others + 1) + 3 * neutral
    prompts = questions * (2 * pairs + 1) * preset.cost.prompt_tokens
    return found + Work(forwards=texts, read=texts * how.max_new_tokens, prompt_tokens=round(prompts))


def layers_work(preset: Preset, trait: Trait) -> Work:
    """Every cell of the sweep, and the unsteered answers once."""
    layers = len(set(preset.layers.layers)) or preset.model.n_layers
    cells = 1 + layers * len(preset.layers.coefficients)
    return _neutral_answers(preset, trait, preset.layers, cells, len(trait.extraction_questions))


def dose_work(preset: Preset, trait: Trait) -> Work:
    """Every coefficient of the direction and of the random ones, and the unsteered answers once."""
    how = preset.dose_response
    amounts = len({float(each) for each in how.coefficients} - {0.0})
    return _neutral_answers(preset, trait, how, 1 + amounts * (1 + how.random), scorable(preset, trait))


def monitoring_work(preset: Preset, trait: Trait) -> Work:
    """Answers under every condition, and each prompt's last token read once."""
    how = preset.monitoring
    asked = min(how.questions, scorable(preset, trait))
    conditions = MONITORED + len(how.shots)
    found = _neutral_answers(preset, trait, how, conditions, scorable(preset, trait))
    prompts = asked * conditions
    example = preset.cost.prompt_tokens / 2 + how.max_new_tokens * preset.cost.response_share
    shown = asked * round(sum(how.shots) * example)
    # Once to answer and once to read the last token.
    return found + Work(forwards=prompts, prompt_tokens=round(prompts * preset.cost.prompt_tokens) + 2 * shown)


def scorable(preset: Preset, trait: Trait) -> int:
    """Evaluation questions that are left when the judge has been calibrated."""
    used = preset.judge.calibration_questions if preset.judge.kind == "likelihood" else 0
    return max(0, len(trait.evaluation_questions) - used)


def _neutral_answers(
    preset: Preset, trait: Trait, how: SamplingTable | FinetuningTable, cells: int, available: int
) -> Work:
    asked = min(how.questions, available)
    rows = asked * how.per_question * cells
    found = sampling(preset, rows, how.max_new_tokens, prompts=asked)
    return found + judging(preset, len(trait.instructions), rows, how.max_new_tokens, questions=asked)


def set_rows(preset: Preset, there: Mapping[str, Brought]) -> dict[str, int]:
    """How many rows of each of the user's sets are trained on."""
    item = there["finetuning"]
    found = {name: count_rows(path) if item.is_there else UNKNOWN_ROWS for name, path in item.sets.items()}
    return {name: min(rows, preset.finetuning.rows) for name, rows in found.items()}


def count_rows(path: object) -> int:
    """The lines of a file of rows."""
    with open(str(path), "rb") as file:
        return sum(1 for line in file if line.strip())


def _answers(preset: Preset, traits: tuple[str, ...]) -> Work:
    """The evaluation questions of some traits, answered and judged once."""
    given = [preset.trait(name) for name in traits]
    return total(_neutral_answers(preset, each, preset.finetuning, 1, scorable(preset, each)) for each in given)


def _training(preset: Preset, rows: int) -> Work:
    return Work(trained=rows * preset.finetuning.epochs)


def grid_work(preset: Preset, there: Mapping[str, Brought]) -> Work:
    """Every set trained on, and the base model: all traits' answers, and the last prompt tokens of both models."""
    rows = set_rows(preset, there)
    prompts = sum(min(preset.finetuning.questions, scorable(preset, preset.trait(name))) for name in preset.traits)
    shift = Work(forwards=2 * prompts, prompt_tokens=round(2 * prompts * preset.cost.prompt_tokens))
    return total(
        [_answers(preset, preset.traits) * (1 + len(rows)), shift * len(rows), _training(preset, sum(rows.values()))]
    )


def projection_work(preset: Preset, there: Mapping[str, Brought]) -> Work:
    """Base responses to the screened rows of every set, and both responses read."""
    how = preset.projection_difference
    rows = sum(min(how.rows, each) for each in set_rows(preset, there).values())
    return screened(preset, rows, how.base_tokens)


def screened(preset: Preset, rows: int, base_tokens: int) -> Work:
    """Rows screened against the base model's own responses; a row's response is about as long as a training row."""
    found = sampling(preset, rows, base_tokens, prompts=rows)
    read = rows * (base_tokens + round(preset.cost.training_row_tokens))
    prompts = round(rows * preset.cost.prompt_tokens)
    return found + Work(forwards=2 * rows, read=read, prompt_tokens=prompts)


def mitigation_work(preset: Preset, there: Mapping[str, Brought]) -> Work:
    """For each trait the worst version of its set under every method; capability of each run."""
    how, item = preset.mitigation, there["finetuning"]
    rows, found = set_rows(preset, there), Work()
    for name in how.traits:
        own = next((each for each, trait in item.table.traits.items() if trait == name), "")
        trained = len(how.preventative) + len(how.all_layers) + how.caft
        runs = trained + len(how.post_hoc)
        found += _training(preset, trained * rows.get(f"{own}_{item.table.versions[-1]}", 0))
        found += _answers(preset, (name,)) * runs
        asked = how.capability_questions
        found += Work(forwards=asked, prompt_tokens=round(asked * preset.cost.prompt_tokens)) * (runs + 1)
    return found


def facts_work(preset: Preset, there: Mapping[str, Brought]) -> Work:
    """New facts, and narrow tasks: the questions before, after training, and after preventative training."""
    found = Work()
    for name in ("new_facts", "narrow"):
        if (item := there.get(name)) is not None and item.is_there:
            train, questions = (count_rows(item.path / f"{part}.jsonl") for part in ("train", "questions"))
            found += _training(preset, 2 * min(train, preset.finetuning.rows))
            found += Work(forwards=3 * questions, prompt_tokens=round(3 * questions * preset.cost.prompt_tokens))
    return found


def chats_work(preset: Preset, there: Mapping[str, Brought]) -> Work:
    """The screened sample, and three sets of it trained on and judged."""
    how, item = preset.real_chats, there.get("chats")
    if how is None or item is None or not item.is_there:
        return Work()
    rows = min(how.sample, count_rows(item.path))
    chosen = min(how.chosen, rows)
    return total(
        [
            screened(preset, rows, preset.projection_difference.base_tokens),
            _training(preset, 3 * chosen),
            _answers(preset, (how.trait,)) * 3,
        ]
    )
