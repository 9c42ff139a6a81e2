"""A page of tokens shows the model's text letter for letter, never as markup, in the colours of its numbers."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.monitoring.result import (
    ChatProjections,
    MonitoredVector,
    Monitoring,
    TokenProjections,
    TurnProjections,
)
from persona_lens.monitoring.thresholds import Threshold
from persona_lens.pages.tokens import monitoring_html, tokens_html

PIECES = [
    "Hello",
    " world",
    "\n",
    "<script>alert('x')</script>",
    " & \"quotes\" 'too'",
    "{braces}",
    "</span><img src=x>",
]
VALUES = [0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 0.25]
ALLOWED = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "input", "label", "div", "main"}
ALLOWED |= {"section", "span", "i", "b", "u"}


class Page(HTMLParser):
    """The page's elements, and its tokens with their attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.attributes, self.tokens, self.headings, self.open = [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.elements.append(tag)
        self.attributes += [(tag, *each) for each in attrs]
        self.open.append((tag, "t" in (found.get("class") or "").split()))
        if self.open[-1][1]:
            self.tokens.append({**found, "text": "", "sign": ""})

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "h2":
            self.headings.append((len(self.tokens), data))
        if any(token for _, token in self.open):
            self.tokens[-1]["sign" if self.open[-1][0] == "i" else "text"] += data


def alpha(token, vector=0):
    """How opaque a token's colour is, with a minus on the blue side; None without one."""
    found = re.search(rf"--c{vector}:#(......)(..)", token["style"])
    return None if found is None else int(found[2], 16) * {"d55e00": 1, "0072b2": -1}[found[1]]


def page(pieces=PIECES, values=VALUES, **parts):
    return Page(tokens_html(pieces, values, title="a text", **parts))


def monitoring(**parts):
    def kept(pieces, n_prompt, seed):
        return TokenProjections(
            pieces, n_prompt, torch.randn(len(pieces), 2, generator=torch.Generator().manual_seed(seed))
        )

    first = TurnProjections(1, (0.0, 0.0), (1.0, 1.0), 2, tokens=kept(("<|im_start|>", "Hi", "Good", " day"), 2, 1))
    last = TurnProjections(3, (0.0, 0.0), None, 0, tokens=kept(("And", "?"), 2, 2))
    vectors = (MonitoredVector("evil", 14, "aaaaaaaa"), MonitoredVector("polite", 18, "bbbbbbbb"))
    return Monitoring(vectors, (ChatProjections("talk", (first, last)),), **parts)


def threshold(**parts):
    made = {"trait": "polite", "layer": 18, "fingerprint": "bbbbbbbb", "of": "token", "value": 0.1, "percentile": 95.0}
    return Threshold(**{**made, "interval": None, "n": 400, "n_chats": 40, **parts})


def test_the_text_is_shown_letter_for_letter():
    assert [token["text"] for token in page().tokens] == PIECES


@settings(max_examples=60)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Co", "Zl", "Zp"]), min_size=1), min_size=1)
)
def test_no_text_becomes_markup(pieces):
    found = page(pieces, [0.5] * len(pieces), names=[pieces[0]], turns=[(0, pieces[-1])], notes=pieces[:2])
    assert [token["text"] for token in found.tokens] == pieces
    assert set(found.elements) <= ALLOWED
    assert found.elements.count("section") == 1


def test_a_script_in_text_title_names_notes_and_headings_is_only_text():
    bad = "</title></style><script>alert(1)</script>\" onload='x"
    shown = tokens_html([bad], [1.0], title=bad, names=[bad], turns=[(0, bad)], notes=[bad])
    found = Page(shown)
    assert set(found.elements) <= ALLOWED
    assert "<script" not in shown
    assert not [each for each in found.attributes if each[1].startswith("on")]


def test_the_page_loads_nothing_and_runs_nothing():
    shown = tokens_html(PIECES, VALUES, title="a text")
    found = Page(shown)
    assert not [each for each in found.attributes if each[1] in {"src", "href", "srcset", "action"}]
    assert "url(" not in shown
    assert "@import" not in shown
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes


@pytest.mark.parametrize(
    ("piece", "text", "sign"),
    [
        ("\n\n", "\n\n", "↵↵"),
        ("\t", "\t", "⇥"),
        ("\u202eabc", "abc", "U+202E"),
        ("\x00", "", "U+0000"),
        ("\ud800", "", "U+D800"),
        ("", "", "⋯"),
    ],
)
def test_what_cannot_be_seen_has_a_sign(piece, text, sign):
    shown = tokens_html([piece], [1.0], title="a text")
    (token,) = Page(shown).tokens
    assert (token["text"], token["sign"]) == (text, sign)
    shown.encode("utf-8")


def test_colours_have_the_side_of_the_number_and_grow_with_it():
    found = [alpha(token) for token in page(list("abcde"), [-2.0, -1.0, 0.0, 1.0, 2.0]).tokens]
    assert found[2] == 0
    assert found == sorted(found)
    assert found[0] == -found[4] != 0
    assert found[3] == pytest.approx(found[4] / 2, rel=0.05)


def test_colours_diverge_from_a_given_neutral_value_or_from_the_median():
    values = [9.0, 10.0, 12.0]
    assert [np.sign(alpha(token)) for token in page(list("abc"), values, neutral=10.0).tokens] == [-1, 0, 1]
    assert [alpha(token) for token in page(list("abc"), values, neutral="median").tokens] == [
        alpha(token) for token in page(list("abc"), values, neutral=10.0).tokens
    ]


def test_one_extreme_token_does_not_bleach_the_others():
    calm = [1.0, -1.0] * 100
    found = page(["a"] * 201, [-2400.0, *calm]).tokens
    assert abs(alpha(found[0])) == abs(alpha(found[1])) > 100


def test_a_few_tokens_that_differ_from_neutral_have_colour():
    found = page(["a"] * 200, [5.0] + [0.0] * 199).tokens
    assert alpha(found[0]) > 100
    assert alpha(found[1]) == 0


def test_a_token_that_was_not_measured_has_no_colour():
    found = page(["a", "b", "c"], [None, float("nan"), 1.0]).tokens
    assert [alpha(token) is None for token in found] == [True, True, False]
    assert found[0]["title"] == "projection: not measured"


def test_hovering_shows_the_number_of_every_vector():
    found = page(["a", "b"], [[0.123, -4.0], [1.0, 2.0]], names=["evil", "polite"])
    assert found.tokens[0]["title"] == "evil: 0.12\npolite: -4.00"


def test_every_vector_has_its_switch_its_colours_and_its_legend():
    shown = tokens_html(["a", "b"], torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), title="two", names=["evil", "polite"])
    found = Page(shown)
    assert [np.sign(alpha(found.tokens[0], vector)) for vector in (0, 1)] == [1, -1]
    assert found.elements.count("input") == 2
    for vector in (0, 1):
        assert f"#v{vector}:checked ~ main .t {{ background: var(--c{vector}); }}" in shown
        assert f"#v{vector}:checked ~ .legends #l{vector} {{ display: flex; }}" in shown


def test_tokens_above_the_threshold_are_marked_for_its_vector():
    values = [[0.0, 3.0], [1.0, 0.0], [1.5, 3.0]]
    found = page(list("abc"), values, names=["evil", "polite"], threshold=[1.0, None]).tokens
    assert [token["class"] for token in found] == ["t", "t", "t o0"]


def test_the_legend_has_the_ends_the_middle_and_the_threshold():
    shown = tokens_html(["a", "b"], [9.0, 11.0], title="a text", neutral=10.0, threshold=10.5)
    assert "<span>≤ 9.00</span><span>10.00</span><span>≥ 11.00</span>" in shown
    assert 'style="left:75.0%"' in shown
    assert "above the threshold 10.50" in shown


def test_turns_have_their_headings_where_they_begin():
    found = page(list("abcd"), [1.0] * 4, turns=[(1, "user"), (3, "assistant")])
    assert found.headings == [(1, "user"), (3, "assistant")]
    assert found.elements.count("section") == 3


@pytest.mark.parametrize("turns", [[(2, "a"), (1, "b")], [(0, "a"), (0, "b")], [(4, "a")], [(-1, "a")]])
def test_turns_at_places_that_are_none_are_refused(turns):
    with pytest.raises(ValueError, match="ascending places from 0 to 3"):
        page(list("abcd"), [1.0] * 4, turns=turns)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="got 2 pieces and 1 rows"):
        page(["a", "b"], [1.0])
    with pytest.raises(ValueError, match="got 1 names and 2 vectors"):
        page(["a"], [[1.0, 2.0]], names=["evil"])
    with pytest.raises(ValueError, match="one for each of 2 vectors, got 3"):
        page(["a"], [[1.0, 2.0]], names=["evil", "polite"], threshold=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="no token to show"):
        page([], [])


def test_special_tokens_are_told_apart():
    found = page(["<|im_start|>", "user", "</s>", "<b>"], [1.0] * 4).tokens
    assert ["special" in token["class"] for token in found] == [True, False, True, False]


def test_the_page_of_a_chat_has_all_its_turns_with_their_numbers():
    found = monitoring(interventions=("Steer(evil)",))
    shown = monitoring_html(found, thresholds=[threshold()])
    read = Page(shown)
    assert [token["text"] for token in read.tokens] == ["<|im_start|>", "Hi", "Good", " day", "And", "?"]
    assert read.headings == [(0, "turn 1, prompt"), (2, "turn 1, response"), (4, "turn 2, prompt")]
    values = torch.cat([turn.tokens.values for turn in found.chats[0].turns])
    assert read.tokens[4]["title"] == f"evil, layer 14: {values[4, 0]:.2f}\npolite, layer 18: {values[4, 1]:.2f}"
    assert ["o1" in token["class"] for token in read.tokens] == (values[:, 1] > 0.1).tolist()
    assert "Steer(evil)" in shown


def test_a_chat_without_its_tokens_has_no_page():
    turn = TurnProjections(1, (0.0, 0.0), None)
    with pytest.raises(ValueError, match="talk: its tokens were not kept: monitor it with tokens=True"):
        monitoring_html(Monitoring(monitoring().vectors, (ChatProjections("talk", (turn,)),)))


@pytest.mark.parametrize("wrong", [{"of": "response"}, {"fingerprint": "cccccccc"}])
def test_a_threshold_that_is_not_of_the_pages_tokens_is_refused(wrong):
    with pytest.raises(ValueError, match="thresholds of tokens for its own vectors"):
        monitoring_html(monitoring(), thresholds=[threshold(**wrong)])
