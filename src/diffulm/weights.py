"""Weights in safetensors files: which files, which key is which weight, and what is wrong with them.

Three ways of naming are known beside the stock ones of transformers: the wrapper of DiffuGPT and DiffuLLaMA
(`embed_tokens`, `denoise_model.*`), a bare DiffuLLaMA (stock), and LLaDA's (`model.transformer.blocks.*`).
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import runtime
from .runtime import log

#: Stock names of the token table.
EMBEDDING = {
    "gpt2": "transformer.wte.weight",
    "llama": "model.embed_tokens.weight",
    "qwen2": "model.embed_tokens.weight",
    "qwen3": "model.embed_tokens.weight",
}

#: LLaDA's blocks: our name of a module, theirs.
_LLADA = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}

#: Buffers that older transformers wrote beside the weights.
_BUFFER = re.compile(r"\.(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


def file_names(kind: str, stock: str, *, tied: bool = False, wrapped: bool = True) -> tuple[str, ...]:
    """The names under which a file of this kind may hold a weight of the stock model, the preferred one first.

    tied: the head is the embedding, so either name will do. wrapped: the authors' wrapper around a backbone
    (`embed_tokens`, `denoise_model.*`); DiffuLLaMA comes without.
    """
    embedding = stock in EMBEDDING.values()
    if stock == "lm_head.weight":
        names: tuple[str, ...] = ("model.transformer.ff_out.weight" if kind == "llada" else stock,)
    elif kind in ("diffugpt", "diffullama") and wrapped:
        rest = stock.removeprefix("transformer.").removeprefix("model.")
        names = ("embed_tokens.weight",) if embedding else (f"denoise_model.{rest}",)
    elif kind == "llada":
        names = (_llada_name(stock),)
    else:
        names = (stock,)
    return names + file_names(kind, "lm_head.weight") if embedding and tied else names


def _llada_name(stock: str) -> str:
    whole = {"model.embed_tokens.weight": "wte.weight", "model.norm.weight": "ln_f.weight"}
    if stock in whole:
        return f"model.transformer.{whole[stock]}"
    _, _, layer, rest = stock.split(".", 3)
    module, _, parameter = rest.rpartition(".")
    return f"model.transformer.blocks.{layer}.{_LLADA[module]}.{parameter}"


def aliases(model_type: str, stock_names: Iterable[str]) -> dict[str, str]:
    """Every known name of a weight of a gpt2 or llama model -> its stock name: adapters were trained under any."""
    kinds = {"gpt2": ("diffugpt",), "llama": ("diffullama", "llada")}.get(model_type, ())
    found = {}
    for stock in stock_names:
        found[stock] = stock
        for kind in kinds:
            found |= dict.fromkeys(file_names(kind, stock), stock)
    return found


# ------------------------------------------------------------------------------------------------------------- files


#: Turns pickles into safetensors without running what is in them. Takes files; writes beside them.
_CONVERT = (
    "import pathlib, sys, torch; from safetensors.torch import save_file; "
    "[save_file({k: v.clone().contiguous() for k, v in torch.load(p, 'cpu', weights_only=True).items()}, "
    "p.with_name(p.name.replace('pytorch_', '')).with_suffix('.safetensors'), {'format': 'pt'}) "
    "for p in map(pathlib.Path, sys.argv[1:])]"
)
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt")


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a folder: those of the index, else the one named `stem`, else all there are.

    ValueError when there are none; where there are pickles instead, with the command that converts them.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(runtime.read_json(index).get("weight_map", {}).values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{folder}: {', '.join(missing)} is in the index but not there; download the model again")
        return files
    one = folder / f"{stem}.safetensors"
    if files := [one] if one.is_file() else sorted(folder.glob("*.safetensors")):
        return files
    pickles = sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth") and p.name not in _NO_WEIGHTS)
    if not pickles:
        raise ValueError(f"{folder} has no .safetensors weights; download the model again with them")
    raise ValueError(
        f"{folder} holds {pickles[0].name}, a pickle, and only safetensors are read; convert it with: "
        f'python -c "{_CONVERT}" {shlex.join(map(str, pickles))}'
    )


def stored(folder: Path, stem: str = "model") -> dict[str, Any]:
    """Name -> safetensors slice (`get_shape()`, `get_dtype()`, `[:]`) of all weights; no number is read yet."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for file in weight_files(folder, stem):
        try:
            handle = safe_open(str(file), framework="pt")
            found |= {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - no mapping
        except Exception as error:  # safetensors' own class, or the operating system's
            raise ValueError(f"{file} cannot be read ({error}); it is damaged: download or save it again") from error
    return found


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that holds every weight of a folder exactly; ValueError for integers and other quantised weights."""
    known = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    names = {piece.get_dtype() for key, piece in stored(folder).items() if not _BUFFER.search(key)}
    if strange := names - set(known):
        raise ValueError(f"{folder} holds weights of type {sorted(strange)[0]}; only floating-point weights are read")
    return functools.reduce(torch.promote_types, sorted((known[n] for n in names), key=str))


def match(
    kind: str, found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], *, tied: bool, name: str, label: str
) -> dict[str, Tensor]:
    """Stock name -> tensor, mapped from the file and not read. `expected`: stock names and shapes; label: the kind
    of checkpoint, in words.

    ValueError that names, as the file would, every key that is missing, unknown or of another shape.
    """
    wrapped = any(key.startswith("denoise_model.") for key in found)
    weights, used, missing, misshapen = {}, set(), [], []
    for stock, shape in expected.items():
        if tied and stock == "lm_head.weight":
            continue
        names = file_names(kind, stock, tied=tied, wrapped=wrapped)
        used |= set(names)
        here = next((n for n in names if n in found), None)
        if here is None:
            missing.append(" or ".join(names))
        elif tuple(found[here].get_shape()) != shape:
            misshapen.append(f"{here} is {tuple(found[here].get_shape())}, not {shape}")
        else:
            weights[stock] = found[here]
            for other in (n for n in names if n != here and n in found):
                if not torch.equal(found[other][...], found[here][...]):
                    log.warning("%s: %s and %s differ though they are tied; %s counts", name, here, other, here)
    unknown = [key for key in found if key not in used and not _BUFFER.search(key)]
    problems = [("missing", missing), ("unknown", unknown), ("of another shape", misshapen)]
    if any(keys for _, keys in problems):
        told = "; ".join(f"{what}: {_some(keys)}" for what, keys in problems if keys)
        raise ValueError(
            f"{name} is not the {label} checkpoint that its config.json describes ({told}); "
            "download it again, or see docs/guides/released-checkpoints.md for the keys that are read"
        )
    return {stock: piece[...] for stock, piece in weights.items()}


def _some(keys: list[str], limit: int = 5) -> str:
    rest = len(keys) - limit
    return ", ".join(sorted(keys)[:limit]) + (f" and {rest} more" if rest > 0 else "")


def write(folder: Path, model_type: str, state: Mapping[str, Tensor], *, tied: bool, shard: str = "5GB") -> None:
    """A gpt2 or llama model's weights under the released names: one file, or shards with an index."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    kind, wrapped = ("diffugpt", True) if model_type == "gpt2" else ("diffullama", False)
    named = {
        file_names(kind, stock, wrapped=wrapped)[0]: tensor.contiguous()
        for stock, tensor in state.items()
        if not (tied and stock == "lm_head.weight")
    }
    split = split_torch_state_dict_into_shards(
        named, filename_pattern="model{suffix}.safetensors", max_shard_size=shard
    )
    for file, keys in split.filename_to_tensors.items():
        save_file({key: named[key] for key in keys}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        runtime.write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
