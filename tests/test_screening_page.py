"""The page of a screening loads nothing, shows foreign text letter for letter, and has the numbers of the tables."""

import re

import pytest

from persona_lens.pages.screening import screening_html
from tests.page_cases import Page
from tests.screening_cases import SYSTEM, chat

SCRIPT = "</script><script>alert('x')</script>"
ALLOWED = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "script",
    "h1",
    "h2",
    "h3",
    "p",
    "div",
    "section",
    "header",
}
ALLOWED |= {"dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "span", "strong", "b", "i", "code"}


def row(number, answer=None, **fields):
    answer = answer or f"It is {number}, and {number} again."
    return {"messages": chat(f"Why {number}?", answer), "id": f"row {number}", "base_response": "Mine.", **fields}


def ladder(planted, n=8):
    """Samples whose scores are 0, 1, 2 ..."""
    return planted([row(number) for number in range(n)], [(number, 0, 0) for number in range(n)])


def ids(page):
    return re.findall(r"<span>(row \d+)</span>", page)


def table(page):
    """The cells of the table of data sets, by the names of their columns."""
    lines = re.findall(r"<tr>(<td.*?)</tr>", page)
    return [dict(re.findall(r'<td data-name="(.*?)">(.*?)</td>', line)) for line in lines]


def facts(page):
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def test_a_script_in_response_id_prompt_and_name_stays_text(planted):
    data = {
        f"set {SCRIPT}": [
            {
                "messages": chat(f"Why {SCRIPT}?", f"So {SCRIPT}"),
                "id": f"id {SCRIPT}",
                "base_response": f"base {SCRIPT}",
            }
        ]
    }
    page = screening_html(planted(data, [(1, 0, 0)]))
    found = Page(page)
    assert found.elements.count("script") == 2  # plotly and the picture
    assert set(found.elements) <= ALLOWED
    assert not [each for each in found.attributes if each[1].startswith("on")]
    # The picture's script has the data set's name too, as a string that cannot end the script.
    picture = page.rpartition("<script>")[2].partition("</script>\n</body>")[0]
    assert "alert" in picture
    assert "<script" not in picture
    assert "</script" not in picture
    for what in ("set", "Why", "So", "id", "base"):
        assert f"{what} {SCRIPT}" in found.text


def test_the_page_names_no_address_to_load(planted):
    page = screening_html(ladder(planted))
    found = Page(page)
    assert not [each for each in found.attributes if each[1] in {"src", "href", "srcset", "action", "data"}]
    without = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "http://" not in without
    assert "https://" not in without
    assert "url(" not in without
    (policy,) = [
        value for tag, name, value in found.attributes if (tag, name) == ("meta", "content") and "src" in value
    ]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_the_highest_and_lowest_samples_stand_in_their_order(planted):
    page = screening_html(ladder(planted), n=3)
    assert ids(page) == ["row 7", "row 6", "row 5", "row 0", "row 1", "row 2"]


def test_no_sample_stands_at_both_ends(planted):
    page = screening_html(ladder(planted, 5), n=3)
    assert ids(page) == ["row 4", "row 3", "row 2", "row 0", "row 1"]


def test_a_family_appears_once_with_how_many_more_there_are(planted):
    data = [row(number) for number in range(6)] + [row(number, "It is 5, and 5 again.") for number in (6, 7, 8)]
    page = screening_html(planted(data, [(number, 0, 0) for number in range(6)] + [(9, 0, 0)] * 3), n=3)
    assert ids(page) == ["row 6", "row 4", "row 3", "row 0", "row 1", "row 2"]
    assert page.count("3 near-duplicates more") == 1


def test_the_table_has_the_numbers_of_the_result(planted):
    data = {"mild": [row(number) for number in range(6)], "strong": [row(number) for number in range(10, 15)]}
    found = planted(
        data, [(number, 1, 0) for number in range(6)] + [(9 + number, 1, 2) for number in range(4)] + [(8, 1, None)]
    )
    scores, shown = found.dataset_scores(), table(screening_html(found, threshold=4))
    assert [cells["score [95 %]"] for cells in shown] == [
        f"{each.score:.2f} [{each.low:.2f}, {each.high:.2f}]" for each in scores.itertuples()
    ]
    assert [(cells["data set"], cells["n"], cells["no score"]) for cells in shown] == [
        ("mild", "6", "0"),
        ("strong", "4", "1"),
    ]
    assert [cells["above threshold"] for cells in shown] == ["16.7%", "100.0%"]


def test_controls_stand_in_the_table(planted):
    data = [row(number, "so " * (number + 1) + f"number {number} it is") for number in range(6)]
    data += [row(number, data[5]["messages"][-1]["content"]) for number in range(6, 10)]
    (cells,) = table(screening_html(planted(data, [(number, 0, 0) for number in range(6)] + [(50, 0, 0)] * 4)))
    assert cells["near-duplicates"] == "40.0%"
    assert cells["score without them"].startswith("2.50 [")
    assert float(cells["Spearman with length"]) > 0.9
    assert "above threshold" not in cells


def test_a_missing_score_is_no_zero_and_no_sample(planted):
    page = screening_html(planted([row(0), row(1), row(2)], [(4, 0, 0), (6, 0, None), (8, 0, 0)]))
    assert ids(page) == ["row 2", "row 0"]
    assert table(page)[0]["score [95 %]"].startswith("6.00 ")


def test_without_any_score_there_is_a_page_without_a_picture(planted):
    page = screening_html(planted([row(0), row(1)], [(4, 0, None)] * 2))
    assert "No sample has a score." in page
    assert "<script" not in page
    assert table(page)[0]["score [95 %]"] == "-"


def test_what_became_of_every_row_is_counted(planted):
    data = [row(0), row(1), row(2), {"messages": "nothing"}, {"messages": [SYSTEM]}, row(2)]
    found = facts(screening_html(planted(data, [(number, 0, 0) for number in range(6)])))
    assert found["rows read"] == "6"
    assert found["rejected"].startswith("3 (")
    for kind in ("1 malformed", "1 no response", "1 duplicate id"):
        assert kind in found["rejected"]
    assert found["left out"] == "0"
    assert found["screened"] == "3, 0 of them cut, 0 nearly repeat an earlier response"
    assert found["base responses"] == "given with the data"
    assert found["vector"] == "evil@1"


def test_long_texts_are_cut_with_the_number_of_characters_left_out(planted, monkeypatch):
    # The tiny model's context is shorter than a text that is cut.
    monkeypatch.setattr("persona_lens.pages.page.LONGEST", 30)
    answer = "Listen first, and then say what you think."
    page = screening_html(planted([row(0, answer)], [(1, 0, 0)]))
    assert f"{answer[:30]} <span class=cut>… 12 more characters</span>" in page
    assert answer[:31] not in page
    assert page.count("more character") == 1


def test_samples_above_the_threshold_are_marked(planted):
    assert screening_html(ladder(planted), n=3, threshold=5).count("<b class=over>") == 2


def test_texts_of_a_sample_are_its_last_user_turn_its_response_and_the_base_response(planted):
    turns = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "Hm."},
        *chat("Second?", "Yes it is.", False),
    ]
    text = Page(screening_html(planted([{"messages": turns}], [(1, 0, 0)]))).text
    assert "Second?" in text
    assert "Yes it is." in text
    assert "Mine." in text
    assert "First?" not in text


def test_several_vectors_need_a_name_and_each_has_its_page(planted):
    found = planted([row(number) for number in range(4)], [(number, 0, 0) for number in range(4)], vectors=2)
    with pytest.raises(ValueError, match="name one of them"):
        screening_html(found)
    assert facts(screening_html(found, vector="kind"))["vector"] == "kind@0 (also screened: evil@1)"


def test_the_next_step_names_the_files_and_a_split_of_this_vector(planted):
    text = Page(screening_html(ladder(planted))).text
    for name in ("rejects.jsonl", "Parquet files in scores", 'vector="evil@1", by="difference")'):
        assert re.sub(r"\s+", " ", name) in re.sub(r"\s+", " ", text)


def test_an_id_that_is_a_book_is_cut(planted):
    page = screening_html(planted([row(0) | {"id": "x" * 9000}, row(1)], [(1, 0, 0), (0, 0, 0)]))
    assert "x" * 121 not in page
    assert "8,880 more characters" in page
