"""The libraries that persona_lens is measured beside: their versions, and an environment for each.

They cannot share one with persona_lens or with each other, since their requirements contradict each other. All run on
the torch and transformers of the environment that builds them, so that only the library differs.
Knows nothing about what is measured.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent / ".peers"
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Peer:
    """A library to compare with, the version that is measured, and how pip installs it."""

    name: str
    version: str
    imports: tuple[str, ...] | None = None
    """What it imports, where it is installed without its own requirements; None to let pip follow those."""

    @property
    def folder(self) -> Path:
        """Where its environment lies."""
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return self.folder / "bin" / "python"

    @property
    def installed(self) -> bool:
        """Whether its environment was built whole, with what is asked for now."""
        done = self.folder / "installed"
        return done.is_file() and done.read_text() == self._recipe

    @property
    def _recipe(self) -> str:
        return "\n".join(" ".join(arguments) for arguments in self._installs())

    def _installs(self) -> list[list[str]]:
        """The arguments of each `pip install`, in order."""
        same = [
            f"{library}=={version(library).partition('+')[0]}" for library in ("torch", "transformers", "jaxtyping")
        ]
        it = f"{self.name}=={self.version}"
        # torch goes first and alone: its exact version lets pip take a CPU-only build from an index or folder that
        # offers one, where resolving it with the rest would fetch gigabytes of CUDA libraries.
        if self.imports is None:
            return [same[:1], [*same, it]]
        return [same[:1], [*same, *self.imports], ["--no-deps", it]]

    def build(self) -> None:
        """Make the environment anew. Raises CalledProcessError where pip fails."""
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
        for arguments in self._installs():
            subprocess.run([self.python, "-m", "pip", "install", "--quiet", *arguments], check=True)
        (self.folder / "installed").write_text(self._recipe)


REPENG = Peer("repeng", "0.4.0")
# Asks for transformers below 5, and runs on 5 unchanged.
STEERING_VECTORS = Peer("steering-vectors", "0.12.2", imports=("tqdm", "scikit-learn"))
NNSIGHT = Peer("nnsight", "0.8.1")
SAKLAS = Peer("saklas", "5.3.0")

PEERS = (REPENG, STEERING_VECTORS, NNSIGHT, SAKLAS)


def build_missing() -> None:
    """Build the environments that are missing or were built for other versions."""
    for peer in PEERS:
        if not peer.installed:
            print(f"building the environment of {peer.name} {peer.version}", flush=True)
            peer.build()
