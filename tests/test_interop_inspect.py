"""The inspect-ai scorer: our judges' scores in an eval of inspect-ai, where what is missing is unscored and never 0."""

import math
import sys

import pytest

from persona_lens.interop.inspect_scorer import persona_scorer
from persona_lens.judges.scores import Score


class WordJudge:
    """Scores by the words of a response: a number is the trait score, `quiet` has none, `mute` nothing at all."""

    batch_size = 1

    def __init__(self):
        self.seen = []

    def name(self, trait):
        return f"words of {trait.name}"

    def score(self, trait, rollouts, *, progress=False):
        self.seen += rollouts
        given = {"quiet": Score(None, 80.0), "mute": Score(None, None)}
        return [given.get(each.response) or Score(float(each.response), 90.0, {"words": 1.0}) for each in rollouts]


class CalibratedWordJudge(WordJudge):
    """Was fitted on one question."""

    def used_questions(self, trait):
        return ("Old?",)


def evaluate(judge, answers, tmp_path, questions=None):
    """Run inspect-ai on questions with these answers, in order; a model of its own would count tokens by a download."""
    inspect_ai = pytest.importorskip("inspect_ai", reason="inspect-ai is not installed")
    sample, output = (pytest.importorskip(f"inspect_ai.{name}") for name in ("dataset", "model"))
    solvers = pytest.importorskip("inspect_ai.solver")
    questions = questions or [f"Question {number}?" for number in range(len(answers))]

    @solvers.solver
    def given():
        async def solve(state, generate):
            answer = answers[questions.index(state.input_text)]
            state.output = output.ModelOutput.from_content("mockllm/model", answer)
            return state

        return solve

    task = inspect_ai.Task(
        dataset=[sample.Sample(input=question) for question in questions],
        solver=[solvers.system_message("Be brief."), given()],
        scorer=persona_scorer(judge, "evil"),
    )
    [log] = inspect_ai.eval(task, model="mockllm/model", max_samples=1, display="none", log_dir=str(tmp_path / "logs"))
    assert log.status == "success", log.error
    return log


def means(log):
    return {each.name: each.metrics["mean"].value for each in log.results.scores}


@pytest.mark.filterwarnings("ignore")
def test_trait_and_coherence_are_the_judges(tmp_path):
    judge = WordJudge()
    log = evaluate(judge, ["20", "60"], tmp_path)
    assert means(log) == {"trait": 40.0, "coherence": 90.0}
    score = log.samples[0].scores["persona_evil"]
    assert score.metadata == {"judge": "words of evil", "evidence": {"words": 1.0}}
    seen = judge.seen[0]
    assert (seen.question, seen.system_prompt, seen.response) == ("Question 0?", "Be brief.", "20")
    assert (seen.trait, seen.polarity, seen.engine) == ("evil", "neutral", "inspect-ai mockllm/model")


@pytest.mark.filterwarnings("ignore")
def test_a_missing_score_is_left_out_and_never_0(tmp_path):
    log = evaluate(WordJudge(), ["20", "quiet", "mute", "  "], tmp_path)
    assert means(log) == {"trait": 20.0, "coherence": 85.0}
    unscored = {each.name: each.unscored_samples for each in log.results.scores}
    assert unscored == {"trait": 3, "coherence": 2}
    reasons = [each.scores["persona_evil"].reason for each in log.samples]
    assert reasons == [None, None, "scoring_failed", "no_response"]
    assert math.isnan(log.samples[1].scores["persona_evil"].value["trait"])


@pytest.mark.filterwarnings("ignore")
def test_a_question_that_the_judge_was_calibrated_on_is_unscored(tmp_path):
    judge = CalibratedWordJudge()
    log = evaluate(judge, ["20", "60"], tmp_path, questions=["Old?", "New?"])
    assert log.samples[0].scores["persona_evil"].reason == "the judge was calibrated on this question"
    assert means(log)["trait"] == 60.0
    assert [each.question for each in judge.seen] == ["New?"]


def test_without_inspect_ai_the_install_command_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_ai.scorer", None)
    with pytest.raises(ImportError, match=r'inspect-ai.*pip install "persona-lens\[eval\]"'):
        persona_scorer(WordJudge(), "evil")
