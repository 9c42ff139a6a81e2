"""Small sparse autoencoders as SAELens saves them, and the slow obvious encoder.

persona_lens is imported as a function runs: the jaxtyping hook instruments the package as it is first imported.
"""

import json

import torch
from safetensors.torch import save_file

from tests.vector_cases import D_MODEL, random_tensor

N_FEATURES, LAYER, K = 12, 2, 3


def settings(architecture="standard", **changes):
    """A `cfg.json` of SAELens 6."""
    metadata = {
        "sae_lens_version": "6.36.2",
        "hook_name": f"blocks.{LAYER}.hook_resid_post",
        "hook_head_index": None,
        "model_name": "toy",
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
    }
    found = {
        "architecture": architecture,
        "d_in": D_MODEL,
        "d_sae": N_FEATURES,
        "dtype": "float32",
        "device": "cuda:0",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    found |= {"k": K, "rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    return found | changes


def weights(architecture="standard"):
    found = {
        "W_enc": random_tensor(D_MODEL, N_FEATURES, seed=1),
        "b_enc": random_tensor(N_FEATURES, seed=2),
        "W_dec": random_tensor(N_FEATURES, D_MODEL, seed=3),
        "b_dec": random_tensor(D_MODEL, seed=4),
    }
    return found | ({"threshold": random_tensor(N_FEATURES, seed=5).abs()} if architecture == "jumprelu" else {})


def sae_folder(folder, architecture="standard", *, tensors=None, **changes):
    """A folder with both files; `changes` replace settings, and None leaves one out."""
    folder.mkdir(exist_ok=True)
    found = {name: value for name, value in settings(architecture, **changes).items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(found))
    save_file(weights(architecture) if tensors is None else tensors, folder / "sae_weights.safetensors")
    return folder


def slow_encode(architecture, activation):
    """Feature by feature, from the formulas."""
    held = {name: tensor.double() for name, tensor in weights(architecture).items()}
    inputs = [float(a) - float(b) for a, b in zip(activation, held["b_dec"], strict=True)]
    before = []
    for feature in range(N_FEATURES):
        value = sum(x * float(w) for x, w in zip(inputs, held["W_enc"][:, feature], strict=True))
        value += float(held["b_enc"][feature])
        if architecture == "topk":
            value *= float(held["W_dec"][feature].norm())
        before.append(value)
    limit = sorted(before)[-K] if architecture == "topk" else 0.0
    found = []
    for feature, value in enumerate(before):
        threshold = float(held["threshold"][feature]) if architecture == "jumprelu" else 0.0
        found.append(value if value > max(threshold, 0.0) and value >= limit else 0.0)
    return torch.tensor(found)
