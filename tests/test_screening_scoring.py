"""The numbers of one unit of a screening, against the plainest way: what of the base and of the prompt is read."""

import pytest

from persona_lens.chat.batches import ChatTokens, tokenize_chat
from persona_lens.clients.client import OpenAIClient
from persona_lens.interventions.hooks import steer
from persona_lens.screening.batches import PlannedRow
from persona_lens.screening.samples import Sample
from persona_lens.screening.scoring import ModelScorer
from tests.fault_server import FaultServer
from tests.intervention_cases import some_vectors
from tests.judge_servers import only_reasons
from tests.screening_cases import projection

PROMPT = [5, 17, 100, 33, 8]
RESPONSE = (9, 40, 41, 7)
MESSAGES = ({"role": "user", "content": "Why?"},)


@pytest.fixture
def vector(tiny_bridge):
    return some_vectors(tiny_bridge).at(1)


def planned(row=0, prompt=PROMPT, base=None, wants_base=False):
    sample = Sample(row, "d", f"d:{row + 1}", row + 1, MESSAGES, "Because.", base)
    return PlannedRow(sample, ChatTokens(tuple(prompt), RESPONSE), wants_base, cut=False, group=0, family=row)


def score(model, vector, row, **how):
    (found,) = ModelScorer(model, [vector], **{"base": "given", **how}).score([row])
    return found


def with_base(tokenizer, text):
    """A row whose data set gives the base model's response."""
    return planned(prompt=tokenize_chat(tokenizer, MESSAGES).prompt, base=text, wants_base=True)


def test_a_base_response_that_never_says_after_has_no_score(tiny_bridge, tiny_tokenizer, vector):
    thinks, answers = "I think so.", "I think so.</think>Yes, it is."
    without, with_it = (
        score(tiny_bridge, vector, with_base(tiny_tokenizer, text), after="</think>") for text in (thinks, answers)
    )
    assert without.base is None
    assert without.base_tokens == len(tiny_tokenizer(thinks, add_special_tokens=False).input_ids)
    assert with_it.base is not None
    assert with_it.base != score(tiny_bridge, vector, with_base(tiny_tokenizer, answers)).base


def test_a_base_response_is_cut_to_the_context(tiny_bridge, tiny_hf_model, tiny_tokenizer, vector):
    text = "Be kind, listen first. " * 40
    row = with_base(tiny_tokenizer, text)
    room = tiny_bridge.cfg.n_ctx - len(row.chat.prompt)
    said = tiny_tokenizer(text, add_special_tokens=False).input_ids
    assert len(said) > room
    found = score(tiny_bridge, vector, row, token_budget=10_000)
    assert found.base_tokens == room
    assert found.base == pytest.approx([projection(tiny_hf_model, (row.chat.prompt, said[:room]), vector)], abs=1e-4)


@pytest.mark.parametrize(("at", "moves"), [("response", True), ("prompt", False), ("all", True)])
def test_the_last_prompt_token_is_steered_as_where_the_response_begins(tiny_bridge, vector, at, moves):
    """The token before the response decides its first token: `response` and `prompt` positions overlap in it alone."""
    plain = score(tiny_bridge, vector, planned(), base="none")
    with steer(tiny_bridge, vector, 2.0, at=at):
        found = score(tiny_bridge, vector, planned(), base="none")
    length = float(vector.direction.norm())
    assert found.prompt[0] - plain.prompt[0] == pytest.approx(2.0 * length, abs=1e-3)
    if moves:
        assert found.response[0] - plain.response[0] == pytest.approx(2.0 * length, abs=1e-3)


def test_a_base_model_that_gives_nothing_but_reasoning_is_refused(tiny_bridge, vector):
    rows = [planned(row, prompt=[*PROMPT, row], wants_base=True) for row in range(6)]
    with FaultServer(only_reasons) as server:
        scorer = ModelScorer(tiny_bridge, [vector], base=OpenAIClient("base", base_url=server.url))
        with pytest.raises(ValueError, match="enable_thinking"):
            scorer.score(rows)
