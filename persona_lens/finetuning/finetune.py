"""Finetuning: rank-stabilised LoRA on responses, with interventions in the training forwards alone.

Preventative steering adds the trait's direction while training, so that the weights need not learn it; CAFT ablates it;
both are gone when the model is used (arXiv:2507.21509, sections 5 and J.4; settings of appendix D).
"""

import os
from collections.abc import Sequence
from pathlib import Path

from persona_lens.chat.batches import stop_tokens
from persona_lens.chat.templates import fixed_date
from persona_lens.finetuning.dataset import Dataset, prompted, stated, training_chats, training_rows
from persona_lens.finetuning.result import Finetuning
from persona_lens.finetuning.trainer import ProjectionPenalty
from persona_lens.finetuning.training import Plan, recorded_date, run_plan
from persona_lens.interventions.values import Intervention
from persona_lens.models.adapters import require_bridge
from persona_lens.models.structure import Model
from persona_lens.storage.text import shown_name
from persona_lens.traits.trait import Trait

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear modules that the paper trains, as Llama, Qwen and their kin name them."""


def finetune(
    model: Model,
    dataset: Dataset,
    *,
    during: Sequence[Intervention] = (),
    preventative_prompts: Trait | Sequence[str] | None = None,
    penalty: ProjectionPenalty | None = None,
    system_prompt: str | None = None,
    evaluation: Dataset | None = None,
    output: str | os.PathLike[str] | None = None,
    rank: int = 32,
    alpha: float = 64,
    dropout: float = 0.0,
    targets: str | Sequence[str] = TARGETS,
    learning_rate: float = 1e-5,
    warmup_steps: int = 5,
    weight_decay: float = 0.01,
    epochs: float = 1.0,
    batch_size: int = 2,
    accumulation: int = 8,
    max_length: int = 2048,
    gradient_checkpointing: bool = False,
    checkpoint_every: int | None = None,
    allow_other_model: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Finetuning:
    """Train a LoRA adapter on chats; the model itself is left as it was, and `adapted` puts the adapter on it.

    The defaults are the paper's, made for thousands of rows: a few hundred need a higher rate or more epochs, which the
    loss curve shows. Long runs resume: with `output`, a folder, a second call goes on from the last checkpoint to the
    same result, or reads the finished one.

    Args:
        model: A TransformerBridge.
        dataset: Chats: a file that `read_transcripts` reads, `Transcript`s, or rows with `messages`. The loss is on
            every assistant turn, to the end of the turn.
        during: What acts in every training forward, on all tokens, and not in evaluation:
            `[Steer(vectors.incremental(), 1.0)]` or `[Steer(vectors.at(layer), 4.0)]` is preventative steering,
            `[Ablate(vectors)]` CAFT.
        preventative_prompts: Prepend a random one to each training row; a trait means its positive instructions.
        penalty: Hold projections where the base model has them; costs one more forward pass a batch.
        system_prompt: For rows without a system turn; None leaves them to the chat template, which may add its own.
        evaluation: Chats whose loss is taken after each epoch, without interventions, penalty or preventative prompts.
        output: Folder for adapter, checkpoints and record; without it the result is in memory alone.
        rank: Rank of the adapter.
        alpha: Its scale; rank-stabilised LoRA multiplies by alpha / sqrt(rank).
        dropout: On the adapter's input.
        targets: Last parts of the names of the modules to train, a pattern of whole names, or `all-linear`.
        learning_rate: Peak of a linear schedule (AdamW).
        warmup_steps: Steps up to it.
        weight_decay: AdamW's.
        epochs: Passes over the rows.
        batch_size: Rows of one forward pass.
        accumulation: Passes of one optimizer step.
        max_length: Tokens of a row; a longer one loses its end, and is counted.
        gradient_checkpointing: Spend time instead of memory.
        checkpoint_every: Steps between checkpoints; by default one after each epoch.
        allow_other_model: Accept vectors of an unrelated model of equal shape.
        seed: Of the adapter's first weights, the order of rows and the prompts; the global seed is left alone.
        progress: Show a bar.

    Raises:
        ValueError: The model is no bridge, a row is no chat with an assistant turn, nothing is left to learn, a target
            is not in the architecture, a vector is not the model's, a penalty stands beside `during`, which would move
            what it holds, or `output` holds another run. `TrainingDiverged` where the loss is
            no finite number.
        OSError: `output` cannot be written, also at a checkpoint.
        RuntimeError: An intervention did not act in the first step.
    """
    require_bridge(model)
    if penalty is not None and during:
        raise ValueError(
            f"A penalty holds projections where the base model has them, and {during[0]} moves them: "
            "pass penalty= or during=, not both."
        )
    chats = stated(training_chats(dataset), system_prompt)
    shown = chats if preventative_prompts is None else prompted(chats, preventative_prompts, seed=seed)
    asked = [] if evaluation is None else stated(training_chats(evaluation), system_prompt)
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": shown_name(str(getattr(model.cfg, "model_name", ""))),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": True,
        "bias": "none",
        "target_modules": targets if isinstance(targets, str) else list(targets),
    }
    training = {
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": gradient_checkpointing,
        "seed": seed,
    }
    stops = stop_tokens(model)
    folder = None if output is None else Path(output)
    with fixed_date("" if folder is None else recorded_date(folder)):
        plan = Plan(
            training_rows(model.tokenizer, shown, max_length=max_length, stops=stops),
            training_rows(model.tokenizer, asked, max_length=max_length, stops=stops) if asked else None,
            tuple(during),
            penalty,
            adapter,
            training,
            checkpoint_every,
            allow_other_model,
            progress,
        )
        return run_plan(model, plan, folder)
