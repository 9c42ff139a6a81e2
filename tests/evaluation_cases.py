"""A small trait, a judge that counts a letter, and made-up evaluations, for tests of what steering does to answers."""

import json
from dataclasses import asdict, replace

import numpy as np

from persona_lens.evaluation.evaluate import Evaluation, evaluate_cells
from persona_lens.evaluation.layer_selection import LayerSweep
from persona_lens.interventions.hooks import attachments
from persona_lens.judges.likelihood_ratio import Calibration, CoherenceScale
from persona_lens.judges.scores import Score, ScoredRollout
from persona_lens.rollouts.engines import CellEngine, ModelEngine
from persona_lens.rollouts.rows import Rollout
from persona_lens.statistics import N_RESAMPLES, question_resamples
from persona_lens.storage.files import JsonLines
from persona_lens.traits.trait import InstructionPair, Trait
from tests.intervention_cases import some_vectors

TRAIT = Trait(
    name="grumpy",
    description="Finds fault with everything.",
    positive_adjective="grumpy",
    instructions=(InstructionPair("Grumble.", "Praise."), InstructionPair("Sigh.", "Smile.")),
    extraction_questions=("How is the soup?", "How was the film?"),
    evaluation_questions=("How is the tea?", "Who are you?"),
    rubric="How grumpy is {answer} to {question}?",
)
SHORT = {"max_new_tokens": 6, "progress": False}


class LetterJudge:
    """The percentage of a text's characters that are one letter; an empty text has no score.

    Given the model, it refuses to run while an intervention is attached.
    """

    def __init__(self, letter="e", *, model=None, batch_size=100, coherence=90.0):
        self.letter, self.model, self.batch_size, self.coherence = letter, model, batch_size, coherence
        self.judged = []

    def name(self, trait):
        return f"share of {self.letter}"

    def score(self, trait, rollouts, *, progress=False):
        assert self.model is None or not attachments(self.model)
        self.judged += [row.key for row in rollouts]
        return [self._score(row.response) for row in rollouts]

    def _score(self, text):
        if not text.strip():
            return Score(None, None)
        return Score(100 * text.count(self.letter) / len(text), self.coherence, {"letters": float(len(text))})


class FittedLetterJudge(LetterJudge):
    """One that was calibrated on some questions."""

    def __init__(self, used, **choices):
        super().__init__(**choices)
        self.used = used

    def used_questions(self, trait):
        return self.used


def planted_vectors(model, hf_model, letter="z", layer=3):
    """Random directions, but at one late layer the unembedding's row of a letter, which makes the model say it."""
    vectors = some_vectors(model, TRAIT.name)
    directions = vectors.directions.clone()
    directions[layer] = hf_model.lm_head.weight[model.tokenizer.convert_tokens_to_ids(letter)].detach()
    return replace(vectors, directions=directions * (40 / directions.norm(dim=-1, keepdim=True)))


def make_calibration(trait=TRAIT, questions=()):
    """Constants of a likelihood-ratio judge that finds everything coherent."""
    return Calibration(trait.name, 3.0, -0.2, CoherenceScale(60.0, 5.0, 0.01), tuple(questions), {})


def make_rollout(question, sample, text="so it is", intervention=""):
    system = TRAIT.system_prompt("neutral", None)
    return Rollout(
        "grumpy", "neutral", None, system, question, sample, text, (1, 2), "stop", "made up", 0, intervention
    )


def make_evaluation(scores, *, coherence: float | None = 90.0, questions=None, intervention="", text="so it is"):
    """A row for each score; each is the answer to a question of its own unless `questions` say otherwise."""
    names = [f"question {index}" for index in range(len(scores))] if questions is None else questions
    rows = [
        ScoredRollout(make_rollout(name, index, text, intervention), score, coherence)
        for index, (name, score) in enumerate(zip(names, scores, strict=True))
    ]
    return Evaluation("grumpy", tuple(rows), (intervention,) if intervention else (), "response", 0)


def make_sweep(cells, *, proxies=None, baseline=(5.0, 5.0, 5.0, 5.0), questions=None):
    """A sweep of `cells`, scores by (layer, coefficient), or (scores, coherence)."""
    found = {}
    for (layer, coefficient), cell in cells.items():
        scores, coherence = cell if isinstance(cell, tuple) else (cell, 90.0)
        name = f"layer {layer} x {coefficient:g}"
        found[layer, coefficient] = make_evaluation(scores, coherence=coherence, questions=questions, intervention=name)
    layers, coefficients = (tuple(dict.fromkeys(each)) for each in zip(*cells, strict=True))
    start = make_evaluation(baseline, questions=None if questions is None else questions[: len(baseline)])
    doses = {(layer, coefficient): coefficient / 10 for layer, coefficient in cells}
    return LayerSweep("grumpy", "made up", layers, coefficients, start, found, doses, proxies or {})


def keep_rows(evaluations, folder):
    """Write the rows of evaluations as `select_layer` leaves them in its folder."""
    rows = [row for found in evaluations for row in found.scored]
    JsonLines(folder / "sweep_rollouts.jsonl").append(asdict(row.rollout) for row in rows)
    JsonLines(folder / "sweep_scores.jsonl").append(
        {"key": row.rollout.key, "trait_score": row.trait_score, "coherence": row.coherence, "judge": "made up"}
        for row in rows
    )


def naive_resamples(evaluation, seed=0):
    """The mean trait score in each resample of the questions, their rows written out one by one."""
    questions = sorted(set(evaluation.questions))
    means = []
    for counts in question_resamples(len(questions), N_RESAMPLES, seed):
        drawn = [
            row.trait_score
            for question, count in zip(questions, counts, strict=True)
            for row in evaluation.scored
            if row.rollout.question == question and row.trait_score is not None
            for _ in range(count)
        ]
        means.append(sum(drawn) / len(drawn) if drawn else np.nan)
    return np.array(means)


def cells_of(model, cells, *, judge=None, at="response", temperature=1.0, batch_size=120, **settings):
    """`evaluate_cells` of a small trait, in answers of six tokens."""
    engine = CellEngine(ModelEngine(model, 6, temperature, 1.0, batch_size), {cell.name: cell for cell in cells}, at)
    return evaluate_cells(engine, TRAIT, judge=judge or LetterJudge(), progress=False, **settings)


def texts(evaluation):
    return [row.rollout.response for row in evaluation.scored]


def judged(evaluation):
    """What was said to which question and what the judge made of it, whatever the intervention is called."""
    return [
        (row.rollout.question, row.rollout.sample, row.rollout.response_tokens, row.trait_score, row.coherence)
        for row in evaluation.scored
    ]


def strict_json(path):
    """A JSON file in which no number is NaN or infinite."""

    def refuse(constant):
        raise ValueError(f"{path} holds {constant}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def cut(path, share=0.5):
    """Keep the first part of a file, which ends in the middle of a line."""
    whole = path.read_bytes()
    size = int(len(whole) * share)
    while whole[size - 1 : size] == b"\n":
        size += 1
    path.write_bytes(whole[:size])
