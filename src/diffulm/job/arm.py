"""An arm of a run: the checkpoint it begins from, opened to be trained, and its training from budget to weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import runtime
from ..convert import convert
from ..data.loader import ORDER, Loader, Mixture
from ..data.sources import Source
from ..denoiser import HFDenoiser
from ..layout import Annealing, Block, Causal, Full, Growth
from ..process import MaskedDiffusion
from ..schedule import schedule_from_name
from ..tokenizer import SpecialTokens, load_tokenizer, special_tokens
from ..train.budget import find_budget, plan_budget
from ..train.config import SourceConfig, TrainConfig
from ..train.folder import finished_weights, open_for_training
from ..train.group import on_first_rank
from ..train.loop import train
from ..train.parallel import parallelize
from .folder import Run, as_json, read_state, write_state


def convert_stage(run: Run) -> None:
    """`init/`: the recipe's parent as a diffusion checkpoint; made once."""
    model = run.recipe.model
    if (run.out / "init" / "config.json").is_file():
        return
    run.say(f"converting {model.parent}")
    done = convert(
        model.parent, run.out / "init", initialise=model.initialise, seed=run.recipe.train.seed,
        mask_token=model.mask_token, source=model.source, layout=model.layout,
        block_size=model.block_size, schedule=run.recipe.noise.schedule, t_min=run.recipe.noise.t_min,
        trained_length=run.recipe.data.length, offline=run.offline,
    )  # fmt: skip
    nll = ", ".join(f"{k} {v:.2f}" for k, v in done.start_nll.items())
    run.say(f"  mask {done.mask_token} = {done.mask_token_id} ({done.mask_row}), start {done.start_token}")
    if nll:
        run.say(f"  the parent's nats/token behind each candidate start: {nll}")


def as_source(config: SourceConfig) -> Source:
    """The source that a recipe describes; without a weight it has 1 (what that means, `shares` says)."""
    weight = 1.0 if config.weight is None else config.weight
    return Source(
        config.name, config.path, weight, config.text_field, tuple(config.exclude), tuple(config.more), config.subset,
        config.split, config.limit_documents, config.limit_bytes,
    )  # fmt: skip


def open_arm(run: Run, folder: Path, *, causal: bool) -> tuple[HFDenoiser, Any, SpecialTokens]:
    """(denoiser in training's precision, tokenizer, special tokens) of a checkpoint, for training or scoring.

    Called by every process. Among several the denoiser has no weights before `train.parallel.parallelize`.
    """
    precision = training_precision(run)
    model = open_for_training(folder, dtype=precision.weights)
    tokenizer = load_tokenizer(folder)
    # The parent has no mask token, but what the child leaves out of the score is left out for it too.
    special = special_tokens(load_tokenizer(run.out / "init"))
    added = bool(getattr(model.config, "diffusion", {}).get("mask_row_added", True)) if not causal else True
    model = model if next(model.parameters()).is_meta else model.to(run.device)
    denoiser = HFDenoiser(model, None if causal else special.mask, mask_row_added=added, precision=precision)
    return denoiser.eval(), tokenizer, special


def open_to_score(run: Run, folder: Path, *, causal: bool = False) -> tuple[HFDenoiser, SpecialTokens]:
    """(denoiser, special tokens) of a checkpoint, sharded over all processes so that none need hold it.

    Each then scores all of the text, which saves memory and no time. Under autocast sharding rounds the weights of
    norms, so a score depends a little on whether it was taken by one process or several. Called by every process.
    """
    # Measured by one process for all.
    on_first_rank(lambda: None if "dtype" in read_state(run.out) else training_precision(run))
    denoiser, _, special = open_arm(run, folder, causal=causal)
    parallelize(denoiser, denoiser.precision, compile=False, folder=folder, device=run.device)
    return denoiser, special


def training_precision(run: Run) -> runtime.Precision:
    """The recipe's dtype, or the one measured here; asked once and stored, so that a resume computes the same."""
    state = read_state(run.out)
    stored = state.get("dtype")
    if state.get("threads", torch.get_num_threads()) != torch.get_num_threads():
        run.say(f"this run began with {state['threads']} threads: resumed with others it is not the same bit for bit")
    name = stored or run.recipe.train.dtype
    if name == "auto":
        config = runtime.read_json(run.out / "init" / "config.json")
        width = int(config.get("hidden_size") or config.get("n_embd") or 512)
        hidden = int(config.get("intermediate_size") or config.get("n_inner") or 4 * width)
        rows = run.recipe.train.micro_batch * run.recipe.data.length
        choice, seconds = runtime.probe_precision(width, hidden, rows=rows, device=run.device, train=True)
        name = "autocast" if choice.autocast is not None else str(choice.weights).removeprefix("torch.")
        times = ", ".join(f"{k} {v * 1e3:.0f} ms" for k, v in seconds.items())
        run.say(f"dtype {choice}" + (f" (measured: {times})" if times else ""))
    if stored is None:
        write_state(run.out, dtype=name, threads=torch.get_num_threads())
    return runtime.parse_precision(name)


def diffusion_of(run: Run, special: SpecialTokens) -> tuple[Full | Block, MaskedDiffusion]:
    """Layout and process of the recipe, for a tokenizer that has a mask token."""
    model, noise = run.recipe.model, run.recipe.noise
    assert special.mask is not None
    process = MaskedDiffusion(special.mask, schedule_from_name(noise.schedule), noise.t_min)
    if model.layout == "full":
        return Full(model.source), process  # type: ignore[arg-type]
    return Block(model.block_size or 8, model.source, noise.ar_weight), process  # type: ignore[arg-type]


def shares(run: Run, sequences: Sequence[Any]) -> list[float]:
    """What each source counts in the mixture: its weight in the recipe, or its number of sequences."""
    given = [s.weight for s in run.recipe.data.sources]
    return [float(len(q)) if w is None else w for q, w in zip(sequences, given, strict=True)]


@dataclass(frozen=True)
class Fitted:
    """What training made. `weights`: the whole model's, as `hub.save` takes them in the first process. `tokens`:
    trained on, those of every pass."""

    weights: dict[str, Tensor] | Path
    tokens: int


def fit(
    run: Run,
    arm: str,
    folder: Path,
    denoiser: HFDenoiser,
    sequences: Sequence[Any],
    layout: Full | Block | Causal,
    process: MaskedDiffusion | None,
    *,
    config: TrainConfig,
    flops_per_token: float,
    heldout: Callable[[], float],
) -> Fitted:
    """Train one arm to the end of its budget, in the run's folder `arm`, resuming if it was begun there.

    Args:
        folder, denoiser: the checkpoint it begins from, and what `open_arm` made of it.
        sequences: training sequences of each source (`data.Sequences` or `data.Conversations`), mixed by `shares`.
        layout, process: how batches become rows and noise; process None (layout Causal): next-token training.
        config: the recipe's training, or what this arm has in its place.
        flops_per_token: operations of training (`train.flops`), for the metrics.
        heldout: nats per token of held-out text, asked a few times a run.

    Raises:
        ValueError, KeyboardInterrupt, FloatingPointError: as `train.loop.train`.
    """
    recipe = run.recipe
    parallelize(
        denoiser, denoiser.precision, compile=run.compile,
        activation_checkpointing=config.activation_checkpointing, replicas=config.replicas, folder=folder,
        device=run.device,
    )  # fmt: skip
    loader = Loader(
        Mixture(sequences, shares(run, sequences), config.seed), layout, process, config.batch, config.micro_batch,
        config.seed, form=recipe.noise.form, complementary=recipe.noise.complementary,
        fixed_shapes=run.device.type == "cuda",
    )  # fmt: skip
    budget = plan_budget(
        run.out / arm, lambda: find_budget(config, loader, denoiser, length=recipe.data.length, device=run.device)
    )
    annealing = Annealing(round(config.annealing * budget.steps), config.seed)
    growth = Growth(config.block_sizes, budget.steps) if config.block_sizes else None
    loader = dataclasses.replace(loader, annealing=annealing, growth=growth)
    passes = loader.mixture.epochs(budget.steps * config.batch)
    if passes > 1:
        better = ": more text would serve better" if passes > 4 else ""
        run.say(f"  a source of text is passed over {passes:.1f} times in this budget (epochs){better}")
    train(
        denoiser, loader, config, run.out / arm, budget=budget,
        settings={"recipe": as_json(recipe), "arm": arm, "order": ORDER},
        anneal_ratio=annealing.ratio, epochs=loader.mixture.epochs, heldout=heldout,
        normalisation=recipe.noise.normalisation, flops_per_token=flops_per_token,
        report=lambda progress: run.on_step(arm, progress),
    )  # fmt: skip
    return Fitted(finished_weights(denoiser, run.out / arm, like=folder), budget.steps * budget.tokens_per_step)
