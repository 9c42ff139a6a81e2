"""The difference in means of two sides of responses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_lens.vectors.directions import difference_in_means
from tests.vector_cases import SEEDS, random_tensor


@given(seed=SEEDS, positive=st.integers(1, 5), negative=st.integers(1, 5))
def test_the_difference_in_means_equals_the_slow_obvious_one(seed, positive, negative):
    plus = random_tensor(positive, 2, 3, seed=seed)
    minus = random_tensor(negative, 2, 3, seed=seed + 1)
    slow = sum(row.double() for row in plus) / positive - sum(row.double() for row in minus) / negative
    delta = difference_in_means(plus, minus)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, slow.float())


def test_a_small_difference_survives_a_large_common_offset():
    minus = torch.full((1000, 1, 1), 4096.0)
    plus = minus.clone()
    plus[0] += 0.5
    assert float(difference_in_means(plus, minus)) == pytest.approx(0.0005, rel=1e-6)


def test_an_empty_side_is_refused():
    some, none = torch.ones(1, 2, 3), torch.ones(0, 2, 3)
    with pytest.raises(ValueError, match="There is no positive response"):
        difference_in_means(none, some)
    with pytest.raises(ValueError, match="There is no negative response"):
        difference_in_means(some, none)


def test_a_response_without_tokens_is_refused_by_its_row():
    means = torch.ones(4, 2, 3)
    means[2, 0] = means[3, 1] = math.nan
    with pytest.raises(ValueError, match="2 negative responses hold NaN or infinite values, the first in row 2"):
        difference_in_means(torch.ones(1, 2, 3), means)


def test_sides_of_different_shapes_are_refused(shapes_unchecked):
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[1, 3\]: take both from one model"):
        difference_in_means(torch.ones(4, 2, 3), torch.ones(4, 1, 3))
