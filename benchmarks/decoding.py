"""The decode loop against the ones that it stands beside: Hugging Face's `generate`, and TransformerLens's own.

Texts are greedy and all of one length: no token ends a turn, in any of them, so that all run the same tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.comparison import Claim, Comparison
from benchmarks.extraction import _hooked, _hugging_face, bridge
from benchmarks.steering import Texts, compare_texts
from benchmarks.texts import many_rollouts
from benchmarks.timing import Contestant
from persona_lens import bundled_traits, load_trait
from persona_lens.activations.prefixes import pad
from persona_lens.chat.batches import ChatTokens
from persona_lens.generation.decoding import generate
from persona_lens.rollouts.collection import plan_rollouts

NEW_TOKENS = 32
GOAL = 1.0
BATCHES = (8, 32, 100)
REPEATED = ((32, 4), (100, 10))
"""Rows, and how many of them share a prompt."""


def decoding(repeats: int) -> list[Comparison]:
    """Rows whose prompts are all distinct, rows that share prompts (which ours runs once), and TransformerLens."""
    return [
        *(_against_hugging_face(rows, 1, repeats) for rows in BATCHES),
        *(_against_hugging_face(rows, share, repeats) for rows, share in REPEATED),
        _against_transformer_lens(8, repeats),
    ]


def _against_hugging_face(n_rows: int, share: int, repeats: int) -> Comparison:
    prompts = [prompt for prompt in _distinct_prompts(n_rows // share) for _ in range(share)]
    plain = _hugging_face_texts(prompts)
    contestants = {
        "plain": [Contestant("Hugging Face generate", plain, _hugging_face().get_input_embeddings())],
        "ours": [_ours(prompts)],
    }
    name = f"{n_rows} rows, {'prompts all distinct' if share == 1 else f'{share} a prompt'}"
    return _compare(f"Decoding, {name}", prompts, contestants, [Claim("ours", "plain", GOAL)], plain(), repeats)


def _against_transformer_lens(n_rows: int, repeats: int) -> Comparison:
    """Prompts of one length, since TransformerLens tells padding by its token, which chat templates also use."""
    work = many_rollouts(bridge().tokenizer, n_rows, per_prompt=1, n_prompt_tokens=48, n_response_tokens=1)
    prompts = [row.prompt for row in work.rows]
    plain = _hugging_face_texts(prompts)
    contestants = {"ours": [_ours(prompts)]}
    models: dict[str, Any] = {"TransformerBridge": bridge()}
    if int(version("transformer-lens").partition(".")[0]) < 4:
        models["HookedTransformer"] = _hooked()
    for name, model in models.items():
        embedding = model.embed if name == "HookedTransformer" else model.original_model.get_input_embeddings()
        contestants[name] = [Contestant(f"{name}.generate", _transformer_lens_texts(model, prompts), embedding)]
    claims = [Claim("ours", name) for name in models]
    name = f"Decoding beside TransformerLens, {n_rows} rows"
    return _compare(name, prompts, contestants, claims, plain(), repeats)


def _compare(
    name: str,
    prompts: Sequence[tuple[int, ...]],
    contestants: dict[str, list[Contestant]],
    claims: list[Claim],
    expected: Texts,
    repeats: int,
) -> Comparison:
    rows = [ChatTokens(prompt) for prompt in prompts]
    work = f"{NEW_TOKENS} new tokens"
    return compare_texts(name, work, rows, NEW_TOKENS, contestants, claims, expected, repeats)


def _ours(prompts: Sequence[tuple[int, ...]]) -> Contestant:
    model: Any = bridge()

    def run() -> Texts:
        with _endless():
            done = generate(model, prompts, max_new_tokens=NEW_TOKENS, temperature=0, batch_size=len(prompts))
        return [each.tokens for each in done]

    return Contestant("persona_lens generate", run, model.original_model.get_input_embeddings())


def _hugging_face_texts(prompts: Sequence[tuple[int, ...]]) -> Callable[[], Texts]:
    model = _hugging_face()
    tokens, mask = pad(prompts, left=True)
    # No token has this id. None would be filled in from the model's own settings.
    nothing = int(model.config.vocab_size)

    def run() -> Texts:
        done = model.generate(
            tokens,
            attention_mask=mask.long(),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=nothing,
            pad_token_id=0,
        )
        return _texts(done)

    return run


def _transformer_lens_texts(model: Any, prompts: Sequence[tuple[int, ...]]) -> Callable[[], Texts]:
    tokens = torch.tensor(prompts)

    @torch.no_grad()
    def run() -> Texts:
        done = model.generate(
            tokens,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            stop_at_eos=False,
            prepend_bos=False,
            return_type="tokens",
            verbose=False,
        )
        return _texts(done)

    return run


def _texts(tokens: torch.Tensor) -> Texts:
    return [tuple(row) for row in tokens[:, -NEW_TOKENS:].tolist()]


def _distinct_prompts(n: int) -> list[tuple[int, ...]]:
    """Rendered questions without a trait's instruction, of every trait in turn, and so of many lengths."""
    traits = [load_trait(name) for name in bundled_traits()]
    plans = [plan_rollouts(trait, polarities=["neutral"], per_question=1) for trait in traits]
    planned = chain.from_iterable(zip(*plans, strict=True))
    ids = dict.fromkeys(prompt.tokenize(bridge().tokenizer).prompt for prompt in planned)
    if len(ids) < n:
        raise ValueError(f"The traits have {len(ids)} distinct questions: ask for no more than those.")
    return list(ids)[:n]


@contextmanager
def _endless() -> Iterator[None]:
    """Rows go on to their last token, as all rows of the others do."""
    with patch("persona_lens.generation.decoding.stop_tokens", lambda _tokenizer: frozenset()):
        yield
