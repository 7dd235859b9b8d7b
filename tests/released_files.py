"""Tiny checkpoints in the layouts that others released, and their forwards in plain torch.

Written out by hand from what is known of the files; nothing here comes from the package or from transformers, so that
an error in the loader is not made twice.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

#: The real GPT-2 tokenizer, where this checkout has it.
GPT2 = Path(__file__).parents[2] / "shared" / "data" / "tokenizer"
HYPHENS = "-" * 12
LAYERS, WIDTH, HEADS, INNER = 2, 32, 4, 64
Weights = dict[str, Tensor]


class Draw:
    """Random weights in order, from one seed, large enough for outputs to differ."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int, around: float = 0.0) -> Tensor:
        return (around + 0.2 * torch.randn(*shape, generator=self.generator)).to(self.dtype)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_weights(folder: Path, weights: Weights, shards: int = 1, stem: str = "model") -> None:
    """One file, or several with an index."""
    if shards == 1:
        save_file(weights, folder / f"{stem}.safetensors", {"format": "pt"})
        return
    place = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: weights[key] for key in list(weights)[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        place |= dict.fromkeys(part, file)
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": place})


# --------------------------------------------------------------------------------------------------------- DiffuGPT


def gpt_weights(rows: int, *, positions: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0) -> Weights:
    draw, w = Draw(seed, dtype), {}
    w["embed_tokens.weight"] = draw(rows, WIDTH)
    w["denoise_model.wpe.weight"] = draw(positions, WIDTH)
    for i in range(LAYERS):
        layer = f"denoise_model.h.{i}."
        for norm in ("ln_1", "ln_2"):
            w[f"{layer}{norm}.weight"], w[f"{layer}{norm}.bias"] = draw(WIDTH, around=1), draw(WIDTH)
        for name, n_in, n_out in (
            ("attn.c_attn", WIDTH, 3 * WIDTH), ("attn.c_proj", WIDTH, WIDTH),
            ("mlp.c_fc", WIDTH, 4 * WIDTH), ("mlp.c_proj", 4 * WIDTH, WIDTH),
        ):  # fmt: skip
            w[f"{layer}{name}.weight"], w[f"{layer}{name}.bias"] = draw(n_in, n_out), draw(n_out)
    w["denoise_model.ln_f.weight"], w["denoise_model.ln_f.bias"] = draw(WIDTH, around=1), draw(WIDTH)
    return w


def gpt_config(rows: int, *, max_length: int | None = 48, positions: int = 64) -> dict[str, Any]:
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "vocab_size": rows, "n_positions": positions, "n_ctx": positions, "n_embd": WIDTH, "n_layer": LAYERS,
        "n_head": HEADS, "layer_norm_epsilon": 1e-5, "bos_token_id": 256, "eos_token_id": 256,
        "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "transformers_version": "4.44.2",
    }  # fmt: skip
    if max_length:
        config["task_specific_params"] = {"text-generation": {"do_sample": True, "max_length": max_length}}
    return config


def gpt_tokenizer(folder: Path, *, medium: bool = False) -> int:
    """GPT-2's files with a small vocabulary: bytes, a few merges, runs of 12 and 13 hyphens. Returns the rows."""
    letters = byte_letters()
    merges = [("-", "-"), ("--", "--"), ("----", "----"), ("-" * 8, "----"), (HYPHENS, "-"), ("t", "h"), ("th", "e")]
    vocabulary = {token: i for i, token in enumerate(letters)} | {"<|endoftext|>": 256}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n", encoding="utf-8")
    return gpt_extras(folder, len(vocabulary), medium=medium)


def real_gpt_tokenizer(folder: Path, *, medium: bool = False) -> int:
    (folder / "vocab.json").write_bytes(gzip.decompress((GPT2 / "gpt2_vocab.json.gz").read_bytes()))
    (folder / "merges.txt").write_bytes(gzip.decompress((GPT2 / "gpt2_merges.txt.gz").read_bytes()))
    return gpt_extras(folder, 50257, medium=medium)


def gpt_extras(folder: Path, rows: int, *, medium: bool) -> int:
    end = "<|endoftext|>"
    write_json(folder / "special_tokens_map.json", {"bos_token": end, "eos_token": end, "unk_token": end})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024})
    if not medium:
        return rows
    write_json(folder / "added_tokens.json", {"[¨M¨]": rows})
    return rows + 1 + (rows + 1) % 2  # padded to a multiple of 2


def byte_letters() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's vocabulary, in its order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def write_diffugpt(
    folder: Path, *, medium: bool = False, real: bool = False, shards: int = 1, dtype: torch.dtype = torch.float32
) -> Weights:
    folder.mkdir(parents=True, exist_ok=True)
    rows = (real_gpt_tokenizer if real else gpt_tokenizer)(folder, medium=medium)
    weights = gpt_weights(rows, dtype=dtype)
    write_json(folder / "config.json", gpt_config(rows))
    write_weights(folder, weights, shards)
    return weights


def gpt_forward(w: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """(B, L, V) logits as the weights give them (row i predicts token i + 1), every position seeing every one."""
    x = w["embed_tokens.weight"][ids] + w["denoise_model.wpe.weight"][: ids.shape[1]]
    for i in range(LAYERS):
        p = f"denoise_model.h.{i}."

        def linear(y: Tensor, name: str, p: str = p) -> Tensor:
            return y @ w[f"{p}{name}.weight"] + w[f"{p}{name}.bias"]

        def norm(y: Tensor, name: str) -> Tensor:
            return F.layer_norm(y, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

        q, k, v = (heads(y) for y in linear(norm(x, f"{p}ln_1"), "attn.c_attn").split(WIDTH, -1))
        x = x + linear(attend(q, k, v), "attn.c_proj")
        inner = linear(norm(x, f"{p}ln_2"), "mlp.c_fc")
        gelu_new = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + linear(gelu_new, "mlp.c_proj")
    x = F.layer_norm(x, (WIDTH,), w["denoise_model.ln_f.weight"], w["denoise_model.ln_f.bias"], 1e-5)
    return x @ w["embed_tokens.weight"].T


def heads(y: Tensor, n: int = HEADS) -> Tensor:
    return y.unflatten(-1, (n, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No mask at all."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


# -------------------------------------------------------------------------------------- Llama and what is built like it

#: role -> name, of a stock Llama or Qwen and of LLaDA.
STOCK = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "layer": "model.layers.{}.",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "before": "input_layernorm", "between": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
}  # fmt: skip
LLADA = {
    "embed": "model.transformer.wte", "norm": "model.transformer.ln_f", "head": "model.transformer.ff_out",
    "layer": "model.transformer.blocks.{}.", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out",
    "gate": "ff_proj", "up": "up_proj", "down": "ff_out", "before": "attn_norm", "between": "ff_norm",
}  # fmt: skip
WRAPPED = STOCK | {"embed": "embed_tokens", "norm": "denoise_model.norm", "layer": "denoise_model.layers.{}."}


def llama_weights(
    rows: int, names: Mapping[str, str] = STOCK, *, kv: int = HEADS, bias: bool = False, qk_norm: bool = False,
    tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Weights:  # fmt: skip
    draw, w, head = Draw(seed, dtype), {}, WIDTH // HEADS
    w[f"{names['embed']}.weight"] = draw(rows, WIDTH)
    for i in range(LAYERS):
        layer = names["layer"].format(i)
        shapes = {
            "q": (WIDTH, WIDTH), "k": (kv * head, WIDTH), "v": (kv * head, WIDTH), "o": (WIDTH, WIDTH),
            "gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER),
        }  # fmt: skip
        for role, shape in shapes.items():
            w[f"{layer}{names[role]}.weight"] = draw(*shape)
            if bias and role in "qkv":
                w[f"{layer}{names[role]}.bias"] = draw(shape[0])
        for role in ("before", "between"):
            w[f"{layer}{names[role]}.weight"] = draw(WIDTH, around=1)
        if qk_norm:
            for role in ("q_norm", "k_norm"):
                w[f"{layer}{names[role]}.weight"] = draw(head, around=1)
    w[f"{names['norm']}.weight"] = draw(WIDTH, around=1)
    if not tied:
        w[f"{names['head']}.weight"] = draw(rows, WIDTH)
    return w


def llama_forward(
    w: Mapping[str, Tensor], ids: Tensor, names: Mapping[str, str] = STOCK, *, kv: int = HEADS, theta: float = 1e4,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """(B, L, V) logits of a Llama, Qwen2, Qwen3 or LLaDA without a mask; biases and q, k norms where there are."""

    def rms(y: Tensor, name: str) -> Tensor:
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]

    def linear(y: Tensor, name: str) -> Tensor:
        return y @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    half = WIDTH // HEADS // 2
    angle = torch.arange(ids.shape[1])[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()

    def rotate(y: Tensor) -> Tensor:
        a, b = y[..., :half], y[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = w[f"{names['embed']}.weight"][ids]
    for i in range(LAYERS):
        at = {role: names["layer"].format(i) + name for role, name in names.items()}
        y = rms(x, at["before"])
        q, k, v = heads(linear(y, at["q"])), heads(linear(y, at["k"]), kv), heads(linear(y, at["v"]), kv)
        if f"{at.get('q_norm')}.weight" in w:
            q, k = rms(q, at["q_norm"]), rms(k, at["k_norm"])
        k, v = (z.repeat_interleave(HEADS // kv, 1) for z in (rotate(k), v))
        x = x + linear(attend(rotate(q), k, v), at["o"])
        y = rms(x, at["between"])
        x = x + linear(F.silu(linear(y, at["gate"])) * linear(y, at["up"]), at["down"])
    x = rms(x, names["norm"])
    head = names["head"] if f"{names['head']}.weight" in w else names["embed"]
    return x @ w[f"{head}.weight"].T


def llama_config(rows: int, *, kv: int = HEADS, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": rows, "hidden_size": WIDTH,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": kv, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": None, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "bfloat16", "transformers_version": "4.44.2", **more,
    }  # fmt: skip


def write_llama_tokenizer(folder: Path, *, mask: str | None = "ти") -> int:
    """Llama 2's kind of tokenizer: spaces as ▁, bytes as fallback, and the piece "ти". Returns its size."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,"]
    pieces += ["т", "и", "ти", "тит", "th", "the", "▁the"]
    merges = [("т", "и"), ("ти", "т"), ("t", "h"), ("th", "e"), ("▁", "the")]
    special = [
        {"id": i, "content": pieces[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i in range(3)
    ]  # fmt: skip
    spaces = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    undo = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]  # fmt: skip
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": spaces}, "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": undo},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
                  "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": [" ".join(m) for m in merges]},
    })  # fmt: skip
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | ({"mask_token": mask} if mask else {})
    write_json(folder / "special_tokens_map.json", tokens)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokens})
    return len(pieces)


def write_diffullama(folder: Path, *, wrapped: bool = False, shards: int = 1, **options: Any) -> Weights:
    folder.mkdir(parents=True, exist_ok=True)
    rows = write_llama_tokenizer(folder)
    weights = llama_weights(rows, WRAPPED if wrapped else STOCK, **options)
    write_json(folder / "config.json", llama_config(rows))
    write_weights(folder, weights, shards)
    return weights


# ------------------------------------------------------------------------------------------------- LLaDA, Dream, A2D


def qwen_tokenizer(folder: Path, tokens: list[str], special: dict[str, str], **config: Any) -> int:
    """Byte-level files without a tokenizer.json, as Dream has them; `tokens` come last. Returns its size."""
    letters = byte_letters()
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(letters)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    added = {token: len(letters) + i for i, token in enumerate(tokens)}
    write_json(folder / "added_tokens.json", added)
    decoder = {
        str(i): {"content": t, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
                 "single_word": False}
        for t, i in added.items()
    }  # fmt: skip
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder, **special, **config})
    return len(letters) + len(tokens)


def write_dream(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>",
               "pad_token": "<|endoftext|>"}  # fmt: skip
    rows = qwen_tokenizer(
        folder, ["<|endoftext|>", "<|beginoftext|>", "<|mask|>"], special, tokenizer_class="DreamTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
    )  # fmt: skip
    (folder / "tokenization_dream.py").write_text("raise SystemExit('remote code was run')\n")
    weights = llama_weights(rows + 5, bias=True, kv=2, dtype=dtype)
    write_json(folder / "config.json", {
        **llama_config(rows + 5, kv=2, rope_theta=1e6, rms_norm_eps=1e-6), "model_type": "Dream",
        "architectures": ["DreamModel"], "use_sliding_window": False, "sliding_window": None, "max_window_layers": 2,
        "mask_token_id": rows - 1, "bos_token_id": rows - 2, "eos_token_id": rows - 3, "pad_token_id": rows - 3,
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    })  # fmt: skip
    write_weights(folder, weights, shards=2)
    return weights


def write_llada(folder: Path, *, dtype: torch.dtype = torch.float32, kv: int = HEADS, **config: Any) -> Weights:
    from tests.conftest import build_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(bos="<|startoftext|>", eos="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mdm_mask|>"]})
    tokenizer.save_pretrained(folder)
    rows = len(tokenizer) + 3
    weights = llama_weights(rows, LLADA, kv=kv, dtype=dtype)
    write_json(folder / "config.json", {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": WIDTH, "n_heads": HEADS, "n_kv_heads": kv,
        "n_layers": LAYERS, "mlp_ratio": 4, "mlp_hidden_size": INNER, "vocab_size": rows, "embedding_size": rows,
        "block_type": "llama", "block_group_size": 1, "rope": True, "rope_full_precision": True, "rope_theta": 500000.0,
        "alibi": False, "activation_type": "silu", "layer_norm_type": "rms", "layer_norm_with_affine": True,
        "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False,
        "include_bias": False, "include_qkv_bias": False, "multi_query_attention": None, "scale_logits": False,
        "input_emb_norm": False, "weight_tying": False, "rms_norm_eps": 1e-5, "max_sequence_length": 64,
        "eos_token_id": 1, "pad_token_id": 1, "mask_token_id": tokenizer.convert_tokens_to_ids("<|mdm_mask|>"),
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
        **config,
    })  # fmt: skip
    write_weights(folder, weights)
    return weights


def write_a2d(folder: Path, family: str, **config: Any) -> Weights:
    from tests.conftest import build_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(mask="<|mask|>")
    tokenizer.save_pretrained(folder)
    rows, qwen3 = len(tokenizer) + 4, family == "qwen3"
    tied = family != "llama"
    weights = llama_weights(rows, kv=2, bias=family == "qwen2", qk_norm=qwen3, tied=tied)
    write_json(folder / "config.json", {
        **llama_config(rows, kv=2, tie_word_embeddings=tied), "model_type": f"a2d-{family}", "head_dim": WIDTH // HEADS,
        "architectures": [f"A2D{family.title()}LMHeadModel"], **config,
    })  # fmt: skip
    write_weights(folder, weights)
    return weights


# ---------------------------------------------------------------------------------------------------------- adapters


def write_adapter(
    folder: Path, modules: dict[str, tuple[int, int]], *, prefix: str, rank: int = 2, alpha: int = 4,
    whole: Weights | None = None, seed: int = 5, **config: Any,
) -> Weights:  # fmt: skip
    """A LoRA as peft writes it. modules: name -> (out, in)."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, pieces = Draw(seed, torch.float32), {}
    for name, (n_out, n_in) in modules.items():
        pieces[f"base_model.model.{prefix}{name}.lora_A.weight"] = draw(rank, n_in)
        pieces[f"base_model.model.{prefix}{name}.lora_B.weight"] = draw(n_out, rank)
    pieces |= {f"base_model.model.{name}": tensor for name, tensor in (whole or {}).items()}
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "output/llama2-ddm", "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
        "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "modules_to_save": ["embed_tokens"] if whole else None, **config,
    })  # fmt: skip
    write_weights(folder, pieces, stem="adapter_model")
    return pieces
