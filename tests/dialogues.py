"""Tokenizers with chat templates of several habits, and conversations for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffulm.template import PLAIN, Message

from .conftest import build_tokenizer

#: Turns opened and closed by special tokens, a default system message, no generation marker; the ChatML habit.
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: The start token written by the template, answers trimmed, a space before the end; the Llama 2 habit.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}<<{{ m.content }}>>\n"
    "{% elif m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
#: Drops the turns before the last: what it rendered once, it does not render again.
FORGETFUL = "{% for m in messages[-2:] %}{{ loop.index }}{{ m.role }}: {{ m.content }}\n{% endfor %}"
#: Says everything louder.
LOUD = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
TEMPLATES = {"chatml": CHATML, "brackets": BRACKETS, "plain": PLAIN}


def chat_tokenizer(template: str | None = CHATML, **kwargs: Any) -> Any:
    """The tests' tokenizer with ChatML's tokens and a template."""
    tokenizer = build_tokenizer(mask="<|mask|>", **kwargs)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def talk(*contents: str, system: str = "") -> list[Message]:
    """A conversation: user and assistant in turn."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
