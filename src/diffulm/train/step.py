"""One optimizer step: accumulate, sum, divide once by the global count, clip, step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from ..denoiser import HFDenoiser
from ..layout import Rows
from ..objective import LEVEL_BINS, diffusion_loss
from .config import TrainConfig
from .group import rank_and_world
from .optim import set_rate


class Batches(Protocol):
    """What the loop needs of data: the micro-batches of one rank, and the count the global batch is divided by."""

    def rows(self, n: int, rank: int = 0, world: int = 1) -> list[Rows]: ...


@contextmanager
def prefetched(
    make: Callable[[int], list[Rows]], steps: int, device: torch.device | None = None
) -> Iterator[Callable[[int], list[Rows]]]:
    """`make` for steps asked for in order, the next one's batch being made by a thread while a step runs.

    A batch is a function of its number alone, so when and where it is made changes nothing. What `make` raises is
    raised where its batch is asked for. Nothing is made beyond `steps`, and at the end the thread is gone. For a CUDA
    `device` batches are pinned by the thread, so that the step's copies to the GPU wait for nothing.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
    ahead: dict[int, Future[list[Rows]]] = {}

    def ready(n: int) -> list[Rows]:
        micros = make(n)
        if device is None or device.type != "cuda":
            return micros
        with torch.cuda.device(device):  # a new thread is on the first GPU, where pinning would open a context
            return [rows.pinned() for rows in micros]

    def rows(n: int) -> list[Rows]:
        now = ahead.pop(n, None) or thread.submit(ready, n)
        if n + 1 < steps:
            ahead[n + 1] = thread.submit(ready, n + 1)
        return now.result()

    try:
        yield rows
    finally:
        thread.shutdown(cancel_futures=True)


class Step(NamedTuple):
    """What one optimizer step did. `loss` in nats per token; `by_level`: nats and count per noise level."""

    loss: float
    grad_norm: float
    by_level: list[list[float]]

    @property
    def finite(self) -> bool:
        """False: loss or gradient was not finite, and the step was skipped: no weight and no moment moved."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    denoiser: HFDenoiser,
    optimizers: list[Optimizer],
    micros: list[Rows],
    step: int,
    rate: float,
    config: TrainConfig,
    normalisation: Any = "nelbo",
    interrupted: list[int] | tuple[()] = (),
) -> Step | None:
    """One optimizer step, or None if interrupted (then nothing moved).

    The count is summed over all micro-batches and ranks first, and every loss sum is divided by it: accumulation
    and data parallelism change nothing. Nothing moves either where the result is not `finite`.
    """
    device = next(denoiser.parameters()).device
    torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, where a parent has it
    world = rank_and_world()[1]
    totals = torch.tensor(
        [sum(rows.maskable if normalisation == "nelbo" else rows.noised for rows in micros)], dtype=torch.float64
    )
    all_reduce(totals)
    count = max(1, int(totals[0]))
    by_level = torch.zeros(LEVEL_BINS, 2, device=device)
    _zero_gradients(optimizers)
    sums = []
    for rows in micros:
        loss = diffusion_loss(denoiser, rows.to(device), normalisation=normalisation)
        # FSDP averages gradients over the ranks; times the world size makes it a sum.
        (loss.sum * (world / count)).backward()
        sums.append(loss.sum.detach())
        by_level += loss.by_level
        if interrupted and world == 1:
            _zero_gradients(optimizers)
            return None
    norm: Any = nn.utils.clip_grad_norm_(denoiser.parameters(), config.clip)
    # The one wait for the GPU in a step; every rank then decides alike.
    total = torch.cat([torch.stack(sums).sum().cpu().double()[None], by_level.cpu().double().flatten()])
    all_reduce(total)
    levels = [[round(float(a), 4), int(b)] for a, b in total[1:].nan_to_num().view(LEVEL_BINS, 2)]
    done = Step(float(total[0]) / count, float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm), levels)
    if done.finite:
        for optimizer in optimizers:
            set_rate(optimizer, rate)
            optimizer.step()
    return done


def _zero_gradients(optimizers: list[Optimizer]) -> None:
    """Through the optimizers and not the module, which has other parameters while FSDP keeps its root gathered
    (a forward without backward, such as that of held-out text, leaves it so)."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def any_rank(flags: list[bool]) -> list[bool]:
    """Each flag, True on all ranks when any rank raised it."""
    values = torch.tensor(flags, dtype=torch.float64)
    all_reduce(values)
    return [bool(v) for v in values > 0]


def all_reduce(values: torch.Tensor) -> None:
    """Sum over the ranks, in place. On the CPU (gloo): the GPU need not be waited for."""
    if rank_and_world()[1] > 1:
        import torch.distributed as dist

        dist.all_reduce(values)
