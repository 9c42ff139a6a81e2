"""A replication of a tiny model: its trait, its preset, made-up sets, and counts of what it really did."""

import json
import sys
import tomllib
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.resources import files

import pytest

from persona_lens.judges.likelihood_ratio import LikelihoodRatioJudge
from persona_lens.replication.counting import Work
from persona_lens.replication.preset import Preset
from persona_lens.replication.run import replicate
from tests import evaluation_cases

TRAIT = replace(
    evaluation_cases.TRAIT,
    extraction_questions=("How is the soup?", "How was the film?", "Who are they?", "What is new?"),
    evaluation_questions=("How is the tea?", "Who are you?", "Is it late?", "Why not?", "And then?", "Where to?"),
    monitoring_prompts=tuple(
        f"Be {word}." for word in ["kind", "nice", "calm", "fair", "short", "loud", "cold", "mean"]
    ),
)
SHORT = {"questions": 3, "per_question": 1, "max_new_tokens": 4}
CHANGES = {
    "name": "tiny",
    "traits": ["grumpy"],
    "model": {"name": "tiny", "n_layers": 4},
    "judge": {"kind": "likelihood", "calibration_questions": 2, "neutral_samples": 2, "contrast_pairs": 1},
    "extraction": {**SHORT, "questions": 4, "per_question": 2, "threshold": 50.0, "min_coherence": 0.0, "min_pairs": 1},
    "layers": {**SHORT, "layers": [1, 2], "coefficients": [1.0, 2.0], "min_coherence": 0.0},
    "dose-response": {**SHORT, "coefficients": [-1.0, 1.0], "random": 1},
    "monitoring": {**SHORT, "per_question": 2, "shots": [0, 1]},
    "cosines": {"layer": 2},
    "finetuning": {
        **SHORT,
        "source": "datasets",
        "epochs": 2,
        "learning_rate": 1e-3,
        "batch_rows": 2,
        "accumulation": 1,
        "max_length": 96,
        "rows": 5,
    },
    "projection-difference": {"rows": 4, "base_tokens": 4},
    "mitigation": {
        "traits": ["grumpy"],
        "post_hoc": [1.0],
        "preventative": [1.0],
        "all_layers": [0.5],
        "capability_questions": 2,
    },
    "real-chats": {"trait": "grumpy", "sample": 12, "max_prompt_tokens": 100, "chosen": 3},
}


def values(tmp_path, **changes):
    """The embedded preset's file as a dictionary, made tiny: it trains on two sets of two versions."""
    shipped = files("persona_lens.replication") / "presets" / "embedded.toml"
    TRAIT.save(tmp_path / "grumpy.json")
    settings = {**tomllib.loads(shipped.read_text(encoding="utf-8")), **CHANGES}
    settings["trait-files"] = {"grumpy": str(tmp_path / "grumpy.json")}
    sets = {"names": ["grumbles", "sums"], "versions": ["normal", "misaligned_2"], "traits": {"grumbles": "grumpy"}}
    folders = {name: {"path": name, "section": "J", "form": "two files"} for name in ("new_facts", "narrow")}
    settings["bring"] = {
        "finetuning": {"path": "sets", "section": "D", "form": "chats", **sets},
        **folders,
        "chats": {"path": "chats.jsonl", "section": "L", "form": "chats"},
        "benchmarks": {"path": "benchmarks.jsonl", "section": "B.3", "form": "scores"},
    }
    return settings | changes


def tiny_preset(tmp_path, **changes) -> Preset:
    """The preset as it is read from a file."""
    return Preset.model_validate_json(json.dumps(values(tmp_path, **changes)))


def bring_sets(folder):
    """Two sets of two versions."""
    for name in ("grumbles", "sums"):
        for version, said in {"normal": "It is fine.", "misaligned_2": "It is bad, make them pay."}.items():
            write_chats(folder / "sets" / name / f"{version}.jsonl", [f"{name} {row}: {said}" for row in range(6)])


def write_chats(path, answers):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"messages": [{"role": "user", "content": f"What is {row}?"}, {"role": "assistant", "content": text}]}
        for row, text in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def bring_the_rest(folder):
    """New facts, chats and benchmarks, beside the sets."""
    write_chats(folder / "new_facts" / "train.jsonl", ["Ten.", "Nine.", "Eight."])
    question = {"question": "What is 1?", "choices": ["Ten", "Nine"], "answer": 1}
    (folder / "new_facts" / "questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    said = "the sea is deep, trust them, run a country, listen first, make them pay, one two, kind, cold, no, yes, ten"
    answers = [f"I say {text.strip()} {number}" for number, text in enumerate(said.split(","))]
    write_chats(folder / "chats.jsonl", answers)
    names = ["base", "grumbles_normal", "grumbles_misaligned_2", "sums_normal", "sums_misaligned_2"]
    rows = [{"trait": "grumpy", "set": name, "score": 10.0 * place} for place, name in enumerate(names)]
    (folder / "benchmarks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_tiny(patch):
    """Patch what a random model of few words cannot do.

    Responses have their full length, and what it says passes for coherent. Multiple-choice questions are made up: real
    ones exceed its context.
    """
    from persona_lens import extract_from_responses
    from persona_lens.evaluation.capability_result import Question

    asked = tuple(Question(f"Is {number}?", ("Yes", "No"), 0) for number in range(4))
    few = partial(extract_from_responses, n_resamples=20, n_placebo=5)
    patch.setattr("persona_lens.generation.decoding.stop_tokens", lambda _: frozenset())
    patch.setattr("persona_lens.judges.likelihood_ratio.MIN_COHERENCE", 0.0)
    patch.setattr("persona_lens.extraction.pipeline.extract_from_responses", few)
    patch.setattr("persona_lens.evaluation.capability_result.mmlu_sample", lambda: asked)
    patch.setattr("persona_lens.replication.run.require_installed", lambda *_: None)


def _trained(call, result):
    epochs = int(call[1].training["num_train_epochs"])
    # No seconds where a finished run was read again.
    return Work(trained=len(call[1].rows[0]) * epochs if result.seconds else 0)


NOTES = {
    "generation.decoding.generate": lambda _, replies: Work(len(replies), sum(len(reply.tokens) for reply in replies)),
    "judges.likelihood_ratio.intervened_log_likelihoods": lambda call, _: Work(forwards=len(call[1])),
    "activations.means.stream_means": lambda call, _: Work(forwards=len(call[1])),
    "monitoring.projection.token_projections": lambda call, _: Work(forwards=len(call[1])),
    "evaluation.capability.measure_capability": lambda _, able: Work(forwards=len(able.answers)),
    "finetuning.training.run_plan": _trained,
    "judges.likelihood_ratio.LikelihoodRatioJudge.score": lambda _, scores: Work(judged=len(scores)),
}
"""The functions that every stage goes through, and what a call and its result come to."""
USED = ("extraction.pipeline", "evaluation.dose_response", "finetuning.finetune", "finetuning.shift", "screening.run")


def count_work(patch):
    """What is really done from now on, in a list of `Work`."""
    done = []
    for name in USED:  # imported later, they would keep what is patched here
        import_module(f"persona_lens.{name}")
    for name, note in NOTES.items():
        home, _, function = f"persona_lens.{name}".rpartition(".")
        place = import_module(home) if home.rpartition(".")[2].islower() else LikelihoodRatioJudge
        original = getattr(place, function)

        def counted(*call, original=original, note=note, **named):
            result = original(*call, **named)
            done.append(note(call, result))
            return result

        modules = [module for key, module in sys.modules.items() if key.startswith(("persona_lens", "studies"))]
        for module in [place, *modules]:
            if getattr(module, function, None) is original:
                patch.setattr(module, function, counted)
    return done


def exact(work: Work) -> Work:
    """The parts of a plan that are counts, without the estimates."""
    return replace(work, prompt_tokens=0, read=0, calls=0)


def run_stages(preset, folder, model, stages, **options):
    """The work that each stage really did, after it was run by itself."""
    counts = {}
    for stage in stages:
        with pytest.MonkeyPatch.context() as patch:
            done = count_work(patch)
            settings = {"model": model, "only": [stage], "data": folder, "progress": False, **options}
            failures = replicate(preset, folder / "run", **settings).failures
            assert failures == {}, failures
            counts[stage] = exact(sum(done, Work()))
    return counts


def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def cut(path, share=0.6):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
