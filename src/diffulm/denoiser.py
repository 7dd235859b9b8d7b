"""A Hugging Face causal language model as a denoiser.

What depends on how a transformers model is built lives here and in `probe.py`, and nowhere else: the head, the mask
column, `is_causal`, attention masks. The classes are the stock ones: since transformers 5.2 the key `is_causal: false`
in a config makes most decoders bidirectional, and the probe finds those it does not.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .attention import TILED, WORTH, attend, share_computed, tiles_of
from .layout import NOISY, Denoiser, Held, Pattern, Rows, visible
from .rows import flex_mask
from .runtime import Precision

__all__ = ["Cache", "ChunkedNLL", "Denoiser", "HFDenoiser"]

#: Vocabulary entries of the head computed at a time in training: bounds the logits in memory to N x CHUNK.
CHUNK = 8192


class HFDenoiser(nn.Module):
    """Rows in, predictions of clean tokens out; the module that FSDP shards and the optimizer trains.

    Args:
        model: a transformers causal LM. `config.is_causal` says what it does without a mask.
        mask_token_id: suppressed (-inf) wherever a noisy row predicts; None for an autoregressive parent.
        mask_row_added: the mask token is a row of its own, so no row at all may predict it.
        precision: autocast for the forward pass, if any.

    `flex`: whether masked attention runs by FlexAttention; None: in training on CUDA, where the class can. There a
    dense B x R x R mask is large and keeps the fast kernels away, and shapes are few: each is compiled once.
    `tiled`: the same for `attention.attend`; None: in training on CPUs, where the class runs torch's SDPA and enough
    pairs of rows are hidden.
    """

    flex: bool | None = None
    tiled: bool | None = None

    def __init__(
        self,
        model: nn.Module,
        mask_token_id: int | None,
        *,
        mask_row_added: bool = True,
        precision: Precision | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.mask_token_id = mask_token_id
        self.mask_row_added = mask_row_added
        self.precision = precision or Precision(next(model.parameters()).dtype)
        config: Any = model.config
        self.config: Any = config
        # An earlier denoiser of this model may have left one of its own.
        ours = config._attn_implementation in (TILED, "flex_attention")
        self._dense: str = "sdpa" if ours else config._attn_implementation
        # Padding comes from lengths. With pad = EOS, a padding index would deny the end of text its gradient.
        self.model.get_input_embeddings().padding_idx = None  # type: ignore[operator]
        self._takes_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters
        # A new module says it is training. Whoever puts that back (the probe) would turn the model's dropout on.
        self.train(model.training)

    @property
    def backbone(self) -> nn.Module:
        """The model without its head."""
        base = self.model.base_model
        if base is self.model:  # llama4: a class whose prefix names nothing it has
            base = self.model.model
        assert isinstance(base, nn.Module)
        return base

    @property
    def head(self) -> nn.Linear:
        """The output projection (tied or not)."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        assert isinstance(head, nn.Linear)
        return head

    def nll(self, rows: Rows) -> Tensor:
        """(N,) float32 nats of the wanted targets, with gradient."""
        return self(rows, nll=True)

    def forward(self, rows: Rows, *, cache: Cache | None = None, nll: bool = False) -> Tensor:
        """(N, V) float32 logits, or (N,) nats. Both run inside this forward because FSDP gathers weights around it.

        With a cache (`new_cache`) the rows also see its slots, and their first `rows.keep` stay in it.
        """
        with self.precision.context(rows.ids.device.type):
            hidden_ND = self.hidden(rows, cache).flatten(0, 1)[rows.source]
        # In float64 runs (the tests' exact mode) nothing may drop to float32.
        out_dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        dtype = self.precision.autocast or hidden_ND.dtype
        weight_VD, bias_V = self.head.weight, self.head.bias
        suppress_N = self._suppressed(rows)
        if nll:
            return ChunkedNLL.apply(
                hidden_ND.to(dtype), weight_VD, bias_V, rows.target, suppress_N, self.mask_token_id, self.config
            ).to(out_dtype)
        logits_NV = (hidden_ND.to(dtype) @ weight_VD.to(dtype).T).to(out_dtype)
        return suppress(finish_logits(logits_NV, bias_V, self.config), suppress_N, self.mask_token_id)

    def hidden(self, rows: Rows, cache: Cache | None = None) -> Tensor:
        """(B, R, D) output of the backbone under the rows' visibility."""
        kwargs: dict[str, Any] = {"position_ids": rows.position} if self._takes_positions else {}
        mask = self.attention_mask(rows, None if cache is None else cache.held)
        how = self._dense if mask is None or isinstance(mask, Tensor) else "flex_attention"
        if isinstance(mask, Tensor) and cache is None and self._tiles(mask):
            how = TILED
        if self.config._attn_implementation != how:
            if how == TILED:
                _know_tiles()
            self.model.set_attn_implementation(how)  # type: ignore[operator]
            if how == TILED and self.config._attn_implementation != how:
                self.tiled = False  # a class with attention of its own: ask no more
        if cache is not None:
            cache.keys_and_values.keep = rows.keep
            kwargs["past_key_values"] = cache.keys_and_values
        out = self.backbone(input_ids=rows.ids, attention_mask=mask, use_cache=cache is not None, **kwargs)
        if cache is not None and rows.keep:
            kept = Held.of(rows, rows.keep)
            cache.held = kept if cache.held is None else cache.held.followed_by(kept)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def new_cache(self) -> Cache:
        """An empty cache for this model. ValueError for a family whose layers keep more than keys and values."""
        if self.config.model_type in ALIBI:
            raise ValueError(
                f"{self.config.model_type} (ALiBi) cannot decode from a cache; use full attention without one"
            )
        return Cache(_keys_and_values())

    @property
    def own_pattern(self) -> Pattern:
        """What the model does without a mask, by its config."""
        return "causal" if getattr(self.config, "is_causal", True) is not False else "full"

    def attention_mask(self, rows: Rows, held: Held | None = None) -> Any:
        """None where the model's own attention is what the rows ask for (the fast kernels), else a 4-D float mask.

        Float and not bool: eager attention adds a mask, and bool would add 0 or 1. finfo.min and not -inf: a row
        that sees nothing would be NaN. A BlockMask where FlexAttention is to run (`flex`).
        """
        if held is None and rows.plain and rows.annealed is None and rows.pattern == self.own_pattern:
            return None
        if self.config.model_type in ALIBI:
            raise ValueError(
                f"{self.config.model_type} adds its positions to the attention mask (ALiBi), so packed, padded, "
                "annealed and block rows are impossible; use unpadded full attention or another family"
            )
        if held is None and self._flexes(rows.ids.device):
            return flex_mask(rows)
        dtype = next(self.model.parameters()).dtype
        floor = torch.finfo(self.precision.autocast or dtype).min
        return torch.zeros((), dtype=dtype, device=rows.ids.device).where(visible(rows, held), floor)[:, None]

    def _flexes(self, device: torch.device) -> bool:
        if self.flex is not None:
            return self.flex
        # transformers' flex path refuses dropout.
        dropout = any(getattr(self.config, name, None) for name in ("attention_dropout", "attn_pdrop"))
        able = bool(getattr(self.model, "_supports_flex_attn", False)) and not dropout
        return device.type == "cuda" and self.training and able

    def _tiles(self, mask: Tensor) -> bool:
        """Whether attention runs in tiles under a dense mask, which then has them as `tiles`."""
        here = mask.device.type == "cpu" and self.training and self._dense == "sdpa"
        if self.tiled is False or not (self.tiled or here):
            return False
        tiles = tiles_of(mask)
        mask.tiles = tiles  # type: ignore[attr-defined]  # every layer gets this very tensor
        return bool(self.tiled) or share_computed(tiles, mask) < WORTH

    def _suppressed(self, rows: Rows) -> Tensor | None:
        """Which wanted rows must not predict the mask token, bool (N,); None: no row, or no need to ask."""
        if self.mask_token_id is None:
            return None
        if self.mask_row_added:
            return torch.ones_like(rows.source, dtype=torch.bool)
        # A reused mask token is ordinary text too: clean rows may predict it.
        return rows.stream.reshape(-1)[rows.source] == NOISY


ALIBI = ("bloom", "mpt")


@dataclasses.dataclass
class Cache:
    """Keys and values of rows that later forwards see without computing them again, and which rows they are.

    A forward adds its rows' first `rows.keep` and leaves the rest no trace, so one forward can commit a finished block
    and propose the next, and denoising steps in between only read.
    """

    keys_and_values: Any
    held: Held | None = None

    def clear(self) -> None:
        """Forget everything."""
        self.keys_and_values, self.held = _keys_and_values(), None


def _know_tiles() -> None:
    """Tell transformers of `attend`, and that under its name masks are made as for SDPA."""
    from functools import partial

    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(TILED, partial(attend, otherwise=sdpa_attention_forward))
    AttentionMaskInterface.register(TILED, sdpa_mask)


def _keys_and_values() -> Any:
    """transformers' growing cache, except that an update stores the first `keep` entries alone."""
    from transformers import DynamicCache

    class KeysAndValues(DynamicCache):
        keep = 0

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
            new = key_states, value_states
            stored = [x[..., : self.keep, :] for x in new]
            layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
            held = (layer.keys, layer.values) if layer is not None and layer.is_initialized else None
            if self.keep:
                super().update(*stored, layer_idx)
            return new if held is None else tuple(torch.cat(pair, -2) for pair in zip(held, new, strict=True))

    return KeysAndValues()


def finish_logits(logits: Tensor, bias: Tensor | None, config: Any) -> Tensor:
    """What families do between the projection and the softmax: bias, scale (cohere, granite), soft cap (gemma2)."""
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def suppress(logits_NV: Tensor, rows_N: Tensor | None, column: int | None) -> Tensor:
    """-inf in one column at the given rows (in place: the logits are this module's own)."""
    if rows_N is not None and column is not None:
        logits_NV[:, column] = logits_NV[:, column].masked_fill(rows_N, float("-inf"))
    return logits_NV


class ChunkedNLL(torch.autograd.Function):
    """Cross-entropy of a linear head, CHUNK vocabulary entries at a time: no N x V tensor, forward or backward.

    Chunks of the vocabulary and not of the rows: each slice of the weight gradient is then written once, where row
    chunks would add a whole V x D matrix for every chunk. The backward pass computes the logits again, one product
    more against two N x V float32 tensors kept (benchmarks/train_step.py has the alternatives in the same run).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        suppress_N: Tensor | None,
        column: int | None,
        config: Any,
    ) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        chunk_of_target_N = target_N // CHUNK
        lse_N = torch.full((len(hidden_ND),), float("-inf"), dtype=wide, device=hidden_ND.device)
        hit_N = torch.zeros_like(lse_N)
        for part in _chunks(len(weight_VD)):
            logits = _chunk_logits(hidden_ND, weight_VD, bias_V, suppress_N, column, config, part)
            lse_N = torch.logaddexp(lse_N, torch.logsumexp(logits, -1))
            inside_N = (target_N - part.start).clamp(0, logits.shape[1] - 1)
            here = logits.gather(1, inside_N[:, None])[:, 0]
            hit_N = torch.where(chunk_of_target_N == part.start // CHUNK, here, hit_N)
            del logits  # or they would stay while the next chunk's are made
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, suppress_N, lse_N)
        ctx.column, ctx.config = column, config
        return lse_N - hit_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,) = grads
        hidden_ND, weight_VD, bias_V, target_N, suppress_N, lse_N = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden_ND, dtype=grad_N.dtype)
        _, weight_trains, bias_trains, *_ = ctx.needs_input_grad  # a frozen head's gradient is as large as the head
        grad_weight = torch.empty_like(weight_VD) if weight_trains else None
        grad_bias = torch.empty_like(bias_V) if bias_V is not None and bias_trains else None
        cap = getattr(ctx.config, "final_logit_softcapping", None)
        scale = (getattr(ctx.config, "logit_scale", None) or 1.0) / (getattr(ctx.config, "logits_scaling", None) or 1.0)
        chunk_of_target_N = target_N // CHUNK
        for part in _chunks(len(weight_VD)):
            logits = _chunk_logits(hidden_ND, weight_VD, bias_V, suppress_N, ctx.column, ctx.config, part)
            slope = 1 - (logits / cap).square() if cap else None  # d tanh
            grad = logits.sub_(lse_N[:, None]).exp_()
            inside_N = (target_N - part.start).clamp(0, logits.shape[1] - 1)
            hit_N = (chunk_of_target_N == part.start // CHUNK).to(grad.dtype)
            grad.scatter_add_(1, inside_N[:, None], -hit_N[:, None])
            grad *= grad_N[:, None] * scale
            if slope is not None:
                grad = torch.where(grad == 0, grad, grad * slope)  # the suppressed column: 0 * inf
            small = grad.to(hidden_ND.dtype)
            grad_hidden += small @ weight_VD[part].to(hidden_ND.dtype)
            if grad_weight is not None:
                grad_weight[part] = small.T @ hidden_ND
            if grad_bias is not None:
                grad_bias[part] = grad.sum(0)
            del logits, slope, grad, small
        return grad_hidden.to(hidden_ND.dtype), grad_weight, grad_bias, None, None, None, None


def _chunks(n: int) -> list[slice]:
    return [slice(i, min(i + CHUNK, n)) for i in range(0, n, CHUNK)]


def _chunk_logits(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    suppress_N: Tensor | None,
    column: int | None,
    config: Any,
    part: slice,
) -> Tensor:
    """(N, CHUNK) logits of one slice of the vocabulary, at least float32."""
    logits = hidden_ND @ weight_VD[part].to(hidden_ND.dtype).T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = finish_logits(logits, None if bias_V is None else bias_V[part], config)
    inside = column is not None and part.start <= column < part.stop
    return suppress(logits, suppress_N, column - part.start) if inside and column is not None else logits
