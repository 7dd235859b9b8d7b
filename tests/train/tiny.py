"""A tiny Llama, random text and a loader: what the training tests share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffulm.data.loader import Loader, Mixture, Sequences
from diffulm.denoiser import HFDenoiser
from diffulm.layout import Full
from diffulm.process import MaskedDiffusion
from diffulm.runtime import parse_precision
from diffulm.tokenizer import SpecialTokens
from diffulm.train.budget import Budget
from diffulm.train.config import TrainConfig
from diffulm.train.loop import train
from diffulm.train.metrics import CLOCK, read_metrics

from ..conftest import tiny_config

#: Of matrices this small a second thread makes a step ten times slower on a busy machine.
torch.set_num_threads(1)

VOCABULARY = 48
LENGTH = 16
SPECIAL = SpecialTokens(bos=0, eos=1, pad=1, mask=VOCABULARY - 1)
CONFIG = TrainConfig(batch=8, micro_batch=4, learning_rate=1e-2, warmup=0.25, weight_decay=0.1, steps=8, seed=3)


@dataclass
class Texts:
    """A token store in memory: documents of 1..30 tokens."""

    count: int = 60
    seed: int = 0

    @property
    def lengths(self) -> np.ndarray:
        return np.random.default_rng(self.seed).integers(1, 31, self.count)

    def document(self, i: int, start: int = 0, n: int | None = None) -> np.ndarray:
        ids = np.random.default_rng([self.seed, i]).integers(2, VOCABULARY - 1, self.lengths[i])
        return ids[start : None if n is None else start + n]


def make_denoiser(dtype: str = "float64", *, family: str = "llama", seed: int = 0, **changes: Any) -> HFDenoiser:
    """A bidirectional tiny model whose outputs differ."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, vocab=VOCABULARY, **changes))
    model.config.is_causal = False
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    precision = parse_precision(dtype)
    return HFDenoiser(model.to(precision.weights).eval(), SPECIAL.mask, precision=precision)


def make_loader(config: TrainConfig = CONFIG, **changes: Any) -> Loader:
    mixture = Mixture([Sequences.cut(Texts(), LENGTH, SPECIAL)], [1.0], config.seed)  # type: ignore[arg-type]
    loader = Loader(
        mixture, Full(), MaskedDiffusion(VOCABULARY - 1), config.batch, config.micro_batch, config.seed
    )  # fmt: skip
    return replace(loader, **changes)


def run(
    out: Path, config: TrainConfig = CONFIG, *, dtype: str = "float32", denoiser: HFDenoiser | None = None, **more: Any
) -> HFDenoiser:
    """Train in `out` from the same start each time (or go on there); the trained denoiser."""
    denoiser = denoiser or make_denoiser(dtype)
    arguments = {
        "budget": Budget(config.steps or 1, config.batch * LENGTH),
        "settings": {"recipe": "tiny"},
        "batches": make_loader(config),
        **more,
    }
    batches = arguments.pop("batches")
    train(denoiser, batches, config, out, **arguments)
    return denoiser


def weights(denoiser: HFDenoiser) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in denoiser.named_parameters()}


def same_weights(a: HFDenoiser | dict[str, torch.Tensor], b: HFDenoiser | dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    one, two = (x if isinstance(x, dict) else weights(x) for x in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def numbers(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides."""
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in read_metrics(out)]
