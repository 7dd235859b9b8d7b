"""Masked attention on CPUs, without the tiles in which nobody sees anybody.

torch's kernel for CPUs computes every pair of rows and masks afterwards. Block rows see less than a quarter of each
other, packed documents less still, and in training that kernel was 40% of a block step. FlexAttention, which skips
tiles too, trains on CUDA alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: The name under which transformers knows `attend`.
TILED = "diffulm_tiled"
#: Query rows of a tile; smaller ones skip more and multiply smaller matrices.
TILE = 128


class TiledAttention(torch.autograd.Function):
    """softmax(q k^T * scale + mask) v, TILE query rows at a time, each against the columns that any of them sees.

    Keeps q, k, v and the output and computes the weights again for the gradient (arXiv 2205.14135): no (R, S) tensor
    outlives its tile.

    Args of `apply`: q (B, H, R, E), k and v (B, H, S, E) of one dtype; mask (B or 1, 1, R, S), 0 where a row sees and
    a very negative number where it does not; every row sees something. Returns (B, H, R, E) of that dtype.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        tiles = _tiles(mask)
        out = torch.empty_like(q)
        for rows, columns in tiles:
            weights = _weights(q, k, mask, scale, rows, columns)
            out[:, :, rows] = weights.to(v.dtype) @ v.index_select(2, columns)
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
        for rows, columns in ctx.tiles:
            weights = _weights(q, k, mask, ctx.scale, rows, columns)
            part, keys = grad[:, :, rows], k.index_select(2, columns)
            grad_v.index_add_(2, columns, (weights.to(v.dtype).mT @ part).to(wide))
            slope = (part @ v.index_select(2, columns).mT).to(wide)
            slope = weights.mul_(slope.sub_(inner[:, :, rows])).mul_(ctx.scale).to(q.dtype)
            grad_q[:, :, rows] = slope @ keys
            grad_k.index_add_(2, columns, (slope.mT @ q[:, :, rows]).to(wide))
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


@torch.compiler.disable
def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`TiledAttention` in the form of transformers' attention functions: (B, R, H, E) out; key heads may be fewer.

    With dropout torch's own kernel, which drops the weights of the whole.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    # Under autocast rotated queries and keys are wider than values.
    query, key = query.to(value.dtype), key.to(value.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout:
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scale)
    else:
        out = TiledAttention.apply(query, key, value, attention_mask, scale)
    return out.transpose(1, 2).contiguous(), None


def _tiles(mask: Tensor) -> list[tuple[slice, Tensor]]:
    """Query rows and the columns that any of them sees, in any sample."""
    seen = (mask[:, 0] == 0).any(0)
    starts = range(0, len(seen), TILE)
    return [(slice(i, i + TILE), seen[i : i + TILE].any(0).nonzero()[:, 0]) for i in starts]


def _weights(q: Tensor, k: Tensor, mask: Tensor, scale: float, rows: slice, columns: Tensor) -> Tensor:
    """(B, H, TILE, columns) attention weights, at least float32."""
    scores = q[:, :, rows] @ k.index_select(2, columns).mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale)
    # softmax and not exp: of very negative numbers MKL's exp takes twelve times as long.
    return torch.softmax(scores.add_(mask[:, :, rows].index_select(3, columns)), -1)
