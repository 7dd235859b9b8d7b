"""How a batch becomes rows: which tokens stand where, who sees whom, and which row predicts which token.

Every recipe is the same three steps: lay the batch out as rows, one forward, one loss. A *row* is a token at a
position in the clean or the noisy stream. A *visibility* relation says which rows a row attends to. The N *wanted*
predictions each name the row they are read from (`source`), their target and their weight.

The logit shift of autoregressive parents lives in `source` and nowhere else: "previous" (the paper: the row before
predicts a token), "own" (the mask's own row does) or "launch" (block layout: a copy of the token before the block
opens each group and predicts its first token).

    layout  rows                  who sees whom                                       loss on
    Full    noisy                 everyone (annealing: causal OR a Bernoulli matrix)  masked rows
    Block   noisy + clean copy    clean: causal; noisy: own block + earlier clean    masked rows, AR on clean rows
    Causal  clean                 causal                                             every next token (the AR parent)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .rows import CLEAN, NOISY, Denoiser, Held, NoisedBatch, Pattern, Rows, noise_share, visible
from .runtime import generator

__all__ = [
    "CLEAN", "NOISY", "Annealing", "Block", "Causal", "Denoiser", "Full", "Growth", "Held", "Layout", "NoisedBatch",
    "Pattern", "Rows", "layout_from_config", "noise_share", "visible",
]  # fmt: skip


class Layout(Protocol):
    """What training and sampling need of a layout."""

    @property
    def name(self) -> str: ...

    def training_rows(self, batch: NoisedBatch) -> Rows: ...

    def decoding_rows(self, ids_BL: Tensor, valid_BL: Tensor, wanted_BL: Tensor) -> Rows: ...


@dataclass(frozen=True)
class Full:
    """The paper's layout: the noised sequence, every row sees every row of its document."""

    source: Literal["previous", "own"] = "previous"
    name: str = "full"

    def __post_init__(self) -> None:
        if self.source not in ("previous", "own"):
            raise ValueError(f"the full layout reads source 'previous' or 'own', not {self.source!r}")

    @property
    def offset(self) -> int:
        """Rows between a token and the row that predicts it."""
        return 1 if self.source == "previous" else 0

    def training_rows(self, batch: NoisedBatch) -> Rows:
        b, i = batch.noised_BL.nonzero(as_tuple=True)
        return _rows(
            batch.ids_BL,
            batch.document_BL,
            batch.valid_BL,
            source=b * batch.x0_BL.shape[1] + i - self.offset,
            target=batch.x0_BL[b, i],
            weight=batch.weight_BL[b, i],
            level=noise_share(batch)[b, i],
            pattern="full",
            maskable=int(batch.maskable_BL.sum()),
            noised=len(b),
            annealed=batch.annealed_LL,
        )

    def decoding_rows(self, ids_BL: Tensor, valid_BL: Tensor, wanted_BL: Tensor) -> Rows:
        """Rows of a canvas; predictions of the `wanted_BL` tokens in row-major order."""
        b, i = wanted_BL.nonzero(as_tuple=True)
        if self.offset and bool((i == 0).any()):
            raise ValueError("under the shift nothing predicts position 0: begin the canvas with the start token")
        return _rows(
            ids_BL,
            torch.zeros_like(ids_BL),
            valid_BL,
            source=b * ids_BL.shape[1] + i - self.offset,
            target=ids_BL[b, i],
            weight=torch.ones(len(b), device=ids_BL.device),
            level=torch.ones(len(b), device=ids_BL.device),
            pattern="full",
            maskable=len(b),
            noised=len(b),
        )


@dataclass(frozen=True)
class Causal:
    """The autoregressive parent as a layout: clean rows, each predicts the token after it. Nothing is noised."""

    name: str = "causal"

    def training_rows(self, batch: NoisedBatch) -> Rows:
        b, i = batch.maskable_BL.nonzero(as_tuple=True)
        return _rows(
            batch.x0_BL,
            batch.document_BL,
            batch.valid_BL,
            source=b * batch.x0_BL.shape[1] + i - 1,
            target=batch.x0_BL[b, i],
            weight=torch.ones(len(b), device=batch.x0_BL.device),
            level=torch.zeros(len(b), device=batch.x0_BL.device),
            pattern="causal",
            maskable=len(b),
            noised=len(b),
        )

    def decoding_rows(self, ids_BL: Tensor, valid_BL: Tensor, wanted_BL: Tensor) -> Rows:
        """Rows of a text; predictions of the `wanted_BL` tokens from what stands before each."""
        zeros = torch.zeros_like(wanted_BL)
        batch = NoisedBatch(
            ids_BL, ids_BL, zeros, wanted_BL, zeros.float(), torch.zeros_like(ids_BL), valid_BL, zeros.long()
        )
        return self.training_rows(batch)


@dataclass(frozen=True)
class Block:
    """Block diffusion with clean context: the noisy stream beside a clean copy (arXiv 2503.09573, 2512.14067).

    A plain shift would read the first token of a block from a row that does not see the block, so the source is the
    mask's own row or a launch row. `ar_weight` adds next-token cross-entropy on the clean rows (0: none).

    Blocks and positions count from the start of each packed document, as they do when a text is decoded. A prompt that
    ends inside a block leaves it partly given; every block has its own noise level and any subset of its tokens may
    be masked, so training meets that state like any other.
    """

    size: int = 8
    source: Literal["own", "launch"] = "own"
    ar_weight: float = 0.0
    name: str = "block"

    def __post_init__(self) -> None:
        if self.source not in ("own", "launch"):
            raise ValueError(f"the block layout reads source 'own' or 'launch', not {self.source!r}")
        if self.size < 1:
            raise ValueError(f"block size must be at least 1 token, not {self.size}")
        if self.ar_weight < 0:
            raise ValueError(f"ar_weight must not be negative, not {self.ar_weight}")

    def groups(self, length: int) -> Tensor:
        """Block index of each position of one document, (L,)."""
        return torch.arange(length) // self.size

    def noise_groups(self, document_BL: Tensor) -> Tensor:
        """Noise group of each token of packed documents, 0, 1, ... in each sample, int64 (B, L): a level per block."""
        return (_positions(document_BL) % self.size == 0).cumsum(1) - 1

    def training_rows(self, batch: NoisedBatch) -> Rows:
        B, L = batch.x0_BL.shape
        device = batch.x0_BL.device
        position_BL = _positions(batch.document_BL)
        # Launch rows: one for each block that does not begin its document, (L - 1) // size at most, the rest padding.
        opens_BL = (position_BL % self.size == 0) & (position_BL > 0)
        K = (L - 1) // self.size if self.source == "launch" else 0
        opens_BK = torch.argsort(~opens_BL, dim=1, stable=True)[:, :K]
        before_BK = (opens_BK - 1).clamp(min=0)
        # Row order: noisy tokens, launch rows, clean tokens.
        R, clean0 = 2 * L + K, L + K
        b, i = batch.noised_BL.nonzero(as_tuple=True)
        if self.source == "own":
            source = i
        else:
            launch_BL = L + opens_BL.cumsum(1) - 1  # the launch row of the block that begins here
            source = torch.where(opens_BL[b, i], launch_BL[b, i], i - 1)
        parts = [b * R + source], [batch.x0_BL[b, i]], [batch.weight_BL[b, i]], [noise_share(batch)[b, i]]
        if self.ar_weight:
            c, j = batch.maskable_BL.nonzero(as_tuple=True)
            ones = torch.ones(len(c), device=device)
            extra = c * R + clean0 + j - 1, batch.x0_BL[c, j], ones * self.ar_weight, ones * 0
            for part, more in zip(parts, extra, strict=True):
                part.append(more)

        def rows_of(x_BL: Tensor, at_BK: Tensor) -> Tensor:
            return torch.cat([x_BL, x_BL.gather(1, at_BK), x_BL], 1)

        stream_R = torch.full((R,), NOISY, device=device)
        stream_R[clean0:] = CLEAN
        valid = rows_of(batch.valid_BL, before_BK)
        valid[:, L:clean0] &= opens_BL.gather(1, opens_BK)
        return Rows(
            ids=torch.cat([batch.ids_BL, batch.x0_BL.gather(1, before_BK), batch.x0_BL], 1),
            position=rows_of(position_BL, before_BK),
            stream=stream_R.expand(B, R),
            block=rows_of(position_BL // self.size, opens_BK),
            document=rows_of(batch.document_BL, before_BK),
            valid=valid,
            source=torch.cat(parts[0]),
            target=torch.cat(parts[1]),
            teacher=None,
            weight=torch.cat(parts[2]),
            level=torch.cat(parts[3]),
            pattern="block",
            plain=False,
            maskable=int(batch.maskable_BL.sum()),
            noised=len(b),
        )

    def decoding_rows(self, ids_BL: Tensor, valid_BL: Tensor, wanted_BL: Tensor) -> Rows:
        """Rows of a canvas in which every block before a wanted one is finished: its own clean copy.

        Of the training rows only what a prediction is made from: the noisy and launch rows of the blocks with wanted
        positions, and the clean rows before each sample's last such block. Every sample has as many rows as the one
        that needs most, padded on the right; the wanted rows are those of training, in row-major order.
        """
        zeros = torch.zeros_like(ids_BL)
        group_BL = self.groups(ids_BL.shape[1]).to(ids_BL.device).expand_as(ids_BL)
        batch = NoisedBatch(ids_BL, ids_BL, wanted_BL, wanted_BL, wanted_BL.float(), zeros, valid_BL, group_BL)
        rows = dataclasses.replace(self, ar_weight=0.0).training_rows(batch)
        asked_BG = zeros.scatter_add(1, group_BL, wanted_BL.long()) > 0
        last_B1 = torch.where(wanted_BL, group_BL, -1).amax(1, keepdim=True)
        return _only(rows, torch.where(rows.stream == CLEAN, rows.block < last_B1, asked_BG.gather(1, rows.block)))

    def cached_rows(self, ids_BL: Tensor, valid_BL: Tensor, wanted_BL: Tensor, held_B: Tensor) -> Rows:
        """The same predictions from what a cache does not hold yet: a block a sample, the finished tokens before it.

        Args:
            wanted_BL: positions of at most one block per sample.
            held_B: int64, leading tokens of each sample whose clean rows the cache holds.

        Row order: finished tokens to be kept (as many as the sample that lacks most needs, the others padded), a
        launch row where the layout has one, the block. A sample without wanted positions adds nothing.
        """
        B, L = ids_BL.shape
        asked_B = wanted_BL.any(1)
        start_B = torch.where(asked_B, wanted_BL.long().argmax(1) // self.size * self.size, held_B)
        lacking_B = (start_B - held_B).clamp(min=0)
        launch = int(self.source == "launch")
        keep = int(lacking_B.max())
        clean, block = torch.arange(keep, device=ids_BL.device), torch.arange(-launch, self.size, device=ids_BL.device)
        position_BR = torch.cat([held_B[:, None] + clean, start_B[:, None] + block], 1)
        inside_BR = (position_BR >= 0) & (position_BR < L)
        at_BR = position_BR.clamp(0, L - 1)
        use_BR = torch.cat([clean < lacking_B[:, None], asked_B[:, None].expand(B, len(block))], 1)
        b, i = wanted_BL.nonzero(as_tuple=True)
        row = keep + launch + i - start_B[b]
        assert bool((i < start_B[b] + self.size).all()), "one block per sample"
        # Under "launch" the row before predicts; before a block's first token that is the launch row.
        source = b * position_BR.shape[1] + row - launch
        noisy_BR = torch.cat([torch.zeros_like(clean), torch.full_like(block, NOISY)]).expand_as(at_BR)
        ones = torch.ones(len(b), device=ids_BL.device)
        return Rows(
            ids=ids_BL.gather(1, at_BR),
            position=at_BR,
            stream=noisy_BR,
            block=torch.where(noisy_BR == NOISY, start_B[:, None], at_BR) // self.size,
            document=torch.zeros_like(at_BR),
            valid=use_BR & inside_BR & valid_BL.gather(1, at_BR),
            source=source,
            target=ids_BL[b, i],
            teacher=None,
            weight=ones,
            level=ones,
            pattern="block",
            plain=False,
            maskable=len(b),
            noised=len(b),
            keep=keep,
        )


def layout_from_config(diffusion: dict[str, Any]) -> Full | Block:
    """The layout a checkpoint's `diffusion` dict promises."""
    name = diffusion.get("layout", "full")
    if name == "full":
        return Full(diffusion.get("source", "previous"))
    if name == "block":
        if "block_size" not in diffusion:
            raise ValueError("the block layout needs a block size; give block_size = 8, say")
        return Block(int(diffusion["block_size"]), diffusion.get("source", "own"))
    raise ValueError(f"layout {name!r} is not known to this version of diffulm; it knows full and block")


def _rows(
    ids_BL: Tensor,
    document_BL: Tensor,
    valid_BL: Tensor,
    *,
    source: Tensor,
    target: Tensor,
    weight: Tensor,
    level: Tensor,
    pattern: Pattern,
    maskable: int,
    noised: int,
    annealed: Tensor | None = None,
) -> Rows:
    """Rows of a layout with one stream, in which row r is position r."""
    B, L = ids_BL.shape
    zeros = torch.zeros_like(ids_BL)
    return Rows(
        ids=ids_BL,
        position=torch.arange(L, device=ids_BL.device).expand(B, L),
        stream=zeros + (CLEAN if pattern == "causal" else NOISY),
        block=zeros,
        document=document_BL,
        valid=valid_BL,
        source=source,
        target=target,
        teacher=None,
        weight=weight,
        level=level,
        pattern=pattern,
        plain=bool(valid_BL.all()) and bool((document_BL == document_BL[:, :1]).all()),
        maskable=maskable,
        noised=noised,
        annealed=annealed,
    )


def _only(rows: Rows, needed_BR: Tensor) -> Rows:
    """The needed rows of every sample, in their order, padded on the right to the longest sample.

    Nobody needed may attend to what is left out, and every source is needed.
    """
    needed_BR = needed_BR & rows.valid
    R, width = rows.ids.shape[1], max(1, int(needed_BR.sum(1).max()))
    at_BW = torch.argsort(~needed_BR, dim=1, stable=True)[:, :width]
    taken: dict[str, Any] = {
        name: getattr(rows, name).gather(1, at_BW) for name in ("ids", "position", "stream", "block", "document")
    }
    place_BR = needed_BR.cumsum(1) - 1
    b, r = rows.source // R, rows.source % R
    return dataclasses.replace(rows, **taken, valid=needed_BR.gather(1, at_BW), source=b * width + place_BR[b, r])


def _positions(document_BL: Tensor) -> Tensor:
    """Position of each token in its own document, int64 (B, L); documents are stretches of one index."""
    at_BL = torch.arange(document_BL.shape[1], device=document_BL.device).expand_as(document_BL)
    begins_BL = torch.ones_like(document_BL, dtype=torch.bool)
    begins_BL[:, 1:] = document_BL[:, 1:] != document_BL[:, :-1]
    return at_BL - torch.where(begins_BL, at_BL, 0).cummax(1).values


@dataclass(frozen=True)
class Annealing:
    """Attention annealing (arXiv 2410.17891): causal attention opens at random over `steps` steps.

    At step k one Bernoulli(r) matrix with r = min(1, (k + 1) / steps) is OR-ed with the causal one, for the whole
    batch, all heads and all layers. Once r = 1 there is no matrix, so the fast unmasked kernels run.
    """

    steps: int
    seed: int = 0

    def ratio(self, step: int) -> float:
        """Share of later positions visible at a step, in (0, 1]."""
        return 1.0 if self.steps <= 0 else min(1.0, (step + 1) / self.steps)

    def matrix(self, step: int, length: int) -> Tensor | None:
        """bool (length, length), True = visible although later; None once everything is."""
        ratio = self.ratio(step)
        if ratio >= 1:
            return None
        u = generator(self.seed, step, purpose="anneal").random((length, length))
        return torch.from_numpy(u < ratio)


@dataclass(frozen=True)
class Growth:
    """Block sizes that grow during training, each for an equal share of `steps`; small blocks are nearest the parent.

    A block of one token is the parent's own next-token prediction (arXiv 2512.06776 starts there). However few the
    steps, the last one has the last size.
    """

    sizes: tuple[int, ...]
    steps: int

    def size(self, step: int) -> int:
        """Tokens per block at a step; steps beyond the last count as the last."""
        step = min(step, self.steps - 1)
        return self.sizes[((step + 1) * len(self.sizes) - 1) // self.steps]
