"""Log-likelihoods of given responses under given prompts, per token.

(1/|y|) * sum_t log p(y_t | x, y_<t), where x is the rendered prompt; prompts are run once for all their responses.
Knows nothing about traits or scores.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from persona_lens.chat import ChatTokens
from persona_lens.models import Model, default_token_budget, suspended
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
    """As `mean_log_likelihoods`, under whatever interventions and adapters are attached to the model."""
    total = torch.full((len(rows),), float("nan"), dtype=torch.float64)
    budget = max(64, min(default_token_budget(model), LOGIT_VALUES // int(model.cfg.d_vocab)))
    prompts = unique_prompts(rows)
    followers: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        if row.response:
            followers.setdefault(row.prompt, []).append(index)
    # The prompt's last logits predict the first token, and nothing is predicted from the last one: it is never run.
    fed = [ChatTokens(row.prompt, row.response[:-1]) for row in rows]
    bar = tqdm(total=len(rows), desc="likelihoods", unit="row", leave=False, disable=not progress)
    with bar:
        for batch in prefix_batches(model, fed, token_budget=budget):
            logits = batch.run(last_logits=1 if batch.is_prompt else None)
            assert logits is not None
            if batch.is_prompt:
                openings = torch.log_softmax(logits[:, -1].float(), dim=-1)
                for opening, prompt in zip(openings, batch.rows, strict=True):
                    for index in followers.get(prompts[prompt], []):
                        total[index] = opening[rows[index].response[0]].item()
                        bar.update(not fed[index].response)
            else:
                following = [rows[index].response[1:] for index in batch.rows]
                tokens = pad(following, left=False)[0].to(logits.device)
                chosen = logits.gather(-1, tokens[..., None])[..., 0].float() - _log_normalisers(logits)
                total[batch.rows] += (chosen.cpu().double() * batch.mask).sum(dim=1)
                bar.update(len(batch.rows))
    return (total / torch.tensor([max(1, len(row.response)) for row in rows])).float()


def _log_normalisers(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch pos"]:
    """What turns logits into log-probabilities, a few tokens at a time: exponentials of all of them fill no cache."""
    flat = rearrange(logits, "batch pos d_vocab -> (batch pos) d_vocab")
    parts = torch.cat([part.float().logsumexp(dim=-1) for part in flat.split(rows_at_a_time(flat))])
    return rearrange(parts, "(batch pos) -> batch pos", batch=len(logits))
