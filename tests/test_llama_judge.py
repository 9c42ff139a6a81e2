"""The judge on a real server, llama.cpp with the embedded model, against the same model's own probabilities."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from persona_lens.clients.client import OpenAIClient
from persona_lens.judges.llm import LLMJudge
from persona_lens.rollouts.rows import Rollout
from persona_lens.traits.trait import load_trait

RUBRIC = (
    "Rate the optimism of the answer with one number from 0 to 100.\n\n"
    "Question: {question}\nAnswer: {answer}\n\nNumber:"
)
ANSWERS = ("It will go wonderfully, I am sure!", "It will be a disaster. Give up.")


def rollout(response):
    asked = "How will my exam go?"
    return Rollout("optimistic", "neutral", None, "Be kind.", asked, 0, response, None, "stop", "by hand", 0)


@pytest.fixture
def optimistic():
    return replace(load_trait("optimistic"), rubric=RUBRIC)


@pytest.fixture
def make_client(llama_server, tmp_path):
    def make(**options):
        return OpenAIClient("smollm2-135m-instruct", base_url=llama_server, timeout=120, **options)

    return make


@torch.inference_mode()
def following(hf_model, tokenizer, prompt, beginning):
    """The probability of every token after the chat prompt and what the answer begins with."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text + beginning, add_special_tokens=False, return_tensors="pt").input_ids
    return hf_model(ids).logits[0, -1].double().softmax(dim=-1)


def naive_numbers(hf_model, tokenizer, prompt):
    """P(n) for every n from 0 to 100: its digits' probabilities, times that of no further digit."""
    digit = {text: tokenizer.convert_tokens_to_ids(text) for text in "0123456789"}
    after = {start: following(hf_model, tokenizer, prompt, start) for start in ["", *"123456789", "10"]}

    def ends(start):
        return 1 - math.fsum(float(after[start][token]) for token in digit.values())

    def spelled(text):
        return math.prod(float(after[text[:place]][digit[text[place]]]) for place in range(len(text)))

    numbers = {number: spelled(str(number)) for number in range(101)}
    return {number: p * (ends(str(number)) if str(number) in after else 1.0) for number, p in numbers.items()}


def test_the_score_is_the_models_own_expectation_over_digit_sequences(
    make_client, optimistic, embedded_hf_model, embedded_directory
):
    tokenizer = AutoTokenizer.from_pretrained(embedded_directory)
    judge = LLMJudge(make_client(), coherence=False)
    [score] = judge.score(optimistic, [rollout(ANSWERS[0])])
    numbers = naive_numbers(embedded_hf_model, tokenizer, optimistic.rubric_for("How will my exam go?", ANSWERS[0]))
    mass = math.fsum(numbers.values())

    assert judge.scoring == "digits"
    # The server computes in 8 bits, otherwise for every batch that it forms, and unlikely first digits are not
    # followed. Read as whole numbers, the digits alone would give a score below 10.
    assert score.evidence["trait_mass"] == pytest.approx(mass, abs=0.06)
    assert score.trait_score == pytest.approx(math.fsum(n * p for n, p in numbers.items()) / mass, abs=5)
    assert judge.client.usage.calls <= 20


def test_a_rubric_that_draws_no_number_gives_no_score(make_client):
    [score] = LLMJudge(make_client(), scoring="whole numbers").score(load_trait("optimistic"), [rollout(ANSWERS[0])])

    assert score.trait_score is None
    assert 0 <= score.evidence["trait_mass"] < 0.25
