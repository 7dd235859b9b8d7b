"""Each way of generating writes what its name says, at the cost it says."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffulm import hub
from diffulm.bench.meter import Meter, measured
from diffulm.bench.modes import Job, Mode, modes
from diffulm.convert import convert
from diffulm.denoiser import HFDenoiser
from diffulm.sampling import Canvas, Draw, denoise, policy_from_name
from diffulm.tokenizer import special_tokens

GREEDY = Draw(0.0)
POLICIES = ("entropy-bound:50", "threshold:0.01")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> hub.Model:
    return hub.load(checkpoint, device="cpu", dtype="float64")


@pytest.fixture(scope="module")
def above(parent: Path) -> HFDenoiser:
    return HFDenoiser(hub.load_parent(str(parent), dtype=torch.float64)[0].eval(), None)


@pytest.fixture(scope="module")
def blocks(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> hub.Model:
    folder = tmp_path_factory.mktemp("blocks") / "model"
    convert(str(parent), folder, trained_length=64, layout="block", block_size=4, source="own")
    return hub.load(folder, device="cpu", dtype="float64")


def job(batch: int = 2, tokens: int = 12, prompt: int = 6, **settings: object) -> Job:
    ids = torch.randint(3, 300, (batch, prompt), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 0
    return Job(ids, tokens, 5, **settings)  # type: ignore[arg-type]


def run(found: list[Mode], name: str, task: Job, *models: HFDenoiser) -> tuple[Tensor, Meter]:
    (mode,) = [m for m in found if m.name == name]
    return measured(lambda meter: mode.run(task, meter), [m.backbone for m in models], torch.device("cpu"))


def test_the_three_autoregressive_ways_write_the_same_greedy_text(model: hub.Model, above: HFDenoiser) -> None:
    found, task = modes(model, above, GREEDY, ()), job(batch=1, tokens=20)
    # Each forward takes a while: what else the machine does must not show in the times.
    slow = above.backbone.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    cached, loop = run(found, "AR generate", task, above), run(found, "AR bare loop, greedy", task, above)
    looked = run(found, "AR with look-up", task, above)
    slow.remove()
    assert torch.equal(cached[0], loop[0]) and torch.equal(looked[0], loop[0]) and loop[0].shape == (1, 20)
    assert (loop[1].forwards, loop[1].rows) == (20, 6 + 19) == (cached[1].forwards, cached[1].rows)
    assert looked[1].rows >= looked[1].forwards, "drafts are rows too"
    for _, meter in (cached, loop):
        assert 0 < meter.first < 0.8 * meter.seconds


def test_drawing_depends_on_the_seed_alone(model: hub.Model, above: HFDenoiser) -> None:
    found = modes(model, above, Draw(1.0, None, 0.9), ())
    for name in ("AR generate", "released A (random)", "released B (top-k)", "ancestral", "confidence, dual"):
        torch.manual_seed(1)
        state = torch.random.get_rng_state()
        a, b = (run(found, name, job(), above)[0] for _ in range(2))
        assert torch.equal(a, b) and torch.equal(state, torch.random.get_rng_state()), name
        other = run(found, name, Job(job().prompts_BP, 12, 6), above)[0]
        assert not torch.equal(a, other), name


@pytest.mark.parametrize("name", ["confidence", "ancestral", "first-hitting", *POLICIES])
def test_ours_is_the_one_loop(model: hub.Model, name: str) -> None:
    task, draw = job(), Draw(0.8)
    out, meter = run(modes(model, None, draw, POLICIES), name, task, model.denoiser)
    canvas = Canvas.from_prompt(task.prompts_BP[:, 1:].tolist(), task.tokens, special_tokens(model.tokenizer))
    steps = list(denoise(
        model.denoiser, model.process, canvas, steps=12, policy=policy_from_name(name), draw=draw, layout=model.layout,
        seeds=[5 * 1_000_003, 5 * 1_000_003 + 1],
    ))  # fmt: skip
    assert torch.equal(out, steps[-1].ids[:, 6:]) and meter.forwards == len(steps)
    assert meter.rows <= len(steps) * 2 * 18 and meter.first <= meter.seconds


def test_policies_and_caches_cost_less(model: hub.Model) -> None:
    found, task = modes(model, None, GREEDY, POLICIES), job(tokens=50)
    by_name = {n: run(found, n, task, model.denoiser)[1] for n in (
        "confidence", "entropy-bound:50", "confidence, in blocks", "confidence, prefix", "confidence, dual",
    )}  # fmt: skip
    assert by_name["confidence"].forwards == 50 and by_name["confidence"].rows == 50 * 2 * 56
    assert by_name["entropy-bound:50"].forwards < 50
    assert by_name["confidence, in blocks"].rows == by_name["confidence"].rows
    assert by_name["confidence, dual"].rows < by_name["confidence, prefix"].rows < by_name["confidence"].rows


def test_released_samplers_make_every_forward_whole(model: hub.Model) -> None:
    found, mask = modes(model, None, Draw(0.95, None, 0.9), ()), model.process.mask_token_id
    for name in ("released A (random)", "released B (top-k)"):
        out, meter = run(found, name, job(tokens=16), model.denoiser)
        assert (meter.forwards, meter.rows) == (16, 16 * 2 * 22) and out.shape == (2, 16)
        assert not (out == mask).any() and meter.first <= meter.seconds


def test_the_exact_cache_of_a_block_checkpoint(blocks: hub.Model) -> None:
    found, task = modes(blocks, None, GREEDY, POLICIES), job(tokens=20)
    names = {mode.name for mode in found}
    assert "confidence, no cache" in names and not any("dual" in n or "prefix" in n for n in names)
    cached, few = run(found, "confidence", task, blocks.denoiser)
    plain, many = run(found, "confidence, no cache", task, blocks.denoiser)
    assert torch.equal(cached, plain) and few.rows < many.rows / 2 and few.forwards == many.forwards


def test_all_stop_at_an_end_or_none_does(model: hub.Model, above: HFDenoiser) -> None:
    found = modes(model, above, GREEDY, POLICIES)
    whole, _ = run(found, "AR bare loop, greedy", job(tokens=20), above)
    ends = tuple(set(whole[:, 2].tolist()))  # what the parent writes third
    task = job(tokens=20, ends=ends)
    for name in ("AR generate", "AR bare loop, greedy"):
        out, meter = run(found, name, task, above)
        assert out.shape[1] < 20 and meter.forwards == out.shape[1] and torch.isin(out, torch.tensor(ends)).any(1).all()
    freely, long = run(found, "entropy-bound:50", job(tokens=20), model.denoiser)
    ends = tuple(set(freely[:, 4].tolist()))
    stopped, brief = run(found, "entropy-bound:50", job(tokens=20, ends=ends), model.denoiser)
    assert brief.forwards <= long.forwards
    for free, short in zip(freely.tolist(), stopped.tolist(), strict=True):
        first = next(i for i, token in enumerate(short) if token in ends)
        assert short[: first + 1] == free[: first + 1] and set(short[first:]) == {short[first]}
    assert run(found, "confidence, settled stop", task, model.denoiser)[0].shape == (2, 20)


def test_what_cannot_run_says_why(model: hub.Model, blocks: hub.Model, above: HFDenoiser) -> None:
    cases = [
        (model, above, "AR with look-up", job(), "batch_size = 1"),
        (model, None, "AR generate", job(), "give --parent"),
        (model, None, "AR bare loop, greedy", job(), "give --parent"),
        (model, above, "confidence, settled stop", job(), "--no-to-length"),
        (model, above, "released A (random)", job(), "temperature above 0"),
        (blocks, above, "released B (top-k)", job(), "row before it"),
    ]
    for which, parent, name, task, words in cases:
        with pytest.raises(ValueError, match=words):
            run(modes(which, parent, GREEDY, ()), name, task)
