"""One function from module to module: compile, then shard. Model code knows nothing of either."""

from __future__ import annotations

import torch
from torch import nn

from ..denoiser import HFDenoiser
from ..runtime import Precision, rank_and_world


def layers_of(backbone: nn.Module) -> nn.ModuleList | None:
    """The backbone's stack of transformer layers: its longest ModuleList."""
    lists = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    return max(lists, key=len, default=None)


def parallelize(denoiser: HFDenoiser, precision: Precision, *, compile: bool) -> HFDenoiser:
    """In this order: torch.compile of each layer (one graph serves all), then FSDP2 over the process group.

    The denoiser is the FSDP root because the loss reads the head's weight inside its forward; the layers are
    sharded one by one below it. Without a process group nothing is sharded.
    """
    layers = layers_of(denoiser.backbone)
    if compile and layers is not None:
        for layer in layers:
            layer.compile()
    _, world = rank_and_world()
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        device = next(denoiser.parameters()).device.type
        mesh = init_device_mesh(device, (world,), mesh_dim_names=("dp",))
        # Autocast inside the forward decides what is multiplied in bfloat16; gradients are summed in float32.
        policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(precision.weights, torch.float32))
        for layer in layers if layers is not None else []:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(denoiser, mesh=mesh, mp_policy=policy)
    return denoiser
