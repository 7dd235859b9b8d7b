"""Rows: what every forward sees, whoever laid it out, and the relation that says which row attends to which.

A *row* is a token at a position in the clean or the noisy stream. `layout.py` makes them from batches and canvases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Pattern = Literal["full", "causal", "block"]
NOISY, CLEAN = 1, 0


@dataclass(frozen=True)
class Rows:
    """A batch laid out. The first six describe every row and are (B, R), the next five the wanted predictions, (N,).

    ids, position: token and position; stream: NOISY or CLEAN; block: block index; document: packed document index
    (all int64); valid: bool, False on padding. source: flat index b * R + r of the row that predicts; target: token
    id; teacher: flat index of the clean row whose distribution is the soft target, or None (int64); weight: float32,
    weight in the bound; level: float32, share of maskable tokens that is noised (0 for clean rows).

    Known on the host, so that a training step never waits for the device: `pattern`; `plain` (one document, no
    padding in any sample); `maskable` and `noised`, token counts; `annealed`, bool, pairs visible although
    later, (R, R) (None: the pattern as it stands); `keep`: how many of each sample's first rows a cache keeps.
    """

    ids: Tensor
    position: Tensor
    stream: Tensor
    block: Tensor
    document: Tensor
    valid: Tensor
    source: Tensor
    target: Tensor
    teacher: Tensor | None
    weight: Tensor
    level: Tensor
    pattern: Pattern
    plain: bool
    maskable: int
    noised: int
    annealed: Tensor | None = None
    keep: int = 0

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on another device; from pinned memory (`pinned`) the copy runs beside other work."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pinned(self) -> Rows:
        """The same rows in page-locked host memory, from which a GPU copies without the host waiting. CUDA only."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in fields.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **changed)

    def window(self, start_B: Tensor, width: int) -> Rows:
        """Rows start_B to start_B + width - 1 of every sample, for a cache that holds the others.

        The wanted rows' sources have to be among them. Where a window reaches beyond the sample its rows are invalid.
        """
        assert self.teacher is None and self.annealed is None
        R = self.ids.shape[1]
        at_BW = start_B[:, None] + torch.arange(width, device=start_B.device)
        inside_BW = (at_BW >= 0) & (at_BW < R)
        at_BW = at_BW.clamp(0, R - 1)
        sample_N, row_N = self.source // R, self.source % R
        row_N = row_N - start_B[sample_N]
        assert bool(((row_N >= 0) & (row_N < width)).all()), "a source outside its window"
        taken: dict[str, Any] = {
            name: getattr(self, name).gather(1, at_BW) for name in ("ids", "position", "stream", "block", "document")
        }
        valid = self.valid.gather(1, at_BW) & inside_BW
        return dataclasses.replace(self, **taken, valid=valid, source=sample_N * width + row_N, plain=False)

    def padded(self, capacity: int) -> Rows:
        """The wanted rows filled up to `capacity` with copies of weight 0, so that shapes stay few on CUDA."""
        n = len(self.source)
        assert n <= capacity, (n, capacity)
        if n == capacity or n == 0:
            return self
        fill = torch.zeros(capacity - n, dtype=torch.long, device=self.source.device)

        def grow(x: Tensor, value: float | None = None) -> Tensor:
            tail = x[fill] if value is None else torch.full_like(x[fill], value)
            return torch.cat([x, tail])

        return dataclasses.replace(
            self,
            source=grow(self.source),
            target=grow(self.target),
            teacher=None if self.teacher is None else grow(self.teacher),
            weight=grow(self.weight, 0.0),
            level=grow(self.level, 0.0),
        )


class Denoiser(Protocol):
    """Predictions of the clean token from rows. A table of probabilities satisfies it: exact tests become possible.

    Calling it gives (N, V) logits for sampling and scoring; the mask column is -inf. `nll` gives (N,) nats for
    training, without an N x V tensor where that can be avoided.
    """

    def __call__(self, rows: Rows, *, cache: Any = None) -> Tensor: ...

    def nll(self, rows: Rows) -> Tensor: ...


@dataclass(frozen=True)
class NoisedBatch:
    """Clean and noised tokens of one micro-batch, all (B, L): what `MaskedDiffusion.corrupt` took and gave."""

    x0_BL: Tensor
    ids_BL: Tensor
    noised_BL: Tensor
    maskable_BL: Tensor
    weight_BL: Tensor
    document_BL: Tensor
    valid_BL: Tensor
    group_BL: Tensor
    annealed_LL: Tensor | None = None


def noise_share(batch: NoisedBatch) -> Tensor:
    """Share of maskable tokens of its group that is noised, for every token, (B, L) float32."""
    G = int(batch.group_BL.max()) + 1
    zeros = torch.zeros(len(batch.x0_BL), G, device=batch.x0_BL.device)
    noised = zeros.scatter_add(1, batch.group_BL, batch.noised_BL.float())
    maskable = zeros.scatter_add(1, batch.group_BL, batch.maskable_BL.float())
    return (noised / maskable.clamp(min=1)).gather(1, batch.group_BL)


@dataclass(frozen=True)
class Held:
    """Rows of earlier forwards whose keys and values a cache keeps, (B, S): position, stream, block, document int64,
    valid bool. A slot that is not valid (ragged batches leave some) is seen by nobody."""

    position: Tensor
    stream: Tensor
    block: Tensor
    document: Tensor
    valid: Tensor

    @classmethod
    def of(cls, rows: Rows, n: int) -> Held:
        """The first `n` rows of every sample."""
        return cls(*(getattr(rows, f.name)[:, :n] for f in dataclasses.fields(cls)))

    def at(self, index: Any) -> Held:
        """The same attributes, each tensor indexed."""
        return Held(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))

    def followed_by(self, other: Held) -> Held:
        """These slots, then the other's."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return Held(*(torch.cat(pair, 1) for pair in pairs))


def visible(rows: Rows, held: Held | None = None) -> Tensor:
    """Who sees whom, bool (B, R, S + R): [b, q, k] = row q attends to slot k of the cache, then to row k.

    Padding sees itself, to have a softmax. In the full pattern a held slot hides where the same position is computed
    afresh: two streams of one position would be two tokens.
    """
    R = rows.ids.shape[1]
    fresh = Held.of(rows, R)
    key = fresh if held is None else held.followed_by(fresh)
    S = key.position.shape[1] - R
    if S and rows.pattern == "full":
        again = ((key.position[:, :S, None] == rows.position[:, None, :]) & rows.valid[:, None, :]).any(2)
        key = dataclasses.replace(key, valid=torch.cat([key.valid[:, :S] & ~again, key.valid[:, S:]], 1))
    everything = slice(None)
    seen = _sees(rows.pattern, fresh.at((everything, everything, None)), key.at((everything, None)), rows.annealed)
    eye = torch.eye(R, dtype=torch.bool, device=rows.position.device)
    return seen | torch.cat([eye.new_zeros(R, S), eye], 1)


def flex_mask(rows: Rows) -> Any:
    """`visible` as a FlexAttention BlockMask (arXiv 2412.05496): the same relation, asked pair by pair inside the
    kernel, so that on CUDA no B x R x R tensor is ever made. Tiles of 128 x 128 in which nobody sees anybody are
    skipped. (On other devices torch lists the tiles from a whole mask; only tests go that way.)
    """
    from torch.nn.attention.flex_attention import create_block_mask

    B, R = rows.ids.shape
    every, pattern, annealed = Held.of(rows, R), rows.pattern, rows.annealed

    def mask_mod(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        later = None if annealed is None else annealed[q, k]
        return _sees(pattern, every.at((b, q)), every.at((b, k)), later) | (q == k)

    device = rows.ids.device
    return create_block_mask(mask_mod, B, None, R, R, device=str(device), _compile=device.type == "cuda")


def _sees(pattern: Pattern, query: Held, key: Held, annealed: Tensor | None) -> Tensor:
    """The relation itself, between rows whose attributes broadcast against each other (any row sees itself besides).

    Written once: `visible` asks it of all pairs together, `flex_mask` of one pair at a time.
    """
    together = (query.document == key.document) & key.valid
    causal = key.position <= query.position
    if pattern == "causal":
        return together & causal
    if pattern == "full":
        return together if annealed is None else together & (causal | annealed)
    noisy_sees = torch.where(key.stream == CLEAN, key.block < query.block, key.block == query.block)
    return together & torch.where(query.stream == CLEAN, (key.stream == CLEAN) & causal, noisy_sees)
