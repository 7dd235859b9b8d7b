"""The opponents of the speed comparison do what the released samplers are known to do, and no less."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from benchmarks.naive import NaiveTrainer, naive_attention_mask, naive_corrupt, naive_loss, naive_loss_from_logits
from torch import Tensor

from diffulm.bench import baselines as released

from .conftest import tiny_config

VOCAB = 40
MASK = VOCAB - 1


def build(family: str = "llama", *, causal: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny random model whose outputs differ, bidirectional unless asked otherwise."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(family, vocab=VOCAB)
    if not causal:
        config.is_causal = False
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8)
    return model.to(dtype)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def canvas(batch: int, length: int, prompt: int = 3) -> tuple[Tensor, Tensor]:
    """Random ids without the mask, and all but the first `prompt` positions (and one more in the middle) editable."""
    ids = torch.randint(0, MASK, (batch, length), generator=torch.Generator().manual_seed(1))
    editable = torch.ones_like(ids, dtype=torch.bool)
    editable[:, :prompt] = False
    editable[:, length // 2] = False
    return ids, editable


def watched(model: Any, call: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor], list[int]]:
    """(result, input ids of every forward, rows of logits each gave)."""
    inputs: list[Tensor] = []
    rows: list[int] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args[0] if args else kwargs["input_ids"]).clone())

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        rows.append(output.logits.shape[1])

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        return call(), inputs, rows
    finally:
        for hook in hooks:
            hook.remove()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


Sampler = Callable[..., Tensor]
SAMPLERS: list[Sampler] = [released.sample_random_order, released.sample_top_k]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_every_hole_is_filled_the_prompt_kept_and_T_whole_forwards_made(
    model: Any, sampler: Sampler, steps: int
) -> None:
    ids, editable = canvas(3, 20)
    out, inputs, rows = watched(
        model, lambda: sampler(model, ids, editable, MASK, steps=steps, suppress_mask=True, generator=seeded())
    )
    assert out.shape == ids.shape and out.dtype == torch.int64
    assert not (out == MASK).any() and torch.equal(out[~editable], ids[~editable])
    assert rows == [20] * steps, "exactly T forwards, each with logits at every position"
    assert torch.equal(inputs[0], ids.masked_fill(editable, MASK)), "the first forward sees every hole masked"
    for earlier, later in pairwise(inputs):
        known = earlier != MASK
        assert torch.equal(later[known], earlier[known]), "what stands is never drawn again"
    stands = inputs[-1] != MASK
    assert torch.equal(out[stands], inputs[-1][stands])
    assert not model.training


@pytest.mark.parametrize("steps", [4, 10])
def test_random_order_commits_each_masked_token_with_probability_one_in_t_plus_one(steps: int) -> None:
    model = build(dtype=torch.float32)
    ids, editable = canvas(64, 100)
    _, inputs, _ = watched(
        model,
        lambda: released.sample_random_order(
            model, ids, editable, MASK, steps=steps, suppress_mask=True, generator=seeded(5)
        ),
    )
    masked = [int((x == MASK).sum()) for x in inputs]
    assert masked[0] == int(editable.sum()) == 64 * 96
    for t, (before, after) in zip(range(steps - 1, 0, -1), pairwise(masked)):
        p = 1 / (t + 1)
        error = math.sqrt(p * (1 - p) / before)
        assert abs((before - after) / before - p) < 4 * error, (t, before, after)
    per_row = (inputs[1] == MASK).sum(1)
    assert len(set(per_row.tolist())) > 3, "tokens are committed one by one, not in fixed numbers"


@pytest.mark.parametrize("steps", [3, 8, 25])
def test_top_k_keeps_the_planned_number_masked_or_as_released_at_most_that(model: Any, steps: int) -> None:
    ids, editable = canvas(4, 20)
    n = 16
    masked = {}
    for rank in ("masked", "all"):
        _, inputs, _ = watched(
            model,
            lambda rank=rank: released.sample_top_k(
                model, ids, editable, MASK, steps=steps, rank=rank, suppress_mask=True, generator=seeded(2)
            ),
        )
        masked[rank] = torch.stack([(x == MASK).sum(1) for x in inputs])
    planned = torch.tensor([n] + [math.floor(n * t / steps) for t in range(steps - 1, 0, -1)])
    assert torch.equal(masked["masked"], planned[:, None].expand(-1, 4))
    assert (masked["all"] <= planned[:, None]).all() and torch.equal(masked["all"][:2], masked["masked"][:2])
    if steps > 3:
        assert (masked["all"] < planned[:, None]).any(), "committed positions are ranked again: the known defect"


def test_top_k_leaves_the_least_likely_drawn_tokens_masked(model: Any) -> None:
    ids, editable = canvas(2, 20)
    _, inputs, _ = watched(
        model, lambda: released.sample_top_k(model, ids, editable, MASK, steps=2, greedy=True, suppress_mask=True)
    )
    with torch.no_grad():
        logits = model(inputs[0]).logits
    logits[..., MASK] = float("-inf")
    best = logits.log_softmax(-1).max(-1).values
    for b in range(2):
        holes = editable[b].nonzero()[:, 0]
        by_score = holes[best[b, holes - 1].argsort()]  # row i - 1 predicts position i
        assert sorted(by_score[:8].tolist()) == (inputs[1][b] == MASK).nonzero()[:, 0].tolist()


def test_tokens_come_from_the_row_before_and_top_p_keeps_the_best(model: Any) -> None:
    ids, editable = canvas(2, 20)
    with torch.no_grad():
        logits = model(ids.masked_fill(editable, MASK)).logits
    wanted = torch.where(editable, logits.argmax(-1).roll(1, 1), ids)
    tiny_p = released.sample_random_order(model, ids, editable, MASK, steps=1, top_p=1e-9)
    greedy = released.sample_top_k(model, ids, editable, MASK, steps=1, greedy=True)
    cold = released.sample_random_order(model, ids, editable, MASK, steps=1, top_p=None, temperature=1e-4)
    assert torch.equal(tiny_p, wanted) and torch.equal(greedy, wanted) and torch.equal(cold, wanted)


def test_nucleus_keeps_the_smallest_set_with_the_mass() -> None:
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()
    for p, kept in ((0.3, {1}), (0.5, {1, 3}), (0.8, {1, 3, 4}), (0.99, {0, 1, 2, 3, 4})):
        left = released._nucleus(logits[None, None], p)[0, 0].isfinite()
        assert set(left.nonzero()[:, 0].tolist()) == kept


def test_the_first_draw_follows_the_models_distribution() -> None:
    model = build(dtype=torch.float32)
    ids, editable = canvas(1, 4, prompt=1)
    with torch.no_grad():
        probs = (model(ids.masked_fill(editable, MASK)).logits / 0.7).softmax(-1)
    many = 4000
    out = released.sample_random_order(
        model, ids.expand(many, -1), editable.expand(many, -1), MASK, steps=1, temperature=0.7, top_p=None,
        generator=seeded(3),
    )  # fmt: skip
    for i in editable[0].nonzero()[:, 0].tolist():
        p = probs[0, i - 1]
        seen = torch.bincount(out[:, i], minlength=VOCAB) / many
        assert ((seen - p).abs() < 5 * (p * (1 - p) / many).sqrt() + 1e-3).all()


def test_as_released_the_mask_token_may_be_drawn() -> None:
    model = build("gpt2", dtype=torch.float32)
    for name in ("sample_random_order", "sample_top_k"):
        sampler = getattr(released, name)
        ids, editable = canvas(16, 40)
        found = [
            int((sampler(model, ids, editable, MASK, steps=4, generator=seeded(), suppress_mask=s) == MASK).sum())
            for s in (False, True)
        ]
        assert found[0] > 0 == found[1]


def test_samplers_run_in_the_models_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(dtype=torch.bfloat16)
    ids, editable = canvas(2, 12)
    seen = []
    plain = Tensor.multinomial
    monkeypatch.setattr(Tensor, "multinomial", lambda self, *a, **k: (seen.append(self.dtype), plain(self, *a, **k))[1])
    for sampler in SAMPLERS:
        sampler(model, ids, editable, MASK, steps=3)
    assert seen == [torch.bfloat16] * 6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_two_autoregressive_loops_agree_and_cost_what_they_say(family: str) -> None:
    model = build(family, causal=True)
    ids, _ = canvas(3, 5)
    slow, fed_slow, rows_slow = watched(model, lambda: released.generate_recomputing(model, ids, 9))
    fast, fed_fast, rows_fast = watched(model, lambda: released.generate_cached(model, ids, 9))
    assert torch.equal(slow, fast) and slow.shape == (3, 14) and torch.equal(slow[:, :5], ids)
    assert len(set(slow[:, 5:].flatten().tolist())) > 3, "not one token for ever: the comparison says something"
    assert [x.shape[1] for x in fed_slow] == rows_slow == list(range(5, 14))
    assert [x.shape[1] for x in fed_fast] == [5] + [1] * 8 and rows_fast == [1] * 9


def test_the_cached_loop_stops_when_every_text_has_its_end() -> None:
    model = build(causal=True)
    ids, _ = canvas(3, 5)
    whole = released.generate_cached(model, ids, 9)[:, 5:].tolist()
    ends = [whole[b][k] for b, k in ((0, 1), (1, 3), (2, 5))]
    firsts = [next(i for i, token in enumerate(row) if token in ends) for row in whole]
    last = max(firsts)
    assert min(firsts) < last, "they do not end together"
    out, inputs, _ = watched(model, lambda: released.generate_cached(model, ids, 9, ends=ends))
    assert last < 8 and out[:, 5:].tolist() == [row[: last + 1] for row in whole] and len(inputs) == last + 1


def test_refusals() -> None:
    model, causal = build(), build(causal=True)
    ids, editable = canvas(2, 8)
    for sampler in SAMPLERS:
        with pytest.raises(ValueError, match=r"bidirectional model; set config.is_causal = False"):
            sampler(causal, ids, editable, MASK)
        with pytest.raises(ValueError, match="put a start token there"):
            sampler(model, ids, torch.ones_like(editable), MASK)
        with pytest.raises(ValueError, match=r"must both be \(B, L\)"):
            sampler(model, ids, editable[:, :4], MASK)
        with pytest.raises(ValueError, match="steps must be at least 1"):
            sampler(model, ids, editable, MASK, steps=0)
        with pytest.raises(ValueError, match="temperature above 0"):
            sampler(model, ids, editable, MASK, temperature=0.0)
    with pytest.raises(ValueError, match="rank must be"):
        released.sample_top_k(model, ids, editable, MASK, rank="some")  # type: ignore[arg-type]
    for loop in (released.generate_recomputing, released.generate_cached):
        with pytest.raises(ValueError, match="need its parent"):
            loop(model, ids, 3)
        with pytest.raises(ValueError, match="put a start token first"):
            loop(causal, ids[:, :0], 3)
        with pytest.raises(ValueError, match="new_tokens must be at least 1"):
            loop(causal, ids, 0)


# ------------------------------------------------------------------------------------------------ the training step


def test_naive_mask_is_dense_causal_or_bernoulli_and_shared_by_the_batch() -> None:
    L = 200
    mask = naive_attention_mask(3, L, ratio=0.3, dtype=torch.float32, device=torch.device("cpu"), generator=seeded())
    assert mask.shape == (3, 1, L, L) and torch.equal(mask[0], mask[1]) and torch.equal(mask[0], mask[2])
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
    visible = mask[0, 0] == 0
    later = torch.ones(L, L, dtype=torch.bool).triu(1)
    assert visible[~later].all() and abs(float(visible[later].float().mean()) - 0.3) < 0.02
    again = naive_attention_mask(3, L, ratio=1.0, dtype=torch.float32, device=torch.device("cpu"))
    assert again.shape == mask.shape and not again.any(), "still built when everything is visible"


def test_naive_noise_levels_and_loss() -> None:
    ids = torch.randint(0, MASK, (2000, 50), generator=seeded())
    noised, t = naive_corrupt(ids, MASK, generator=seeded(1))
    assert t.min() >= 1e-3 and t.max() <= 1 and abs(float(t.mean()) - 0.5) < 0.03
    rate = (noised == MASK).float().mean(1)
    assert float((rate - t).abs().mean()) < 0.08 and torch.equal(noised[noised != MASK], ids[noised != MASK])
    logits = torch.randn(2, 5, VOCAB, generator=seeded(2))
    labels = torch.randint(0, MASK, (2, 5), generator=seeded(3))
    masked = torch.tensor([[True, False, True, True, False], [True, False, False, False, True]])
    t = torch.tensor([0.5, 0.2])
    nll = -logits.log_softmax(-1)
    by_hand = sum(
        float(nll[b, i - 1, labels[b, i]]) / float(t[b]) for b, i in ((0, 2), (0, 3), (1, 4))
    ) / 3  # position 0 is masked in both and never scored  # fmt: skip
    assert float(naive_loss_from_logits(logits, labels, masked, t)) == pytest.approx(by_hand, rel=1e-5)


def test_naive_step_trains_without_weight_decay() -> None:
    model = build(dtype=torch.float32)
    trainer = NaiveTrainer(model, MASK, autocast=None, lr=1e-2)
    group = trainer.optimizer.param_groups[0]
    assert group["weight_decay"] == 0 and group["betas"] == (0.9, 0.999) and not group["fused"]
    x = canvas(8, 32)[0] % 3

    def score() -> float:
        """The same noise each time: t differs much from draw to draw."""
        with torch.no_grad():
            return float(naive_loss(model, x, MASK, embedding=model.get_input_embeddings(), generator=seeded(9)))

    before = score()
    for _ in range(30):
        trainer.micro_batch(x)
        trainer.update()
    assert score() < 0.6 * before
