"""Algebra, projections, files and refusals of persona vectors."""

import math
import os
from dataclasses import fields, replace
from types import SimpleNamespace

import jaxtyping
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

N_LAYERS, D_MODEL = 4, 6
SEEDS = st.integers(0, 2**16)
FACTORS = st.floats(-100, 100).filter(lambda factor: abs(factor) > 0.01)


@pytest.fixture(scope="module")
def pv():
    """The module under test, imported late so that the jaxtyping hook instruments it."""
    import persona_lens.vectors

    return persona_lens.vectors


@pytest.fixture
def shapes_unchecked():
    """Lets a wrong shape reach our own refusal, as it does outside the tests."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


class ToyModel(nn.Module):
    """As much of a HookedTransformer as a model's identity is made from."""

    def __init__(self, n_layers=N_LAYERS, d_model=D_MODEL, seed=0, normalization="RMS", centred=False):
        super().__init__()
        embedding = random_tensor(64, d_model, seed=seed)
        self.W_E = nn.Parameter(embedding - embedding.mean(dim=-1, keepdim=True) if centred else embedding)
        self.blocks = nn.ModuleList(nn.LayerNorm(1) for _ in range(n_layers))
        self.tokenizer = None
        self.cfg = SimpleNamespace(
            n_layers=n_layers, d_model=d_model, model_name=f"toy-{seed}", normalization_type=normalization
        )

    @torch.no_grad()
    def finetuned(self):
        for parameter in self.parameters():
            parameter += 0.05 * random_tensor(*parameter.shape, seed=99)
        return self


class OtherClassOfToyModel(ToyModel):
    """The same weights under other names, as a bridge has them."""

    def __init__(self):
        super().__init__()
        self.wrapped = self.blocks
        self.extra = nn.Parameter(torch.zeros(1))


def random_tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_vectors(pv, *, seed=0, trait="evil", **parts):
    parts = {"embedding": random_tensor(D_MODEL, seed=seed + 1), "counts": {"positive": 5, "negative": 4}} | parts
    return pv.PersonaVectors(
        trait, random_tensor(N_LAYERS, D_MODEL, seed=seed), random_tensor(N_LAYERS, seed=seed + 2).abs() + 1, **parts
    )


def make_provenance(pv, model=None, **parts):
    provenance = pv.Provenance.of(model or ToyModel(), settings={"per_question": 10}, template_hash="abc")
    return replace(provenance, **parts)


def make_statistics(pv, *, embedding=True):
    names = [each.name for each in fields(pv.LayerStatistics)][:9]
    by_layer = {name: random_tensor(N_LAYERS, seed=seed).sigmoid() for seed, name in enumerate(names)}
    by_layer["split_half"][2] = math.nan
    row = dict.fromkeys(names, 0.1) | {"split_half": math.nan}
    return pv.LayerStatistics(**by_layer, n_questions=3, n_rows=9, seed=7, embedding=row if embedding else None)


def assert_same_bits(left, right):
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert left.numpy().tobytes() == right.numpy().tobytes()


def assert_same_value(left, right):
    """Equality of all fields, tensors bit by bit and NaN equal to NaN."""
    for each in fields(left):
        ours, theirs = getattr(left, each.name), getattr(right, each.name)
        if isinstance(ours, torch.Tensor):
            assert_same_bits(ours, theirs)
        elif each.name == "statistics" and ours is not None:
            assert_same_value(ours, theirs)
        else:
            assert repr(ours) == repr(theirs), each.name


# Algebra


@given(seed=SEEDS)
def test_v_minus_v_is_zero(pv, seed):
    v = make_vectors(pv, seed=seed)
    assert (v - v).directions.count_nonzero() == 0
    assert (v - v).embedding.count_nonzero() == 0


@given(seed=SEEDS)
def test_minus_minus_v_is_v(pv, seed):
    v = make_vectors(pv, seed=seed)
    minus = -v
    assert_same_bits((-minus).directions, v.directions)
    assert_same_bits((-minus).embedding, v.embedding)
    assert (-minus).trait == v.trait


@given(seed=SEEDS)
def test_twice_v_halved_is_v(pv, seed):
    v = make_vectors(pv, seed=seed)
    assert_same_bits(((2 * v) / 2).directions, v.directions)
    assert_same_bits(((v * 2) / 2).embedding, v.embedding)


@given(seed=SEEDS, factor=FACTORS)
def test_scaling_distributes_over_a_sum(pv, seed, factor):
    v, w = make_vectors(pv, seed=seed), make_vectors(pv, seed=seed + 10)
    torch.testing.assert_close(
        (factor * (v + w)).directions, (factor * v + factor * w).directions, rtol=1e-4, atol=1e-3
    )


@given(seed=SEEDS)
def test_v_minus_w_is_v_plus_minus_w(pv, seed):
    v, w = make_vectors(pv, seed=seed), make_vectors(pv, seed=seed + 10)
    assert_same_bits((v - w).directions, (v + -w).directions)
    assert_same_bits((v - w).embedding, (v + -w).embedding)


@given(seed=SEEDS)
def test_operators_on_all_layers_are_operators_on_each(pv, seed):
    v, w = make_vectors(pv, seed=seed), make_vectors(pv, seed=seed + 10)
    for layer in range(N_LAYERS):
        one, other = v.at(layer), w.at(layer)
        for whole, single in (
            (v + w, one + other),
            (v - w, one - other),
            (-v, -one),
            (v / 3, one / 3),
            (3 * v, one * 3),
        ):
            assert_same_bits(whole.at(layer).direction, single.direction)
            assert whole.trait == single.trait


@given(seed=SEEDS)
def test_increments_up_to_a_layer_sum_to_its_direction_minus_the_embedding_row(pv, seed):
    v = make_vectors(pv, seed=seed)
    sums = v.incremental().directions.double().cumsum(dim=0)
    torch.testing.assert_close(sums.float(), v.directions - v.embedding, rtol=1e-5, atol=1e-5)


def test_increments_have_no_statistics_of_the_outputs(pv):
    assert make_vectors(pv, statistics=make_statistics(pv)).incremental().statistics is None


def test_increments_of_a_one_layer_model_begin_at_the_embedding_row(pv):
    v = pv.PersonaVectors.from_directions(torch.ones(1, 3), trait="evil", embedding=torch.full((3,), 0.25))
    torch.testing.assert_close(v.incremental().directions, torch.full((1, 3), 0.75))


def test_increments_of_increments_are_refused(pv):
    with pytest.raises(ValueError, match="are increments already: use them as they are"):
        make_vectors(pv).incremental().incremental()


def test_increments_without_an_embedding_row_are_refused(pv):
    with pytest.raises(ValueError, match="increments begin at the embedding row"):
        make_vectors(pv, embedding=None).incremental()


def test_increments_and_outputs_are_not_added(pv):
    v = make_vectors(pv)
    with pytest.raises(ValueError, match="differ in increments"):
        _ = v + v.incremental()


@pytest.mark.parametrize(
    ("combine", "trait"),
    [
        (lambda v, w: v + w, "evil + optimistic"),
        (lambda v, w: v - w, "evil - optimistic"),
        (lambda v, w: -v, "-evil"),
        (lambda v, w: 0.5 * v, "0.5 * evil"),
        (lambda v, w: v / 2, "evil / 2"),
        (lambda v, w: -(v + w), "-(evil + optimistic)"),
        (lambda v, w: w - (v + w), "optimistic - (evil + optimistic)"),
        (lambda v, w: -(-v + w), "-(-evil + optimistic)"),
        (lambda v, w: v + 2 * w, "evil + (2 * optimistic)"),
    ],
)
def test_operators_write_what_they_did_into_the_trait(pv, combine, trait):
    v, w = make_vectors(pv), make_vectors(pv, trait="optimistic")
    assert combine(v, w).trait == trait
    assert combine(v.at(1), w.at(1)).trait == trait


def test_operators_drop_statistics_and_a_sum_drops_counts(pv):
    v = make_vectors(pv, statistics=make_statistics(pv))
    assert (2 * v).statistics is None
    assert (2 * v).counts == v.counts
    assert (v + v).statistics is None
    assert (v + v).counts == {}


def test_a_sum_has_an_embedding_row_only_if_both_have_one(pv):
    v = make_vectors(pv)
    assert (v + make_vectors(pv, embedding=None)).embedding is None
    assert (make_vectors(pv, embedding=None) + v).embedding is None


def test_a_sum_has_a_provenance_only_if_both_have_one(pv):
    provenance = make_provenance(pv)
    known, unknown = make_vectors(pv, provenance=provenance), make_vectors(pv)
    assert (known + unknown).provenance is None
    assert (unknown + known).provenance is None
    assert (known + known).provenance.model == provenance.model
    assert (known + known).provenance.settings["combined"]["right"] == provenance.settings


def test_the_residual_norm_of_a_sum_is_the_mean_of_those_measured(pv):
    v, w = make_vectors(pv), replace(make_vectors(pv, seed=5), residual_norm=torch.tensor([math.nan, 1, 2, 3]))
    total = (v + w).residual_norm
    torch.testing.assert_close(total[0], v.residual_norm[0])
    torch.testing.assert_close(total[1:], (v.residual_norm[1:] + w.residual_norm[1:]) / 2)
    assert (v.at(0) + w.at(0)).residual_norm == v.at(0).residual_norm
    assert (w.at(0) + w.at(0)).residual_norm is None
    assert (v.at(1) + w.at(1)).residual_norm == pytest.approx(float(total[1]))


def test_only_numbers_scale_a_vector(pv):
    v = make_vectors(pv)
    for wrong in (
        lambda: v * v,
        lambda: v * torch.ones(N_LAYERS, 1),
        lambda: torch.ones(N_LAYERS, 1) * v,
        lambda: v / v,
    ):
        with pytest.raises(TypeError):
            wrong()


def test_only_vectors_of_one_kind_are_added(pv, shapes_unchecked):
    v = make_vectors(pv)
    for wrong in (
        lambda: v + 1,
        lambda: v - v.at(0),
        lambda: v.at(0) + v,
        lambda: v / "2",
        lambda: v * v,
    ):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()


def test_dividing_by_zero_is_refused(pv):
    with pytest.raises(ValueError, match="evil / 0: the direction at layer 0 holds NaN or infinite values"):
        _ = make_vectors(pv) / 0


@pytest.mark.parametrize(
    ("parts", "fact"),
    [
        ({"directions": torch.ones(3, D_MODEL), "residual_norm": torch.ones(3)}, r"n_layers \(4 and 3\)"),
        ({"directions": torch.ones(N_LAYERS, 5), "embedding": None}, r"d_model \(6 and 5\)"),
        ({"position": "prompt_last"}, r"position \(response_mean and prompt_last\)"),
    ],
)
def test_unlike_vectors_are_not_added(pv, parts, fact):
    v = make_vectors(pv)
    with pytest.raises(ValueError, match=f"evil and evil differ in {fact}: combine or compare like with like"):
        _ = v + replace(v, **parts)


def test_vectors_at_different_layers_are_not_added(pv):
    v = make_vectors(pv)
    with pytest.raises(ValueError, match=r"differ in layer \(1 and 2\)"):
        _ = v.at(1) - v.at(2)


def test_single_vectors_of_different_positions_are_not_added(pv):
    v = make_vectors(pv)
    with pytest.raises(ValueError, match=r"differ in position \(response_mean and prompt_last\)"):
        _ = v.at(1) + replace(v, position="prompt_last").at(1)


def test_vectors_in_different_residual_bases_are_not_added(pv):
    raw = make_vectors(pv, provenance=make_provenance(pv, ToyModel(normalization="LN")))
    centred = make_vectors(pv, provenance=make_provenance(pv, ToyModel(normalization="LN", centred=True)))
    with pytest.raises(ValueError, match=r"differ in residual basis \(raw and centred\)"):
        _ = raw + centred


def test_vectors_of_unrelated_models_are_not_added_while_both_models_are_known(pv):
    v = make_vectors(pv, provenance=make_provenance(pv))
    w = make_vectors(pv, provenance=make_provenance(pv, ToyModel(seed=1)))
    with pytest.raises(ValueError, match=r"come from unrelated models \(toy-0 and toy-1\)"):
        _ = v + w
    assert (v + replace(w, provenance=None)).provenance is None


def test_vectors_of_a_model_and_its_finetuned_self_are_added(pv):
    v = make_vectors(pv, provenance=make_provenance(pv))
    w = make_vectors(pv, provenance=make_provenance(pv, ToyModel().finetuned()))
    assert (w - v).provenance.model == w.provenance.model


# Construction


def test_directions_are_kept_as_float32_on_the_cpu_whatever_came(pv):
    directions = random_tensor(N_LAYERS, D_MODEL).double().requires_grad_()
    v = pv.PersonaVectors.from_directions(directions, trait="evil", embedding=torch.ones(D_MODEL, dtype=torch.bfloat16))
    for tensor in (v.directions, v.residual_norm, v.embedding, v.at(0).direction):
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert not tensor.requires_grad


def test_changing_a_tensor_after_construction_changes_no_vector(pv):
    directions = random_tensor(N_LAYERS, D_MODEL)
    v = pv.PersonaVectors.from_directions(directions, trait="evil")
    before = v.directions.clone()
    directions.zero_()
    v.at(0).direction.zero_()
    assert_same_bits(v.directions, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_direction_that_is_not_finite_is_refused_by_trait_and_first_layer(pv, bad):
    directions = torch.ones(N_LAYERS, D_MODEL)
    directions[2, 1] = directions[3, 0] = bad
    with pytest.raises(ValueError, match="evil: the direction at layer 2 holds NaN or infinite values"):
        pv.PersonaVectors.from_directions(directions, trait="evil")
    with pytest.raises(ValueError, match="evil: the direction at layer 17 holds NaN or infinite values"):
        pv.PersonaVector("evil", 17, directions[2])


def test_a_direction_that_overflows_float32_is_refused(pv):
    with pytest.raises(ValueError, match="an overflow"):
        pv.PersonaVectors.from_directions(torch.full((1, 2), 1e300, dtype=torch.float64), trait="evil")


def test_an_embedding_row_that_is_not_finite_is_refused(pv):
    with pytest.raises(ValueError, match="evil: the embedding row holds NaN or infinite values"):
        make_vectors(pv, embedding=torch.full((D_MODEL,), math.nan))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf])
def test_a_residual_norm_is_positive_or_not_measured(pv, bad):
    with pytest.raises(ValueError, match="a residual norm is positive, or NaN where it was not measured"):
        replace(make_vectors(pv), residual_norm=torch.tensor([1.0, bad, math.nan, 1.0]))


def test_a_position_that_does_not_exist_is_refused(pv, shapes_unchecked):
    with pytest.raises(ValueError, match=r"position is one of .*'prompt_last'.*, got 'response_last'"):
        make_vectors(pv, position="response_last")


@pytest.mark.parametrize("shape", [(D_MODEL,), (1, N_LAYERS, D_MODEL), (0, D_MODEL)])
def test_directions_without_one_row_a_layer_are_refused(pv, shapes_unchecked, shape):
    with pytest.raises(ValueError, match=r"directions have shape \[layer, d_model\], got .*: pass one row a layer"):
        pv.PersonaVectors.from_directions(torch.ones(shape), trait="evil")


def test_a_direction_with_layers_is_no_single_vector(pv, shapes_unchecked):
    with pytest.raises(ValueError, match=r"one layer's direction has shape \[d_model\], got \[4, 6\]"):
        pv.PersonaVector("evil", 0, torch.ones(N_LAYERS, D_MODEL))


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"residual_norm": torch.ones(3)}, r"residual_norm of shape \[4\], got \[3\]"),
        ({"embedding": torch.ones(5)}, r"embedding of shape \[6\], got \[5\]"),
    ],
)
def test_parts_of_other_shapes_are_refused(pv, shapes_unchecked, part, expected):
    with pytest.raises(ValueError, match=f"evil: the directions need {expected}"):
        replace(make_vectors(pv), **part)


def test_statistics_of_other_layers_are_refused(pv):
    with pytest.raises(ValueError, match=r"the directions need statistics of shape \[3\], got \[4\]"):
        pv.PersonaVectors("evil", torch.ones(3, 2), torch.ones(3), statistics=make_statistics(pv))


def test_a_provenance_of_another_shape_is_refused(pv):
    with pytest.raises(ValueError, match=r"a provenance with a model of shape \[4, 6\], got \[9, 6\]"):
        make_vectors(pv, provenance=make_provenance(pv, ToyModel(n_layers=9)))


def test_statistics_need_one_value_a_layer(pv, shapes_unchecked):
    with pytest.raises(ValueError, match=r"split_half has shape \[1\]: every statistic needs one value a layer"):
        replace(make_statistics(pv), split_half=torch.ones(1))


def test_the_embedding_row_needs_the_statistics_of_the_layers(pv):
    with pytest.raises(ValueError, match=r"missing or unknown: .*'auc'.*'held_out_auc'"):
        replace(make_statistics(pv), embedding={"auc": 0.5})


def test_settings_that_are_no_json_are_refused_before_anything_is_saved(pv):
    with pytest.raises(ValueError, match="Provenance settings are kept as JSON, and these cannot be"):
        make_provenance(pv, settings={"model": object()})
    with pytest.raises(ValueError, match="Provenance settings are kept as JSON, and these cannot be"):
        make_provenance(pv, settings={"temperature": math.nan})


# Reading


def test_at_gives_the_row_with_what_is_known_of_it(pv):
    v = make_vectors(pv, provenance=make_provenance(pv), position="prompt_last")
    one = v.at(2)
    assert_same_bits(one.direction, v.directions[2])
    assert (one.trait, one.layer, one.position) == ("evil", 2, "prompt_last")
    assert one.residual_norm == float(v.residual_norm[2])
    assert one.provenance is v.provenance


@pytest.mark.parametrize("layer", [-1, N_LAYERS])
def test_a_layer_outside_the_model_is_refused_with_the_convention(pv, layer):
    with pytest.raises(ValueError, match=f"layer {layer} is outside 0 to 3; .* the paper's layer 20 is 19"):
        make_vectors(pv).at(layer)


def test_a_residual_norm_that_was_not_measured_is_missing_and_not_zero(pv):
    v = pv.PersonaVectors.from_directions(torch.ones(2, 3), trait="mine")
    assert v.at(0).residual_norm is None
    assert v.relative_norms.isnan().all()


def test_relative_norms_are_norms_over_the_residual_norm(pv):
    v = make_vectors(pv)
    expected = [
        math.dist(row, [0] * D_MODEL) / float(norm) for row, norm in zip(v.directions, v.residual_norm, strict=True)
    ]
    torch.testing.assert_close(v.relative_norms, torch.tensor(expected))


def test_reprs_are_short_and_name_the_model(pv):
    v = make_vectors(pv, provenance=make_provenance(pv), statistics=make_statistics(pv))
    assert repr(v) == (
        "PersonaVectors('evil', n_layers=4, d_model=6, position='response_mean', "
        "counts={'positive': 5, 'negative': 4}, model='toy-0')"
    )
    assert "increments=True" in repr(v.incremental())
    assert repr(v.at(1)) == f"PersonaVector('evil', layer=1, d_model=6, norm={v.at(1).norm:.4g}, model='toy-0')"
    auc = v.statistics.held_out_auc
    assert f"best held_out_auc: {float(auc.max()):.3f} at layer {int(auc.argmax())}" in repr(v.statistics)
    unknown = replace(v.statistics, held_out_auc=torch.full((N_LAYERS,), math.nan))
    assert "best held_out_auc: undefined" in repr(unknown)


def test_the_table_has_the_embedding_row_first_and_a_row_a_layer(pv):
    v = make_vectors(pv, statistics=make_statistics(pv))
    table = v.table()
    assert list(table.index) == ["embedding", *range(N_LAYERS)]
    assert table.index.name == "layer"
    assert list(table.columns) == ["norm", "relative_norm", *v.statistics.by_layer]
    assert table.loc["embedding", "held_out_auc"] == 0.1
    assert math.isnan(table.loc["embedding", "relative_norm"])
    assert table.loc[3, "norm"] == pytest.approx(v.at(3).norm)
    assert table.loc[1, "placebo_auc_95"] == float(v.statistics.placebo_auc_95[1])


def test_the_table_without_embedding_row_or_statistics_has_the_norms_of_the_layers(pv):
    table = make_vectors(pv, embedding=None).table()
    assert list(table.index) == list(range(N_LAYERS))
    assert list(table.columns) == ["norm", "relative_norm"]
    assert list(make_vectors(pv).table().index) == ["embedding", *range(N_LAYERS)]


# Projection


def slow_projection(activation, direction):
    length = math.sqrt(sum(float(x) ** 2 for x in direction))
    return sum(float(a) * float(x) for a, x in zip(activation, direction, strict=True)) / length


@given(seed=SEEDS, scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e25]))
def test_projection_equals_the_slow_obvious_one_at_any_scale_of_the_vector(pv, seed, scale):
    v = scale * make_vectors(pv, seed=seed)
    means = random_tensor(2, 3, N_LAYERS, D_MODEL, seed=seed + 7)
    slow = torch.tensor(
        [
            [[slow_projection(means[i, j, k], v.directions[k]) for k in range(N_LAYERS)] for j in range(3)]
            for i in range(2)
        ]
    )
    torch.testing.assert_close(v.project(means), slow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(v.at(1).project(means[..., 1, :]), slow[..., 1], rtol=1e-4, atol=1e-5)


def test_the_projection_of_a_vector_on_itself_is_its_norm(pv):
    v = make_vectors(pv)
    torch.testing.assert_close(v.project(v.directions), v.norms)
    assert float(v.at(0).project(v.directions[0])) == pytest.approx(v.at(0).norm)


def test_projections_of_half_precision_activations_are_computed_in_float32(pv):
    v, activations = make_vectors(pv), random_tensor(5, D_MODEL).bfloat16()
    assert v.at(0).project(activations).dtype == torch.float32
    torch.testing.assert_close(v.at(0).project(activations), v.at(0).project(activations.float()))


def test_projections_carry_gradients_to_the_activations(pv):
    activations = random_tensor(5, D_MODEL).requires_grad_()
    v = make_vectors(pv).at(0)
    v.project(activations).sum().backward()
    torch.testing.assert_close(activations.grad, v.unit.direction.expand(5, -1))


@given(seed=SEEDS, factor=FACTORS)
def test_a_unit_has_norm_one_and_the_sign_of_its_vector(pv, seed, factor):
    v = make_vectors(pv, seed=seed).at(0)
    assert (factor * v).unit.norm == pytest.approx(1)
    torch.testing.assert_close((factor * v).unit.direction, math.copysign(1, factor) * v.unit.direction)


def test_a_zero_direction_is_kept_but_has_no_unit(pv):
    v = make_vectors(pv)
    zero = v - v
    refused = "evil - evil: the direction at layer 0 is exactly zero and has no unit vector"
    for use in (
        lambda: zero.at(0).unit,
        lambda: zero.project(v.directions),
        lambda: v.cosine_similarity(zero),
        lambda: zero.at(0).cosine_similarity(v.at(0)),
    ):
        with pytest.raises(ValueError, match=refused):
            use()
    with pytest.raises(ValueError, match="at layer 2 is exactly zero"):
        zero.at(2).project(v.directions)


def test_activations_of_another_width_are_refused(pv):
    with pytest.raises(ValueError, match="the vector is 6 wide and the activations are 5"):
        make_vectors(pv).at(0).project(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"the vectors are \[4, 6\] and the means \[3, 6\]"):
        make_vectors(pv).project(torch.ones(2, 3, D_MODEL))


def make_cache(batch=2, pos=3):
    return {
        f"blocks.{layer}.hook_resid_post": random_tensor(batch, pos, D_MODEL, seed=layer) for layer in range(N_LAYERS)
    }


def test_projecting_a_cache_projects_every_token_at_every_layer(pv):
    from transformer_lens import ActivationCache

    v, cache = make_vectors(pv), make_cache()
    projected = v.project_cache(ActivationCache(cache, None))
    assert projected.shape == (N_LAYERS, 2, 3)
    for layer in range(N_LAYERS):
        torch.testing.assert_close(projected[layer], v.at(layer).project(cache[v.hook_names[layer]]))
    torch.testing.assert_close(v.project_cache(cache), projected)


def test_a_cache_without_batch_dimension_gives_a_row_a_layer(pv):
    cache = {name: activations[0] for name, activations in make_cache().items()}
    assert make_vectors(pv).project_cache(cache).shape == (N_LAYERS, 3)


def test_a_cache_that_lacks_layers_is_refused_with_the_filter_to_use(pv):
    v, cache = make_vectors(pv), make_cache()
    del cache["blocks.2.hook_resid_post"]
    with pytest.raises(
        ValueError, match=r"the cache lacks blocks.2.hook_resid_post: .*names_filter=vectors.hook_names"
    ):
        v.project_cache(cache)
    with pytest.raises(ValueError, match=r"blocks.2.hook_resid_post and 1 more"):
        v.project_cache({})


@given(seed=SEEDS, factor=FACTORS)
def test_cosine_similarity_ignores_length_and_keeps_sign(pv, seed, factor):
    v = make_vectors(pv, seed=seed)
    sign = math.copysign(1, factor)
    torch.testing.assert_close(v.cosine_similarity(factor * v), torch.full((N_LAYERS,), sign))
    assert v.at(1).cosine_similarity(factor * v.at(1)) == pytest.approx(sign)


def test_cosine_similarity_compares_positions_and_layers_but_not_widths(pv):
    v = make_vectors(pv)
    torch.testing.assert_close(v.cosine_similarity(replace(v, position="prompt_last")), torch.ones(N_LAYERS))
    assert abs(v.at(0).cosine_similarity(v.at(1))) < 1
    with pytest.raises(ValueError, match="differ in d_model"):
        v.cosine_similarity(pv.PersonaVectors.from_directions(torch.ones(N_LAYERS, 5), trait="evil"))


def test_the_cosine_matrix_holds_the_cosine_of_each_pair_of_traits(pv):
    traits = [make_vectors(pv, seed=seed, trait=name) for seed, name in enumerate(["evil", "optimistic", "impolite"])]
    matrix = pv.cosine_matrix(traits, layer=1)
    for row in traits:
        for column in traits:
            expected = float(row.cosine_similarity(column)[1])
            assert matrix.loc[row.trait, column.trait] == pytest.approx(expected, abs=1e-6)


def test_a_cosine_matrix_of_unlike_vectors_is_refused(pv):
    deeper = pv.PersonaVectors.from_directions(torch.ones(9, D_MODEL), trait="optimistic")
    with pytest.raises(ValueError, match=r"evil and optimistic differ in n_layers \(4 and 9\)"):
        pv.cosine_matrix([make_vectors(pv), deeper], layer=1)


def test_a_cosine_matrix_of_nothing_is_refused(pv):
    with pytest.raises(ValueError, match="There are no vectors to compare"):
        pv.cosine_matrix([], layer=0)


# Difference in means


@given(seed=SEEDS, positive=st.integers(1, 5), negative=st.integers(1, 5))
def test_the_difference_in_means_equals_the_slow_obvious_one(pv, seed, positive, negative):
    plus = random_tensor(positive, 2, 3, seed=seed)
    minus = random_tensor(negative, 2, 3, seed=seed + 1)
    slow = sum(row.double() for row in plus) / positive - sum(row.double() for row in minus) / negative
    delta = pv.difference_in_means(plus, minus)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, slow.float())


def test_a_small_difference_survives_a_large_common_offset(pv):
    minus = torch.full((1000, 1, 1), 4096.0)
    plus = minus.clone()
    plus[0] += 0.5
    assert float(pv.difference_in_means(plus, minus)) == pytest.approx(0.0005, rel=1e-6)


def test_an_empty_side_is_refused(pv):
    some, none = torch.ones(1, 2, 3), torch.ones(0, 2, 3)
    with pytest.raises(ValueError, match="There is no positive response"):
        pv.difference_in_means(none, some)
    with pytest.raises(ValueError, match="There is no negative response"):
        pv.difference_in_means(some, none)


def test_a_response_without_tokens_is_refused_by_its_row(pv):
    means = torch.ones(4, 2, 3)
    means[2, 0] = means[3, 1] = math.nan
    with pytest.raises(ValueError, match="2 negative responses hold NaN or infinite values, the first in row 2"):
        pv.difference_in_means(torch.ones(1, 2, 3), means)


def test_sides_of_different_shapes_are_refused(pv, shapes_unchecked):
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[1, 3\]: take both from one model"):
        pv.difference_in_means(torch.ones(4, 2, 3), torch.ones(4, 1, 3))


# Files


@pytest.mark.parametrize("embedding", [True, False])
def test_saving_and_loading_gives_back_the_same_bits(pv, tmp_path, embedding):
    v = make_vectors(pv, provenance=make_provenance(pv), statistics=make_statistics(pv, embedding=embedding))
    v.save(tmp_path / "evil.safetensors")
    assert_same_value(pv.PersonaVectors.load(tmp_path / "evil.safetensors"), v)


def test_saving_and_loading_keeps_what_is_missing_missing(pv, tmp_path):
    v = pv.PersonaVectors.from_directions(random_tensor(N_LAYERS, D_MODEL).T.contiguous().T, trait="Böse 悪")
    v.save(str(tmp_path / "mine.safetensors"))
    assert_same_value(pv.PersonaVectors.load(str(tmp_path / "mine.safetensors")), v)


def test_saving_and_loading_keeps_increments_as_increments(pv, tmp_path):
    v = make_vectors(pv, position="prompt_mean").incremental()
    v.save(tmp_path / "evil.safetensors")
    loaded = pv.PersonaVectors.load(tmp_path / "evil.safetensors")
    assert_same_value(loaded, v)
    assert loaded.increments


def test_saving_replaces_an_older_file_and_leaves_nothing_else(pv, tmp_path):
    make_vectors(pv).save(tmp_path / "evil.safetensors")
    make_vectors(pv, seed=3).save(tmp_path / "evil.safetensors")
    assert os.listdir(tmp_path) == ["evil.safetensors"]
    assert_same_value(pv.PersonaVectors.load(tmp_path / "evil.safetensors"), make_vectors(pv, seed=3))


def test_a_save_that_fails_leaves_the_older_file_whole(pv, tmp_path, monkeypatch):
    path = tmp_path / "evil.safetensors"
    make_vectors(pv).save(path)

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match=r"Cannot write .*evil.safetensors \(No space left on device\): name a file in"):
        make_vectors(pv, seed=3).save(path)
    assert os.listdir(tmp_path) == ["evil.safetensors"]
    assert_same_value(pv.PersonaVectors.load(path), make_vectors(pv))


def test_saving_into_a_missing_folder_is_refused_in_one_sentence(pv, tmp_path):
    with pytest.raises(OSError, match=r"Cannot write .*missing/evil.safetensors \(No such file or directory\): name a"):
        make_vectors(pv).save(tmp_path / "missing" / "evil.safetensors")


def test_saving_under_a_file_is_refused_in_one_sentence(pv, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"\(Not a directory\): name a file in an existing folder"):
        make_vectors(pv).save(tmp_path / "file" / "evil.safetensors")


def test_saving_under_another_ending_is_refused(pv, tmp_path):
    with pytest.raises(ValueError, match=r"saved as .safetensors, got 'evil.pt': change the ending"):
        make_vectors(pv).save(tmp_path / "evil.pt")


def test_loading_a_missing_file_says_so(pv, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"evil.safetensors"):
        pv.PersonaVectors.load(tmp_path / "evil.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_that_was_cut_short_is_refused(pv, tmp_path, kept):
    path = tmp_path / "evil.safetensors"
    make_vectors(pv).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=r"evil.safetensors is not a whole safetensors file .*: copy it or save it again"
    ):
        pv.PersonaVectors.load(path)


def test_a_pickle_is_refused_unread(pv, tmp_path):
    torch.save({"directions": torch.ones(2, 3)}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        pv.PersonaVectors.load(tmp_path / "evil.pt")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_of_someone_else_is_refused(pv, tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"directions": torch.ones(2, 3)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"was not saved by persona_lens: .*PersonaVectors.from_directions"):
        pv.PersonaVectors.load(path)


def save_with_header(path, header, **tensors):
    safetensors.torch.save_file(tensors, path, metadata={"persona_lens": header})


def test_a_file_of_another_format_version_is_refused(pv, tmp_path):
    save_with_header(tmp_path / "v.safetensors", '{"format_version": 2}', directions=torch.ones(2, 3))
    with pytest.raises(ValueError, match="has format version 2, and this persona_lens reads 1: install"):
        pv.PersonaVectors.load(tmp_path / "v.safetensors")


@pytest.mark.parametrize("header", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "provenance": 3}'])
def test_a_damaged_header_is_refused(pv, tmp_path, header):
    save_with_header(tmp_path / "v.safetensors", header, directions=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"v.safetensors has a damaged header \(.*\): copy it or save it again"):
        pv.PersonaVectors.load(tmp_path / "v.safetensors")


def test_tensors_that_make_no_vectors_are_refused_with_the_file(pv, tmp_path):
    path = tmp_path / "v.safetensors"
    make_vectors(pv).save(path)
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()["persona_lens"]
    save_with_header(path, header, directions=torch.full((2, 3), math.nan), residual_norm=torch.ones(2))
    with pytest.raises(ValueError, match=r"v.safetensors does not hold whole persona vectors: .*layer 0 holds NaN"):
        pv.PersonaVectors.load(path)


# Models


def test_vectors_remember_the_model_that_they_were_made_with(pv):
    from persona_lens.models import identify

    model = ToyModel()
    v = pv.PersonaVectors.from_directions(torch.ones(N_LAYERS, D_MODEL), trait="mine", model=model)
    assert v.provenance.model == identify(model)
    assert v.provenance.settings == {"source": "from_directions"}
    assert str(torch.__version__).startswith(v.provenance.library_versions["torch"])
    assert v.provenance.created.endswith("+00:00")


def test_the_hook_point_of_a_provenance_is_the_one_that_models_names(pv):
    from persona_lens.models import resid_post_name

    assert pv.HOOK_POINT.format(layer=7) == resid_post_name(7)


def test_the_model_of_the_vectors_is_the_same(pv):
    v = make_vectors(pv, provenance=make_provenance(pv))
    assert v.check(ToyModel()) == "same"
    assert v.at(0).check(ToyModel()) == "same"


def test_the_same_weights_in_another_model_class_are_the_same(pv):
    assert make_vectors(pv, provenance=make_provenance(pv)).check(OtherClassOfToyModel()) == "same"


def test_a_finetuned_model_of_the_same_base_is_adapted(pv):
    v = make_vectors(pv, provenance=make_provenance(pv))
    assert v.check(ToyModel().finetuned()) == "adapted"
    assert v.at(0).check(ToyModel().finetuned()) == "adapted"


def test_an_adapter_that_leaves_the_embeddings_alone_makes_the_model_adapted(pv):
    model = ToyModel()
    torch.nn.init.constant_(model.blocks.get_parameter("0.weight"), 1.5)
    assert make_vectors(pv, provenance=make_provenance(pv)).check(model) == "adapted"


def test_an_unrelated_model_of_equal_shape_needs_permission(pv):
    v = make_vectors(pv, provenance=make_provenance(pv))
    for vector in (v, v.at(0)):
        with pytest.raises(ValueError, match=r"come from toy-0, and toy-1 has unrelated .*allow_other_model=True"):
            vector.check(ToyModel(seed=1))
        assert vector.check(ToyModel(seed=1), allow_other_model=True) == "other"


@pytest.mark.parametrize("sample", [(1.0,) * 256, (), (1.0, 2.0)])
def test_embeddings_that_cannot_be_compared_are_unrelated(pv, sample):
    provenance = make_provenance(pv)
    found = replace(provenance.model, weights_hash="another", embedding_sample=sample)
    assert provenance.relation_to(found) == "other"


def test_vectors_without_provenance_fit_any_model_of_their_shape_as_unknown(pv):
    assert make_vectors(pv).check(ToyModel(seed=1)) == "unknown"
    assert make_vectors(pv).at(0).check(ToyModel(seed=1)) == "unknown"


def test_a_model_of_another_width_is_refused(pv):
    v = make_vectors(pv)
    for vector in (v, v.at(0)):
        with pytest.raises(ValueError, match="evil: the vectors expect d_model 6, and toy-0 has 8: use the model that"):
            vector.check(ToyModel(d_model=8), allow_other_model=True)


def test_a_model_of_another_depth_is_refused(pv):
    v = make_vectors(pv, provenance=make_provenance(pv))
    for vector in (v, replace(v, provenance=None), v.at(0)):
        with pytest.raises(ValueError, match="the vectors expect n_layers 4, and toy-0 has 5: use the model that"):
            vector.check(ToyModel(n_layers=5), allow_other_model=True)


def test_a_vector_of_unknown_origin_above_the_last_block_is_refused(pv):
    with pytest.raises(ValueError, match="layer 3 is outside 0 to 1"):
        make_vectors(pv).at(3).check(ToyModel(n_layers=2))


def test_vectors_of_another_hook_point_are_refused(pv):
    v = make_vectors(pv, provenance=make_provenance(pv, hook_point="blocks.{layer}.hook_resid_mid"))
    with pytest.raises(ValueError, match=r"expect hook point blocks.\{layer\}.hook_resid_mid, and toy-0 has blocks"):
        v.check(ToyModel(), allow_other_model=True)


def test_raw_vectors_are_refused_on_a_centred_model(pv):
    v = make_vectors(pv, provenance=make_provenance(pv, ToyModel(normalization="LN")))
    with pytest.raises(
        ValueError, match="expect residual basis raw, and toy-0 has centred: load the model with weights"
    ):
        v.check(ToyModel(normalization="LN", centred=True), allow_other_model=True)
