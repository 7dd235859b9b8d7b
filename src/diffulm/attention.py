"""Masked attention on CPUs, without the tiles in which nobody sees anybody.

torch's kernel for CPUs computes every pair of rows and masks afterwards. Block rows see less than a quarter of each
other, and in training that kernel was 40% of a block step (docs/LOG.md). FlexAttention, which skips tiles too, trains
on CUDA alone. `benchmarks/block_attention.py` has both in one run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: The name under which transformers knows `attend`.
TILED = "diffulm_tiled"
#: Query rows of a tile; smaller ones skip more and multiply smaller matrices.
TILE = 128
#: Share of all pairs above which skipping the others does not pay (float32: 1.3 times as fast at 0.48, 0.7 at 0.76).
WORTH = 0.6


class Tile(NamedTuple):
    """Query rows of one sample and the columns that any of them sees, int64."""

    sample: int
    rows: slice
    columns: Tensor


def tiles_of(mask: Tensor) -> list[Tile]:
    """The tiles of a mask (B, 1, R, S) that is 0 where a row sees and very negative where it does not."""
    found = []
    for b, seen in enumerate(mask[:, 0] == 0):
        rows = [slice(i, i + TILE) for i in range(0, len(seen), TILE)]
        found += [Tile(b, part, seen[part].any(0).nonzero()[:, 0]) for part in rows]
    return found


def share_computed(tiles: list[Tile], mask: Tensor) -> float:
    """Share of all pairs of rows that lie in the tiles."""
    R, S = mask.shape[2:]
    return sum(len(range(R)[tile.rows]) * len(tile.columns) for tile in tiles) / (len(mask) * R * S)


class TiledAttention(torch.autograd.Function):
    """softmax(q k^T * scale + mask) v, TILE query rows at a time, each against the columns that any of them sees.

    Keeps q, k, v and the output and computes the weights again for the gradient (arXiv 2205.14135): no tensor of
    H x R x S is made.

    Args of `apply`: q (B, H, R, E), k (B, H, S, E) and v (B, H, S, F) of one dtype; mask (B, 1, R, S), 0 where a row
    sees and a very negative number where it does not, every row sees something; its `tiles_of`; the scale. Returns
    (B, H, R, F) of that dtype.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, tiles: list[Tile], scale: float) -> Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        for tile in tiles:
            b, rows, columns = tile
            weights = _weights(q, k, mask, scale, tile)
            out[b, :, rows] = weights.to(v.dtype) @ v[b].index_select(1, columns)
        ctx.save_for_backward(q, k, v, mask, out)
        ctx.scale, ctx.tiles = scale, tiles
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out = ctx.saved_tensors
        (grad,) = grads
        wide = torch.promote_types(q.dtype, torch.float32)
        inner = (grad * out).sum(-1, keepdim=True, dtype=wide)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for tile in ctx.tiles:
            b, rows, columns = tile
            weights = _weights(q, k, mask, ctx.scale, tile)
            part = grad[b, :, rows]
            grad_v[b].index_add_(1, columns, (weights.to(v.dtype).mT @ part).to(wide))
            slope = (part @ v[b].index_select(1, columns).mT).to(wide)
            slope = weights.mul_(slope.sub_(inner[b, :, rows])).mul_(ctx.scale).to(q.dtype)
            grad_q[b, :, rows] = slope @ k[b].index_select(1, columns)
            grad_k[b].index_add_(1, columns, (slope.mT @ q[b, :, rows]).to(wide))
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


@torch.compiler.disable
def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    otherwise: Callable[..., tuple[Tensor, Any]],
    **more: Any,
) -> tuple[Tensor, Any]:
    """`TiledAttention` in the form of transformers' attention functions: (B, R, H, F) out; key heads may be fewer.

    `otherwise`: transformers' function for torch's own kernel, which does what has no tiles: no mask, a mask that is
    not ours (a stock model whose training left this name in its config), dropout.
    """
    if attention_mask is None or attention_mask.dtype == torch.bool or dropout:
        return otherwise(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    # Under autocast rotated queries and keys are wider than values.
    query, key = query.to(value.dtype), key.to(value.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    tiles = getattr(attention_mask, "tiles", None) or tiles_of(attention_mask)
    out: Tensor = TiledAttention.apply(query, key, value, attention_mask, tiles, scale)
    return out.transpose(1, 2).contiguous(), None


def _weights(q: Tensor, k: Tensor, mask: Tensor, scale: float, tile: Tile) -> Tensor:
    """(H, TILE, columns) attention weights, at least float32."""
    b, rows, columns = tile
    scores = q[b, :, rows] @ k[b].index_select(1, columns).mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale)
    # softmax and not exp, which is slow on very negative numbers.
    return torch.softmax(scores.add_(mask[b, :, rows].index_select(2, columns)), -1)
