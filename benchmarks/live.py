"""Watching replies of SmolLM2-135M-Instruct while they are generated: what seven projections of every token cost.

Texts are sampled, and have to be those of the generation that is not watched; directions are random ones.
"""

from benchmarks.comparison import Claim, Comparison
from benchmarks.extraction import bridge
from benchmarks.steering import Texts, compare_texts, contestant, random_vectors, rollout_prompts
from persona_lens import generate_watched
from persona_lens.generation import generate

GOAL = 1 / 1.05
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
