"""A scorer for inspect-ai: any judge of ours gives the trait score and coherence of each sample's completion.

A score that is missing is unscored in inspect-ai, where metrics leave it out, and never 0.
"""

import threading
from importlib import import_module
from math import nan
from typing import Any

from persona_lens.judges.scores import CalibratedJudge, DetectingJudge, Judge, Score
from persona_lens.rollouts.rows import Rollout
from persona_lens.storage.text import missing_package
from persona_lens.traits.trait import Trait, load_trait


def persona_scorer(judge: Judge, trait: Trait | str) -> Any:
    """An inspect-ai scorer of `trait` and `coherence`, from 0 to 100: `Task(scorer=persona_scorer(judge, "evil"))`.

    The judge reads a sample's input as the question and the completion as the answer, of one turn; a system message is
    the rollout's system prompt. It judges one sample at a time, off the event loop. An empty answer, one that the judge
    gives no number, and a question that the judge was calibrated on are unscored, with the reason; the judge's name
    and its evidence are in the score's metadata.

    Raises:
        ImportError: inspect-ai is not installed.
    """
    try:
        import anyio.to_thread

        inspect_ai: Any = import_module("inspect_ai.scorer")
    except ImportError as error:
        raise missing_package("The scorer", "inspect-ai", extra="eval") from error
    loaded = load_trait(trait) if isinstance(trait, str) else trait
    used = frozenset(judge.used_questions(loaded)) if isinstance(judge, CalibratedJudge) else frozenset()
    alone = threading.Lock()  # a judge may run a model, whose hooks belong to one thread at a time

    def judged(rollout: Rollout) -> Score:
        with alone:
            return judge.score(loaded, [rollout])[0]

    metrics = [inspect_ai.mean(), inspect_ai.stderr()]

    @inspect_ai.scorer(metrics={"trait": metrics, "coherence": metrics}, name=f"persona_{loaded.name}")
    def persona() -> Any:
        async def score(state: Any, target: Any) -> Any:
            rollout = _rollout(state, loaded)
            details = {"judge": judge.name(loaded)}
            if rollout.is_empty:
                return inspect_ai.Score.unscored(reason="no_response", metadata=details)
            if rollout.question in used:
                reason = "the judge was calibrated on this question"
                return inspect_ai.Score.unscored(reason=reason, answer=rollout.response, metadata=details)
            found = await anyio.to_thread.run_sync(judged, rollout)
            details |= {"evidence": dict(found.evidence)}
            if isinstance(judge, DetectingJudge):
                details |= {"reading": judge.reading}
            if found.trait_score is None and found.coherence is None:
                return inspect_ai.Score.unscored(reason="scoring_failed", answer=rollout.response, metadata=details)
            value = {"trait": _or_nan(found.trait_score), "coherence": _or_nan(found.coherence)}
            return inspect_ai.Score(value=value, answer=rollout.response, metadata=details)

        return score

    return persona()


def _or_nan(score: float | None) -> float:
    return nan if score is None else float(score)


def _rollout(state: Any, trait: Trait) -> Rollout:
    """What a judge is shown of a sample."""
    system = next((message.text for message in state.messages if message.role == "system"), "")
    return Rollout(
        trait=trait.name,
        polarity="neutral",
        instruction=None,
        system_prompt=system,
        question=state.input_text,
        sample=int(state.epoch) - 1,
        response=state.output.completion,
        response_tokens=None,
        finish_reason=str(state.output.stop_reason),
        engine=f"inspect-ai {state.model}",
        seed=0,
    )
