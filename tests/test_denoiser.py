"""The HF denoiser against plain torch: masks made by hand, the model's own logits, F.cross_entropy. float64, exact."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import diffulm.denoiser
from diffulm.denoiser import ChunkedNLL, HFDenoiser
from diffulm.layout import Annealing, Block, Causal, Full, NoisedBatch, Rows
from diffulm.objective import Normalisation, diffusion_loss
from diffulm.probe import check_attention, check_head
from diffulm.process import MaskedDiffusion
from diffulm.runtime import parse_precision

from .families import random_model

FAMILIES = ["llama", "gpt2", "qwen2", "qwen3", "phi", "granite", "cohere", "gemma2"]
V, L, MASK = 50, 12, 49
EXACT = {"rtol": 1e-10, "atol": 1e-10}
#: The head in seven parts, the last of one column: 49 of 50, the mask's.
SMALL_CHUNK = 7


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffulm.denoiser, "CHUNK", SMALL_CHUNK)


def build(name: str, mask: int | None = MASK) -> HFDenoiser:
    """A bidirectional model of a family in float64, windows as wide as the model."""
    window = {"sliding_window": 64} if name == "gemma2" else {}
    return HFDenoiser(random_model(name, vocab=V, dtype=torch.float64, is_causal=False, **window), mask)


def batch_of(
    documents: list[list[int]], *, length: int = L, seed: int = 0, annealed: Tensor | None = None
) -> NoisedBatch:
    """One sample per list of document lengths, the rest padding; half of what may be noised is."""
    B = len(documents)
    rng = torch.Generator().manual_seed(seed)
    x0 = torch.randint(3, MASK, (B, length), generator=rng)
    document, valid = torch.zeros(B, length, dtype=torch.long), torch.zeros(B, length, dtype=torch.bool)
    maskable = torch.zeros(B, length, dtype=torch.bool)
    for b, sizes in enumerate(documents):
        at = 0
        for k, size in enumerate(sizes):
            document[b, at : at + size], valid[b, at : at + size] = k, True
            maskable[b, at + 1 : at + size] = True
            at += size
        document[b, at:] = len(sizes)
    groups, levels = torch.zeros_like(x0), torch.full((B, 1), 0.5)
    noise = MaskedDiffusion(MASK).corrupt(x0, maskable, groups, levels, range(B))
    ids, noised, weight = noise
    return NoisedBatch(x0, ids, noised, maskable, weight, document, valid, groups, annealed)


def mask_by_hand(batch: NoisedBatch, later: Tensor | None = None) -> Tensor:
    """(B, 1, L, L) float64, 0 or the smallest float, written as loops."""
    B, length = batch.x0_BL.shape
    mask = torch.full((B, 1, length, length), torch.finfo(torch.float64).min, dtype=torch.float64)
    for b in range(B):
        for q in range(length):
            for k in range(length):
                same = batch.document_BL[b, q] == batch.document_BL[b, k] and batch.valid_BL[b, k]
                if q == k or (same and (later is None or k <= q or later[q, k])):
                    mask[b, 0, q, k] = 0.0
    return mask


def own_logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, L, V) by the model's own forward."""
    logits: Tensor = model(
        input_ids=ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None], use_cache=False
    ).logits
    return logits


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("source", ["previous", "own"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_nll_and_gradients_are_the_models_own(name: str, source: Any) -> None:
    """Packed, padded rows: logits, nll and gradients are those of F.cross_entropy on full logits, mask by hand."""
    denoiser = build(name)
    batch = batch_of([[7, 5], [9], [4, 3, 2]])
    rows = Full(source).training_rows(batch)
    full = own_logits(denoiser.model, batch.ids_BL, mask_by_hand(batch)).clone()
    full[..., MASK] = float("-inf")
    picked = [(b, i) for b in range(3) for i in range(L) if batch.noised_BL[b, i]]
    back = 1 if source == "previous" else 0
    logits = torch.stack([full[b, i - back] for b, i in picked])
    target = torch.stack([batch.x0_BL[b, i] for b, i in picked])
    weight = torch.stack([batch.weight_BL[b, i] for b, i in picked])
    nll = F.cross_entropy(logits, target, reduction="none")

    assert nll.dtype == torch.float64 and len(picked) > 8
    ours = denoiser(rows)
    assert ours[:, MASK].isneginf().all()
    torch.testing.assert_close(ours, logits, **EXACT)
    torch.testing.assert_close(denoiser.nll(rows), nll, **EXACT)
    expected = gradients(denoiser.model, (nll * weight).sum())
    found = gradients(denoiser.model, (denoiser.nll(rows) * rows.weight).sum())
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, **EXACT, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_autoregressive_parent_may_predict_every_token(name: str) -> None:
    """No mask token: nothing is suppressed, and the causal pattern is the model's own causal forward."""
    denoiser = build(name, None)
    batch = batch_of([[L], [L]])
    rows = Causal().training_rows(batch)
    full = own_logits(denoiser.model, batch.x0_BL, mask_by_hand(batch, torch.zeros(L, L).bool()))
    logits, target = full[:, :-1].flatten(0, 1), batch.x0_BL[:, 1:].flatten()
    nll = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(denoiser(rows), logits, **EXACT)
    torch.testing.assert_close(denoiser.nll(rows), nll, **EXACT)
    expected, found = gradients(denoiser.model, nll.sum()), gradients(denoiser.model, denoiser.nll(rows).sum())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, **EXACT, msg=lambda m, key=key: f"{key}: {m}")


def test_a_reused_mask_token_is_suppressed_at_noisy_rows_only() -> None:
    batch = batch_of([[L]])
    noisy, clean = Full("own").training_rows(batch), Causal().training_rows(batch)
    for added in (True, False):
        denoiser = build("llama")
        denoiser.mask_row_added = added
        assert denoiser(noisy)[:, MASK].isneginf().all()
        assert denoiser(clean)[:, MASK].isneginf().all() == added
        natural = replace(clean, target=torch.full_like(clean.target, MASK))
        assert denoiser.nll(natural).isfinite().all() != added


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_check_passes_and_can_fail(name: str) -> None:
    check_head(build(name), name="here")
    # A causal model is compared by its causal logits.
    check_head(HFDenoiser(random_model(name, vocab=V), None), name="here")
    broken = build(name)
    broken.config.logit_scale = 1.7 * (getattr(broken.config, "logit_scale", None) or 1.0)
    broken.model.logit_scale = (broken.config.logit_scale or 1.0) / 1.7  # what cohere's own forward reads
    with pytest.raises(ValueError, match=rf"here: {broken.config.model_type} changes its logits"):
        check_head(broken, name="here")


@pytest.mark.parametrize("source, row", [("previous", 4), ("own", 5)])
def test_the_row_that_predicts_token_5(source: Any, row: int) -> None:
    """Own logits with the model as it stands: no mask by hand, no packing, one wanted token."""
    denoiser = build("gpt2")
    ids = torch.randint(3, MASK, (1, L), generator=torch.Generator().manual_seed(3))
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    wanted[0, 5] = True
    ours = denoiser(Full(source).decoding_rows(ids, torch.ones_like(wanted), wanted))[0]
    theirs = denoiser.model(input_ids=ids).logits[0, row].clone()
    theirs[MASK] = float("-inf")
    torch.testing.assert_close(ours, theirs, **EXACT)


def losses(denoiser: HFDenoiser, rows: Rows) -> tuple[float, dict[str, Tensor]]:
    loss = (denoiser.nll(rows) * rows.weight).sum()
    return float(loss.detach()), gradients(denoiser.model, loss)


def assert_same(a: tuple[float, dict[str, Tensor]], b: tuple[float, dict[str, Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-10)
    for key, gradient in a[1].items():
        torch.testing.assert_close(b[1][key], gradient, **EXACT, msg=lambda m, key=key: f"{key}: {m}")


def sample(batch: NoisedBatch, b: int, *, start: int = 0, stop: int | None = None) -> NoisedBatch:
    cut = {k: v[b : b + 1, start:stop] for k, v in vars(batch).items() if k != "annealed_LL"}
    return NoisedBatch(**cut)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_padded_is_unpadded_and_batched_is_alone(name: str) -> None:
    denoiser, layout = build(name), Full()
    batch = batch_of([[12], [9], [5]])
    alone = [sample(batch, b, stop=n) for b, n in enumerate((12, 9, 5))]
    assert all(layout.training_rows(a).plain for a in alone) and not layout.training_rows(batch).plain
    together = losses(denoiser, layout.training_rows(batch))
    parts = [losses(denoiser, layout.training_rows(a)) for a in alone]
    assert_same(together, (sum(p[0] for p in parts), {k: sum(p[1][k] for p in parts) for k in together[1]}))  # type: ignore[misc]
    # What the padding holds is nobody's business.
    other = replace(batch, ids_BL=torch.where(batch.valid_BL, batch.ids_BL, 7))
    assert_same(together, losses(denoiser, layout.training_rows(other)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_packed_document_is_the_document_alone_at_its_positions(name: str) -> None:
    denoiser, layout = build(name), Full()
    batch = batch_of([[5, 3, 4]])
    together = losses(denoiser, layout.training_rows(batch))
    parts = []
    for start, stop in ((0, 5), (5, 8), (8, 12)):
        rows = layout.training_rows(sample(batch, 0, start=start, stop=stop))
        parts.append(losses(denoiser, replace(rows, position=rows.position + start)))
    assert_same(together, (sum(p[0] for p in parts), {k: sum(p[1][k] for p in parts) for k in together[1]}))  # type: ignore[misc]


@pytest.mark.parametrize("source", ["own", "launch"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_packed_document_of_blocks_is_the_document_alone(name: str, source: Any) -> None:
    """Documents that begin in the middle of what would be a block: the positions and blocks are their own."""
    denoiser, layout = build(name), Block(4, source, 0.5)
    batch = batch_of([[5, 6, 1]])
    batch = replace(batch, group_BL=layout.noise_groups(batch.document_BL))
    together = losses(denoiser, layout.training_rows(batch))
    alone = (sample(batch, 0, start=a, stop=b) for a, b in ((0, 5), (5, 11), (11, 12)))
    alone = (replace(one, group_BL=layout.groups(one.x0_BL.shape[1])[None]) for one in alone)
    parts = [losses(denoiser, layout.training_rows(one)) for one in alone]
    assert_same(together, (sum(p[0] for p in parts), {k: sum(p[1][k] for p in parts) for k in together[1]}))  # type: ignore[misc]


def test_annealing_is_causal_or_the_drawn_matrix() -> None:
    annealing = Annealing(steps=10, seed=3)
    later = annealing.matrix(3, L)
    assert later is not None and later.equal(annealing.matrix(3, L)) and not later.equal(annealing.matrix(4, L))
    shares = [float(annealing.matrix(k, 200).float().mean()) for k in range(9)]  # type: ignore[union-attr]
    assert shares == pytest.approx([annealing.ratio(k) for k in range(9)], abs=0.01)
    assert [annealing.ratio(k) for k in (0, 9, 99)] == [0.1, 1.0, 1.0] and Annealing(0).ratio(0) == 1.0
    assert annealing.matrix(9, L) is None and Annealing(0).matrix(0, L) is None

    denoiser, batch = build("llama"), batch_of([[7, 5], [9]])
    rows = Full("own").training_rows(replace(batch, annealed_LL=later))
    full = own_logits(denoiser.model, batch.ids_BL, mask_by_hand(batch, later))
    full[..., MASK] = float("-inf")
    torch.testing.assert_close(denoiser(rows), full[batch.noised_BL], **EXACT)
    # All of it drawn is the same as no matrix, which takes the unmasked path.
    plain = batch_of([[L], [L]])
    drawn = replace(plain, annealed_LL=torch.ones(L, L, dtype=torch.bool))
    assert denoiser.attention_mask(Full().training_rows(plain)) is None
    assert denoiser.attention_mask(Full().training_rows(drawn)) is not None
    assert_same(losses(denoiser, Full().training_rows(plain)), losses(denoiser, Full().training_rows(drawn)))
    # And none of it drawn is the causal parent.
    none = Full().training_rows(replace(plain, annealed_LL=torch.zeros(L, L, dtype=torch.bool)))
    torch.testing.assert_close(denoiser(none), denoiser(replace(none, pattern="causal", annealed=None)), **EXACT)


def test_a_mask_is_made_only_where_the_model_would_do_something_else() -> None:
    full, causal = build("llama"), HFDenoiser(random_model("llama", vocab=V), MASK)
    plain, packed = batch_of([[L], [L]]), batch_of([[7, 5], [9]])
    assert full.attention_mask(Full().training_rows(plain)) is None
    assert causal.attention_mask(Causal().training_rows(plain)) is None
    for denoiser, layout, batch in (
        (full, Full(), packed), (full, Causal(), plain), (causal, Full(), plain), (causal, Causal(), packed),
    ):  # fmt: skip
        mask = denoiser.attention_mask(layout.training_rows(batch))
        assert mask is not None and mask.shape == (2, 1, L, L) and mask.dtype.is_floating_point
        everywhere = denoiser is causal and layout == Full()
        assert mask.unique().tolist() == ([0.0] if everywhere else [torch.finfo(mask.dtype).min, 0.0])
    cast = HFDenoiser(random_model("llama", vocab=V), MASK, precision=parse_precision("autocast"))
    floor = cast.attention_mask(Full().training_rows(packed))
    assert floor is not None and floor.min() == torch.finfo(torch.bfloat16).min, "-inf after the cast would be NaN"


@pytest.mark.parametrize("documents", [[[7, 5]], [[9]]], ids=["packed", "padded"])
def test_alibi_refuses_what_it_cannot_do(documents: list[list[int]]) -> None:
    denoiser = build("bloom")
    with pytest.raises(ValueError, match=r"bloom .*ALiBi.*use unpadded full attention or another family"):
        denoiser.nll(Full().training_rows(batch_of(documents)))
    batch = batch_of([[L]])
    with pytest.raises(ValueError, match="annealed"):
        denoiser(Full().training_rows(replace(batch, annealed_LL=torch.zeros(L, L).bool())))
    logits = denoiser.model(input_ids=batch.ids_BL).logits.clone()
    logits[..., MASK] = float("-inf")
    torch.testing.assert_close(denoiser(Full("own").training_rows(batch)), logits[batch.noised_BL], **EXACT)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi"])
def test_nothing_noised_is_zero_with_zero_gradients(name: str) -> None:
    """A micro-batch without a noised token (documents of one BOS): no NaN, and every parameter has a gradient."""
    denoiser = build(name)
    batch = batch_of([[1], [1]])
    assert not batch.noised_BL.any()
    loss = diffusion_loss(denoiser, Full().training_rows(batch))
    assert loss.sum.item() == 0.0 and loss.count == 0 and not loss.by_level.any()
    found = gradients(denoiser.model, loss.sum)
    used = gradients(denoiser.model, diffusion_loss(denoiser, Full().training_rows(batch_of([[L]]))).sum)
    assert found.keys() == used.keys(), "a rank without work must still take part in the reduction"
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("chunk", [1, 7, 50, 8192])
def test_the_chunk_size_changes_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, rows = build("gemma2"), Full().training_rows(batch_of([[L], [L]]))
    expected = losses(denoiser, rows)
    monkeypatch.setattr(diffulm.denoiser, "CHUNK", chunk)
    assert_same(losses(denoiser, rows), expected)


@pytest.mark.parametrize("name", ["gemma2", "phi"])
def test_a_frozen_head_costs_no_gradient_and_changes_no_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft-capped logits (gemma2), a bias (phi): the hidden states' gradient is the same, the head's is not made."""
    denoiser, rows = build(name), Full().training_rows(batch_of([[L], [9]]))
    weight, bias = denoiser.head.weight.detach(), denoiser.head.bias
    bias = None if bias is None else bias.detach()
    hidden = denoiser.hidden(rows).flatten(0, 1)[rows.source].detach().requires_grad_()
    everywhere = torch.ones_like(rows.source, dtype=torch.bool)
    real, made = ChunkedNLL.backward, []
    monkeypatch.setattr(ChunkedNLL, "backward", staticmethod(lambda *a: made.append(real(*a)) or made[-1]))

    def grads(*, trains: bool) -> list[Tensor]:
        head = [None if x is None else x.clone().requires_grad_(trains) for x in (weight, bias)]
        inputs = [hidden, *(x for x in head if x is not None and trains)]
        nll = ChunkedNLL.apply(hidden, *head, rows.target, everywhere, MASK, denoiser.config)
        found = list(torch.autograd.grad((nll * rows.weight).sum(), inputs))
        assert [g is not None for g in made[-1][:3]] == [True, trains, trains and bias is not None]
        return found

    alone, *_ = grads(trains=False)
    together, *of_head = grads(trains=True)
    assert torch.equal(alone, together) and alone.any() and all(g.any() for g in of_head)
    assert len(of_head) == (1 if bias is None else 2)


def test_only_one_chunk_of_logits_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a chunk is computed, forward or backward, the one before it is gone."""
    made: list[weakref.ref[Tensor]] = []
    real = diffulm.denoiser._chunk_logits

    def watched(*arguments: Any) -> Tensor:
        assert not any(one() is not None for one in made)
        made.append(weakref.ref(logits := real(*arguments)))
        return logits

    monkeypatch.setattr(diffulm.denoiser, "_chunk_logits", watched)
    denoiser = build("llama")
    losses(denoiser, Full().training_rows(batch_of([[L]])))
    assert len(made) == 2 * -(-V // SMALL_CHUNK)


def test_capacity_rows_change_neither_loss_nor_gradient() -> None:
    denoiser, rows = build("qwen2"), Full().training_rows(batch_of([[L], [9]]))
    n = len(rows.source)
    for capacity in (n, n + 1, 2 * L):
        padded = rows.padded(capacity)
        assert len(padded.source) == len(padded.weight) == len(padded.target) == len(padded.level) == capacity
        assert_same(losses(denoiser, rows), losses(denoiser, padded))
        for form in get_args(Normalisation):
            a, b = (diffusion_loss(denoiser, r, normalisation=form) for r in (rows, padded))
            assert a.count == b.count and a.sum.item() == pytest.approx(b.sum.item(), rel=1e-6)
            torch.testing.assert_close(a.by_level, b.by_level)


def test_autocast_is_close_to_float32_and_keeps_float32_results() -> None:
    model = random_model("llama", vocab=V, is_causal=False)
    rows = Full().training_rows(batch_of([[L], [9]]))
    wide, cast = HFDenoiser(model, MASK), HFDenoiser(model, MASK, precision=parse_precision("autocast"))
    a, b = wide.nll(rows).detach(), cast.nll(rows).detach()
    assert a.dtype == b.dtype == cast(rows).dtype == torch.float32
    assert 0 < float((a - b).abs().max()) < 0.1 * float(a.max())


def test_the_probe_leaves_dropout_as_it_was() -> None:
    """GPT-2 has dropout. A wrapper that began in training mode would have the probe turn it on."""
    import transformers

    sizes = {
        "vocab_size": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
    }
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, is_causal=False))
    for training in (False, True):
        denoiser = HFDenoiser(model.train(training), 63)
        check_attention(denoiser, name="gpt2")
        assert denoiser.training == training and {m.training for m in model.modules()} == {training}
