"""The four special tokens, resolved once, and text to ids without surprises at the edges."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: String of a mask token that conversion adds. Any tokenizer that already has a mask token keeps its own.
MASK_TOKEN = "<|mask|>"


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids. `bos` opens position 0 and every document; `pad` only fills (padding comes from lengths, never from
    ids); `mask` is None for a parent."""

    bos: int
    eos: int
    pad: int
    mask: int | None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The tokenizer's ids for start, end, padding and mask.

    Without a BOS, EOS opens documents (as GPT-2 and most small parents were trained); without a padding token, EOS
    fills. ValueError when there is no EOS: nothing then says where a text ends.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            "the tokenizer has no end-of-text token; set one (tokenizer.eos_token = '...') and save it with the model"
        )
    bos = tokenizer.bos_token_id
    pad = tokenizer.pad_token_id
    return SpecialTokens(
        bos=eos if bos is None else bos, eos=eos, pad=eos if pad is None else pad, mask=tokenizer.mask_token_id
    )


def load_tokenizer(folder: Path | str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model; ValueError naming the folder when there is none.

    Code that a folder brings along is never run: where its tokenizer class is such code, the stock class of `config`
    (a keyword, the stock model's config) reads the files.
    """
    from transformers import TOKENIZER_MAPPING, AutoTokenizer

    told, own = (_json(Path(folder) / name) for name in ("tokenizer_config.json", "config.json"))
    stock = TOKENIZER_MAPPING[type(kwargs["config"])] if "auto_map" in told and "config" in kwargs else AutoTokenizer
    if stock is AutoTokenizer:
        kwargs["trust_remote_code"] = False  # without it transformers asks on the terminal
    else:
        kwargs.pop("config")
    try:
        tokenizer = stock.from_pretrained(str(folder), **kwargs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(f"no usable tokenizer in {folder} ({reason}); save one there with save_pretrained") from error
    if (own.get("diffusion") or {}).get("mask_row_added") is False:
        keep_as_text(tokenizer, tokenizer.mask_token)
    return tokenizer


def _json(path: Path) -> dict[str, Any]:
    """The JSON of a file that may be missing or damaged: whoever needs it says so better."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def keep_as_text(tokenizer: PreTrainedTokenizerBase, token: str | None) -> None:
    """Let a reused mask token be the ordinary text that it also is.

    A saved tokenizer comes back with its mask token among the special ones, which are cut out of a text before
    anything is merged: thirteen hyphens would become twelve and one, and the text other tokens than the model knows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or token is None:
        return
    described = json.loads(backend.to_str())
    kept = [added for added in described["added_tokens"] if added["content"] != token]
    if len(kept) < len(described["added_tokens"]) and token in described["model"].get("vocab", ()):
        described["added_tokens"] = kept
        tokenizer._tokenizer = type(backend).from_str(json.dumps(described))


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of what turns text into ids: two tokenizers with equal fingerprints give equal tokens.

    A mask token does not take part (it never occurs in prepared text), so a parent's shards serve its child.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        description: Any = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    else:
        description = json.loads(backend.to_str())
        # Truncation and padding are switches of a call, not of the vocabulary.
        description.pop("truncation", None)
        description.pop("padding", None)
        added = description.get("added_tokens") or []
        description["added_tokens"] = [t["content"] for t in added if t["content"] != tokenizer.mask_token]
    return hashlib.sha256(json.dumps(description, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, plain: bool = False) -> list[int]:
    """Ids of a text by itself, no special tokens added.

    plain: names of special tokens in the text are ordinary text, as in prepared data.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=plain)["input_ids"]
    return list(ids)


def encode_after(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text` such that decoding (anything + these ids) shows exactly `text` at the end.

    Some tokenizers (SentencePiece with a dummy prefix) put a space in front of whatever comes first. Encoding behind
    an anchor and dropping the anchor avoids it. Where one anchor merges with the text the next is tried: the
    end-of-text token merges with nothing. Where none serves, the plain encoding is kept.
    """
    if not text:
        return []
    for anchor in ("\n", "a", "0", ".", tokenizer.eos_token):
        if not anchor:
            continue
        before, joined = encode(tokenizer, anchor), encode(tokenizer, anchor + text)
        if joined[: len(before)] == before and decode(tokenizer, joined) == decode(tokenizer, before) + text:
            return joined[len(before) :]
    return encode(tokenizer, text)


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text of ids exactly as they stand: special tokens shown, no clean-up of spaces."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
