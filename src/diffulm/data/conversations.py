"""Conversations as people store them, read into one schema: messages with a role and a content.

The format is told by the keys of a row, and one source has one format:

    messages     {"messages": [{"role": "user", "content": "..."}, ...]}; content may be a list of text parts
    sharegpt     {"conversations": [{"from": "human", "value": "..."}, ...]}, optionally "system"
    alpaca       {"instruction": "...", "input": "..." (optional), "output": "..."}
    pairs        {"prompt": "...", "response": "..."}; also prompt/completion, question/answer and input/output
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter
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
#: The remedy of every error that a bad row stops at.
SKIP_BAD = "or leave bad rows out: --skip-bad, in a recipe sft.skip_bad = true"


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
        return [_message(i, turn, "role", "content", {}) for i, turn in enumerate(_list(row, "messages"), 1)]
    if kind == "sharegpt":
        found = enumerate(_list(row, "conversations"), 1)
        turns = [_message(i, turn, "from", "value", _SHAREGPT_ROLES) for i, turn in found]
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


def _message(number: int, turn: Any, role: str, content: str, names: dict[str, str]) -> Message:
    if not isinstance(turn, dict) or role not in turn or content not in turn:
        found = ", ".join(turn) if isinstance(turn, dict) else type(turn).__name__
        raise ValueError(f"a turn has {found or 'nothing'} in place of {role!r} and {content!r}; mend the row")
    speaker, said = names.get(str(turn[role]), str(turn[role])), turn[content]
    return {"role": speaker, "content": _joined(said, number, speaker) if isinstance(said, list) else said}


def _joined(parts: list[Any], number: int, speaker: str) -> str:
    """The text of a content that is a list of parts, {"type": "text", "text": ...} each: one part a line."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise ValueError(
                f"message {number} ({speaker}) has a part of type {kind!r} among its content; only parts of type "
                "'text' can be learned: take it out, or leave the conversation out"
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f"message {number} ({speaker}) has a text part without text; mend the row")
        texts.append(part["text"])
    return "\n".join(texts)


def read_conversations(source: Source, *, heldout_fraction: float = 0.0, skip_bad: bool = False) -> Reading:
    """Every distinct conversation of a source, checked.

    `heldout_fraction` of them, by a hash of their messages, is held out: at least one where there are two, none at 0.
    Rows must all have one format: that of the first or, under `skip_bad`, of most good ones. A conversation that is
    there twice is kept once. The source's `limit_documents` ends the reading.

    Raises:
        ValueError: with file and line (or row), for a row that is no conversation, unless `skip_bad` counts it; and
            when none is left.
    """
    if source.exclude or source.limit_bytes:
        raise ValueError(
            f"source {source.name!r}: exclude and limit_bytes are for text, not for conversations; drop them"
        )
    reading, seen = Reading(), dict[int, tuple[tuple[Message, ...], str]]()
    rows = islice(_rows(source), source.limit_documents)
    for where, messages in _most(rows, reading) if skip_bad else _all(rows):
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


def _conversation(row: Any) -> tuple[str, list[Message]]:
    """(format, messages) of a row. ValueError where it is no conversation."""
    if isinstance(row, ValueError):
        raise row
    kind = format_of(row)
    messages = messages_of(row, kind)
    check_messages(messages, answered=True)
    return kind, messages


def _all(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, list[Message]]]:
    """(place, messages) of every row. ValueError at the first that is bad, or of another format than the first."""
    first = ""
    for where, row in rows:
        try:
            kind, messages = _conversation(row)
            first = first or kind
            if kind != first:
                raise ValueError(
                    f"this row is {kind}, the ones before it {first}; give each format a source of its own"
                )
        except ValueError as error:
            raise ValueError(f"{where}: {error} ({SKIP_BAD})") from error
        yield where, messages


def _most(rows: Iterable[tuple[str, Any]], reading: Reading) -> Iterator[tuple[str, list[Message]]]:
    """(place, messages) of the good rows that have the format of most of them (of as many: the first); the others are
    counted. One stray row in front must not make the rest bad, so nothing is handed on before all is read.
    """
    found: list[tuple[str, str, list[Message] | ValueError]] = []
    for where, row in rows:
        try:
            found.append((where, *_conversation(row)))
        except ValueError as error:
            found.append((where, "", error))
    most = next(iter(Counter(kind for _, kind, _ in found if kind).most_common(1)), ("", 0))[0]
    for where, kind, messages in found:
        if isinstance(messages, ValueError):
            reading.skip(f"{where}: {messages}")
        elif kind != most:
            reading.skip(f"{where}: this row is {kind}, most are {most}; give each format a source of its own")
        else:
            yield where, messages


def _digest(messages: list[Message]) -> int:
    plain = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=_DIGEST_BITS // 8).digest(), "big")
