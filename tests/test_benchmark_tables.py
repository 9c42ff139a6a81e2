"""The figures that the benchmarks' page shows are those of its results file."""

import json

import pytest

from benchmarks.report import merged
from benchmarks.tables import BEGIN, PAGE, RESULTS, with_tables


def test_the_pages_tables_are_those_of_the_results():
    page = PAGE.read_text("utf-8")
    assert with_tables(page, json.loads(RESULTS.read_text("utf-8"))) == page


def test_a_page_without_a_place_for_tables_is_refused():
    results = {"comparisons": [], "measures": []}
    with pytest.raises(ValueError, match="expected '<!-- tables: begin -->' and then"):
        with_tables(f"Figures: {BEGIN}", results)


def test_a_later_run_replaces_its_own_workloads_and_leaves_the_others():
    def results(seconds, *names):
        return {"machine": {}, "comparisons": [{"name": name, "workload": "w", "s": seconds} for name in names]}

    both = merged(results(1, "one", "two") | {"measures": []}, results(2, "two", "three") | {"measures": []})
    assert [(each["name"], each["s"]) for each in both["comparisons"]] == [("one", 1), ("two", 2), ("three", 2)]
