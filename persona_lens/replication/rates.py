"""Rates of this machine: a few seconds of decoding and reading, to scale an estimate before it is believed.

Knows nothing about presets: a model comes in, tokens a second go out.
"""

from collections.abc import Callable
from time import perf_counter

from persona_lens.chat.batches import ChatTokens
from persona_lens.generation.decoding import generate
from persona_lens.judges.likelihood_ratio import mean_log_likelihoods
from persona_lens.models.structure import Model
from persona_lens.replication.cost import Rates

READ_ROWS, READ_TOKENS = 16, 48
SAMPLED_ROWS, SAMPLED_TOKENS = 100, 6


def measure_rates(model: Model, expected: Rates) -> Rates:
    """Decoding and reading as they run here; training scaled from `expected` as reading is.

    100 rows of one prompt are sampled for a few tokens, and texts of equal length are read, after one of each to warm
    up. Limits: seconds are few and neighbours count.
    """
    vocabulary = int(model.cfg.d_vocab)
    texts = [
        ChatTokens(tuple((7 * row + place) % vocabulary for place in range(8)), tuple(range(1, READ_TOKENS + 1)))
        for row in range(READ_ROWS)
    ]
    reading = _tokens_a_second(READ_ROWS * (READ_TOKENS + 8), lambda rows: mean_log_likelihoods(model, rows), texts)
    prompt = tuple(place % vocabulary for place in range(1, 9))
    start = perf_counter()
    replies = generate(
        model,
        [prompt] * SAMPLED_ROWS,
        max_new_tokens=SAMPLED_TOKENS,
        keys=[f"rate {row}" for row in range(SAMPLED_ROWS)],
        batch_size=SAMPLED_ROWS,
    )
    # A row that ended early was not run on: its tokens do not count.
    decoding = sum(max(1, len(reply.tokens)) for reply in replies) / max(perf_counter() - start, 1e-9)
    training = expected.training * reading / expected.reading
    how = "decoding and reading measured at the start; training scaled as reading"
    return Rates(decoding, reading, training, how, True)


def _tokens_a_second(tokens: int, run: Callable[[list[ChatTokens]], object], texts: list[ChatTokens]) -> float:
    run(texts[:1])
    start = perf_counter()
    run(texts)
    return tokens / max(perf_counter() - start, 1e-9)
