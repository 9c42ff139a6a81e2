"""Safeguards: which token sets one off, that it acts on the very next one, and only in that reply."""

import json
from dataclasses import fields, replace
from datetime import UTC, datetime

import pytest
import torch

from persona_lens.generation.decoding import generate
from persona_lens.interventions.hooks import steer
from persona_lens.interventions.intervention import When
from persona_lens.interventions.values import Ablate, Cap, Steer
from persona_lens.monitoring.live import generate_watched, stream_watched
from persona_lens.monitoring.watch import Alert, Safeguard
from persona_lens.vectors.persona_vectors import PersonaVectors
from tests import naive, tiny
from tests.intervention_cases import hooks, some_vectors
from tests.monitoring_cases import read
from tests.vector_cases import random_tensor

KEYS = [f"row {index}" for index in range(6)]
GREEDY = {"max_new_tokens": 8, "temperature": 0.0}
SAMPLED = {"max_new_tokens": 8, "seed": 3, "keys": KEYS}


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer):
    """Of many lengths, some twice."""
    return [prompt for prompt, _ in tiny.chat_rows(tiny_tokenizer)]


@pytest.fixture(scope="module")
def vectors(tiny_model):
    return some_vectors(tiny_model)


@pytest.fixture(scope="module")
def other(tiny_model):
    return some_vectors(tiny_model, "kind", seed=1)


def alike(one, another):
    return one.tokens == another.tokens and torch.equal(read(one), read(another))


def first_past(reply, threshold, column=0):
    """The index of the first token past a threshold, -1 being the prompt's last; None where none is."""
    past = [value > threshold for value in read(reply)[:, column].tolist()]
    return past.index(True) - 1 if True in past else None


def middle(replies):
    """A threshold that some replies pass in their middle and some never."""
    peaks = sorted(float(reply.projections[:-2].max()) for reply in replies)
    return (peaks[1] + peaks[2]) / 2


def test_the_intervention_acts_on_the_very_next_token_as_if_attached_by_hand(
    tiny_model, tiny_hf_model, prompts, vectors, other
):
    watched, layers = vectors.at(2), (0, 2, 3)
    strong = Steer([other.at(layer) for layer in layers], 25.0)
    plain = generate_watched(tiny_model, prompts, watched, **GREEDY)
    threshold = middle(plain)
    replies = generate_watched(
        tiny_model, prompts, watched, safeguards=[Safeguard(watched, threshold, strong)], **GREEDY
    )
    unit, stops = watched.direction.double() / watched.direction.double().norm(), {tiny_model.tokenizer.eos_token_id}
    changed = 0
    for prompt, before, reply in zip(prompts, plain, replies, strict=True):
        index = first_past(before, threshold)
        if index is None:
            assert alike(reply, before)
            assert reply.alerts == ()
            continue
        start = len(prompt) + index
        added = {layer: 25.0 * other.directions[layer].double() for layer in layers}
        at_once, later = slice(start, None), slice(start + 1, None)
        with (
            naive.added_at(tiny_hf_model, {0: added[0]}, later),
            naive.added_at(tiny_hf_model, {2: added[2], 3: added[3]}, at_once),
        ):
            assert list(reply.tokens) == naive.greedy(tiny_hf_model, prompt, 8, stops)
            stream = naive.residual_stream(tiny_hf_model, [*prompt, *reply.tokens])[3, len(prompt) - 1 :] @ unit
        stream[index + 1 :] -= added[2] @ unit  # what is reported was read before the safeguard acted there
        torch.testing.assert_close(read(reply)[:, 0], stream, rtol=0, atol=1e-3)
        assert [alert.token_index for alert in reply.alerts] == [index]
        assert reply.tokens[: index + 1] == before.tokens[: index + 1]
        changed += reply.tokens[index + 1 : index + 2] != before.tokens[index + 1 : index + 2]
    assert changed >= 2


def test_one_set_off_by_the_prompt_is_steering_of_the_response(tiny_model, prompts, vectors, other):
    value = Steer([other.at(1), other.at(3)], 5.0)
    found = generate_watched(
        tiny_model, prompts, vectors.at(1), safeguards=[Safeguard(vectors.at(1), -1e9, value)], **SAMPLED
    )
    with steer(tiny_model, [other.at(1), other.at(3)], 5.0, at="response"):
        expected = generate(tiny_model, prompts, **SAMPLED)
    assert [(reply.tokens, reply.finish_reason) for reply in found] == expected
    assert expected != generate(tiny_model, prompts, **SAMPLED)
    assert {alert.token_index for reply in found for alert in reply.alerts} == {-1}


def test_only_the_replies_that_set_it_off_change(tiny_model, prompts, vectors, other):
    plain = generate_watched(tiny_model, prompts, vectors.at(1), **SAMPLED)
    guard = Safeguard(vectors.at(1), middle(plain), Steer(other.at(3), 30.0))
    together = generate_watched(tiny_model, prompts, vectors.at(1), safeguards=[guard], **SAMPLED)
    same = [alike(one, another) for one, another in zip(together, plain, strict=True)]
    assert [not reply.alerts for reply in together] == same
    assert {True, False} == set(same)
    for prompt, key, reply in zip(prompts, KEYS, together, strict=True):
        options = SAMPLED | {"keys": [key]}
        alone = generate_watched(tiny_model, [prompt], vectors.at(1), safeguards=[guard], **options)[0]
        assert alone.tokens == reply.tokens
        torch.testing.assert_close(read(alone), read(reply), rtol=0, atol=1e-9)


def test_what_never_fires_or_only_alerts_leaves_everything_bit_equal(tiny_model, prompts, vectors, other):
    plain = generate_watched(tiny_model, prompts, vectors, **SAMPLED)
    guards = [Safeguard(vectors.at(1), 0.0), Safeguard(vectors.at(3), 0.0, direction="below")]
    idle = [
        [Safeguard(vectors.at(1), 1e9, Steer(other, 30.0))],
        [Safeguard(vectors.at(1), -1e9, Steer(other.at(3), 30.0, when=When(other.at(3), above=1e9)))],
        guards,
    ]
    found = plain
    for safeguards in idle:
        found = generate_watched(tiny_model, prompts, vectors, safeguards=safeguards, **SAMPLED)
        assert all(alike(one, another) for one, another in zip(found, plain, strict=True))
    for reply in found:
        below = [value < 0 for value in read(reply)[:, 3].tolist()]
        expected = [(1, first_past(reply, 0.0, column=1)), (3, below.index(True) - 1 if True in below else None)]
        assert sorted((alert.layer, alert.token_index) for alert in reply.alerts) == [
            pair for pair in expected if pair[1] is not None
        ]


def test_several_safeguards_act_each_from_its_own_token_on(tiny_model, prompts, vectors, other):
    plain = generate_watched(tiny_model, prompts, [vectors.at(1), other.at(2)], **SAMPLED)
    first = Safeguard(vectors.at(1), middle(plain), Ablate(vectors.at(3)))
    second = Safeguard(other.at(2), -1e9, Cap(other.at(2), maximum=-1.0))
    replies = generate_watched(tiny_model, prompts, [vectors.at(3)], safeguards=[first, second], **SAMPLED)
    only_second = generate_watched(tiny_model, prompts, [vectors.at(3)], safeguards=[second], **SAMPLED)
    assert [vector.trait for vector in replies[0].vectors] == ["evil", "evil", "kind"]  # what guards watch is added
    assert [reply.alerts[0].trait for reply in replies] == ["kind"] * 6
    by_both = [len(reply.alerts) == 2 for reply in replies]
    assert True in by_both
    for both, reply, single in zip(by_both, replies, only_second, strict=True):
        assert both or reply.tokens == single.tokens


def test_every_firing_is_a_line_of_the_audit_file(tiny_model, prompts, vectors, other, tmp_path):
    value, path, before = Steer(other.at(3), 3.0), tmp_path / "audit.jsonl", datetime.now(UTC)
    guards = [Safeguard(vectors.at(1), 0.0, value), Safeguard(vectors.at(0), 0.0)]
    replies = generate_watched(tiny_model, prompts, vectors, safeguards=guards, audit_file=path, **SAMPLED)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    of_replies = [alert.to_dict() for reply in replies for alert in reply.alerts]
    assert sorted(lines, key=str) == sorted(of_replies, key=str)
    assert {line["action"] for line in lines} == {str(value), "alert"}
    assert {line["intervention"] for line in lines} == {value.fingerprint, None}
    for reply, prompt in zip(replies, prompts, strict=True):
        for alert in reply.alerts:
            assert alert.key == reply.key
            assert alert.token == [*reply.tokens, prompt[-1]][alert.token_index]
            assert alert.token_text == tiny_model.tokenizer.decode([alert.token])
            assert alert.projection == float(read(reply)[alert.token_index + 1, alert.layer])
            assert before <= datetime.fromisoformat(alert.time) <= datetime.now(UTC)
    path.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"audit.jsonl holds something else: expected rows with time, key"):
        generate_watched(tiny_model, prompts, vectors.at(1), safeguards=guards, audit_file=path, **SAMPLED)
    assert path.read_text() == '{"mine": 1}'


def test_the_line_is_there_when_the_token_is(tiny_model, prompts, vectors, tmp_path):
    path = tmp_path / "audit.jsonl"
    older = dict.fromkeys([each.name for each in fields(Alert)])
    path.write_text(json.dumps(older) + '\n{"unfinis')
    plain = generate_watched(tiny_model, prompts[:1], vectors.at(1), max_new_tokens=8, seed=3)[0]
    peak = float(plain.projections[:, 0].max())
    guard = Safeguard(vectors.at(1), peak - 1e-6)
    index = read(plain)[:, 0].tolist().index(peak) - 1
    stream = stream_watched(
        tiny_model, prompts[0], vectors.at(1), safeguards=[guard], audit_file=path, max_new_tokens=8, seed=3
    )
    for token in stream:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) == 1 + (token.index >= index)
        assert bool(token.alerts) == (token.index == index)


class Broken(Steer):
    """Fails where it acts."""

    kind = "broken"

    def _change(self, resid, layer, rows):
        raise RuntimeError("out of order")


@pytest.mark.parametrize("run", [generate_watched, lambda *given, **options: list(stream_watched(*given, **options))])
def test_an_exception_leaves_no_hook(tiny_model, prompts, vectors, run):
    before, prompt = hooks(tiny_model), prompts[:1] if run is generate_watched else prompts[0]
    with pytest.raises(RuntimeError, match="out of order"):
        run(tiny_model, prompt, vectors, safeguards=[Safeguard(vectors.at(1), -1e9, Broken(vectors.at(2)))])
    assert hooks(tiny_model) == before


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"threshold": float("nan")}, "evil: a safeguard's threshold is a finite number, got nan"),
        ({"threshold": float("inf")}, "a finite number, got inf"),
        ({"direction": "beside"}, "direction is one of above, below, got 'beside'"),
        ({"intervention": "stop"}, "switches on a Steer, Ablate or Cap, got str"),
        ({"matrix": True}, "pass one coefficient, not one for each row"),
        ({"zero": True}, "the direction at layer 1 is exactly zero"),
    ],
)
def test_what_cannot_guard_is_refused(tiny_model, vectors, shapes_unchecked, parts, words):
    given = {"vector": vectors.at(1), "threshold": 0.0} | parts
    if given.pop("matrix", False):
        given["intervention"] = Steer(vectors.at(2), torch.ones(6))
    if given.pop("zero", False):
        given["vector"] = replace(vectors.at(1), direction=torch.zeros(32))
    with pytest.raises((ValueError, TypeError), match=words):
        Safeguard(**given)


def narrow():
    return PersonaVectors.from_directions(random_tensor(4, 6), trait="narrow", embedding=random_tensor(6))


@pytest.mark.parametrize("run", [generate_watched, stream_watched])
def test_what_cannot_be_watched_is_refused_before_anything_runs(tiny_model, prompts, vectors, run):
    prompt, guard = (prompts[:1] if run is generate_watched else prompts[0]), Safeguard(vectors.at(1), 0.0)
    with pytest.raises(ValueError, match="nothing to watch: pass at least one vector or safeguard"):
        run(tiny_model, prompt, [])
    with pytest.raises(ValueError, match="narrow: the vectors expect d_model 6"):
        run(tiny_model, prompt, narrow())
    with pytest.raises(ValueError, match="narrow: the vectors expect d_model 6"):
        run(tiny_model, prompt, vectors, safeguards=[replace(guard, intervention=Ablate(narrow()))])
    with pytest.raises(ValueError, match="evil: layer 9 is outside 0 to 3"):
        run(tiny_model, prompt, replace(vectors.at(1), layer=9))
    with pytest.raises(ValueError, match="got an empty one"):
        run(tiny_model, prompt, vectors, after="")
    capped = [replace(guard, intervention=Cap(vectors.at(1), maximum=bound)) for bound in (1.0, 2.0)]
    with pytest.raises(ValueError, match="These caps conflict"):
        run(tiny_model, prompt, vectors, safeguards=capped)
    shared = [Safeguard(vectors.at(layer), -1e9, Cap(vectors.at(3), maximum=0.0)) for layer in (1, 2)]
    reply = generate_watched(tiny_model, prompts[:1], vectors, safeguards=shared, max_new_tokens=2)[0]
    assert len(reply.alerts) == 2
