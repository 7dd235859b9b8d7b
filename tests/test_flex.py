"""FlexAttention's BlockMask against the dense mask: the same relation, the same logits, the same gradients.

Uncompiled and on the CPU, where flex_attention is plain tensor operations (torch refuses its backward there, though it
works); the compiled kernels need a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import diffulm.denoiser
from diffulm.denoiser import HFDenoiser
from diffulm.layout import Block, Causal, Full, Held, NoisedBatch, Rows, visible
from diffulm.rows import flex_mask

from .families import random_model
from .test_denoiser import MASK, L, V, batch_of, gradients

#: torch's own, when something first asks for its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

LATER = torch.rand(L, L, generator=torch.Generator().manual_seed(0)) < 0.4
CASES = {
    "block own": (Block(4, "own", 0.5), None),
    "block launch": (Block(3, "launch", 0.5), None),
    "packed full": (Full(), None),
    "packed causal": (Causal(), None),
    "annealed": (Full("own"), LATER),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """flex_attention runs as it is written; every call is noted."""
    from transformers.integrations import flex_attention as theirs

    found: list[Any] = []

    def plain(*arguments: Any, **more: Any) -> Any:
        found.append(more["block_mask"])
        return flex.flex_attention(*arguments, **more)

    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(theirs.WrappedFlexAttention, "__call__", lambda self: plain)
    return found


def rows_of(name: str) -> Rows:
    """Packed documents and padding, half of the tokens noised."""
    layout, later = CASES[name]
    batch: NoisedBatch = batch_of([[7, 5], [9], [4, 3, 2]], annealed=later)
    return layout.training_rows(batch)


def build(dtype: torch.dtype = torch.float64) -> HFDenoiser:
    return HFDenoiser(random_model("llama", vocab=V, dtype=dtype, is_causal=False), MASK)


@pytest.mark.parametrize("name", CASES)
def test_the_block_mask_is_the_relation(name: str) -> None:
    rows = rows_of(name)
    B, R = rows.ids.shape
    mask = flex_mask(rows)
    found = torch.stack([
        torch.stack([
            torch.stack([mask.mask_mod(*map(torch.tensor, (b, 0, q, k))) for k in range(R)]) for q in range(R)
        ]) for b in range(B)
    ])  # fmt: skip
    assert found.equal(visible(rows)) and mask.shape == (B, 1, R, R)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_logits_are_those_of_the_dense_mask(name: str, dtype: Any, tolerance: float, calls: list[Any]) -> None:
    denoiser, rows = build(dtype), rows_of(name)
    dense = denoiser.hidden(rows).detach()
    assert not calls
    denoiser.flex = True
    assert (denoiser.hidden(rows) - dense).abs().max() < tolerance
    assert len(calls) == len(denoiser.backbone.layers)  # type: ignore[arg-type]
    assert all(isinstance(mask, flex.BlockMask) for mask in calls)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_dense_mask(name: str, calls: list[Any]) -> None:
    denoiser, rows = build(), rows_of(name)
    found: list[dict[str, Tensor]] = []
    for how in (False, True):
        denoiser.flex = how
        found.append(gradients(denoiser.model, (denoiser.nll(rows) * rows.weight).sum()))
    assert calls
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-9, atol=1e-9)


def test_unmasked_rows_keep_the_models_own_kernels(calls: list[Any]) -> None:
    """The implementation goes back and forth with the mask, and no checkpoint remembers it."""
    denoiser = build()
    denoiser.flex = True
    plain, packed = Full().training_rows(batch_of([[L], [L]])), rows_of("packed full")
    before = denoiser.hidden(plain)
    denoiser.hidden(packed)
    assert calls and denoiser.config._attn_implementation == "flex_attention"
    seen = len(calls)
    assert denoiser.hidden(plain).equal(before) and len(calls) == seen
    assert "flex" not in str(denoiser.config.to_dict())


def test_chosen_in_training_on_cuda_where_the_class_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffulm.denoiser, "flex_mask", lambda rows: "flex")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    llama, gpt2 = build().train(), HFDenoiser(random_model("gpt2", vocab=V, is_causal=False), MASK).train()
    assert llama._flexes(cuda) and not llama._flexes(cpu) and not gpt2._flexes(cpu)
    assert not gpt2._flexes(cuda), "GPT-2's class has no flex path"
    assert not llama.eval()._flexes(cuda), "scoring and sampling have many shapes"
    llama.train().config.attention_dropout = 0.1
    assert not llama._flexes(cuda)
    rows = rows_of("block own")
    assert isinstance(llama.attention_mask(rows), Tensor)
    llama.flex = True
    assert llama.attention_mask(rows) == "flex"
    assert isinstance(llama.attention_mask(rows, Held.of(rows, 2)), Tensor), "a cache's rows are few"
