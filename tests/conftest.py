"""Settings and fixtures that every test shares.

Nothing here imports persona_lens at module level: the jaxtyping hook instruments the package as it is first imported.
"""

import os
from pathlib import Path

# Set before anything imports torch or a hub client: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

# Parallel workers share the cores, and one thread makes sums repeat bit for bit.
torch.set_num_threads(1)

# How long an example takes says nothing on shared cores.
settings.register_profile("unhurried", parent=settings(), deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """The folder of the paper's reference traits, judged rollouts and transcripts."""
    folder = os.environ.get("PERSONA_LENS_REFERENCE_DATA")
    if not folder:
        pytest.skip("PERSONA_LENS_REFERENCE_DATA, the folder of the reference's traits and rollouts, is not set")
    return Path(folder)
