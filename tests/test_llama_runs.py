"""A real server from end to end: rollouts from llama.cpp, their activations from the same model here."""

import json
import math
from dataclasses import replace

import pytest
import torch

from persona_lens import PersonaVectors
from persona_lens.chat.batches import encode
from persona_lens.clients.client import OpenAIClient
from persona_lens.clients.requests import ChatRequest
from persona_lens.extraction.pipeline import extract_persona_vectors
from persona_lens.models.forward import forward
from persona_lens.rollouts.collection import plan_rollouts
from persona_lens.rollouts.server import ServerEngine
from persona_lens.storage.files import JsonLines
from persona_lens.traits.trait import load_trait
from tests.llama_server import LLAMA_MODEL
from tests.server_cases import PolarityJudge


@pytest.fixture
def optimistic():
    """One pair of instructions and two questions of the bundled trait."""
    whole = load_trait("optimistic")
    return replace(whole, instructions=whole.instructions[:1], extraction_questions=whole.extraction_questions[:2])


@pytest.fixture
def client(llama_server, tmp_path):
    return OpenAIClient(LLAMA_MODEL, base_url=llama_server, cache=tmp_path / "calls.sqlite", timeout=120)


def test_a_server_answers_a_chat(client):
    ask = ({"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Say hello."})
    found = client.complete(ChatRequest(ask, max_tokens=8, temperature=0.0, top_logprobs=5))

    assert found.text.strip()
    assert found.completion_tokens == len(found.tokens)
    assert all(len(token.alternatives) == 5 for token in found.tokens)
    # Greedy: what was said is what was likeliest.
    assert all(token.text == token.alternatives[0][0] for token in found.tokens)


def test_a_server_keeps_to_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}, "grade": {"type": "integer"}},
        "required": ["mood", "grade"],
        "additionalProperties": False,
    }
    ask = ({"role": "user", "content": "How are you? Reply in JSON."},)
    found = json.loads(client.complete(ChatRequest(ask, max_tokens=60, json_schema=schema, seed=1)).text)

    assert set(found) == {"mood", "grade"}
    assert found["mood"] in ("good", "bad")
    assert isinstance(found["grade"], int)


def test_rollouts_of_a_server_give_vectors_of_the_model_here(client, optimistic, embedded_bridge, tmp_path):
    vectors = extract_persona_vectors(
        embedded_bridge,
        optimistic,
        engine=ServerEngine(client, max_new_tokens=24),
        judge=PolarityJudge(),
        per_question=1,
        min_pairs=2,
        output_dir=tmp_path / "run",
        progress=False,
    )

    rows = JsonLines(tmp_path / "run" / "rollouts.jsonl").read()
    assert len({row["response"] for row in rows}) == 4
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert all(f"{LLAMA_MODEL} on the server" in row["engine"] for row in rows)
    assert torch.isfinite(vectors.directions).all()
    assert (vectors.directions.norm(dim=-1) > 0).all()
    saved = PersonaVectors.load(tmp_path / "run" / "vectors.safetensors")
    assert saved.provenance.settings["sampled_by"] == rows[0]["engine"]


def test_a_server_of_the_model_under_study_sees_the_same_prompts_and_means_the_same(
    client, optimistic, embedded_bridge
):
    for prompt in plan_rollouts(optimistic, per_question=1):
        ids = torch.tensor([prompt.tokenize(embedded_bridge.tokenizer).prompt])
        logits, _ = forward(embedded_bridge, ids, torch.ones_like(ids).bool(), last_logits=1)
        here = logits[0, -1].softmax(dim=-1)
        request = ChatRequest(tuple(prompt.messages), max_tokens=1, temperature=0.0, top_logprobs=20)
        there = client.complete(request)

        assert there.prompt_tokens == ids.shape[1]
        [token] = there.tokens
        words = embedded_bridge.tokenizer
        apart = sum(abs(math.exp(p) - float(here[encode(words, text)[0]])) for text, p in token.alternatives if text)
        assert apart < 0.3  # the server computes in 8 bits
