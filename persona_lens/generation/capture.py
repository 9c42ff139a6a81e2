"""Response means read while the responses are sampled, so that extracting from them runs the model no more.

Each pass of the decode loop over a token of a reply adds that token's residual stream, at every layer, to its row's
sum. The means equal those of a pass over the finished responses (arXiv:2507.21509, section 2.2).
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from persona_lens.chat.batches import ChatTokens
from persona_lens.generation.decoding import ReplyPass
from persona_lens.interventions.hooks import attachments
from persona_lens.models.pass_context import announced
from persona_lens.models.scopes import Hook, hooked
from persona_lens.models.structure import Model, identify, model_device, residual_points
from persona_lens.storage.files import ensure_writable, zeros_on_disk


class CapturedMean(NamedTuple):
    """One response's mean residual stream and its tokens' mean norm; row 0 of `stream` is the embedding."""

    mean: Float[Tensor, "stream d_model"]
    norm: Float[Tensor, " stream"]


class Capture:
    """Sums over the replies of one call of `generate`, while they are sampled."""

    def __init__(self, model: Model, n_rows: int):
        dtype = torch.promote_types(next(iter(model.parameters())).dtype, torch.float32)
        device, shape = model_device(model), (len(residual_points(model)), n_rows)
        self.sums: Float[Tensor, "stream row d_model"] = torch.zeros(
            *shape, int(model.cfg.d_model), dtype=dtype, device=device
        )
        self.norms: Float[Tensor, "stream row"] = torch.zeros(shape, dtype=dtype, device=device)
        self.counts: Int[Tensor, " row"] = torch.zeros(n_rows, dtype=torch.long)
        self._current: ReplyPass | None = None
        self._rows = self._places = torch.zeros(0, dtype=torch.long, device=device)

    def add(self, reply_pass: ReplyPass, resid: Float[Tensor, "batch pos d_model"], stream: int) -> None:
        """Add the tokens in the last column of a pass, at one point of the stream (0: the embedding)."""
        if reply_pass is not self._current:
            self._begin(reply_pass)
        if not reply_pass.of_prompt:
            spoken = resid[:, -1].to(self.sums).index_select(0, self._places)
            self.sums[stream].index_add_(0, self._rows, spoken)
            self.norms[stream].index_add_(0, self._rows, spoken.norm(dim=-1))

    def _begin(self, reply_pass: ReplyPass) -> None:
        """At the first layer of a pass: where its rows are, and their counts."""
        self._current = reply_pass
        self._rows = torch.tensor(reply_pass.speaking, device=self.sums.device)
        self._places = torch.tensor(reply_pass.places, device=self.sums.device)
        if reply_pass.of_prompt:  # these rows begin, perhaps again: a batch that did not fit is begun anew in halves
            self.sums[:, self._rows], self.norms[:, self._rows] = 0, 0
            self.counts[list(reply_pass.speaking)] = 0
        else:
            self.counts[list(reply_pass.speaking)] += 1

    def mean(self, row: int) -> CapturedMean | None:
        """A reply's mean, on the CPU; None for an empty one."""
        count = int(self.counts[row])
        return CapturedMean(self.sums[:, row].cpu() / count, self.norms[:, row].cpu() / count) if count else None


@contextmanager
def capturing(model: Model, n_rows: int) -> Iterator[Capture]:
    """While open, `generate(read_up_to=)` of `n_rows` prompts leaves the sums of its replies in the yielded value.

    `read_up_to` is the last layer. What interventions that are attached already have done is seen. Sums are float32,
    or float64 where the model is.
    """
    capture = Capture(model, n_rows)
    hooks = []
    for stream, point in enumerate(residual_points(model)):

        def read(_module: nn.Module, _inputs: Any, resid: Tensor, stream: int = stream) -> None:
            reply_pass = announced()
            if isinstance(reply_pass, ReplyPass):
                capture.add(reply_pass, resid, stream)

        hooks.append(Hook(point, read))
    with hooked(model, hooks):
        yield capture


class CapturedMeans:
    """Means of sampled responses, in a `.npy` file or in memory, looked up by the token ids of their chats.

    A mean is returned only under the weights and interventions that the response was sampled with, since it would
    differ under others. Hooks that a user attached without this package are not seen: attach the same ones, or none.
    """

    def __init__(self, path: str | Path | None, model: Model, n_rows: int):
        """Open the file, or make it with room for `n_rows`; in memory without a path. It grows where it is full.

        Raises ValueError where the file is damaged or of a model of another shape: move it away.
        """
        self.model, self.tokenizer = model, model.tokenizer
        self._path, self._step = None if path is None else Path(path), max(1, n_rows)
        stream, width = int(model.cfg.n_layers) + 1, int(model.cfg.d_model)
        self._dtype = np.dtype([("key", "V16"), ("norm", "<f4", (stream,)), ("mean", "<f4", (stream, width))])
        exists = self._path is not None and self._path.exists()
        self._rows = self._opened() if exists else self._with_room(self._step)
        self._places = {bytes(key): place for place, key in enumerate(self._rows["key"]) if any(bytes(key))}

    def put(self, chats: Sequence[ChatTokens], means: Sequence[CapturedMean | None]) -> None:
        """Keep the means of chats; None, of an empty response, is not kept."""
        conditions = self._conditions()
        for chat, captured in zip(chats, means, strict=True):
            if captured is None:
                continue
            key = _key(conditions, chat)
            place = self._places.get(key, len(self._places))
            if place == len(self._rows):  # a new file takes the old one's place once it is whole
                self._rows = self._with_room(len(self._rows) + self._step, first=self._rows)
            self._rows[place] = (key, captured.norm.numpy(), captured.mean.numpy())
            self._places[key] = place
        if isinstance(self._rows, np.memmap):
            self._rows.flush()

    def places(self, chats: Sequence[ChatTokens]) -> list[int | None]:
        """Where the mean over each chat's whole response is, if it was sampled as the model is now; else None."""
        conditions = self._conditions()
        return [self._places.get(_key(conditions, chat)) if chat.skip == 0 else None for chat in chats]

    def read(self, place: int) -> CapturedMean:
        """The mean at a place."""
        row = self._rows[place]
        return CapturedMean(torch.from_numpy(row["mean"].copy()), torch.from_numpy(row["norm"].copy()))

    def _conditions(self) -> str:
        """What else a response's mean depends on: the weights and the interventions."""
        acting = [(str(a.at), value.fingerprint) for a in attachments(self.model) for value in a.interventions]
        return repr((identify(self.model).weights_hash, acting))

    def _with_room(self, n_rows: int, *, first: np.ndarray | None = None) -> np.ndarray:
        """Rows of zeros in the file or in memory, the first of them copied from others."""
        if self._path is not None:
            _refuse_link(self._path)
            return zeros_on_disk(self._path, self._dtype, (n_rows,), first=first)
        rows = np.zeros(n_rows, self._dtype)
        if first is not None:
            rows[: len(first)] = first
        return rows

    def _opened(self) -> np.ndarray:
        assert self._path is not None
        _refuse_link(self._path)
        try:
            rows = np.lib.format.open_memmap(self._path, mode="r+")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{self._path} is not a file of captured means ({error}): move it away.") from error
        if rows.dtype != self._dtype or rows.ndim != 1:
            raise ValueError(
                f"{self._path} holds other means than those of a model of this shape: choose another output, or move "
                "that file away."
            )
        return rows


def _refuse_link(path: Path) -> None:
    """Raise OSError where means could not be written to a path, or a symbolic link has its name."""
    ensure_writable(path)
    if path.is_symlink():
        raise OSError(f"Cannot write {path}: expected a file, got a symbolic link: remove it, or name another output.")


def _key(conditions: str, chat: ChatTokens) -> bytes:
    return hashlib.sha256(repr((conditions, chat.prompt, chat.response)).encode()).digest()[:16]
