"""Tiny models and a tiny tokenizer, made in memory; nothing is fetched."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# A job that a script starts in the background ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny models gain nothing from threads, and tests that run beside other work lose much by them.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run: a failure is one of the change at hand, not of the day. Slowness is no failure.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long tests start Python and torch up to 60 times, which takes a busy machine up to 20 s each time."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1800))


CORPUS = [
    "The quick brown fox jumps over the lazy dog. It does so every day, and the dog does not mind.",
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n",
    "A masked diffusion model reveals its tokens in any order; an autoregressive one from left to right.",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 11 12. Punctuation: ()[]{}<>/\\|!?;:'\"",
]


def build_tokenizer(
    *, bos: str | None = "<s>", eos: str | None = "</s>", mask: str | None = None, size: int = 400
) -> Any:
    """A byte-level BPE tokenizer trained on a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [t for t in (bos, eos, mask) if t]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, mask_token=mask)


def tiny_config(family: str = "llama", *, vocab: int, **changes: Any) -> Any:
    """A two-layer config of a family."""
    import transformers as tf

    common = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
    }  # fmt: skip
    if family == "gpt2":
        return tf.GPT2Config(
            vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **changes,
        )  # fmt: skip
    kinds = {"llama": tf.LlamaConfig, "qwen2": tf.Qwen2Config, "qwen3": tf.Qwen3Config}
    return kinds[family](**{**common, **changes})


def build_parent(folder: Path, family: str = "llama", *, tokenizer: Any = None, seed: int = 0, **changes: Any) -> Path:
    """A random autoregressive model of a family saved as an ordinary folder."""
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer or build_tokenizer()
    torch.manual_seed(seed)
    vocab = changes.pop("vocab", len(tokenizer))
    model = AutoModelForCausalLM.from_config(tiny_config(family, vocab=vocab, **changes))
    with torch.no_grad():  # larger than the usual 0.02: outputs that differ, so that tests can see differences
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama parent."""
    return build_parent(tmp_path_factory.mktemp("parents") / "llama")


@pytest.fixture(scope="session")
def checkpoint(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent converted: full layout, the paper's shift, length 64."""
    from diffulm.convert import convert

    folder = tmp_path_factory.mktemp("converted") / "llama"
    convert(str(parent), folder, trained_length=64)
    return folder
