"""Checkpoints that others released, read as stock transformers models: DiffuGPT, DiffuLLaMA, LLaDA, Dream, A2D.

Here is what their files do not say: the mask token, the row that predicts, the stock class that computes the same
numbers. `weights` knows their keys, `hub` builds the model and probes its attention as it does with our own. Keys and
conventions come from the released source code; docs/guides/released-checkpoints.md lists them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import runtime, weights
from .runtime import log


@dataclass(frozen=True)
class Convention:
    """What a family of released checkpoints takes for granted.

    masks: mask token strings, of which the first that the tokenizer knows counts; reused: those that are ordinary
    text too; source: which row predicts a token; length: trained length in tokens where no file says it.
    """

    name: str
    masks: tuple[str, ...]
    source: Literal["previous", "own"]
    length: int | None = None
    reused: tuple[str, ...] = ()


#: The one table of token strings of published models; ids come from the tokenizer.
CONVENTIONS = {
    "diffugpt": Convention("DiffuGPT", ("[¨M¨]", "-" * 12), "previous", None, ("-" * 12,)),
    "diffullama": Convention("DiffuLLaMA", ("ти",), "previous", 2048, ("ти",)),
    "llada": Convention("LLaDA", ("<|mdm_mask|>",), "own", 4096),
    "dream": Convention("Dream", ("<|mask|>",), "previous", 2048),
    "a2d": Convention("A2D", ("<|mask|>",), "own", 1024),
}

#: The families that the authors released, and their conventions.
FAMILIES = {"gpt2": "diffugpt", "llama": "diffullama"}

_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

#: A LLaDA config must say all of this for a Llama to compute the same numbers. (Its class has other defaults.)
_LLADA_IS_LLAMA = {
    "block_type": "llama",
    "rope": True,
    "alibi": False,
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "attention_layer_norm": False,
    "include_bias": False,
    "scale_logits": False,
    "block_group_size": 1,
}

# -------------------------------------------------------------------------------------------------------- recognised


def recognise(folder: Path, config: dict[str, Any]) -> str | None:
    """Which convention a folder follows, by its config.json and the names of its weights; None: none of them."""
    kind = str(config.get("model_type", ""))
    if isinstance(config.get("diffusion"), dict):
        return None
    if kind in ("llada", "Dream"):
        return kind.lower()
    if kind.startswith("a2d-"):
        return "a2d"
    family = FAMILIES.get(kind)
    if family is None:
        return None
    if any(name.startswith("denoise_model.") for name in weights.stored(folder)):
        return family
    # DiffuLLaMA's keys are a plain Llama's. What tells it from its parent is that its tokenizer has a mask token.
    return family if kind == "llama" and declared_mask(folder) in CONVENTIONS[family].masks else None


def nearest(folder: Path, config: dict[str, Any]) -> str:
    """For a folder that follows no convention, in words: which known one is closest and what differs."""
    kind = str(config.get("model_type", ""))
    if kind == "gpt2":
        first = min(weights.stored(folder), default="none")
        return f"closest is DiffuGPT, whose weights begin with denoise_model., and this folder has {first}"
    if kind == "llama":
        has, mask = declared_mask(folder), CONVENTIONS["diffullama"].masks[0]
        own = f"has {has!r}" if has else "has none"
        return f"closest is DiffuLLaMA, whose tokenizer has the mask token {mask!r}, and this one {own}"
    known = {"gpt2": "DiffuGPT", "llama": "DiffuLLaMA", "llada": "LLaDA", "Dream": "Dream", "a2d-qwen3": "dllm's A2D"}
    near = max(known, key=lambda one: difflib.SequenceMatcher(None, kind.lower(), one.lower()).ratio())
    return f"closest is {known[near]} with model_type {near!r}, and this config.json says {kind or 'nothing'!r}"


def declared_mask(folder: Path) -> str | None:
    """The mask token that a tokenizer's files name."""
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            token = runtime.read_json(folder / file).get("mask_token")
            if token:
                return str(token["content"] if isinstance(token, dict) else token)
    return None


def stock_config(config: dict[str, Any], kind: str, *, name: str) -> dict[str, Any]:
    """The config of the stock class that computes the same numbers.

    ValueError when a LLaDA has parts that Llama lacks, or dllm converted a family it is not known to convert.
    """
    if kind == "llada":
        return _llama_of_llada(config, name=name)
    family = {"dream": "qwen2", "a2d": str(config["model_type"]).removeprefix("a2d-")}.get(kind, config["model_type"])
    if family not in _ARCHITECTURES:
        raise ValueError(f"{name}: A2D models of {family} are not known; known are {', '.join(_ARCHITECTURES)}")
    theirs = {"auto_map", "model_type", "architectures", "transformers_version", "_name_or_path", "torch_dtype"}
    kept = {key: value for key, value in config.items() if key not in theirs}
    if kind == "diffugpt":
        kept["tie_word_embeddings"] = True
    return {**kept, "model_type": family, "architectures": [_ARCHITECTURES[family]]}


def _llama_of_llada(config: dict[str, Any], *, name: str) -> dict[str, Any]:
    other = {k: config.get(k) for k, v in _LLADA_IS_LLAMA.items() if config.get(k) != v}
    other |= {k: config[k] for k in ("include_qkv_bias", "input_emb_norm", "bias_for_layer_norm") if config.get(k)}
    if other:
        said = ", ".join(f"{k} = {v!r}" for k, v in other.items())
        raise ValueError(f"{name}: this LLaDA is no Llama ({said}); only the published 8B kind is read")
    heads = config["n_heads"]
    return {
        "model_type": "llama",
        "architectures": [_ARCHITECTURES["llama"]],
        "vocab_size": config.get("embedding_size") or config["vocab_size"],
        "hidden_size": config["d_model"],
        "intermediate_size": config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads),
        "max_position_embeddings": config["max_sequence_length"],
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "tie_word_embeddings": config["weight_tying"],
        "bos_token_id": None,
        "eos_token_id": config.get("eos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
    }


def diffusion_dict(
    config: dict[str, Any], stock: dict[str, Any], kind: str, mask: str, *, parent: str
) -> dict[str, Any]:
    """The `diffusion` dict that a diffulm checkpoint of this kind would carry."""
    convention = CONVENTIONS[kind]
    length = trained_length(config, stock, convention)
    diffusion = {
        "format": 1,
        "process": "absorbing",
        "schedule": "linear",
        "t_min": 1e-3,
        "source": convention.source,
        "layout": "full",
        "trained_length": length,
        "parent": parent,
        "tokens_seen": 0,
        "mask_row_added": mask not in convention.reused,
    }
    if kind == "a2d":
        if isinstance(size := config.get("block_size"), int):
            diffusion |= {"layout": "block", "block_size": size}
        else:
            log.info(
                "%s: an A2D config does not say how the model was trained; read as full attention (mdlm). For a bd3lm "
                'checkpoint put its "block_size" into config.json',
                parent,
            )
    return diffusion


def trained_length(config: dict[str, Any], stock: dict[str, Any], convention: Convention) -> int:
    """Tokens of the windows it was trained on: the file's own `max_length`, else what is known of the family."""
    positions = int(stock.get("max_position_embeddings") or stock.get("n_positions") or 1 << 20)
    task = (config.get("task_specific_params") or {}).get("text-generation") or {}
    said = task.get("max_length") or config.get("max_length") or convention.length
    return min(int(said or positions), positions)


def resolve_mask(tokenizer: Any, config: dict[str, Any], kind: str, *, rows: int, name: str) -> str:
    """The mask token as a string, made the tokenizer's own: what it declares, else the first that its family uses.

    ValueError when it has none of them, when the model has no row for it, or when the config says another id.
    """
    masks = (tokenizer.mask_token,) if tokenizer.mask_token else CONVENTIONS[kind].masks
    vocabulary = tokenizer.get_vocab()
    mask = next((m for m in masks if m in vocabulary), None)
    if mask is None:
        raise ValueError(
            f"{name}: its tokenizer has none of the mask tokens of {CONVENTIONS[kind].name} "
            f"({', '.join(map(repr, masks))}); take the tokenizer released with it"
        )
    if vocabulary[mask] >= rows:
        raise ValueError(
            f"{name}: its mask token {mask!r} has id {vocabulary[mask]}, and the model has {rows} rows; take the "
            "tokenizer released with it"
        )
    said = config.get("mask_token_id")
    if said is not None and said != vocabulary[mask]:
        raise ValueError(
            f"{name}: its config says mask_token_id {said}, but {mask!r} is {vocabulary[mask]} in its tokenizer; "
            "take the tokenizer released with it"
        )
    tokenizer.mask_token = mask
    return mask


def write_config(config: dict[str, Any], diffusion: dict[str, Any], mask: str) -> dict[str, Any]:
    """config.json of the released format for a stock config; ValueError when it has no place for the model."""
    family = str(config["model_type"])
    if family not in FAMILIES:
        raise ValueError(f"the released format knows gpt2 and llama models, not {family}; use --format hf")
    if diffusion["layout"] != "full" or diffusion["source"] != "previous":
        raise ValueError("the released format means full attention and the shift; use --format hf for other models")
    masks = CONVENTIONS[FAMILIES[family]].masks
    if family == "llama" and mask not in masks:
        raise ValueError(
            f"a released Llama is told from its parent by the mask token {masks[0]!r}, and this one has {mask!r}; "
            f"convert its parent with --mask-token {masks[0]}, or use --format hf"
        )
    ours = ("is_causal", "mask_token_id", "diffusion", "transformers_version", "_name_or_path")
    kept = {key: value for key, value in config.items() if key not in ours}
    tasks = dict(kept.get("task_specific_params") or {})
    length = {**tasks.get("text-generation", {}), "max_length": diffusion["trained_length"]}
    return {**kept, "task_specific_params": {**tasks, "text-generation": length}}
