"""Sparse autoencoders in SAELens's form, read without SAELens, and persona vectors in their features.

An SAE is a folder of `cfg.json` and `sae_weights.safetensors`. With x' = x - b_dec where the configuration says so, a
feature's activation is f(x' W_enc + b_enc): f is ReLU in a `standard` SAE, a ReLU that is 0 up to a threshold in
`jumprelu`, and a ReLU of the k highest in `topk`. Anything that would make these formulas wrong is refused.

Feature i writes row i of the decoder into the residual stream: its cosine with the vector says how far they point the
same way. With the class means, the encoder also gives how much more a feature is active with the trait.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from persona_lens.interop.tensor_files import PathLike, checked_tensor, read_safetensors
from persona_lens.storage.files import DAMAGE
from persona_lens.vectors.persona_vector import PersonaVector

if TYPE_CHECKING:
    import pandas

Architecture = Literal["standard", "jumprelu", "topk"]
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# Settings that the formulas above do not have, and the values at which they change nothing.
_INERT: dict[str, tuple[Any, ...]] = {
    "normalize_activations": ("none",),
    "reshape_activations": ("none",),
    "hook_head_index": (None,),
    "finetuning_scaling_factor": (False,),
}


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """A sparse autoencoder of the residual stream at one layer.

    Attributes:
        architecture: `standard`, `jumprelu` or `topk`.
        layer: The block whose output it reads, counted from 0.
        model_name: The model that it was trained on, as SAELens calls it; empty where the file does not say.
        centred: Whether it was trained on a stream that TransformerLens had centred; None where the file does not say.
        W_enc: Encoder.
        b_enc: Encoder's bias.
        W_dec: Decoder; row i is the direction that feature i writes.
        b_dec: Decoder's bias.
        threshold: Of each feature, in a `jumprelu` SAE.
        k: How many features are active at most, in a `topk` SAE.
        apply_b_dec_to_input: Whether the decoder's bias is taken from the input.
        rescale_acts_by_decoder_norm: Whether a `topk` SAE weighs features by the norms of their directions.
    """

    architecture: Architecture
    layer: int
    W_enc: Float[Tensor, "d_model feature"] = field(repr=False)
    b_enc: Float[Tensor, " feature"] = field(repr=False)
    W_dec: Float[Tensor, "feature d_model"] = field(repr=False)
    b_dec: Float[Tensor, " d_model"] = field(repr=False)
    threshold: Float[Tensor, " feature"] | None = field(default=None, repr=False)
    k: int | None = None
    apply_b_dec_to_input: bool = False
    rescale_acts_by_decoder_norm: bool = False
    model_name: str = ""
    centred: bool | None = None

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_dec.shape[1]

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    def encode(self, activations: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch feature"]:
        """The activation of every feature, as SAELens's `encode` gives it, in float32.

        Raises ValueError where the activations are not `d_model` wide.
        """
        if activations.shape[-1] != self.d_model:
            raise ValueError(
                f"The SAE reads activations of {self.d_model} numbers, got {activations.shape[-1]}: "
                f"take them at layer {self.layer} of {self.model_name or 'the model that it was trained on'}."
            )
        centred = activations.float() - self.b_dec * self.apply_b_dec_to_input
        before = einsum(centred, self.W_enc, "... d_model, d_model feature -> ... feature") + self.b_enc
        if self.architecture == "topk":
            assert self.k is not None  # read_sae refuses a topk SAE without it
            before = before * self.W_dec.norm(dim=-1) if self.rescale_acts_by_decoder_norm else before
            highest = before.topk(self.k, dim=-1)
            return torch.zeros_like(before).scatter(-1, highest.indices, highest.values.relu())
        if self.architecture == "jumprelu":
            assert self.threshold is not None
            return before.relu() * (before > self.threshold)
        return before.relu()


def read_sae(folder: PathLike) -> SparseAutoencoder:
    """A sparse autoencoder from a folder that SAELens saved, of version 6 or before.

    It must read the residual stream at `blocks.{l}.hook_resid_post`, or `hook_resid_pre` of the next block, which is
    the same point.

    Raises:
        FileNotFoundError: One of the two files is not there.
        ValueError: A file is damaged, the weights do not fit the configuration, or the SAE is of another kind or has
            a setting that is not handled; the sentence names it.
    """
    folder = Path(folder)
    settings = _settings(folder / CONFIG)
    architecture = _architecture(settings, folder)
    for name, inert in _INERT.items():
        if name in settings and settings[name] not in inert:
            raise ValueError(f"{folder}: {name} is {settings[name]!r}, and only {inert[0]!r} is handled: use SAELens.")
    layer = _layer(str(settings.get("hook_name") or ""), folder)
    weights = _weights(folder / WEIGHTS, settings, architecture)
    k = settings.get("k")
    if architecture == "topk" and not (isinstance(k, int) and 0 < k <= len(weights["b_enc"])):
        raise ValueError(f"{folder}: a topk SAE has a k from 1 to its number of features, got {k!r}.")
    options = settings.get("model_from_pretrained_kwargs")
    return SparseAutoencoder(
        architecture,
        layer,
        **weights,
        k=k if architecture == "topk" else None,
        apply_b_dec_to_input=bool(settings.get("apply_b_dec_to_input", True)),
        rescale_acts_by_decoder_norm=bool(settings.get("rescale_acts_by_decoder_norm", False)),
        model_name=str(settings.get("model_name") or ""),
        centred=options.get("center_writing_weights") if isinstance(options, Mapping) else None,
    )


def _settings(path: Path) -> dict[str, Any]:
    """The configuration with its `metadata` beside the rest, where versions before 6 have it, and today's names."""
    try:
        found = json.loads(path.read_bytes())
        settings = {**found, **(found.get("metadata") or {})}
    except DAMAGE as error:
        raise ValueError(f"{path} is no configuration of an SAE ({error!r}): expected a JSON object.") from error
    for old, new in (("hook_point", "hook_name"), ("activation_fn_str", "activation_fn")):
        settings.setdefault(new, settings.get(old))
    return settings


def _architecture(settings: Mapping[str, Any], folder: Path) -> Architecture:
    named, function = settings.get("architecture") or "standard", settings.get("activation_fn") or "relu"
    if named == "standard" and function == "topk":  # before version 6 a topk SAE was a standard one
        raise ValueError(f"{folder}: a topk SAE of a SAELens before version 6: load and save it with SAELens 6.")
    if named not in get_args(Architecture) or function not in ("relu", "topk"):
        raise ValueError(
            f"{folder}: the SAE is {named} with {function}, and standard, jumprelu and topk with relu are handled: "
            "use SAELens."
        )
    return named


def _layer(hook_name: str, folder: Path) -> int:
    found = re.fullmatch(r"blocks\.(\d{1,4})\.hook_resid_(post|pre)", hook_name, flags=re.ASCII)
    layer = int(found[1]) - (found[2] == "pre") if found else -1
    if layer < 0:
        raise ValueError(
            f"{folder}: the SAE reads {hook_name or 'an unnamed point'}, and persona vectors are of outputs of blocks: "
            "pass one of blocks.{l}.hook_resid_post, or hook_resid_pre of a block above 0."
        )
    return layer


def _weights(path: Path, settings: Mapping[str, Any], architecture: Architecture) -> dict[str, Tensor]:
    axes = {"W_enc": ["d_in", "d_sae"], "b_enc": ["d_sae"], "W_dec": ["d_sae", "d_in"], "b_dec": ["d_in"]}
    axes |= {"threshold": ["d_sae"]} if architecture == "jumprelu" else {}
    tensors, _ = read_safetensors(path)
    found: dict[str, Tensor] = {}
    for name, shape in axes.items():
        if name not in tensors:
            raise ValueError(f"{path} lacks {name}, which a {architecture} SAE has: get the folder again.")
        tensor = checked_tensor(tensors[name], shape, f"{path}, {name}")
        expected = [settings.get(axis) for axis in shape]
        if list(tensor.shape) != expected:
            raise ValueError(f"{path}: {name} has the shape {list(tensor.shape)}, and {CONFIG} says {expected}.")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values: get the folder again.")
        found[name] = tensor
    return found


class Feature(NamedTuple):
    """A feature of an SAE beside a vector; `activation_difference` is None where no class means were given."""

    number: int
    cosine: float
    activation_difference: float | None


@dataclass(frozen=True)
class Decomposition:
    """The features whose directions are closest to a persona vector.

    Attributes:
        trait: The vector's trait.
        layer: The vector's and the SAE's layer, counted from 0.
        model_name: The model that the SAE was trained on, as SAELens calls it.
        features: By falling cosine with the vector.
        random_cosine: The control: the 95th percentile, over random directions, of the highest cosine that any
            feature has with one.
    """

    trait: str
    layer: int
    model_name: str
    features: tuple[Feature, ...]
    random_cosine: float

    def table(self) -> "pandas.DataFrame":
        """One row for each feature, by falling cosine."""
        import pandas

        return pandas.DataFrame(self.features, columns=list(Feature._fields)).set_index("number")


def decompose(
    vector: PersonaVector,
    sae: SparseAutoencoder,
    *,
    positive_mean: Float[Tensor, " d_model"] | None = None,
    negative_mean: Float[Tensor, " d_model"] | None = None,
    top: int = 20,
    n_random: int = 100,
    seed: int = 0,
) -> Decomposition:
    """The `top` features of an SAE by the cosine of their decoder directions with a persona vector.

    With the mean activations of responses with the trait and without it, each feature also has the difference of its
    activations at the two (encode(positive) - encode(negative)). A mean is not an activation that the SAE was trained
    on: read that difference as a hint. `-vector` gives the features that point the other way. A feature whose direction
    is zero has cosine 0.

    Raises:
        ValueError: The SAE is of another layer, width or residual basis, or only one mean is given.
    """
    _refuse_unfitting(vector, sae)
    if (positive_mean is None) != (negative_mean is None):
        raise ValueError(f"{vector.trait}: a difference of activations needs both class means: pass the other one too.")
    if not 1 <= top <= sae.n_features:
        raise ValueError(f"{vector.trait}: top is from 1 to the SAE's {sae.n_features} features, got {top}.")
    difference = None
    if positive_mean is not None and negative_mean is not None:
        difference = sae.encode(positive_mean) - sae.encode(negative_mean)
    decoder = torch.nn.functional.normalize(sae.W_dec, dim=-1)
    cosines = einsum(decoder, vector.unit.direction, "feature d_model, d_model -> feature").clamp(-1, 1)
    highest = cosines.topk(top)
    return Decomposition(
        vector.trait,
        vector.layer,
        sae.model_name,
        tuple(
            Feature(index, cosine, None if difference is None else float(difference[index]))
            for cosine, index in zip(highest.values.tolist(), highest.indices.tolist(), strict=True)
        ),
        _random_cosine(decoder, n_random, seed),
    )


def _random_cosine(decoder: Float[Tensor, "feature d_model"], n_random: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n_random, decoder.shape[1], generator=generator), dim=-1)
    highest = torch.stack(
        [(decoder @ direction).max() for direction in directions]
    )  # one at a time: decoders are large
    return float(highest.quantile(0.95))


def _refuse_unfitting(vector: PersonaVector, sae: SparseAutoencoder) -> None:
    for fact, ours, theirs in (("layer", vector.layer, sae.layer), ("d_model", vector.d_model, sae.d_model)):
        if ours != theirs:
            raise ValueError(
                f"{vector.trait}: the vector has {fact} {ours} and the SAE {theirs}: pass an SAE of the "
                "vector's model at its layer (blocks.{l}.hook_resid_post)."
            )
    basis = vector.provenance and vector.provenance.model.residual_basis
    if basis is not None and sae.centred is not None and (basis == "centred") > sae.centred:
        raise ValueError(
            f"{vector.trait}: the vector is of a centred residual stream and the SAE of a raw one: "
            "extract the vector from a model without processed weights."
        )
