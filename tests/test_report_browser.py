"""A report in a real browser: foreign text stays text, nothing is asked of a network, and it fits a narrow page."""

import pytest

from tests.report_cases import keep_confirmation, make_run, open_report

SCRIPT = "<script>alert(1)</script></script><!--"
IMAGE = '"><img src=x onerror=alert(2)>'
ODD = f"{SCRIPT} {IMAGE} A\u2028B \x00 \u202eturned שלום $x^2$ {'long' * 400}"
TRAIT = f"{IMAGE}{SCRIPT}"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A page full of foreign text, narrow and wide."""
    workplace = tmp_path_factory.mktemp("browser")
    folder = make_run(workplace / "run", trait=TRAIT, said=ODD, judge=f"judge {SCRIPT}", system=ODD)
    keep_confirmation(folder, TRAIT)
    (folder / "<img src=x onerror=alert(3)>.txt").write_text("")
    return open_report(folder, workplace)


def test_foreign_text_stays_text(opened):
    for page in (opened.narrow, opened.wide):
        assert TRAIT in page["heading"]
        assert page["text"].count(f"{SCRIPT} {IMAGE}") >= 10
        assert f"judge {SCRIPT}" in page["text"]
        assert "<img src=x onerror=alert(3)>.txt" in page["text"]
        assert page["images"] == 0


def test_what_cannot_be_seen_or_turns_text_around_has_a_sign(opened):
    for sign in ("AU+2028B", "U+0000", "U+202Eturned שלום"):
        assert sign in opened.wide["text"]


def test_no_error_and_no_warning_reaches_the_console(opened):
    assert opened.console == opened.narrow["errors"] == opened.wide["errors"] == []


def test_nothing_is_asked_of_a_network(opened):
    assert opened.narrow["loaded"] == opened.wide["loaded"] == []
    assert not [address for address in opened.asked if not address.startswith("file:")]


def test_every_picture_is_drawn(opened):
    for page in (opened.narrow, opened.wide):
        assert page["pictures"] == page["drawn"] == 5


def test_the_page_does_not_scroll_sideways(opened):
    assert (opened.narrow["width"], opened.wide["width"]) == (400, 1280)
    for page in (opened.narrow, opened.wide):
        assert page["scroll"] <= page["width"]
