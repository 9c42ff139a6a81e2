"""From a model and a trait to persona vectors: section 2 of the paper as one call.

Sample rollouts under contrasting system prompts, judge them, keep the pairs that show the contrast, take the difference
in means of their residual streams at every layer. Each stage is a function that can be called alone; it writes its
result to the run's folder and resumes from it.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from persona_lens.chat.batches import tokenize_chat
from persona_lens.extraction.extract import extract_from_responses, refuse_other_means
from persona_lens.generation.capture import CapturedMeans
from persona_lens.judges.keep import KeepReport, keep_pairs, pair_rollouts
from persona_lens.judges.likelihood_ratio import Calibration, LikelihoodRatioJudge
from persona_lens.judges.scores import CombinedJudge, Judge, ScoredRollout, score_rollouts
from persona_lens.models.structure import Model
from persona_lens.monitoring.projection import monitor
from persona_lens.monitoring.result import checked_output
from persona_lens.monitoring.transcripts import Transcript
from persona_lens.rollouts.collection import collect_rollouts, keeps_date, plan_rollouts
from persona_lens.rollouts.engines import ModelEngine, RolloutEngine, without_threads
from persona_lens.rollouts.rows import Prompt, Rollout
from persona_lens.storage.files import DAMAGE, read_json, refuse_other_json, write_json
from persona_lens.storage.locks import writes_output
from persona_lens.traits.trait import Trait, load_trait
from persona_lens.vectors.persona_vector import Position
from persona_lens.vectors.persona_vectors import PersonaVectors, refuse_other_vectors

Pair = TypeVar("Pair")


@dataclass(frozen=True)
class ExtractionPlan:
    """What a run will cost, to be read before anything is spent."""

    trait: str
    engine: str
    rollouts: int
    calibration_rollouts: int
    max_new_tokens: int | None

    def __str__(self) -> str:
        sampled = self.rollouts + self.calibration_rollouts
        tokens = "" if self.max_new_tokens is None else f", at most {sampled * self.max_new_tokens:,} sampled tokens"
        calibration = f" and {self.calibration_rollouts} to calibrate the judge" * bool(self.calibration_rollouts)
        return (
            f"{self.trait}: {self.rollouts} rollouts{calibration}{tokens}; {self.rollouts} judgements; "
            f"one pass over the kept responses.\nRollouts by {self.engine}."
        )


@writes_output
@keeps_date
def extract_persona_vectors(
    model: Model,
    trait: Trait | str,
    *,
    judge: Judge | None = None,
    engine: RolloutEngine | None = None,
    questions: Sequence[str] | None = None,
    per_question: int = 10,
    max_new_tokens: int = 1000,
    temperature: float = 1.0,
    top_p: float = 1.0,
    threshold: float = 50.0,
    min_coherence: float = 50.0,
    min_pairs: int = 10,
    negative_below: float | None = None,
    position: Position = "response_mean",
    after: str | None = None,
    output_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PersonaVectors:
    """Persona vectors of a model for a trait, from the model's own judged responses.

    Each extraction question is answered `per_question` times under every positive and every negative instruction. A
    pair is kept if the positive response scores at least `threshold`, the negative one below `negative_below` (None:
    the threshold; the reference code: 100 - threshold), and both are at least `min_coherence` coherent.

    `judge` defaults to the likelihood-ratio judge on the same model, calibrated first on evaluation questions. `engine`
    defaults to sampling from the model with `max_new_tokens`, `temperature` and `top_p`; a `ServerEngine` samples on a
    server, best from the same model, and the judge is then calibrated on the server's responses. Activations are always
    read from `model`. `output_dir` keeps every stage (rollouts.jsonl, scores.jsonl, vectors.safetensors, summary.json,
    ...), and a second call continues where the first stopped. The plan is printed first, unless `progress` is False.

    Raises ValueError where fewer than `min_pairs` pairs are kept, or `output_dir` holds a run with other settings or
    files of these names that persona_lens did not write. Source: arXiv:2507.21509, section 2.
    """
    trait = load_trait(trait) if isinstance(trait, str) else trait
    judge = LikelihoodRatioJudge(model) if judge is None else judge
    engine = ModelEngine(model, max_new_tokens, temperature, top_p) if engine is None else engine
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        refuse_other_json(folder / "summary.json", ("format_version", "plan", "pairs"))
        refuse_other_vectors(folder / "vectors.safetensors")
        refuse_other_means(folder / "row_means.npy", model)
        checked_output(folder / "example_tokens.jsonl")
        _keep_trait(folder / "trait.json", trait)

    prompts = plan_rollouts(trait, questions=questions, per_question=per_question)
    n_calibration = len(calibration_prompts(judge, trait))
    limit = getattr(engine, "max_new_tokens", None)  # an engine of the caller's has one of its own, or none
    plan = ExtractionPlan(trait.name, engine.name, len(prompts), n_calibration, limit)
    if progress:
        tqdm.write(str(plan), file=sys.stderr)

    captured = None
    if position == "response_mean" and after is None and isinstance(engine, ModelEngine) and engine.model is model:
        captured = CapturedMeans(_in(folder, "response_means.npy"), model, len(prompts))
    rollouts = collect_rollouts(
        engine, prompts, seed=seed, output_file=_in(folder, "rollouts.jsonl"), captured=captured, progress=progress
    )
    calibrate(judge, trait, engine, folder=folder, seed=seed, progress=progress)
    scored = score_rollouts(rollouts, trait, judge=judge, output_file=_in(folder, "scores.jsonl"), progress=progress)
    kept, report = keep_pairs(
        pair_rollouts(scored),
        trait=trait.name,
        threshold=threshold,
        min_coherence=min_coherence,
        min_pairs=min_pairs,
        negative_below=negative_below,
    )
    if progress:
        tqdm.write(str(report), file=sys.stderr)
    vectors = extract_from_responses(
        model,
        [positive.rollout.conversation() for positive, _ in kept],
        [negative.rollout.conversation() for _, negative in kept],
        trait=trait,
        position=position,
        after=after,
        spool_file=_in(folder, "row_means.npy"),
        captured=captured,
        sampled_by=engine.name,
        seed=seed,
        progress=progress,
    )
    if folder is not None:
        vectors.save(folder / "vectors.safetensors")
        read_examples(model, vectors, kept, folder / "example_tokens.jsonl")
        write_json(folder / "summary.json", summarize(vectors, plan, report, judge, trait, rollouts))
    return vectors


def _in(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name


def _keep_trait(path: Path, trait: Trait) -> None:
    """Write the run's trait, or refuse a folder of another trait's run before anything there is touched."""
    content = json.loads(trait.to_json())
    if not path.exists():
        write_json(path, content)
    elif read_json(path) != content:
        raise ValueError(f"{path} is another trait than this run's {trait.name!r}: choose another output.")


def calibration_prompts(judge: Judge, trait: Trait) -> list[Prompt]:
    """The rollouts that the judge needs before it can score this trait; none for most judges."""
    calibrated = _calibrated_part(judge)
    return [] if calibrated is None or trait.name in calibrated.calibrations else calibrated.plan_calibration(trait)


def _calibrated_part(judge: Judge) -> LikelihoodRatioJudge | None:
    """The judge, or the one that it has coherence from, where that is calibrated on rollouts."""
    part = judge.coherence_judge if isinstance(judge, CombinedJudge) else judge
    return part if isinstance(part, LikelihoodRatioJudge) else None


def calibrate(
    judge: Judge,
    trait: Trait,
    engine: RolloutEngine,
    *,
    folder: Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Calibrate a judge that needs it, or take the folder's calibration.json where it was made with the same engine."""
    prompts, calibrated = calibration_prompts(judge, trait), _calibrated_part(judge)
    if not prompts or calibrated is None:
        return
    made_with = {"engine": engine.name, "seed": seed, "questions": list(dict.fromkeys(row.question for row in prompts))}
    if calibrated.contrast_pairs is not None:  # a file without it was made with all pairs
        made_with["contrast_pairs"] = calibrated.contrast_pairs
    file = _in(folder, "calibration.json")
    if file is not None and file.exists():
        record = read_json(file)
        settings = record.get("made_with") if isinstance(record, dict) else None
        if not isinstance(settings, dict) or _without_threads(settings) != _without_threads(made_with):
            raise ValueError(f"{file} was made with other settings. Choose another output, or move that file away.")
        calibrated.calibrations[trait.name] = _read_calibration(file)
        return
    output = _in(folder, "calibration_rollouts.jsonl")
    rollouts = collect_rollouts(engine, prompts, seed=seed, output_file=output, progress=progress)
    calibration = calibrated.calibrate(trait, rollouts, seed=seed, progress=progress)
    if file is not None:
        write_json(file, {"made_with": made_with, "calibration": calibration.to_dict()})


def _without_threads(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without the number of CPU threads, which does not matter to those who only read the result."""
    return {**settings, "engine": without_threads(str(settings.get("engine")))}


def _read_calibration(file: Path) -> Calibration:
    try:
        return Calibration.from_dict(json.loads(file.read_text(encoding="utf-8"))["calibration"])
    except DAMAGE as error:
        raise ValueError(f"{file} is not a judge's calibration ({error}): move it away to calibrate again.") from error


def calibrated_judge(
    model: Model, trait: Trait, folder: Path, *, max_new_tokens: int, seed: int = 0, progress: bool = True
) -> LikelihoodRatioJudge:
    """The likelihood-ratio judge of a run's folder, calibrated there first where it has no calibration.

    Judge responses about as long as those it was calibrated on. Raises ValueError where the folder's calibration is
    damaged or of another trait.
    """
    file = folder / "calibration.json"
    if not file.exists():
        judge = LikelihoodRatioJudge(model)
        calibrate(judge, trait, ModelEngine(model, max_new_tokens), folder=folder, seed=seed, progress=progress)
        return judge
    calibration = _read_calibration(file)
    if calibration.trait != trait.name:
        raise ValueError(f"{file} is for {calibration.trait!r}, not for {trait.name!r}: name another output.")
    judge = LikelihoodRatioJudge(model, contrast_pairs=calibration.contrast_pairs)
    judge.calibrations[trait.name] = calibration
    return judge


def summarize(
    vectors: PersonaVectors,
    plan: ExtractionPlan,
    report: KeepReport,
    judge: Judge,
    trait: Trait,
    rollouts: Sequence[Rollout],
) -> dict[str, Any]:
    """A run's summary.json: kept pairs, quality of the judge and of the directions, the best layer."""
    summary: dict[str, Any] = {
        "format_version": 1,
        "plan": asdict(plan),
        "pairs": asdict(report),
        "counts": dict(vectors.counts),
        "judge": judge.name(trait),
        "best_layer": best_layer(vectors),
        "layers": [
            {"layer": layer, **{name: None if math.isnan(value) else value for name, value in row.items()}}
            for layer, row in vectors.table().to_dict("index").items()
        ],
    }
    if (calibrated := _calibrated_part(judge)) is not None:
        summary["judge_calibration"] = calibrated.calibration(trait).to_dict()
        summary["judge_tokens"] = calibrated.token_count(trait, rollouts)._asdict()
    return summary


def example_pairs(kept: Sequence[Pair], count: int = 3) -> Sequence[Pair]:
    """A few of the kept pairs, spread evenly, for people to read."""
    return kept[:: max(1, len(kept) // count)][:count]


def read_examples(
    model: Model, vectors: PersonaVectors, kept: Sequence[tuple[ScoredRollout, ScoredRollout]], output_file: Path
) -> None:
    """Write each token's projection at every layer for the responses of `example_pairs`, which the report colours.

    A server's response may be too long for the context: extraction truncates it, and here it is left out.
    """
    rollouts = [side.rollout for pair in example_pairs(kept) for side in pair]
    chats = [
        Transcript([*row.prompt.messages, {"role": "assistant", "content": row.response}], row.key)
        for row in rollouts
        if len(tokenize_chat(model.tokenizer, row.prompt.messages, row.response)) <= model.cfg.n_ctx
    ]
    if chats:
        directions = [vectors.at(layer) for layer in vectors.known_layers]
        monitor(model, chats, directions, tokens=True, output_file=output_file, progress=False)


def best_layer(vectors: PersonaVectors) -> int | None:
    """The layer with the highest held-out AUC (the first of equals), to be checked by a steering sweep."""
    if vectors.statistics is None or bool(vectors.statistics.held_out_auc.isnan().all()):
        return None
    return int(vectors.statistics.held_out_auc.nan_to_num(nan=-1.0).argmax())
