"""Models opened and written in parts: the same bits as whole, and no process that holds the whole.

This file is also the program that torchrun starts.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffulm import hub
from diffulm.denoiser import HFDenoiser
from diffulm.runtime import parse_precision
from diffulm.tokenizer import load_tokenizer
from diffulm.train.checkpoint import full_model_state
from diffulm.train.folder import finished_weights, keys_in, open_for_training, read_weights, write_weights
from diffulm.train.group import on_first_rank, process_group, rank_and_world
from diffulm.train.parallel import parallelize

from ..conftest import build_parent, build_tokenizer
from ..families import FAMILIES, random_model
from .test_parallel import torchrun
from .tiny import make_loader

CPU = torch.device("cpu")
#: An odd number of rows, so that two processes get shards of different sizes.
ROWS = 401


def odd_tokenizer() -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<{n}>" for n in range(ROWS - len(tokenizer))])
    return tokenizer


def everything(model: Any) -> dict[str, torch.Tensor]:
    """Parameters, under all their names, and buffers, saved ones and others."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


# ------------------------------------------------------------------------------------------------- in one process


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_opened_in_parts_as_whole(name: str, tmp_path: Path) -> None:
    """Also what no file holds: rotary frequencies, causal triangles. Mixtures of experts say that they cannot."""
    random_model(name).save_pretrained(tmp_path)
    whole = hub.open_model(tmp_path, dtype=torch.float32)[0]
    empty = hub.open_empty(tmp_path, dtype=torch.float32)
    assert all(p.is_meta for p in empty.parameters()) and not empty.training
    assert empty.config.to_dict() == whole.config.to_dict()
    assert empty.generation_config.to_dict() == whole.generation_config.to_dict()
    if keys_in(tmp_path, empty) is None:
        assert name in IN_OTHER_PIECES
        return
    assert name not in IN_OTHER_PIECES
    read_weights(HFDenoiser(empty, None), tmp_path, CPU)
    mine, theirs = everything(empty), everything(whole)
    assert mine.keys() == theirs.keys()
    for key in theirs:
        assert mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]), key
    assert [n for n, _ in empty.named_parameters()] == [n for n, _ in whole.named_parameters()], "ties"


#: transformers renames (gpt_neox) or stacks (experts) what the files hold.
IN_OTHER_PIECES = {"gpt_neox", "qwen3_moe", "qwen3_next", "deepseek_v3"}


def test_a_folder_of_other_weights_is_not_opened_in_parts(tmp_path: Path, parent: Path) -> None:
    model = hub.open_empty(parent, dtype=torch.float32)
    names = keys_in(parent, model)
    assert names is not None and "lm_head.weight" not in names and names.keys() == set(names.values())
    stored = load_file(parent / "model.safetensors")
    for change in (
        {"strange.weight": torch.zeros(1)},
        {"model.norm.weight": torch.zeros(3)},
        {"lm_head.weight": stored["model.embed_tokens.weight"].clone()},
    ):
        save_file({**stored, **change}, tmp_path / "model.safetensors")
        assert keys_in(tmp_path, model) is None, change.keys()
    # A tied table may be stored under either of its names.
    table = stored.pop("model.embed_tokens.weight")
    save_file({**stored, "lm_head.weight": table}, tmp_path / "model.safetensors")
    names = keys_in(tmp_path, model)
    assert names is not None and names["model.embed_tokens.weight"] == "lm_head.weight"
    save_file(stored, tmp_path / "model.safetensors")
    assert keys_in(tmp_path, model) is None, "a weight is missing"


def test_one_process_opens_the_weights_and_hands_over_tensors(tmp_path: Path, parent: Path) -> None:
    model = open_for_training(parent, dtype=torch.float64)
    denoiser = HFDenoiser(model, None)
    weights = finished_weights(denoiser, tmp_path / "model", like=parent)
    assert isinstance(weights, dict) and weights.keys() == load_file(parent / "model.safetensors").keys()
    assert not list(tmp_path.iterdir())


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ValueError, match=r"is no causal language model .* restore its config"):
        hub.open_empty(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("size", ["5GB", "30KB"])
def test_weights_written_as_files(tmp_path: Path, parent: Path, size: str) -> None:
    """One file, or several with an index: transformers opens either, tied weights are stored once."""
    from transformers import AutoModelForCausalLM

    model = hub.open_model(parent, dtype=torch.float32)[0]
    aside = tmp_path / "aside"
    aside.mkdir()
    write_weights(model, aside, file_size=size)
    hub.save_plain(tmp_path / "model", model, load_tokenizer(parent), state_dict=aside)
    files = sorted(p.name for p in (tmp_path / "model").glob("*.safetensors*"))
    assert (files == ["model.safetensors"]) == (size == "5GB") and (len(files) > 3) == (size != "5GB")
    assert not aside.exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    stored = [key for p in (tmp_path / "model").glob("*.safetensors") for key in load_file(p)]
    assert len(stored) == len(set(stored)) == len(list(model.parameters()))


# -------------------------------------------------------------------------------------------------- in two processes


def ordinary(folder: Path, dtype: str, replicas: int) -> HFDenoiser:
    """Opened whole, then sharded."""
    precision = parse_precision(dtype)
    model = hub.open_model(folder, dtype=precision.weights)[0]
    return parallelize(
        HFDenoiser(model, None, precision=precision).eval(), precision, compile=False, replicas=replicas
    )  # fmt: skip


def in_parts(folder: Path, dtype: str, replicas: int) -> HFDenoiser:
    """Sharded empty, then filled."""
    precision = parse_precision(dtype)
    denoiser = HFDenoiser(open_for_training(folder, dtype=precision.weights), None, precision=precision).eval()
    assert next(denoiser.parameters()).is_meta
    return parallelize(denoiser, precision, compile=False, replicas=replicas, folder=folder, device=CPU)


def compare(out: Path, folder: Path, dtype: str, replicas: int) -> None:
    """Each process: the same shards, buffers, names and outputs; then the same folder."""
    a, b = ordinary(folder, dtype, replicas), in_parts(folder, dtype, replicas)
    assert [n for n, _ in a.named_parameters()] == [n for n, _ in b.named_parameters()]
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        mine, theirs = y.to_local(), x.to_local()  # type: ignore[attr-defined]
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
        assert x.placements == y.placements and len(mine) <= -(-x.shape[0] * replicas // 2)  # type: ignore[attr-defined]
    buffers = dict(b.named_buffers())
    assert buffers.keys() == dict(a.named_buffers()).keys()
    assert all(torch.equal(value, buffers[name]) for name, value in a.named_buffers())
    rows = make_loader().rows(0)[0]
    for _ in range(2):
        losses = [denoiser.nll(rows) for denoiser in (a, b)]
        assert torch.equal(*losses) and float(losses[0].detach().std()) > 0
        for denoiser, loss in zip((a, b), losses, strict=True):
            loss.sum().backward()
            torch.optim.SGD(denoiser.parameters(), lr=1e-3).step()  # the trained weights are written, not the read ones
    weights = finished_weights(b, out / "parts", like=folder)
    assert isinstance(weights, Path)
    gathered = {name.removeprefix("model."): value for name, value in full_model_state(a).items()}

    def write() -> None:
        tokenizer = load_tokenizer(folder)
        hub.save_plain(out / "parts", b.model, tokenizer, state_dict=weights)
        hub.save_plain(out / "gathered", a.model, tokenizer, state_dict=gathered)

    on_first_rank(write)
    several = out / "several"
    on_first_rank(lambda: several.mkdir())
    write_weights(b.model, several, file_size="30KB")


def fall_back(out: Path, folder: Path) -> None:
    """Experts are stored in other pieces: opened whole and gathered whole."""
    denoiser = HFDenoiser(open_for_training(folder, dtype=torch.float32), None)
    assert not next(denoiser.parameters()).is_meta
    parallelize(denoiser, denoiser.precision, compile=False, folder=folder, device=CPU)
    weights = finished_weights(denoiser, out / "model", like=folder)
    if rank_and_world()[0] == 0:
        hub.save_plain(out / "model", denoiser.model, build_tokenizer(), state_dict=weights)


#: How the model is made, and how it is opened.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tied": ({}, {}),
    "untied": ({"tie_word_embeddings": False, "family": "qwen2"}, {}),
    "gpt2": ({"family": "gpt2"}, {}),
    "float64": ({}, {"dtype": "float64"}),
    "replicated": ({}, {"replicas": 2}),
}


@pytest.mark.slow
def test_two_processes_open_and_write_in_parts_as_whole(tmp_path: Path) -> None:
    jobs = {}
    for name, (model, options) in CASES.items():
        build_parent(tmp_path / name / "init", tokenizer=odd_tokenizer(), **model)
        jobs[str(tmp_path / name)] = {"dtype": "float32", "replicas": 1, **options}
    (tmp_path / "experts").mkdir()
    random_model("qwen3_moe").save_pretrained(tmp_path / "experts" / "init")
    torchrun(2, "tests.train.test_folder", json.dumps(jobs), str(tmp_path / "experts"))
    for name in jobs:
        same_folders(Path(name) / "parts", Path(name) / "gathered")
        assert len(list((Path(name) / "several").glob("model-0*.safetensors"))) > 3
        shutil.copy(Path(name) / "parts" / "config.json", Path(name) / "several")
        mine = hub.open_model(Path(name) / "several", dtype=torch.float64)[0].state_dict()
        theirs = hub.open_model(Path(name) / "parts", dtype=torch.float64)[0].state_dict()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
        assert not list(Path(name).glob(".*"))
    mine = hub.open_model(tmp_path / "experts" / "model", dtype=torch.float32)[0].state_dict()
    theirs = hub.open_model(tmp_path / "experts" / "init", dtype=torch.float32)[0].state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def same_folders(one: Path, other: Path) -> None:
    """The same files, byte for byte."""
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in other.iterdir()) and "model.safetensors" in names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def main(jobs: str, experts: str) -> None:
    with process_group():
        for out, options in json.loads(jobs).items():
            compare(Path(out), Path(out) / "init", **options)
        fall_back(Path(experts), Path(experts) / "init")


if __name__ == "__main__":
    main(*sys.argv[1:])
