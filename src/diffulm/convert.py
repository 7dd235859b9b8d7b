"""An autoregressive checkpoint becomes a diffusion checkpoint: mask token, embedding row, config keys, probe.

No weight changes except the mask token's row. What the model can do with masks comes from training (`diffulm adapt`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import hub
from .denoiser import HFDenoiser
from .layout import Causal, layout_from_config
from .probe import check_attention, check_head, make_bidirectional
from .process import MaskedDiffusion
from .schedule import schedule_from_name
from .tokenizer import MASK_TOKEN, encode, special_tokens

#: English that every Python carries: the text on which the document-start token is chosen.
_PROBE_TOPICS = ("assignment", "lambda", "with", "yield")


@dataclass(frozen=True)
class Conversion:
    """What was decided on the way. `start_nll`: nats/token of the parent behind each candidate start token."""

    mask_token: str
    mask_token_id: int
    mask_row: str
    start_token: str
    start_nll: dict[str, float]
    attention: list[str]


def convert(
    parent: str,
    out: Path | str,
    *,
    initialise: str = "parent",
    seed: int = 0,
    mask_token: str | None = None,
    source: str = "previous",
    layout: str = "full",
    block_size: int | None = None,
    schedule: str = "linear",
    t_min: float = 1e-3,
    trained_length: int = 1024,
    offline: bool = False,
) -> Conversion:
    """Write a diffusion checkpoint of an autoregressive parent to `out`.

    Args:
        parent: the embedded default's name, a local folder, a GGUF file or a Hub id.
        out: a new folder.
        initialise: "parent" keeps the parent's weights; "random" draws new ones as its class does before training,
            from `seed`: the control that learns from scratch with everything else equal.
        mask_token: an existing token to reuse as the mask, as the paper does; None takes the tokenizer's own mask
            token, else adds one: in a spare padded embedding row if there is one, else in a new row.
        source: which row predicts a token: "previous" (the paper's shift), "own" or "launch".
        layout: "full" (the paper) or "block".
        trained_length: tokens of the windows it will be trained on.

    Raises:
        ValueError: the parent is no model, is already converted, has no end-of-text token, or stays causal; or the
            arguments contradict each other.
    """
    diffusion: dict[str, Any] = {
        "format": hub.FORMAT,
        "process": "absorbing",
        "schedule": schedule,
        "t_min": t_min,
        "source": source,
        "layout": layout,
        "trained_length": trained_length,
        "parent": parent,
        "tokens_seen": 0,
    }
    if initialise not in ("parent", "random"):
        raise ValueError(f"initialise must be 'parent' or 'random', not {initialise!r}")
    if initialise == "random":
        diffusion["initialise"] = "random"
    if block_size is not None:
        diffusion["block_size"] = block_size
    MaskedDiffusion(0, schedule_from_name(schedule), t_min)  # refuses what is no process
    promised = layout_from_config(diffusion)
    if block_size is not None and layout != "block":
        raise ValueError(f"block_size {block_size} means nothing to the {layout} layout; leave it out")
    if trained_length < 2:
        raise ValueError(f"trained_length must be at least 2 tokens, not {trained_length}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already holds something; choose a new folder")
    model, tokenizer = hub.load_parent(parent, offline=offline)
    if getattr(model.config, "diffusion", None) is not None:
        raise ValueError(f"{parent} is a diffusion checkpoint already; train it, or convert its parent")
    special_tokens(tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and trained_length > limit:
        raise ValueError(
            f"trained_length {trained_length} is beyond the parent's {limit} positions; choose at most {limit}"
        )
    start_nll = choose_start_token(model, tokenizer)
    mask_row = add_mask_token(model, tokenizer, mask_token)
    diffusion["mask_row_added"] = mask_row != "existing token reused"
    changed = make_bidirectional(model.config) if layout == "full" else []
    if block_size is not None:
        model.config.block_size = block_size
    # Sliding windows are removed in the config, so the probed model must be built from it, not patched.
    model = rebuild(model, None if initialise == "parent" else seed)
    denoiser = HFDenoiser(model, tokenizer.mask_token_id)
    check_attention(denoiser, name=parent, layout=promised)
    check_head(denoiser, name=parent)
    hub.save(out, model, tokenizer, diffusion)
    assert isinstance(tokenizer.mask_token, str) and isinstance(tokenizer.bos_token, str)
    return Conversion(
        tokenizer.mask_token, int(tokenizer.mask_token_id), mask_row, tokenizer.bos_token, start_nll, changed
    )


def rebuild(model: Any, seed: int | None = None) -> Any:
    """A newly built model under the (changed) config: the same weights, or with a seed freshly drawn ones."""
    from transformers import AutoModelForCausalLM

    with hub.quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        fresh = AutoModelForCausalLM.from_config(model.config, dtype=next(model.parameters()).dtype)
    if seed is None:
        fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    return fresh.eval()


def add_mask_token(model: Any, tokenizer: Any, name: str | None) -> str:
    """Give tokenizer and model a mask token; returns where its row is, in words.

    A new row starts at the mean embedding: the point from which every token is about equally far.
    """
    if name is not None:
        token_id = tokenizer.convert_tokens_to_ids(name)
        if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != name:
            raise ValueError(
                f"the tokenizer has no token {name!r} to reuse as the mask; leave --mask-token out to add one"
            )
        if token_id >= model.get_input_embeddings().num_embeddings:
            raise ValueError(f"token {name!r} has id {token_id}, beyond the model's embedding rows; choose another")
        if token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
            raise ValueError(f"token {name!r} already starts, ends or pads texts; choose another for the mask")
        tokenizer.mask_token = name
        return "existing token reused"
    if tokenizer.mask_token_id is not None:
        if tokenizer.mask_token_id >= model.get_input_embeddings().num_embeddings:
            raise ValueError(
                f"the tokenizer's mask token has id {tokenizer.mask_token_id}, beyond the model's embedding rows; name "
                "another with --mask-token"
            )
        return "the tokenizer's own"
    rows = model.get_input_embeddings().num_embeddings
    tokens = len(tokenizer)
    tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    new = tokenizer.mask_token_id
    assert new == tokens, (new, tokens)
    where = "spare padded row"
    if new >= rows:
        with hub.quiet_transformers():
            model.resize_token_embeddings(new + 1, mean_resizing=False)
        where = "new row"
    tables = [model.get_input_embeddings().weight]
    if (head := model.get_output_embeddings()).weight is not tables[0]:
        tables.append(head.weight)
    with torch.no_grad():
        for table in tables:
            known = min(tokens, rows)  # a tokenizer may name tokens that the parent never had a row for
            table[known if where == "new row" else new : new + 1] = table[:known].double().mean(0).to(table.dtype)
    return where


@torch.no_grad()
def choose_start_token(model: Any, tokenizer: Any) -> dict[str, float]:
    """Make the token behind which the parent predicts text best the tokenizer's BOS; returns nats/token of each.

    A chat model's BOS may open a turn while its pretraining separated documents by another token, so the candidates
    (BOS, EOS, the unknown token when it is an end-of-text marker) are measured on a little English.
    """
    from pydoc_data.topics import topics

    special = special_tokens(tokenizer)
    names = [tokenizer.convert_ids_to_tokens(i) for i in dict.fromkeys([special.bos, special.eos])]
    vocabulary = tokenizer.get_vocab()
    names += [
        t for t in ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>") if t in vocabulary and t not in names
    ]
    names = [name for name in names if vocabulary[name] < model.get_input_embeddings().num_embeddings]
    texts = [encode(tokenizer, topics[name])[:63] for name in _PROBE_TOPICS if name in topics]
    length = min(len(text) for text in texts)
    if len(names) == 1 or length < 8:
        tokenizer.bos_token = names[0]
        return {}
    denoiser = HFDenoiser(model.eval(), None)
    nll = {}
    for name in names:
        ids = torch.tensor([[vocabulary[name], *text[:length]] for text in texts])
        wanted = torch.ones_like(ids, dtype=torch.bool)
        wanted[:, 0] = False
        rows = Causal().decoding_rows(ids, torch.ones_like(wanted), wanted)
        nll[str(name)] = float(denoiser.nll(rows).mean())
    tokenizer.bos_token = min(nll, key=nll.__getitem__)
    model.config.bos_token_id = tokenizer.bos_token_id
    return nll
