"""The shard format: what is written comes back, what is damaged does not open."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffulm.data.tokens import ShardWriter, TokenStore, smallest_dtype, write_shards

KEYS = {"tokenizer": "a" * 64, "source": "b" * 64}
DOCUMENTS = [([5, 6, 7], 3), ([], 0), ([65535], 9), (list(range(40)), 41), ([1, 2], 2)]


def same(store: TokenStore, documents: list[tuple[list[int], int]]) -> None:
    assert len(store) == store.documents == len(documents)
    assert store.tokens == sum(len(ids) for ids, _ in documents)
    assert store.bytes == sum(n_bytes for _, n_bytes in documents)
    assert store.lengths.dtype == np.int64
    assert store.lengths.tolist() == [len(ids) for ids, _ in documents]
    for i, (ids, n_bytes) in enumerate(documents):
        assert store.document(i).dtype == np.int64
        assert store.document(i).tolist() == ids
        assert store.document_bytes(i) == n_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of several shards."""
    write_shards(tmp_path / "store", DOCUMENTS, dtype="uint16", **KEYS, shard_tokens=4)
    assert len(list((tmp_path / "store").glob("*.bin"))) == 3
    return tmp_path / "store"


documents_of = st.lists(st.tuples(st.lists(st.integers(0, 2**16 - 1), max_size=9), st.integers(0, 2**40)), max_size=12)


@settings(max_examples=40, deadline=None)
@given(documents=documents_of, dtype=st.sampled_from(["uint16", "uint32"]), shard_tokens=st.integers(1, 30))
def test_round_trip(documents: list[tuple[list[int], int]], dtype: str, shard_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        write_shards(Path(place), iter(documents), dtype=dtype, **KEYS, shard_tokens=shard_tokens)
        store = TokenStore.open(Path(place), tokenizer=KEYS["tokenizer"])
        same(store, documents)
        assert (store.tokenizer, store.source) == (KEYS["tokenizer"], KEYS["source"])
        assert sum(file.stat().st_size for file in Path(place).glob("*.bin")) == store.tokens * np.dtype(dtype).itemsize


def test_ids_are_little_endian_and_nothing_is_added_between_documents(tmp_path: Path) -> None:
    write_shards(tmp_path, [([1, 258], 4), ([3], 1)], dtype="uint16", **KEYS)
    assert (tmp_path / "shard-00000.bin").read_bytes() == bytes([1, 0, 2, 1, 3, 0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "shard-00000.bin", "shard-00000.idx.npy", "shard-00000.json",
    ]  # fmt: skip


def test_big_ids_need_uint32(tmp_path: Path) -> None:
    same(write_shards(tmp_path / "wide", [([2**32 - 1], 1)], dtype="uint32", **KEYS), [([2**32 - 1], 1)])
    with pytest.raises(ValueError, match="do not fit uint16"):
        write_shards(tmp_path / "narrow", [([2**16], 1)], dtype="uint16", **KEYS)
    assert (smallest_dtype(2**16), smallest_dtype(2**16 + 1)) == ("uint16", "uint32")


@pytest.mark.parametrize("ids", [[-1], [1.5], [[1, 2]]])
def test_what_is_no_row_of_ids_is_refused(tmp_path: Path, ids: list) -> None:
    with pytest.raises(ValueError):
        write_shards(tmp_path, [(ids, 1)], dtype="uint16", **KEYS)
    assert not list(tmp_path.iterdir())


def test_a_document_is_a_copy_and_numbers_outside_are_refused(folder: Path) -> None:
    store = TokenStore.open(folder)
    store.document(0)[:] = 0
    assert store.document(0).tolist() == [5, 6, 7]
    for i in (-1, len(DOCUMENTS)):
        with pytest.raises(IndexError):
            store.document(i)


def test_every_flipped_bit_is_noticed(folder: Path) -> None:
    for path in [*folder.glob("*.bin"), *folder.glob("*.npy")]:
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(ValueError, match=r"corrupt.*prepare"):
                TokenStore.open(folder)
        path.write_bytes(whole)
    same(TokenStore.open(folder), DOCUMENTS)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("change", [-1, 1])
def test_truncated_or_grown_tokens(folder: Path, change: int, verify: bool) -> None:
    path = folder / "shard-00001.bin"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0")
    with pytest.raises(ValueError, match=r"shard-00001\.bin is truncated or grown.*prepare the text again"):
        TokenStore.open(folder, verify=verify)


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", None])
def test_a_broken_index_is_noticed_without_checksums(folder: Path, data: bytes | None) -> None:
    other = (folder / "shard-00002.idx.npy").read_bytes()
    (folder / "shard-00000.idx.npy").write_bytes(other if data is None else data)
    with pytest.raises(ValueError, match=r"shard-00000\.idx\.npy"):
        TokenStore.open(folder, verify=False)


def test_an_index_of_pickled_objects_is_never_loaded(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(folder / "ran"),)

    np.save(folder / "shard-00000.idx.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not an index"):
        TokenStore.open(folder, verify=False)
    assert not (folder / "ran").exists()


def test_another_tokenizers_store(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"another tokenizer \(aaaaaaaaaaaa, this one is cc.*with this tokenizer"):
        TokenStore.open(folder, tokenizer="c" * 64)
    same(TokenStore.open(folder, tokenizer="a" * 64), DOCUMENTS)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no token store at"):
        TokenStore.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no finished shard"):
        TokenStore.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 2}, "shard format 2"), ({"tokens": "7"}, "damaged .tokens"), ({"dtype": "int8"}, "damaged .dtype")],
)
def test_unknown_format_and_damaged_header(folder: Path, change: dict, message: str) -> None:
    path = folder / "shard-00001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        TokenStore.open(folder)


def test_a_header_that_is_not_json(folder: Path) -> None:
    (folder / "shard-00001.json").write_text('{"format": 1,')
    with pytest.raises(ValueError, match="not valid JSON"):
        TokenStore.open(folder)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("suffix", [".json", ".bin", ".idx.npy"])
def test_a_lost_file_is_noticed(folder: Path, number: int, suffix: str) -> None:
    (folder / f"shard-{number:05d}{suffix}").unlink()
    with pytest.raises(ValueError, match=r"missing.*prepare"):
        TokenStore.open(folder)


def test_shards_of_two_sources_do_not_mix(folder: Path) -> None:
    path = folder / "shard-00001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": "d" * 64}))
    with pytest.raises(ValueError, match="mixes"):
        TokenStore.open(folder)


@pytest.mark.parametrize("fails", [0, 1, 4])
def test_an_exception_leaves_no_store_and_a_new_writer_starts_over(tmp_path: Path, fails: int) -> None:
    def documents():
        for i, document in enumerate(DOCUMENTS):
            if i == fails:
                raise OSError(28, "No space left on device")
            yield document

    with pytest.raises(OSError, match="No space left"):
        write_shards(tmp_path, documents(), dtype="uint16", **KEYS, shard_tokens=4)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="prepare"):
        TokenStore.open(tmp_path)
    same(write_shards(tmp_path, DOCUMENTS[3:], dtype="uint16", **KEYS), DOCUMENTS[3:])
    TokenStore.open(tmp_path)


@pytest.mark.parametrize("call", range(1, 7))
def test_a_disk_that_fails_at_any_sync_leaves_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Two shards sync six files (tokens, index, header each); whichever fails, nothing passes for finished."""
    real, files = os.fsync, []

    def fsync(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            files.append(descriptor)
            if len(files) == call:
                raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        write_shards(tmp_path, [([1, 2], 2), ([3], 1)], dtype="uint16", **KEYS, shard_tokens=2)
    with pytest.raises(ValueError, match="prepare"):
        TokenStore.open(tmp_path)


def test_a_finished_store_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(ValueError, match="already holds a finished token store"):
        ShardWriter(folder, dtype="uint16", **KEYS)
    same(TokenStore.open(folder), DOCUMENTS)


@pytest.mark.parametrize(
    ("settings_", "message"), [({"dtype": "int8"}, "dtype"), ({"shard_tokens": 0}, "shard_tokens")]
)
def test_bad_settings(tmp_path: Path, settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardWriter(tmp_path, **({"dtype": "uint16"} | KEYS | settings_))


def test_reading_tokens_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, diffulm.data.tokens; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
