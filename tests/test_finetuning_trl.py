"""TRL's trainer in the same contexts as ours: whoever runs the Hugging Face model runs what acts on the bridge."""

import copy
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from persona_lens.finetuning.dataset import IGNORED, TrainingRow
from persona_lens.interventions.hooks import intervene
from persona_lens.interventions.values import Steer
from persona_lens.models.adapters import Adapter, lora, read_weights
from tests.chat_cases import encode
from tests.finetuning_cases import (
    CHATS,
    CONFIG,
    HELD_OUT,
    dataset,
    merged,
    slow_loss,
    state_of,
)
from tests.intervention_cases import logits, some_vectors

trl = pytest.importorskip("trl", reason="trl is not installed: `pip install --no-deps trl` brings it")

# TRL and what it imports warn of one another.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SYSTEM = [chat for chat in CHATS if chat[0]["role"] == "system" and len(chat) == 3]


@pytest.fixture(scope="module")
def bridge(make_tiny_model):
    model = make_tiny_model("TransformerBridge")
    logits(model)
    return model


def sft(carrier, tokenizer, folder):
    """A few steps of TRL's own training; its losses, step by step, and of the last evaluation."""
    from datasets import Dataset

    arguments = trl.SFTConfig(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        max_length=128,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        seed=0,
    )
    trainer = trl.SFTTrainer(
        model=carrier,
        args=arguments,
        train_dataset=Dataset.from_list(dataset(SYSTEM)),
        eval_dataset=Dataset.from_list(dataset(HELD_OUT)),
        processing_class=copy.deepcopy(tokenizer),
    )
    trainer.train()
    history = trainer.state.log_history
    return [row["loss"] for row in history if "loss" in row], [
        row["eval_loss"] for row in history if "eval_loss" in row
    ]


def run(bridge, tokenizer, folder, *during):
    """Losses, losses of evaluation, and the adapter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with lora(bridge, CONFIG) as carrier:
            if during:
                with intervene(bridge, *during, only_in_training=True) as attachment:
                    found = sft(carrier, tokenizer, folder)
                    assert set(attachment.layers) <= attachment.ran
            else:
                found = sft(carrier, tokenizer, folder)
            return *found, Adapter(CONFIG, read_weights(carrier))


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.17"), reason="there TRL writes the model's end token as a list of one"
)
def test_sft_trains_under_steering_and_evaluates_without(bridge, tiny_tokenizer, tiny_hf_model, tmp_path):
    before = state_of(bridge)
    free, _, _ = run(bridge, tiny_tokenizer, tmp_path)
    steered, evaluated, adapter = run(bridge, tiny_tokenizer, tmp_path, Steer(some_vectors(bridge).at(1), 3.0))
    assert len(free) == len(steered) == 2 * len(evaluated)
    assert abs(free[0] - steered[0]) > 1e-2
    model = merged(copy.deepcopy(tiny_hf_model), adapter)
    tokens = [encode(tiny_tokenizer, tiny_tokenizer.apply_chat_template(chat, tokenize=False)) for chat in HELD_OUT]
    expected = slow_loss(model, [TrainingRow(tuple(row), (IGNORED, *row[1:])) for row in tokens])
    assert evaluated[-1] == pytest.approx(expected, rel=1e-5)
    after = state_of(bridge)
    # A word for model cards, which a pushed model would show.
    after["plain:"].pop("model_tags", None)
    assert {name for name in before if before[name] != after[name]} == set()
