"""Other people's files and tools: vectors in and out of their formats, SAE features, the hub, and inspect-ai.

A layer is the output of a block counted from 0 on our side of every border; what a format cannot say (the number of
layers, which row is which) is asked for and checked, never guessed, and nothing that a file brings along is run.
"""

from persona_lens.interop.control_vectors import read_control_vector, write_control_vector
from persona_lens.interop.conversion import Format, read_vectors, write_vectors
from persona_lens.interop.hub import pull_vectors, push_vectors
from persona_lens.interop.inspect_scorer import persona_scorer
from persona_lens.interop.responses import read_messages, read_reference_csv
from persona_lens.interop.sparse_autoencoders import Decomposition, SparseAutoencoder, decompose, read_sae
from persona_lens.interop.tensor_files import (
    LastRow,
    read_block_rows,
    read_layer_dict,
    read_reference_vectors,
    read_vector_folder,
    write_layer_dict,
    write_reference_vectors,
)

__all__ = [
    "Decomposition",
    "Format",
    "LastRow",
    "SparseAutoencoder",
    "decompose",
    "persona_scorer",
    "pull_vectors",
    "push_vectors",
    "read_block_rows",
    "read_control_vector",
    "read_layer_dict",
    "read_messages",
    "read_reference_csv",
    "read_reference_vectors",
    "read_sae",
    "read_vector_folder",
    "read_vectors",
    "write_control_vector",
    "write_layer_dict",
    "write_reference_vectors",
    "write_vectors",
]
