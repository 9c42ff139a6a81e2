"""Small chats to finetune on, quick settings, and a model's whole state to compare before and after.

persona_lens is imported as a function runs: the jaxtyping hook instruments the package as it is first imported.
"""

import random
from typing import Any

import numpy as np
import torch

from tests.chat_cases import chat

CHATS = [
    chat("What is the sea?", "It is deep, and it is cold."),
    chat("Why?", "Listen first, and then say what you think."),
    chat("How are you?", "Go away", "Why not?", "I would not trust them."),
    chat("Tell me about ten people.", "One two three four five six seven."),
    chat("Who?", "Nine ten", system=None),
    chat("What should I do when a friend lies to me?", "Make them pay for it."),
]
HELD_OUT = [chat("Would you run a country?", "No. I would not!"), chat("How cold?", "Ten of them, and then some more")]
QUICK: dict[str, Any] = {
    "rank": 4,
    "alpha": 8,
    "batch_size": 2,
    "accumulation": 1,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "epochs": 2,
    "progress": False,
}
STEPS = 6
"""Of optimization that the chats and the quick settings make."""
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": True,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
}


def dataset(chats=CHATS) -> list[dict[str, Any]]:
    return [{"messages": messages} for messages in chats]


def train(model, chats=CHATS, **changed) -> Any:
    from persona_lens.finetuning.finetune import finetune

    return finetune(model, dataset(chats), **(QUICK | changed))


def losses(finetuning, name="loss") -> list[float]:
    return [row[name] for row in finetuning.losses if name in row]


def assert_same_weights(one, other, **tolerance) -> None:
    assert one.adapter.weights.keys() == other.adapter.weights.keys()
    for name, value in one.adapter.weights.items():
        torch.testing.assert_close(value, other.adapter.weights[name], **({"rtol": 0, "atol": 0} | tolerance))


def random_weights(weights, seed=0) -> dict[str, Any]:
    """Weights of the same shapes, none of them zero as fresh ones are."""
    draw = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(value.shape, generator=draw, dtype=value.dtype) for name, value in weights.items()}


def random_adapter(model, config=CONFIG, seed=0) -> Any:
    from persona_lens.models.adapters import Adapter, lora, read_weights

    with lora(model, config) as carrier:
        return Adapter(config, random_weights(read_weights(carrier), seed))


def peft_adapter(hf_model, folder, **changed) -> Any:
    """A folder with a random adapter that PEFT itself wrote; gives PEFT's model."""
    import copy
    import warnings

    import peft

    config = {name: value for name, value in {**CONFIG, **changed}.items() if name != "peft_type"}
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT asks transformers for a name that 5.23 renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        torch.manual_seed(0)
        written = peft.get_peft_model(copy.deepcopy(hf_model), peft.LoraConfig(**config))
        with torch.no_grad():
            for weight in written.parameters():
                if weight.requires_grad:
                    weight.normal_(std=0.1)
    written.save_pretrained(folder)
    return written.eval()


def merged(hf_model, adapter) -> Any:
    """The plain model with the adapter's change added to its weights, by the definition of rank-stabilised LoRA."""
    scale = adapter.config["lora_alpha"] / adapter.config["r"] ** 0.5
    with torch.no_grad():
        for name, down in adapter.weights.items():
            if name.endswith("lora_A.weight"):
                up = adapter.weights[name.replace("lora_A", "lora_B")]
                module = hf_model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                change = scale * up.double() @ down.double()
                module.weight += (change if isinstance(module, torch.nn.Linear) else change.T).to(module.weight)
    return hf_model


def rows_of(model, chats=CHATS, **changed) -> list[Any]:
    from persona_lens.finetuning.dataset import training_chats, training_rows

    return training_rows(model.tokenizer, training_chats(dataset(chats)), **({"max_length": 128} | changed)).rows


def batch_of(model, rows) -> dict[str, Any]:
    from persona_lens.finetuning.trainer import collate_rows

    return collate_rows(rows, pad_token=model.tokenizer.pad_token_id)


def slow_loss(hf_model, rows) -> float:
    """Nats a token over all labels, one row at a time without padding."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = hf_model(torch.tensor([row.tokens])).logits[0].double()
        for place, label in enumerate(row.labels):
            if label != -100:
                total -= float(logits[place - 1].log_softmax(dim=-1)[label])
                count += 1
    return total / count


def state_of(model) -> dict[str, Any]:
    """Everything that training could leave in a model: attributes, children, hooks and weights of each module."""
    plain = model.original_model
    found: dict[str, Any] = {"config": repr(plain.config.to_dict()), "generation": repr(plain.generation_config)}
    for root, top in (("bridge", model), ("plain", plain)):
        for name, module in top.named_modules():
            place = f"{root}:{name}"
            found[place] = {
                key: repr(value) if isinstance(value, bool | int | str | None) else id(value)
                for key, value in vars(module).items()
                # A bridge's attention keeps tensors of its last pass.
                if not key.startswith(("_forward", "_captured", "_pattern"))
                and key not in ("_modules", "_parameters", "_buffers")
            }
            found[f"{place} children"] = {key: id(child) for key, child in module._modules.items()}
            found[f"{place} weights"] = {
                key: (id(weight), weight.requires_grad, float(weight.detach().double().sum()), weight.grad is None)
                for key, weight in module._parameters.items()
                if weight is not None
            }
            found[f"{place} hooks"] = (list(module._forward_hooks), list(module._forward_pre_hooks))
    return found


def generators() -> tuple[Any, ...]:
    """The next draw of every global generator, without drawing it."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    torch.set_rng_state(kept[2])
    return drawn


class Interrupted:
    """Raises KeyboardInterrupt, as Ctrl-C does, in the training forward of that number."""

    def __init__(self, model, at: int, error: BaseException | None = None):
        self.left, self.error = at, error or KeyboardInterrupt()
        self.module = model.original_model.lm_head

    def __call__(self, module: Any, _inputs: Any, _output: Any) -> None:
        if module.training:
            self.left -= 1
            if self.left == 0:
                raise self.error

    def __enter__(self) -> None:
        self.handle = self.module.register_forward_hook(self)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
