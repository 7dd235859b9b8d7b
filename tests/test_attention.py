"""Attention in tiles against torch's own over everything: the same outputs and gradients, less computed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import diffulm.attention
from diffulm.attention import TILED, TiledAttention, share_computed, tiles_of
from diffulm.attention import attend as attend_or_otherwise
from diffulm.denoiser import HFDenoiser
from diffulm.layout import Block, Full, Rows

from .families import random_model
from .test_denoiser import MASK, L, V, batch_of, gradients
from .test_flex import LATER, rows_of

FAMILIES = ("llama", "qwen3", "gpt2", "gemma")
attend = partial(attend_or_otherwise, otherwise=sdpa_attention_forward)


def random_case(dtype: torch.dtype = torch.float64, heads: int = 4, shared: int = 4) -> tuple[list[Tensor], Tensor]:
    """q, k, narrower v and a mask under which each of 300 rows sees itself and a tenth of the others."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, 300, width, dtype=dtype, generator=draw).requires_grad_()
        for h, width in ((heads, 8), (shared, 8), (shared, 5))
    )
    seen = (torch.rand(2, 300, 300, generator=draw) < 0.1) | torch.eye(300, dtype=torch.bool)
    seen[:, :150, 200:] = False  # some tiles are seen by nobody
    seen[:, 150:, :20] = False
    return [q, k, v], torch.zeros((), dtype=dtype).where(seen, torch.finfo(torch.float32).min)[:, None]


@pytest.mark.parametrize("tile", [1, 37, 128, 512])
def test_outputs_and_gradients_are_those_of_the_whole(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffulm.attention, "TILE", tile)
    (q, k, v), mask = random_case()
    ours = TiledAttention.apply(q, k, v, mask, tiles_of(mask), 0.3)
    theirs = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
    assert (ours - theirs).abs().max() < 1e-14
    given = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), given) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_fewer_key_heads_and_wider_queries() -> None:
    (q, k, v), mask = random_case(torch.float32, heads=6, shared=2)
    ours, _ = attend(None, q, k, v, mask)
    theirs = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
    assert ours.shape == (2, 300, 6, 5) and (ours - theirs).abs().max() < 1e-5
    assert attend(None, q, k, v.bfloat16(), mask)[0].dtype == torch.bfloat16, "as under autocast"


def test_dropout_is_torchs_own() -> None:
    (q, k, v), mask = random_case()
    torch.manual_seed(3)
    ours, _ = attend(None, q, k, v, mask, dropout=0.5)
    torch.manual_seed(3)
    theirs = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.5).transpose(1, 2)
    assert ours.equal(theirs) and not ours.equal(attend(None, q, k, v, mask)[0])


def test_gradients_by_finite_differences() -> None:
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 5, 3, dtype=torch.float64, generator=draw).requires_grad_() for _ in range(3))
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    mask[..., torch.arange(5)[:, None] < torch.arange(5)] = -1e30
    assert torch.autograd.gradcheck(lambda *x: TiledAttention.apply(*x, mask, tiles_of(mask), 0.5), (q, k, v))


def test_only_columns_that_are_seen_are_computed() -> None:
    """Block rows at their usual shape: less than half of all pairs."""
    rows = Block(4, "launch").training_rows(batch_of([[512]], length=512))
    mask = build("llama").attention_mask(rows)
    assert rows.ids.shape[1] == 1151 and 0.35 < share_computed(tiles_of(mask), mask) < 0.45


def test_packed_samples_have_tiles_of_their_own() -> None:
    """What one sample sees costs the others nothing."""
    rows = Full().training_rows(batch_of([[384, 128], [128, 384]], length=512))
    mask = build("llama").attention_mask(rows)
    assert share_computed(tiles_of(mask), mask) == (384**2 + 128**2) / 512**2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["block own", "block launch", "packed full"])
def test_a_denoiser_trains_alike(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffulm.attention, "TILE", 5)
    denoiser, rows = build(family), rows_of(name)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for tiled in (False, True):
        denoiser.tiled = tiled
        nll = denoiser.nll(rows)
        found.append((nll, gradients(denoiser.model, (nll * rows.weight).sum())))
        assert (denoiser.config._attn_implementation == TILED) == tiled
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-10, atol=1e-10)
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], gradient, rtol=1e-9, atol=1e-9)


def test_values_narrower_than_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent attention; in float32, which torch's grouped products of experts ask for."""
    monkeypatch.setattr(diffulm.attention, "TILE", 5)
    model = random_model("deepseek_v3", vocab=V, dtype=torch.float32, is_causal=False)
    denoiser, rows = HFDenoiser(model, MASK), rows_of("block own")
    found = []
    for tiled in (False, True):
        denoiser.tiled = tiled
        found.append(denoiser.nll(rows).detach())
    assert model.config._attn_implementation == TILED and len(found[0]) > 3
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_chosen_in_training_on_a_cpu_where_pairs_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, denoiser = rows_of("block launch"), build("llama").train()

    def how(rows: Rows) -> str:
        denoiser.hidden(rows)
        return str(denoiser.config._attn_implementation)

    assert how(packed) == "sdpa", "one tile holds everything"
    monkeypatch.setattr(diffulm.attention, "TILE", 5)
    assert how(packed) == TILED
    assert how(Full().training_rows(batch_of([[L], [L]]))) == "sdpa", "nothing is hidden"
    assert how(Full("own").training_rows(batch_of([[L], [L]], annealed=LATER))) == "sdpa", "nearly nothing is"
    denoiser.eval()
    assert how(packed) == "sdpa"
    assert TILED not in str(denoiser.config.to_dict()), "no checkpoint remembers it"


@pytest.mark.parametrize("causal", [False, True])
def test_a_stock_model_goes_on_after_training(causal: bool) -> None:
    """The name stays in the live config; without a mask, with padding and in a new denoiser nothing changes."""
    model = random_model("llama", vocab=V, dtype=torch.float64, is_causal=causal).eval()
    ids, padding = torch.randint(3, MASK, (2, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    before = model(input_ids=ids).logits, model(input_ids=ids, attention_mask=padding).logits
    denoiser = HFDenoiser(model, MASK).train()
    denoiser.tiled = True
    denoiser.hidden(rows_of("block own"))
    assert model.config._attn_implementation == TILED
    model.eval()
    after = model(input_ids=ids).logits, model(input_ids=ids, attention_mask=padding).logits
    torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after[1][:, :4], before[1][:, :4], rtol=1e-12, atol=1e-12)
    HFDenoiser(model, MASK).hidden(Full().training_rows(batch_of([[L]])))
    assert model.config._attn_implementation == "sdpa"


def test_a_class_with_attention_of_its_own_is_asked_once() -> None:
    denoiser = build("falcon").train()
    denoiser.tiled = True
    denoiser.hidden(rows_of("block own"))
    assert denoiser.tiled is False and denoiser.config._attn_implementation != TILED


def build(family: str) -> HFDenoiser:
    return HFDenoiser(random_model(family, vocab=V, dtype=torch.float64, is_causal=False), MASK)
