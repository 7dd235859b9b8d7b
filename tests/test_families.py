"""Every family of ecosystem.md 1.1: conversion makes it bidirectional and changes nothing else, or refuses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffulm import hub
from diffulm.convert import convert
from diffulm.denoiser import HFDenoiser
from diffulm.layout import Block, Causal, Full, visible
from diffulm.probe import dependency_matrix

from .families import FAMILIES, POSITIONS, WINDOW, random_model, save_parent

FAST = ("llama", "gpt2", "qwen2", "gemma2", "cohere", "granite", "gemma3_text", "gpt_neo", "stablelm")
REFUSED = [name for name, family in FAMILIES.items() if family.becomes == "refused"]
CONVERTED = [name for name in FAMILIES if name not in REFUSED]
#: Conversion for block rows: an explicit mask is all it needs, so stablelm passes and ALiBi does not.
NO_BLOCKS = ("gpt_neo", "lfm2", "qwen3_next", "bloom", "mpt")


def fast(names: Any) -> list[Any]:
    """A few names in the fast suite, all of them among the slow tests."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


def full_logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def text(length: int, *, batch: int = 2) -> Tensor:
    return torch.randint(2, 300, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", fast(CONVERTED))
def test_conversion_makes_it_full_and_changes_nothing_else(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    parent = save_parent(tmp_path / "parent", name)
    done = convert(str(tmp_path / "parent"), tmp_path / "child", trained_length=POSITIONS // 2)
    assert bool(done.attention) == (FAMILIES[name].becomes == "windowed")

    child = hub.load(tmp_path / "child", device="cpu", dtype="float32")
    # Longer than any window of these models, so that one left over would show.
    assert dependency_matrix(child.denoiser, length=4 * WINDOW).all()

    # Plain transformers opens the folder and gives the logits that diffulm gives.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "child").eval()
    ids, mask = text(4 * WINDOW), child.process.mask_token_id
    theirs = full_logits(plain, ids)[:, :-1].clone()
    ours = child.logits(ids)[:, 1:]
    assert ours[..., mask].isneginf().all()
    theirs[..., mask] = float("-inf")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    # No weight changed, and no rotary base: under a causal mask, within the window, it still is its parent.
    if not FAMILIES[name].alibi:
        short = text(WINDOW, batch=1)
        causal = Causal().decoding_rows(short, torch.ones_like(short).bool(), torch.tensor([[False, True, True]]))
        child.denoiser.mask_token_id = None
        with torch.no_grad():
            ours = child.denoiser(causal)[:, : parent.config.vocab_size]
        torch.testing.assert_close(ours, full_logits(parent, short)[0, :-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", fast(REFUSED))
def test_a_family_that_cannot_see_both_ways_is_refused(name: str, tmp_path: Path) -> None:
    parent = save_parent(tmp_path / "parent", name)
    with pytest.raises(ValueError, match=parent.config.model_type) as refusal:
        convert(str(tmp_path / "parent"), tmp_path / "child", trained_length=POSITIONS // 2)
    assert "choose another family" in str(refusal.value)
    assert [p.name for p in tmp_path.iterdir()] == ["parent"], "nothing may be half written"


@pytest.mark.parametrize("name", fast(FAMILIES))
def test_block_conversion_probes_the_block_relation(name: str, tmp_path: Path) -> None:
    save_parent(tmp_path / "parent", name)

    def run() -> None:
        convert(
            str(tmp_path / "parent"), tmp_path / "child", trained_length=32, layout="block", source="own", block_size=4
        )

    if name in NO_BLOCKS:
        with pytest.raises(ValueError, match="choose another family"):
            run()
        assert not (tmp_path / "child").exists()
        return
    run()
    child = hub.load(tmp_path / "child", device="cpu", dtype="float32")
    assert child.layout == Block(4, "own")
    with pytest.raises(ValueError, match="need the full layout"):
        child.logits(text(8))
    config = json.loads((tmp_path / "child" / "config.json").read_text())
    assert config["block_size"] == 4 and config["diffusion"]["block_size"] == 4
    assert config.get("is_causal", True), "the clean rows stay the parent's"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", [Full(), Block(3, "own"), Block(3, "launch")], ids=str)
def test_the_dependency_matrix_is_the_visibility_relation(name: str, layout: Full | Block) -> None:
    denoiser = HFDenoiser(random_model(name, is_causal=layout.name == "block"), 2)
    ids, yes = torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.bool)
    wanted = yes.clone()
    wanted[:, 0] = False
    expected = visible(layout.decoding_rows(ids, yes, wanted))[0]
    assert dependency_matrix(denoiser, length=9, layout=layout).equal(expected)
    assert bool(expected.all()) == (layout.name == "full")


def test_the_probe_sees_a_model_that_stays_causal() -> None:
    """stablelm and gpt_neo under sdpa: exactly the lower triangle, whatever the config says."""
    for name in ("stablelm", "gpt_neo"):
        denoiser = HFDenoiser(random_model(name, is_causal=False), 2)
        assert dependency_matrix(denoiser).equal(torch.ones(8, 8).tril().bool())


def test_a_window_longer_than_the_probe_is_found_in_the_config(tmp_path: Path) -> None:
    """A window that came back (an edited config) is refused at load although eight tokens cannot show it."""
    save_parent(tmp_path / "parent", "mistral")
    convert(str(tmp_path / "parent"), tmp_path / "child", trained_length=32)
    path = tmp_path / "child" / "config.json"
    config = json.loads(path.read_text())
    assert config["sliding_window"] is None and config["is_causal"] is False
    path.write_text(json.dumps({**config, "sliding_window": 40}))
    with pytest.raises(ValueError, match=r"mistral has layers .*sliding_window = 40.*diffulm convert"):
        hub.load(tmp_path / "child", device="cpu", dtype="float32")
