"""Reading replies of SmolLM2-135M-Instruct while they are generated: seven projections of every token, or all means.

Texts are sampled, and have to be those of the generation that is not read; directions are random ones.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from benchmarks.comparison import Claim, Comparison, compare
from benchmarks.extraction import bridge
from benchmarks.oracle import minimum_cosine
from benchmarks.steering import Texts, compare_texts, contestant, random_vectors, rollout_prompts
from benchmarks.texts import Workload
from benchmarks.timing import Contestant
from persona_lens import generate_watched
from persona_lens.activations.means import stream_means
from persona_lens.chat.batches import ChatTokens
from persona_lens.generation.capture import capturing
from persona_lens.generation.decoding import generate

GOAL = 1 / 1.05
CAPTURE_GOAL = 1 / 1.03
LAYERS = (4, 8, 11, 14, 17, 20, 24)
NEW_TOKENS = 48


def live_monitoring(repeats: int) -> list[Comparison]:
    """The same sampled texts plain, and with every token's projection on a vector at each of seven layers."""
    model = bridge()
    ids = [prompt.tokenize(model.tokenizer) for prompt in rollout_prompts(8, 4)]
    vectors = [random_vectors(model).at(layer) for layer in LAYERS]
    rows = [row.prompt for row in ids]

    def plain() -> Texts:
        return [done.tokens for done in generate(model, rows, max_new_tokens=NEW_TOKENS)]

    def watched() -> Texts:
        return [reply.tokens for reply in generate_watched(model, rows, vectors, max_new_tokens=NEW_TOKENS)]

    contestants = {
        "plain": [contestant("not watched", plain)],
        "watched": [contestant(f"{len(LAYERS)} vectors, one a layer", watched)],
    }
    name = f"{len(ids)} rows, 8 prompts, {NEW_TOKENS} new tokens"
    claims = [Claim("watched", "plain", GOAL)]
    return [compare_texts("Live monitoring", name, ids, NEW_TOKENS, contestants, claims, plain(), repeats, minimum=1.0)]


def capture(repeats: int) -> list[Comparison]:
    """The same sampled texts plain, and with the mean of every response at every layer.

    The means have to be those of a pass over the finished texts, and the texts those that were not read.
    """
    model: Any = bridge()
    ids = [prompt.tokenize(model.tokenizer) for prompt in rollout_prompts(8, 4)]
    prompts = [row.prompt for row in ids]

    def plain() -> None:
        generate(model, prompts, max_new_tokens=NEW_TOKENS)

    def captured() -> tuple[Texts, Float[Tensor, "row layer d_model"]]:
        with capturing(model, len(prompts)) as sums:
            done = generate(model, prompts, max_new_tokens=NEW_TOKENS, read_up_to=model.cfg.n_layers - 1)
        means = rearrange(sums.sums[1:], "layer row d_model -> row layer d_model") / sums.counts[:, None, None]
        return [reply.tokens for reply in done], means

    texts = [reply.tokens for reply in generate(model, prompts, max_new_tokens=NEW_TOKENS)]
    finished = [ChatTokens(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    expected = torch.zeros(len(finished), model.cfg.n_layers, model.cfg.d_model, dtype=torch.float64)
    for found in stream_means(model, finished):
        expected[found.rows] = found.means[:, 1:].double()

    def agreement(found: tuple[Texts, Float[Tensor, "row layer d_model"]]) -> float:
        same = found[0] == texts
        return minimum_cosine(found[1], expected, [row % 2 == 0 for row in range(len(texts))]) if same else 0.0

    embedding = model.original_model.get_input_embeddings()
    contestants = {
        "plain": [Contestant("not read", plain, embedding)],
        "captured": [Contestant("means at all layers", captured, embedding)],
    }
    rows = tuple(ChatTokens(row.prompt, (0,) * NEW_TOKENS) for row in ids)
    work = Workload(f"{len(ids)} rows, 8 prompts, {NEW_TOKENS} new tokens", rows, (True,) * len(rows))
    claims = [Claim("captured", "plain", CAPTURE_GOAL)]
    return [compare("Capture while generating", work, contestants, claims, agreement=agreement, repeats=repeats)]
