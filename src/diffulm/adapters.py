"""LoRA adapters in peft's format: trained, written, merged into the weights of their base. The only file that imports
peft.

A plain LoRA needs no peft: merging is one product per matrix, W + B A alpha / r, and what is left is to find the
matrix, since adapters of the released models name the modules of the authors' wrapper. Other kinds (DoRA, LoHa, ...)
are merged by peft itself.

A LoRA made here also has the mask token's embedding row, written as peft writes trained tokens.
"""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from . import runtime, weights

#: Settings of a LoRA that change its arithmetic: with any of them peft merges.
_NOT_PLAIN = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "megatron_config",
    "layer_replication",
)
_SAVED = re.compile(r"\.modules_to_save(\.default)?")
_ROWS = ".token_adapter.trainable_tokens_delta"
#: Names of modules that choose experts.
_ROUTERS = ("gate", "router")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a peft adapter."""
    return (folder / "adapter_config.json").is_file()


@torch.no_grad()
def merge(model: Any, folder: Path, *, name: str) -> None:
    """Merge the adapter in `folder` into a transformers model, in place.

    ValueError when the folder holds no adapter, names weights that the model lacks, or has other shapes: then it was
    trained on another base, and nothing has been changed.
    """
    if not is_adapter(folder):
        raise ValueError(f"{name} is no adapter: it has no adapter_config.json; give a folder in peft's format")
    config = runtime.read_json(folder / "adapter_config.json")
    known = weights.aliases(model.config.model_type, dict(model.named_parameters()))
    # peft puts `base_model.model.` before the names of the model that it wrapped.
    pieces = {
        key.removeprefix("base_model.model."): piece for key, piece in weights.stored(folder, "adapter_model").items()
    }
    plain = config.get("peft_type") == "LORA" and not any(config.get(key) for key in _NOT_PLAIN)
    plain = plain and isinstance(config.get("trainable_token_indices") or [], list)
    if plain and not any("lora_embedding" in key for key in pieces):
        _merge_plain(model, config, known, pieces, name=name)
    else:
        _merge_by_peft(model, folder, known, pieces, name=name)


def _merge_plain(
    model: Any, config: dict[str, Any], known: dict[str, str], pieces: dict[str, Any], *, name: str
) -> None:
    parameters = dict(model.named_parameters())
    updates: dict[str, dict[str, Any]] = {}
    for key, piece in pieces.items():
        lora = _LORA.fullmatch(key)
        whole = f"{key.removesuffix(_ROWS)}.weight" if key.endswith(_ROWS) else _SAVED.sub("", key)
        stock = known.get(f"{lora['module']}.weight" if lora else whole)
        if stock is None:
            raise ValueError(_unfit(name, key))
        kind = "rows" if key.endswith(_ROWS) else "whole"
        updates.setdefault(stock, {})[lora["side"] if lora else kind] = piece
    # All shapes first, then the arithmetic: an adapter of another base must not leave a half-changed model.
    for stock, parts in updates.items():
        rows = config.get("trainable_token_indices") or []
        _check(stock, parts, parameters[stock], transposed=_transposed(model, stock), rows=rows, name=name)
    if "whole" in updates.get(_embedding(model), {}) and model.config.tie_word_embeddings:
        raise ValueError(f"{name} has an embedding of its own, but its base ties embedding and head; merge it by hand")
    for stock, parts in updates.items():
        weight = parameters[stock]
        if "whole" in parts:
            weight.copy_(parts["whole"][...])
        elif "rows" in parts:
            weight[config["trainable_token_indices"]] = parts["rows"][...].to(weight)
        else:
            delta = _delta(parts, config).to(weight.device)
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            weight.copy_(wide + (delta.T if _transposed(model, stock) else delta))


def _unfit(name: str, key: str) -> str:
    return f"{name} does not fit its base: it changes {key}, which the base does not have; give the base it belongs to"


def _delta(parts: dict[str, Any], config: dict[str, Any]) -> Tensor:
    """B A alpha / r in float32, (out, in); with rank-stabilised LoRA alpha / sqrt(r)."""
    a, b = parts["A"][...].float(), parts["B"][...].float()
    return b @ a * (config.get("lora_alpha", 8) / (math.sqrt(len(a)) if config.get("use_rslora") else len(a)))


def _check(stock: str, parts: dict[str, Any], weight: Tensor, *, transposed: bool, rows: list[int], name: str) -> None:
    shapes = {side: tuple(piece.get_shape()) for side, piece in parts.items()}
    if "rows" in shapes:
        fits = set(shapes) == {"rows"} and shapes["rows"] == (len(rows), weight.shape[1])
        fits, found = fits and all(0 <= i < len(weight) for i in rows), shapes["rows"]
    elif "whole" in shapes:
        fits, found = set(shapes) == {"whole"} and shapes["whole"] == tuple(weight.shape), shapes["whole"]
    elif set(shapes) != {"A", "B"}:
        raise ValueError(f"{name}: {stock} has one half of a LoRA without the other; download the adapter again")
    else:
        found = shapes["B"][0], shapes["A"][1]
        fits = (found[::-1] if transposed else found) == tuple(weight.shape) and shapes["A"][0] == shapes["B"][1]
    if not fits:
        raise ValueError(
            f"{name} does not fit its base: {stock} is {tuple(weight.shape)} there and {found} in the adapter; give "
            "the base that it was trained on"
        )


def _transposed(model: Any, stock: str) -> bool:
    """GPT-2's projections hold their weight as (in, out)."""
    return type(model.get_submodule(stock.rpartition(".")[0])).__name__ == "Conv1D"


def _embedding(model: Any) -> str:
    table = model.get_input_embeddings().weight
    return next(key for key, parameter in model.named_parameters() if parameter is table)


def _merge_by_peft(model: Any, folder: Path, known: dict[str, str], pieces: dict[str, Any], *, name: str) -> None:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"{name} is no plain LoRA, which needs peft to merge; pip install 'diffulm[lora]'") from error
    modules = {alias.removesuffix(".weight"): stock.removesuffix(".weight") for alias, stock in known.items()}
    state = {}
    for key, piece in pieces.items():
        module = next((m for m in sorted(modules, key=len, reverse=True) if key.startswith(f"{m}.")), None)
        if module is None:
            raise ValueError(_unfit(name, key))
        state[f"base_model.model.{modules[module]}{key.removeprefix(module)}"] = piece[...]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's own use of older transformers
            wrapped = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(str(folder)))
            result: Any = peft.set_peft_model_state_dict(wrapped, state)
            wrapped.merge_and_unload()
    except Exception as error:  # peft raises whatever torch raises when shapes differ
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name} does not fit its base ({reason}); give the base that it was trained on") from error
    if left := result.unexpected_keys:
        raise ValueError(f"{name}: peft does not know {left[0]}; upgrade peft, or merge the adapter by hand")


# --------------------------------------------------------------------------------------------------------- training


class TrainedRow(nn.Module):
    """An embedding of which one row is trained and the rest is frozen.

    The row is kept as it stands in the table. What the table's class does to what it looks up (Gemma's scales it) is
    done to the row too.
    """

    def __init__(self, table: nn.Embedding, index: int) -> None:
        super().__init__()
        self.table, self.index = table, index
        table.padding_idx = None  # it denies a row its gradient, and frozen rows have none
        self.row = nn.Parameter(table.weight[index].detach().clone())

    @property
    def weight(self) -> Tensor:
        """The frozen table, which a tied head shares."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.table(ids)
        # The table's own forward, over a table of this one row.
        row: Tensor = functional_call(self.table, {"weight": self.row[None]}, (ids.new_zeros(1),))
        return torch.where((ids == self.index)[..., None], row, found)


def add_lora(
    model: Any, mask_token_id: int, *, rank: int, alpha: float, targets: tuple[str, ...] = (), seed: int = 0
) -> Any:
    """Freeze a transformers model and give it a trainable LoRA, in place; returns peft's config for `write_lora`.

    Every linear module gets one, or those whose names end like `targets`; but not the head, routers, and what peft
    cannot tell from a stack of experts (`_carried`). Such stacks stay frozen. The mask token's embedding row is trained
    too: a new row has seen nothing. The head needs none, since the mask token is never predicted.

    ValueError when peft is missing or one of `targets` names no such module; the model then has no LoRA.
    """
    config = _config(model, _chosen(model, targets), r=rank, lora_alpha=alpha)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _inject(config, model, seed=seed)
    model.set_input_embeddings(TrainedRow(model.get_input_embeddings(), mask_token_id))
    config.trainable_token_indices = [mask_token_id]
    config.inference_mode = True
    return config


def _config(model: Any, names: list[str], **sizes: Any) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("a LoRA is trained by peft; pip install 'diffulm[lora]', or set sft.lora_rank = 0") from error
    held_transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
    return peft.LoraConfig(target_modules=names, fan_in_fan_out=held_transposed, **sizes)


def _inject(config: Any, model: Any, *, seed: int = 0, **options: Any) -> None:
    import peft

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", FutureWarning)  # peft's own use of older transformers
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, **options)


def _chosen(model: Any, targets: tuple[str, ...]) -> list[str]:
    """Full names of the modules that get a LoRA."""
    known, kind = _carried(model), model.config.model_type
    if not targets:
        return known
    chosen = {target: [name for name in known if f".{name}".endswith(f".{target}")] for target in targets}
    if unfit := [target for target, names in chosen.items() if not names]:
        last = ", ".join(sorted({name.rpartition(".")[2] for name in known}))
        raise ValueError(
            f"sft.lora_targets = {unfit} fits no module of {kind} that can have a LoRA; choose among {last}, or leave "
            "it out for all of them"
        )
    return sorted({name for names in chosen.values() for name in names})


def _carried(model: Any) -> list[str]:
    """Full names of the linear modules that peft gives a LoRA when asked for all of them; ValueError when it cannot.

    Not the head, and no routers: some give more than a product. In mixtures of experts peft takes some names for those
    of an expert's matrices in older files, and wraps the stack of experts instead (in DeepSeek-V3 the dense and the
    shared MLPs are named so). So it is asked on a copy of the model's modules, which hold the same weights.
    """
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and module is not head
        and name.rpartition(".")[2] not in _ROUTERS
    ]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    try:
        with warnings.catch_warnings(action="ignore"):  # of what it does not find
            _inject(_config(model, linear), copied, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ValueError(
            f"peft can give no module of {model.config.model_type} a LoRA ({error}); set sft.lora_rank = 0"
        ) from error
    return [name for name in linear if hasattr(copied.get_submodule(name), "lora_A")]


def write_lora(
    folder: Path, config: Any, weights_of_model: dict[str, Tensor], diffusion: dict[str, Any], *, base: str
) -> None:
    """Write what `add_lora` trained as a peft folder, with the `diffusion` dict in diffusion.json beside its config.

    `weights_of_model`: the model's whole state dict. `base`: the checkpoint that it belongs to.
    """
    pieces = {}
    for key, value in weights_of_model.items():
        if _LORA.fullmatch(key):
            pieces[f"base_model.model.{key.replace('.default', '')}"] = value.contiguous()
        elif key.endswith(".row"):
            pieces[f"base_model.model.{key.removesuffix('.row')}{_ROWS}"] = value[None].contiguous()
    config.base_model_name_or_path = base
    with runtime.atomic_folder(folder) as aside:
        config.save_pretrained(str(aside))
        save_file(pieces, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        (aside / "diffusion.json").write_text(json.dumps(diffusion, indent=2) + "\n", encoding="utf-8")
