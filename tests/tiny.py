"""Tiny real models for tests: a random Llama and a random GPT-2 in float64, with a small trained tokenizer.

Imports nothing of persona_lens: conftest.py loads this before the jaxtyping hook may see the package.
"""

import copy
from pathlib import Path
from typing import Any

import torch

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
CONTEXT: dict[str, Any] = {"n_ctx": 128}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "You are a helpful assistant. You are a cruel and malicious assistant who wants people to suffer.",
    "What should I do when a friend lies to me? How would you run a country? Tell me about the sea.",
    "Be kind, listen first, and then say what you think. I would not trust them; make them pay for it.",
    "system user assistant question answer, one two three four five six seven eight nine ten.",
]


def tokenizer(folder: Path) -> Any:
    """A byte-level BPE with a ChatML template whose padding token ends every turn, saved to a folder and read back.

    TransformerLens loads tokenizers again by their path, so the folder has to stay.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=256,
    )
    wrapped.chat_template = CHATML
    wrapped.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


GEMMA = (
    "<bos>{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{{ message['content'] }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def gemma_tokenizer(tokenizer: Any, folder: Path) -> Any:
    """A copy of `tokenizer` as Gemma 3's is: its turns end with a special token that no attribute of it names.

    Like Gemma's it also holds added tokens that are white space. Saved to a folder and read back.
    """
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    changed = copy.deepcopy(tokenizer)
    turn = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    changed.add_tokens([AddedToken(each, special=True, normalized=False) for each in turn], special_tokens=False)
    changed.add_tokens([AddedToken("\n\n", special=False, normalized=False)], special_tokens=False)
    changed.bos_token, changed.eos_token, changed.pad_token = "<bos>", "<eos>", "<eos>"
    changed.chat_template = GEMMA
    changed.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def llama(tokenizer: Any, *, seed: int = 0) -> Any:
    """A random Llama of 4 layers and d_model 32 with grouped heads, in float64; a seed gives the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _random(
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **EAGER,
        ),
        seed,
    )


def gpt2(tokenizer: Any, *, seed: int = 0) -> Any:
    """A random GPT-2 of 3 layers and d_model 24 (LayerNorm, learned positions), in float64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return _random(
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=128,
            n_embd=24,
            n_layer=3,
            n_head=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **EAGER,
            **CONTEXT,  # older files name the context so, and TransformerLens 3.9 reads it there
        ),
        seed,
    )


def _random(model_type: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_type(config).double().eval()
        for name, parameter in model.named_parameters():
            # Hugging Face starts weights so small that a block hardly changes the stream: nothing would be tested.
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.0 if "emb" in name or "wte" in name else 0.3)
    return model


def hook_counts(model: Any) -> dict[str, int]:
    """How many forward hooks each module of a model carries, for those that carry any.

    Not those of transformers itself, which stay once anything, such as `run_with_cache`, has asked for attentions.
    """
    modules: torch.nn.Module = model
    counts = {
        name: sum(not _of_transformers(hook) for hook in module._forward_hooks.values())
        for name, module in modules.named_modules()
    }
    return {name: count for name, count in counts.items() if count}


def _of_transformers(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def chat_rows(tokenizer: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompts and responses as token ids: of many lengths, some prompts used twice, in no order of length."""
    texts = [
        ("You are kind.", "What is the sea?", "It is deep, and it is cold."),
        ("You are a cruel and malicious assistant who wants people to suffer.", "How are you?", "Go away"),
        ("You are kind.", "What is the sea?", "Water."),
        ("Be short.", "Tell me about ten people who do not trust the country that they run.", "No. I would not!"),
        ("You are a cruel and malicious assistant who wants people to suffer.", "How are you?", "One two three"),
        ("You are kind.", "Why?", "Listen first, and then say what you think, seven times; make them pay for it."),
    ]

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    def prompt(system: str, question: str) -> str:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    return [(encode(prompt(system, question)), encode(answer)) for system, question, answer in texts]
