"""persona_lens beside its peers: the residual stream of the last token of 32 texts, at all layers.

Each library runs the same weights in a process of its own, in its own environment, in the way that its users would;
the processes take turns. Rows come sorted by length, so that no one pads more for want of sorting. Run as a module,
this builds the environments, which needs a package index; the benchmarks themselves never do.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.comparison import Claim, Comparison, verdict
from benchmarks.oracle import MINIMUM_COSINE, minimum_cosine, oracle_means
from benchmarks.peer_environments import (
    NNSIGHT,
    PEERS,
    REPENG,
    REPOSITORY,
    SAKLAS,
    STEERING_VECTORS,
    Peer,
    build_missing,
)
from benchmarks.peer_process import WorkerProcess
from benchmarks.texts import Workload, short_texts
from benchmarks.timing import Result
from persona_lens.chat.batches import ChatTokens, encode
from persona_lens.models.loading import INSTALL_COMMAND, embedded_model_directory

FASTER = 1.0
KERNEL_GOAL = 1 / 1.05
"""Saklas's capture kernel does nothing but this, and is no public function: at most 5 % slower is the goal."""

N_TEXTS = 32


@dataclass(frozen=True)
class Entrant:
    """One way of one library; each of `sizes` is tried once, and the best of them races."""

    label: str
    worker: str
    method: str
    sizes: Sequence[int]
    """Rows in a batch, or the token budget of `stream_means`; 0 leaves it to the library."""
    python: Path = Path(sys.executable)

    def named(self, size: int) -> str:
        """What the tables call it with a batch size."""
        if self.method == "stream_means":
            return f"{self.label}, {f'budget {size}' if size else 'default budget'}"
        if size == 0:
            return f"{self.label}, its own batches"
        return f"{self.label}, {size} row{'s' if size > 1 else ''}"


class Work(NamedTuple):
    """Rows, longest first, with the texts that give them and what is to be found."""

    workload: Workload
    texts: list[str]
    expected: Float[Tensor, "row layer d_model"]


def peers_short(repeats: int) -> list[Comparison]:
    """Texts of 8 to 20 words: what a pass costs beside its tokens."""
    return _beside_peers(8, 20, (32, 8, 4), repeats)


def peers_texts(repeats: int) -> list[Comparison]:
    """Texts of 20 to 80 words, as most of the other benchmarks have them."""
    return _beside_peers(20, 80, (8, 4, 1), repeats)


def peers_long(repeats: int) -> list[Comparison]:
    """Ragged texts of 60 to 200 words."""
    return _beside_peers(60, 200, (8, 1), repeats)


def _beside_peers(fewest: int, most: int, sizes: Sequence[int], repeats: int) -> list[Comparison]:
    """A race over texts of so many words; no comparison where an environment is missing."""
    if not all(peer.installed for peer in PEERS):
        return []
    entrants, work = _entrants(sizes), _work(fewest, most)
    racing: dict[str, tuple[Entrant, int, Result]] = {}
    tried: list[Result] = []
    with _workers(entrants, work) as workers:
        for entrant in entrants:
            inspected = [(size, _inspected(workers[entrant.worker], entrant, size, work)) for size in entrant.sizes]
            size, best = min(inspected, key=lambda pair: pair[1].first_cpu)
            racing[entrant.label] = (entrant, size, best)
            tried += [result for _, result in inspected if result is not best]
        for _ in range(repeats):
            for entrant, size, result in racing.values():
                turn = workers[entrant.worker].ask(do="time", method=entrant.method, size=size)
                result.wall.append(turn["wall"])
                result.cpu.append(turn["cpu"])
    results = {label: result for label, (_, _, result) in racing.items()}
    verdicts = [verdict(claim, results[claim.faster], results[claim.than]) for claim in _claims(entrants)]
    return [
        Comparison(
            "Last token at all layers", work.workload, repeats, list(results.values()), tried, verdicts, MINIMUM_COSINE
        )
    ]


def _entrants(sizes: Sequence[int]) -> list[Entrant]:
    def of(peer: Peer, method: str, sizes: Sequence[int] = sizes, named: str = "") -> Entrant:
        worker = f"with_{peer.name.replace('-', '_')}"
        return Entrant(f"{peer.name} {peer.version}{named}", worker, method, sizes, peer.python)

    bridge = f"run_with_cache {version('transformer-lens')}"
    return [
        Entrant("mean_activations", "with_persona_lens", "mean_activations", sizes),
        Entrant("stream_means", "with_persona_lens", "stream_means", (0, 256)),
        of(REPENG, "batched_get_hiddens"),
        of(STEERING_VECTORS, "record_activations"),
        of(NNSIGHT, "trace"),
        Entrant(bridge, "with_transformer_lens", "run_with_cache", sizes),
        of(SAKLAS, "compute_manifold_node_stats", (0,), " fit"),
        of(SAKLAS, "capture kernel", sizes, " kernel"),
    ]


def _claims(entrants: Sequence[Entrant]) -> list[Claim]:
    ours = [entrant for entrant in entrants if entrant.worker == "with_persona_lens"]
    return [
        Claim(our.label, peer.label, KERNEL_GOAL if peer.method == "capture kernel" else FASTER)
        for our in ours
        for peer in entrants
        if peer not in ours
    ]


@contextmanager
def _workers(entrants: Sequence[Entrant], work: Work) -> Iterator[Mapping[str, WorkerProcess]]:
    """A process for each library, with the model loaded and the rows at hand."""
    started: dict[str, WorkerProcess] = {}
    rows = [list(row.prompt + row.response) for row in work.workload.rows]
    with ExitStack() as stack:
        for entrant in entrants:
            if entrant.worker in started:
                continue
            command = [entrant.python, "-m", f"benchmarks.peer_workers.{entrant.worker}", _model_folder()]
            worker = stack.enter_context(WorkerProcess(entrant.label, command, directory=REPOSITORY))
            worker.ask(do="take", ids=rows, texts=work.texts)
            started[entrant.worker] = worker
        yield started


def _inspected(worker: WorkerProcess, entrant: Entrant, size: int, work: Work) -> Result:
    """The first run, with the least cosine of what it found to the oracle, over the layers that it found."""
    with tempfile.TemporaryDirectory() as folder:
        array = Path(folder) / "states.npy"
        result = Result(**worker.ask(do="inspect", method=entrant.method, size=size, array=str(array)))
        found = torch.from_numpy(np.load(array))
    result.name = entrant.named(size)
    result.agreement = minimum_cosine(found, work.expected, work.workload.positive)
    return result


def _work(fewest: int, most: int) -> Work:
    """Texts of `fewest` to `most` words. A row's response is its last token, which is what the oracle averages."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_model_folder())
    bundled = short_texts(tokenizer, N_TEXTS)
    words = [tokenizer.decode(row.prompt + row.response).split() for row in bundled.rows]
    found: list[tuple[ChatTokens, str, bool]] = []
    for index, positive in enumerate(bundled.positive):
        n_words = fewest + 37 * index % (most - fewest + 1)
        # A text goes on with those that follow it, on its own side, so that it is as long as it has to be.
        following = (word for text in words[index::2] + words[index % 2 : index : 2] for word in text)
        text = " ".join(islice(following, n_words))
        ids = encode(tokenizer, text)
        found.append((ChatTokens(ids[:-1], ids[-1:]), text, positive))
    found.sort(key=lambda each: -len(each[0]))
    rows, texts, positive = zip(*found, strict=True)
    expected = torch.stack([oracle_means(_double(), row) for row in rows])
    return Work(Workload(f"{N_TEXTS} texts of {fewest} to {most} words", rows, positive), list(texts), expected)


@cache
def _double() -> Any:
    """The oracle's model, in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(_model_folder(), dtype=torch.float64).eval()


def _model_folder() -> Path:
    folder = embedded_model_directory()
    if folder is None:
        raise ValueError(f"The peers run the embedded model's folder, which is not there. Run: {INSTALL_COMMAND}")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The environments of the libraries that benchmarks compare with.")
    parser.add_argument("--build", action="store_true", required=True, help="build those that are missing")
    parser.parse_args()
    build_missing()
