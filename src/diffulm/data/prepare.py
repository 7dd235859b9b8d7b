"""Text to token stores: read sources, split off held-out documents, tokenise, report.

    out/prepare.json             written last: request, statistics per source (the dict `prepare` returns)
    out/<source>/train/          token store (tokens.py)
    out/<source>/heldout/        token store
    out/<source>/repeats.npz     how its train text overlaps with held-out text of all sources

A source is read twice (scan, tokenise), so that its text is never all in memory. Work is done in pieces that other
processes may take, and that are kept when a run is killed (pieces.py).
A document is held out by a hash of its text alone: the split depends neither on order nor on workers, and a document
that is in two sources falls on the same side in both.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..runtime import atomic_folder, fsync_folder, read_json, write_atomic
from .pieces import Encoder, Joined, join_pieces, write_pieces
from .sources import Source, progress_bars, stamp
from .split import Scan, scan
from .tokens import ShardWriter, TokenStore, smallest_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
_SPLITS = ("train", "heldout")
_REPEATS = "repeats.npz"


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
    refuses invalid UTF-8 instead of replacing and counting it. `workers`: processes that tokenise (with more than
    one, a script that calls this needs the usual `if __name__ == "__main__"`).

    A second call with the same text, tokenizer and fraction tokenises nothing, and reads nothing either while files
    have the size and time they had; after an interruption, finished sources and pieces are kept. ValueError for
    sources without text, bad input files, a foreign `out`, or one of another request.
    """
    from diffulm.tokenizer import fingerprint

    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"prepare needs one or more sources with different names, not {names}")
    if not 0 <= heldout_fraction < 1 or workers < 1:
        raise ValueError(f"heldout_fraction {heldout_fraction} must be in [0, 1), workers {workers} at least 1")
    out, vocabulary = Path(out), fingerprint(tokenizer)
    asked = {"stamps": {s.name: stamp(s) for s in sources}, "strict": strict, "heldout_fraction": heldout_fraction}
    asked = json.loads(json.dumps({**asked, "tokenizer": vocabulary, "format": FORMAT}))
    if (found := _unchanged(out, asked)) is not None:
        report, stores = found
        _check_size(stores, min_window)
        return _write_report(out, _with_weights(report, sources))
    with _workspace(out, progress) as cache:
        scans = [scan(source, cache, heldout_fraction=heldout_fraction, strict=strict) for source in sources]
        grams = np.unique(np.concatenate([item.grams for item in scans]))
        content = [FORMAT, vocabulary, heldout_fraction, [[item.source.name, item.fingerprint] for item in scans]]
        _refuse_another(out, request := hashlib.sha256(json.dumps(content).encode()).hexdigest())
        stores = []
        encoder = Encoder(tokenizer, smallest_dtype(len(tokenizer)), grams)
        keys = [_key(item, grams) for item in scans]
        _sweep(out, keys)
        for item, key in zip(scans, keys, strict=True):
            folder = out / item.source.name
            if _stores(folder, key, vocabulary, verify=True) is None:
                _write_stores(item, folder, key, encoder, vocabulary, workers, progress)
            opened = _stores(folder, key, vocabulary, verify=False)
            assert opened is not None
            stores.append(opened)
        _check_size(stores, min_window)
        joined = [_read_repeats(out / name) for name in names]
        seen = np.logical_or.reduce([part.seen for part in joined])
        statistics = [_statistics(*row, grams, seen) for row in zip(scans, keys, stores, joined, strict=True)]
        report = {"format": FORMAT, "request": request, "tokenizer": vocabulary, "heldout_fraction": heldout_fraction}
        report["sources"] = dict(zip(names, statistics, strict=True))
        _write_report(out, {**report, "asked": asked})
        (out / "prepare.partial").unlink(missing_ok=True)
        _sweep(out, [])
        for leftover in out.glob(".stream-*"):
            shutil.rmtree(leftover)
        fsync_folder(out)
    return {**report, "asked": asked}


def _unchanged(out: Path, asked: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, TokenStore]]] | None:
    """(report, stores) of a finished run that was asked for just this, None unless all of it is whole."""
    path = out / "prepare.json"
    report = read_json(path) if path.is_file() else None
    if not isinstance(report, dict) or report.get("asked") != asked:
        return None
    found = []
    for name, entry in report["sources"].items():
        stores = _stores(out / name, entry["fingerprint"], asked["tokenizer"], verify=None)
        if stores is None:
            return None
        found.append(stores)
    return report, found


def _with_weights(report: dict[str, Any], sources: Sequence[Source]) -> dict[str, Any]:
    entries = {s.name: {**report["sources"][s.name], "weight": s.weight, "path": s.path} for s in sources}
    return {**report, "sources": entries}


def _write_report(out: Path, report: dict[str, Any]) -> dict[str, Any]:
    path = out / "prepare.json"
    if not path.is_file() or read_json(path) != report:
        write_atomic(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def _check_size(stores: list[dict[str, TokenStore]], min_window: int | None) -> None:
    tokens = sum(found["train"].tokens for found in stores)
    if min_window is not None and tokens < min_window:
        raise ValueError(f"text shorter than one window: {tokens} train tokens, {min_window} needed; add text")


def _key(item: Scan, grams: NDArray[np.uint64]) -> str:
    """Fingerprint of a source's stores: the kept text, how it is split, and what may not be repeated."""
    parts = f"{item.fingerprint} {item.limit} {hashlib.sha256(grams.tobytes()).hexdigest()}"
    return hashlib.sha256(parts.encode()).hexdigest()


def _write_stores(
    item: Scan, folder: Path, key: str, encoder: Encoder, vocabulary: str, workers: int, progress: bool
) -> None:
    """`folder` with the two stores of one source; it appears whole or not at all, its pieces stay until it does."""
    pieces = _pieces(folder.parent, item.source.name, key)
    with _bar(f"tokenise {item.source.name}", item.kept, progress) as advance:
        count = write_pieces(item, pieces, encoder, workers, advance)
    with atomic_folder(folder) as aside:
        train = ShardWriter(aside / "train", dtype=encoder.dtype, tokenizer=vocabulary, source=key)
        heldout = ShardWriter(aside / "heldout", dtype=encoder.dtype, tokenizer=vocabulary, source=key)
        with train, heldout:
            joined = join_pieces(item, pieces, count, len(encoder.grams), train, heldout)
        buffer = io.BytesIO()
        np.savez(buffer, left_out=joined.left_out, grams=len(joined.seen), seen=np.packbits(joined.seen))
        write_atomic(aside / _REPEATS, buffer.getvalue())
    shutil.rmtree(pieces)


def _read_repeats(folder: Path) -> Joined:
    with np.load(folder / _REPEATS, allow_pickle=False) as found:
        return Joined(int(found["left_out"]), np.unpackbits(found["seen"], count=int(found["grams"])).astype(bool))


def _stores(folder: Path, key: str, tokenizer: str, *, verify: bool | None) -> dict[str, TokenStore] | None:
    """The two stores in `folder`, None unless both are whole and hold just what was scanned."""
    try:
        stores = {split: TokenStore.open(folder / split, tokenizer=tokenizer, verify=verify) for split in _SPLITS}
    except ValueError:
        return None
    whole = all(store.source == key for store in stores.values()) and (folder / _REPEATS).is_file()
    return stores if whole else None


def _pieces(out: Path, name: str, key: str) -> Path:
    return out / f".pieces-{name}-{key[:16]}"


def _sweep(out: Path, keys: list[str]) -> None:
    """Delete pieces of other requests."""
    for leftover in out.glob(".pieces-*"):
        if not leftover.name.endswith(tuple(key[:16] for key in keys)):
            shutil.rmtree(leftover)


@contextlib.contextmanager
def _workspace(out: Path, progress: bool) -> Iterator[Path]:
    """Claim `out`; yields the folder for `datasets`' cache, emptied at the end but for what a next run goes on with.

    ValueError: not ours.
    """
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


@contextlib.contextmanager
def _bar(what: str, documents: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; yields the function that moves it on by some documents."""
    if not wanted:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=documents)
        yield lambda n: bar.advance(task, n)


def _refuse_another(out: Path, request: str) -> None:
    """ValueError when `out` holds the finished text of another request."""
    path = out / "prepare.json"
    if not path.exists():
        return
    report = read_json(path)
    if not isinstance(report, dict) or report.get("format") != FORMAT or report.get("request") != request:
        raise ValueError(
            f"{out} holds prepared text of another request (other text, tokenizer, fraction or version); "
            "choose another folder or delete it"
        )


def _statistics(
    item: Scan,
    key: str,
    stores: dict[str, TokenStore],
    joined: Joined,
    grams: NDArray[np.uint64],
    seen: NDArray[np.bool_],
) -> dict[str, Any]:
    """What prepare.json says of a source. `ngram13`: its distinct held-out 13-grams, and which share of them occurs in
    the train text of any source."""
    hit = seen[np.searchsorted(grams, item.grams)]
    return {
        "path": item.source.path,
        "weight": item.source.weight,
        "fingerprint": key,
        "excluded": item.excluded,
        "unused_exclude": item.unused_exclude,
        "empty": item.empty,
        "duplicates": item.duplicates,
        "invalid_utf8": item.invalid_utf8,
        "repeats_left_out": joined.left_out,
        **{
            split: {"documents": store.documents, "tokens": store.tokens, "bytes": store.bytes}
            for split, store in stores.items()
        },
        "ngram13": {"heldout": len(hit), "overlap": float(hit.mean()) if len(hit) else 0.0},
    }
