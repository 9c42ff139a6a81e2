"""Which rows run together: every row once, within the budget, and no cheaper cut of the sorted rows."""

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from persona_lens.activations.prefixes import PASS_SHARE, length_sorted_batches


@given(lengths=st.lists(st.integers(0, 50), max_size=40), budget=st.integers(1, 200))
def test_every_index_is_once_in_a_batch_within_the_budget(lengths, budget):
    batches = list(length_sorted_batches(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
    ordered = [lengths[index] for batch in batches for index in batch]
    assert ordered == sorted(lengths, reverse=True)


def cost(batches, budget):
    return sum(len(batch) * max(batch) + budget / PASS_SHARE for batch in batches)


def cuts(ordered):
    """Every way to cut sorted lengths into batches."""
    for size in range(len(ordered)):
        for cut in combinations(range(1, len(ordered)), size):
            yield [ordered[start:stop] for start, stop in pairwise((0, *cut, len(ordered)))]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=9), budget=st.integers(1, 200))
def test_no_other_cut_of_the_sorted_rows_costs_less(lengths, budget):
    fitting = [
        batches
        for batches in cuts(sorted(lengths, reverse=True))
        if all(len(batch) == 1 or len(batch) * batch[0] <= budget for batch in batches)
    ]
    found = [[lengths[index] for index in batch] for batch in length_sorted_batches(lengths, budget)]
    assert cost(found, budget) == min(cost(batches, budget) for batches in fitting)


def test_a_batch_ends_where_padding_would_cost_more_than_a_pass():
    assert list(length_sorted_batches([40, 9, 40, 8, 10], 512)) == [[0, 2], [4, 1, 3]]


def test_of_equal_cuts_the_longest_batch_comes_first():
    assert [len(batch) for batch in length_sorted_batches([12] * 20, 144)] == [12, 8]


def test_lengths_that_differ_little_share_a_pass():
    assert len(list(length_sorted_batches([30, 29, 28, 27], 512))) == 1
