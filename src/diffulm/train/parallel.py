"""One function from module to module: recompute, compile, shard. Model code knows nothing of any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..denoiser import HFDenoiser
from ..runtime import Precision
from .config import TrainConfig
from .folder import read_weights
from .group import rank_and_world

#: Variants of a layer's compiled graph that may be built.
VARIANTS = 64


def layers_of(backbone: nn.Module) -> nn.ModuleList | None:
    """The backbone's stack of transformer layers: its longest ModuleList."""
    lists = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    return max(lists, key=len, default=None)


def check_world(config: TrainConfig, world: int) -> None:
    """ValueError when this many processes cannot share the batch, or cannot be put into `config.replicas` groups."""
    if config.batch % world:
        fits = [w for w in range(1, world + 1) if config.batch % w == 0]
        raise ValueError(
            f"{world} processes do not divide train.batch = {config.batch}; start {_listed(fits)}, or set train.batch "
            f"= {max(1, round(config.batch / world)) * world}"
        )
    if world > 1 and world % config.replicas:
        fits = [r for r in range(1, world + 1) if world % r == 0]
        raise ValueError(f"train.replicas = {config.replicas} does not divide {world} processes; use {_listed(fits)}")


def _listed(numbers: list[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, numbers[:-1])), str(numbers[-1]))))


def parallelize(
    denoiser: HFDenoiser,
    precision: Precision,
    *,
    compile: bool,
    activation_checkpointing: bool = False,
    replicas: int = 1,
    folder: Path | None = None,
    device: torch.device | None = None,
) -> HFDenoiser:
    """In this order: activation checkpointing of each layer, torch.compile of each, FSDP2 over the process group.

    Only a layer's input is kept for the backward pass when activations are checkpointed; the rest is computed again.
    The denoiser is the FSDP root because the loss reads the head's weight inside its forward. `replicas` > 1 shards
    within world / replicas processes and replicates over the rest (HSDP): weights then travel inside a node, gradients
    alone between nodes. Without a process group nothing is sharded.

    A denoiser without weights (on the meta device, `folder.open_for_training`) gets memory on `device` once it is
    sharded, and each process its part of the weights in `folder`.

    Weights, gradients and moments are held in the precision's `weights` (float32). Under autocast the layers' weights
    travel in bfloat16: what autocast would multiply with anyway, except that weights of norms are rounded too. The
    stream between layers, embeddings and head stay float32, as on one process. Gradients are summed in float32.
    """
    layers = layers_of(denoiser.backbone)
    if activation_checkpointing:
        checkpoint_layers(denoiser)
    if compile and layers is not None:
        # One graph serves all layers, but in variants: with and without gradient, mask, padding, a leaf as input. Torch
        # gives up on compiling, with a line in the log, at 8 of them.
        import torch._dynamo.config as dynamo

        dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS)
        for layer in layers:
            layer.compile()
    _, world = rank_and_world()
    if world == 1:
        return denoiser
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    lies_on = next(denoiser.parameters()).device
    where = (device or lies_on).type
    if replicas == 1:
        mesh = init_device_mesh(where, (world,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(where, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    reduce = torch.promote_types(precision.weights, torch.float32)
    inner = MixedPrecisionPolicy(precision.autocast, reduce_dtype=reduce, cast_forward_inputs=False)
    for layer in layers if layers is not None else []:
        fully_shard(layer, mesh=mesh, mp_policy=inner)
    fully_shard(denoiser, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False))
    if lies_on.type == "meta":
        assert folder is not None and device is not None, "a model without weights needs to know where they are"
        read_weights(denoiser, folder, device)
    return denoiser


def checkpoint_layers(denoiser: HFDenoiser) -> None:
    """Every layer inside torch.utils.checkpoint (non-reentrant), by transformers' own switch."""
    model: Any = denoiser.model
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"{type(model).__name__} cannot compute its activations again; set train.activation_checkpointing = false"
        )
    enable = getattr(model, "activation_checkpointing_enable", None)  # transformers' newer name
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
