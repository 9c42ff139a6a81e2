"""Log-likelihoods of given responses under given prompts, per token.

(1/|y|) * sum_t log p(y_t | x, y_<t), where x is the rendered prompt; prompts are run once for all their responses.
Knows nothing about traits or scores.
"""

from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from persona_lens.chat import ChatTokens
from persona_lens.models import Model, backing_off, default_token_budget, suspended
from persona_lens.prefix import pad, prefix_batches, unique_prompts
from persona_lens.sampling import rows_at_a_time

LOGIT_VALUES = 2**26
"""Logits held at a time (a quarter of a gigabyte in float32): vocabularies differ tenfold, memory does not."""


def mean_log_likelihoods(model: Model, rows: Sequence[ChatTokens], *, progress: bool = False) -> Float[Tensor, " row"]:
    """Mean log-likelihood per response token of every row, in nats; NaN for a row without a response.

    Interventions are suspended and adapters off while it runs, whatever contexts are open around the call.
    """
    with suspended(model):
        return intervened_log_likelihoods(model, rows, progress=progress)


def intervened_log_likelihoods(
    model: Model, rows: Sequence[ChatTokens], *, progress: bool = False
) -> Float[Tensor, " row"]:
    """As `mean_log_likelihoods`, under whatever interventions and adapters are attached to the model.

    Where memory does not suffice, the rows that are left run fewer at a time; raises DoesNotFit where one fails
    alone.
    """
    means = torch.full((len(rows),), float("nan"), dtype=torch.float32)
    waiting = {index for index, row in enumerate(rows) if row.response}
    # A row without a response is not run: neither is its prompt, unless another row has it.
    budget = max(64, min(default_token_budget(model), LOGIT_VALUES // int(model.cfg.d_vocab)))

    def attempt(left: list[int], budget: int) -> Iterator[list[int]]:
        for found in _sums(model, [rows[index] for index in left], budget):
            done = [left[place] for place in found]
            for index, value in zip(done, found.values(), strict=True):
                means[index] = value / len(rows[index].response)
            waiting.difference_update(done)
            yield done

    with tqdm(total=len(rows), desc="likelihoods", unit="row", leave=False, disable=not progress) as bar:
        for done in backing_off(model, waiting, [len(row) for row in rows], budget, attempt):
            bar.update(len(done))
    return means


def _sums(model: Model, rows: Sequence[ChatTokens], token_budget: int) -> Iterator[dict[int, float]]:
    """Log-likelihoods of whole responses by their row, as they are known."""
    prompts = unique_prompts(rows)
    followers: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        followers.setdefault(row.prompt, []).append(index)
    # The prompt's last logits predict the first token, and nothing is predicted from the last one: it is never run.
    fed = [ChatTokens(row.prompt, row.response[:-1]) for row in rows]
    begun: dict[int, float] = {}
    for batch in prefix_batches(model, fed, token_budget=token_budget):
        logits = batch.run(last_logits=1 if batch.is_prompt else None)
        assert logits is not None
        if batch.is_prompt:
            openings = torch.log_softmax(logits[:, -1].float(), dim=-1)
            for opening, prompt in zip(openings, batch.rows, strict=True):
                begun |= {index: opening[rows[index].response[0]].item() for index in followers[prompts[prompt]]}
            yield {index: begun.pop(index) for index in list(begun) if not fed[index].response}
        else:
            following = [rows[index].response[1:] for index in batch.rows]
            tokens = pad(following, left=False)[0].to(logits.device)
            chosen = logits.gather(-1, tokens[..., None])[..., 0].float() - _log_normalisers(logits)
            rest = (chosen.cpu().double() * batch.mask).sum(dim=1).tolist()
            yield {index: begun.pop(index) + more for index, more in zip(batch.rows, rest, strict=True)}


def _log_normalisers(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch pos"]:
    """What turns logits into log-probabilities, a few tokens at a time: exponentials of all of them fill no cache."""
    flat = rearrange(logits, "batch pos d_vocab -> (batch pos) d_vocab")
    parts = torch.cat([part.float().logsumexp(dim=-1) for part in flat.split(rows_at_a_time(flat))])
    return rearrange(parts, "(batch pos) -> batch pos", batch=len(logits))
