"""Special tokens, fingerprints, and text that comes back exactly as it went in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffulm.tokenizer import (
    MASK_TOKEN,
    SpecialTokens,
    decode,
    encode,
    encode_after,
    fingerprint,
    load_tokenizer,
    special_tokens,
)

from .conftest import CORPUS, build_tokenizer


def metaspace_tokenizer() -> Any:
    """SentencePiece manners: a space is put in front of whatever comes first, and taken away again on decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    core.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_special_tokens_fall_back_to_the_end_token() -> None:
    assert special_tokens(build_tokenizer()) == SpecialTokens(bos=0, eos=1, pad=1, mask=None)
    without = build_tokenizer()
    without.bos_token = None
    assert special_tokens(without) == SpecialTokens(bos=1, eos=1, pad=1, mask=None)
    assert special_tokens(build_tokenizer(mask="[M]")) == SpecialTokens(bos=0, eos=1, pad=1, mask=2)
    padded = build_tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert special_tokens(padded).pad == len(padded) - 1


def test_without_an_end_token_nothing_ends() -> None:
    with pytest.raises(ValueError, match=r"no end-of-text token; set one"):
        special_tokens(build_tokenizer(eos=None))


def test_fingerprint_of_parent_child_and_stranger(tmp_path: Path) -> None:
    parent = build_tokenizer()
    before = fingerprint(parent)
    assert before == fingerprint(build_tokenizer()) and len(before) == 64
    child = build_tokenizer()
    child.add_special_tokens({"mask_token": MASK_TOKEN})
    child.save_pretrained(tmp_path / "child")
    assert fingerprint(child) == fingerprint(load_tokenizer(tmp_path / "child")) == before

    assert fingerprint(build_tokenizer(size=380)) != before
    assert fingerprint(build_tokenizer(bos="<bos>")) != before
    stranger = build_tokenizer()
    stranger.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    assert fingerprint(stranger) != before, "an added token cuts texts that hold it differently"
    assert fingerprint(metaspace_tokenizer()) != before
    # What a call switches on is no property of the vocabulary.
    parent(["a b c", "d"], padding=False, truncation=True, max_length=2)
    assert fingerprint(parent) == before


TEXTS = [" today.", "today.", "\n\ndef f():\n    return 1\n", "  two spaces", "\ttab", "é ∀ 🙂", "", " ", "\n", "a"]


@pytest.mark.parametrize("make", [build_tokenizer, metaspace_tokenizer])
@pytest.mark.parametrize("text", TEXTS)
def test_encode_after_shows_exactly_the_text(make: Any, text: str) -> None:
    tokenizer = make()
    ids = encode_after(tokenizer, text)
    before = encode(tokenizer, "The dog")
    assert decode(tokenizer, before + ids) == "The dog" + text
    assert not set(ids) & {tokenizer.bos_token_id, tokenizer.eos_token_id}


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12).filter(lambda t: "<" not in t))
def test_encode_after_any_text(text: str) -> None:
    tokenizer = _METASPACE
    assert decode(tokenizer, encode(tokenizer, "dog") + encode_after(tokenizer, text)) == "dog" + text.replace("▁", " ")


_METASPACE = metaspace_tokenizer()


def test_plain_encoding_would_have_added_a_space() -> None:
    """The tokenizer above does what encode_after exists for."""
    assert decode(_METASPACE, encode(_METASPACE, "The") + encode(_METASPACE, "dog")) == "The dog"
    assert decode(_METASPACE, encode(_METASPACE, "The") + encode_after(_METASPACE, "dog")) == "Thedog"


def test_decode_keeps_special_tokens_and_spaces() -> None:
    tokenizer = build_tokenizer()
    ids = [0, *encode(tokenizer, "a , b . don ' t"), 1]
    assert decode(tokenizer, ids) == "<s>a , b . don ' t</s>"
    assert encode(tokenizer, "") == [] and encode(tokenizer, "<s>") == [0]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"version": "1.0"}'])
def test_a_folder_without_a_usable_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=rf"no usable tokenizer in {tmp_path}.*save_pretrained"):
        load_tokenizer(tmp_path)
