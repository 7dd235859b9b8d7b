"""Conversations as people store them, read into one schema: messages with a role and a content.

The format is told by the keys of a row, and one file has one format:

    messages     {"messages": [{"role": "user", "content": "..."}, ...]}
    sharegpt     {"conversations": [{"from": "human", "value": "..."}, ...]}, optionally "system"
    alpaca       {"instruction": "...", "input": "..." (optional), "output": "..."}
    pairs        {"prompt": "...", "response": "..."}; also prompt/completion, question/answer and input/output
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..runtime import log
from ..template import Message, check_messages
from .sources import Source, open_parts

_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("input", "output"))
KNOWN = (
    "messages (role, content) | conversations (from, value) | instruction, output (and input) | "
    + " | ".join(", ".join(pair) for pair in _PAIRS)
)  # fmt: skip
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_DIGEST_BITS = 64


@dataclass(frozen=True)
class Conversation:
    """Checked messages, the place they were read from, and whether they are held out."""

    messages: tuple[Message, ...]
    where: str
    heldout: bool = False


@dataclass
class Reading:
    """What came of reading: `bad` counts skipped rows, `problems` says why for the first few of them."""

    conversations: list[Conversation] = field(default_factory=list)
    bad: int = 0
    duplicates: int = 0
    problems: list[str] = field(default_factory=list)

    def skip(self, problem: str) -> None:
        """Count a row that is left out."""
        self.bad += 1
        if len(self.problems) < 3:
            self.problems.append(problem)


def format_of(row: Any) -> str:
    """The format of a row by its keys. ValueError that lists the keys found and the formats known."""
    keys = set(row) if isinstance(row, dict) else set()
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    for pair in _PAIRS:
        if keys.issuperset(pair):
            return "/".join(pair)
    found = ", ".join(sorted(keys)) if isinstance(row, dict) else type(row).__name__
    raise ValueError(f"this is no format of conversations (found: {found or 'nothing'}); known: {KNOWN}")


def messages_of(row: dict[str, Any], kind: str) -> list[Message]:
    """Messages of a row of that format; texts stay as they are. ValueError where a field is not what it should be."""
    if kind == "messages":
        return [_message(turn, "role", "content", {}) for turn in _list(row, "messages")]
    if kind == "sharegpt":
        turns = [_message(turn, "from", "value", _SHAREGPT_ROLES) for turn in _list(row, "conversations")]
        system = row.get("system")
        return [{"role": "system", "content": system}, *turns] if isinstance(system, str) and system.strip() else turns
    if kind == "alpaca":
        more = _text(row, "input") if row.get("input") is not None else ""
        question = _text(row, "instruction") + (f"\n\n{more}" if more.strip() else "")
        answer = _text(row, "output")
    else:
        first, second = kind.split("/")
        question, answer = _text(row, first), _text(row, second)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _list(row: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(row[key], list):
        raise ValueError(f"field {key!r} is {type(row[key]).__name__}, not a list of turns; mend the row")
    return list(row[key])


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"field {key!r} is {type(row[key]).__name__}, not text; mend the row")
    return str(row[key])


def _message(turn: Any, role: str, content: str, names: dict[str, str]) -> Message:
    if not isinstance(turn, dict) or role not in turn or content not in turn:
        found = ", ".join(turn) if isinstance(turn, dict) else type(turn).__name__
        raise ValueError(f"a turn has {found or 'nothing'} in place of {role!r} and {content!r}; mend the row")
    return {"role": names.get(str(turn[role]), str(turn[role])), "content": turn[content]}


def read_conversations(source: Source, *, heldout_fraction: float = 0.0, skip_bad: bool = False) -> Reading:
    """Every distinct conversation of a source, checked.

    `heldout_fraction` of them, by a hash of their messages, is held out: at least one where there are two, none at 0.
    Rows must all have the format of the first. A conversation that is there twice is kept once. The source's
    `limit_documents` ends the reading.

    Raises:
        ValueError: with file and line (or row), for a row that is no conversation, unless `skip_bad` counts it; and
            when none is left.
    """
    if source.exclude or source.limit_bytes:
        raise ValueError(
            f"source {source.name!r}: exclude and limit_bytes are for text, not for conversations; drop them"
        )
    reading, seen = Reading(), dict[int, tuple[tuple[Message, ...], str]]()
    for where, messages in _checked(islice(_rows(source), source.limit_documents), reading, skip_bad):
        digest = _digest(messages)
        if digest in seen:
            reading.duplicates += 1
        else:
            seen[digest] = tuple(messages), where
    if not seen:
        first = f"; the first: {reading.problems[0]}" if reading.problems else ""
        raise ValueError(f"source {source.name!r} ({source.path}) has no conversation ({reading.bad} bad rows{first})")
    limit = int(heldout_fraction * 2.0**_DIGEST_BITS)
    if heldout_fraction and len(seen) > 1:  # neither side may be empty by chance
        limit = min(max(limit, min(seen) + 1), max(seen))
    else:
        limit = 0
    reading.conversations = [Conversation(messages, where, d < limit) for d, (messages, where) in seen.items()]
    if reading.bad:
        log.warning("source %s: %d bad rows skipped; %s", source.name, reading.bad, "; ".join(reading.problems))
    return reading


def _rows(source: Source) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row of a source; what is no JSON is handed on as its ValueError, to be counted."""
    for name, part in open_parts(source, _SUFFIXES):
        if isinstance(part, Path):
            yield from _file_rows(part)
        else:
            yield from ((f"{name}, row {number}", row) for number, row in enumerate(part))


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            if path.name.lower().removesuffix(".gz").endswith(".jsonl"):
                for number, line in enumerate(file, 1):  # a binary file breaks lines at \n only: U+2028 stays text
                    if line.strip():
                        yield f"{path}, line {number}", _parsed(line)
            else:
                whole = _parsed(file.read())
                items = whole if isinstance(whole, list) else [whole]
                yield from ((f"{path}, item {number}", row) for number, row in enumerate(items, 1))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}); fetch or compress it again") from error


def _parsed(data: bytes) -> Any:
    """The JSON of some bytes, or the ValueError that says why it is none."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return ValueError(f"this is not valid JSON in UTF-8 ({error}); repair or remove it")


def _checked(rows: Iterable[tuple[str, Any]], reading: Reading, skip_bad: bool) -> Iterator[tuple[str, list[Message]]]:
    """(place, messages) of every good row; a bad one raises or is counted."""
    kind = ""
    for where, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            found = format_of(row)
            kind = kind or found
            if found != kind:
                raise ValueError(
                    f"this row is {found}, the ones before it {kind}; give each format a source of its own"
                )
            messages = messages_of(row, kind)
            check_messages(messages, answered=True)
        except ValueError as error:
            problem = f"{where}: {error}"
            if not skip_bad:
                raise ValueError(f"{problem} (or leave bad rows out: sft.skip_bad)") from error
            reading.skip(problem)
            continue
        yield where, messages


def _digest(messages: list[Message]) -> int:
    plain = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=_DIGEST_BITS // 8).digest(), "big")
