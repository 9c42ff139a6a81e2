"""Sampling: each row has uniform numbers of its own, and its token is where the cumulative distribution passes one.

So a row's text depends on its key and the seed, not on the batch that it runs in.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

RUN = 256
"""Tokens that are summed together before a token is searched for."""
CACHED_VALUES = 2**19
"""Logits that are worked on at a time on a CPU: what stays in a core's cache."""


def row_uniforms(seed: int, keys: Sequence[str], steps: int) -> Float[Tensor, "row step"]:
    """Uniform numbers in [0, 1), one a row and step, that depend on (seed, key, step) alone."""
    rows = []
    for key in keys:
        digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
        rows.append(np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(steps))
    return torch.from_numpy(np.stack(rows))


def sample(
    logits: Float[Tensor, "row d_vocab"],
    uniforms: Float[Tensor, " row"],
    *,
    temperature: float,
    top_p: float = 1.0,
) -> Int[Tensor, " row"]:
    """Draw a token a row from softmax(logits / temperature), cut to the most likely `top_p` of its mass.

    The draw is the first token at which the cumulative distribution passes the row's uniform number.
    Raises ValueError for logits that are not numbers.
    """
    if temperature == 0:
        best = logits.max(dim=-1)
        _refuse_nan(best.values)
        return best.indices
    at_once = rows_at_a_time(logits)
    pieces = zip(logits.split(at_once), uniforms.cpu().split(at_once), strict=True)
    return torch.cat([_draw(rows, numbers, temperature, top_p) for rows, numbers in pieces]).to(logits.device)


def rows_at_a_time(logits: Float[Tensor, "row d_vocab"]) -> int:
    """Rows whose logits are worked on together: as many as stay in a CPU's cache, and all on an accelerator."""
    return max(1, CACHED_VALUES // logits.shape[-1] if logits.device.type == "cpu" else len(logits))


def _draw(
    logits: Float[Tensor, "row d_vocab"], uniforms: Float[Tensor, " row"], temperature: float, top_p: float
) -> Int[Tensor, " row"]:
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p
        probabilities = probabilities.scatter(-1, order, ordered.masked_fill(outside, 0))
    # The run of tokens in which the distribution passes the number, then the token in it: no sum over all tokens.
    padded = F.pad(probabilities, (0, -probabilities.shape[-1] % RUN))
    runs = rearrange(padded, "row (run token) -> row run token", token=RUN)
    # Cumulative sums are taken in float64 on the CPU, since some accelerators have none: of a row's probabilities only
    # the masses of its runs and the one run that is searched leave the device. There a run's mass is a float32 sum, so
    # a token differs from the CPU's only where the number is within float32's rounding of the boundary of two tokens.
    on_cpu = runs.device.type == "cpu"
    masses = runs.sum(dim=-1, dtype=torch.float64) if on_cpu else runs.sum(dim=-1).cpu().double()
    passed = masses.cumsum(dim=-1)
    _refuse_nan(passed[:, -1])
    threshold = uniforms.to(passed)[:, None] * passed[:, -1:]
    run = _first_above(passed, threshold)
    before = passed.gather(-1, run) - masses.gather(-1, run)
    chosen = runs.gather(1, repeat(run, "row 1 -> row 1 token", token=RUN).to(runs.device))[:, 0].cpu()
    token = _first_above(chosen.cumsum(dim=-1, dtype=torch.float64), threshold - before)
    return (run * RUN + token)[:, 0]


def _first_above(cumulative: Float[Tensor, "row place"], threshold: Float[Tensor, "row 1"]) -> Int[Tensor, "row 1"]:
    """The first place at which the sum is above the threshold, which may be rounded up to the last sum itself."""
    below_all = torch.nextafter(cumulative[:, -1:], torch.zeros_like(threshold))
    # right=True steps over places of no mass where the threshold falls exactly on their boundary
    return torch.searchsorted(cumulative, torch.minimum(threshold, below_all), right=True)


def _refuse_nan(one_a_row: Float[Tensor, " row"]) -> None:
    # One NaN in a row makes the row's maximum and its sum NaN, so the whole vocabulary need not be searched.
    if bool(one_a_row.isnan().any()):
        raise ValueError("The model's logits are not numbers. Load it with a wider dtype (float32).")
