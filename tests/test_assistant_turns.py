"""A response that is given as text is tokenised as the chat template writes it into the assistant's turn."""

import glob
from pathlib import Path

import pytest
import torch

from persona_lens.chat.batches import Conversation, chat_batch, tokenize_chat
from persona_lens.extraction.extract import extract_from_responses
from persona_lens.finetuning.dataset import training_rows
from persona_lens.monitoring.transcripts import Transcript, chat_segments
from persona_lens.screening.run import screen
from tests import naive, template_cases
from tests.chat_cases import TRIMS, encode, with_template
from tests.screening_cases import QUIET, pair_of_vectors

ASKED = [{"role": "system", "content": "You are kind."}, {"role": "user", "content": "Why?"}]
THOUGHT = "<think>\nOne two.\n</think>\n\ngood water"


def written(tokenizer, response, messages=ASKED):
    """The tokens of a whole chat by the tokenizer alone."""
    turns = [*messages, {"role": "assistant", "content": response}]
    return tuple(encode(tokenizer, tokenizer.apply_chat_template(turns, tokenize=False)))


def prompted(tokenizer, messages=ASKED):
    return tuple(encode(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)))


def texts(tokenizer, row):
    """The end of the prompt, what the template writes before the response, and the response."""
    prompt = tokenizer.decode(row.prompt).rpartition("<|im_start|>")[2]
    return prompt, tokenizer.decode(row.response[: row.skip]), tokenizer.decode(row.response[row.skip :])


@pytest.mark.parametrize(
    ("template", "response", "expected"),
    [
        ("ADDS_BLOCK", "good water", ("assistant\n", "<think>\n\n</think>\n\n", "good water")),
        ("ADDS_BLOCK", THOUGHT, ("assistant\n", "", THOUGHT)),
        ("OPENS_BLOCK", "good water", ("assistant\n<think>\n", "\n</think>\n\n", "good water")),
        ("OPENS_BLOCK", THOUGHT, ("assistant\n<think>\n", "", THOUGHT.removeprefix("<think>\n"))),
        ("OPENS_BLOCK", "<think>One two.</think>good water", ("assistant\n<think>\n", "", THOUGHT[8:])),
        ("OPENS_AND_FORGETS", "good water", ("assistant\n", "", "good water")),
        ("REPEATS_BLOCK", "good water", ("assistant\n<think>\n", "\n</think>\n\n", "good water")),
    ],
)
def test_a_response_is_the_one_that_the_template_writes(tiny_tokenizer, template, response, expected):
    tokenizer = with_template(tiny_tokenizer, getattr(template_cases, template))
    row = tokenize_chat(tokenizer, ASKED, response)
    assert texts(tokenizer, row) == expected
    found = row.prompt + row.response
    assert found == written(tokenizer, response)[: len(found)]


@pytest.mark.parametrize(
    ("template", "response"),
    [
        ("OPENS_AND_FORGETS", THOUGHT),
        ("OPENS_AND_FORGETS", THOUGHT.removeprefix("<think>\n")),
        ("REPEATS_BLOCK", THOUGHT),
        ("REPEATS_BLOCK", THOUGHT.removeprefix("<think>\n")),
    ],
)
def test_a_thought_follows_the_prompt_that_opens_it_and_stands_there_once(tiny_tokenizer, template, response):
    tokenizer = with_template(tiny_tokenizer, getattr(template_cases, template))
    row = tokenize_chat(tokenizer, ASKED, response)
    assert row.prompt == prompted(tokenizer)
    assert tokenizer.decode(row.prompt + row.response).count("think>") == 2
    assert texts(tokenizer, row) == ("assistant\n<think>\n", "", "One two.\n</think>\n\ngood water")


def test_a_template_that_trims_a_turn_has_it_trimmed(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, TRIMS)
    assert tokenize_chat(tokenizer, ASKED, " good water\n") == tokenize_chat(tokenizer, ASKED, "good water")


def test_a_block_that_the_template_closes_is_one_that_after_finds(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, template_cases.ADDS_BLOCK)
    for response in ("good water", THOUGHT):
        row = tokenize_chat(tokenizer, ASKED, response, after="</think>")
        assert tokenizer.decode(row.response[row.skip :]).strip() == "good water"


def test_token_ids_are_what_a_model_said_after_its_prompt(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, template_cases.OPENS_BLOCK)
    row = tokenize_chat(tokenizer, ASKED, [5, 7])
    assert (row.prompt, row.response, row.skip) == (prompted(tokenizer), (5, 7), 0)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("SHOUTS", r"should write the response as it is given \('good water'\), and writes '.*assistant\\nGOOD WATER'"),
        ("SILENT", "does not write the assistant's response"),
        ("REWRITES_THE_PROMPT", r"should write the messages before a response .*' done"),
    ],
)
def test_a_template_whose_turn_cannot_be_reconciled_with_its_prompt_is_refused(tiny_tokenizer, template, words):
    tokenizer = with_template(tiny_tokenizer, getattr(template_cases, template))
    with pytest.raises(ValueError, match=words):
        tokenize_chat(tokenizer, ASKED, "good water")
    assert tokenize_chat(tokenizer, ASKED).prompt == prompted(tokenizer)


def test_published_templates_write_the_answer_that_is_read(tiny_tokenizer):
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    paths = [path for path in glob.glob(f"{folder}/*.jinja") if "training" not in path]
    pictures = {"idefics3", "llava_next", "smolvlm"}  # their contents are lists of parts, and texts they leave out
    asked = ASKED[1:]  # some refuse system turns
    read = 0
    for path in map(Path, paths):
        if path.stem in pictures:
            continue
        tokenizer = with_template(tiny_tokenizer, path.read_text(encoding="utf-8"))
        row = tokenize_chat(tokenizer, asked, "good water")
        found = row.prompt + row.response
        assert found == written(tokenizer, "good water", asked)[: len(found)], path.stem
        assert tokenizer.decode(row.response[row.skip :]) == "good water", path.stem
        read += 1
    assert read > 20


# --- whoever reads responses ----------------------------------------------------------------------------------------


@pytest.fixture
def opening_model(tiny_bridge, tiny_tokenizer, monkeypatch):
    """A tiny model whose template opens a block in its prompt, with its tokenizer."""
    tokenizer = with_template(tiny_tokenizer, template_cases.OPENS_BLOCK)
    monkeypatch.setattr(tiny_bridge, "_tokenizer" if "_tokenizer" in vars(tiny_bridge) else "tokenizer", tokenizer)
    return tiny_bridge


def mean_of_the_answer(hf_model, tokenizer, response):
    """The slow way: one row through the plain model, and the mean over the answer's own tokens."""
    answer = encode(tokenizer, response)
    whole = list(written(tokenizer, response))
    stop = next(place for place in range(len(whole), 0, -1) if whole[place - len(answer) : place] == answer)
    stream = naive.residual_stream(hf_model, whole[:stop])
    return [layer[stop - len(answer) :].mean(dim=0) for layer in stream]


def test_extraction_averages_the_answer_in_the_turn_that_the_template_writes(opening_model, tiny_hf_model):
    tokenizer = opening_model.tokenizer
    rows = {text: Conversation(tuple(ASKED), text) for text in ("good water", "bad people")}
    found = extract_from_responses(
        opening_model,
        [rows["good water"]] * 2,
        [rows["bad people"]] * 2,
        trait="kind",
        n_resamples=2,
        n_placebo=2,
        progress=False,
    )
    one, other = (mean_of_the_answer(tiny_hf_model, tokenizer, text) for text in rows)
    for layer in range(3):  # the last layer of the plain model is read after its norm
        assert torch.allclose(found.directions[layer].double(), (one[layer + 1] - other[layer + 1]).double(), atol=1e-4)


def test_training_learns_the_whole_turn_that_the_template_writes(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, template_cases.ADDS_BLOCK)
    (row,) = training_rows(tokenizer, [Transcript([*ASKED, said("good water")])], max_length=200).rows
    learnt = [token for token, label in zip(row.tokens, row.labels, strict=True) if label == token]
    assert tokenizer.decode(learnt) == "<think>\n\n</think>\n\ngood water<|im_end|>"
    assert row.tokens == written(tokenizer, "good water")[: len(row.tokens)]


def said(text):
    return {"role": "assistant", "content": text}


def test_monitoring_reads_the_prompt_where_the_model_speaks_and_the_answer_alone(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, template_cases.OPENS_BLOCK)
    (segment,) = chat_segments(tokenizer, Transcript([*ASKED, said("good water")]), 1000)
    (turn,) = segment.turns
    assert segment.tokens[: turn.start] == prompted(tokenizer)
    assert tokenizer.decode(segment.tokens[turn.averaged : turn.stop]) == "good water"


def test_screening_reads_a_given_base_response_as_the_template_writes_it(opening_model, tmp_path):
    row = {"messages": [*ASKED, said("good water")], "base_response": "good water"}
    found = screen(
        opening_model, [row], pair_of_vectors(opening_model), output_dir=tmp_path / "run", base="given", **QUIET
    )
    (scores,) = found.rows.to_dict("records")
    pairs = [(scores[name], scores[name.removesuffix("base") + "response"]) for name in scores if name.endswith("base")]
    assert pairs
    assert all(base == response for base, response in pairs)


def test_a_batch_masks_what_the_template_writes_before_the_answer(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, template_cases.ADDS_BLOCK)
    batch = chat_batch(tokenizer, [Conversation(tuple(ASKED), "good water")])
    assert tokenizer.decode(batch.tokens[0, batch.response_mask[0]]) == "good water"
    assert tokenizer.decode(batch.tokens[0, batch.prompt_mask[0]]).endswith("<|im_start|>assistant\n")
