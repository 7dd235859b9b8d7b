"""Which rows a transformers model really sees, and whether its head is only a head: probed, never trusted."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .denoiser import HFDenoiser
from .layout import Block, Causal, Full, Rows, visible

__all__ = ["check_attention", "check_head", "dependency_matrix", "make_bidirectional", "windowed_layers"]


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
