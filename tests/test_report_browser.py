"""A report in a real browser: foreign text stays text, nothing is asked of a network, and it fits a narrow page."""

import pytest

from tests.report_cases import keep_confirmation, make_run, open_page  # noqa: F401 (a fixture, found by its name)

SCRIPT = "<script>alert(1)</script></script><!--"
IMAGE = '"><img src=x onerror=alert(2)>'
ODD = f"{SCRIPT} {IMAGE} A\u2028B \x00 \u202eturned שלום {'long' * 400}"


def test_foreign_text_stays_text_and_the_page_asks_for_nothing(tmp_path, open_page):  # noqa: F811
    folder = make_run(tmp_path / "run", trait=f"{IMAGE}{SCRIPT}", said=ODD, judge=f"judge {SCRIPT}", system=ODD)
    (folder / "<img src=x onerror=alert(3)>.txt").write_text("")
    pages, console, asked = open_page(folder)
    assert [each["width"] for each in pages] == [400, 1280]
    for found in pages:
        assert found["errors"] == found["loaded"] == []
        assert found["images"] == 0
        assert f"{IMAGE}{SCRIPT}" in found["heading"]
        assert found["text"].count(f"{SCRIPT} {IMAGE}") >= 10
        assert "judge <script>" in found["text"]
        assert "U+2028" in found["text"]
        assert "U+0000" in found["text"]
        assert "U+202E" in found["text"]
        assert "שלום" in found["text"]
    assert console == []
    assert asked == [] or all(each.startswith("file:") for each in asked)


@pytest.mark.parametrize("confirmed", [False, True])
def test_every_picture_is_drawn_and_the_page_does_not_scroll_sideways(tmp_path, open_page, confirmed):  # noqa: F811
    folder = make_run(tmp_path / "run")
    if confirmed:
        keep_confirmation(folder)
    pages, console, _ = open_page(folder)
    assert console == []
    for found in pages:
        assert found["pictures"] == found["drawn"] == (5 if confirmed else 4)
        assert found["scroll"] <= found["width"]
