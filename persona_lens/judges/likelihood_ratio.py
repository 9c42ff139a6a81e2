"""The likelihood-ratio judge: no key, no network, no second model.

For a response y to question x, sampled under instruction pair i, it asks how much likelier the text is under the other
pairs' positive system prompts than under their negative ones:
s = mean over pairs j != i of (1/|y|) * sum_t [log p(y_t | positive_j, x) - log p(y_t | negative_j, x)].
The own pair is left out because its expectation is a KL divergence, positive by construction. `contrast_pairs` limits
the number of other pairs to the next ones in the trait's order. The score is 100 * sigmoid(a s + b), with a and b from
a logistic regression of polarity on s over questions that are never scored.
Limit, to be stated wherever it is reported: the judge is not independent of the model.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any, cast
from zlib import crc32

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm.auto import tqdm

from persona_lens.activations.prefixes import TokenCount, count_tokens, pad, prefix_batches, unique_prompts
from persona_lens.chat.batches import ChatTokens, chat_messages, tokenize_chat
from persona_lens.chat.encoding import encode_content
from persona_lens.generation.sampling import rows_at_a_time
from persona_lens.judges.scores import Score
from persona_lens.models.memory import backing_off, default_token_budget
from persona_lens.models.structure import Model, identify, suspended
from persona_lens.rollouts.collection import plan_rollouts
from persona_lens.rollouts.rows import Prompt, Rollout
from persona_lens.statistics import auc, spearman
from persona_lens.storage.files import checked
from persona_lens.traits.trait import NEUTRAL_SYSTEM_PROMPT, Trait

LOGIT_VALUES = 2**26
"""Logits of a batch, a quarter of a gigabyte in float32, however large the vocabulary is."""


def mean_log_likelihoods(model: Model, rows: Sequence[ChatTokens], *, progress: bool = False) -> Float[Tensor, " row"]:
    """Mean log-likelihood per response token, (1/|y|) * sum_t log p(y_t | x, y_<t), in nats; NaN without a response.

    Interventions are suspended and adapters off while it runs, whatever contexts are open around the call. Rows that
    share a prompt run it once.
    """
    with suspended(model):
        return intervened_log_likelihoods(model, rows, progress=progress)


def intervened_log_likelihoods(
    model: Model, rows: Sequence[ChatTokens], *, progress: bool = False
) -> Float[Tensor, " row"]:
    """As `mean_log_likelihoods`, under the interventions and adapters that are attached to the model.

    If memory runs out, the remaining rows run fewer at a time; raises DoesNotFit where one fails alone.
    """
    means = torch.full((len(rows),), float("nan"), dtype=torch.float32)
    waiting = {index for index, row in enumerate(rows) if row.response}
    # Rows without a response are not run, nor is their prompt, unless another row has it.
    budget = max(64, min(default_token_budget(model), LOGIT_VALUES // int(model.cfg.d_vocab)))

    def attempt(left: list[int], budget: int) -> Iterator[list[int]]:
        for sums in _sums(model, [rows[index] for index in left], budget):
            done = [left[place] for place in sums]
            for index, value in zip(done, sums.values(), strict=True):
                means[index] = value / len(rows[index].response)
            waiting.difference_update(done)
            yield done

    with tqdm(total=len(rows), desc="likelihoods", unit="row", leave=False, disable=not progress) as bar:
        for done in backing_off(model, waiting, [len(row) for row in rows], budget, attempt):
            bar.update(len(done))
    return means


def _sums(model: Model, rows: Sequence[ChatTokens], token_budget: int) -> Iterator[dict[int, float]]:
    """Log-likelihoods of whole responses by row, batch by batch."""
    prompts = unique_prompts(rows)
    followers: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        followers.setdefault(row.prompt, []).append(index)
    # The prompt's last logits predict a response's first token, and its last token predicts nothing: it is never run.
    fed = [ChatTokens(row.prompt, row.response[:-1]) for row in rows]
    first_tokens: dict[int, float] = {}  # log-likelihoods of the rows whose other tokens have not run yet
    for batch in prefix_batches(model, fed, token_budget=token_budget):
        logits = batch.run(last_logits=1 if batch.is_prompt else None)
        assert logits is not None
        if batch.is_prompt:
            openings = torch.log_softmax(logits[:, -1].float(), dim=-1)
            for opening, prompt in zip(openings, batch.rows, strict=True):
                rows_here = followers[prompts[prompt]]
                first_tokens |= {index: opening[rows[index].response[0]].item() for index in rows_here}
            yield {index: first_tokens.pop(index) for index in list(first_tokens) if not fed[index].response}
        else:
            following = [rows[index].response[1:] for index in batch.rows]
            tokens = pad(following, left=False)[0].to(logits.device)
            logprobs = logits.gather(-1, tokens[..., None])[..., 0].float() - _log_normalisers(logits)
            rest = (logprobs.cpu().double() * batch.mask).sum(dim=1).tolist()
            yield {index: first_tokens.pop(index) + more for index, more in zip(batch.rows, rest, strict=True)}


def _log_normalisers(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch pos"]:
    """Log-sum-exps of the logits, a few tokens at a time, so that their exponentials stay small."""
    flat = rearrange(logits, "batch pos d_vocab -> (batch pos) d_vocab")
    parts = torch.cat([part.float().logsumexp(dim=-1) for part in flat.split(rows_at_a_time(flat))])
    return rearrange(parts, "(batch pos) -> batch pos", batch=len(logits))


Numbers = Sequence[float] | np.ndarray
LOGIT_90 = math.log(9.0)


@dataclass(frozen=True)
class CoherenceScale:
    """Coherence from fluency and repetition, with fitted constants; `centre` and `width` in nats per token.

    100 * sigmoid((centre - NLL) / width) * min(1, distinct / floor), with NLL the mean negative log-likelihood per
    token under the unsteered model and a neutral system prompt, and `distinct` the share of different 4-grams of
    tokens. The model's own neutral responses get median 90 and their word-shuffles median 10, and the floor is the 5th
    percentile of `distinct` among them.
    """

    centre: float
    width: float
    distinct_floor: float

    def score(self, nll: float, distinct: float) -> float:
        """Coherence from 0 to 100 of a response with this NLL per token and share of distinct 4-grams."""
        fluent = 1 / (1 + math.exp(min(700.0, -(self.centre - nll) / self.width)))
        return 100 * fluent * min(1.0, distinct / self.distinct_floor)

    @classmethod
    def fit(cls, clean: Numbers, shuffled: Numbers, distinct: Numbers) -> "CoherenceScale":
        """The constants from the NLLs of neutral responses and of their word-shuffles, and the distinct shares.

        Raises ValueError where shuffling does not raise the median NLL: then NLL cannot measure coherence.
        """
        low, high = float(np.median(clean)), float(np.median(shuffled))
        if not high > low:
            raise ValueError(
                f"Shuffled text is as likely as clean text under this model (median NLL {high:.2f} against {low:.2f}), "
                "so it cannot judge coherence. Use longer responses or another judge."
            )
        floor = max(float(np.percentile(distinct, 5)), 1e-3)
        return cls(centre=(low + high) / 2, width=(high - low) / (2 * LOGIT_90), distinct_floor=floor)


def distinct_four_grams(tokens: Sequence[int]) -> float:
    """The share of 4-grams of tokens that are different; 1 where there are fewer than four tokens."""
    grams = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def shuffle_words(text: str, seed: int) -> str:
    """The text's words in random order."""
    words = text.split()
    random.Random(seed).shuffle(words)
    return " ".join(words)


def loop_words(text: str, n_words: int = 6) -> str:
    """As many words as the text has, its first few over and over."""
    words = text.split()
    return " ".join(words[index % n_words] for index in range(len(words)))


MIN_COHERENCE = 50.0
_SCALE = ("centre", "width", "distinct_floor")


@dataclass(frozen=True)
class Calibration:
    """The judge's fitted constants for one trait, the questions they were fitted on, and diagnostics on these.

    They belong to ratios over `contrast_pairs` other pairs, all of them where that is None.
    """

    trait: str
    slope: float
    intercept: float
    coherence: CoherenceScale
    questions: tuple[str, ...]
    diagnostics: Mapping[str, float | int | None]
    contrast_pairs: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """From `to_dict`; raises TypeError, KeyError or ValueError for anything else."""
        scale = CoherenceScale(*(checked(values["coherence"][name], float) for name in _SCALE))
        checked(values["trait"], str)
        for name in ("slope", "intercept"):
            checked(values[name], float)
        for value in checked(values["diagnostics"], dict).values():
            checked(value, float, NoneType)
        checked(values.get("contrast_pairs"), int, NoneType, low=1)
        questions = tuple(checked(question, str) for question in checked(values["questions"], list))
        return cls(**{**values, "coherence": scale, "questions": questions})


class LikelihoodRatioJudge:
    """Judges with the model itself, unsteered and unadapted; calibrate it once a trait before scoring.

    Args:
        model: The model that wrote the responses, or another.
        calibration_questions: Evaluation questions for calibration; they are never scored.
        neutral_samples: Neutral responses a calibration question.
        batch_size: Rows that `score_rollouts` passes at a time.
        contrast_pairs: The number of other pairs that a response is judged under, all where None; fewer are faster, at
            a cost in AUC that docs/experiments.md gives.

    Raises:
        ValueError: `contrast_pairs` is below 1.
    """

    def __init__(
        self,
        model: Model,
        *,
        calibration_questions: int = 10,
        neutral_samples: int = 4,
        batch_size: int = 100,
        contrast_pairs: int | None = None,
    ):
        if contrast_pairs is not None and contrast_pairs < 1:
            raise ValueError(f"contrast_pairs needs at least 1 pair, or None for all of them; got {contrast_pairs}.")
        self.model = model
        self.contrast_pairs = contrast_pairs
        self.calibration_questions = calibration_questions
        self.neutral_samples = neutral_samples
        self.batch_size = batch_size
        self.calibrations: dict[str, Calibration] = {}
        self._identity = identify(model)

    def name(self, trait: Trait) -> str:
        """The judge, its model and its calibration."""
        fitted = self.calibration(trait)
        return (
            f"likelihood ratio by {self._identity.name} (weights {self._identity.weights_hash}), "
            f"slope {fitted.slope:.6g}, intercept {fitted.intercept:.6g}, coherence centre "
            f"{fitted.coherence.centre:.6g}, width {fitted.coherence.width:.6g}, floor "
            f"{fitted.coherence.distinct_floor:.6g}"
            + (f", {self.contrast_pairs} pairs a response" if self.contrast_pairs else "")
        )

    def plan_calibration(self, trait: Trait) -> list[Prompt]:
        """The rollouts for `calibrate`: on evaluation questions, one a pair and polarity, and neutral ones."""
        if not trait.evaluation_questions:
            raise ValueError(
                f"{trait.name} has no evaluation questions to calibrate the judge on; add some to the trait."
            )
        questions = trait.evaluation_questions[: self.calibration_questions]
        neutral = plan_rollouts(trait, polarities=["neutral"], questions=questions, per_question=self.neutral_samples)
        return plan_rollouts(trait, questions=questions, per_question=1) + neutral

    def calibration(self, trait: Trait) -> Calibration:
        """The trait's calibration; raises ValueError where there is none, or it is for other `contrast_pairs`."""
        if trait.name not in self.calibrations:
            raise ValueError(
                f"The judge is not calibrated for {trait.name!r}: sample `judge.plan_calibration(trait)` and "
                "pass them to `judge.calibrate(trait, rollouts)`, or use `extract_persona_vectors`, which does both."
            )
        fitted = self.calibrations[trait.name]
        if fitted.contrast_pairs != self.contrast_pairs:
            raise ValueError(
                f"The calibration for {trait.name!r} has contrast_pairs={fitted.contrast_pairs} and this judge "
                f"{self.contrast_pairs}: pass the same value, or calibrate again."
            )
        return fitted

    def used_questions(self, trait: Trait) -> tuple[str, ...]:
        """The questions of the trait's calibration, which are never scored."""
        return self.calibration(trait).questions

    def calibrate(
        self, trait: Trait, rollouts: Sequence[Rollout], *, seed: int = 0, progress: bool = False
    ) -> Calibration:
        """Fit the judge to the rollouts of `plan_calibration`; their questions can then not be scored.

        Diagnostics: AUC of s for polarity with the own pair left out and with all pairs, Spearman correlation of s
        with response length within each polarity, and AUC of coherence for clean against shuffled and looping text,
        each text scored with constants fitted on the other half of the questions.
        """
        contrastive = [row for row in rollouts if row.polarity != "neutral" and not row.is_empty]
        neutral = [row for row in rollouts if row.polarity == "neutral" and not row.is_empty]
        if len({row.polarity for row in contrastive}) < 2 or len({row.question for row in neutral}) < 2:
            raise ValueError(
                f"Calibration for {trait.name} needs responses of both polarities and neutral ones to two questions at "
                f"least, got {len(contrastive)} and {len(neutral)} that are not empty."
            )
        ratios = self._pair_ratios(trait, contrastive, own_pair=True, progress=progress)
        left_out = self._mean_ratios(trait, contrastive, ratios)
        positive = np.array([row.polarity == "positive" for row in contrastive])
        spread = max(float(left_out.std()), 1e-9)  # the regression's penalty assumes a feature of unit scale
        regression = LogisticRegression().fit(left_out[:, None] / spread, positive)
        coherence, coherence_diagnostics = self._calibrate_coherence(neutral, seed)
        lengths = np.array([len(row.response) for row in contrastive])
        diagnostics = {
            "rows": len(contrastive),
            "auc_without_own_pair": auc(left_out[positive], left_out[~positive]),
            "auc_with_own_pair": auc(np.nanmean(ratios, axis=1)[positive], np.nanmean(ratios, axis=1)[~positive]),
            "spearman_length_positive": spearman(left_out[positive], lengths[positive]),
            "spearman_length_negative": spearman(left_out[~positive], lengths[~positive]),
            **coherence_diagnostics,
        }
        fitted = Calibration(
            trait=trait.name,
            slope=float(regression.coef_[0, 0]) / spread,
            intercept=float(cast(Any, regression.intercept_)[0]),
            coherence=coherence,
            questions=tuple(dict.fromkeys(row.question for row in rollouts)),
            diagnostics=diagnostics,
            contrast_pairs=self.contrast_pairs,
        )
        self.calibrations[trait.name] = fitted
        return fitted

    def score(self, trait: Trait, rollouts: Sequence[Rollout], *, progress: bool = False) -> list[Score]:
        """Score rollouts; an empty response and one below coherence 50 have no trait score.

        Raises ValueError for questions that the judge was calibrated on.
        """
        fitted = self.calibration(trait)
        if shared := {row.question for row in rollouts} & set(fitted.questions):
            raise ValueError(f"The judge was calibrated on {sorted(shared)[0]!r}; score other questions with it.")
        ratios = self._pair_ratios(trait, rollouts, own_pair=False, progress=progress)
        nlls = -self._neutral_log_likelihoods([(row.question, self._tokens(row)) for row in rollouts])
        scores: list[Score] = []
        means = self._mean_ratios(trait, rollouts, ratios)
        for row, ratio, nll in zip(rollouts, means.tolist(), nlls.tolist(), strict=True):
            if row.is_empty or math.isnan(nll):
                scores.append(Score(None, None))
                continue
            distinct = distinct_four_grams(self._tokens(row))
            coherence = fitted.coherence.score(nll, distinct)
            shown = 100 / (1 + math.exp(min(700.0, -(fitted.slope * ratio + fitted.intercept))))
            evidence = {"log_likelihood_ratio": ratio, "nll": nll, "distinct_four_grams": distinct}
            scores.append(Score(shown if coherence >= MIN_COHERENCE else None, coherence, evidence))
        return scores

    def token_count(self, trait: Trait, rollouts: Sequence[Rollout]) -> TokenCount:
        """Tokens that scoring these rollouts runs, with shared prompts (as it is done) and without."""
        contrast, _ = self._contrast_rows(trait, rollouts, own_pair=False)
        neutral = self._neutral_rows([(row.question, self._tokens(row)) for row in rollouts])
        shared, unshared = zip(count_tokens(contrast), count_tokens(neutral), strict=True)
        unfed = sum(bool(row.response) for row in contrast + neutral)  # last tokens are never run
        return TokenCount(sum(shared) - unfed, sum(unshared))

    def _tokens(self, rollout: Rollout) -> tuple[int, ...]:
        return rollout.tokenize(self.model.tokenizer).response

    def _pairs(self, trait: Trait, rollout: Rollout) -> list[int]:
        """The pairs that a rollout is judged under, never its own."""
        count = len(trait.instructions)
        if rollout.instruction is None:
            # By the question, so that a neutral rollout has the same pairs at every dose.
            first = crc32(rollout.question.encode())
            following = [(first + step) % count for step in range(count)]
        else:
            following = [(rollout.instruction + step) % count for step in range(1, count)]
        return following[: self.contrast_pairs]

    def _mean_ratios(self, trait: Trait, rollouts: Sequence[Rollout], ratios: np.ndarray) -> np.ndarray:
        """The mean of each rollout over the pairs that it is judged under."""
        return np.array(
            [row[self._pairs(trait, rollout)].mean() for rollout, row in zip(rollouts, ratios, strict=True)]
        )

    def _contrast_rows(
        self, trait: Trait, rollouts: Sequence[Rollout], *, own_pair: bool
    ) -> tuple[list[ChatTokens], list[tuple[int, int, int]]]:
        """Every rollout under the instructions of its pairs, both polarities, with its place (rollout, pair, side)."""
        if len(trait.instructions) < 2:
            raise ValueError(f"{trait.name} has one instruction pair; leaving out the own pair needs two at least.")
        rows, places = [], []
        for index, rollout in enumerate(rollouts):
            pairs = self._pairs(trait, rollout)
            for pair in range(len(trait.instructions)):
                if pair not in pairs and not (own_pair and pair == rollout.instruction):
                    continue
                for side, polarity in enumerate(("positive", "negative")):
                    system = trait.system_prompt(polarity, pair)
                    rows.append(rollout.tokenize(self.model.tokenizer, system_prompt=system))
                    places.append((index, pair, side))
        return rows, places

    def _pair_ratios(
        self, trait: Trait, rollouts: Sequence[Rollout], *, own_pair: bool, progress: bool = False
    ) -> np.ndarray:
        """Log-likelihood ratio per token of every rollout under every pair [rollout pair]; NaN where not computed."""
        rows, places = self._contrast_rows(trait, rollouts, own_pair=own_pair)
        table = np.full((len(rollouts), len(trait.instructions), 2), np.nan)
        values = mean_log_likelihoods(self.model, rows, progress=progress).tolist()
        for place, value in zip(places, values, strict=True):
            table[place] = value
        return table[..., 0] - table[..., 1]

    def _neutral_rows(self, responses: Sequence[tuple[str, Sequence[int]]]) -> list[ChatTokens]:
        tokenizer = self.model.tokenizer
        return [
            tokenize_chat(tokenizer, chat_messages(NEUTRAL_SYSTEM_PROMPT, question), tokens)
            for question, tokens in responses
        ]

    def _neutral_log_likelihoods(self, responses: Sequence[tuple[str, Sequence[int]]]) -> np.ndarray:
        return mean_log_likelihoods(self.model, self._neutral_rows(responses)).double().numpy()

    def _calibrate_coherence(
        self, neutral: Sequence[Rollout], seed: int
    ) -> tuple[CoherenceScale, dict[str, float | int | None]]:
        tokenizer = self.model.tokenizer
        texts = {
            "clean": [self._tokens(row) for row in neutral],
            "shuffled": [
                encode_content(tokenizer, shuffle_words(row.response, seed + index))
                for index, row in enumerate(neutral)
            ],
            "looping": [encode_content(tokenizer, loop_words(row.response)) for row in neutral],
        }
        questions = [row.question for row in neutral]
        together = [pair for rows in texts.values() for pair in zip(questions, rows, strict=True)]
        nll = dict(zip(texts, np.split(-self._neutral_log_likelihoods(together), len(texts)), strict=True))
        distinct = {kind: np.array([distinct_four_grams(row) for row in rows]) for kind, rows in texts.items()}
        order = {question: place for place, question in enumerate(dict.fromkeys(questions))}
        half = np.array([order[question] % 2 for question in questions])
        crossed: dict[str, list[float]] = {kind: [] for kind in texts}
        for fold in (0, 1):
            fit, scored = half != fold, half == fold
            scale = CoherenceScale.fit(nll["clean"][fit], nll["shuffled"][fit], distinct["clean"][fit])
            for kind in texts:
                crossed[kind] += map(scale.score, nll[kind][scored], distinct[kind][scored])
        diagnostics: dict[str, float | int | None] = {"neutral_rows": len(neutral)}
        for kind in ("shuffled", "looping"):
            diagnostics[f"coherence_auc_{kind}"] = auc(crossed["clean"], crossed[kind])
        return CoherenceScale.fit(nll["clean"], nll["shuffled"], distinct["clean"]), diagnostics
