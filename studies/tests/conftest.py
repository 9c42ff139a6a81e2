"""The fixtures and marks of tests/conftest.py, for the tests of the studies."""

from tests.conftest import (  # noqa: F401
    built,
    embedded_bridge,
    embedded_directory,
    load_embedded_model,
    make_tiny_model,
    no_hook_is_left_behind,
    pytest_collection_modifyitems,
    tiny_bridge,
    tiny_tokenizer,
)
