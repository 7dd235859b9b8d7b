"""What preparing text would give and take, from counting it and tokenising a sample: `diffulm prepare --dry-run`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import Document
from .pieces import encode_plain
from .sources import Source, head_of_stream, hub_size, is_stream, open_source, progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: UTF-8 bytes of text tokenised to estimate the rest.
SAMPLE_BYTES = 2**21


def estimate(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, *, workers: int = 1, sample_bytes: int = SAMPLE_BYTES
) -> dict[str, Any]:
    """Documents, bytes, estimated tokens and seconds per source; nothing is written.

    Files are read to their end (reading takes a hundredth of tokenising); of a Hub dataset only the beginning is, and
    its size is what the Hub says, None where it says nothing. Documents left out (repeated, excluded) still count.
    ValueError: as `prepare`.
    """
    with tempfile.TemporaryDirectory() as cache, progress_bars(False):
        return {source.name: _one(source, tokenizer, workers, sample_bytes, Path(cache)) for source in sources}


def _one(source: Source, tokenizer: Any, workers: int, sample_bytes: int, cache: Path) -> dict[str, Any]:
    start = time.perf_counter()
    streamed = any(is_stream(path) for path in (source.path, *source.more))
    if streamed:
        sample, documents, n_bytes = _from_stream(source, sample_bytes)
        reading = 0.0
    else:
        sample, documents, n_bytes = _from_files(open_source(source, cache)(), sample_bytes)
        reading = time.perf_counter() - start
    size = sum(len(text.encode()) for text in sample)
    if not size:
        raise ValueError(f"source {source.name!r} ({source.path}) has no text")
    start = time.perf_counter()
    rows = encode_plain(tokenizer, sample)
    rate = size / (time.perf_counter() - start)
    tokens = None if n_bytes is None else round(sum(map(len, rows)) / size * n_bytes)
    return {
        "documents": documents,
        "bytes": n_bytes,
        "tokens": tokens,
        "bytes_per_token": size / sum(map(len, rows)),
        "bytes_per_second_per_process": rate,
        # A scan, and a second reading beside the processes that tokenise.
        "seconds": None if n_bytes is None else reading + max(reading, n_bytes / rate / workers),
        "sampled_bytes": size,
        "streamed": streamed,
    }


def _from_files(documents: Iterator[Document], sample_bytes: int) -> tuple[list[str], int, int]:
    """(sample spread evenly over the documents, documents, bytes). Every n-th is kept, n doubling when it is full."""
    sample: list[tuple[int, str]] = []
    held = n_bytes = count = 0
    every = 1
    for number, document in enumerate(documents):
        size = len(document.text.encode())
        count, n_bytes = number + 1, n_bytes + size
        if number % every == 0:
            sample.append((number, document.text))
            held += size
            while held > sample_bytes and len(sample) > 1:
                every *= 2
                sample = [(n, text) for n, text in sample if n % every == 0]
                held = sum(len(text.encode()) for _, text in sample)
    return [text for _, text in sample], count, n_bytes


def _from_stream(source: Source, sample_bytes: int) -> tuple[list[str], int | None, int | None]:
    """(texts at the beginning, rows, bytes), within the source's limits."""
    texts: list[str] = []
    size = 0
    ended = True
    for text in head_of_stream(source):
        if size >= sample_bytes:
            ended = False
            break
        texts.append(text)
        size += len(text.encode())
    if ended:
        return texts, len(texts), size
    said = hub_size(source)
    mean = size / len(texts)
    rows, n_bytes = said if said else (None, None)
    if rows is not None:
        n_bytes = round(rows * mean)  # what the Hub says counts other columns too
    for limit in [source.limit_bytes, source.limit_documents and round(source.limit_documents * mean)]:
        if limit and (n_bytes is None or limit < n_bytes):
            rows, n_bytes = round(limit / mean), limit
    return texts, rows, n_bytes


def describe(name: str, found: dict[str, Any]) -> Iterator[str]:
    """An estimate in words."""
    if found["bytes"] is None:
        yield f"{name}: the Hub does not say how much there is; set limit_bytes or limit_documents to take a part"
    else:
        yield (
            f"{name}: {found['documents']:,} documents, {found['bytes'] / 1e6:,.1f} MB, about {found['tokens']:,} "
            f"tokens, about {found['seconds']:,.0f} s"
        )
    yield (
        f"  {found['bytes_per_token']:.2f} bytes per token, {found['bytes_per_second_per_process'] / 1e6:.2f} MB/s per "
        f"process (measured on {found['sampled_bytes'] / 1e6:.1f} MB)"
    )
    if found["streamed"]:
        yield "  downloading is not in the time"
