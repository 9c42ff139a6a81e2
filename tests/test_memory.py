"""Memory that fails: fewer rows run at a time to the same results, and a row that does not fit alone is an error."""

import pytest

from persona_lens.evaluation.capability import measure_capability
from persona_lens.evaluation.capability_result import Question
from persona_lens.generation.decoding import generate
from persona_lens.judges.likelihood_ratio import mean_log_likelihoods
from persona_lens.models.memory import DoesNotFit, is_out_of_memory
from persona_lens.screening.run import screen
from tests.fault_cases import small_memory
from tests.screening_cases import QUIET, pair_of_vectors, rows
from tests.test_judges import mixed_rows

PROMPTS = [(5, 6, 7), (8, 9), (10, 11, 12, 13), (14,), (15, 16)]
TEXTS = [{"role": "user", "content": "Why?"}]
PLACES = {
    "likelihoods": ["persona_lens.activations.prefixes.forward"],
    "generation": ["persona_lens.generation.decoding.forward"],
    "screening": ["persona_lens.generation.decoding.forward", "persona_lens.monitoring.projection.forward"],
    "capability": ["persona_lens.activations.prefixes.forward"],
}


@pytest.fixture
def work(tiny_model, tmp_path):
    """What each kind of work gives, as numbers."""

    def generation():
        return [[float(token) for token in each.tokens] for each in generate(tiny_model, PROMPTS, max_new_tokens=5)]

    def screening():
        found = screen(tiny_model, rows(9), pair_of_vectors(tiny_model), output_dir=tmp_path, max_new_tokens=4, **QUIET)
        return [found.score("evil").tolist(), found.score("kind").tolist()]

    def capability():
        asked = [Question(f"What is {number}?", ("one", "two"), 0) for number in range(5)]
        found = measure_capability(tiny_model, asked, texts=[], progress=False)
        return [[found.margin.value, found.letter_mass.value]]

    return {
        "likelihoods": lambda: [mean_log_likelihoods(tiny_model, mixed_rows()).nan_to_num(0).tolist()],
        "generation": generation,
        "screening": screening,
        "capability": capability,
    }


def lessen(monkeypatch, kind, most_rows):
    sizes = []
    for place in PLACES[kind]:
        module, _, name = place.rpartition(".")
        forward = getattr(__import__(module, fromlist=[name]), name)
        monkeypatch.setattr(place, small_memory(forward, most_rows, sizes))
    return sizes


@pytest.mark.parametrize("kind", PLACES)
def test_where_memory_fails_fewer_rows_at_a_time_give_the_same(work, kind, monkeypatch, tmp_path):
    whole = work[kind]()
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    sizes = lessen(monkeypatch, kind, 2)
    found = work[kind]()
    assert max(sizes) == 2
    for one, other in zip(found, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("kind", PLACES)
def test_a_row_that_does_not_fit_alone_is_told_with_its_length_and_the_remedy(work, kind, monkeypatch):
    lessen(monkeypatch, kind, 0)
    words = r"^A row of \d+ tokens does not fit into the memory of cpu by itself: shorten it, load the model with"
    with pytest.raises(DoesNotFit, match=words):
        work[kind]()


def test_what_memory_does_not_suffice_for_alone_is_not_tried_with_less():
    assert not is_out_of_memory(DoesNotFit("A row of 9 tokens."))


@pytest.mark.parametrize("words", ["MPS backend out of memory", "not enough memory: you tried to allocate 8 bytes"])
def test_the_words_of_other_devices_are_known(words):
    assert is_out_of_memory(RuntimeError(words))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError(words))
