"""Toys for exact tests.

The three-token toy: one fixed random joint over V = 3, L = 3, and its exact conditionals as a denoiser. No start token,
source "own", mask id 3. Small enough that every mask, order and outcome can be enumerated, so the theorems the package
rests on are tested as equalities. Below it, random models and stand-ins for the tests of the sampling loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffulm.denoiser import HFDenoiser
from diffulm.layout import Full, Rows
from diffulm.probe import make_bidirectional
from diffulm.process import MaskedDiffusion
from diffulm.sampling import Policy, Step
from diffulm.tokenizer import SpecialTokens

V, L, MASK = 3, 3, 3
LAYOUT = Full("own")
PROCESS = MaskedDiffusion(MASK)
TEXTS = list(itertools.product(range(V), repeat=L))
ORDERS = list(itertools.permutations(range(L)))


def joint(seed: int = 0) -> np.ndarray:
    """p[x1, x2, x3], float64, far from independent."""
    p = np.random.default_rng(seed).gamma(0.4, size=(V, V, V)) + 1e-3
    return p / p.sum()


@dataclass(frozen=True)
class Table:
    """A denoiser that knows p(token at i | revealed tokens) for every partly masked text: (ids) -> (L, V)."""

    rows: dict[tuple[int, ...], np.ndarray]

    @classmethod
    def exact(cls, p: np.ndarray) -> Table:
        """The conditionals of a joint: consistent, the perfect denoiser."""
        rows = {}
        for ids in itertools.product(range(V + 1), repeat=L):
            view = p[tuple(slice(None) if t == MASK else slice(t, t + 1) for t in ids)]
            total = view.sum()
            marginals = [view.sum(axis=tuple(a for a in range(L) if a != i)) / total for i in range(L)]
            rows[ids] = np.stack([np.resize(m, V) for m in marginals])
        return cls(rows)

    @classmethod
    def inconsistent(cls, seed: int = 1) -> Table:
        """Conditionals drawn at random: no joint has them, as no trained network's do."""
        rng = np.random.default_rng(seed)
        return cls({ids: rng.dirichlet(np.ones(V) * 0.7, size=L) for ids in itertools.product(range(V + 1), repeat=L)})

    def __call__(self, rows: Rows, *, cache: object = None) -> Tensor:
        states_B = (rows.ids * torch.tensor([(V + 1) ** (L - 1 - i) for i in range(L)])).sum(1)
        return self.log_probs[states_B].flatten(0, 1)[rows.source]

    @cached_property
    def log_probs(self) -> Tensor:
        """(states, L, V + 1): every row at once, states in the order of `itertools.product`; the mask has mass 0."""
        states = itertools.product(range(V + 1), repeat=L)
        return torch.from_numpy(np.stack([np.pad(self.rows[ids], ((0, 0), (0, 1))) for ids in states])).log()

    def nll(self, rows: Rows) -> Tensor:
        return -self(rows).gather(1, rows.target[:, None])[:, 0]

    def cross_entropy(self, text: tuple[int, ...], mask: tuple[bool, ...]) -> float:
        """Nats of the masked tokens of a text given the others."""
        ids = tuple(MASK if m else t for t, m in zip(text, mask, strict=True))
        return -sum(float(np.log(self.rows[ids][i, text[i]])) for i in range(L) if mask[i])

    def order_nll(self, text: tuple[int, ...], order: tuple[int, ...]) -> float:
        """Nats of a text revealed one token at a time in an order."""
        ids, total = [MASK] * L, 0.0
        for i in order:
            total -= float(np.log(self.rows[tuple(ids)][i, text[i]]))
            ids[i] = text[i]
        return total


def masks() -> Iterator[tuple[bool, ...]]:
    """Every mask but the empty one."""
    return (m for m in itertools.product([False, True], repeat=L) if any(m))


# ------------------------------------------------------------------------------------ larger toys for the sampling loop

VOCAB = 24
SPECIAL = SpecialTokens(bos=0, eos=1, pad=2, mask=VOCAB - 1)

_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 2,
}  # fmt: skip
_WINDOWS = {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
#: Config class and sizes; together they cover learned, rotary and scaled positions, biases, soft caps and tied heads.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SIZES),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 2, "resid_pdrop": 0.0,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "qwen3": ("Qwen3Config", {**_SIZES, "head_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}),
    "gemma2": ("Gemma2Config", {**_SIZES, **_WINDOWS}),
    "olmo2": ("Olmo2Config", _SIZES),
    "cohere": ("CohereConfig", {**_SIZES, "logit_scale": 0.25}),
}  # fmt: skip


def tiny_denoiser(family: str, dtype: torch.dtype, *, seed: int = 0) -> HFDenoiser:
    """A random bidirectional transformers model whose predictions depend visibly on what it reads."""
    import transformers

    name, sizes = FAMILIES[family]
    config = getattr(transformers, name)(vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, **sizes)
    make_bidirectional(config)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return HFDenoiser(model.to(dtype).eval(), SPECIAL.mask)


class Noise(torch.nn.Module):
    """A denoiser of fixed random logits: they depend on the position alone. `script` names tokens it is sure of.

    Counts its forwards. Made for source "previous".
    """

    def __init__(self, vocab: int, mask: int, *, script: dict[int, int] | None = None, length: int = 128) -> None:
        super().__init__()
        logits = torch.randn(length, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
        for position, token in (script or {}).items():
            logits[position, token] = 60.0
        logits[:, mask] = float("-inf")
        self.logits = torch.nn.Parameter(logits, requires_grad=False)
        self.forwards = 0

    def forward(self, rows: Rows, *, cache: object = None) -> Tensor:
        self.forwards += 1
        return self.logits[rows.source % rows.ids.shape[1] + 1]


@dataclass
class Recorder:
    """A policy that keeps every step it is shown, then asks another."""

    policy: Policy
    steps: list[Step] = field(default_factory=list)

    def __call__(self, step: Step) -> Tensor:
        self.steps.append(step)
        return self.policy(step)
