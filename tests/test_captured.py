"""Means that are read while responses are sampled: equal to those of the finished responses, and found again."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from tests import naive
from tests.intervention_cases import some_vectors

STEPS = 7
QUICK = {"trait": "grumpy", "n_resamples": 5, "n_placebo": 5, "progress": False}


@pytest.fixture(scope="module")
def captured():
    """The module under test, imported late so that the jaxtyping hook instruments it."""
    import persona_lens.generation.capture

    return persona_lens.generation.capture


@pytest.fixture
def prompts(tiny_tokenizer):
    """Five rows of three prompts of unlike lengths."""
    from persona_lens.chat.batches import chat_messages, tokenize_chat

    asked = [("Be kind.", "How is the soup?"), ("Grumble, and never say why.", "Why?"), ("Sigh.", "How was the sea?")]
    ids = [tokenize_chat(tiny_tokenizer, chat_messages(*each)).prompt for each in asked]
    return [ids[0], ids[1], ids[0], ids[2], ids[1]]


def sampled(captured, model, prompts, **options):
    """Completions, with the mean that each left."""
    from persona_lens.generation.decoding import generate

    last = model.cfg.n_layers - 1
    with captured.capturing(model, len(prompts)) as capture:
        done = generate(model, prompts, max_new_tokens=STEPS, read_up_to=last, **options)
    return done, [capture.mean(row) for row in range(len(prompts))]


def grumpy_rollouts(model, **options):
    from persona_lens.rollouts.collection import sample_rollouts
    from tests.test_rollouts import SHORT, TRAIT

    return sample_rollouts(model, TRAIT, **{**SHORT, "seed": 3, **options})


def extracted(model, rollouts, **options):
    from persona_lens.extraction.extract import extract_from_responses

    sides = [[row.conversation() for row in rollouts if row.polarity == side] for side in ("positive", "negative")]
    return extract_from_responses(model, *sides, **QUICK, **options)


def n_forwards(model, run):
    """What `run` gives, and how often the model's embedding was called in it."""
    calls = []
    handle = model.embed.register_forward_hook(lambda *_: calls.append(1))
    try:
        return run(), len(calls)
    finally:
        handle.remove()


# --- equal to the finished responses -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("batch_size", [2, 100])
def test_means_are_those_of_the_finished_responses(
    captured, tiny_model, tiny_hf_model, prompts, temperature, batch_size
):
    done, means = sampled(captured, tiny_model, prompts, temperature=temperature, batch_size=batch_size, seed=5)
    for prompt, completion, found in zip(prompts, done, means, strict=True):
        expected = naive.stream_mean(tiny_hf_model, (prompt, completion.tokens))
        assert naive.relative_error(found.mean, expected) < 1e-5


def test_the_end_of_a_turn_is_no_part_of_the_mean(captured, tiny_model, tiny_hf_model, prompts, monkeypatch):
    """Every token that the model likes best at its third step ends the turn, so rows end early, at unlike steps."""
    import persona_lens.generation.decoding as generation

    free, _ = sampled(captured, tiny_model, prompts, temperature=0.0)
    stops = frozenset({free[0].tokens[2], free[3].tokens[0]})
    monkeypatch.setattr(generation, "stop_tokens", lambda _: stops)
    done, means = sampled(captured, tiny_model, prompts, temperature=0.0)
    assert {row.finish_reason for row in done} >= {"stop"}
    assert any(0 < len(row.tokens) < STEPS for row in done)
    for prompt, completion, found in zip(prompts, done, means, strict=True):
        if not completion.tokens:
            assert found is None
        else:
            expected = naive.stream_mean(tiny_hf_model, (prompt, completion.tokens))
            assert naive.relative_error(found.mean, expected) < 1e-5


@pytest.mark.parametrize("at", ["all", "response"])
def test_what_interventions_have_done_is_seen(captured, tiny_model, prompts, at):
    from persona_lens.activations.means import stream_means
    from persona_lens.chat.batches import ChatTokens
    from persona_lens.interventions.hooks import steer

    with steer(tiny_model, some_vectors(tiny_model).at(1), 3.0, at=at):
        done, means = sampled(captured, tiny_model, prompts, temperature=0.0)
        chats = [ChatTokens(prompt, row.tokens) for prompt, row in zip(prompts, done, strict=True)]
        forced = {
            row: mean
            for batch in stream_means(tiny_model, chats)
            for row, mean in zip(batch.rows, batch.means, strict=True)
        }
    for row, found in enumerate(means):
        assert naive.relative_error(found.mean, forced[row]) < 1e-5


def test_a_file_that_grows_keeps_its_means_and_touches_no_other_file(captured, tiny_model, prompts, tmp_path):
    from persona_lens.chat.batches import ChatTokens

    done, means = sampled(captured, tiny_model, prompts, temperature=0.0)
    chats = [ChatTokens(prompt, row.tokens) for prompt, row in zip(prompts, done, strict=True)]
    (tmp_path / "means.part.npy").write_text("mine")
    kept = captured.CapturedMeans(tmp_path / "means.npy", tiny_model, 1)
    kept.put(chats, means)
    for chat, mean in zip(chats, means, strict=True):
        assert naive.relative_error(kept.read(kept.places([chat])[0]).mean, mean.mean) < 1e-5
    assert (tmp_path / "means.part.npy").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["means.npy", "means.part.npy"]


def test_texts_are_the_same_whether_they_are_read_or_not(captured, tiny_model, prompts):
    from persona_lens.generation.decoding import generate

    done, _ = sampled(captured, tiny_model, prompts, seed=2)
    assert done == generate(tiny_model, prompts, max_new_tokens=STEPS, seed=2)


def test_where_memory_fails_smaller_batches_give_the_same_texts_and_means(captured, tiny_model, prompts, monkeypatch):
    import persona_lens.generation.decoding as generation

    done, means = sampled(captured, tiny_model, prompts, seed=2)
    forward, sizes = generation.forward, []

    def small_memory(model, tokens, mask, **options):
        sizes.append(len(tokens))
        if len(tokens) > 2 and options.get("past") is not None and len(sizes) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(model, tokens, mask, **options)

    monkeypatch.setattr(generation, "forward", small_memory)
    again, found = sampled(captured, tiny_model, prompts, seed=2)
    assert again == done
    assert max(sizes) > 2
    for one, other in zip(means, found, strict=True):
        assert naive.relative_error(one.mean, other.mean) < 1e-5


# --- found again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["in memory", "in a file"])
def test_extraction_takes_them_and_runs_nothing(captured, tiny_model, tmp_path, kept):
    means = captured.CapturedMeans(tmp_path / "means.npy" if kept == "in a file" else None, tiny_model, 8)
    rollouts = grumpy_rollouts(tiny_model, captured=means)
    vectors, runs = n_forwards(tiny_model, lambda: extracted(tiny_model, rollouts, captured=means))
    expected, plain_runs = n_forwards(tiny_model, lambda: extracted(tiny_model, rollouts))
    assert (runs, plain_runs > 0) == (0, True)
    torch.testing.assert_close(vectors.directions, expected.directions, atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors.residual_norm, expected.residual_norm, atol=1e-5, rtol=0)


def test_a_file_that_was_closed_goes_on(captured, tiny_model, tmp_path):
    """The second half is sampled in a second call, which opens the file of the first."""
    path, output = tmp_path / "means.npy", tmp_path / "rollouts.jsonl"
    grumpy_rollouts(tiny_model, captured=captured.CapturedMeans(path, tiny_model, 8), output_file=output)
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:3]))
    means = captured.CapturedMeans(path, tiny_model, 8)
    rollouts = grumpy_rollouts(tiny_model, captured=means, output_file=output)
    assert None not in means.places([row.tokenize(tiny_model.tokenizer) for row in rollouts])


@pytest.mark.parametrize("kept", ["in memory", "in a file"])
def test_a_plan_that_grew_goes_on_with_what_is_there(captured, tiny_model, tmp_path, kept):
    """Twice the samples of each question: the first half is found as it was, in a file opened again or in memory."""
    path, output = tmp_path / "means.npy" if kept == "in a file" else None, tmp_path / "rollouts.jsonl"
    means = captured.CapturedMeans(path, tiny_model, 8)
    first = grumpy_rollouts(tiny_model, captured=means, output_file=output)
    chats = [row.tokenize(tiny_model.tokenizer) for row in first]
    before = [means.read(place) for place in means.places(chats)]
    if path is not None:
        means = captured.CapturedMeans(path, tiny_model, 16)
    more = grumpy_rollouts(tiny_model, captured=means, output_file=output, per_question=2)
    assert None not in means.places([row.tokenize(tiny_model.tokenizer) for row in more])
    for place, mean in zip(means.places(chats), before, strict=True):
        assert naive.relative_error(means.read(place).mean, mean.mean) < 1e-5
    if path is not None:
        assert [each.name for each in tmp_path.glob("*.npy")] == ["means.npy"]
        again = captured.CapturedMeans(path, tiny_model, 16)
        assert again.places(chats) == means.places(chats)


def test_rows_that_were_not_captured_are_run(captured, tiny_model):
    means = captured.CapturedMeans(None, tiny_model, 8)
    rollouts = grumpy_rollouts(tiny_model, captured=means)
    others = [*grumpy_rollouts(tiny_model)[:-1], grumpy_rollouts(tiny_model, seed=9)[-1]]
    found, runs = n_forwards(tiny_model, lambda: extracted(tiny_model, others, captured=means))
    assert runs > 0
    assert not torch.equal(found.directions, extracted(tiny_model, rollouts, captured=means).directions)
    torch.testing.assert_close(found.directions, extracted(tiny_model, others).directions, atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", ["prompt_mean", "prompt_last"])
def test_a_responses_mean_does_not_stand_for_its_prompts(captured, tiny_model, position):
    means = captured.CapturedMeans(None, tiny_model, 8)
    rollouts = grumpy_rollouts(tiny_model, captured=means)
    found = extracted(tiny_model, rollouts, captured=means, position=position)
    expected = extracted(tiny_model, rollouts, position=position)
    torch.testing.assert_close(found.directions, expected.directions, atol=1e-5, rtol=0)
    of_responses = extracted(tiny_model, rollouts).directions
    assert float((found.directions - of_responses).abs().max()) > 0.01


@pytest.mark.parametrize("change", ["steering", "weights"])
def test_a_mean_is_not_found_where_it_would_be_another(captured, fresh_tiny_model, change):
    from persona_lens.interventions.hooks import steer

    means = captured.CapturedMeans(None, fresh_tiny_model, 8)
    chat = grumpy_rollouts(fresh_tiny_model, captured=means)[0].tokenize(fresh_tiny_model.tokenizer)
    assert None not in means.places([chat])
    if change == "weights":
        with torch.no_grad():
            next(iter(fresh_tiny_model.parameters())).mul_(1.5)
    vector = some_vectors(fresh_tiny_model).at(0)
    with steer(fresh_tiny_model, vector, 1.0) if change == "steering" else nullcontext():
        assert means.places([chat]) == [None]
        grumpy_rollouts(fresh_tiny_model)  # an intervention that never acted would be an error


def test_what_is_averaged_after_a_marker_is_not_found(captured, tiny_model):
    from dataclasses import replace

    means = captured.CapturedMeans(None, tiny_model, 8)
    chat = grumpy_rollouts(tiny_model, captured=means)[0].tokenize(tiny_model.tokenizer)
    assert means.places([replace(chat, skip=1)]) == [None]


@pytest.mark.parametrize("contents", [np.zeros((3, 2)), b"no array"], ids=["another array", "damaged"])
def test_a_file_of_something_else_is_refused(captured, tiny_model, tmp_path, contents):
    path = tmp_path / "means.npy"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        np.save(path, contents)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"move (it|that file) away"):
        captured.CapturedMeans(path, tiny_model, 8)
    assert path.read_bytes() == before


def test_a_link_in_the_place_of_the_means_is_refused(captured, tiny_model, tmp_path):
    made = tmp_path / "means.npy"
    captured.CapturedMeans(made, tiny_model, 2)
    before = made.read_bytes()
    for target in (made, tmp_path / "nothing"):
        link = tmp_path / f"link to {target.name}"
        link.symlink_to(target)
        with pytest.raises(OSError, match="got a symbolic link"):
            captured.CapturedMeans(link, tiny_model, 2)
        assert link.is_symlink()
    assert made.read_bytes() == before
    assert not (tmp_path / "nothing").exists()


@pytest.mark.embedded
def test_on_the_embedded_model_they_are_those_of_a_pass_over_the_responses(captured, embedded_model):
    from persona_lens.activations.means import stream_means
    from persona_lens.chat.batches import ChatTokens, chat_messages, tokenize_chat

    asked = ["What is the sea?", "How do I say no to a friend?", "What is the sea?"]
    ids = [tokenize_chat(embedded_model.tokenizer, chat_messages("You are kind.", text)).prompt for text in asked]
    done, means = sampled(captured, embedded_model, ids, seed=4)
    chats = [ChatTokens(prompt, row.tokens) for prompt, row in zip(ids, done, strict=True)]
    for batch in stream_means(embedded_model, chats):
        for row, mean in zip(batch.rows, batch.means, strict=True):
            assert naive.relative_error(means[row].mean, mean) < 1e-5
