"""Weights between a sharded module and the safetensors files of a Hugging Face folder: no process holds all of them.

Reading goes through DCP's reader, which takes slices of the files. Writing does not go through its writer: torch 2.13's
HuggingFaceStorageWriter first writes every shard to disk and then lets the first process put all tensors together in a
second copy, without the `format` entry that other readers ask for (docs/guides/scale.md has what was tried). Here the
tensors are gathered one at a time and every process writes whole files.
"""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader

from .. import hub, weights
from ..denoiser import HFDenoiser
from ..runtime import log, write_atomic
from . import shards
from .checkpoint import full_model_state
from .group import on_first_rank, rank_and_world

#: Size of a weight file among several: what a process holds of the model while it writes.
FILE_SIZE = "5GB"


def open_for_training(folder: Path, *, dtype: torch.dtype) -> Any:
    """The stock transformers model of a folder, for `parallelize`: with its weights in a process of its own; without
    any, on the meta device, among several, each of which will read its part of every weight.

    ValueError as from `hub.open_model`. Families whose files hold their weights in other pieces than the module
    (mixtures of experts) are opened whole in each process, aloud.
    """
    if rank_and_world()[1] > 1:
        gc.collect()  # a sharded model that nobody uses any more is freed then, and not before
        model = hub.open_empty(folder, dtype=dtype)
        if keys_in(folder, model) is not None:
            return model
        log.warning("the files of %s hold other pieces than the model: every process opens all of it", folder)
    return hub.open_model(folder, dtype=dtype)[0]


def keys_in(folder: Path, model: nn.Module) -> dict[str, str] | None:
    """Name in the model's state -> key in the files, tied weights once; None unless they are the same weights, one
    for one and shape for shape."""
    found = weights.stored(folder)
    names: dict[str, str] = {}
    for known_as, tensor in _state(model):
        there = [name for name in known_as if name in found]
        if len(there) != 1 or tuple(found[there[0]].get_shape()) != tuple(tensor.shape):
            return None
        names[known_as[0]] = there[0]
    return names if set(names.values()) == found.keys() else None


def _state(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """(names, tensor) of everything that a checkpoint of the model holds; a tied weight has several names."""
    named: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(named.values())


@torch.no_grad()
def read_weights(denoiser: HFDenoiser, folder: Path, device: torch.device) -> None:
    """Give a sharded denoiser that lies on the meta device memory on `device`, and its part of the weights of `folder`.

    Bit for bit what opening the folder whole and sharding it gives. Called by every process.
    """
    model: Any = denoiser.model
    denoiser.to_empty(device=device)
    model.tie_weights()  # to_empty made two tensors of a tied one
    # What no file holds (rotary frequencies, causal triangles) is computed as `from_pretrained` does: by initialising
    # the model with the weights marked as done.
    for _, tensor in _state(model):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()
    keys = keys_in(folder, model)
    assert keys is not None, "opened by open_for_training"
    state = {keys[names[0]]: tensor for names, tensor in _state(model)}
    shards.fill(state, HuggingFaceStorageReader(str(folder)))


def finished_weights(denoiser: HFDenoiser, folder: Path, *, like: Path) -> dict[str, Tensor] | Path:
    """The trained weights for `hub.save` on the first process: tensors, or among several processes a folder of files
    beside `folder` (the arm's own), of which each process wrote some. Called by every process.

    like: the folder that the model was opened from. Where its files hold other pieces than the model, the first process
    gathers everything: transformers alone can cut the weights into those pieces.
    """
    if rank_and_world()[1] == 1 or keys_in(like, denoiser.model) is None:
        return {name.removeprefix("model."): value for name, value in full_model_state(denoiser).items()}
    aside = folder.with_name(f".{folder.name}.weights.tmp")

    def prepare() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    on_first_rank(prepare)
    denoiser.reshard()  # type: ignore[operator] # a forward without backward leaves the root gathered
    write_weights(denoiser.model, aside)
    return aside


@torch.no_grad()
def write_weights(model: nn.Module, folder: Path, *, file_size: str = FILE_SIZE) -> None:
    """A sharded model's weights as the files that transformers reads: one, or several and their index.

    Tensors are gathered one at a time, and the processes take turns in keeping and writing a file of them. So each
    holds one file, and one tensor beside it. Called by every process; returns when all files are on disk.
    """
    rank, world = rank_and_world()
    state = {names[0]: tensor for names, tensor in _state(model)}
    shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=file_size
    )
    writer = shards.Background()
    for turn, (file, names) in enumerate(split.filename_to_tensors.items()):
        mine = turn % world == rank
        if mine:
            writer.wait()
        held = {}
        for name in names:
            whole = _whole(state[name])  # by all processes, whoever keeps it
            if mine:
                held[name] = whole.cpu().contiguous()
            del whole
        if mine:
            writer.start(lambda held=held, file=file: save_file(held, folder / file, {"format": "pt"}))  # type: ignore[misc]
    writer.wait()
    if rank == 0 and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    on_first_rank(lambda: None)  # nobody goes on before the last file is there


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()
