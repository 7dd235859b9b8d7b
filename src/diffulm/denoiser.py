"""A Hugging Face causal language model as a denoiser.

Everything that depends on how a transformers model is built lives here and nowhere else: the head, the mask column,
`is_causal`, attention masks, and the probe that checks which positions a model really sees. The classes are the stock
ones: since transformers 5.2 the key `is_causal: false` in a config makes most decoders bidirectional, and the probe
finds those it does not.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .layout import NOISY, Block, Causal, Denoiser, Full, Held, Pattern, Rows, visible
from .rows import flex_mask
from .runtime import Precision

__all__ = ["Denoiser", "HFDenoiser", "check_attention", "dependency_matrix", "make_bidirectional", "windowed_layers"]

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
    """

    flex: bool | None = None

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
        self._dense: str = config._attn_implementation
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
        if self.config._attn_implementation != how:
            self.model.set_attn_implementation(how)  # type: ignore[operator]
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
            raise ValueError(f"{self.config.model_type} (ALiBi) cannot decode from a cache; decode without one")
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


# ------------------------------------------------------------------------------------------- which rows see which


def make_bidirectional(config: Any) -> list[str]:
    """Set the config keys that make attention full in both directions; returns what was changed, in words.

    Sliding windows and chunks are opened here, in the config and before a model is built, because a live model
    refuses it and a 4-D mask would switch them off silently. Where layers have types, the window is made as wide as
    the model and the types stay: gemma3 and olmo3 rotate positions by another base in sliding layers, and classes
    with types ask for a window even when no layer uses it. Chunked layers stay causal at any width, so they change.
    """
    changed = []
    types = getattr(config, "layer_types", None)
    everything = _positions(config) if types else None
    for key in ("sliding_window", "attention_chunk_size"):
        width = getattr(config, key, None)
        if width is not None and (everything is None or width < everything):
            changed.append(f"{key} {width} -> {everything or 'none'}")
            setattr(config, key, everything)
    if types is None and getattr(config, "use_sliding_window", False):
        config.use_sliding_window = False
    if types and "chunked_attention" in types:
        changed.append("chunked layers -> full attention")
        config.layer_types = ["full_attention" if kind == "chunked_attention" else kind for kind in types]
    config.is_causal = False
    return changed


def _positions(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 1 << 20)


def windowed_layers(config: Any) -> list[str]:
    """Config keys that hide distant tokens. A short probe cannot see a window longer than itself; this can."""
    found = []
    types = getattr(config, "layer_types", None)
    window, chunk = (getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size"))
    if types is None:
        if window and getattr(config, "use_sliding_window", True):
            found.append(f"sliding_window = {window}")
        if chunk:
            found.append(f"attention_chunk_size = {chunk}")
        return found
    narrow = window is None or window < _positions(config)
    for kind in sorted(set(types) - {"full_attention"}):
        if kind != "sliding_attention":
            found.append(str(kind))
        elif narrow:
            found.append(f"sliding_attention over {window} tokens")
    return found


@torch.no_grad()
def dependency_matrix(denoiser: HFDenoiser, *, length: int = 8, layout: Full | Block | None = None) -> Tensor:
    """[i, j] = the output of row i moves when the token of row j changes, bool (R, R); layout None: full, R = length.

    One forward of R + 1 sequences. "Moves" means by more than 1e-4 of the largest movement that this change
    causes anywhere, which no rounding reaches and every attended token exceeds by far.
    """
    device = next(denoiser.parameters()).device
    one = _probe_rows(layout or Full("own"), length).to(device)
    R = one.ids.shape[1]
    vocabulary = denoiser.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    # Spread over the vocabulary: the first ids are often reserved tokens that were never trained, all alike.
    spread = torch.linspace(0, vocabulary - 1, min(vocabulary, 4 * R)).long().flip(0).tolist()
    usable = torch.tensor([t for t in dict.fromkeys(spread) if t != denoiser.mask_token_id], device=device)
    if len(usable) <= R:
        raise ValueError(f"a vocabulary of {vocabulary} tokens is too small to probe attention with")
    ids = usable[:R].repeat(R + 1, 1)
    for j in range(R):
        # A token that is in the sequence nowhere else, so that attention to j must notice.
        ids[j + 1, j] = usable[R + j % (len(usable) - R)]
    per_row = ("position", "stream", "block", "document", "valid")
    many = {name: getattr(one, name).expand(R + 1, R) for name in per_row}
    training = denoiser.training
    denoiser.eval()
    hidden = denoiser.hidden(dataclasses.replace(one, ids=ids, **many)).float()
    denoiser.train(training)
    moved = (hidden[1:] - hidden[:1]).abs().amax(-1).T
    # Each change is measured against what it does most: two tokens may be nearly alike.
    return moved > 1e-4 * moved.amax(0, keepdim=True)


def _probe_rows(layout: Full | Block, length: int) -> Rows:
    """Rows of one sequence of a layout, every token wanted; a block layout gets two blocks at least."""
    if isinstance(layout, Block):
        layout = dataclasses.replace(layout, size=min(layout.size, length // 2))
    ids = torch.zeros(1, length, dtype=torch.long)
    everything = torch.ones_like(ids, dtype=torch.bool)
    wanted = everything.clone()
    wanted[:, 0] = False
    return layout.decoding_rows(ids, everything, wanted)


def check_attention(denoiser: HFDenoiser, *, name: str, layout: Full | Block | None = None) -> None:
    """Raise ValueError, naming family and remedy, unless every row sees what the layout promises, and no more.

    Attention is probed and never trusted: since transformers 5.2 most families honour `is_causal: false`, but
    some stay causal without a word. Layout None means full: every position sees every other one.
    """
    family = denoiser.config.model_type
    layout = layout or Full("own")
    other = "choose another family (llama, qwen2, qwen3, gpt2, ...)"
    if layout.name == "full" and denoiser.own_pattern != "full":
        raise ValueError(
            f"{name}: its config does not say is_causal: false, so plain transformers would open this {family} causal; "
            "put the key back into config.json, or convert the parent again"
        )
    if layout.name == "full" and (windows := windowed_layers(denoiser.config)):
        raise ValueError(
            f"{name}: {family} has layers that do not see the whole text ({', '.join(windows)}); windows are opened by "
            f"`diffulm convert`, recurrent and convolutional layers cannot be: {other}"
        )
    try:
        matrix = dependency_matrix(denoiser, layout=layout)
    except Exception as error:  # whatever a family raises when asked for this attention, the answer is the same
        raise ValueError(
            f"{name}: {family} cannot run with {layout.name} attention in this transformers ({type(error).__name__}: "
            f"{error}); {other}"
        ) from error
    promised = visible(_probe_rows(layout, 8))[0].to(matrix.device)
    if wrong := int((matrix != promised).sum()):
        raise ValueError(
            f"{name}: {family} stays causal, windowed or recurrent whatever it is told ({wrong} of {matrix.numel()} "
            f"pairs of positions are not as {layout.name} attention needs them); {other}"
        )


@torch.no_grad()
def check_head(denoiser: HFDenoiser, *, name: str, tolerance: float = 1e-3) -> None:
    """Raise ValueError unless backbone + head gives the logits of the model's own forward."""
    device = next(denoiser.parameters()).device
    ids = torch.arange(1, 9, device=device)[None]
    valid = torch.ones_like(ids, dtype=torch.bool)
    wanted = valid.clone()
    wanted[:, 0] = False
    layout = Causal() if denoiser.own_pattern == "causal" else Full()
    keep, denoiser.mask_token_id = denoiser.mask_token_id, None
    try:
        ours = denoiser(layout.decoding_rows(ids, valid, wanted))
        with denoiser.precision.context(device.type):
            theirs = denoiser.model(input_ids=ids, use_cache=False).logits[0, :-1].to(ours.dtype)
    finally:
        denoiser.mask_token_id = keep
    scale = theirs.abs().max().clamp(min=1e-6)
    if float((ours - theirs).abs().max() / scale) > tolerance:
        raise ValueError(
            f"{name}: {denoiser.config.model_type} changes its logits after the output projection in a way "
            "diffulm does not know; please report the family"
        )
