"""The named opponent: the training step of the released DiffuGPT / DiffuLLaMA code, re-created in our own words.

Benchmarks time this file against ``diffulm``'s own step. It follows the *structure* of the published step (arXiv
2410.17891), costs and defects included, and is nobody's text. Deliberately kept as released:

* a dense ``[B, 1, L, L]`` additive float mask rebuilt every step, also when annealing is over and it is all zeros;
* a look-up of the clean tokens' embeddings of which only the dtype is used;
* one i.i.d. uniform ``t`` per sequence, no stratified draw;
* logits over the whole vocabulary for all ``B * L`` positions, shifted afterwards;
* the loss mask found by token id, so a natural mask token counts as noise;
* division by the number of masked tokens in the batch: NaN when no token is masked (kept: the caller sees the NaN);
* no document mask; stock, non-fused AdamW.

Left out, because they would only slow it down or blur the comparison: gradient checkpointing, ZeRO, logging, saving.
Logits are brought to fp32 before the loss, as accelerate did around the released model.

Weights keep the dtype the caller gave them (fp32 expected); ``autocast`` selects the compute dtype. The model is any
HF causal LM made bidirectional with ``config.is_causal = False`` (transformers >= 5.2). It is put in train mode, and
dropout is the config's: set it equal on both sides of a comparison. ``HFTrainerBaseline`` also needs ``accelerate``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

T_EPS = 1e-3
"""Smallest noise level the released code draws."""

CLIP_NORM = 1.0


def naive_attention_mask(
    batch: int,
    length: int,
    *,
    ratio: float,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Dense additive mask ``[B, 1, L, L]``: causal OR one ``L x L`` Bernoulli(``ratio``) draw shared by all rows."""
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    opened_LL = torch.bernoulli(torch.full((length, length), ratio, device=device), generator=generator).bool()
    visible_B1LL = (causal_LL | opened_LL)[None, None].expand(batch, 1, length, length)
    hidden_B1LL = 1.0 - visible_B1LL.to(dtype)
    return hidden_B1LL.masked_fill(hidden_B1LL.bool(), torch.finfo(dtype).min)


def naive_corrupt(
    input_ids_BL: Tensor,
    mask_token_id: int,
    *,
    generator: torch.Generator | None = None,
    eps: float = T_EPS,
) -> tuple[Tensor, Tensor]:
    """Draw ``t`` i.i.d. uniform on [``eps``, 1] per sequence and mask every token with probability ``t``."""
    device = input_ids_BL.device
    t_B = eps + (1.0 - eps) * torch.rand(input_ids_BL.shape[0], device=device, generator=generator)
    draw_BL = torch.rand(input_ids_BL.shape, device=device, generator=generator)
    return input_ids_BL.masked_fill(draw_BL < t_B[:, None], mask_token_id), t_B


def naive_loss_from_logits(logits_BLV: Tensor, labels_BL: Tensor, mask_BL: Tensor, t_B: Tensor) -> Tensor:
    """Shift by one, cross entropy at *every* position, then mask, weight 1/t and divide by the masked count."""
    scores_BLV = logits_BLV.float()[:, :-1]
    targets_BL = labels_BL[:, 1:]
    counted_BL = mask_BL[:, 1:]
    nll_N = F.cross_entropy(scores_BLV.reshape(-1, scores_BLV.shape[-1]), targets_BL.reshape(-1), reduction="none")
    nll_BL = nll_N.view(targets_BL.shape).masked_fill(~counted_BL, 0.0)
    return (nll_BL / t_B[:, None]).sum() / counted_BL.sum()


def naive_head(hidden_BLD: Tensor, weight_VD: Tensor, labels_BL: Tensor, mask_BL: Tensor, t_B: Tensor) -> Tensor:
    """The released output head and loss alone, for memory comparisons: all positions, all of the vocabulary.

    Args:
        hidden_BLD: last hidden states of the noised rows, after the final norm.
        weight_VD: output embedding, in ``hidden_BLD``'s dtype unless autocast is active.
        labels_BL: clean tokens, unshifted.
        mask_BL: bool, True where the *input* token was the mask token, unshifted.
        t_B: noise level of each sequence.

    Returns:
        The scalar loss. Position 0 is never scored; NaN when nothing else is masked.
    """
    return naive_loss_from_logits(F.linear(hidden_BLD, weight_VD), labels_BL, mask_BL, t_B)


def naive_loss(
    model: nn.Module,
    input_ids_BL: Tensor,
    mask_token_id: int,
    *,
    embedding: nn.Module,
    annealing: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One forward of the released objective on clean ``input_ids_BL``; ``annealing`` is the mask ratio r in [0, 1]."""
    dtype = embedding(input_ids_BL).dtype  # the look-up is otherwise unused, as released
    mask_B1LL = naive_attention_mask(
        *input_ids_BL.shape, ratio=annealing, dtype=dtype, device=input_ids_BL.device, generator=generator
    )
    noised_BL, t_B = naive_corrupt(input_ids_BL, mask_token_id, generator=generator)
    logits_BLV = model(noised_BL, attention_mask=mask_B1LL, use_cache=False).logits
    return naive_loss_from_logits(logits_BLV, input_ids_BL, noised_BL == mask_token_id, t_B)


class NaiveTrainer:
    """The released step as a bare loop: ``micro_batch`` any number of times, then ``update``.

    Args:
        model: HF causal LM with ``config.is_causal = False``; put in train mode here.
        mask_token_id: id that stands for noise.
        autocast: compute dtype, or None for the dtype of the weights.
        lr: learning rate; every other AdamW argument is the HF Trainer's default (no weight decay), as released.
        seed: seed of the noise and of the annealing mask.
        annealing: mask ratio r; a caller with a schedule assigns ``trainer.annealing`` before each step.
        accumulation: micro-batches per update, which divides each loss.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mask_token_id: int,
        *,
        autocast: torch.dtype | None,
        lr: float = 1e-4,
        seed: int = 0,
        annealing: float = 1.0,
        accumulation: int = 1,
    ) -> None:
        self.model = model
        self.model.train()
        self.mask_token_id = mask_token_id
        self.autocast = autocast
        self.annealing = annealing
        self.accumulation = accumulation
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)

    def micro_batch(self, input_ids_BL: Tensor) -> float:
        """Forward and backward of one micro-batch; returns its loss before the division by ``accumulation``."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            loss = naive_loss(
                self.model,
                input_ids_BL.to(self.device),
                self.mask_token_id,
                embedding=self.model.get_input_embeddings(),
                annealing=self.annealing,
                generator=self.generator,
            )
        (loss / self.accumulation).backward()
        return loss.item()

    def update(self) -> None:
        """Clip to norm 1, step AdamW, drop the gradients."""
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


class HFTrainerBaseline:
    """The same objective through ``transformers.Trainer``, the engine of the released GPT-2 runs.

    AdamW is the non-fused one (the Trainer's own default is now the fused one), with a constant learning rate, clip 1,
    no saving, no reports. Building a Trainer seeds the global generators.

    Args:
        model: HF causal LM with ``config.is_causal = False``; trained in place.
        mask_token_id: id that stands for noise.
        bf16: bf16 autocast over fp32 weights; False runs in the dtype of the weights.
        batch_size: sequences per micro-batch.
        accumulation: micro-batches per optimiser step.
        lr: learning rate.
        seed: seed of noise, annealing mask and data order.
        annealing: mask ratio r.
        use_cpu: run on the CPU even where an accelerator is present.

    After ``run``: ``step_seconds`` has the wall time of each timed step, ``losses`` the loss of every micro-batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mask_token_id: int,
        *,
        bf16: bool,
        batch_size: int,
        accumulation: int = 1,
        lr: float = 1e-4,
        seed: int = 0,
        annealing: float = 1.0,
        use_cpu: bool = True,
    ) -> None:
        self.model = model
        self.mask_token_id = mask_token_id
        self.bf16 = bf16
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.lr = lr
        self.seed = seed
        self.annealing = annealing
        self.use_cpu = use_cpu
        self.step_seconds: list[float] = []
        self.losses: list[float] = []

    def run(self, input_ids: Sequence[Tensor], steps: int, *, warmup: int = 1) -> float:
        """Train ``warmup + steps`` optimiser steps and return the mean seconds of the last ``steps``.

        The clock runs from the end of the last warm-up step (from the start of the first step when ``warmup`` is 0) to
        the end of the last step, so it holds data loading and callbacks between steps but neither set-up nor tear-down.

        Args:
            input_ids: equally long ``[L]`` rows of clean tokens, reused in turn if there are too few.
            steps: timed optimiser steps, at least 1.
            warmup: untimed steps before them (the first one allocates the AdamW state).
        """
        # Imported here: NaiveTrainer neither needs accelerate nor should carry the Trainer's memory.
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        if steps < 1 or warmup < 0 or not input_ids:
            raise ValueError("need steps >= 1, warmup >= 0 and at least one row")
        total = warmup + steps
        marks: list[float] = []
        losses: list[Tensor] = []
        baseline = self

        class Objective(Trainer):
            def compute_loss(
                self,
                model: nn.Module,
                inputs: dict[str, Any],
                return_outputs: bool = False,
                num_items_in_batch: Tensor | int | None = None,
            ) -> Any:
                loss = naive_loss(
                    model,
                    inputs["input_ids"],
                    baseline.mask_token_id,
                    embedding=baseline.model.get_input_embeddings(),
                    annealing=baseline.annealing,
                    generator=generator,
                )
                losses.append(loss.detach())
                return (loss, {}) if return_outputs else loss

        class Clock(TrainerCallback):
            def _mark(self) -> None:
                if torch.cuda.is_available() and not baseline.use_cpu:
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())

            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                if not marks:
                    self._mark()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                self._mark()

        needed = total * self.batch_size * self.accumulation
        rows = [{"input_ids": input_ids[i % len(input_ids)]} for i in range(needed)]
        with tempfile.TemporaryDirectory() as folder:
            trainer = Objective(
                model=self.model,
                args=TrainingArguments(
                    output_dir=folder,
                    max_steps=total,
                    per_device_train_batch_size=self.batch_size,
                    gradient_accumulation_steps=self.accumulation,
                    learning_rate=self.lr,
                    lr_scheduler_type="constant",
                    optim="adamw_torch",
                    max_grad_norm=CLIP_NORM,
                    bf16=self.bf16,
                    use_cpu=self.use_cpu,
                    seed=self.seed,
                    report_to=[],
                    save_strategy="no",
                    logging_strategy="no",
                    disable_tqdm=True,
                    remove_unused_columns=False,
                    dataloader_pin_memory=not self.use_cpu,
                ),
                train_dataset=rows,
                data_collator=lambda items: {"input_ids": torch.stack([item["input_ids"] for item in items])},
                callbacks=[Clock()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.model_accepts_loss_kwargs = False  # so that the Trainer divides the loss by the accumulation
            generator = torch.Generator(trainer.args.device).manual_seed(self.seed)
            own_forward = "forward" in vars(self.model)
            try:
                trainer.train()
            finally:  # accelerate wraps model.forward in autocast: hand the model back as it came
                trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
                if not own_forward:
                    vars(self.model).pop("forward", None)
        if len(marks) != total + 1:
            raise RuntimeError(f"the Trainer made {len(marks) - 1} steps, {total} were asked")
        self.losses = torch.stack(losses).tolist()
        self.step_seconds = [b - a for a, b in zip(marks[warmup:], marks[warmup + 1 :])]
        return (marks[-1] - marks[warmup]) / steps
