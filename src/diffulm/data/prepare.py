"""Text to token stores: read sources, split off held-out documents, tokenise, report.

    out/prepare.json             written last: request, statistics per source (the dict `prepare` returns)
    out/<source>/train/          token store (tokens.py)
    out/<source>/heldout/        token store

A source is read several times (scan; repeats; tokenise; 13-grams), so that its text is never all in memory.
A document is held out by a hash of its text alone: the split depends neither on order nor on workers, and a document
that is in two sources falls on the same side in both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffulm.data.sources import Source, progress_bars, tokenised
from diffulm.data.split import Scan, leave_out_repeats, overlaps, scan
from diffulm.data.tokens import ShardWriter, TokenStore, smallest_dtype
from diffulm.runtime import atomic_folder, fsync_folder, read_json, write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
_SPLITS = ("train", "heldout")


def _write_stores(
    item: Scan, folder: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: str, workers: int, cache: Path
) -> None:
    """`folder` with the two stores of one source; it appears whole or not at all."""
    dtype = smallest_dtype(len(tokenizer))
    with tempfile.TemporaryDirectory(dir=cache) as scratch, atomic_folder(folder) as aside:
        rows = tokenised(
            item.source.name, item.texts, tokenizer, dtype, workers, Path(scratch), fingerprint=item.key
        ).with_format("numpy")
        train = ShardWriter(aside / "train", dtype=dtype, tokenizer=vocabulary, source=item.key)
        heldout = ShardWriter(aside / "heldout", dtype=dtype, tokenizer=vocabulary, source=item.key)
        with train, heldout:
            for row in rows:
                (heldout if row["heldout"] else train).add(row["ids"], int(row["bytes"]))


def _stores(item: Scan, folder: Path, tokenizer: str, *, verify: bool) -> dict[str, TokenStore] | None:
    """The two stores in `folder`, None unless both are whole and hold just what was scanned."""
    try:
        stores = {split: TokenStore.open(folder / split, tokenizer=tokenizer, verify=verify) for split in _SPLITS}
    except ValueError:
        return None
    return stores if all(store.source == item.key for store in stores.values()) else None


@contextlib.contextmanager
def _workspace(out: Path, progress: bool) -> Iterator[Path]:
    """Claim `out`; yields a folder inside it for `datasets`' cache, removed at the end. ValueError: not ours."""
    marker = out / "prepare.partial"
    if not marker.exists() and not (out / "prepare.json").exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} holds something that is no prepared text; choose a new or empty folder")
        out.mkdir(parents=True, exist_ok=True)
        marker.touch()
    for leftover in [*out.glob(".*.tmp"), *out.glob(".cache-*")]:  # of a killed run
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    try:
        with progress_bars(progress), tempfile.TemporaryDirectory(dir=out, prefix=".cache-") as cache:
            yield Path(cache)
    finally:
        if list(out.iterdir()) == [marker]:  # refused before anything was written
            marker.unlink()


def prepare(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    heldout_fraction: float = 0.05,
    min_window: int | None = None,
    strict: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenise `sources` into `out` and return the statistics written to `out/prepare.json`.

    `heldout_fraction` of the documents (not of the tokens), at least one where a source has two, is held out of each
    source; 0 holds out nothing. `min_window`: fewest train tokens, over all sources, worth going on with. `strict`
    refuses invalid UTF-8 instead of replacing and counting it. `workers`: processes that tokenise.

    A second call with the same text, tokenizer and fraction tokenises nothing; after an interruption, finished sources
    are kept. ValueError for sources without text, bad input files, a foreign `out`, or one of another request.
    """
    from diffulm.tokenizer import fingerprint

    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"prepare needs one or more sources with different names, not {names}")
    if not 0 <= heldout_fraction < 1 or workers < 1:
        raise ValueError(f"heldout_fraction {heldout_fraction} must be in [0, 1), workers {workers} at least 1")
    out, vocabulary = Path(out), fingerprint(tokenizer)
    with _workspace(out, progress) as cache:
        scans = [scan(source, cache, heldout_fraction=heldout_fraction, strict=strict) for source in sources]
        leave_out_repeats(scans)
        content = [FORMAT, vocabulary, heldout_fraction, [[item.source.name, item.fingerprint] for item in scans]]
        request = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        before = _finished_before(out, request)
        stores = []
        for item in scans:
            folder = out / item.source.name
            found = _stores(item, folder, vocabulary, verify=before is None)
            if found is None:
                _write_stores(item, folder, tokenizer, vocabulary, workers, cache)
                found = _stores(item, folder, vocabulary, verify=False)
            assert found is not None
            stores.append(found)
        tokens = sum(found["train"].tokens for found in stores)
        if min_window is not None and tokens < min_window:
            raise ValueError(f"text shorter than one window: {tokens} train tokens, {min_window} needed; add text")
        if before is None:
            grams = overlaps(scans)
        else:
            grams = [before["sources"][name]["ngram13"] for name in names]
        statistics = [_statistics(*found) for found in zip(scans, stores, grams, strict=True)]
        report = {"format": FORMAT, "request": request, "tokenizer": vocabulary, "heldout_fraction": heldout_fraction}
        report["sources"] = dict(zip(names, statistics))
        if report != before:
            write_atomic(out / "prepare.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        (out / "prepare.partial").unlink(missing_ok=True)
        fsync_folder(out)
    return report


def _finished_before(out: Path, request: str) -> dict[str, Any] | None:
    """The report of an earlier finished run of the same request; ValueError when it was another request."""
    path = out / "prepare.json"
    if not path.exists():
        return None
    report = read_json(path)
    if not isinstance(report, dict) or report.get("format") != FORMAT or report.get("request") != request:
        raise ValueError(
            f"{out} holds prepared text of another request (other text, tokenizer, fraction or version); "
            "choose another folder or delete it"
        )
    return report


def _statistics(item: Scan, stores: dict[str, TokenStore], grams: dict[str, float]) -> dict[str, Any]:
    return {
        "path": item.source.path,
        "weight": item.source.weight,
        "fingerprint": item.key,
        "excluded": item.excluded,
        "unused_exclude": item.unused_exclude,
        "empty": item.empty,
        "duplicates": item.duplicates,
        "invalid_utf8": item.invalid_utf8,
        "repeats_left_out": len(item.left_out),
        **{
            split: {"documents": store.documents, "tokens": store.tokens, "bytes": store.bytes}
            for split, store in stores.items()
        },
        "ngram13": grams,
    }
