"""The optimizer and the learning-rate schedule, both functions of the share of the budget that is spent."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .parallel import layers_of

if TYPE_CHECKING:
    from ..denoiser import HFDenoiser
    from .config import TrainConfig

#: Share of the budget over which "wsd" (warm-up, stable, decay) falls at the end.
WSD_DECAY = 0.2


def build_optimizers(denoiser: HFDenoiser, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Fused AdamW, decay on matrices only (never on norms and biases); with optimizer "muon" Muon before it.

    Muon (Jordan 2024) moves the matrices of the layers along the orthogonalised momentum; embeddings, head, norms and
    biases stay with AdamW. Its step is scaled to the root mean square of AdamW's (0.2 sqrt(max(rows, columns)); Liu
    et al., arXiv 2502.16982), so one learning rate and decay serve both. Sharded matrices are gathered for the
    orthogonalisation, and every process computes it whole.
    """
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        layers = layers_of(denoiser.backbone)
        hidden = [p for p in (layers.parameters() if layers is not None else ()) if p.ndim == 2 and p.requires_grad]
        if not hidden:
            raise ValueError("train.optimizer = 'muon' found no matrix inside the layers; use 'adamw'")
        taken = {id(p) for p in hidden}
        parameters = [p for p in parameters if id(p) not in taken]
        optimizers.append(
            torch.optim.Muon(
                hidden, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    return [*optimizers, torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Learning rate after a share `progress` in [0, 1] of the budget."""
    peak, floor = config.learning_rate, config.final_rate
    if progress < config.warmup:
        return peak * progress / config.warmup
    if config.decay == "constant":
        return peak
    if config.decay == "wsd":
        left = min(1.0, (1 - progress) / WSD_DECAY)
        return peak * (floor + (1 - floor) * left)
    done = (progress - config.warmup) / max(1e-9, 1 - config.warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
