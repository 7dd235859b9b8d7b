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
    """The tokenizer saved beside a model; ValueError naming the folder when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), **kwargs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(f"no usable tokenizer in {folder} ({reason}); save one there with save_pretrained") from error


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
