"""The only place that knows TransformerLens: loading, hook points, and forward passes without what is not needed.

`HookedTransformer` (transformer-lens 3.9) and `TransformerBridge` (3.9 and 4.x) stand behind the same functions.
Knows nothing about traits, vectors or chats.
"""

from persona_lens.models.embedded import EMBEDDED_MODEL
from persona_lens.models.ends import declared_ends
from persona_lens.models.forward import Past, forward
from persona_lens.models.loading import ModelClass, bridge_from_transformers, hooked_from_transformers, load_model
from persona_lens.models.memory import (
    DoesNotFit,
    backing_off,
    default_token_budget,
    does_not_fit,
    is_out_of_memory,
    release_memory,
)
from persona_lens.models.passes import CurrentPass, KnownPass, announce, announced, watch_passes
from persona_lens.models.scopes import (
    ForwardGate,
    Hook,
    Scope,
    gate_forward,
    global_randomness_kept,
    hooked,
    model_lock,
    scope_on,
    would_act,
)
from persona_lens.models.structure import (
    Model,
    ModelIdentity,
    ResidualBasis,
    cpu_threads,
    from_paper_layer,
    identify,
    is_bridge,
    model_device,
    plain_name,
    refuse_other_threads,
    resid_post_name,
    residual_basis,
    residual_points,
    suspended,
)

__all__ = [
    "EMBEDDED_MODEL",
    "CurrentPass",
    "DoesNotFit",
    "ForwardGate",
    "Hook",
    "KnownPass",
    "Model",
    "ModelClass",
    "ModelIdentity",
    "Past",
    "ResidualBasis",
    "Scope",
    "announce",
    "announced",
    "backing_off",
    "bridge_from_transformers",
    "cpu_threads",
    "declared_ends",
    "default_token_budget",
    "does_not_fit",
    "forward",
    "from_paper_layer",
    "gate_forward",
    "global_randomness_kept",
    "hooked",
    "hooked_from_transformers",
    "identify",
    "is_bridge",
    "is_out_of_memory",
    "load_model",
    "model_device",
    "model_lock",
    "plain_name",
    "refuse_other_threads",
    "release_memory",
    "resid_post_name",
    "residual_basis",
    "residual_points",
    "scope_on",
    "suspended",
    "watch_passes",
    "would_act",
]
