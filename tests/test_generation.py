"""The decode loop: equal to decoding without a cache, each row on its own, drawn from the right distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import naive, tiny

STEPS = 16


@pytest.fixture(scope="module")
def generation():
    """The module under test, imported late so that the jaxtyping hook instruments it."""
    import persona_lens.generation.decoding

    return persona_lens.generation.decoding


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer):
    """Of many lengths, some twice."""
    return [prompt for prompt, _ in tiny.chat_rows(tiny_tokenizer)]


@pytest.fixture(scope="module")
def free_run(generation, prompts):
    """Sampled completions of all prompts, or of chosen ones, that no token stops."""

    def run(model, chosen=None, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation, "stop_tokens", lambda _tokenizer: frozenset())
            return generation.generate(model, chosen or prompts, max_new_tokens=STEPS, seed=3, **options)

    return run


# --- against the oracle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_greedy_text_equals_decoding_without_a_cache_one_row_at_a_time(
    generation, tiny_model, tiny_hf_model, prompts, batch_size
):
    found = generation.generate(tiny_model, prompts, max_new_tokens=STEPS, temperature=0.0, batch_size=batch_size)
    stops = {tiny_model.tokenizer.eos_token_id}
    assert [list(row.tokens) for row in found] == [
        naive.greedy(tiny_hf_model, prompt, STEPS, stops) for prompt in prompts
    ]


def test_greedy_text_with_learned_positions_equals_decoding_without_a_cache(
    generation, tiny_gpt2, tiny_hf_gpt2, prompts
):
    short = [prompt[:length] for prompt, length in zip(prompts, [3, 20, 9, 31, 1, 12], strict=True)]
    found = generation.generate(tiny_gpt2, short, max_new_tokens=STEPS, temperature=0.0)
    stops = {tiny_gpt2.tokenizer.eos_token_id}
    assert [list(row.tokens) for row in found] == [naive.greedy(tiny_hf_gpt2, prompt, STEPS, stops) for prompt in short]


def test_a_hook_that_the_user_attached_steers_the_text(generation, tiny_model, tiny_hf_model, prompts):
    vector = torch.linspace(-2, 2, 32, dtype=torch.float64)
    stops = {tiny_model.tokenizer.eos_token_id}
    with naive.added(tiny_hf_model, 1, vector):
        expected = [naive.greedy(tiny_hf_model, prompt, 6, stops) for prompt in prompts]
    hook = ("blocks.1.hook_resid_post", lambda resid, hook: resid + vector)
    with tiny_model.hooks(fwd_hooks=[hook]):
        found = generation.generate(tiny_model, prompts, max_new_tokens=6, temperature=0.0)
    assert [list(row.tokens) for row in found] == expected
    assert expected != [naive.greedy(tiny_hf_model, prompt, 6, stops) for prompt in prompts]


def test_a_sampled_token_is_the_inverse_distribution_at_the_rows_number(
    generation, tiny_model, tiny_hf_model, prompts, free_run
):
    uniforms = generation.row_uniforms(3, ["a", "b", "c", "d", "e", "f"], STEPS)
    found = free_run(tiny_model, keys=list("abcdef"), temperature=0.7)
    for row, (prompt, completion) in enumerate(zip(prompts, found, strict=True)):
        logits = naive.logits(tiny_hf_model, [*prompt, *completion.tokens])[len(prompt) - 1 : -1]
        for step, token in enumerate(completion.tokens):
            below = (logits[step] / 0.7).softmax(dim=-1).cumsum(dim=-1)
            assert below[token] >= uniforms[row, step] - 1e-6
            assert token == 0 or below[token - 1] <= uniforms[row, step] + 1e-6


def test_both_classes_speak_alike_on_the_embedded_model(
    both_classes, generation, load_embedded_model, embedded_hf_model
):
    from persona_lens.chat.batches import chat_messages, tokenize_chat

    questions = ["What is the sea?", "How do I say no to a friend?", "Tell me about bees, please.", "Why?"]
    bridge, hooked = load_embedded_model("TransformerBridge"), load_embedded_model("HookedTransformer")
    prompts = [tokenize_chat(bridge.tokenizer, chat_messages("You are kind.", text)).prompt for text in questions]
    reference, found = (
        generation.generate(model, prompts, max_new_tokens=24, temperature=0.0) for model in (bridge, hooked)
    )
    diverging = 0
    for prompt, expected, row in zip(prompts, reference, found, strict=True):
        gaps = naive.top_two_gaps(embedded_hf_model, prompt, expected.tokens)
        sure = next((place for place, gap in enumerate(gaps) if gap < 1e-3), len(expected.tokens))
        diverging += row.tokens[:sure] != expected.tokens[:sure]
    assert diverging <= 0.02 * len(prompts)


# --- each row on its own -------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(data=st.data(), batch_size=st.integers(1, 6))
def test_a_rows_text_depends_neither_on_its_batch_nor_on_the_other_rows(
    tiny_model, prompts, free_run, data, batch_size
):
    keys = [f"row {index}" for index in range(len(prompts))]
    together = free_run(tiny_model, keys=keys, top_p=0.9)
    chosen = data.draw(st.lists(st.sampled_from(range(len(prompts))), min_size=1, unique=True))
    found = free_run(
        tiny_model,
        [prompts[row] for row in chosen],
        keys=[keys[row] for row in chosen],
        top_p=0.9,
        batch_size=batch_size,
    )
    assert found == [together[row] for row in chosen]


def test_one_prompt_under_two_keys_gives_two_texts(generation, tiny_model, prompts):
    first, second = generation.generate(tiny_model, [prompts[0]] * 2, max_new_tokens=STEPS)
    assert first.tokens != second.tokens


def test_a_seed_repeats_its_texts_and_another_does_not(generation, tiny_model, prompts):
    runs = [generation.generate(tiny_model, prompts, max_new_tokens=4, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@given(seed=st.integers(0, 2**40), keys=st.lists(st.text(), min_size=1, max_size=4, unique=True))
def test_a_rows_numbers_depend_on_seed_key_and_step_alone(generation, seed, keys):
    numbers = generation.row_uniforms(seed, keys, 5)
    assert bool(((numbers >= 0) & (numbers < 1)).all())
    for row, key in enumerate(keys):
        assert generation.row_uniforms(seed, [key], 9)[0, :5].tolist() == numbers[row].tolist()
        assert generation.row_uniforms(seed + 1, [key], 5)[0].tolist() != numbers[row].tolist()


@given(n_rows=st.integers(0, 300), batch_size=st.integers(1, 120))
def test_batches_are_even_and_in_the_order_of_the_plan(generation, n_rows, batch_size):
    batches = generation.plan_batches(n_rows, batch_size)
    assert [row for batch in batches for row in batch] == list(range(n_rows))
    sizes = {len(batch) for batch in batches}
    assert max(sizes, default=0) <= batch_size
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


# --- stopping ------------------------------------------------------------------------------------------------------

STOPS = frozenset(range(0, 320, 8))  # an eighth of the vocabulary: rows end at many different steps


@pytest.fixture
def eager_to_stop(generation, monkeypatch):
    monkeypatch.setattr(generation, "stop_tokens", lambda _tokenizer: STOPS)


def test_a_row_ends_before_its_first_stop_token_and_the_others_go_on(
    generation, tiny_model, prompts, free_run, eager_to_stop
):
    found = generation.generate(tiny_model, prompts, max_new_tokens=STEPS, seed=3)
    for endless, row in zip(free_run(tiny_model), found, strict=True):
        end = next((place for place, token in enumerate(endless.tokens) if token in STOPS), None)
        assert row == (endless.tokens[:end], "length" if end is None else "stop")
    assert len({len(row.tokens) for row in found}) > 2


def test_rows_that_have_ended_leave_the_batch(generation, tiny_model, prompts, eager_to_stop):
    n_rows = []
    handle = tiny_model.embed.register_forward_hook(lambda _module, inputs, _out: n_rows.append(len(inputs[0])))
    try:
        found = generation.generate(tiny_model, prompts * 4, max_new_tokens=64, seed=3)
    finally:
        handle.remove()
    lengths = [len(row.tokens) for row in found]
    for step, ran in enumerate(n_rows[1:]):
        speaking = sum(length > step for length in lengths)
        assert 0.75 * ran <= speaking or ran == speaking
    assert len(n_rows) <= max(lengths) + 1


def test_a_prompt_that_repeats_is_run_once(generation, tiny_model, prompts):
    n_rows = []
    handle = tiny_model.embed.register_forward_hook(lambda _module, inputs, _out: n_rows.append(len(inputs[0])))
    try:
        generation.generate(tiny_model, prompts * 3, max_new_tokens=1)
    finally:
        handle.remove()
    assert n_rows == [len(set(prompts))]


# --- the distribution ----------------------------------------------------------------------------------------------

GRID = 20_000


def frequencies(generation, logits, **options):
    """How often each token is drawn over uniform numbers that stand evenly in [0, 1)."""
    uniforms = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    drawn = generation.sample(logits.expand(GRID, -1), uniforms, **options)
    return torch.from_numpy(np.bincount(drawn.numpy(), minlength=logits.shape[-1]) / GRID)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_of_logits_over_temperature(generation, temperature):
    logits = torch.tensor([1.0, -2.0, 0.5, 3.0, -40.0, 0.0])
    expected = (logits.double() / temperature).softmax(dim=-1)
    assert (frequencies(generation, logits, temperature=temperature) - expected).abs().max() < 2 / GRID


@given(
    logits=st.lists(st.floats(-4, 4), min_size=2, max_size=6, unique_by=lambda value: round(value, 2)),
    top_p=st.floats(0.05, 0.99),
)
@settings(max_examples=30)
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_its_mass(generation, logits, top_p):
    weights = torch.tensor(logits, dtype=torch.float64).softmax(dim=-1).tolist()
    kept, mass = [], 0.0
    for token in sorted(range(len(weights)), key=lambda token: -weights[token]):
        if mass >= top_p - 1e-6:
            break
        kept.append(token)
        mass += weights[token]
    found = frequencies(generation, torch.tensor(logits), temperature=1.0, top_p=top_p)
    for token, weight in enumerate(weights):
        expected = weight / mass if token in kept else 0.0
        assert abs(float(found[token]) - expected) < 2 / GRID


def test_temperature_zero_takes_the_best_whatever_the_number(generation):
    logits = torch.tensor([[0.0, 2.0, 1.0]]).expand(2, 3)
    uniforms = torch.tensor([0.0, 0.999], dtype=torch.float64)
    assert generation.sample(logits, uniforms, temperature=0.0).tolist() == [1, 1]


@pytest.mark.parametrize(("device", "rows"), [("cpu", 8), ("meta", 2000)])  # meta stands for an accelerator
def test_only_a_cpu_works_on_a_cacheful_at_a_time(device, rows):
    from persona_lens.generation.sampling import rows_at_a_time

    assert rows_at_a_time(torch.empty(2000, 2**16, device=device)) == rows


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("d_vocab", [3, 256, 1000])
def test_a_wide_vocabulary_is_searched_as_by_one_sum_over_it(generation, d_vocab, top_p):
    generator = torch.Generator().manual_seed(d_vocab)
    logits = 3 * torch.randn(700, d_vocab, generator=generator)
    uniforms = torch.rand(700, generator=generator, dtype=torch.float64)
    drawn = generation.sample(logits, uniforms, temperature=1.0, top_p=top_p)
    for row, number, token in zip(torch.softmax(logits, dim=-1), uniforms, drawn, strict=True):
        likeliest = row.sort(descending=True)
        kept = likeliest.indices[: 1 + int((likeliest.values.cumsum(0) < top_p).sum())]
        weights = torch.zeros(d_vocab, dtype=torch.float64)
        weights[kept] = row[kept].double()
        passed = (weights.cumsum(0) / weights.sum() > number).nonzero()[0, 0]
        assert token == passed


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_no_probability_is_never_drawn(generation, number):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    uniforms = torch.tensor([number], dtype=torch.float64)
    assert int(generation.sample(logits, uniforms, temperature=1.0)) in (1, 3)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens >= 1.*got 0, 1.0 and 1.0"),
        ({"temperature": -0.5}, "temperature >= 0.*got 64, -0.5 and 1.0"),
        ({"top_p": 0.0}, "0 < top_p <= 1.*got 64, 1.0 and 0.0"),
        ({"keys": ["same", "same"]}, "one distinct key a row, got 1 keys for 2 rows"),
        ({"prompts": [[5], []]}, "Prompt 1 has 0 tokens; with 64 new ones the context allows 1 to 192"),
        ({"prompts": [[5], [6] * 193]}, "Prompt 1 has 193 tokens.*Shorten the prompt or lower max_new_tokens"),
    ],
)
def test_what_cannot_be_sampled_is_refused(generation, tiny_model, options, words):
    with pytest.raises(ValueError, match=words):
        generation.generate(tiny_model, **{"prompts": [[5], [6]], **options})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_refused(generation, fresh_tiny_model, temperature):
    with torch.no_grad():
        next(iter(fresh_tiny_model.unembed.parameters())).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"logits are not numbers.*wider dtype"):
        generation.generate(fresh_tiny_model, [[5]], temperature=temperature, max_new_tokens=2)


def test_no_prompts_give_no_completions(generation, tiny_model):
    assert generation.generate(tiny_model, []) == []
