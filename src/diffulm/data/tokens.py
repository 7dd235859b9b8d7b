"""The token store: documents as token ids on disk, read back without loading them into memory.

A store is a folder of shards. Shard n is three files:

    shard-0000n.bin       token ids of its documents, one after the other, little-endian uint16 or uint32; nothing
                          is added between documents (where bos and eos go is the loader's decision)
    shard-0000n.idx.npy   int64 (2, documents + 1): where each document starts, in tokens (row 0) and in UTF-8
                          bytes of its text (row 1); the last column holds the totals
    shard-0000n.json      the header: format, tokenizer, source, dtype, totals, checksums, whether it is the last

The header is written last, so a shard without one does not exist; the last shard says so, so a store that lost its
tail is noticed. Plain numpy, no pickle, no torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffulm.runtime import fsync_folder, read_json, write_atomic

FORMAT = 1
#: Tokens after which a new shard is begun: 256 MiB of uint16. A document is never cut, so a shard may be longer.
SHARD_TOKENS = 2**27
#: Bytes of tokens up to which opening a store also compares checksums: a few seconds of reading.
VERIFY_BYTES = 2**32

_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_HEADER = {
    "tokenizer": str, "source": str, "dtype": str, "last": bool,
    "tokens": int, "documents": int, "bytes": int, "crc32_bin": int, "crc32_idx": int,
}  # fmt: skip


def smallest_dtype(vocab_size: int) -> str:
    """`uint16` where every id below `vocab_size` fits, else `uint32`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


# ------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes one token store, a document at a time; use as a context manager.

    When the block raises, the shard being written is discarded and the store stays unfinished (`TokenStore.open`
    refuses it, a new writer replaces it). ValueError when the folder already holds a finished store.
    """

    def __init__(
        self, folder: Path, *, dtype: str, tokenizer: str, source: str, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        """`tokenizer` and `source` are fingerprints, kept in every header; `shard_tokens` is a soft limit, tokens."""
        if dtype not in _DTYPES:
            raise ValueError(f"unknown token dtype {dtype!r}: use {' or '.join(_DTYPES)}")
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens is {shard_tokens}: a shard holds at least 1 token")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        leftovers = [*self.folder.glob("shard-*"), *self.folder.glob(".shard-*")]
        if any(path.suffix == ".json" and read_json(path).get("last") for path in leftovers):
            raise ValueError(f"{self.folder} already holds a finished token store; delete it or choose another folder")
        for path in leftovers:
            path.unlink()
        self._dtype, self._shard_tokens = _DTYPES[dtype], shard_tokens
        self._header: dict[str, Any] = {"format": FORMAT, "tokenizer": tokenizer, "source": source, "dtype": dtype}
        self._number, self._crc = 0, 0
        self._begin()

    def add(self, ids: ArrayLike, n_bytes: int) -> None:
        """Append one document: `ids` (length,) integers, `n_bytes` the UTF-8 length of its text.

        ValueError when `ids` is not a flat row of integers that fit the dtype.
        """
        row = np.asarray(ids)
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iu") or n_bytes < 0:
            raise ValueError(f"a document is a row of integers and a byte count, not {row.dtype}{row.shape}, {n_bytes}")
        if row.size and (int(row.min()) < 0 or int(row.max()) > np.iinfo(self._dtype).max):
            raise ValueError(f"ids {row.min()}..{row.max()} do not fit {self._header['dtype']}; see smallest_dtype()")
        if self._starts[-1] and self._starts[-1] + row.size > self._shard_tokens:
            self._finish(last=False)
            self._begin()
        data = row.astype(self._dtype).tobytes()
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self._starts.append(self._starts[-1] + row.size)
        self._bytes.append(self._bytes[-1] + n_bytes)

    def close(self) -> None:
        """Finish the last shard; from here on the store exists."""
        self._finish(last=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            with contextlib.suppress(OSError):  # a full disk fails again when the buffer is flushed
                self._file.close()
            self._aside.unlink(missing_ok=True)

    def _begin(self) -> None:
        self._aside = self.folder / f".{_name(self._number)}.bin.tmp"
        self._file: IO[bytes] = self._aside.open("wb")
        self._crc = 0
        self._starts: array[int] = array("q", [0])  # a list would take 5 times the memory
        self._bytes: array[int] = array("q", [0])

    def _finish(self, *, last: bool) -> None:
        """Tokens, then index, then header: each is on the disk before the next one names it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        stem = _name(self._number)
        self._aside.replace(self.folder / f"{stem}.bin")
        buffer = io.BytesIO()
        np.save(buffer, np.array([self._starts, self._bytes], dtype="<i8"), allow_pickle=False)
        write_atomic(self.folder / f"{stem}.idx.npy", buffer.getvalue())
        fsync_folder(self.folder)
        header = self._header | {
            "tokens": self._starts[-1],
            "documents": len(self._starts) - 1,
            "bytes": self._bytes[-1],
            "crc32_bin": self._crc,
            "crc32_idx": zlib.crc32(buffer.getvalue()),
            "last": last,
        }
        write_atomic(self.folder / f"{stem}.json", json.dumps(header, indent=1) + "\n")
        self._number += 1


def write_shards(
    folder: Path,
    documents: Iterable[tuple[ArrayLike, int]],
    *,
    dtype: str,
    tokenizer: str,
    source: str,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenStore:
    """Write `documents`, pairs (token ids, UTF-8 bytes of the text), as one store and open it. Errors: ShardWriter."""
    with ShardWriter(folder, dtype=dtype, tokenizer=tokenizer, source=source, shard_tokens=shard_tokens) as writer:
        for ids, n_bytes in documents:
            writer.add(ids, n_bytes)
    return TokenStore.open(folder, verify=False)


# ------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Shard:
    header: dict[str, Any]
    ids: NDArray[Any]  # (tokens,), memory-mapped
    index: NDArray[np.int64]  # (2, documents + 1): starts in tokens, in bytes


class TokenStore:
    """A finished store, read-only. Documents are numbered over all shards in the order they were written.

    `documents`, `tokens`, `bytes` are totals; `tokenizer`, `source` the fingerprints it was written with. Tokens and
    index are mapped, so that opening costs the same for any size, and processes share what they read.
    """

    def __init__(self, folder: Path, shards: list[_Shard]) -> None:
        self.folder = folder
        self._shards = shards
        self._first = np.cumsum([0] + [shard.header["documents"] for shard in shards])
        # Where each shard starts in the documents joined, each with one token (EOS) after it.
        self._joined = np.cumsum([0] + [shard.header["tokens"] + shard.header["documents"] for shard in shards])
        self.documents: int = sum(shard.header["documents"] for shard in shards)
        self.tokens: int = sum(shard.header["tokens"] for shard in shards)
        self.bytes: int = sum(shard.header["bytes"] for shard in shards)
        self.tokenizer: str = shards[0].header["tokenizer"]
        self.source: str = shards[0].header["source"]

    @property
    def index_crc(self) -> int:
        """A checksum of where the documents lie: whatever is derived from their lengths belongs to it."""
        return zlib.crc32(repr([shard.header["crc32_idx"] for shard in self._shards]).encode())

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every document, int64 (documents,); made anew each time, since it is as long as the store."""
        return np.concatenate([np.diff(shard.index[0]) for shard in self._shards])

    @classmethod
    def open(cls, folder: Path, *, tokenizer: str | None = None, verify: bool | None = None) -> TokenStore:
        """Open the store in `folder`, made with the tokenizer of that fingerprint (None: any).

        Sizes are always checked; `verify` also reads everything once to compare checksums (None: where that is less
        than VERIFY_BYTES; `prepare` has verified the rest). ValueError, with what to do, for a missing, unfinished,
        truncated or corrupt store, another format, another tokenizer's.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"there is no token store at {folder}; prepare the text first")
        headers = sorted(folder.glob("shard-*.json"))
        if not headers:
            raise ValueError(f"{folder} holds no finished shard; prepare the text (again) into it")
        if verify is None:
            verify = (
                sum(path.with_suffix(".bin").stat().st_size for path in headers if path.with_suffix(".bin").is_file())
                <= VERIFY_BYTES
            )
        shards = []
        for number, path in enumerate(headers):
            header = _read_header(path, tokenizer)
            if path.stem != _name(number) or header["last"] != (path == headers[-1]):
                raise ValueError(f"{folder} is not a whole store (a shard is missing or left over); prepare it again")
            shards.append(_open_shard(folder / path.stem, header, verify))
        if len({(shard.header["tokenizer"], shard.header["source"]) for shard in shards}) > 1:
            raise ValueError(f"{folder} mixes shards of different tokenizers or sources; prepare it again")
        return cls(folder, shards)

    def __len__(self) -> int:
        return self.documents

    def document(self, i: int, start: int = 0, n: int | None = None) -> NDArray[np.int64]:
        """Token ids of document `i`, or `n` of them from `start` on: int64, a copy. IndexError for no such document."""
        shard, j = self._locate(i)
        first, end = int(shard.index[0, j]), int(shard.index[0, j + 1])
        stop = end if n is None else min(end, first + start + n)
        return np.asarray(shard.ids[first + start : stop], dtype=np.int64)

    def document_bytes(self, i: int) -> int:
        """UTF-8 bytes of the text of document `i`."""
        shard, j = self._locate(i)
        return int(shard.index[1, j + 1] - shard.index[1, j])

    def at(self, position: int) -> tuple[int, int]:
        """(document, token inside it) of a position in the documents joined, each with one token after its last.

        A bisection of the mapped index: about `log2(documents)` of its entries are read.
        """
        number = int(np.searchsorted(self._joined, position, side="right")) - 1
        starts = self._shards[number].index[0]
        local = position - int(self._joined[number])
        low, high = 0, len(starts) - 1  # starts[low] + low <= local < starts[high] + high
        while high - low > 1:
            middle = (low + high) // 2
            if int(starts[middle]) + middle <= local:
                low = middle
            else:
                high = middle
        return int(self._first[number]) + low, local - int(starts[low]) - low

    def _locate(self, i: int) -> tuple[_Shard, int]:
        if not 0 <= i < self.documents:
            raise IndexError(f"document {i} of a store of {self.documents}")
        # side="right" steps over shards without documents
        number = int(np.searchsorted(self._first, i, side="right")) - 1
        return self._shards[number], i - int(self._first[number])


def _name(number: int) -> str:
    return f"shard-{number:05d}"


def _read_header(path: Path, tokenizer: str | None) -> dict[str, Any]:
    """The header in `path`, complete and of this format and tokenizer, else ValueError."""
    header = read_json(path)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise ValueError(f"{path} has shard format {found!r}, this version reads {FORMAT}; prepare the text again")
    wrong = [key for key, kind in _HEADER.items() if type(header.get(key)) is not kind]
    if wrong or header["dtype"] not in _DTYPES:
        raise ValueError(f"{path} is damaged ({', '.join(wrong) or 'dtype'}); prepare the text again")
    if tokenizer is not None and header["tokenizer"] != tokenizer:
        raise ValueError(
            f"{path.parent} was written with another tokenizer ({header['tokenizer'][:12]}, this one is "
            f"{tokenizer[:12]}); prepare the text again with this tokenizer"
        )
    return header


def _open_shard(stem: Path, header: dict[str, Any], verify: bool) -> _Shard:
    """Map the tokens and read the index of one shard; ValueError when either is not what the header says."""
    tokens_file, index_file = stem.with_name(f"{stem.name}.bin"), stem.with_name(f"{stem.name}.idx.npy")
    for path in (tokens_file, index_file):
        if not path.is_file():
            raise ValueError(f"{path} is missing; prepare the text again")
    dtype = _DTYPES[header["dtype"]]
    expected, size = header["tokens"] * dtype.itemsize, tokens_file.stat().st_size
    if size != expected:
        raise ValueError(f"{tokens_file} is truncated or grown ({size} bytes, not {expected}); prepare the text again")
    if verify and (_crc32(tokens_file) != header["crc32_bin"] or _crc32(index_file) != header["crc32_idx"]):
        raise ValueError(f"{stem} is corrupt (its checksum differs from the header's); prepare the text again")
    try:
        index = np.load(index_file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{index_file} is not an index of documents; prepare the text again") from error
    fits = index.dtype == np.int64 and index.shape == (2, header["documents"] + 1)
    if not fits or [*index[:, 0], *index[:, -1]] != [0, 0, header["tokens"], header["bytes"]]:
        raise ValueError(f"{index_file} does not fit its header; prepare the text again")
    # an empty file cannot be mapped
    ids = np.memmap(tokens_file, dtype=dtype, mode="r") if expected else np.empty(0, dtype)
    return _Shard(header, ids, index)


def _crc32(path: Path, block: int = 2**24) -> int:
    crc = 0
    with path.open("rb") as file:
        while data := file.read(block):
            crc = zlib.crc32(data, crc)
    return crc
