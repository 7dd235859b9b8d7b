"""Text to token stores: what is read, how it is split, and that a killed run leaves nothing wrong behind."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from diffulm.data import estimate as data_estimate
from diffulm.data import pieces, sources
from diffulm.data.estimate import describe, estimate
from diffulm.data.prepare import prepare
from diffulm.data.sources import Document, Source
from diffulm.data.split import ngrams
from diffulm.data.tokens import ShardWriter, TokenStore
from diffulm.tokenizer import fingerprint

from ..conftest import build_tokenizer


def train_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a short model_max_length, so that a "sequence is longer" warning would be seen."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=8, clean_up_tokenization_spaces=False)


TOKENIZER = train_tokenizer(["the quick brown fox jumps over the lazy dog", "a document about the token store"])
TEXTS = [f"document {i} is about the {i * i}th token\n" for i in range(60)]


class Counting:
    """A tokenizer that counts the texts that it, or rather its backend, is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> None:
        self._tokenizer, self.texts = tokenizer, 0

    @property
    def backend_tokenizer(self) -> Any:
        return Backend(self)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class Backend:
    """What Counting shows as its backend."""

    def __init__(self, counter: Counting) -> None:
        self._counter, self._backend = counter, counter._tokenizer.backend_tokenizer

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self._counter.texts += len(texts)
        return self._backend.encode_batch_fast(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def run(out: Path, *sources: Source, tokenizer: Any = TOKENIZER, **options: Any) -> dict[str, Any]:
    return prepare(sources, tokenizer, out, progress=False, **options)


def texts_in(out: Path, source: str, split: str) -> list[str]:
    store = TokenStore.open(out / source / split, tokenizer=fingerprint(TOKENIZER))
    texts = [TOKENIZER.decode(store.document(i)) for i in range(len(store))]
    assert [store.document_bytes(i) for i in range(len(store))] == [len(text.encode()) for text in texts]
    return texts


def both(out: Path, source: str) -> list[str]:
    return texts_in(out, source, "train") + texts_in(out, source, "heldout")


def jsonl(path: Path, texts: list[Any], field: str = "text") -> Source:
    path.write_bytes(b"".join(json.dumps({field: text}, ensure_ascii=False).encode() + b"\n" for text in texts))
    return Source(path.name.split(".")[0], str(path), text_field=field)


def files_of(out: Path) -> dict[str, bytes]:
    """Every file but what the report says about the times of its input."""
    return {k: v.split(b',\n "asked"')[0] for k, v in raw_files_of(out).items()}


def raw_files_of(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------ the whole way


def test_text_comes_back_and_the_report_counts_it(tmp_path: Path) -> None:
    report = run(tmp_path / "out", jsonl(tmp_path / "web.jsonl", TEXTS), heldout_fraction=0.2)
    assert json.loads((tmp_path / "out/prepare.json").read_text()) == report
    assert sorted(both(tmp_path / "out", "web")) == sorted(TEXTS)
    entry = report["sources"]["web"]
    for split in ("train", "heldout"):
        texts = texts_in(tmp_path / "out", "web", split)
        assert entry[split] == {
            "documents": len(texts),
            "tokens": sum(len(TOKENIZER(text)["input_ids"]) for text in texts),
            "bytes": sum(len(text.encode()) for text in texts),
        }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["prepare.json", "web"]


def test_nothing_is_said_about_long_sequences(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", TEXTS[:4]), tokenizer=train_tokenizer(TEXTS))
    assert "longer than" not in caplog.text


def test_a_second_call_tokenises_nothing_and_changes_nothing(tmp_path: Path) -> None:
    sources = [jsonl(tmp_path / "a.jsonl", TEXTS[:20]), jsonl(tmp_path / "b.jsonl", TEXTS[20:])]
    first = Counting()
    report = run(tmp_path / "out", *sources, tokenizer=first)
    assert first.texts == len(TEXTS)
    before, second = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*")}, Counting()
    assert run(tmp_path / "out", *sources, tokenizer=second) == report
    assert second.texts == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.*")} == before


def test_another_weight_is_noted_without_tokenising(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS[:5])
    run(tmp_path / "out", source)
    counting = Counting()
    run(tmp_path / "out", Source("a", source.path, weight=3.0), tokenizer=counting)
    assert counting.texts == 0
    assert json.loads((tmp_path / "out/prepare.json").read_text())["sources"]["a"]["weight"] == 3.0


@pytest.mark.parametrize("change", ["text", "tokenizer", "fraction", "name"])
def test_another_request_is_refused_and_nothing_is_touched(tmp_path: Path, change: str) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS[:5])
    run(tmp_path / "out", source)
    before = files_of(tmp_path / "out")
    options: dict[str, Any] = {}
    if change == "text":
        source = jsonl(tmp_path / "a.jsonl", TEXTS[:6])
    if change == "tokenizer":
        options["tokenizer"] = train_tokenizer(["something else entirely"])
    if change == "fraction":
        options["heldout_fraction"] = 0.5
    if change == "name":
        source = Source("other", source.path)
    with pytest.raises(ValueError, match="another request"):
        run(tmp_path / "out", source, **options)
    assert files_of(tmp_path / "out") == before


def test_a_foreign_folder_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="no prepared text"):
        run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", TEXTS))
    assert files_of(tmp_path / "out") == {"thesis.tex": b"mine"}


def test_a_damaged_store_is_made_again(tmp_path: Path) -> None:
    sources = [jsonl(tmp_path / "a.jsonl", TEXTS[:20]), jsonl(tmp_path / "b.jsonl", TEXTS[20:])]
    report = run(tmp_path / "out", *sources)
    whole = files_of(tmp_path / "out")
    (tmp_path / "out/a/train/shard-00000.bin").write_bytes(b"")
    counting = Counting()
    assert run(tmp_path / "out", *sources, tokenizer=counting) == report
    assert (files_of(tmp_path / "out"), counting.texts) == (whole, 20)


# -------------------------------------------------------------------------------------------------------- killed


class Killed(BaseException):
    """What no `except Exception` may swallow."""


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("documents", [1, 25, 59])
def test_killed_half_way_then_run_again_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: int, error: BaseException
) -> None:
    sources = [jsonl(tmp_path / "a.jsonl", TEXTS[:20]), jsonl(tmp_path / "b.jsonl", TEXTS[20:])]
    report = run(tmp_path / "whole", *sources)
    real, written = ShardWriter.add, []

    def add(writer: ShardWriter, ids: Any, n_bytes: int) -> None:
        written.append(n_bytes)
        if len(written) > documents:
            raise error
        real(writer, ids, n_bytes)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(ShardWriter, "add", add)
        run(tmp_path / "out", *sources)
    assert not (tmp_path / "out/prepare.json").exists()
    assert (tmp_path / "out/a").exists() == (documents >= 20)
    assert not (tmp_path / "out/b").exists()
    counting = Counting()
    assert run(tmp_path / "out", *sources, tokenizer=counting) == report
    # The killed source was tokenised; only its pieces had to be put together again.
    assert counting.texts == (len(TEXTS) - 20 if documents < 20 else 0)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_what_a_killed_process_left_is_swept_up(tmp_path: Path) -> None:
    """SIGKILL runs no clean-up: the folders aside and the cache stay, and a store of other text may be there."""
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    run(tmp_path / "whole", source)
    run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", TEXTS[:7]))
    (tmp_path / "out/prepare.json").rename(tmp_path / "out/prepare.partial")
    for leftover in (".a.123.tmp", ".cache-xyz"):
        (tmp_path / "out" / leftover / "train").mkdir(parents=True)
    (tmp_path / "out/.prepare.json.9.tmp").write_text("{")
    run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", TEXTS))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "prepare.json"]


def test_a_source_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter(range(9))
    monkeypatch.setattr(sources, "read_topics", lambda: iter([Document("x", f"text {next(reads)}", "")]))
    with pytest.raises(ValueError, match="changed while it was read"):
        run(tmp_path / "out", Source("a", "builtin:topics"))
    assert not (tmp_path / "out/prepare.json").exists()


def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A source of eight pieces."""
    size = sum(len(text.encode()) for text in TEXTS)
    monkeypatch.setattr(pieces, "PIECE_BYTES", size // 8)
    return jsonl(tmp_path / "a.jsonl", TEXTS)


def test_a_killed_source_goes_on_from_its_finished_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = many(tmp_path, monkeypatch)
    report = run(tmp_path / "whole", source)
    real, written = pieces.write_atomic, []

    def write(path: Path, data: bytes) -> None:
        if len(written) == 3:
            raise Killed
        written.append(path)
        real(path, data)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pieces, "write_atomic", write)
        run(tmp_path / "out", source)
    kept = sorted((tmp_path / "out").glob(".pieces-a-*/piece-*.npz"))
    assert kept == written
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(times) == 3
    counting = Counting()
    assert run(tmp_path / "out", source, tokenizer=counting) == report
    assert 0.5 * len(TEXTS) < counting.texts < 0.75 * len(TEXTS)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".pieces*"))


def test_pieces_of_other_text_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = many(tmp_path, monkeypatch)
    run(tmp_path / "whole", source)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("diffulm.data.prepare.join_pieces", lambda *_: (_ for _ in ()).throw(Killed))
        run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", TEXTS[::-1]))
    assert list((tmp_path / "out").glob(".pieces-a-*/*"))
    run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", TEXTS))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_piece_size_and_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "one", jsonl(tmp_path / "a.jsonl", TEXTS), heldout_fraction=0.2)
    run(tmp_path / "two", many(tmp_path, monkeypatch), heldout_fraction=0.2, workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_finished_run_is_not_even_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    report = run(tmp_path / "out", source)
    before = raw_files_of(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("diffulm.data.prepare.scan", lambda *_, **__: pytest.fail("read again"))
        assert run(tmp_path / "out", source) == report
        with pytest.raises(ValueError, match="shorter than one window"):
            run(tmp_path / "out", source, min_window=10**6)
    os.utime(source.path, ns=(1, 1))  # another time: read, and found to be the same
    again = run(tmp_path / "out", source)
    assert again["sources"] == report["sources"]
    assert {k: v for k, v in raw_files_of(tmp_path / "out").items() if k != "prepare.json"} == {
        k: v for k, v in before.items() if k != "prepare.json"
    }


# -------------------------------------------------------------------------------------------------- part of a source


def test_limits_end_the_reading(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS).path
    size = len(TEXTS[0].encode())
    for options, expected in (
        ({"limit_documents": 7}, TEXTS[:7]),
        ({"limit_bytes": size}, TEXTS[:1]),
        ({"limit_bytes": size + 1}, TEXTS[:2]),
        ({"limit_bytes": 10**9, "limit_documents": 10**9}, TEXTS),
    ):
        assert [text for _, text in read(tmp_path, path, **options)] == expected
    (tmp_path / "b.txt").write_text("b")
    assert len(read(tmp_path, path, more=(str(tmp_path / "b.txt"),), limit_documents=60)) == 60
    assert len(read(tmp_path, path, more=(str(tmp_path / "b.txt"),), limit_documents=61)) == 61
    with pytest.raises(ValueError, match="at least 1"):
        Source("a", path, limit_bytes=0)


def test_a_split_of_a_dataset_as_far_as_its_limit(hub: Path) -> None:
    (hub / "corpus/README.md").write_text(
        "---\nconfigs:\n- config_name: both\n  data_files:\n  - split: train\n    path: x/train.parquet\n"
        "  - split: other\n    path: y/train.parquet\n---\n"
    )
    run(hub / "out", Source("a", "corpus:both", text_field="body", split="other"))
    assert sorted(both(hub / "out", "a")) == ["y one", "y two"]
    run(hub / "few", Source("a", "corpus:", text_field="body", subset="both", split="other", limit_documents=1))
    assert both(hub / "few", "a") == ["y one"]


def test_an_interrupted_stream_goes_on_where_it_was(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text number {i}" for i in range(40)]
    for part in range(4):
        parquet(hub / f"corpus/x/part{part}.parquet", texts[part * 10 : part * 10 + 10])
    (hub / "corpus/README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: x/part*.parquet\n---\n")
    monkeypatch.setattr(sources, "PART_BYTES", 60)
    source, cache = Source("a", "corpus:x", text_field="body"), hub / "out/.cache-1"
    cache.mkdir(parents=True)
    real, rows = sources.field, []

    def field(row: Any, *rest: Any) -> Any:
        rows.append(row)
        if len(rows) == 23:
            raise Killed
        return real(row, *rest)

    monkeypatch.setattr(sources, "field", field)
    with pytest.raises(Killed):
        sources.open_source(source, cache)
    again = sources.open_source(source, cache)
    assert [document.text for document in again()] == texts
    assert [document.id for document in again()] == [f"corpus:x:{i}" for i in range(40)]
    assert 40 < len(rows) < 40 + 10, "what was read is not read again"
    monkeypatch.setattr(sources, "_hub_stream", lambda *_: pytest.fail("asked the Hub again"))
    assert len(list(sources.open_source(source, cache)())) == 40


def test_files_behind_an_address_are_streamed(tmp_path: Path) -> None:
    """Any protocol of fsspec; here that of local files. A text file is one document, as it is on disk."""
    address = f"file://{jsonl(tmp_path / 'a.jsonl', TEXTS).path}"
    cache = tmp_path / "cache"
    cache.mkdir()
    assert [d.text for d in sources.open_source(Source("a", address), cache)()] == TEXTS
    with gzip.open(tmp_path / "c.jsonl.gz", "wb") as file:
        file.write(json.dumps({"text": "packed"}).encode())
    parquet(tmp_path / "d.parquet", ["x", "y"])
    (tmp_path / "b.txt").write_text("two\nlines\n")
    more = Source("b", f"file://{tmp_path}/b.txt", limit_documents=10)
    assert [d.text for d in sources.open_source(more, cache)()] == ["two\nlines\n"]
    for name, field, expected in (("c.jsonl.gz", "text", ["packed"]), ("d.parquet", "body", ["x", "y"])):
        found = Source("c", f"file://{tmp_path}/{name}", text_field=field)
        assert [d.text for d in sources.open_source(found, cache)()] == expected
    for path, message in (("file:///none/x.jsonl", "could not be opened"), ("s3://bucket/x.csv", r"must end in one")):
        with pytest.raises(ValueError, match=message):
            sources.open_source(Source("d", path), cache)


# ------------------------------------------------------------------------------------------------------- a dry run


def test_a_dry_run_counts_and_estimates(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    real = sum(len(TOKENIZER(text)["input_ids"]) for text in TEXTS)
    whole = estimate([source], TOKENIZER)["a"]
    assert (whole["documents"], whole["bytes"], whole["tokens"]) == (60, sum(map(len, TEXTS)), real)
    part = estimate([source], TOKENIZER, sample_bytes=300)["a"]
    assert part["sampled_bytes"] <= 300 and abs(part["tokens"] / real - 1) < 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_dry_run_of_a_dataset_reads_its_beginning(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(hub / "corpus/x/train.parquet", [f"text {i:04d}" for i in range(1000)])
    whole = Source("a", "corpus:x", text_field="body")
    assert estimate([whole], TOKENIZER)["a"]["documents"] == 1000
    found = estimate([whole], TOKENIZER, sample_bytes=90)["a"]
    assert (found["documents"], found["tokens"], found["streamed"]) == (None, None, True)
    assert "does not say" in next(iter(describe("a", found)))
    monkeypatch.setattr(data_estimate, "hub_size", lambda source: (1000, 123456))
    found = estimate([whole], TOKENIZER, sample_bytes=90)["a"]
    assert (found["documents"], found["bytes"]) == (1000, 9000)
    found = estimate([dataclasses.replace(whole, limit_documents=50)], TOKENIZER, sample_bytes=90)["a"]
    assert (found["documents"], found["bytes"]) == (50, 450)
    assert "50 documents" in next(iter(describe("a", found)))


# --------------------------------------------------------------------------------------------------------- split


def heldout_by_definition(texts: list[str], fraction: float) -> set[str]:
    digests = {text: hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts}
    return {text for text, digest in digests.items() if int.from_bytes(digest, "big") / 2**128 < fraction}


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_the_split_is_the_hash_of_the_text(tmp_path: Path, fraction: float) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    run(tmp_path / "out", source, heldout_fraction=fraction)
    assert set(texts_in(tmp_path / "out", "a", "heldout")) == heldout_by_definition(TEXTS, fraction)
    assert set(texts_in(tmp_path / "out", "a", "train")) == set(TEXTS) - heldout_by_definition(TEXTS, fraction)


def test_order_workers_and_duplicates_do_not_change_the_split(tmp_path: Path) -> None:
    run(tmp_path / "one", jsonl(tmp_path / "a.jsonl", TEXTS))
    again = jsonl(tmp_path / "a.jsonl", TEXTS)
    run(tmp_path / "two", again, workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    shuffled = [*TEXTS, *TEXTS[:7]]
    random.Random(0).shuffle(shuffled)
    report = run(tmp_path / "three", jsonl(tmp_path / "a.jsonl", shuffled))
    assert report["sources"]["a"]["duplicates"] == 7
    for split in ("train", "heldout"):
        assert sorted(texts_in(tmp_path / "one", "a", split)) == sorted(texts_in(tmp_path / "three", "a", split))


@pytest.mark.parametrize(("fraction", "sizes"), [(1e-9, (4, 1)), (1 - 1e-9, (1, 4)), (0.0, (5, 0))])
def test_neither_side_is_empty_by_chance(tmp_path: Path, fraction: float, sizes: tuple[int, int]) -> None:
    def digest(text: str) -> bytes:
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    report = run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", TEXTS[:5]), heldout_fraction=fraction)
    entry = report["sources"]["a"]
    assert (entry["train"]["documents"], entry["heldout"]["documents"]) == sizes
    if fraction == 1e-9:
        assert texts_in(tmp_path / "out", "a", "heldout") == [min(TEXTS[:5], key=digest)]
    if fraction == 1 - 1e-9:
        assert texts_in(tmp_path / "out", "a", "train") == [max(TEXTS[:5], key=digest)]


def test_a_single_document_is_trained_on(tmp_path: Path) -> None:
    report = run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", TEXTS[:1] * 3), heldout_fraction=0.999999)
    entry = report["sources"]["a"]
    assert (entry["train"]["documents"], entry["heldout"]["documents"], entry["duplicates"]) == (1, 0, 2)


def test_thirteen_grams_of_heldout_text_are_found_in_the_train_text_of_any_source(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(40)]
    heldout, fraction = " ".join(words), 0.05
    # Vary the end of a text until its hash puts it on the side wanted.
    quoted = next(t for n in range(999) if heldout_by_definition([t := f"{heldout} end{n}"], fraction))
    train = next(t for n in range(9) if not heldout_by_definition([t := f"{n} " + " ".join(words[:20])], fraction))
    other = next(t for n in range(9) if not heldout_by_definition([t := f"{n} " + " ".join(words[28:])], fraction))
    decoy = next(t for n in range(999) if heldout_by_definition([t := f"something short {n}"], fraction))
    longer = next(t for n in range(9) if not heldout_by_definition([t := f"{n} " + " ".join(words[27:])], fraction))
    # Every source has a text on either side by its hash alone, so that none is moved.
    sources = [jsonl(tmp_path / "a.jsonl", [quoted, train]), jsonl(tmp_path / "b.jsonl", [other, decoy])]
    # 41 words hold 29 13-grams; the train text shares words 0..19, that is 8 of them.
    assert run(tmp_path / "one", sources[0])["sources"]["a"]["ngram13"] == {"heldout": 29, "overlap": 8 / 29}
    # The second source shares words 28..39: 12 words, one too few.
    entries = run(tmp_path / "two", *sources)["sources"]
    assert entries["a"]["ngram13"] == {"heldout": 29, "overlap": 8 / 29}
    assert entries["b"]["ngram13"] == {"heldout": 0, "overlap": 0.0}
    sources[1] = jsonl(tmp_path / "b.jsonl", [longer, decoy])
    assert run(tmp_path / "three", *sources)["sources"]["a"]["ngram13"] == {"heldout": 29, "overlap": 9 / 29}


def test_ngrams_heed_the_order_of_words() -> None:
    words = [f"w{i}" for i in range(14)]
    assert len(np.intersect1d(ngrams(" ".join(words)), ngrams(" ".join(words[::-1])))) == 0
    assert ngrams(" ".join(words))[1] == ngrams(" \n".join(words[1:]))[0]
    assert len(ngrams("too short")) == 0


# ------------------------------------------------------------------------------------------------------- reading


def read(tmp_path: Path, path: Path | str, **options: Any) -> list[tuple[str, str]]:
    (tmp_path / "cache").mkdir(exist_ok=True)
    reader = sources.open_source(Source("s", str(path), **options), tmp_path / "cache")
    documents = [(document.id, document.text) for document in reader()]
    assert [(document.id, document.text) for document in reader()] == documents
    return documents


def test_a_folder_of_text_files_is_one_document_each(tmp_path: Path) -> None:
    root = tmp_path / "books"
    (root / "deep").mkdir(parents=True)
    (root / "b.txt").write_bytes(b"line\r\nend \xe2\x80\xa8here\r")
    (root / "deep/a.txt.gz").write_bytes(gzip.compress("zipped é".encode()))
    (root / "c.TXT").write_bytes(b"\xef\xbb\xbfmarked")
    (root / "d.jsonl").write_bytes(b'{"text": "one"}\n\n{"text": "two"}')
    (root / "notes.pdf").write_bytes(b"%PDF")
    (root / ".hidden.txt").write_bytes(b"no")
    assert read(tmp_path, root) == [
        ("b.txt", "line\r\nend \u2028here\r"),
        ("c.TXT", "marked"),
        ("d.jsonl:1", "one"),
        ("d.jsonl:3", "two"),
        ("deep/a.txt.gz", "zipped é"),
    ]
    assert read(tmp_path, root / "b.txt") == [("b.txt", "line\r\nend \u2028here\r")]
    report = run(tmp_path / "out", Source("books", str(root)))
    assert sorted(both(tmp_path / "out", "books")) == sorted(text for _, text in read(tmp_path, root))
    total = sum(report["sources"]["books"][split]["bytes"] for split in ("train", "heldout"))
    assert total == sum(len(text.encode()) for _, text in read(tmp_path, root))


@pytest.mark.parametrize("zipped", [False, True])
def test_jsonl_lines_end_at_newline_only(tmp_path: Path, zipped: bool) -> None:
    texts = ["a\r\nb", "c\u2028d\u2029e\x85f\x0bg\x1ch", "\r", "日本 🙂"]
    source = jsonl(tmp_path / "a.jsonl", texts, field="content")
    data = Path(source.path).read_bytes()
    assert "\u2028".encode() in data  # raw, not as an escape
    path = tmp_path / ("b.jsonl.gz" if zipped else "b.jsonl")
    data = data.replace(b"}\n", b"}\r\n")  # a file of CRLF lines holds the same texts
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert [text for _, text in read(tmp_path, path, text_field="content")] == texts
    run(tmp_path / "out", Source("a", str(path), text_field="content"))
    assert sorted(both(tmp_path / "out", "a")) == sorted(["a\r\nb", "c\u2028d\u2029e\x85f\x0bg\x1ch", "日本 🙂"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"a\.jsonl, line 2, is not valid JSON"),
        (b'["text"]', r"a\.jsonl, line 2, has no field 'text' \(found: list\)"),
        (b'{"txet": "x"}', r"line 2, has no field 'text' \(found: txet\); set the source's text_field"),
        (b'{"text": ["x"]}', "line 2,: field 'text' is list, not text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine too"}\n')
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", Source("a", str(tmp_path / "a.jsonl")))
    assert files_of(tmp_path / "out") == {}


def test_invalid_utf8_is_replaced_and_counted_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"caf\xe9 noir")
    (folder / "b.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff!"}\n{"text": "half \\ud83d pair"}\n')
    (folder / "c.txt").write_bytes(b"fine")
    report = run(tmp_path / "out", Source("a", str(folder)))
    assert report["sources"]["a"]["invalid_utf8"] == 3
    assert {"caf\ufffd noir", "\ufffd!", "half \ufffd pair"} < set(both(tmp_path / "out", "a"))
    with pytest.raises(ValueError, match=r"a\.txt is not valid UTF-8 at byte 3"):
        run(tmp_path / "strict", Source("a", str(folder)), strict=True)
    (folder / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2, is not valid UTF-8 at byte 25"):
        run(tmp_path / "strict", Source("a", str(folder)), strict=True)
    (folder / "b.jsonl").unlink()
    run(tmp_path / "strict", Source("a", str(folder)), strict=True)


@pytest.mark.parametrize("keep", [5, -5])
def test_a_broken_gzip_file_is_named(tmp_path: Path, keep: int) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some text that is long enough")[:keep])
    with pytest.raises(ValueError, match=r"a\.txt\.gz is no whole gzip file"):
        run(tmp_path / "out", Source("a", str(tmp_path / "a.txt.gz")))


def parquet(path: Path, texts: list[str | None]) -> None:
    pa.parquet.write_table(pa.table({"n": list(range(len(texts))), "body": texts}), path)


def test_parquet_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    parquet(tmp_path / "in/a.parquet", ["first\r\n", None, "third"])
    parquet(tmp_path / "in/b.parquet", ["fourth"])
    wanted = [("a.parquet:0", "first\r\n"), ("a.parquet:1", ""), ("a.parquet:2", "third"), ("b.parquet:0", "fourth")]
    assert read(tmp_path, tmp_path / "in", text_field="body") == wanted
    report = run(tmp_path / "out", Source("a", str(tmp_path / "in"), text_field="body"))
    assert sorted(both(tmp_path / "out", "a")) == ["first\r\n", "fourth", "third"]
    assert report["sources"]["a"]["empty"] == 1
    with pytest.raises(ValueError, match=r"no field 'text' \(found: n, body\)"):
        run(tmp_path / "other", Source("a", str(tmp_path / "in")))
    (tmp_path / "in/a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet"):
        run(tmp_path / "other", Source("a", str(tmp_path / "in"), text_field="body"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A dataset with two configs, named as one on the Hub is: `name:config` is no path that exists."""
    (tmp_path / "corpus/x").mkdir(parents=True)
    (tmp_path / "corpus/y").mkdir()
    parquet(tmp_path / "corpus/x/train.parquet", ["x one", "x two"])
    parquet(tmp_path / "corpus/y/train.parquet", ["y one", "y two"])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train.parquet\n" for name in "xy")
    (tmp_path / "corpus/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_a_hub_dataset_is_loaded_by_name_and_config(hub: Path) -> None:
    run(hub / "out", Source("a", "corpus:y", text_field="body"))
    assert sorted(both(hub / "out", "a")) == ["y one", "y two"]
    assert sorted(path.name for path in (hub / "out").iterdir()) == ["a", "prepare.json"]
    with pytest.raises(ValueError, match=r"'corpus:z'.*could be loaded"):
        run(hub / "other", Source("a", "corpus:z", text_field="body"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.txt", "there is no file or folder nowhere.txt"),
        ("/nowhere/at/all", "there is no file or folder"),
        ("builtin:novels", "use builtin:topics or builtin:stdlib"),
        ("empty", "is or holds none of .txt"),
        ("paper.pdf", "is or holds none of .txt"),
    ],
)
def test_a_source_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "paper.pdf").touch()
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", Source("a", path))


def test_train_documents_that_repeat_held_out_passages_are_left_out(tmp_path: Path) -> None:
    texts = [" ".join(f"w{i}x{j}" for j in range(60)) for i in range(40)]
    clean = jsonl(tmp_path / "clean.jsonl", texts)
    run(tmp_path / "first", clean, heldout_fraction=0.2)
    held = texts_in(tmp_path / "first", "clean", "heldout")
    train = texts_in(tmp_path / "first", "clean", "train")
    # One train document quotes 40 words of a held-out one, another only 20 (8 shared 13-grams).
    quoting, mentioning = " ".join(held[0].split()[:40]) + " and more", " ".join(held[0].split()[:20]) + " and less"
    for name, extra in (("quotes", [quoting, mentioning]), ("again", [mentioning, quoting])):
        source = jsonl(tmp_path / f"{name}.jsonl", train + held + extra)
        found = run(tmp_path / name, source, heldout_fraction=0.2)["sources"][name]
        kept = texts_in(tmp_path / name, name, "train")
        if quoting in texts_in(tmp_path / name, name, "heldout"):
            pytest.skip("the hash put the quotation among the held-out documents")
        assert quoting not in kept and mentioning in both(tmp_path / name, name)
        assert found["repeats_left_out"] >= 1 and found["ngram13"]["overlap"] < 0.05


def test_shared_boilerplate_is_kept_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    licence = " ".join(f"licence{j}" for j in range(60))
    source = jsonl(tmp_path / "files.jsonl", [f"{licence} file {i}" for i in range(40)])
    found = run(tmp_path / "out", source, heldout_fraction=0.2)["sources"]["files"]
    assert found["repeats_left_out"] == 0 and found["train"]["documents"] + found["heldout"]["documents"] == 40
    assert "share passages" in caplog.text and found["ngram13"]["overlap"] > 0.8


# ------------------------------------------------------------------------------------------------------ built in


def test_topics_are_all_there(tmp_path: Path) -> None:
    report = run(tmp_path / "out", Source("topics", "builtin:topics"), heldout_fraction=0.0)
    entry = report["sources"]["topics"]
    assert sorted(both(tmp_path / "out", "topics")) == sorted(set(topics.values()))
    assert entry["duplicates"] == len(topics) - len(set(topics.values()))
    assert dict(read(tmp_path, "builtin:topics")) == topics


def test_the_standard_library_without_its_tests(tmp_path: Path) -> None:
    documents = read(tmp_path, "builtin:stdlib")
    names = [name for name, _ in documents]
    assert names == sorted(names)
    assert {"json/decoder.py", "argparse.py", "asyncio/base_events.py"} <= set(names)
    skipped = {"site-packages", "test", "tests", "encodings", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
    assert not [name for name in names if skipped & set(name.split("/")) or "_sysconfigdata" in name]
    assert all(300 <= len(text) <= 200_000 for _, text in documents)
    library = Path(sysconfig.get_path("stdlib"))
    assert dict(documents)["argparse.py"].encode() == (library / "argparse.py").read_bytes()


def test_excluded_documents_are_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exclude = ("[a-ik-z_]*", "json/d*", "no/such/*")
    report = run(tmp_path / "out", Source("std", "builtin:stdlib", exclude=exclude))
    library = Path(sysconfig.get_path("stdlib"))
    wanted = ["json/__init__.py", "json/encoder.py", "json/scanner.py", "json/tool.py"]
    assert sorted(both(tmp_path / "out", "std")) == sorted((library / name).read_text() for name in wanted)
    assert report["sources"]["std"]["excluded"] == len(read(tmp_path, "builtin:stdlib")) - len(wanted)
    assert report["sources"]["std"]["unused_exclude"] == ["no/such/*"]
    assert "no/such/*" in caplog.text


# ------------------------------------------------------------------------------------------------------- refused


def test_empty_documents_are_counted_and_text_that_is_all_empty_is_refused(tmp_path: Path) -> None:
    report = run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", ["", " \n", None, "text", "more"]))
    assert report["sources"]["a"]["empty"] == 3
    with pytest.raises(ValueError, match="has no text: 2 documents are empty, 0 excluded"):
        run(tmp_path / "empty", jsonl(tmp_path / "a.jsonl", ["", "\n"]))
    with pytest.raises(ValueError, match="has no text: 0 documents are empty, 2 excluded"):
        run(tmp_path / "empty", Source("a", jsonl(tmp_path / "a.jsonl", ["x", "y"]).path, exclude=("*",)))


def test_text_shorter_than_one_window(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS[:1])
    tokens = len(TOKENIZER(TEXTS[0])["input_ids"])
    with pytest.raises(ValueError, match=f"text shorter than one window: {tokens} train tokens, {tokens + 1} needed"):
        run(tmp_path / "out", source, min_window=tokens + 1)
    assert not (tmp_path / "out/prepare.json").exists()
    run(tmp_path / "out", source, min_window=tokens)
    with pytest.raises(ValueError, match="text shorter than one window"):
        run(tmp_path / "out", source, min_window=tokens + 1)


@pytest.mark.parametrize(
    "options",
    [{"heldout_fraction": 1.0}, {"heldout_fraction": -0.1}, {"heldout_fraction": float("nan")}, {"workers": 0}],
)
def test_bad_settings(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be in"):
        run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", TEXTS), **options)
    assert not (tmp_path / "out").exists()


def test_bad_sources(tmp_path: Path) -> None:
    for name in ("", "../up", "a/b", "a b", ".a", "prepare.json"):
        with pytest.raises(ValueError, match="becomes a folder"):
            Source(name, "builtin:topics")
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="weight"):
            Source("a", "builtin:topics", weight=weight)
    with pytest.raises(ValueError, match="different names"):
        run(tmp_path / "out", Source("a", "builtin:topics"), Source("a", "builtin:stdlib"))
    with pytest.raises(ValueError, match="one or more sources"):
        run(tmp_path / "out")


def test_the_caller_s_progress_bars_stay_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    import datasets

    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    assert not datasets.are_progress_bars_disabled()
    run(tmp_path / "quiet", source)
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()
    prepare([source], TOKENIZER, tmp_path / "loud")
    assert "tokenise a" in capfd.readouterr().err


def test_importing_loads_neither_torch_nor_datasets() -> None:
    code = "import sys, diffulm.data.prepare; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


def test_the_name_of_a_special_token_is_ordinary_text(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(mask="<|mask|>")
    special = set(tokenizer.all_special_ids)
    texts = [f"before <|mask|> and </s> after {i}" for i in range(20)]
    run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", texts), tokenizer=tokenizer)
    seen = []
    for split in ("train", "heldout"):
        store = TokenStore.open(tmp_path / "out" / "a" / split)
        for i in range(len(store)):
            ids = store.document(i).tolist()
            assert not special & set(ids)
            seen.append(tokenizer.decode(ids))
    assert sorted(seen) == sorted(texts)


def test_text_is_encoded_as_transformers_would() -> None:
    tokenizer = build_tokenizer(mask="<|mask|>")
    tokenizer.backend_tokenizer.enable_truncation(3)
    texts = [*TEXTS[:5], "<s> <|mask|></s>", "", "日本 🙂"]
    ids = pieces.encode_plain(tokenizer, texts)
    expected = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == expected and max(map(len, ids)) > 3
    assert tokenizer("<|mask|>")["input_ids"] == [tokenizer.mask_token_id], "its own calls are as before"


def test_several_paths_are_one_body_of_text(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"chapter{i}.txt").write_text(f"chapter {i} " * 20)
    lines = jsonl(tmp_path / "notes.jsonl", [f"note {i}" for i in range(5)])
    paths = [str(tmp_path / f"chapter{i}.txt") for i in range(3)] + [lines.path]
    found = run(tmp_path / "out", Source("text", paths[0], more=tuple(paths[1:])))["sources"]["text"]
    assert found["train"]["documents"] + found["heldout"]["documents"] == 8 and found["heldout"]["documents"] >= 1
    texts = both(tmp_path / "out", "text")
    assert sorted(t for t in texts if t.startswith("note")) == [f"note {i}" for i in range(5)]
    with pytest.raises(ValueError, match="no file or folder"):
        run(tmp_path / "other", Source("text", paths[0], more=(str(tmp_path / "gone.txt"),)))
