"""The optimizer and the learning-rate schedule, both functions of the share of the budget that is spent."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .config import TrainConfig

#: Share of the budget over which "wsd" (warm-up, stable, decay) falls at the end.
WSD_DECAY = 0.2


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Fused AdamW; decay on matrices only (never on norms and biases)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


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
