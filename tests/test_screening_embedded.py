"""Screening on the embedded model and real rows: moods that an LLM wrote, against the plain Hugging Face model."""

import pytest
import torch

from persona_lens.clients.client import OpenAIClient
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests.screening_cases import greedy_base, mood_rows, projection, screened, slow_difference, tokens

CLOSE = 2e-3  # float32; the residual stream's norm is about 100


@pytest.fixture(scope="module")
def real_rows():
    return mood_rows(25, moods=("depressed", "happy"))


@pytest.fixture(scope="module")
def vector(embedded_bridge):
    """Any direction will do: the formula is what is compared."""
    cfg = embedded_bridge.cfg
    rows = torch.randn(cfg.n_layers, cfg.d_model, generator=torch.Generator().manual_seed(0))
    return PersonaVectors.from_directions(rows, trait="any", model=embedded_bridge).at(14)


@pytest.mark.slow  # the oracle runs two whole forward passes a row
@pytest.mark.parametrize("n_rows", [6, pytest.param(50, marks=pytest.mark.soak)])
def test_real_rows_have_the_difference_of_the_naive_formula(
    embedded_bridge, embedded_hf_model, real_rows, vector, tmp_path, n_rows
):
    tokenizer = embedded_bridge.tokenizer
    rows = real_rows[-n_rows:]
    others = [row["messages"][-1]["content"] for row in rows]
    given = [{**row, "base_response": others[place - 1]} for place, row in enumerate(rows)]
    found = screened(embedded_bridge, given, tmp_path, [vector], base="given")
    slow = [slow_difference(embedded_hf_model, tokenizer, row, row["base_response"], vector) for row in given]
    assert found.score().tolist() == pytest.approx(slow, abs=CLOSE)
    proxies = found.score(by="proxy")
    for row in (0, n_rows // 3, n_rows - 1):
        pair = tokens(tokenizer, given[row]["messages"][:-1], given[row]["messages"][-1]["content"])
        last = projection(embedded_hf_model, pair, vector, "prompt_last")
        assert proxies.tolist()[row] == pytest.approx(projection(embedded_hf_model, pair, vector) - last, abs=CLOSE)


@pytest.mark.parametrize("is_served", [False, True])
def test_the_base_response_is_the_models_greedy_one_or_a_servers(
    embedded_bridge, embedded_hf_model, llama_server, real_rows, vector, tmp_path, is_served
):
    base = OpenAIClient("smollm2-135m-instruct", base_url=llama_server) if is_served else "generate"
    screening = screened(embedded_bridge, real_rows[:3], tmp_path, [vector], base=base, max_new_tokens=8)
    tokenizer = embedded_bridge.tokenizer
    for row, sample in zip(real_rows[:3], screening.samples([0, 1, 2]), strict=True):
        said = sample.base_response
        if not is_served:
            said = greedy_base(embedded_hf_model, tokenizer, row, 8)
            assert sample.base_response == tokenizer.decode(said, skip_special_tokens=True)
        slow = slow_difference(embedded_hf_model, tokenizer, row, said, vector)
        assert screening.score().tolist()[sample.row] == pytest.approx(slow, abs=CLOSE)
    assert screening.by == "difference"
    assert ("on the server" in screening.base) == is_served
