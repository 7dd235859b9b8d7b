"""The tasks of `diffulm eval`: where each one's construction is packaged in lm-eval, and its file under --data-dir.

A prompt, its options and the gold answer are built by lm-eval from the packaged YAML, offline as online: a local record
is only brought to the schema of the Hub's data set. What differs is said here: the split, where ours is another.
"""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from . import schemas
from .schemas import Record

#: Exemplars set aside from a split that has none of its own: always the same ones, whatever the number of shots.
EXEMPLARS = 8


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        packaged: YAML files of lm-eval 0.4.13 (a pattern below lm_eval/tasks); several are parts of one task.
        file: gzip file below the data folder; the same without .gz is read too.
        split: split that the file holds.
        adapt: brings a local record to the packaged schema; raises KeyError, TypeError or ValueError where it is wrong.
        changes: keys of the packaged config that the local file needs otherwise.
        metric: the task's main figure.
        remark: what a reader of the score must know.
    """

    name: str
    packaged: str
    file: str
    split: str
    adapt: Callable[[Record], Record]
    changes: Record = field(default_factory=dict)
    metric: str = "acc"
    remark: str = ""


_OPENAI = {"doc_to_text": "{{context}}", "doc_to_target": "{{' '+continuation}}", "should_decontaminate": False}
_WINOGRAD = {
    "doc_to_text": "gold",
    "doc_to_choice": "{{context_options}}",
    "doc_to_target": "continuation",
    "process_docs": None,
    "should_decontaminate": False,
}
_NORM: Record = {"metric": "acc_norm"}

TASKS = {
    task.name: task
    for task in (
        Task(
            "lambada", "lambada/lambada_openai.yaml", "lambada/lambada_openai.jsonl.gz", "test", schemas.lambada_openai,
            _OPENAI,
        ),
        Task(
            "lambada_standard", "lambada/lambada_standard.yaml", "lambada/lambada_test_plain_text.txt.gz", "test",
            schemas.line,
            remark="the tokenised, lower-case file that the paper scored",
        ),
        Task(
            "hellaswag", "hellaswag/hellaswag.yaml", "hellaswag/validation.jsonl.gz", "validation", schemas.hellaswag,
            **_NORM,
        ),
        Task(
            "winogrande", "winogrande/default.yaml", "winogrande/validation.jsonl.gz", "validation", schemas.winogrande
        ),
        Task("piqa", "piqa/piqa.yaml", "piqa/validation.jsonl.gz", "validation", schemas.piqa, **_NORM),
        Task("siqa", "siqa/siqa.yaml", "siqa/validation.jsonl.gz", "validation", schemas.siqa),
        Task(
            "arc_easy", "arc/arc_easy.yaml", "arc/easy_test.jsonl.gz", "test",
            schemas.numbered("question", "Question: "), **_NORM,
        ),
        Task(
            "arc_challenge", "arc/arc_challenge.yaml", "arc/challenge_validation.jsonl.gz", "validation", schemas.asked,
            remark="local file: the validation split (299), not the usual test split", **_NORM,
        ),
        Task("boolq", "super_glue/boolq/default.yaml", "boolq/validation.jsonl.gz", "validation", schemas.boolq),
        Task(
            "openbookqa", "openbookqa/openbookqa.yaml", "openbookqa/test.jsonl.gz", "test",
            schemas.numbered("question_stem"), **_NORM,
        ),
        Task("copa", "super_glue/copa/default.yaml", "copa/validation.jsonl.gz", "validation", schemas.copa),
        Task(
            "sciq", "sciq/sciq.yaml", "sciq/validation.jsonl.gz", "validation", schemas.sciq,
            remark="local file: the validation split, not the usual test split",
        ),
        Task(
            "commonsense_qa", "commonsense_qa/default.yaml", "commonsense_qa/validation.jsonl.gz", "validation",
            schemas.commonsense,
        ),
        Task("mmlu", "mmlu/default/mmlu_*.yaml", "mmlu/all.jsonl.gz", "test", schemas.mmlu),
        Task("winograd", "wsc273/default.yaml", "winograd/wsc273.jsonl.gz", "test", schemas.winograd, _WINOGRAD),
    )
}  # fmt: skip

#: Texts known by name: file, and the pattern of a line that opens a document.
TEXTS = {
    "wikitext2": "wikitext2_raw/test.txt.gz",
    "wikitext2_valid": "wikitext2_raw/valid.txt.gz",
}


def find_tasks(names: Sequence[str], written: Sequence[str] = ()) -> list[str]:
    """The names as tasks, texts by name, or paths of text files; "all" is every task scored by likelihood, "generation"
    every one of `written`, in which a model writes. ValueError for an unknown name."""
    found: list[str] = []
    for name in (part for given in names for part in given.split(",") if part):
        if name == "all":
            found += TASKS
        elif name == "generation" and written:
            found += written
        elif name in TASKS or name in written or name in TEXTS or Path(name).expanduser().is_file():
            found.append(name)
        else:
            known = [*TASKS, *written, *TEXTS]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {_listed(written)}, or a text file"
            raise ValueError(f"unknown task {name!r}; {hint}")
    if not found:
        raise ValueError(f"there is no task; give --tasks with some of {_listed(written)}, or text files")
    return list(dict.fromkeys(found))


def _listed(written: Sequence[str]) -> str:
    """All that `--tasks` knows by name; quality is measured by itself (quality.py)."""
    return ", ".join([*TASKS, *written, *TEXTS, "all", *(["generation"] if written else []), "quality"])


def find_texts(names: Sequence[str]) -> list[str]:
    """The names, all of them texts by name or paths of text files; ValueError for another."""
    other = next((name for name in names if name not in TEXTS and not Path(name).expanduser().is_file()), None)
    if other is not None:
        raise ValueError(
            f"{other!r} is no text; beside quality give {', '.join(TEXTS)} or text files, tasks by themselves"
        )
    return list(names)


# ------------------------------------------------------------------------------------------------------- reading


class Local(Protocol):
    """What is read of a task: its name, its file below the data folder, the split it holds, what a record must be."""

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def adapt(self) -> Callable[[Record], Record]: ...


def check_limit(limit: int | None) -> None:
    """ValueError for a number of documents below 1; None is no limit."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")


def read_text(path: Path, *, hub: bool = False) -> str:
    """A UTF-8 file, gzip or not, line ends made one kind. hub: the Hub has what it holds, too. ValueError that names
    the file."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    there = next((p for p in (path, plain) if p.is_file()), None)
    if there is None:
        raise ValueError(
            f"there is no file {path}; check --data-dir"
            + (", or leave it out to take the task from the Hub" if hub else "")
        )
    try:
        data = there.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        return data.decode("utf-8").replace("\r\n", "\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{there} cannot be read ({reason}); fetch it again") from error


def read_records(task: Local, folder: Path, *, hub: bool = False) -> list[Record]:
    """The records of a task's local file, in the packaged schema. hub: the task can be had without the file, which the
    message of a missing one says. ValueError with file, line and what is wrong."""
    path = folder / task.file
    records = []
    # Not splitlines: texts hold U+2028 and U+0085.
    for number, line in enumerate(read_text(path, hub=hub).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line) if ".jsonl" in path.name else {"text": line}
            if not isinstance(record, dict):
                raise TypeError("a line must be a JSON object")
            records.append(task.adapt(record))
        except (KeyError, TypeError, ValueError) as error:
            what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}, line {number}: {what}; {task.name} needs another file") from error
    if not records:
        raise ValueError(f"{path} holds no records; fetch it again")
    return records


def set_aside(records: list[Record], name: str) -> tuple[list[Record], list[Record]]:
    """(exemplars, the rest): EXEMPLARS records spread evenly over the split, never scored when shots are shown."""
    if len(records) <= EXEMPLARS:
        raise ValueError(
            f"{name} has {len(records)} records, too few to set {EXEMPLARS} aside as exemplars; use --fewshot 0"
        )
    chosen = {(2 * i + 1) * len(records) // (2 * EXEMPLARS) for i in range(EXEMPLARS)}
    return [records[i] for i in sorted(chosen)], [r for i, r in enumerate(records) if i not in chosen]


def documents_of(name: str, folder: Path | None) -> list[str]:
    """The documents of a text for perplexity: WikiText articles, the lines of a jsonl file, else the whole file."""
    if name in TEXTS:
        if folder is None:
            raise ValueError(f"{name} is read from a local file; give --data-dir with {TEXTS[name]} in it")
        text, path = read_text(folder / TEXTS[name]), folder / TEXTS[name]
        return _articles(text)
    path = Path(name).expanduser()
    text = read_text(path)
    if ".jsonl" not in path.name:
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                documents.append(str(json.loads(line)["text"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: not a JSON object with a field text; give another file"
            ) from error
    return documents


def _articles(text: str) -> list[str]:
    """WikiText cut before each title of the first order (" = Title = "), nothing dropped."""
    parts: list[list[str]] = [[]]
    for line in text.split("\n"):
        bare = line.strip()
        title = bare.startswith("= ") and bare.endswith(" =") and not bare.startswith("= =")
        if title and any(piece.strip() for piece in parts[-1]):
            parts.append([])
        parts[-1].append(line)
    return ["\n".join(part) for part in parts]
