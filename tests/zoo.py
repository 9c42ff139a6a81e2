"""One tiny random model an architecture: what real ones have that others have not, in float64 and in milliseconds.

`docs/reliability/architectures.md` shows the table of these, and a test compares them.
Imports nothing of persona_lens, as tests/tiny.py does not.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

WINDOW = 6
"""Tokens that a sliding window holds: fewer than any text of the tests."""

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED = {**BASE, "num_key_value_heads": 2}
GEMMA = {
    **GROUPED,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# What TransformerLens's own list of names has for real Gemmas and OLMos, at this size.
HOOKED = {
    "d_model": 32,
    "d_head": 8,
    "n_heads": 4,
    "d_mlp": 48,
    "n_layers": 3,
    "n_ctx": 256,
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "gated_mlp": True,
    "final_rms": True,
}
HOOKED_GEMMA = {
    **HOOKED,
    "act_fn": "gelu_pytorch_tanh",
    "eps": 1e-6,
    "n_key_value_heads": 2,
    "use_normalization_before_and_after": True,
    "use_local_attn": True,
    "window_size": WINDOW,
    "attn_types": ["local", "global", "local"],
}


@dataclass(frozen=True)
class Architecture:
    """A Hugging Face architecture with the settings of its tiny model.

    Attributes:
        name: As people write it.
        model: The Hugging Face class.
        settings: Of its config, beside the vocabulary.
        special: What it has that others have not, in words.
        hooked: How a `HookedTransformer` of it is made: by `hooked_from_transformers`, whatever its size; by the list
            of names that TransformerLens has the sizes of, here by hand; or not at all.
        by_hand: The settings of a config by hand.
        precision: How far float64 means may be off, where a model computes a part of itself in float32.
    """

    name: str
    model: str
    settings: dict[str, Any]
    special: str
    hooked: Literal["any size", "listed names", "no"] = "any size"
    config: str = ""
    by_hand: dict[str, Any] = field(default_factory=dict)
    precision: float = 2e-6

    def build(self, tokenizer: Any, *, dtype: torch.dtype = torch.float64) -> Any:
        """The model with random weights, the same ones each time but for their rounding."""
        import transformers

        config = getattr(transformers, self.config or self.model.removesuffix("ForCausalLM") + "Config")(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",
            experts_implementation="eager",  # the default one has no float64
            **self.settings,
        )
        model = getattr(transformers, self.model)(config).to(dtype).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                # Hugging Face starts weights so small that a block hardly changes the stream, and norms all alike.
                weight.copy_(0.3 * noise if weight.ndim > 1 else weight + 0.2 * noise)
        return model

    def hooked_by_hand(self, hf_model: Any, tokenizer: Any) -> Any:
        """A `HookedTransformer` of a size that TransformerLens's list of names has not."""
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights
        from transformer_lens.pretrained.weight_conversions.olmo2 import convert_olmo2_weights

        convert = convert_olmo2_weights if self.model == "Olmo2ForCausalLM" else convert_gemma_weights
        config = HookedTransformerConfig(
            **self.by_hand,
            d_vocab=len(tokenizer),
            original_architecture=self.model,
            dtype=hf_model.dtype,
            device="cpu",
            model_name=self.name,
        )
        model = HookedTransformer(config, tokenizer)
        model.load_state_dict(model.fill_missing_keys(convert(hf_model, config)), strict=False)
        return model.to(hf_model.dtype).eval()


ARCHITECTURES = [
    Architecture(
        "Llama", "LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": False}, "grouped heads, rotary positions"
    ),
    Architecture("Qwen 2", "Qwen2ForCausalLM", GROUPED, "biases of queries, keys and values, tied embeddings"),
    Architecture("Qwen 3", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, "norms of queries and keys"),
    Architecture(
        "Mistral", "MistralForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": WINDOW}, "sliding windows"
    ),
    Architecture(
        "Gemma 2",
        "Gemma2ForCausalLM",
        {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        "sliding windows in turn, soft caps of scores and logits, a scaled embedding, norms before and after",
        hooked="listed names",
        by_hand={**HOOKED_GEMMA, "attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0},
    ),
    Architecture(
        "Gemma 3",
        "Gemma3ForCausalLM",
        GEMMA,
        "sliding windows in turn with a rotary base of their own, norms of queries and keys",
        hooked="listed names",
        config="Gemma3TextConfig",
        by_hand={**HOOKED_GEMMA, "use_qk_norm": True, "rotary_base": 1_000_000, "rotary_base_local": 10_000},
    ),
    Architecture("Phi 3", "Phi3ForCausalLM", GROUPED, "one matrix for queries, keys and values"),
    Architecture(
        "OLMo 2",
        "Olmo2ForCausalLM",
        BASE,
        "norms after attention and MLP alone",
        hooked="listed names",
        by_hand={**HOOKED, "act_fn": "silu", "eps": 1e-5},
    ),
    Architecture(
        "Mixtral", "MixtralForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, "routed experts"
    ),
    Architecture(
        "gpt-oss",
        "GptOssForCausalLM",
        {
            **GROUPED,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "attention sinks, routed experts, sliding windows in turn",
    ),
    Architecture(
        "LFM 2",
        "Lfm2ForCausalLM",
        {**GROUPED, "layer_types": ["conv", "full_attention", "conv"]},
        "convolutions, which keep states instead of keys",
        hooked="no",
    ),
    Architecture(
        "Qwen 3-Next",
        "Qwen3NextForCausalLM",
        {
            **GROUPED,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        "linear attention, routed and shared experts",
        hooked="no",
        precision=5e-5,  # its linear attention, in float32, is summed in chunks that padding shifts
    ),
    Architecture(
        "GPT-NeoX", "GPTNeoXForCausalLM", BASE, "attention beside the MLP, LayerNorm, rotary positions of a part"
    ),
    Architecture(
        "GPT-2",
        "GPT2LMHeadModel",
        {"n_positions": 256, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_ctx": 256},
        "learned positions, LayerNorm",
        config="GPT2Config",
    ),
]
BY_NAME = {each.name: each for each in ARCHITECTURES}


def table() -> str:
    """The architectures in Markdown, as the page on them has them."""
    lines = [
        "| architecture | Hugging Face class | what is special | `TransformerBridge` on 3.9 and 4.3 | "
        "`HookedTransformer` on 3.9 |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {each.name} | `{each.model}` | {each.special} | yes | {each.hooked} |" for each in ARCHITECTURES]
    return "\n".join(lines)
