"""A run's report has the run's numbers, says what is missing, and refuses what is broken by its name."""

import json
import re
import shutil

import pytest

from persona_lens.evaluation.layer_selection import LayerSweep
from persona_lens.pages.run_folder import findings, read_run
from persona_lens.pages.run_report import report_html, write_report
from tests.evaluation_cases import cut
from tests.page_cases import Page
from tests.report_cases import SCORES, keep_confirmation, make_run, tiles

PARTS = {
    "layer_sweep.json": "No layer was chosen: the folder has no layer_sweep.json, which persona-lens select-layer",
    "vectors.safetensors": "No vectors: the folder has no vectors.safetensors, which persona-lens extract writes",
    "scores.jsonl": "No samples: the folder has no scores.jsonl, which persona-lens judge writes",
    "rollouts.jsonl": "No samples: the folder has no rollouts.jsonl, which persona-lens extract writes",
    "summary.json": "Not here: the folder has no summary.json, which persona-lens extract writes",
    "trait.json": "Not here: the folder has no trait.json, which persona-lens extract writes",
    "calibration.json": "Its agreement with people or another judge",
    "dose_response.json": "Not confirmed, and the best of many cells is optimistic",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a whole run; tests leave it as they found it."""
    folder = make_run(tmp_path_factory.mktemp("made") / "run")
    keep_confirmation(folder)
    return folder


@pytest.fixture(scope="module")
def page(made):
    """The page of that run."""
    return report_html(read_run(made))


@pytest.fixture
def folder(made, tmp_path):
    """The folder of a whole run, for a test that changes it."""
    return shutil.copytree(made, tmp_path / "run")


def words(page):
    """A page's text without its layout."""
    return re.sub(r"\s+", " ", "".join(Page(page).words))


# --- what it says --------------------------------------------------------------------------------------------------


def test_the_headline_has_the_recommendation_the_pairs_and_the_judge(page):
    shown = tiles(page)
    assert shown["Steer"] == "layer 0 × 2"
    assert shown["Trait score"] == "6 → 65"
    assert shown["Coherence"] == "90 → 80"
    assert shown["Pairs kept"] == "1 of 4"
    assert shown["Judge"] == "AUC 0.91"


def test_findings_are_the_numbers_of_the_results(made):
    run, sweep = read_run(made), LayerSweep.load(made)
    found, best = findings(run), sweep.best()
    assert (found["trait"], found["model"], found["judge"]) == ("grumpy", "toy-0", "made up")
    assert (found["best"]["layer"], found["best"]["coefficient"]) == (best.layer, best.coefficient)
    assert found["best"]["trait_score"] == best.trait_score
    assert (found["pairs"]["kept"], found["pairs"]["pairs"]) == (1, len(SCORES))
    assert found["judge_diagnostics"]["auc_without_own_pair"] == 0.91
    assert found["missing"] == {}
    json.dumps(found, allow_nan=False)


def test_every_layer_and_every_cell_stands_in_a_table(page, made):
    layers = re.findall(r'<td data-name="layer">(.*?)</td>', page)
    assert [name.partition(",")[0] for name in layers] == ["unsteered", "0", "2", "embedding", "0", "1", "2", "3"]
    sweep = LayerSweep.load(made)
    assert f"{sweep.evaluations[0, 2.0].trait_score} / 80" in page
    assert "- / 30" in page


def test_answers_at_each_dose_stand_beside_the_unsteered_one(page):
    (first, _) = re.findall(r"<div class=doses>(.*?)</div></article>", page, flags=re.DOTALL)
    assert re.findall(r"<strong>(.*?)</strong>", first) == ["unsteered", "× 1", "× 2"]
    assert re.findall(r"<b>recommended</b>", first) == ["<b>recommended</b>"]
    assert "layer 0 x 2 so it is" in first
    assert "layer 2" not in first


def test_a_missing_score_is_no_bar_of_length_zero(page):
    assert "width:0%" not in page
    assert "trait - · coherence 90" in page


def test_a_kept_pair_and_one_of_each_reason_are_shown(page):
    assert page.count("<b class=kept>") == 1
    assert re.findall(r"<b class=dropped>dropped: (.*?)</b>", page) == [
        "no trait score",
        "positive side below the threshold",
        "negative side at or above the threshold",
    ]


def test_tokens_of_a_kept_pair_have_the_colour_of_their_projection_at_the_recommended_layer(page):
    tokens = re.findall(r'style="--c0:#(\w{6})\w\w" title="(layer 0: [^"]*)">\s*(\w+)<', page)
    assert [text for *_, text in tokens[:2]] == ["positive", "0"]
    assert [text for *_, text in tokens if text in ("positive", "negative")] == ["positive", "negative"]
    above, below = ({colour for colour, said, _ in tokens if (" -" in said) is negative} for negative in (False, True))
    assert len(above) == len(below) == 1
    assert above != below
    assert "coloured by their projection on the direction of layer 0" in words(page)


def test_without_their_projections_kept_responses_are_plain_text(folder):
    (folder / "example_tokens.jsonl").unlink()
    page = write(folder)
    assert "coloured" not in words(page)
    assert "positive 0 so it is" in words(page)


def test_the_keep_rule_is_the_runs_own(folder):
    summary = json.loads((folder / "summary.json").read_text())
    summary["pairs"] |= {"threshold": 85.0, "kept": 2, "dropped": {}}
    (folder / "summary.json").write_text(json.dumps(summary))
    kept = [pair for pair in read_run(folder).pairs if pair.dropped is None]
    assert [pair.positive.trait_score for pair in kept] == [90.0]
    assert "now have 1 of 4 pairs to keep, so they are not what the vectors were made of" in words(write(folder))


def write(folder, **choices):
    return write_report(folder, **choices).read_text(encoding="utf-8")


def test_without_a_coherent_cell_nothing_is_recommended_and_the_best_layers_answers_are_shown(made):
    page = report_html(read_run(made), min_coherence=99.0)
    assert tiles(page)["Steer"] == "–"
    assert "none of 4 cells has a trait score and a mean coherence of 99 or more" in words(page)
    assert "No cell has a mean coherence of 99 or more; this layer has the highest trait score. Layer 0" in words(page)
    assert "<b>recommended</b>" not in page
    assert findings(read_run(made), min_coherence=99.0)["best"] is None


def test_the_confirmation_is_told_in_a_sentence(page, made):
    assert f"{read_run(made).confirmed}." in words(page)


# --- what is missing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "said"), PARTS.items(), ids=list(PARTS))
def test_what_is_missing_is_said_and_the_rest_is_shown(folder, file, said):
    (folder / file).unlink()
    if file == "calibration.json":  # the summary has it too
        summary = json.loads((folder / "summary.json").read_text())
        summary.pop("judge_calibration", None)
        (folder / "summary.json").write_text(json.dumps(summary))
    text = words(write(folder))
    assert said in text
    assert "The responses behind the vectors" in text


@pytest.mark.parametrize("file", ["vectors.safetensors", "layer_sweep.json", "rollouts.jsonl"])
def test_one_part_alone_is_a_page(folder, file):
    rows = {"layer_sweep.json": ["sweep_rollouts.jsonl", "sweep_scores.jsonl"]}.get(file, [])
    for path in folder.iterdir():
        if path.name not in (file, *rows):
            path.unlink()
    assert "<h1>" in write(folder)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["no folder", "an empty folder"])
def test_what_is_no_run_is_refused_with_what_makes_one(tmp_path, file):
    folder = tmp_path / "elsewhere"
    if file == "an empty folder":
        folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"elsewhere .* expected a folder with one of .*persona-lens extract"):
        write_report(folder, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "file",
    [
        "example_tokens.jsonl",
        "trait.json",
        "summary.json",
        "calibration.json",
        "vectors.safetensors",
        "layer_sweep.json",
        "dose_response.json",
        "rollouts.jsonl",
        "scores.jsonl",
        "sweep_rollouts.jsonl",
        "sweep_scores.jsonl",
    ],
)
def test_a_file_that_is_cut_short_is_named_and_an_older_page_stays(folder, file):
    (folder / "report.html").write_text("older")
    cut(folder / file)
    with pytest.raises(ValueError, match=re.escape(file)) as refused:
        write_report(folder)
    assert "\n" not in str(refused.value)
    assert "finish the run with the command that began it" in str(refused.value)
    assert (folder / "report.html").read_text() == "older"
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("content", ["[]", "3", '{"format_version": 1}', '{"format_version": 9}', "\ufffe"])
@pytest.mark.parametrize("file", ["trait.json", "summary.json", "calibration.json", "layer_sweep.json"])
def test_a_file_of_another_form_is_named(folder, file, content):
    (folder / file).write_bytes(content.encode("utf-16"))
    with pytest.raises(ValueError, match=re.escape(file)):
        read_run(folder)
    (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(file)):
        read_run(folder)


def test_files_about_two_traits_are_refused(folder, tmp_path):
    other = make_run(tmp_path / "other", trait="cheerful")
    (other / "vectors.safetensors").replace(folder / "vectors.safetensors")
    with pytest.raises(ValueError, match=r"vectors\.safetensors is about 'cheerful' and trait\.json about 'grumpy'"):
        read_run(folder)


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_of_less_than_six_megabytes(made, tmp_path):
    page = write_report(made, tmp_path / "page.html")
    assert page.stat().st_size < 6e6
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert not [each for each in found.attributes if each[1] in {"src", "href", "srcset", "action", "data"}]
    without = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "http" not in without.replace("http-equiv", "")
    assert "url(" not in without
    assert "default-src 'none'" in text


def test_one_heading_leads_and_every_picture_has_a_label(page):
    assert page.count("<h1>") == 1
    assert page.index("<h1>") < page.index("<h2>") < page.index("<h3")
    assert len(re.findall(r"<div class=picture id=\S+ role=img aria-label=\"[^\"]{20,}\"", page)) == 5
    assert page.count("<div class=scroll tabindex=0 role=region aria-label=") == 4


def test_the_same_run_makes_the_same_page(page, made):
    assert report_html(read_run(made)) == page
