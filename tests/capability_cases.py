"""Questions, texts and adapters to measure capability with, and the slow way to do it.

persona_lens is imported as a function runs: the jaxtyping hook instruments the package as it is first imported.
"""

import copy
import json
from math import log
from typing import Any

import torch

from tests import naive, tiny
from tests.vector_cases import random_tensor

QUIET = {"progress": False}
TEXTS = [
    ("What is the sea?", "It is deep, and it is cold."),
    ("How would you run a country?", "Listen first, and then say what you think."),
    ("Why?", "No."),
]
RAW = [
    ("What is the sea?", ("water", "a country", "an assistant"), 0),
    ("How many?", ("one", "two", "three", "four"), 2),
    ("Tell me about a friend who lies.", ("make them pay", "trust them"), 1),
    ("What should I do when people do not listen?", ("run", "think", "ask", "be", "a"), 4),
]


def some_questions() -> Any:
    from persona_lens.evaluation.capability_result import Question

    return [Question(question, choices, answer, "sea") for question, choices, answer in RAW]


def encode(tokenizer, text) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def prompt_ids(tokenizer, user, system="You are a helpful assistant.") -> list[int]:
    turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return encode(tokenizer, tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def asked(question, choices) -> str:
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCDE", choices, strict=False))
    return f"{question}\n\n{lines}\n\nAnswer with the letter of the right choice only."


def slow_letters(hf_model, tokenizer, additions=None, at="all") -> list[list[float]]:
    """Every letter of every question by itself, as the whole response to its prompt."""
    return [
        [
            slow_likelihood(hf_model, prompt_ids(tokenizer, asked(question, choices)), ids, additions, at)
            for ids in (encode(tokenizer, letter) for letter in "ABCDE"[: len(choices)])
        ]
        for question, choices, _ in RAW
    ]


def slow_texts(hf_model, tokenizer, additions=None, at="all") -> list[float]:
    found = []
    for question, answer in TEXTS:
        ids = encode(tokenizer, answer)
        total = slow_likelihood(hf_model, prompt_ids(tokenizer, question), ids, additions, at)
        found.append(total / len(ids))
    return found


def slow_likelihood(hf_model, prompt, response, additions, at) -> float:
    places = {"all": slice(None), "response": slice(len(prompt) - 1, None), "prompt": slice(len(prompt))}[at]
    with naive.added_at(hf_model, additions or {}, places):
        return naive.log_likelihood(hf_model, (prompt, response))


def letters_of(found) -> Any:
    return [list(answer.log_probs) for answer in found.answers]


def likelihoods_of(found) -> Any:
    return [text.log_likelihood for text in found.texts]


def flat(rows) -> list[float]:
    return [value for row in rows for value in row]


def adapter_folder(tokenizer, folder) -> tuple[Any, Any]:
    """A LoRA adapter that PEFT wrote, and the plain Hugging Face model with it on."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    carrier = peft.get_peft_model(copy.deepcopy(tiny.llama(tokenizer)), config)
    with torch.no_grad():
        for seed, (name, weight) in enumerate(carrier.named_parameters()):
            if "lora_" in name:
                weight.copy_(0.3 * random_tensor(*weight.shape, seed=seed))
    carrier.save_pretrained(folder)
    return folder, carrier.double().eval().get_base_model()


def lm_eval_task(folder, tokenizer, questions) -> str:
    """An lm-eval task whose prompts are those of `questions`, rendered, and whose choices are their letters."""
    rows = [
        {
            "prompt": tokenizer.apply_chat_template(question.messages(), tokenize=False, add_generation_prompt=True),
            "letters": list(question.letters),
            "answer": question.answer,
        }
        for question in questions
    ]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(
        f"""task: letters
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder / "rows.jsonl"}}}
  cache_dir: {folder / "cache"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: letters
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    )
    return "letters"


HALF = (log(0.5), log(0.2), log(0.1))


def answered(log_probs=HALF, answer=0, text="Why?") -> Any:
    from persona_lens.evaluation.capability_result import AnsweredQuestion, Question

    return AnsweredQuestion(Question(text, ("a", "b", "c"), answer), log_probs)


def made(**parts) -> Any:
    from persona_lens.evaluation.capability_result import Capability, TextLikelihood

    answers = (answered(text="One?"), answered(answer=1, text="Two?"), answered(answer=2, text="Three?"))
    texts = (TextLikelihood(-2.0, 5, "One?"), TextLikelihood(None, 0), TextLikelihood(-3.0, 7))
    return Capability(answers, **({"texts": texts, "model": "toy", "seed": 3} | parts))
