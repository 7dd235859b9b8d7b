"""Two-layer random models of every family that ecosystem.md lists, and what conversion must say to each.

`build` takes transformers' own config classes, so a family that a new transformers changes is tested as it then is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .conftest import build_tokenizer

#: Positions every tiny model has; sliding windows are 3, well inside the eight positions of the probe.
POSITIONS, WINDOW = 64, 3

_COMMON = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
}  # fmt: skip
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Family:
    """Config class, its small sizes, and what conversion does: "full", "windowed" (made full) or a refusal."""

    config: str
    sizes: dict[str, Any] = field(default_factory=lambda: dict(_COMMON))
    becomes: str = "full"
    alibi: bool = False


FAMILIES = {
    "llama": Family("LlamaConfig"),
    "gpt2": Family("GPT2Config", {**_GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "qwen2": Family("Qwen2Config"),
    "qwen3": Family("Qwen3Config", {**_COMMON, "head_dim": 8}),
    "gemma": Family("GemmaConfig", {**_COMMON, "head_dim": 8}),
    "phi": Family("PhiConfig"),
    "phi3": Family("Phi3Config"),
    "olmo2": Family("Olmo2Config"),
    "granite": Family("GraniteConfig", {**_COMMON, "logits_scaling": 3.0, "attention_multiplier": 0.3}),
    "cohere": Family("CohereConfig", {**_COMMON, "logit_scale": 0.25}),
    "starcoder2": Family("Starcoder2Config", {**_COMMON, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "gpt_neox": Family("GPTNeoXConfig"),
    "smollm3": Family("SmolLM3Config"),
    "qwen3_moe": Family("Qwen3MoeConfig", {**_COMMON, **_MOE, "head_dim": 8}),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        {**_COMMON, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "q_lora_rank": 16,
         "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    "mistral": Family("MistralConfig", {**_COMMON, "sliding_window": WINDOW}, "windowed"),
    "qwen2-swa": Family(
        "Qwen2Config",
        {**_COMMON, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        "windowed",
    ),
    "gemma3_text": Family("Gemma3TextConfig", {**_COMMON, **_SLIDING, "head_dim": 8}, "windowed"),
    "olmo3": Family("Olmo3Config", {**_COMMON, **_SLIDING}, "windowed"),
    "gemma2": Family("Gemma2Config", {**_COMMON, **_SLIDING, "head_dim": 8}, "windowed"),
    "gpt_oss": Family(
        "GptOssConfig",
        {**_COMMON, **_SLIDING, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        "windowed",
    ),
    "llama4_text": Family(
        "Llama4TextConfig",
        {**_COMMON, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": WINDOW,
         "layer_types": ["chunked_attention", "full_attention"], "moe_layers": [1], "no_rope_layers": [1, 0]},
        "windowed",
    ),
    "opt": Family("OPTConfig", {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "falcon": Family("FalconConfig", {**_COMMON, "alibi": False}),
    "gptj": Family("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "bloom": Family("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, alibi=True),
    "mpt": Family(
        "MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": POSITIONS}, "refused", alibi=True
    ),
    "stablelm": Family("StableLmConfig", becomes="refused"),
    "gpt_neo": Family(
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]],
         "max_position_embeddings": POSITIONS},
        "refused",
    ),
    "lfm2": Family("Lfm2Config", {**_COMMON, "layer_types": ["conv", "full_attention"]}, "refused"),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        {**_COMMON, **_MOE, "head_dim": 8, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2,
         "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "layer_types": ["linear_attention", "full_attention"]},
        "refused",
    ),
}  # fmt: skip


def random_model(
    name: str, *, vocab: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A random model of a family in evaluation mode, with weights large enough for outputs to differ."""
    import transformers

    family = FAMILIES[name]
    tokens = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    config = getattr(transformers, family.config)(**{**tokens, **family.sizes, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
            elif parameter.ndim == 1:  # biases and norms that are not all alike
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_parent(folder: Path, name: str, tokenizer: Any = None, **changes: Any) -> Any:
    """`random_model` saved with a tiny tokenizer, as an ordinary folder; returns the model."""
    tokenizer = tokenizer or build_tokenizer()
    model = random_model(name, **{"vocab": len(tokenizer), **changes})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
