"""The training loop: exact accumulation, exact resume, honest budgets, interruptions."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffulm.denoiser import HFDenoiser
from diffulm.layout import Annealing, Full, Rows, visible
from diffulm.objective import diffusion_loss
from diffulm.train import budget as budget_module
from diffulm.train import loop, step
from diffulm.train.budget import TIMED_MICRO, WARM_UP_MICRO, Budget, find_budget, plan_budget
from diffulm.train.config import TrainConfig
from diffulm.train.flops import Shape, Work, flops_per_token
from diffulm.train.group import Terminated
from diffulm.train.loop import Progress
from diffulm.train.metrics import Metrics, _peak_by_name, read_metrics, throughput
from diffulm.train.optim import WSD_DECAY, build_optimizers, learning_rate
from diffulm.train.plan import GPUS
from diffulm.train.step import prefetched, train_step

from .tiny import CONFIG, LENGTH, SPECIAL, make_denoiser, make_loader, numbers, run, same_weights, weights

CPU = torch.device("cpu")


def gradients(denoiser: HFDenoiser, micros: list[Rows], normalisation: str = "nelbo") -> tuple[float, list[Tensor]]:
    """(loss, gradients) of one step at rate 0 without clipping; nothing moves."""
    config = replace(CONFIG, clip=1e9)
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.0)
    done = train_step(denoiser, [optimizer], micros, 0, 0.0, config, normalisation)
    assert done is not None
    return done[0], [p.grad.clone() for p in denoiser.parameters() if p.grad is not None]


# ------------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("normalisation", ["nelbo", "masked"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_accumulation_changes_nothing(family: str, normalisation: str) -> None:
    """1 x 8 = 8 x 1 = uneven parts, with samples of very different maskable counts, in float64."""
    denoiser = make_denoiser(family=family)
    singles = make_loader(replace(CONFIG, micro_batch=1))
    n = next(n for n in range(9) if len({rows.maskable for rows in singles.rows(n)}) > 1)
    whole = make_loader(replace(CONFIG, micro_batch=8)).rows(n)
    loss, expected = gradients(denoiser, whole, normalisation)
    assert len(expected) > 10 and any(g.abs().max() > 1e-3 for g in expected)
    for micro in (1, 3, 4):
        other_loss, other = gradients(denoiser, make_loader(replace(CONFIG, micro_batch=micro)).rows(n), normalisation)
        assert other_loss == pytest.approx(loss, rel=1e-12)
        for a, b in zip(expected, other, strict=True):
            assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("normalisation", ["nelbo", "masked"])
def test_the_loss_is_what_the_formula_says(normalisation: str) -> None:
    """Weights n/l on the masked tokens' cross-entropy, divided by the maskable or by the noised, written out."""
    denoiser = make_denoiser()
    micros = make_loader().rows(0)
    total, maskable, noised = 0.0, 0, 0
    for rows in micros:
        model: Any = denoiser.model
        mask = torch.zeros((), dtype=torch.float64).where(visible(rows), torch.finfo(torch.float64).min)[:, None]
        with torch.no_grad():
            logits = model(input_ids=rows.ids, attention_mask=mask, position_ids=rows.position).logits
        logits[..., SPECIAL.mask] = -math.inf
        log_p = logits.log_softmax(-1)
        for b in range(len(rows.ids)):
            hidden = (rows.ids[b] == SPECIAL.mask).nonzero()[:, 0].tolist()
            n = int((rows.valid[b] & (rows.ids[b] != SPECIAL.bos)).sum())
            mine = rows.target[rows.source // LENGTH == b].tolist()
            total += n / len(hidden) * sum(-float(log_p[b, i - 1, t]) for i, t in zip(hidden, mine, strict=True))
            maskable, noised = maskable + n, noised + len(hidden)
    loss, _ = gradients(denoiser, micros, normalisation)
    assert loss == pytest.approx(total / (maskable if normalisation == "nelbo" else noised), rel=1e-6)


def test_the_gradient_is_that_of_the_loss() -> None:
    """Against a finite difference of the same step's loss, in the direction of the gradient.

    GPT-2: Llama's norms and rotations round to float32, and its embedding drops the gradient of the padding row.
    """
    denoiser, micros = make_denoiser(family="gpt2"), make_loader().rows(0)
    _, grads = gradients(denoiser, micros)
    slope = math.sqrt(sum(float(g.square().sum()) for g in grads))
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, g in zip(denoiser.parameters(), grads, strict=True):
                p += sign * 1e-6 / slope * g
            total = sum(float((denoiser.nll(rows) * rows.weight).sum()) for rows in micros)
            values.append(total / sum(rows.maskable for rows in micros))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


def spoil(at: set[int]) -> Any:
    """A `diffusion_loss` whose value is NaN in the second micro-batch of these steps (counted from 1)."""
    calls: list[int] = []

    def spoilt(denoiser: HFDenoiser, rows: Rows, **more: Any) -> Any:
        calls.append(1)
        loss = diffusion_loss(denoiser, rows, **more)
        number, micro = divmod(len(calls) - 1, 2)
        return replace(loss, sum=loss.sum * math.nan) if micro and number + 1 in at else loss

    return spoilt


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps 2, 4 and 5 of 8 move neither weights nor moments; a resume in between keeps the count."""
    bad, steps = {2, 4, 5}, []
    real = step.train_step

    def note(denoiser: HFDenoiser, *arguments: Any) -> Any:
        before = weights(denoiser)
        done = real(denoiser, *arguments)
        steps.append(same_weights(before, denoiser))
        return done

    monkeypatch.setattr(loop, "train_step", note)
    monkeypatch.setattr(step, "diffusion_loss", spoil(bad))
    run(tmp_path / "a", replace(CONFIG, max_skipped=3))
    assert [k + 1 for k, still in enumerate(steps) if still] == sorted(bad)
    rows = read_metrics(tmp_path / "a")
    assert [r["skipped"] for r in rows] == [0, 1, 1, 2, 3, 3, 3, 3]
    assert (
        [r["step"] for r in rows if r["loss"] is None] == [2, 4, 5] == [r["step"] for r in rows if not r["grad_norm"]]
    )
    assert "NaN" not in (tmp_path / "a" / "metrics.jsonl").read_text()
    assert "step 5 skipped: its loss or gradient is not finite (2 in a row)" in caplog.text
    monkeypatch.setattr(step, "diffusion_loss", spoil(bad))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", report=send(signal.SIGINT, 4))
    monkeypatch.setattr(step, "diffusion_loss", spoil({1}))  # the fifth step is the first of this process
    run(tmp_path / "b")
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert "step 5 skipped: its loss or gradient is not finite (2 in a row)" in caplog.text.split("resuming")[-1]


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "diffusion_loss", spoil({1, 3, 4, 5}))
    with pytest.raises(FloatingPointError, match=r"3 steps in a row \(3 to 5\), and no weight moved; lower"):
        run(tmp_path, replace(CONFIG, max_skipped=3))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_infinite_weights_are_noticed() -> None:
    denoiser = make_denoiser("float32")
    optimizers = build_optimizers(denoiser, CONFIG)
    with torch.no_grad():
        next(denoiser.parameters())[5] = math.inf
    before = weights(denoiser)
    done = train_step(denoiser, optimizers, make_loader().rows(0), 3, 1e-3, CONFIG)
    assert done is not None and not done.finite
    assert same_weights(before, denoiser) and not optimizers[0].state


def test_clipping_and_decay() -> None:
    denoiser = make_denoiser()
    (optimizer,) = build_optimizers(denoiser, CONFIG)
    groups = optimizer.param_groups
    assert {p.ndim for p in groups[0]["params"]} == {2} and groups[0]["weight_decay"] == 0.1
    assert {p.ndim for p in groups[1]["params"]} == {1} and groups[1]["weight_decay"] == 0.0
    assert sum(len(g["params"]) for g in groups) == len(list(denoiser.parameters()))
    done = train_step(
        denoiser, [torch.optim.SGD(denoiser.parameters())], make_loader().rows(0), 0, 0.0, replace(CONFIG, clip=0.01)
    )
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in denoiser.parameters() if p.grad is not None))
    assert done is not None and done[1] > 0.01 and norm == pytest.approx(0.01, rel=1e-3)


# --------------------------------------------------------------------------------------------- learning rate


def test_learning_rate_schedules() -> None:
    base = TrainConfig(learning_rate=2.0, warmup=0.1, final_rate=0.25)
    for decay in ("cosine", "wsd", "constant"):
        config = replace(base, decay=decay)  # type: ignore[arg-type]
        assert learning_rate(config, 0.05) == pytest.approx(1.0), "half way up"
        assert learning_rate(config, 0.1) == pytest.approx(2.0), "the peak"
    cosine, wsd = base, replace(base, decay="wsd")
    assert learning_rate(cosine, 0.55) == pytest.approx(2 * (0.25 + 0.75 / 2)), "half way down"
    assert learning_rate(cosine, 1.0) == pytest.approx(0.5) == learning_rate(wsd, 1.0)
    assert learning_rate(wsd, 1 - WSD_DECAY) == pytest.approx(2.0) and learning_rate(wsd, 0.5) == 2.0
    assert learning_rate(wsd, 1 - WSD_DECAY / 2) == pytest.approx(2 * (0.25 + 0.75 / 2))
    assert learning_rate(replace(base, decay="constant"), 1.0) == 2.0
    assert learning_rate(replace(base, warmup=0.0), 1e-9) == pytest.approx(2.0)
    assert learning_rate(replace(base, warmup=1.0), 1.0) == pytest.approx(2.0)
    assert learning_rate(replace(base, final_rate=0.0), 1.0) == pytest.approx(0.0)


# ------------------------------------------------------------------------------------------------- prefetching


def batch_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("batches")]


def test_the_next_batch_is_made_by_a_thread_while_a_step_runs() -> None:
    made: list[tuple[int, str]] = []
    ready = [threading.Event() for _ in range(4)]

    def make(n: int) -> Any:
        made.append((n, threading.current_thread().name))
        ready[n].set()
        return n

    with prefetched(make, 4) as rows:
        for n in (1, 2, 3):  # a resume begins anywhere
            assert rows(n) == n
            if n < 3:
                assert ready[n + 1].wait(10), "made before it is asked for"
                assert len(made) == n + 1, "one step ahead and no more"
    assert [n for n, _ in made] == [1, 2, 3], "none twice, none beyond the last"
    assert threading.current_thread().name not in {name for _, name in made} and not batch_threads()


def test_an_error_in_a_batch_is_raised_where_the_batch_is_asked_for(tmp_path: Path) -> None:
    class Ends:
        def rows(self, n: int, rank: int = 0, world: int = 1) -> list[Rows]:
            if n == 3:
                raise ValueError("the text is exhausted")
            return make_loader().rows(n, rank, world)

    with pytest.raises(ValueError, match="the text is exhausted"):
        run(tmp_path, batches=Ends())
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3], "the steps before it were done"
    assert not batch_threads()
    assert run(tmp_path / "less", replace(CONFIG, steps=3), batches=Ends()), "a batch that no step needs is not made"


@pytest.mark.parametrize("numbers_sent", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_no_thread_outlives_an_interruption(tmp_path: Path, numbers_sent: list[int]) -> None:
    def interrupt(p: Progress) -> None:
        if p.step == 3:
            assert batch_threads()
            for number in numbers_sent:
                os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, report=interrupt)
    assert not batch_threads()


# --------------------------------------------------------------------------------------------------- budget


def test_budgets_in_steps_and_tokens() -> None:
    denoiser, batches = make_denoiser("float32"), make_loader()
    none = replace(CONFIG, steps=None)
    assert find_budget(CONFIG, batches, denoiser, length=LENGTH, device=CPU) == Budget(8, 128)
    tokens = replace(none, tokens=1000)
    assert find_budget(tokens, batches, denoiser, length=LENGTH, device=CPU) == Budget(7, 128)
    assert find_budget(replace(none, tokens=1), batches, denoiser, length=LENGTH, device=CPU) == Budget(1, 128)
    with pytest.raises(ValueError, match=r"set train.steps, train.tokens or train.minutes"):
        find_budget(none, batches, denoiser, length=LENGTH, device=CPU)


def test_minutes_are_timed_once_and_change_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = make_denoiser("float32")
    before = weights(denoiser)
    config = replace(CONFIG, steps=None, minutes=0.5)
    micros = []
    real = budget_module.diffusion_loss
    monkeypatch.setattr(budget_module, "diffusion_loss", lambda d, rows, **k: micros.append(rows) or real(d, rows, **k))
    budget = plan_budget(
        tmp_path, lambda: find_budget(config, make_loader(), denoiser, length=LENGTH, device=CPU)
    )  # fmt: skip
    assert len(micros) == WARM_UP_MICRO + TIMED_MICRO
    assert same_weights(before, denoiser) and all(p.grad is None for p in denoiser.parameters())
    assert budget.tokens_per_second is not None and budget.tokens_per_step == 128
    assert budget.steps == round(0.5 * 60 * budget.tokens_per_second / 128)
    stored = json.loads((tmp_path / "budget.json").read_text())
    assert stored == vars(budget)
    # The resumed run keeps it, however fast the machine now is.
    assert plan_budget(tmp_path, lambda: pytest.fail("timed again")) == budget


# --------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "autocast", "float64"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resume_is_the_uninterrupted_run(tmp_path: Path, dtype: str, family: str, dropout: float) -> None:
    """Stopped after 1, 3 and 6 of 8 steps, each time in a fresh model: the same weights and metrics, bit for bit."""

    def fresh() -> HFDenoiser:
        denoiser = make_denoiser(dtype, family=family)
        for module in denoiser.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = dropout
        return denoiser

    more: dict[str, Any] = {"heldout": lambda: 1.5, "anneal_ratio": Annealing(4).ratio}
    expected = run(tmp_path / "whole", denoiser=fresh(), **more)
    for stop in (1, 3, 6):

        def interrupt(p: Progress, at: int = stop) -> None:
            if p.step == at:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", denoiser=fresh(), report=interrupt, **more)
    resumed = run(tmp_path / "parts", denoiser=fresh(), **more)
    assert same_weights(expected, resumed)
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "parts") and len(numbers(tmp_path / "whole")) == 8
    assert not same_weights(expected, fresh())
    if dropout:
        plain = run(tmp_path / "plain", denoiser=make_denoiser(dtype, family=family), **more)
        assert not same_weights(expected, plain), "dropout took part"


def test_metrics_say_what_happened(tmp_path: Path) -> None:
    seen: list[Progress] = []
    scores = iter([3.0, 2.0, 1.0, 0.5])
    config = replace(CONFIG, heldout_evaluations=4)
    run(tmp_path, config, report=seen.append, heldout=lambda: next(scores), anneal_ratio=Annealing(4).ratio)
    rows = read_metrics(tmp_path)
    assert [r["step"] for r in rows] == list(range(1, 9)) == [p.step for p in seen]
    assert [r["tokens"] for r in rows] == [128 * k for k in range(1, 9)]
    assert [r["heldout"] for r in rows] == [None, 3.0, None, 2.0, None, 1.0, None, 0.5]
    assert [r["annealing"] for r in rows] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert [r["learning_rate"] for r in rows] == [learning_rate(config, (k - 0.5) / 8) for k in range(1, 9)]
    loader = make_loader()
    for n, row in enumerate(rows):
        noised = sum(rows.noised for rows in loader.rows(n))
        assert sum(count for _, count in row["by_level"]) == noised and row["by_level"][0] == [0.0, 0]
    assert rows[-1]["loss"] < rows[0]["loss"] and all(r["grad_norm"] > 0 for r in rows)
    assert seen[-1].left == 0 and seen[0].left > 0 and seen[-1].loss == rows[-1]["loss"]


def test_throughput_is_operations_over_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TFLOP/s on any device, MFU where the device's peak is known; both of one process."""
    shape = Shape.of(make_denoiser().model)
    cost = flops_per_token(shape, Work(LENGTH, LENGTH, LENGTH**2, LENGTH / 2))
    assert cost > 6 * shape.matrix
    run(tmp_path / "cpu", flops_per_token=cost)
    for row in read_metrics(tmp_path / "cpu"):
        # Tokens per second are rounded to a tenth, which shows where a machine is slow.
        expected = pytest.approx(cost * row["tokens_per_second"] / 1e12, rel=1e-3, abs=cost * 0.1 / 1e12)
        assert row["tflops"] == expected and "mfu" not in row
    monkeypatch.setattr(loop, "peak_flops", lambda device: 1e12)
    run(tmp_path / "known", flops_per_token=cost)
    assert all(row["mfu"] == pytest.approx(row["tflops"], rel=1e-3) for row in read_metrics(tmp_path / "known"))
    assert throughput(300.0, 1e9, world=2, peak=1e12) == {"tflops": 0.15, "mfu": 0.15}
    run(tmp_path / "unknown")
    assert not {"tflops", "mfu"} & read_metrics(tmp_path / "unknown")[0].keys(), "no cost was given"


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA L40S", "l40s"),
        ("AMD Instinct MI300X", "mi300x"), ("NVIDIA H100 PCIe", None), ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_a_peak_is_given_to_the_devices_of_the_table_alone(name: str, gpu: str | None) -> None:
    assert _peak_by_name(name) == (GPUS[gpu].flops if gpu else None)


def test_a_finished_run_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(tmp_path)
    monkeypatch.setattr(loop, "train_step", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(loop.checkpoint, "save", lambda *a, **k: pytest.fail("saved again"))
    assert same_weights(run(tmp_path), expected) and len(read_metrics(tmp_path)) == 8


def test_training_starts_from_what_it_was_given_and_ends_elsewhere(tmp_path: Path) -> None:
    start = weights(make_denoiser("float32"))
    assert not same_weights(start, run(tmp_path, replace(CONFIG, steps=2)))


# ------------------------------------------------------------------------------------------- interruptions


def send(number: int, at: int) -> Callable[[Progress], None]:
    return lambda p: os.kill(os.getpid(), number) if p.step == at else None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_the_last_completed_step(tmp_path: Path, number: int) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt) as caught:
        run(tmp_path / "a", report=send(number, 5))
    assert (caught.type is Terminated) == (number == signal.SIGTERM)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before, "handlers are put back"
    assert [p.name for p in sorted((tmp_path / "a").glob("step-*"))] == ["step-00000005"]
    assert [r["step"] for r in read_metrics(tmp_path / "a")] == [1, 2, 3, 4, 5]
    assert same_weights(run(tmp_path / "a"), run(tmp_path / "b"))
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


def test_an_interruption_inside_a_step_leaves_the_step_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The signal arrives in the first micro-batch of step 4: no half gradient is ever applied."""
    calls = []

    def noticed(denoiser: HFDenoiser, rows: Rows, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:  # two micro-batches a step
            os.kill(os.getpid(), signal.SIGINT)
        return diffusion_loss(denoiser, rows, **more)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        patch.setattr(step, "diffusion_loss", noticed)
        run(tmp_path / "a")
    assert len(calls) == 7 and (tmp_path / "a" / "step-00000003").is_dir()
    assert "a checkpoint follows" in caplog.text
    assert same_weights(run(tmp_path / "a"), run(tmp_path / "b"))
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


def test_an_interruption_in_the_last_step_is_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", report=send(signal.SIGINT, 8))
    assert (tmp_path / "a" / "step-00000008").is_dir()
    assert same_weights(run(tmp_path / "a"), run(tmp_path / "b"))


def test_an_interruption_before_the_first_step_writes_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(*a: Any, **k: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return diffusion_loss(*a, **k)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step, "diffusion_loss", at_once)
        run(tmp_path / "a")
    assert not list((tmp_path / "a").glob("step-*"))
    assert same_weights(run(tmp_path / "a"), run(tmp_path / "b"))


def test_a_second_ctrl_c_ends_at_once_but_torchruns_sigterm_does_not(tmp_path: Path) -> None:
    def twice(first: int, second: int) -> Callable[[Progress], None]:
        def report(p: Progress) -> None:
            if p.step == 2:
                os.kill(os.getpid(), first)
                os.kill(os.getpid(), second)

        return report

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "both", report=twice(signal.SIGINT, signal.SIGTERM))
    assert (tmp_path / "both" / "step-00000002").is_dir()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "again", report=twice(signal.SIGINT, signal.SIGINT))
    assert not list((tmp_path / "again").glob("step-*")), "no checkpoint: at once"


# ---------------------------------------------------------------------------------------- annealing, metrics


def test_annealing_opens_as_in_the_paper() -> None:
    annealing = Annealing(4, seed=1)
    assert [annealing.ratio(k) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    for k in range(3):
        matrix = annealing.matrix(k, 200)
        assert matrix is not None and matrix.shape == (200, 200) and matrix.dtype == torch.bool
        assert float(matrix.float().mean()) == pytest.approx(annealing.ratio(k), abs=0.01)
        assert torch.equal(matrix, Annealing(4, seed=1).matrix(k, 200))  # type: ignore[arg-type]
    assert not torch.equal(annealing.matrix(0, 50), Annealing(4, seed=2).matrix(0, 50))  # type: ignore[arg-type]
    assert annealing.matrix(3, 200) is None and Annealing(0).matrix(0, 9) is None and Annealing(0).ratio(0) == 1


def test_annealed_attention_is_causal_or_bernoulli() -> None:
    matrix = Annealing(4, seed=1).matrix(1, LENGTH)
    assert matrix is not None
    batches = make_loader(annealing=Annealing(4, seed=1), layout=Full())
    rows = batches.rows(1)[0]
    together = (rows.document[:, :, None] == rows.document[:, None, :]) & rows.valid[:, None, :]
    lower = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    expected = ((lower | matrix) & together) | torch.eye(LENGTH, dtype=torch.bool)
    assert torch.equal(visible(rows), expected)


def test_metrics_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    metrics = Metrics(tmp_path, from_step=1)
    metrics.write({"step": 2, "loss": 0.5})
    metrics.close()
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 0.5}\n'
    assert read_metrics(tmp_path / "nowhere") == []


def test_metrics_are_never_half_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while a resume drops records must not lose the ones it keeps."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    def killed(self: Path, target: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        Metrics(tmp_path, from_step=1)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, replace(CONFIG, steps=2, tensorboard=True))
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize("world", [1, 2])
def test_a_failing_process_of_several_is_not_cut_off(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's SIGTERM meets the survivor of a killed process between its error and the line that says so."""
    monkeypatch.setattr(loop, "rank_and_world", lambda: (0, world))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError, match="broke"), loop._interruptions():
            raise RuntimeError("broke")
        assert (signal.getsignal(signal.SIGTERM) == before) == (world == 1)
        if world > 1:
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
