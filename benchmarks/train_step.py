"""Training step at SmolLM2-135M's shape: ours against the released code's structure and a plain HF Trainer.

    python benchmarks/train_step.py [--rounds 7] [--length 512] [--micro-batch 2] [--dtype autocast]

One process, the same random weights, texts, dtype, threads and micro-batch for all; contenders take turns, so that a
drift of the machine hits all alike. One step = one micro-batch forward and backward, clipping and one optimizer update
(the least favourable case for us: everything that is not the model counts in full). Prints a table and JSON: tokens/s
(median), the ratio to the naive step paired by round (median, minimum, maximum), and peak memory of head + loss, each
measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffulm.denoiser import ChunkedNLL, HFDenoiser
from diffulm.layout import Full, NoisedBatch
from diffulm.objective import diffusion_loss
from diffulm.process import MaskedDiffusion, stratified_levels
from diffulm.runtime import parse_precision
from diffulm.train.config import TrainConfig
from diffulm.train.optim import build_optimizers
from diffulm.train.parallel import parallelize
from naive import HFTrainerBaseline, NaiveTrainer, naive_head

VOCAB, WIDTH, LAYERS, HIDDEN, HEADS, KV = 49153, 576, 30, 1536, 9, 3
MASK = VOCAB - 1


def build_model() -> Any:
    """A random Llama of SmolLM2-135M's shape with one more row for the mask, bidirectional."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    config.is_causal = False
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def texts(n: int, batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, MASK - 1, (batch, length), generator=torch.Generator().manual_seed(n))


def ours(dtype: str, batch: int, length: int, *, compile: bool) -> Callable[[int], None]:
    """One step of diffulm's own pieces, put together as `train_step` does."""
    precision = parse_precision(dtype)
    denoiser = parallelize(HFDenoiser(build_model(), MASK, precision=precision), precision, compile=compile)
    (optimizer,) = build_optimizers(denoiser, TrainConfig(learning_rate=1e-5))
    process, layout = MaskedDiffusion(MASK), Full()
    denoiser.train()

    def step(n: int) -> None:
        x0 = texts(n, batch, length)
        yes, zeros = torch.ones_like(x0, dtype=torch.bool), torch.zeros_like(x0)
        maskable = yes.clone()
        maskable[:, 0] = False
        levels = stratified_levels(0, n * batch, batch, batch=batch)
        ids, noised, weight = process.corrupt(x0, maskable, zeros, levels, list(range(n * batch, (n + 1) * batch)))
        rows = layout.training_rows(NoisedBatch(x0, ids, noised, maskable, weight, zeros, yes, zeros))
        loss = diffusion_loss(denoiser, rows)
        (loss.sum / loss.count).backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def naive(dtype: str, batch: int, length: int) -> Callable[[int], None]:
    autocast = torch.bfloat16 if dtype == "autocast" else None
    trainer = NaiveTrainer(build_model(), MASK, autocast=autocast, lr=1e-5)

    def step(n: int) -> None:
        trainer.micro_batch(texts(n, batch, length))
        trainer.update()

    return step


def head_memory(which: str, dtype: str, batch: int, length: int) -> int:
    """Bytes by which peak memory grows over forward and backward of head + loss.

    Weight and inputs exist before. The weight's gradient (V x D float32, a fixed state of training: it becomes
    weight.grad) is counted here and subtracted by the caller, for both sides.
    """
    kind = torch.bfloat16 if dtype == "autocast" else torch.float32
    hidden = torch.randn(batch, length, WIDTH, dtype=kind, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH).mul_(0.02).requires_grad_()
    labels, mask = texts(0, batch, length), torch.rand(batch, length) < 0.5
    small = torch.randn(64, 64)
    (small @ small).sum()
    # getrusage would report the peak of the process this one was forked from; Linux can start its own count anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_kilobytes()
    if which == "naive":
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            loss = naive_head(hidden, weight, labels, mask, torch.full((batch,), 0.5))
    else:
        from types import SimpleNamespace

        rows = mask.flatten().nonzero()[:, 0]
        picked = hidden.flatten(0, 1)[rows]
        everywhere = torch.ones(len(rows), dtype=torch.bool)
        nll = ChunkedNLL.apply(picked, weight, None, labels.flatten()[rows], everywhere, MASK, SimpleNamespace())
        loss = nll.sum() / labels.numel()
    loss.backward()
    return (_peak_kilobytes() - before) * 1024


def _peak_kilobytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def head_times(dtype: str, batch: int, length: int, rounds: int) -> dict[str, float]:
    """Median seconds of head + loss, forward and backward, four ways, in turns."""
    from types import SimpleNamespace

    kind = torch.bfloat16 if dtype == "autocast" else torch.float32
    hidden = torch.randn(batch, length, WIDTH, dtype=kind, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH).mul_(0.02).requires_grad_()
    labels, mask = texts(0, batch, length), torch.rand(batch, length) < 0.5
    rows = mask.flatten().nonzero()[:, 0]
    target, everywhere = labels.flatten()[rows], torch.ones(len(rows), dtype=torch.bool)
    column = torch.zeros(VOCAB).index_fill_(0, torch.tensor([MASK]), float("-inf"))

    def released() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            return naive_head(hidden, weight, labels, mask, torch.full((batch,), 0.5))

    def plain() -> torch.Tensor:
        logits = hidden.flatten(0, 1)[rows] @ weight.to(kind).T
        return torch.nn.functional.cross_entropy(logits.float() + column, target, reduction="sum")

    def fused() -> torch.Tensor:
        return torch.nn.functional.linear_cross_entropy(
            hidden.flatten(0, 1)[rows], weight.to(kind), target, linear_bias=column.to(kind), reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions(),
        )  # fmt: skip

    def chunked() -> torch.Tensor:
        picked = hidden.flatten(0, 1)[rows]
        return ChunkedNLL.apply(picked, weight, None, target, everywhere, MASK, SimpleNamespace()).sum()

    ways = {
        "released: all rows, full logits": released, "masked rows, full logits": plain,
        "masked rows, torch linear_cross_entropy": fused, "masked rows, ChunkedNLL (ours)": chunked,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(rounds + 1):
        for name, way in ways.items():
            hidden.grad = weight.grad = None
            start = time.perf_counter()
            way().backward()
            if n:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--dtype", choices=("autocast", "float32"), default="autocast")
    parser.add_argument("--head", choices=("naive", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    B, L = args.micro_batch, args.length
    if args.head:
        print(head_memory(args.head, args.dtype, B, L))
        return
    contenders: dict[str, Callable[[int], None]] = {
        "naive (released structure)": naive(args.dtype, B, L),
        "diffulm eager": ours(args.dtype, B, L, compile=False),
        "diffulm compiled": ours(args.dtype, B, L, compile=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for n in range(args.rounds + 2):
        for name, step in contenders.items():
            start = time.perf_counter()
            step(n)
            if n >= 2:  # the first two build kernels and optimizer state
                seconds[name].append(time.perf_counter() - start)
    contenders.clear()
    trainer = HFTrainerBaseline(build_model(), MASK, bf16=args.dtype == "autocast", batch_size=B, lr=1e-5)
    steps = max(3, args.rounds // 2)
    trainer.run(list(texts(0, B * (steps + 2), L)), steps, warmup=2)
    seconds["HF Trainer (own turn)"] = list(trainer.step_seconds)
    base = seconds["naive (released structure)"]
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "dtype": args.dtype, "micro_batch": B, "length": L, "steps": {},
    }  # fmt: skip
    print(f"{'step':<28} {'tokens/s':>9}  ratio to naive (median, min..max by round)")
    for name, values in seconds.items():
        paired = [a / b for a, b in zip(base, values)]
        median = statistics.median(paired) if len(values) == len(base) else statistics.median(base) / statistics.median(values)  # fmt: skip  # noqa: E501
        speed = B * L / statistics.median(values)
        spread = f"{min(paired):.2f}..{max(paired):.2f}" if len(values) == len(base) else "not paired"
        print(f"{name:<28} {speed:9.0f}  {median:.2f} ({spread})")
        result["steps"][name] = {"tokens_per_second": speed, "ratio": median, "seconds": values}
    memory = {}
    for which in ("naive", "ours"):
        command = [sys.executable, __file__, "--head", which, "--dtype", args.dtype]
        command += ["--length", str(L), "--micro-batch", str(B)]
        memory[which] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    gradient = VOCAB * WIDTH * 4
    above = {which: value - gradient for which, value in memory.items()}
    for which, value in memory.items():
        print(f"head + loss, {which}: {above[which] / 1e6:.0f} MB above the weight gradient, {value / 1e6:.0f} with it")
    print(
        f"memory ratio {above['ours'] / above['naive']:.3f} ({memory['ours'] / memory['naive']:.3f} with the gradient)"
    )
    result["head_memory_bytes"] = memory
    result["head_seconds"] = head_times(args.dtype, B, L, args.rounds)
    for name, value in result["head_seconds"].items():
        print(f"head + loss, {name}: {value * 1e3:.0f} ms")
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main()
