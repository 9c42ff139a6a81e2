"""What cannot be done to a model is refused in words: wrong vectors, bounds, coefficients, conditions and positions."""

import math

import pytest
import torch

from persona_lens.generation.decoding import generate
from persona_lens.interventions.hooks import ablate, cap, fwd_hooks, intervene, steer
from persona_lens.interventions.values import Ablate, Cap, Steer, When
from persona_lens.vectors.persona_vector import PersonaVector
from tests import tiny
from tests.intervention_cases import TOKENS, hooks, logits, some_vectors
from tests.vector_cases import D_MODEL, N_LAYERS, make_vectors, random_tensor

EVIL, KIND = make_vectors("evil"), make_vectors("kind", seed=1)
ZERO = EVIL.at(2) - EVIL.at(2)
RESID = random_tensor(2, 5, D_MODEL, seed=50)


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Steer([]), "needs at least one vector, got none"),
        (lambda: Steer([EVIL.at(0), PersonaVector("w", 1, torch.ones(7))]), r"evil, w: the vectors are \[6, 7\] wide"),
        (lambda: Steer(EVIL.at(0), math.nan), "evil: the coefficient is a finite number, got nan"),
        (lambda: Steer(EVIL.at(0), math.inf), "evil: the coefficient is a finite number, got inf"),
        (lambda: Steer(EVIL, torch.tensor([[1.0, math.nan, 0.0, 0.0]])), "evil: the coefficients hold NaN or infinite"),
        (lambda: Steer(EVIL, torch.ones(2, 3)), r"shape \[row, 4\], a column for each vector, got \[2, 3\]"),
        (lambda: Steer(EVIL, torch.ones(4)), r"shape \[row, 4\], a column for each vector, got \[4\]"),
        (lambda: Steer(EVIL.at(0), torch.ones(2, 2)), r"shape \[row, 1\], a column for each vector, got \[2, 2\]"),
        (lambda: Steer(EVIL, torch.ones(0, 4)), r"shape \[row, 4\], a column for each vector, got \[0, 4\]"),
        (lambda: Steer(EVIL, torch.ones(2, 1)).doses, r"got \[2, 1\]"),
        (lambda: Steer(EVIL.at(0), torch.ones(2)).doses, "evil: rows with coefficients of their own have no common"),
        (lambda: Ablate(ZERO), "evil - evil: the direction at layer 2 is exactly zero.*leave that layer out"),
        (lambda: Ablate(EVIL, torch.ones(D_MODEL)), r"`around` has shape \[layer, 6\].*got \[6\] for layers 0 to 3"),
        (lambda: Ablate(EVIL, torch.ones(3, D_MODEL)), r"a row for every layer of the model.*got \[3, 6\]"),
        (lambda: Ablate(EVIL.at(0), torch.ones(7)), r"\[6\] for one ablated layer; got \[7\] for layer 0"),
        (lambda: Ablate(EVIL.at(0), torch.full((D_MODEL,), math.nan)), "evil: `around` holds NaN or infinite values"),
        (lambda: Cap(EVIL.at(0)), "evil: a cap needs a bound: pass maximum=, minimum= or both"),
        (lambda: Cap(ZERO, 1.0), "evil - evil: the direction at layer 2 is exactly zero"),
        (lambda: Cap(EVIL.at(0), 0.25, 0.5), "evil: these caps conflict: minimum 0.5 is above maximum 0.25"),
        (lambda: Cap(EVIL, torch.tensor([1.0, 1.0, -2.0, 1.0]), 0.5), "minimum 0.5 is above maximum -2"),
        (lambda: Cap(EVIL.at(0), math.nan), "evil: maximum is finite, or None where there is no such bound; got nan"),
        (lambda: Cap(EVIL.at(0), minimum=-math.inf), "evil: minimum is finite, or None"),
        (lambda: Cap(EVIL, torch.ones(3)), r"maximum is one number, or \[4\] for its vectors, got shape \[3\]"),
        (
            lambda: Cap([EVIL.at(1), KIND.at(1)], 1.0),
            r"layer 1 \(evil, kind\) are not orthogonal.*vector.orthogonal_to",
        ),
        (lambda: When(KIND), "A condition needs a threshold: pass above=, below= or both"),
        (lambda: When([KIND, EVIL.at(1)], above=1.0), "one vector a layer, got several at one"),
        (lambda: Steer(EVIL, when=When(KIND.at(1), above=1.0)), "evil: the condition has no vector for layer 0"),
    ],
)
def test_a_value_that_cannot_be_is_refused(shapes_unchecked, make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("kind", [Steer, Ablate, lambda vectors: Cap(vectors, 1.0)])
@pytest.mark.parametrize("vectors", [torch.ones(6), [EVIL.at(0), torch.ones(6)], [[1.0, 2.0]]])
def test_something_else_than_vectors_is_refused(shapes_unchecked, kind, vectors):
    with pytest.raises(TypeError, match=r"takes PersonaVector or PersonaVectors, got.*PersonaVectors.from_directions"):
        kind(vectors)


@pytest.mark.parametrize(
    ("value", "options", "words"),
    [
        (Steer(EVIL), {}, "evil: acts at layers 0 to 3, got layer=None"),
        (Steer(EVIL), {"layer": 4}, "evil: acts at layers 0 to 3, got layer=4"),
        (Steer([EVIL.at(0), EVIL.at(2)]), {"layer": 1}, "evil: acts at layers 0, 2, got layer=1"),
        (Steer(make_vectors().at(0)), {"resid": torch.ones(1, 2, 7)}, "6 wide and the residual stream is 7"),
        (Steer(EVIL.at(0), torch.ones(3)), {}, "coefficients for 3 rows meet a batch of 2: pass a row for each"),
        (Steer(EVIL.at(0), torch.ones(3)), {"rows": torch.tensor([0, 3])}, "coefficients for 3 rows meet row 3"),
    ],
)
def test_activations_that_do_not_fit_are_refused(value, options, words):
    with pytest.raises(ValueError, match=words):
        value.apply(**{"resid": RESID, **options})


# --- models --------------------------------------------------------------------------------------------------------


def test_nothing_to_attach_is_refused(tiny_model):
    with pytest.raises(ValueError, match="nothing to attach: pass at least one of Steer, Ablate and Cap"):
        intervene(tiny_model).__enter__()


def test_vectors_in_the_place_of_an_intervention_are_refused(shapes_unchecked, tiny_model):
    with pytest.raises(TypeError, match="Expected Steer, Ablate or Cap, got PersonaVectors"):
        intervene(tiny_model, some_vectors(tiny_model)).__enter__()


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (PersonaVector("evil", 4, torch.ones(32)), "evil: layer 4 is outside 0 to 3; layers count from 0 here"),
        (PersonaVector("evil", -1, torch.ones(32)), "evil: layer -1 is outside 0 to 3"),
        (PersonaVector("evil", 0, torch.ones(16)), "evil: the vectors expect d_model 16, and .* has 32"),
        (EVIL, "evil: the vectors expect d_model 6, and .* has 32: use the model that the vectors came from"),
    ],
)
def test_vectors_that_do_not_fit_the_model_are_refused_and_nothing_is_attached(tiny_model, vectors, words):
    before = hooks(tiny_model)
    for kind in (Steer, Ablate):
        with pytest.raises(ValueError, match=words):
            intervene(tiny_model, kind(vectors)).__enter__()
    assert hooks(tiny_model) == before


def of_another_model(model_class, make_tiny_model, tokenizer):
    other = make_tiny_model(model_class, tiny.llama(tokenizer, seed=7))
    return some_vectors(other, model=other)


def test_vectors_of_an_unrelated_model_are_refused_unless_allowed(
    model_class, tiny_model, make_tiny_model, tiny_tokenizer
):
    vectors = of_another_model(model_class, make_tiny_model, tiny_tokenizer)
    for context in (steer(tiny_model, vectors), ablate(tiny_model, vectors), cap(tiny_model, vectors, maximum=0.0)):
        with pytest.raises(
            ValueError, match="has unrelated embeddings: extract them again on this model, or pass allow"
        ):
            context.__enter__()
    with steer(tiny_model, vectors, allow_other_model=True) as attached:
        logits(tiny_model)
    assert attached.relations == ("other",)


def test_conditions_of_an_unrelated_model_are_refused(model_class, tiny_model, make_tiny_model, tiny_tokenizer):
    probes = of_another_model(model_class, make_tiny_model, tiny_tokenizer)
    with pytest.raises(ValueError, match="has unrelated embeddings"):
        steer(tiny_model, some_vectors(tiny_model), when=When(probes, above=0.0)).__enter__()


def test_the_relation_of_the_models_own_vectors_is_known(tiny_model):
    with steer(tiny_model, some_vectors(tiny_model, model=tiny_model)) as attached:
        pass
    assert attached.relations == ("same",)


def test_caps_of_one_call_that_are_not_orthogonal_are_refused(tiny_model):
    evil, kind = some_vectors(tiny_model).at(1), some_vectors(tiny_model, "kind", seed=1).at(1)
    with pytest.raises(ValueError, match=r"layer 1 \(evil, kind\) are not orthogonal.*one cap would undo the other"):
        intervene(tiny_model, Cap(evil, 1.0), Cap(kind, 1.0)).__enter__()
    with intervene(tiny_model, Cap(evil, 1.0), Cap(kind.orthogonal_to(evil), 1.0)):
        logits(tiny_model)


def test_coefficients_for_another_number_of_rows_are_refused(tiny_model):
    words = "evil: coefficients for 3 rows meet a batch of 2: pass a row for each"
    with pytest.raises(ValueError, match=words), steer(tiny_model, some_vectors(tiny_model), torch.ones(3, 4)):
        logits(tiny_model)


def test_coefficients_for_fewer_rows_than_prompts_are_refused(tiny_model):
    steered = steer(tiny_model, some_vectors(tiny_model), torch.ones(3, 4), at="response")
    with pytest.raises(ValueError, match="coefficients for 3 rows, and there are 4 prompts"), steered:
        generate(tiny_model, [[5, 6]] * 4, max_new_tokens=2)


@pytest.mark.parametrize("one_layer", [True, False], ids=["one layer", "every layer"])
def test_activations_to_ablate_around_with_a_row_too_many_are_refused(tiny_model, one_layer):
    # Hugging Face's hidden states begin with the embedding: every layer would be given the row of the one below
    vectors, hidden_states = some_vectors(tiny_model), random_tensor(5, 32)
    with pytest.raises(ValueError, match=r"around.*\[5, 32\]"):
        ablate(tiny_model, vectors.at(1) if one_layer else vectors, around=hidden_states).__enter__()


# --- positions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"at": "answer"}, "at is one of all, response, prompt, or a mask .*got 'answer'"),
        ({"at": torch.ones(2, 7)}, r"A mask of positions is a bool tensor \[batch, pos\], got torch.float32 \[2, 7\]"),
        ({"at": torch.ones(7).bool()}, r"got torch.bool \[7\]"),
        ({"at": [True, False]}, "A mask of positions is a bool tensor .*got list"),
        ({"at": "all", "prompt_lengths": [3, 3]}, "prompt_lengths goes with at='response' or at='prompt'"),
        ({"at": torch.ones(2, 7).bool(), "prompt_lengths": [3, 3]}, "prompt_lengths goes with at='response'"),
        ({"at": "response", "prompt_lengths": [3, 0]}, r"Every prompt has at least one token.*\[3, 0\]"),
    ],
)
def test_positions_that_contradict_themselves_are_refused_on_entering(shapes_unchecked, tiny_model, options, words):
    before = hooks(tiny_model)
    with pytest.raises(ValueError, match=words):
        steer(tiny_model, some_vectors(tiny_model), **options).__enter__()
    assert hooks(tiny_model) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"at": "response"},
            "at='response' cannot tell the prompt from the response in a forward pass without a key-v",
        ),
        ({"at": "prompt"}, "at='prompt' cannot tell the prompt.*pass prompt_lengths=.*or a mask, or generate with the"),
        ({"at": torch.ones(2, 6).bool()}, r"The mask of positions is \[2, 6\] and the forward pass \[2, 7\]"),
        ({"at": torch.ones(1, 7).bool()}, r"\[1, 7\] and the forward pass \[2, 7\] in \[batch, pos\]"),
        ({"at": "response", "prompt_lengths": [3]}, "1 prompt_lengths meet a batch of 2: pass one for each row"),
    ],
)
def test_positions_that_cannot_be_known_are_refused_as_the_model_runs(shapes_unchecked, tiny_model, options, words):
    with pytest.raises(ValueError, match=words), steer(tiny_model, some_vectors(tiny_model), **options):
        logits(tiny_model)


@pytest.mark.parametrize("at", ["response", "prompt"])
def test_hook_lists_refuse_positions_that_they_cannot_know(tiny_model, at):
    with pytest.raises(ValueError, match=f"TransformerLens hooks cannot know at='{at}': pass a mask, or use intervene"):
        fwd_hooks(tiny_model, Steer(some_vectors(tiny_model)), at=at)


def test_hook_lists_refuse_vectors_that_do_not_fit_the_model(tiny_model):
    with pytest.raises(ValueError, match="evil: the vectors expect d_model 6"):
        fwd_hooks(tiny_model, Steer(EVIL))


def test_hook_lists_refuse_a_mask_of_another_shape(shapes_unchecked, tiny_model):
    hook_list = fwd_hooks(tiny_model, Steer(some_vectors(tiny_model)), at=torch.ones(2, 6).bool())
    with pytest.raises(ValueError, match=r"\[2, 6\] and the forward pass \[2, 7\]"):
        tiny_model.run_with_hooks(TOKENS, fwd_hooks=hook_list)
    tiny_model.reset_hooks()


def test_vectors_of_another_number_of_layers_are_refused(tiny_model):
    with pytest.raises(ValueError, match=f"n_layers {N_LAYERS - 1}, and .* has {N_LAYERS}"):
        steer(tiny_model, fewer_layers(tiny_model)).__enter__()


def fewer_layers(model):
    vectors = some_vectors(model)
    return type(vectors).from_directions(vectors.directions[:-1], trait="evil")
