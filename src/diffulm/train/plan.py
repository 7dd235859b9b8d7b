"""What a recipe will need on given GPUs: memory by part, speed at a stated MFU, hours, cost, checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .. import adapters, hub
from ..runtime import Precision, parse_precision
from .config import Recipe, SftConfig
from .flops import Shape, Work, flops_per_token
from .memory import MemoryModel
from .parallel import check_world

#: Memory left to the allocator's waste, the CUDA context and NCCL, as a share.
RESERVED = 0.08
#: Unexpected interruptions per GPU-hour: 419 in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783, section 3.3.4).
FAILURES = 419 / (54 * 24 * 16384)
#: Bytes per second at which a checkpoint reaches storage, all GPUs together: a common network file system.
WRITE_SPEED = 1e9
#: Sequences of a micro-batch looked at, at most.
MOST = 1024


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes and dense bfloat16 operations per second, from the vendor's data sheet (float32 sums)."""

    memory: float
    flops: float


GPUS = {
    "a100-40": Gpu(40e9, 312e12),
    "a100-80": Gpu(80e9, 312e12),
    "h100": Gpu(80e9, 989e12),
    "h200": Gpu(141e9, 989e12),
    "b200": Gpu(180e9, 2250e12),
    "gh200": Gpu(96e9, 989e12),
    "l40s": Gpu(48e9, 362e12),
    "mi300x": Gpu(192e9, 1307e12),
    "rtx3090": Gpu(24e9, 71e12),
    "rtx4090": Gpu(24e9, 165e12),
}


def find_gpu(name: str, precision: Precision) -> Gpu:
    """A GPU of the table, or "cpu": this machine's memory, and its products measured. ValueError: unknown."""
    if name == "cpu":
        return Gpu(_memory_of_this_machine(), measured_flops(precision))
    if name not in GPUS:
        raise ValueError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}, cpu (measured)")
    return GPUS[name]


def measured_flops(precision: Precision, *, size: int = 1024, seconds: float = 0.5) -> float:
    """Operations per second of a matrix product on this CPU in the dtype that training multiplies in."""
    a = torch.randn(size, size).to(precision.autocast or precision.weights)
    best, deadline = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == math.inf:
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _memory_of_this_machine() -> float:
    import os

    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def checkpoint_interval(size: float, gpus: int, *, speed: float = WRITE_SPEED, failures: float = FAILURES) -> float:
    """Seconds between checkpoints that lose least: sqrt(2 x time to write one x mean time between failures).

    Young 1974, Daly 2006, first order. Writing in the background makes the true best interval shorter.
    """
    return math.sqrt(2 * (size / speed) * 3600 / (failures * gpus))


@dataclass(frozen=True)
class Choice:
    """One way to run the step: bytes by part at its micro-batch, the largest micro-batch that fits."""

    checkpointing: bool
    micro_batch: int
    largest: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class LoraMemory(MemoryModel):
    """Bytes of a step that trains a LoRA of `trained` parameters; all other weights are frozen.

    Activations are counted as those of full training, which is up to a tenth too many: linear modules keep their
    inputs for the LoRA's gradients in place of their own, norms need less.
    """

    trained: int = 0

    def parts(self, sequences: int, *, checkpointing: bool) -> dict[str, int]:
        own = self.trained * self.precision.weights.itemsize
        parts = super().parts(sequences, checkpointing=checkpointing)
        moments = 1 if self.optimizer == "muon" else 2
        return {**parts, "parameters": parts["parameters"] + own, "gradients": own, "optimizer": moments * own}

    def head(self, sequences: int) -> int:
        # A frozen head's weight gets no gradient.
        return super().head(sequences) - self.shape.head * max(4, self.precision.weights.itemsize)


@dataclass(frozen=True)
class Plan:
    """Speeds per second over all GPUs, sizes in bytes. `tokens` None: a budget in minutes is not planned in tokens.

    `trained`: parameters that get gradients, all of them or a LoRA's. `step_seconds`: of one optimizer step.
    """

    recipe: str
    parent: str
    gpu: str
    count: int
    precision: str
    shape: Shape
    trained: int
    memory: float
    usable: float
    choices: list[Choice]
    asked: Choice
    flops_per_token: float
    peak_flops: float
    mfu: float
    tokens_per_second: float
    step_seconds: float
    tokens: int | None
    hours: float | None
    price: float | None
    checkpoint_bytes: int
    interval: float
    advice: list[str]

    @property
    def cost(self) -> float | None:
        return None if self.price is None or self.hours is None else self.price * self.hours * self.count

    @property
    def stopping(self) -> float:
        """Seconds from SIGTERM to the end of the run: the step under way and a checkpoint."""
        return self.step_seconds + self.checkpoint_bytes / WRITE_SPEED

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "cost": self.cost, "stopping": self.stopping, "total_bytes": self.asked.total}


def plan(recipe: Recipe, config: Any, *, gpu: str, count: int, mfu: float = 0.4, price: float | None = None) -> Plan:
    """The plan of a recipe whose parent has this transformers config (`hub.parent_config`).

    Args:
        gpu: a name in GPUS, or "cpu".
        count: GPUs; 1 shards nothing.
        mfu: share of the peak that the model's operations reach: assumed, since only a run can tell.
        price: of one GPU for one hour.

    Raises:
        ValueError: an unknown GPU, a count that does not divide the batch, an MFU outside (0, 1], a LoRA on more than
            one GPU or without peft.
    """
    if count < 1 or not 0 < mfu <= 1:
        raise ValueError(f"give at least one GPU and an MFU in (0, 1], not {count} and {mfu}")
    lora = recipe.sft.lora_rank > 0
    if lora and count > 1:
        raise ValueError(
            f"sft.lora_rank = {recipe.sft.lora_rank}: a LoRA is trained in one process; give --count 1, or set "
            "sft.lora_rank = 0"
        )
    check_world(recipe.train, count)
    precision = parse_precision("autocast" if recipe.train.dtype == "auto" else recipe.train.dtype)
    device = find_gpu(gpu, precision)
    with torch.device("meta"):
        model = hub.skeleton(config)
    if (positions := getattr(config, "max_position_embeddings", None)) and recipe.data.length > positions:
        raise ValueError(
            f"data.length = {recipe.data.length} is more than the parent's {positions} positions; make it shorter or "
            "take a parent with more"
        )
    shape, work = Shape.of(model), Work.of(recipe)
    shards = max(1, count // recipe.train.replicas)
    of_step = (config, shape, work, precision, recipe.train.optimizer, shards, _dense_mask(recipe, model, gpu))
    trained = lora_parameters(model, recipe.sft) if lora else shape.parameters
    memory = LoraMemory(*of_step, trained) if lora else MemoryModel(*of_step)
    usable = device.memory * (1 - RESERVED)
    share = recipe.train.batch // count
    choices = [_choice(memory, usable, min(share, MOST), checkpointing) for checkpointing in (False, True)]
    own = recipe.train.activation_checkpointing
    micro = min(recipe.train.micro_batch, share)
    asked = Choice(own, micro, choices[own].largest, memory.parts(micro, checkpointing=own))
    per_token = flops_per_token(shape, work, frozen=lora)
    speed = count * device.flops * mfu / per_token
    train = recipe.train
    tokens = train.steps * train.batch * work.tokens if train.steps else train.tokens
    hours = tokens / speed / 3600 if tokens else (train.minutes / 60 if train.minutes else None)
    size = 3 * trained * precision.weights.itemsize
    return Plan(
        recipe.name, recipe.model.parent, gpu, count, str(precision), shape, trained, device.memory, usable, choices,
        asked, per_token, device.flops, mfu, speed, train.batch * work.tokens / speed, tokens, hours, price, size,
        checkpoint_interval(size, count), _advice(asked, choices, usable, share),
    )  # fmt: skip


def lora_parameters(model: Any, settings: SftConfig) -> int:
    """How many parameters of a LoRA (and of the mask token's row) would be trained; `model` gets it, on meta too."""
    adapters.add_lora(model, 0, rank=settings.lora_rank, alpha=settings.lora_alpha, targets=settings.lora_targets)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _choice(memory: MemoryModel, usable: float, limit: int, checkpointing: bool) -> Choice:
    largest = memory.largest(usable, limit=limit, checkpointing=checkpointing)
    return Choice(checkpointing, max(1, largest), largest, memory.parts(max(1, largest), checkpointing=checkpointing))


def _dense_mask(recipe: Recipe, model: Any, gpu: str) -> bool:
    """Whether attention masks are whole matrices: packed or block rows without FlexAttention (CUDA alone has it)."""
    masked = recipe.data.pack == "documents" or recipe.model.layout == "block" or recipe.train.annealing > 0
    return masked and (gpu == "cpu" or not getattr(model, "_supports_flex_attn", False))


def _advice(asked: Choice, choices: list[Choice], usable: float, share: int) -> list[str]:
    """What to change in the recipe, most important first."""
    plain, again = choices
    if asked.total > usable:
        if asked.largest:
            return [f"train.micro_batch = {asked.micro_batch} does not fit; set it to {asked.largest} or less"]
        if again.largest:
            return [f"set train.activation_checkpointing = true; then up to {again.largest} sequences fit at a time"]
        return ["not even one sequence fits: take more GPUs, larger ones, a shorter data.length, or a smaller parent"]
    if asked.checkpointing and plain.largest:
        return [
            f"{plain.largest} sequences at a time fit without train.activation_checkpointing, which costs a third more"
        ]
    if asked.micro_batch < min(asked.largest, share):
        return [f"train.micro_batch could be {asked.largest} (a larger one uses the GPU better)"]
    return []
