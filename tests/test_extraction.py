"""Extraction does not depend on how rows are batched, counts whatever it does not average, and refuses by name."""

import math

import numpy as np
import pytest
import torch

from persona_lens.chat.batches import Conversation, encode
from persona_lens.extraction.extract import extract_from_responses
from persona_lens.models.structure import identify, resid_post_name
from tests import naive
from tests.extraction_cases import QUICK, conversations, stream


def test_the_batching_and_order_of_rows_do_not_change_a_vector(tiny_model):
    sides = conversations(1, 9), conversations(2, 7)
    one, other = (extract_from_responses(tiny_model, *sides, token_budget=size, **QUICK) for size in (1, 4096))
    assert naive.relative_error(stream(one), stream(other)) < 1e-5
    moved = extract_from_responses(tiny_model, sides[0][::-1], sides[1][3:] + sides[1][:3], seed=3, **QUICK)
    assert naive.relative_error(stream(one), stream(moved)) < 1e-5
    assert moved.provenance.model == identify(tiny_model)
    assert moved.provenance.settings["seed"] == 3
    assert (moved.statistics.n_questions, moved.statistics.n_rows) == (3, 16)


def test_longer_neighbours_do_not_change_a_row(tiny_model, tmp_path):
    sides = conversations(1, 3), conversations(2, 3)
    long = Conversation("<|im_start|>" + "How would you run a country? " * 4, tuple(range(50, 130)), "long")
    extract_from_responses(tiny_model, *sides, spool_file=tmp_path / "alone.npy", **QUICK)
    extract_from_responses(tiny_model, [*sides[0], long], sides[1], spool_file=tmp_path / "beside.npy", **QUICK)
    alone, beside = (torch.from_numpy(np.load(tmp_path / f"{name}.npy")) for name in ("alone", "beside"))
    assert naive.relative_error(beside[[0, 1, 2, 4, 5, 6]], alone) < 1e-5


def test_an_empty_response_is_counted_and_never_averaged(tiny_model):
    sides = conversations(1), conversations(2)
    empty = [Conversation("<|im_start|>Why?", response, "Why?") for response in ("", " \n", ())]
    whole = extract_from_responses(tiny_model, *sides, **QUICK)
    vectors = extract_from_responses(tiny_model, [*empty, *sides[0]], [*sides[1], empty[0]], **QUICK)
    assert torch.equal(stream(vectors), stream(whole))
    assert (vectors.counts["positive"], vectors.counts["positive_empty"]) == (6, 3)
    assert (vectors.counts["negative"], vectors.counts["negative_empty"]) == (6, 1)
    with pytest.raises(ValueError, match=r"evil: no negative responses to average \(3 given, 3 empty"):
        extract_from_responses(tiny_model, sides[0], empty, **QUICK)


def test_plain_texts_are_compared_by_their_last_token(tiny_model):
    texts = {"positive": ["I love rain", "Good news today"], "negative": ["I hate rain", "Bad news"]}
    sides = {side: [Conversation(text, "") for text in given] for side, given in texts.items()}
    vectors = extract_from_responses(tiny_model, *sides.values(), **QUICK, position="prompt_last")

    def last(text):
        _, cache = tiny_model.run_with_cache(torch.tensor([encode(tiny_model.tokenizer, text)]))
        return cache["blocks.1.hook_resid_post"][0, -1]

    means = [torch.stack([last(text) for text in given]).mean(dim=0) for given in texts.values()]
    assert torch.allclose(vectors.directions[1].double(), (means[0] - means[1]).double(), atol=1e-5)
    assert (vectors.counts["positive"], vectors.counts["positive_empty"]) == (2, 0)


THOUGHTS = [
    Conversation("<|im_start|>Why?", "<think>Hm.</think>Because."),
    Conversation("<|im_start|>Why?", "<think>Hm"),
]


def test_an_unclosed_block_is_an_error_or_dropped_and_counted(tiny_model):
    vectors = extract_from_responses(tiny_model, THOUGHTS, THOUGHTS[:1], after="</think>", unclosed="drop", **QUICK)
    assert (vectors.counts["positive"], vectors.counts["positive_unclosed"]) == (1, 1)
    assert vectors.counts["negative_unclosed"] == 0
    ended = [Conversation("<|im_start|>Why?", "<think>Hm.</think>")]
    with pytest.raises(ValueError, match=r"evil: 1 responses have no tokens left to average \(after='</think>'\)"):
        extract_from_responses(tiny_model, THOUGHTS[:1], ended, after="</think>", **QUICK)
    with pytest.raises(ValueError, match=r"never says '</think>' .* With unclosed='drop' such rows are left out"):
        extract_from_responses(tiny_model, THOUGHTS, THOUGHTS[:1], after="</think>", **QUICK)


LONG = Conversation("<|im_start|>Why?", tuple(range(3, 300)), "Why?")


def test_a_row_that_is_too_long_is_an_error_or_truncated_and_counted(tiny_model):
    with pytest.raises(ValueError, match=r"Row 6 has .* the context holds 256"):
        extract_from_responses(tiny_model, conversations(1), [LONG], **QUICK)
    kept = 256 - len(LONG.tokenize(tiny_model.tokenizer).prompt)
    short = Conversation(LONG.prompt, LONG.response[:kept], LONG.question)
    truncated = extract_from_responses(tiny_model, conversations(1), [LONG], too_long="truncate", **QUICK)
    whole = extract_from_responses(tiny_model, conversations(1), [short], **QUICK)
    assert torch.equal(stream(truncated), stream(whole))
    assert (truncated.counts["truncated"], whole.counts["truncated"]) == (1, 0)


def test_activations_that_are_not_finite_are_an_error_that_names_the_layer(tiny_model):
    sides = [*conversations(1)[:1]], [*conversations(1)[:1]]  # of one length, so that both run in the first pass
    with (
        tiny_model.hooks(fwd_hooks=[(resid_post_name(1), lambda resid, hook: resid * math.nan)]),
        pytest.raises(ValueError, match=r"not finite at layer 1, in row 0\. Load it with a wider dtype"),
    ):
        extract_from_responses(tiny_model, *sides, **QUICK)


def test_row_means_are_spooled_where_asked_and_else_no_file_stays(tiny_model, tmp_path, monkeypatch):
    sides = conversations(1, 5), conversations(2, 4)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    extract_from_responses(tiny_model, *sides, **QUICK)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="Cannot write"):
        extract_from_responses(tiny_model, *sides, spool_file=tmp_path, **QUICK)
    vectors = extract_from_responses(tiny_model, *sides, spool_file=tmp_path / "new" / "rows.npy", **QUICK)
    rows = np.load(tmp_path / "new" / "rows.npy", mmap_mode="r")
    assert rows.shape == (9, 5, 32)
    assert rows.dtype == np.float32
    difference = rows[:5].mean(axis=0, dtype=np.float64) - rows[5:].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(stream(vectors), difference, rtol=1e-6, atol=1e-7)
