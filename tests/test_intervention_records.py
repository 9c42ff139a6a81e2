"""Interventions as JSON: what comes back does the same bit for bit, and a damaged record is refused."""

import copy
import json

import pytest
import torch

from persona_lens.interventions.values import Ablate, Cap, Intervention, Steer, When
from tests.vector_cases import D_MODEL, N_LAYERS, assert_same_bits, make_provenance, make_vectors, random_tensor

RESID = random_tensor(2, 5, D_MODEL, seed=50).double()
EVIL, KIND = make_vectors("evil", provenance=make_provenance()), make_vectors("kind", seed=1)
WHEN = When(KIND, above=-0.3, below=0.4)
EACH = {
    "steer": Steer(EVIL, -1.5),
    "steer by an int": Steer([EVIL.at(2), KIND.at(0)], 2),
    "steer by a matrix": Steer(EVIL, random_tensor(2, N_LAYERS, seed=7)),
    "steer by rows": Steer(EVIL.at(3), torch.tensor([0.1, 1 / 3])),
    "steer where": Steer(EVIL, 0.1, when=WHEN),
    "ablate": Ablate([EVIL.at(1), KIND.at(1)]),
    "ablate around": Ablate(EVIL, random_tensor(N_LAYERS, D_MODEL, seed=8)),
    "ablate around where": Ablate(EVIL.at(1), random_tensor(D_MODEL, seed=8), when=When(KIND.at(1), below=0.2)),
    "cap": Cap(EVIL, maximum=0.1),
    "cap to both": Cap(EVIL, torch.full((N_LAYERS,), 0.2), torch.tensor([-0.1, 0.0, 0.1, 0.2])),
    "cap where": Cap(EVIL.at(1), minimum=1 / 3, when=WHEN),
}
EACH_NAMED = pytest.mark.parametrize("each", EACH.values(), ids=EACH)


def through_json(each):
    return json.loads(json.dumps(each.to_dict(), allow_nan=False))


@EACH_NAMED
def test_what_is_read_back_does_the_same_bit_for_bit(each):
    again = type(each).from_dict(through_json(each))
    assert again.layers == each.layers
    for layer in each.layers:
        assert_same_bits(again.apply(RESID, layer=layer), each.apply(RESID, layer=layer))


@EACH_NAMED
def test_a_record_is_read_back_as_its_own_kind_by_the_general_class(each):
    again = Intervention.from_dict(through_json(each))
    assert type(again) is type(each)
    assert str(again) == str(each)


@EACH_NAMED
def test_a_fingerprint_survives_the_record(each):
    assert Intervention.from_dict(through_json(each)).fingerprint == each.fingerprint


def test_vectors_come_back_with_all_that_is_known_of_them():
    again = Intervention.from_dict(through_json(EACH["steer by an int"]))
    for found, expected in zip(again.layer_vectors, [EVIL.at(2), KIND.at(0)], strict=True):
        assert_same_bits(found.direction, expected.direction)
        for name in ("trait", "layer", "position", "residual_norm", "provenance"):
            assert getattr(found, name) == getattr(expected, name)


def test_fingerprints_tell_apart_whatever_decides_what_is_done():
    others = [
        Steer(EVIL, -1.5000001),
        Steer(EVIL, 1.5),
        Steer(KIND, -1.5),
        Steer(EVIL.at(0), -1.5),
        Steer(EVIL, torch.full((1, N_LAYERS), -1.5)),
        Steer(EVIL, -1.5, when=When(KIND, above=0.0)),
        Steer(EVIL, -1.5, when=When(KIND, above=0.1)),
        Ablate(EVIL),
        *EACH.values(),
    ]
    assert len({each.fingerprint for each in others}) == len(others)


def test_equal_interventions_have_one_fingerprint():
    assert Steer(EVIL, -1.5).fingerprint == EACH["steer"].fingerprint


# --- refusals ------------------------------------------------------------------------------------------------------


def set_at(record, value, *place):
    """The record with one entry replaced."""
    changed = copy.deepcopy(record)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "Expected a record of version 1 and kind steer or ablate or cap, got version 2 and kind 'ste"),
        ({"version": None}, "got version None and kind 'steer'"),
        ({"kind": "nudge"}, "got version 1 and kind 'nudge'"),
    ],
)
def test_a_record_of_another_version_or_kind_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Intervention.from_dict(through_json(EACH["steer"]) | changes)


def test_a_record_of_another_kind_than_its_class_is_refused():
    with pytest.raises(ValueError, match="Expected a record of version 1 and kind ablate, got version 1 and kind 'ste"):
        Ablate.from_dict(through_json(EACH["steer"]))


@pytest.mark.parametrize("missing", ["vectors", "directions", "provenances", "coefficient", "when"])
def test_a_record_that_lacks_a_part_is_refused(missing):
    record = through_json(EACH["steer"])
    del record[missing]
    with pytest.raises(ValueError, match=f"The record of an intervention is damaged.*{missing}"):
        Intervention.from_dict(record)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("directions", "float32"), "not base64!"),
        (("directions", "float32"), "AAAA"),
        (("directions", "shape"), [3, D_MODEL]),
        (("directions", "shape"), [N_LAYERS, D_MODEL + 1]),
        (("vectors",), []),
        (("vectors", 0, "provenance"), 5),
        (("vectors", 0, "provenance"), None),
        (("vectors", 0, "surprise"), 1),
        (("coefficient",), float("nan")),
        (("coefficient",), "much"),
        (("provenances",), [{"model": {}}]),
        (("when",), {"above": 1.0}),
    ],
)
def test_a_damaged_record_is_refused(shapes_unchecked, place, value):
    record = set_at(through_json(EACH["steer"]), value, *place)
    with pytest.raises(ValueError, match="The record of an intervention is damaged"):
        Intervention.from_dict(record)
