"""How much memory and time opening a DiffuLLaMA-shaped checkpoint takes: synthetic weights, sharded, in bfloat16.

    python benchmarks/open_checkpoint.py [--layers 32] [--folder runs/open] [--dtype stored]

The file is written once (13.5 GB with all 32 layers; delete it afterwards) and opened in a process of its own. Own
memory is what the process holds besides pages of the file (RssAnon); those pages the system may drop at any time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import machine

SHAPE = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
MASK = "ти"

MEASURE = """
import json, re, sys, time
import diffulm, torch
from diffulm import hub
def status(key): return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e6
import transformers
before, start = status("RssAnon"), time.perf_counter()
model = diffulm.load(sys.argv[1], device="cpu", dtype=sys.argv[2])
seconds = time.perf_counter() - start
print(json.dumps({"seconds": round(seconds, 1), "own_GB": round(status("RssAnon") - before, 3),
                  "file_pages_GB": round(status("RssFile"), 2), "peak_GB": round(status("VmHWM"), 2)}))
"""


def weights(layers: int) -> dict[str, torch.Size]:
    """Key -> shape, as save_pretrained of a Llama names them."""
    D, H, V = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for k in range(layers):
        at = f"model.layers.{k}."
        shapes |= {f"{at}self_attn.{p}_proj.weight": (D, D) for p in "qkvo"}
        shapes |= {f"{at}mlp.{p}_proj.weight": (H, D) for p in ("gate", "up")} | {f"{at}mlp.down_proj.weight": (D, H)}
        shapes |= {f"{at}{p}_layernorm.weight": (D,) for p in ("input", "post_attention")}
    return {key: torch.Size(shape) for key, shape in shapes.items()}


def write(folder: Path, layers: int) -> None:
    """The folder, one shard for every two layers. Values repeat one random row block: only their size matters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", MASK])}
    vocabulary |= {letter: len(vocabulary) + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"token{i}": i for i in range(len(vocabulary), SHAPE["vocab_size"])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", mask_token=MASK
    ).save_pretrained(folder)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, **SHAPE,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Size]] = [{}]
    for key, shape in weights(layers).items():
        if sum(s.numel() for s in shards[-1].values()) + shape.numel() > 500_000_000:
            shards.append({})
        shards[-1][key] = shape
    index: dict[str, str] = {}
    for n, shard in enumerate(shards):
        name = f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors"
        made = {k: block.repeat(-(-s.numel() // len(block)))[: s.numel()].view(s).clone() for k, s in shard.items()}
        save_file(made, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path("runs/open"))
    parser.add_argument("--dtype", default="stored", help="stored (no copy), bfloat16 or float32")
    arguments = parser.parse_args()
    folder = arguments.folder / f"{arguments.layers}-layers"
    if not (folder / "model.safetensors.index.json").is_file():
        write(folder, arguments.layers)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, str(folder), arguments.dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.strip().split("\n")[-1])
    print(json.dumps({"file_GB": round(size / 1e9, 2), "dtype": arguments.dtype, **found, **machine.describe()}))


if __name__ == "__main__":
    main()
