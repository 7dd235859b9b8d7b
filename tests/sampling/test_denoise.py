"""The loop: what it promises of every run, and that a sample does not depend on the samples beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffulm.denoiser import HFDenoiser
from diffulm.layout import Full
from diffulm.process import MaskedDiffusion
from diffulm.runtime import uniforms
from diffulm.sampling import (
    Ancestral,
    Canvas,
    Draw,
    Entropy,
    EntropyBound,
    Factor,
    Margin,
    Policy,
    RandomOrder,
    Remask,
    Step,
    Threshold,
    TopConfidence,
    denoise,
)
from diffulm.sampling.scores import confidence, drawn_confidence, entropy, margin

from ..toy import FAMILIES, SPECIAL, VOCAB, Noise, Recorder, tiny_denoiser

assert SPECIAL.mask is not None
MASK: int = SPECIAL.mask
PROCESS = MaskedDiffusion(MASK)
LAYOUT = Full("previous")
POLICIES: list[Policy] = [
    Ancestral(), RandomOrder(), TopConfidence(), TopConfidence("drawn"), Entropy(), Margin(), Threshold(0.4),
    Threshold(0.4, "confident"), Factor(1.5), EntropyBound(1.0), Remask(0.3), Remask(0.5, "rescale"),
]  # fmt: skip
#: Completion, a hole inside, a hole at the start, several holes; lengths 14, 9, 6 and 18.
TEXTS: list[list[int | None]] = [
    [3, 4, 5, 6, 7, *[None] * 9],
    [8, 9, None, None, None, 10, 11, 3, 4],
    [None, None, None, None, 12, 13],
    [5, None, None, 6, 7, None, 8, *[None] * 10, 9],
]


@cache
def model(family: str, dtype: torch.dtype = torch.float64) -> HFDenoiser:
    return tiny_denoiser(family, dtype)


def canvas_of(texts: Iterable[list[int | None]]) -> Canvas:
    return Canvas.from_holes(list(texts), SPECIAL)


def run(
    denoiser: Any, canvas: Canvas, *, steps: int = 6, policy: Any = None, draw: Any = None,
    seeds: Iterable[int] | None = None,
) -> list[Step]:  # fmt: skip
    return list(
        denoise(
            denoiser, PROCESS, canvas, steps=steps, policy=policy or TopConfidence(), draw=draw or Draw(),
            layout=LAYOUT, seeds=None if seeds is None else list(seeds),
        )
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- promises of every run


@st.composite
def canvases(draw: Any) -> Canvas:
    token = st.none() | st.integers(3, VOCAB - 2)
    texts = st.lists(st.lists(token, min_size=1, max_size=12).filter(lambda t: None in t), min_size=1, max_size=4)
    return canvas_of(draw(texts))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@given(canvases(), st.integers(1, 15), st.sampled_from([Draw(), Draw(0.0), Draw(2.0, top_k=3)]))
@settings(max_examples=25, deadline=None)
def test_every_run_ends_without_a_mask_and_touches_nothing_given(
    policy: Policy, canvas: Canvas, steps: int, draw: Draw
) -> None:
    noise = Noise(VOCAB, MASK)
    before = canvas.ids.clone()
    out = run(noise, canvas, steps=steps, policy=policy, draw=draw)
    last = out[-1]
    assert torch.equal(canvas.ids, before)  # the caller's canvas is left as it was
    assert not (last.ids == MASK).any()
    assert torch.equal(last.ids[~canvas.editable], canvas.ids[~canvas.editable])
    assert noise.forwards <= len(out) <= steps
    assert noise.forwards == len(out) or isinstance(policy, Remask)  # taking back alone needs no forward
    if not isinstance(policy, Ancestral | Remask):  # at least one token a step in every sample
        assert len(out) <= int(canvas.editable.sum(1).max())
    B, L = canvas.ids.shape
    masked, upto = canvas.editable, torch.zeros(B, dtype=torch.long)
    ids = canvas.ids
    previous = -1
    for step in out:
        k = step.index
        assert previous < k < step.steps == steps
        assert isinstance(policy, Ancestral | Remask) or k == previous + 1
        previous = k
        assert (step.t, step.s) == (pytest.approx(1 - k / steps), pytest.approx(1 - (k + 1) / steps))
        assert step.reveal_prob == pytest.approx(1 / (steps - k))
        assert step.alpha_t == pytest.approx(k / steps)
        for field in (step.ids, step.masked, step.eligible, step.predicted, step.revealed, step.proposal):
            assert field.shape == (B, L)
        assert set(step.uniforms) == {"token", "reveal", "order"}
        assert all(uniform.shape == (B, L) for uniform in step.uniforms.values())
        # What stands is neither drawn nor ranked again: only masks are predicted, for a blind policy those it reveals.
        assert torch.equal(step.masked, masked)
        assert torch.equal(step.eligible, masked)
        assert torch.equal(step.predicted, step.revealed if getattr(policy, "blind", False) else masked)
        count = int(step.predicted.sum())
        assert len(step.log_probs) == count
        assert (step.log_probs[:, MASK] == -float("inf")).all()
        assert step.log_probs.exp().sum(-1).tolist() == pytest.approx([1.0] * count, abs=1e-5)
        assert not (step.proposal[step.predicted] == MASK).any()
        assert torch.equal(step.revealed, masked & (step.ids != MASK))
        assert torch.equal(step.ids[step.revealed], step.proposal[step.revealed])
        if not isinstance(policy, Remask):
            assert torch.equal(step.ids[~masked], ids[~masked])
        masked, ids = step.ids == MASK, step.ids
        leading = [row.index(True) if True in row else L for row in masked.tolist()]
        assert step.committed_upto.tolist() == leading
        assert (step.committed_upto >= upto).all() or isinstance(policy, Remask)
        upto = step.committed_upto
    assert upto.tolist() == [L] * B


@pytest.mark.parametrize("policy", [TopConfidence(), Threshold(0.4)], ids=str)
def test_the_policy_sees_the_canvas_before_the_step(policy: Policy) -> None:
    recorder = Recorder(policy)
    out = run(Noise(VOCAB, MASK), canvas_of(TEXTS), steps=9, policy=recorder)
    for shown, yielded in zip(recorder.steps, out, strict=False):
        assert torch.equal(shown.ids == MASK, shown.masked)
        assert torch.equal(shown.masked, yielded.masked)
        assert not shown.revealed.any()
    assert len(recorder.steps) == len(out) - (len(out) == 9)  # the last step of the grid reveals what is left


def test_it_stops_when_nothing_is_left() -> None:
    canvas = canvas_of(TEXTS)
    longest = int(canvas.editable.sum(1).max())
    for policy, expected in [(Threshold(1e-6), 1), (TopConfidence(), longest), (RandomOrder(), longest)]:
        noise = Noise(VOCAB, MASK)
        assert len(run(noise, canvas, steps=50, policy=policy)) == noise.forwards == expected
    whole = Canvas(canvas.ids.clamp(max=5), canvas.editable, canvas.valid)
    noise = Noise(VOCAB, MASK)
    assert run(noise, whole) == []  # editable, and filled already
    assert noise.forwards == 0


def test_one_step_fills_everything_at_once() -> None:
    (only,) = run(Noise(VOCAB, MASK), canvas_of(TEXTS), steps=1)
    assert not (only.ids == MASK).any()
    assert (only.s, only.t, only.reveal_prob) == (0.0, 1.0, 1.0)


def test_a_filled_editable_position_is_kept() -> None:
    """A canvas half done: what is filled stands like given text."""
    canvas = canvas_of(TEXTS[:1])
    ids = canvas.ids.clone()
    ids[0, 8] = 15
    out = run(Noise(VOCAB, MASK), Canvas(ids, canvas.editable, canvas.valid))
    assert all(int(step.ids[0, 8]) == 15 and not step.masked[0, 8] for step in out)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"steps": 0}, "steps must be at least 1, not 0"), ({"steps": -3}, "-3"), ({"seeds": [1, 2]}, "2 seeds for 4"),
     ({"seeds": []}, "0 seeds for 4")],
)  # fmt: skip
def test_wrong_arguments_are_refused_before_a_forward(wrong: dict[str, Any], message: str) -> None:
    noise = Noise(VOCAB, MASK)
    with pytest.raises(ValueError, match=message):
        run(noise, canvas_of(TEXTS), **wrong)
    assert noise.forwards == 0


# ------------------------------------------------------------------------------------- policies and draws of a user


@dataclasses.dataclass
class Regret:
    """Takes back one standing position at step `at`; else confidence."""

    at: int = 2
    taken: tuple[int, int] | None = None

    def __call__(self, step: Step) -> torch.Tensor:
        holds = TopConfidence()(step)
        if step.index == self.at:
            b, i = (~step.masked & (torch.arange(step.ids.shape[1]) > 5)).nonzero()[0].tolist()
            assert step.ids[b, i] != MASK
            self.taken = b, i
            holds[b, i] = False
        return holds


def test_a_policy_may_mask_again_what_it_revealed() -> None:
    policy, noise = Regret(), Noise(VOCAB, MASK)
    out = run(noise, canvas_of(TEXTS[:1]), steps=9, policy=policy)
    assert policy.taken is not None
    b, i = policy.taken
    assert out[1].ids[b, i] != MASK
    assert out[2].ids[b, i] == MASK
    assert not out[2].revealed[b, i]
    assert out[3].masked[b, i]
    assert out[2].committed_upto[b] <= i
    assert not (out[-1].ids == MASK).any()
    assert len(out) == noise.forwards == 9  # nine masks, one each, and the one taken back with the last


@given(canvases(), st.integers(1, 8), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_whatever_a_policy_answers_the_run_is_sound(canvas: Canvas, steps: int, seed: int) -> None:
    """Random answers, also about given text and padding: those stand, and no mask remains."""
    generator = torch.Generator().manual_seed(seed)

    def anything(step: Step) -> torch.Tensor:
        return torch.rand(step.ids.shape, generator=generator) < 0.4

    out = run(Noise(VOCAB, MASK), canvas, steps=steps, policy=anything)
    assert len(out) <= steps
    assert not (out[-1].ids == MASK).any()
    for step in out:
        assert torch.equal(step.ids[~canvas.editable], canvas.ids[~canvas.editable])


def test_a_function_is_a_policy_and_a_draw() -> None:
    def rightmost(step: Step) -> torch.Tensor:
        holds = ~step.masked
        for b, row in enumerate(step.masked.tolist()):
            if True in row:
                holds[b, max(i for i, m in enumerate(row) if m)] = True
        return holds

    def least_likely(log_probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        assert len(log_probs) == len(uniforms)
        return log_probs.masked_fill(log_probs == -float("inf"), float("inf")).argmin(-1)

    noise, canvas = Noise(VOCAB, MASK), canvas_of([[3, None, None, None]])
    out = run(noise, canvas, steps=3, policy=rightmost, draw=least_likely)
    assert [step.revealed[0].nonzero()[:, 0].tolist() for step in out] == [[4], [3], [2]]
    worst = noise.logits.masked_fill(noise.logits == -float("inf"), float("inf")).argmin(-1)
    assert out[-1].ids[0, 2:].tolist() == worst[2:5].tolist()


# ---------------------------------------------------------------------------------------------------- randomness


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    canvas = canvas_of(TEXTS)
    for policy in (TopConfidence(), RandomOrder(), Ancestral()):
        first, again = (run(model("llama"), canvas, policy=policy, seeds=[1, 2, 3, 4])[-1].ids for _ in range(2))
        other = run(model("llama"), canvas, policy=policy, seeds=[1, 2, 3, 5])[-1].ids
        assert torch.equal(first, again)
        assert torch.equal(first[:3], other[:3])
        assert not torch.equal(first[3], other[3])
    default = run(model("llama"), canvas)[-1].ids
    assert torch.equal(default, run(model("llama"), canvas, seeds=range(4))[-1].ids)


def test_every_step_position_and_purpose_has_its_own_uniform() -> None:
    """No number is used twice, or the same token would be drawn wherever the same law is met."""
    drawn: list[float] = []

    def spying(log_probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        drawn.extend(uniforms.tolist())
        return Draw()(log_probs, uniforms)

    out = run(Noise(VOCAB, MASK), canvas_of(TEXTS), draw=spying)
    numbers = list(drawn)
    for step in out:
        numbers += [x for name in ("reveal", "order") for x in step.uniforms[name].flatten().tolist()]
        assert set(step.uniforms["token"][step.revealed].tolist()) <= set(drawn)
    assert len(set(numbers)) == len(numbers)
    assert len(drawn) == int(canvas_of(TEXTS).editable.sum())  # only what is revealed is drawn
    assert all(0 <= x < 1 for x in numbers)
    assert sum(drawn) / len(drawn) == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_seeds_and_not_places_in_the_batch_decide(policy: Policy) -> None:
    seeds, order = [11, 22, 33, 44], [2, 0, 3, 1]
    straight = run(model("llama"), canvas_of(TEXTS), policy=policy, seeds=seeds)[-1].ids
    shuffled = run(
        model("llama"), canvas_of(TEXTS[i] for i in order), policy=policy, seeds=[seeds[i] for i in order]
    )[-1].ids  # fmt: skip
    assert torch.equal(shuffled, straight[order])


# ------------------------------------------------------------------------------------ batched and padded = each alone


#: Soft caps forbid the fused kernel, and transformers' own attention then takes the softmax in float32 whatever comes.
SOFTMAX_IN_FLOAT32 = ("gemma2",)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float64_a_batch_is_each_alone(family: str) -> None:
    """Unequal texts padded on the right: the same tokens at every step, the same predictions within 1e-10."""
    seeds = [11, 22, 33, 44]
    for policy, draw in [(TopConfidence(), Draw(0.0)), (Entropy(), Draw()), (Threshold(0.4), Draw()),
                         (RandomOrder(), Draw(0.8, top_k=9)), (Ancestral(), Draw(1.2, top_p=0.9)),
                         (EntropyBound(0.5), Draw()), (Remask(0.3), Draw())]:  # fmt: skip
        together = run(model(family), canvas_of(TEXTS), policy=policy, draw=draw, seeds=seeds)
        at = {step.index: step for step in together}
        for b, text in enumerate(TEXTS):
            alone = run(model(family), canvas_of([text]), policy=policy, draw=draw, seeds=[seeds[b]])
            n = 1 + len(text)
            for one in alone:
                many = at[one.index]
                assert one.ids[0].tolist() == many.ids[b, :n].tolist()
                rows = many.predicted.nonzero()[:, 0] == b
                if not one.predicted.any():
                    continue
                finite = one.log_probs > -float("inf")
                apart = (one.log_probs - many.log_probs[rows])[finite].abs().max()
                assert apart < (1e-5 if family in SOFTMAX_IN_FLOAT32 else 1e-10)
            assert alone[-1].ids[0].tolist() == together[-1].ids[b, :n].tolist()
            assert (together[-1].ids[b, n:] == SPECIAL.pad).all()


@dataclasses.dataclass
class Difference:
    """The first step at which a sample went another way in the batch: which decision, by how little, in nats or so."""

    kind: str
    gap: float
    noise: float


def first_difference(alone: list[Step], together: list[Step], b: int, policy: Policy, draw: Draw) -> Difference | None:
    """The decision at the first difference, and how far its alternatives lie apart, beside the rounding noise there."""
    n = alone[0].ids.shape[1]
    for one, many in zip(alone, together, strict=False):
        if torch.equal(one.ids[0], many.ids[b, :n]):
            continue
        assert torch.equal(one.masked[0], many.masked[b, :n])  # until here they went the same way
        other = many.log_probs[many.masked.nonzero()[:, 0] == b]
        finite = one.log_probs > -float("inf")
        noise = float((one.log_probs - other)[finite].abs().max())
        at = one.masked[0].nonzero()[:, 0]
        moved = one.proposal[0, at] != many.proposal[b, at]
        if moved.any():
            gaps = []
            for row in moved.nonzero()[:, 0].tolist():
                if draw.temperature == 0:  # distance between the two best
                    best = one.log_probs[row].topk(2).values
                    gaps.append(float(best[0] - best[1]))
                else:  # the CDF edge that the same uniform fell on different sides of
                    low = min(int(one.proposal[0, at[row]]), int(many.proposal[b, at[row]]))
                    u = uniforms(b, one.index, purpose="token", n=n)[at[row]]
                    gaps.append(abs(float(draw.probs(one.log_probs[row : row + 1])[0, : low + 1].sum()) - u))
            return Difference("token", max(gaps), noise)
        if isinstance(policy, Threshold):
            flipped = (one.ids[0] == MASK) != (many.ids[b, :n] == MASK)
            sure = confidence(one)[0]
            return Difference("threshold", float((sure - policy.tau)[flipped].abs().min()), noise)
        scores: dict[type, Callable[[Step], torch.Tensor]] = {
            TopConfidence: confidence, Entropy: lambda s: -entropy(s), Margin: margin,
        }  # fmt: skip
        score = (drawn_confidence if policy == TopConfidence("drawn") else scores[type(policy)])(one)[0]
        here, there = one.ids[0] != MASK, many.ids[b, :n] != MASK
        gap = float(score[here & ~there].min() - score[there & ~here].max())
        return Difference("position", abs(gap), noise)
    return None


def twins(family: str) -> HFDenoiser:
    """A float32 model with near-ties in every decision: tokens in pairs whose logits differ in the last bits."""
    denoiser = tiny_denoiser(family, torch.float32)
    denoiser.model.config.tie_word_embeddings = False
    head = torch.nn.Linear(32, VOCAB, bias=False)
    with torch.no_grad():
        weight = denoiser.head.weight.clone()
        weight[4:22:2] = weight[3:21:2] * (1 + 2e-7)
        head.weight.copy_(weight)
    denoiser.model.set_output_embeddings(head)  # type: ignore[operator]
    return denoiser.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_a_first_difference_is_a_tie(
    family: str, record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Other batch shapes take other kernels: where the tokens part, the decision was a matter of rounding."""
    runs, found = 0, []
    settings_of = [(TopConfidence(), Draw(0.0)), (Entropy(), Draw(0.0)), (Margin(), Draw(0.0)),
                   (Threshold(0.4), Draw(0.0)), (TopConfidence(), Draw()), (Entropy(), Draw(0.8))]  # fmt: skip
    for denoiser in (model(family, torch.float32), twins(family)):
        for policy, draw in settings_of:
            together = run(denoiser, canvas_of(TEXTS), policy=policy, draw=draw, seeds=range(4))
            for b, text in enumerate(TEXTS):
                alone = run(denoiser, canvas_of([text]), policy=policy, draw=draw, seeds=[b])
                runs += 1
                difference = first_difference(alone, together, b, policy, draw)
                if difference is not None:
                    found.append(difference)
    for difference in found:
        assert difference.noise < 2e-4, difference  # predictions agree as float32 can
        assert difference.gap <= 4 * difference.noise, difference  # and the alternatives lay closer still
    summary = f"{family}: {len(found)} of {runs} runs parted, at a tie each: " + (
        ", ".join(f"{d.kind} gap {d.gap:.1e} (noise {d.noise:.1e})" for d in found[:4]) or "none"
    )
    record_property("float32 differences", summary)
    with capsys.disabled():
        print(f"\n{summary}", end="")


def test_a_difference_that_is_no_tie_is_noticed() -> None:
    """The check above, given a batch in which padding leaks into what a sample sees."""

    class Leaking(torch.nn.Module):
        def forward(self, rows: Any, *, cache: object = None) -> torch.Tensor:
            return model("llama", torch.float32)(dataclasses.replace(rows, valid=torch.ones_like(rows.valid)))

    parted = []
    together = run(Leaking(), canvas_of(TEXTS), draw=Draw(0.0), seeds=range(4))
    for b, text in enumerate(TEXTS):
        alone = run(Leaking(), canvas_of([text]), draw=Draw(0.0), seeds=[b])
        parted.append(first_difference(alone, together, b, TopConfidence(), Draw(0.0)))
    assert any(d is not None and d.noise > 1e-2 for d in parted)
